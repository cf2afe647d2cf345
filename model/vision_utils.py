"""The frozen encoder, a CLIP or a SigLIP: pixels in, `(N, P, V)` features out.

Shapes: N images, S pixels on a side, P tokens per image ((S / patch_size)^2 + 1 = 50), V vision width (768 for ViT-B/32).
"""

import contextlib
import threading
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, CLIPVisionModel, SiglipVisionModel
from transformers.utils import logging as hf_logging

from .errors import BadInput
from .files import files_of_weights, find_weights, read_json_object, read_tensors, refuse_lfs_pointer
from .images import Preprocess, normalise
from .llava import TOWER
from .LMConfig import LMConfig

# `model_type` in config.json -> the class of its vision half; a SigLIP2 of fixed size is a `siglip`, too
ENCODERS = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
# where the folder has no preprocessor_config.json
SIGLIP_PREPROCESS = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
VISION = "vision_encoder."  # prefix of the encoder's tensor names in a MiniMind-V folder that contains it


class VisionEncoder:
    """The vision half of a CLIP or a SigLIP, frozen; calling it turns pixels (N, 3, S, S) into features (N, P, V).

    preprocess: a `Preprocess`, how pictures become its pixels. image_tokens, vision_width: P and V, from the model's config.
    drop_class_token: leaves out the first of a CLIP's vectors, as MiniMind2-V does; a SigLIP has none.
    """

    def __init__(self, model, device="cpu", dtype=torch.float32, preprocess=None, drop_class_token=False):
        self.model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.device = torch.device(device)
        self.dtype = dtype

        # P counts every patch, and a CLIP's class token
        config = model.config
        has_class_token = config.model_type == "clip_vision_model"
        if drop_class_token and not has_class_token:
            raise BadInput(
                "a SigLIP has no class token: name the CLIP that the weights were trained with, with --vision_path, or "
                "leave out --drop_class_token"
            )
        self.first = int(drop_class_token)  # the first vector that is kept
        self.session = None  # of ONNX Runtime, to take in place of the model
        self.image_tokens = (config.image_size // config.patch_size) ** 2 + has_class_token - self.first
        self.vision_width = config.hidden_size

        # mean and std are on the device once, rather than copied there at every call
        default = Preprocess() if has_class_token else SIGLIP_PREPROCESS
        self.preprocess = preprocess or default._replace(size=config.image_size)
        self.mean, self.std = self.preprocess.statistics(device)

        # a hook takes CLIP's vectors before the last LayerNorm and pooling, SigLIP's after that norm, before pooling; one
        # slot per thread, so that two callers at once don't mix their pictures
        self.captured = threading.local()
        vision = getattr(model, "vision_model", model)
        (vision.encoder if has_class_token else vision.post_layernorm).register_forward_hook(self._capture)

    def _capture(self, module, inputs, output):
        self.captured.features = output if torch.is_tensor(output) else output.last_hidden_state

    @torch.no_grad()
    def __call__(self, pixels):
        """uint8 pixels (N, 3, S, S) -> (N, P, V): the encoder's output for every patch, and for CLIP's class token.

        Not the pooled vector: that summarises the picture, these still say what is where.
        """
        pixel_values = normalise(pixels.to(self.device), self.mean, self.std)  # (N, 3, S, S), float32
        if self.session is not None:
            (features,) = self.session.run(None, {"pixels": pixel_values.numpy()})
            return torch.from_numpy(features)[:, self.first :]
        self.model(pixel_values.to(self.dtype))
        return self.captured.features[:, self.first :]


@contextlib.contextmanager
def quiet_transformers():
    """Silences progress bars and the report on the unused weights of the half that reads text."""
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_vision(folder, device="cpu", dtype=torch.float32, drop_class_token=False):
    """Loads the vision half of a CLIP or SigLIP folder in transformers format, or of one made by `model.export --with_vision`.

    BadInput if it is missing, incomplete, or another model.
    """
    folder = Path(folder)
    config = read_json_object(folder / "config.json")
    weights = find_weights(folder)

    # a clone without Git LFS has text in place of the weights, or of the shards that an index names
    for file in (weights, *folder.glob("*-of-*")):
        refuse_lfs_pointer(file)

    # a MiniMind-V folder that contains its encoder
    if has_vision(folder):
        model = bundled_vision(folder)
        preprocess = read_preprocess(folder, model.config)
        return VisionEncoder(model, device, dtype, preprocess, drop_class_token)

    # any other folder must be an encoder's
    if not config:
        raise BadInput(
            f"no CLIP in {folder}: download clip-vit-base-patch32 into it (see README, 'Train it for real'), "
            "name another folder with --vision_path, or try --demo"
        )
    kind = config.get("model_type")
    if kind not in ENCODERS:
        raise BadInput(
            f"{folder} is neither a CLIP nor a SigLIP of fixed size (model_type {kind}): name the folder of one with "
            "--vision_path"
        )

    # transformers fills gaps with random numbers; ask it to report them, and refuse them below
    try:
        with quiet_transformers():
            model, info = ENCODERS[kind].from_pretrained(
                folder,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # noqa: BLE001  unpickling bytes that are no pickle can raise any
        for file in files_of_weights(weights):
            read_tensors(file)  # says which file is damaged, if one is
        why = str(error).partition("\n")[0]
        raise BadInput(f"the encoder in {folder} could not be loaded ({why}): copy or download it again") from None

    # every tensor must be there, in the size that config.json says
    for name, found, expected in sorted(info["mismatched_keys"]):
        shapes = f"{name} is {tuple(found)}, config.json says {tuple(expected)}"
        raise BadInput(f"config.json and the weights in {folder} don't match ({shapes}): download both files again")
    missing = [key for key in info["missing_keys"] if "position_ids" not in key and not key.startswith("head.")]
    if missing:
        raise BadInput(f"the encoder in {folder} lacks {len(missing)} tensors, e.g. {missing[0]}: download it again")
    if hasattr(model, "head"):  # SigLIP's pooling, which is not used here
        del model.head
        model.use_head = model.config.vision_use_head = False
    preprocess = read_preprocess(folder, model.config)
    return VisionEncoder(model, device, dtype, preprocess, drop_class_token)


def read_preprocess(folder, config):
    """The `Preprocess` that a folder names for its encoder, whose config is given; None if it names none.

    It is in preprocessor_config.json, or within processor_config.json; what is null there, or missing, is as for the kind of
    encoder. Only mean, std and filter are read: pictures are squeezed to a square, never cropped, as in the published code.
    BadInput names what can't be done.
    """
    file = folder / "preprocessor_config.json"
    content = read_json_object(file)
    if not content:
        file = folder / "processor_config.json"
        content = read_json_object(file)
        content = content.get("image_processor") or content
    if not content:
        return None
    content = {name: value for name, value in content.items() if value is not None}

    def refuse(name, expected):
        raise BadInput(
            f"{file} has {name} {content[name]!r:.60}, expected {expected}: download the encoder's files again"
        )

    size = content.get("size", content.get("image_size", config.image_size))  # the latter in a MiniMind-V folder
    sides = {*size.values()} if isinstance(size, dict) else {*size} if isinstance(size, list) else {size}
    if sides != {config.image_size}:
        refuse("size" if "size" in content else "image_size", f"{config.image_size}, as config.json says")
    if not content.get("do_rescale", True):
        refuse("do_rescale", "true")
    if abs(content.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        refuse("rescale_factor", "1/255")

    default = Preprocess() if config.model_type == "clip_vision_model" else SIGLIP_PREPROCESS
    resample = content.get("resample", default.resample)
    if resample not in set(Image.Resampling):
        refuse("resample", "the number of one of Pillow's filters, 0 to 5")
    if not content.get("do_normalize", True):
        return Preprocess(config.image_size, resample, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for name in ("image_mean", "image_std"):
        values = content.get(name, default.mean)
        is_good = isinstance(values, (list, tuple)) and len(values) == 3
        if not is_good or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in values):
            refuse(name, "three numbers, on a scale from 0 to 1")
    std = content.get("image_std", default.std)
    if not all(std):
        refuse("image_std", "three numbers, on a scale from 0 to 1")
    return Preprocess(config.image_size, resample, tuple(content.get("image_mean", default.mean)), tuple(std))


def has_vision(folder):
    """Whether a folder is a MiniMind-V in transformers format that contains its encoder."""
    content = read_json_object(Path(folder) / "config.json")
    return "vision_config" in content and ("minimind" in content or content.get("model_type") == LMConfig.model_type)


def bundled_vision(folder):
    """The encoder inside a MiniMind-V folder, as transformers' own class."""
    config = read_json_object(folder / "config.json")["vision_config"]
    model = AutoModel.from_config(AutoConfig.for_model(**config))
    state = read_tensors(find_weights(folder))
    prefix = TOWER if any(name.startswith(TOWER) for name in state) else VISION
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(f"the encoder in {folder} could not be loaded: {str(error).splitlines()[0]}") from None
    return model
