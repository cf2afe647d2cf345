"""Files in and out: .pth weights, transformers folders, tokenizers. Loading is strict, saving is atomic."""

import hashlib
import inspect
import json
import os
import pickle
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from transformers import AutoTokenizer

from model.LMConfig import BadInput, LMConfig
from model.model_vlm import MiniMindVLM

PREFIXES = ("_orig_mod.", "module.")  # left in a file by torch.compile and by data-parallel training
PROJECTOR = "vision_proj."
TIED = ("tok_embeddings.weight", "output.weight")  # one tensor; safetensors keeps it under one of its two names


def load_tokenizer(folder):
    """The tokenizer in a folder. BadInput if it is missing or lacks single tokens for `<` and `>`."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").exists():
        raise BadInput(
            f"no tokenizer in {folder}: download minimind_tokenizer into it (see README, 'Train on the real data'), "
            "name another folder with --tokenizer_path, or try --demo"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def tokenizer_hash(tokenizer):
    """Short hash of the vocabulary and merges, kept beside weights to tell which tokenizer they were trained with."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def tokenizer_fields(tokenizer):
    """The LMConfig fields that a tokenizer decides."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "image_char_ids": tokenizer.convert_tokens_to_ids(["<", ">"]),
    }


def weights_name(config_or_args, stage):
    """`512_moe_vlm_sft.pth` and the like, for anything with `dim` and `use_moe`."""
    return f"{config_or_args.dim}{'_moe' if config_or_args.use_moe else ''}_{stage}.pth"


def read_weights(path):
    """The tensors of a .pth file or of a transformers folder under their published names; prefixes and extra buffers of
    older files are taken off."""
    path = Path(path)
    if path.is_dir():
        files = [path / "model.safetensors", path / "pytorch_model.bin"]
        path = next((file for file in files if file.exists()), files[0])
    if not path.exists():
        raise BadInput(
            f"{path} not found: run the stage that makes it or download it (see README, 'Which weights start which stage')"
        )
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{path} is not a whole file of weights ({str(error).splitlines()[0][:120]})") from None
    if not isinstance(state, dict) or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise BadInput(f"{path} is not a file of weights: expected named tensors")
    for prefix in PREFIXES:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not (name.endswith(".mask") or name == "pos_cis")}
    for name, twin in (TIED, TIED[::-1]):
        if twin in state:
            state.setdefault(name, state[twin])
    return state


def load_vlm(path, config: LMConfig, allow_missing_projector=False):
    """A `MiniMindVLM` in float32 with the weights of a file.

    A projector bias in the file turns `config.vision_bias` on. Everything else must fit exactly; only the projector may be
    missing, and only where the stage starts from a language model. BadInput names the first difference.
    """
    state = read_weights(path)
    config.vision_bias = f"{PROJECTOR}vision_proj.0.bias" in state
    model = MiniMindVLM(config)
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    has_projector = not any(name.startswith(PROJECTOR) for name in missing)
    if allow_missing_projector:
        missing = [name for name in missing if not name.startswith(PROJECTOR)]
    elif not has_projector and all(name.startswith(PROJECTOR) for name in missing):
        raise BadInput(f"{path} holds a language model without a vision projector: run 1-pretrain_vlm.py on it first")
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which this model does not"
        raise BadInput(
            f"{path} {what} ({len(missing)} missing, {len(unexpected)} unexpected tensors): "
            "check --dim, --n_layers and --use_moe"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise BadInput(
                f"{path}: {name} is {tuple(tensor.shape)}, the model wants {tuple(expected[name].shape)}: "
                "check --dim, --vision_path and --tokenizer_path"
            )
    model.load_state_dict(state, strict=False)  # only the projector can be missing by now
    return model


def read_notes(path):
    """What comes with weights: the .json beside a .pth (config, tokenizer hash, step, ...), or the `config.json` of a
    transformers folder under "config"; {} for a bare .pth made elsewhere."""
    path = Path(path)
    notes = path / "config.json" if path.is_dir() else path.with_suffix(".json")
    if not notes.exists():
        return {}
    content = json.loads(notes.read_text(encoding="utf-8"))
    if not path.is_dir():
        return content
    known = inspect.signature(LMConfig.__init__).parameters.keys() - {"self", "kwargs"}
    return {"config": {name: value for name, value in content.items() if name in known}}


def save_weights(path, model, tokenizer, **notes):
    """Writes the weights under their published names, and `notes` in a .json beside them. Neither is ever half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {**notes, "tokenizer": tokenizer_hash(tokenizer), "config": json.loads(model.config.to_json_string())}
    replace_file(path, lambda partial: torch.save(model.state_dict(), partial))
    replace_file(
        path.with_suffix(".json"),
        lambda partial: partial.write_text(json.dumps(notes, ensure_ascii=False, indent=1), encoding="utf-8"),
    )


def replace_file(path, write):
    """Calls write(temporary path) and puts the result, once it is on disk, in the place of `path`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(partial)
        with open(partial, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
