"""The frozen CLIP: pixels in, `(N, P, V)` features out; and a cache of features on disk.

Shapes: N images, P tokens per image ((image_size / patch_size)^2 + 1 = 50), V vision width (768 for ViT-B/32).
"""

import contextlib
import hashlib
import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging as hf_logging

from .errors import BadInput, BadRecord
from .files import read_object, refuse_pointer, weights_in
from .images import PIXEL_MEAN, PIXEL_STD, normalise
from .LMConfig import LMConfig

CLIPS = ("clip", "clip_vision_model")  # what a CLIP's config.json calls itself
VISION = "vision_encoder."  # before the names of CLIP's tensors in a MiniMind-V folder that brings it


class VisionEncoder:
    """The vision half of a CLIP, frozen; calling it turns pixels (N, 3, S, S) into features (N, P, V).

    image_size, image_tokens, vision_width: S, P and V, from the model's own config.
    """

    def __init__(self, model: CLIPVisionModel, device="cpu", dtype=torch.float32):
        self.model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.device, self.dtype = torch.device(device), dtype
        config = model.config
        self.image_size = config.image_size
        self.image_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.vision_width = config.hidden_size
        self.mean, self.std = PIXEL_MEAN.to(device), PIXEL_STD.to(device)
        self.captured = threading.local()  # one slot a thread, so that two callers at once don't mix their pictures
        encoder = getattr(model, "vision_model", model).encoder
        encoder.register_forward_hook(self._capture)

    def _capture(self, module, inputs, output):
        self.captured.features = output.last_hidden_state

    @torch.no_grad()
    def __call__(self, pixels):
        """uint8 pixels (N, 3, S, S) -> (N, P, V): the encoder's output for the class token and every patch.

        Not CLIP's pooled vector: that is one summary of the picture, these still say what is where.
        """
        self.model(normalise(pixels.to(self.device), self.mean, self.std).to(self.dtype))
        return self.captured.features


@contextlib.contextmanager
def quiet_transformers():
    """No progress bars, and no report of the tensors of a full CLIP's text half, line by line."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_vision(folder, device="cpu", dtype=torch.float32):
    """Loads only the vision half of a CLIP folder in transformers format, or of a folder made by `model.export --with_vision`.

    BadInput if it is missing, incomplete or no CLIP.
    """
    folder = Path(folder)
    config, weights = read_object(folder / "config.json"), weights_in(folder)
    for file in (weights, *folder.glob("*-of-*")):  # the latter are the files that an index names
        refuse_pointer(file)
    if has_vision(folder):
        return VisionEncoder(bundled_vision(folder), device, dtype)
    if not config:
        raise BadInput(
            f"no CLIP in {folder}: download clip-vit-base-patch32 into it (see README, 'Train it for real'), "
            "name another folder with --vision_path, or try --demo"
        )
    if config.get("model_type") not in CLIPS:
        raise BadInput(
            f"{folder} holds no CLIP, but a {config.get('model_type')}: name a CLIP's folder with --vision_path"
        )
    told_below = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet_transformers():
            model, info = CLIPVisionModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, **told_below
            )
    except (EOFError, pickle.UnpicklingError, safetensors.SafetensorError):
        odd = f"{weights} names a file that is" if weights.suffix == ".json" else f"{weights} is"
        raise BadInput(f"{odd} not a whole file of weights: copy or download it again") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"the CLIP in {folder} could not be loaded: {str(error).splitlines()[0]}") from None
    for name, found, wanted in sorted(info["mismatched_keys"]):
        shapes = f"{name} is {tuple(found)}, by its config.json {tuple(wanted)}"
        raise BadInput(f"the CLIP in {folder} is of two models: {shapes}: download both files again")
    missing = [key for key in info["missing_keys"] if "position_ids" not in key]
    if missing:
        raise BadInput(f"the CLIP in {folder} lacks {len(missing)} tensors, first {missing[0]}: download it again")
    return VisionEncoder(model, device, dtype)


def has_vision(folder):
    """Whether a MiniMind-V folder in transformers format brings its CLIP."""
    content = read_object(Path(folder) / "config.json")
    return content.get("model_type") == LMConfig.model_type and "vision_config" in content


def bundled_vision(folder):
    """The CLIP in such a folder."""
    config = read_object(folder / "config.json")["vision_config"]
    model = CLIPVisionModel(CLIPVisionConfig(**config))
    try:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        state = {name.removeprefix(VISION): tensor for name, tensor in state.items() if name.startswith(VISION)}
        model.load_state_dict(state)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise BadInput(f"the CLIP in {folder} could not be loaded: {str(error).splitlines()[0]}") from None
    return model


# --- cached features ------------------------------------------------------------------------------------------------


def cache_key(vision_path, image_paths):
    """What a feature cache belongs to: the encoder's files and each picture's name, size and time of change."""
    digest = hashlib.sha256()
    for file in sorted(Path(vision_path).glob("*")):
        if file.suffix in (".safetensors", ".bin", ".json"):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    for path in image_paths:
        try:
            stat = os.stat(path)
        except OSError:
            stat = None
        digest.update(f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


class FeatureCache:
    """fp16 features of a list of pictures in one memory-mapped file (pictures, P, V), named after the key of `cache_key`.

    Until all rows are there it is a .tmp file. The .json beside it has the whole key, how many rows are `done`, and in
    `bad` why for each row whose picture could not be read.
    """

    def __init__(self, folder, key):
        self.file, self.partial, self.note = (Path(folder) / f"{key[:16]}{end}" for end in (".npy", ".tmp", ".json"))
        self.key = key
        self.array, self.bad = None, {}

    def __getstate__(self):
        """What a worker process is sent: it opens the file itself."""
        return {**self.__dict__, "array": None}

    def ready(self):
        """Opens the cache if it is whole; False if it must be built."""
        whole = self.note.exists() and self.file.exists() and not self.partial.exists()
        if self.array is None and whole:
            note = read_object(self.note)
            if note.get("key") == self.key:
                self.array = np.load(self.file, mmap_mode="r")
                self.bad = {int(row): why for row, why in note.get("bad", {}).items()}
        return self.array is not None

    def begun(self):
        """How many rows a build that was cut off has left, and the problems among them."""
        note = read_object(self.note) if self.partial.exists() else {}
        return (note.get("done", 0), note["bad"]) if note.get("key") == self.key else (0, {})

    def build(self, encoder, pictures, loader, progress):
        """Runs CLIP once over that many pictures, less those that are `begun`. `loader` yields the others, in the order of
        the cache's rows, as uint8 pixels (N, 3, S, S) and a list of N problems, None for a good picture. OSError if there is
        no room for all of them."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        shape = (pictures, encoder.image_tokens, encoder.vision_width)
        done, bad = self.begun()
        self.note_down(done, bad)
        array = np.lib.format.open_memmap(self.partial, mode="r+" if done else "w+", dtype=np.float16, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process without a word
            with open(self.partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.partial.stat().st_size)
        for pixels, problems in loader:
            features = encoder(pixels).to(device="cpu", dtype=torch.float16).numpy()
            array[done : done + len(features)] = features
            bad |= {done + i: problem for i, problem in enumerate(problems) if problem}
            done += len(features)
            progress(len(features))
            array.flush()  # before the note says that they are there
            self.note_down(done, bad)
        os.replace(self.partial, self.file)

    def note_down(self, done, bad):
        """Writes the note, which is never half there."""
        fresh = self.note.with_suffix(".new")
        fresh.write_text(json.dumps({"key": self.key, "done": done, "bad": bad}, ensure_ascii=False), encoding="utf-8")
        os.replace(fresh, self.note)

    def __getitem__(self, rows):
        """Features (len(rows), P, V) as a float16 tensor. BadRecord if a picture of them could not be read."""
        if self.array is None:
            self.ready()
        for row in self.bad.keys() & set(rows.tolist()):
            raise BadRecord(*self.bad[row])
        return torch.from_numpy(self.array[rows])
