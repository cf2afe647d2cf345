"""The frozen CLIP: pixels in, `(N, P, V)` features out.

Shapes: N images, P tokens per image ((image_size / patch_size)^2 + 1 = 50), V vision width (768 for ViT-B/32).
"""

import contextlib
import threading
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging as hf_logging

from .errors import BadInput
from .files import files_of_weights, find_weights, read_json_object, read_tensors, refuse_lfs_pointer
from .images import PIXEL_MEAN, PIXEL_STD, normalise
from .LMConfig import LMConfig

CLIP_MODEL_TYPES = ("clip", "clip_vision_model")  # `model_type` in a CLIP's config.json
VISION = "vision_encoder."  # prefix of CLIP's tensor names in a MiniMind-V folder that contains it


class VisionEncoder:
    """The vision half of a CLIP, frozen; calling it turns pixels (N, 3, S, S) into features (N, P, V).

    image_size, image_tokens, vision_width: S, P and V, from the model's own config.
    """

    def __init__(self, model: CLIPVisionModel, device="cpu", dtype=torch.float32):
        self.model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.device = torch.device(device)
        self.dtype = dtype

        # S, P and V: P counts every patch and the class token
        config = model.config
        self.image_size = config.image_size
        self.image_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.vision_width = config.hidden_size

        # on the device once, rather than copied there at every call
        self.mean = PIXEL_MEAN.to(device)
        self.std = PIXEL_STD.to(device)

        # a hook takes the encoder's output before the final LayerNorm and pooling; one slot per thread, so that two
        # callers at once don't mix their pictures
        self.captured = threading.local()
        encoder = getattr(model, "vision_model", model).encoder
        encoder.register_forward_hook(self._capture)

    def _capture(self, module, inputs, output):
        self.captured.features = output.last_hidden_state

    @torch.no_grad()
    def __call__(self, pixels):
        """uint8 pixels (N, 3, S, S) -> (N, P, V): the encoder's output for the class token and every patch.

        Not CLIP's pooled vector: that summarises the picture, these still say what is where.
        """
        pixel_values = normalise(pixels.to(self.device), self.mean, self.std)  # (N, 3, S, S), float32
        self.model(pixel_values.to(self.dtype))
        return self.captured.features


@contextlib.contextmanager
def quiet_transformers():
    """Silences progress bars and the report on CLIP's unused text weights."""
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


def load_vision(folder, device="cpu", dtype=torch.float32):
    """Loads the vision half of a CLIP folder in transformers format, or of a folder made by `model.export --with_vision`.

    BadInput if it is missing, incomplete, or not a CLIP.
    """
    folder = Path(folder)
    config = read_json_object(folder / "config.json")
    weights = find_weights(folder)

    # a clone without Git LFS has text in place of the weights, or of the shards that an index names
    for file in (weights, *folder.glob("*-of-*")):
        refuse_lfs_pointer(file)

    # a MiniMind-V folder that contains its CLIP
    if has_vision(folder):
        return VisionEncoder(bundled_vision(folder), device, dtype)

    # any other folder must be a CLIP's
    if not config:
        raise BadInput(
            f"no CLIP in {folder}: download clip-vit-base-patch32 into it (see README, 'Train it for real'), "
            "name another folder with --vision_path, or try --demo"
        )
    if config.get("model_type") not in CLIP_MODEL_TYPES:
        raise BadInput(
            f"{folder} is not a CLIP (model_type {config.get('model_type')}): name a CLIP's folder with --vision_path"
        )

    # transformers fills gaps with random numbers; ask it to report them, and refuse them below
    try:
        with quiet_transformers():
            model, info = CLIPVisionModel.from_pretrained(
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
        raise BadInput(f"the CLIP in {folder} could not be loaded ({why}): copy or download it again") from None

    # every tensor must be there, in the size that config.json says
    for name, found, expected in sorted(info["mismatched_keys"]):
        shapes = f"{name} is {tuple(found)}, config.json says {tuple(expected)}"
        raise BadInput(f"config.json and the weights in {folder} don't match ({shapes}): download both files again")
    missing = [key for key in info["missing_keys"] if "position_ids" not in key]
    if missing:
        raise BadInput(f"the CLIP in {folder} lacks {len(missing)} tensors, e.g. {missing[0]}: download it again")
    return VisionEncoder(model, device, dtype)


def has_vision(folder):
    """Whether a folder is a MiniMind-V in transformers format that contains its CLIP."""
    content = read_json_object(Path(folder) / "config.json")
    return content.get("model_type") == LMConfig.model_type and "vision_config" in content


def bundled_vision(folder):
    """The CLIP inside a MiniMind-V folder, as a `CLIPVisionModel`."""
    config = read_json_object(folder / "config.json")["vision_config"]
    model = CLIPVisionModel(CLIPVisionConfig(**config))
    state = read_tensors(find_weights(folder))
    state = {name.removeprefix(VISION): tensor for name, tensor in state.items() if name.startswith(VISION)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(f"the CLIP in {folder} could not be loaded: {str(error).splitlines()[0]}") from None
    return model
