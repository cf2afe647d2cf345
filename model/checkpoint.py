"""Files in and out: .pth weights, transformers folders, tokenizers. Loading is strict, saving is atomic."""

import hashlib
import inspect
import json
import pickle
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from transformers import PreTrainedTokenizerFast

from .errors import BadInput
from .files import find_weights, read_json_object, refuse_lfs_pointer, write_atomically, write_json
from .LMConfig import LMConfig
from .model_vlm import MiniMindVLM
from .vision_utils import VISION

PREFIXES = ("_orig_mod.", "module.")  # left in a file by torch.compile and by data-parallel training
EXTRAS = ("pos_cis", ".mask")  # buffers of older files
PROJECTOR = "vision_proj."
TIED = ("tok_embeddings.weight", "output.weight")  # one tensor; safetensors keeps it under one of its two names
PUBLISHED_TOKENIZER = "64ac8f6e290e6c15"  # tokenizer_hash of minimind_tokenizer


# --- tokenizers -----------------------------------------------------------------------------------------------------


def load_tokenizer(folder):
    """The tokenizer in a folder. BadInput if it is missing or damaged, or lacks one of `<s>`, `</s>`, `<` and `>`."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").exists():
        raise BadInput(
            f"no tokenizer in {folder}: download minimind_tokenizer into it (see README, 'Train it for real'), "
            "name another folder with --tokenizer_path, or try --demo"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)  # Auto classes may run code
    except Exception as error:  # noqa: BLE001  the tokenizers library's own are bare Exceptions
        why = str(error).partition("\n")[0]
        raise BadInput(f"the tokenizer in {folder} could not be loaded ({why}): copy or download it again") from None
    if not {"<", ">"} <= tokenizer.get_vocab().keys():
        raise BadInput(
            f"the tokenizer in {folder} has no tokens < and >, which stand for pictures: name another folder"
        )
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer in {folder} has no <s> or no </s>: copy its tokenizer_config.json there too")
    return tokenizer


def tokenizer_hash(tokenizer):
    """Short hash of all tokens and their ids, kept beside weights to tell which tokenizer they were trained with."""
    tokens = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return hashlib.sha256("\n".join(f"{i} {token}" for i, token in tokens).encode()).hexdigest()[:16]


# --- weights in -----------------------------------------------------------------------------------------------------


def weights_name(config_or_args, stage):
    """`512_moe_vlm_sft.pth` and the like, for anything with `dim` and `use_moe`."""
    return f"{config_or_args.dim}{'_moe' if config_or_args.use_moe else ''}_{stage}.pth"


def weights_file(path):
    """The file with the tensors: the path itself, or what a transformers folder has."""
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    if path.suffix == ".json":
        raise BadInput(f"{path} names several files of weights, and one is wanted: save them as one")
    if not path.exists():
        raise BadInput(
            f"{path} not found: run the stage that makes it or download it (see README, 'Which weights start which stage')"
        )
    return path


def read_weights(path):
    """The language model's and the projector's tensors in a .pth file or a transformers folder, under their published names.

    Prefixes and extra buffers of older files are taken off, and a CLIP that comes along is left out. Code in the file is
    never run. BadInput says what is wrong with the file.
    """
    path = weights_file(path)
    refuse_lfs_pointer(path)
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, safetensors.SafetensorError) as error:
        if "GLOBAL" in str(error):  # the pickle wants to call something
            raise BadInput(f"{path} holds more than tensors, and to load it would run code: refused") from None
        raise BadInput(f"{path} is not a whole file of weights: copy or download it again") from None
    if not isinstance(state, dict) or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise BadInput(f"{path} is not a file of weights: expected named tensors")
    for prefix in PREFIXES:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    state = {name: state[name] for name in state if not name.endswith(EXTRAS) and not name.startswith(VISION)}
    for name, twin in (TIED, TIED[::-1]):
        if twin in state:
            state.setdefault(name, state[twin].detach())
    if TIED[0] not in state:
        raise BadInput(f"{path} holds no MiniMind: it has no {TIED[0]}, but {next(iter(state), 'nothing')}")
    return state


def read_notes(path):
    """What comes with weights: the .json beside a .pth (config, tokenizer hash, step, ...), or the `config.json` of a
    transformers folder under "config"; {} for a bare .pth made elsewhere. BadInput if they are damaged."""
    path = Path(path)
    notes = path / "config.json" if path.is_dir() else path.with_suffix(".json")
    content = read_json_object(notes)
    if not path.is_dir() or not content:
        return content
    known = inspect.signature(LMConfig.__init__).parameters.keys() - {"self", "kwargs"}
    return {**content.get("notes", {}), "config": {name: content[name] for name in content if name in known}}


def sizes_of(state):
    """The LMConfig fields that the tensors of a model tell, in the order in which a misfit is best explained."""
    layers = [int(name.split(".")[1]) for name in state if name.startswith("layers.")]
    gate = state.get("layers.0.feed_forward.gate.weight")
    projector = state.get(f"{PROJECTOR}vision_proj.0.weight")
    sizes = {
        "vocab_size": len(state[TIED[0]]),
        "dim": state[TIED[0]].shape[1],
        "n_layers": max(layers, default=-1) + 1,
        "use_moe": gate is not None,
        "n_routed_experts": None if gate is None else len(gate),
        "vision_width": None if projector is None else projector.shape[1],
    }
    return {name: value for name, value in sizes.items() if value is not None}


def check_fits(path, state, config, tokenizer):
    """BadInput names the first thing in which a file differs from the model that is wanted, and the likely cause.

    tokenizer: None if it is not known yet.
    """
    notes, found = read_notes(path), sizes_of(state)
    if "vision_width" in found:
        found["image_tokens"] = notes.get("config", {}).get("image_tokens", config.image_tokens)
    clip = "it was trained with another CLIP, which --vision_path should name"
    hints = {
        "vocab_size": "it was trained with another tokenizer, which --tokenizer_path should name",
        "vision_width": clip,
        "image_tokens": clip,
    }
    for name, value in found.items():
        if value != getattr(config, name):
            hint = hints.get(name, f"use --{name} {value}, or other weights")
            raise BadInput(f"{path} has {name} {value}, and {getattr(config, name)} is wanted: {hint}")
    if tokenizer is not None and notes.get("tokenizer", tokenizer_hash(tokenizer)) != tokenizer_hash(tokenizer):
        raise BadInput(
            f"{path} was trained with another tokenizer of the same size, which --tokenizer_path should name"
        )


def load_vlm(path, config: LMConfig, tokenizer, allow_missing_projector=False):
    """A `MiniMindVLM` in float32 with the weights of a .pth file or a transformers folder, and a line about what was loaded.

    A projector bias in the file turns `config.vision_bias` on. Everything else must fit exactly; only the projector may be
    missing, and only where the stage starts from a language model. BadInput names the first difference.
    """
    state = read_weights(path)
    check_fits(path, state, config, tokenizer)
    has_projector = f"{PROJECTOR}vision_proj.0.weight" in state
    if not has_projector and not allow_missing_projector:
        raise BadInput(f"{path} holds a language model without a vision projector: run 1-pretrain_vlm.py on it first")
    config.vision_bias = f"{PROJECTOR}vision_proj.0.bias" in state
    model = MiniMindVLM(config)
    expected = {name: tensor for name, tensor in model.state_dict().items() if has_projector or PROJECTOR not in name}
    missing, unexpected = ([name for name in a if name not in b] for a, b in ((expected, state), (state, expected)))
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which this model does not"
        raise BadInput(
            f"{path} {what} ({len(missing)} missing, {len(unexpected)} unexpected tensors): it is not whole, or not a MiniMind v1"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model wants {tuple(expected[name].shape)}"
            raise BadInput(f"{path}: {name} is {shapes}: check --n_heads and --n_kv_heads")
    model.load_state_dict(state, strict=False)  # only the projector can be missing by now
    return model, describe(path, state)


def describe(path, state):
    """One line about weights: file, size, parameters, and what they are of."""
    megabytes = weights_file(path).stat().st_size / 1e6
    parameters = sum(tensor.numel() for name, tensor in state.items() if name != TIED[1])
    bias = " with a bias" if f"{PROJECTOR}vision_proj.0.bias" in state else ""
    parts = "language model" + (f" and projector{bias}" if any(PROJECTOR in name for name in state) else "")
    return f"loaded {path}: {megabytes:.1f} MB, {parameters:,} parameters of {parts}"


def tokenizer_warning(path, tokenizer):
    """A sentence where nothing tells that the weights were trained with this tokenizer; None where all is well."""
    if "tokenizer" in read_notes(path) or tokenizer_hash(tokenizer) == PUBLISHED_TOKENIZER:
        return None
    return (
        f"warning: {path} does not say which tokenizer it was trained with, and this one is not the published "
        "minimind_tokenizer: should answers be garbled, look there first"
    )


# --- weights out ----------------------------------------------------------------------------------------------------


def save_weights(path, model, tokenizer, **notes):
    """Writes the weights under their published names, and `notes` in a .json beside them. Neither is ever half written."""
    write_weights(path, dict(model.state_dict()), {**notes, **origin(model.config, tokenizer)})


def origin(config, tokenizer):
    """The notes by which weights are later known to fit a model and its tokenizer."""
    return {"tokenizer": tokenizer_hash(tokenizer), "config": json.loads(config.to_json_string())}


def write_weights(path, state, notes):
    """Named tensors and what is to be known of them, as `save_weights` does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), notes)  # first, so that no weights are ever without
    write_atomically(path, lambda f: torch.save(state, f))
