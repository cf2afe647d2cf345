"""Files in and out: .pth weights, transformers folders, tokenizers. Loading is strict, saving is atomic."""

import copy
import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from .conversation import tokenizer_fields
from .errors import BadInput
from .files import files_of_weights, find_weights, read_json_object, read_tensors, write_atomically, write_json
from .layouts import (
    MINIMIND_3V,
    fields_of_config,
    fields_of_generation,
    from_llama,
    is_llama,
    our_name,
    placeholder_fields,
    placeholder_of_generation,
    sizes_of,
)
from .llava import PROJECTOR, holds_llava, unpack_llava
from .LMConfig import LMConfig
from .model_vlm import MiniMindVLM
from .vision_utils import VISION, VisionEncoder, load_vision

CHECKPOINTS = ("model", "state_dict", "model_state_dict", "module")  # where files that hold more than weights have them
# parts of names that torch.compile, data-parallel training and checkpointed activations leave in a file
WRAPPINGS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
EMBEDDINGS = ("tok_embeddings.weight", "model.embed_tokens.weight")  # in our layout, and in a llama's
EXTRAS = ("pos_cis", ".mask", "freqs_cos", "freqs_sin", ".inv_freq")  # buffers of older files
FLAGS = ("dim", "n_layers", "n_heads", "n_kv_heads", "use_moe", "projector")  # LMConfig fields that flags can set
TIED = ("tok_embeddings.weight", "output.weight")  # one tensor; safetensors keeps it under one of its two names
PUBLISHED_TOKENIZER = "64ac8f6e290e6c15"  # tokenizer_hash of minimind_tokenizer
# those of all generations; each has 6,400 tokens, MiniMind-3's are others than the earlier ones'
KNOWN_TOKENIZERS = {
    PUBLISHED_TOKENIZER: "MiniMind v1",
    "a9bfcd518cc61cd7": "MiniMind2",
    "fd2d314bd4d09ecd": "MiniMind-3",
}


# --- tokenizers -----------------------------------------------------------------------------------------------------


def load_tokenizer(folder):
    """The tokenizer in a folder. BadInput if it is missing or damaged, or lacks one of `<s>` and `</s>`."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").exists():
        raise BadInput(
            f"no tokenizer in {folder}: add --demo for the demo, or name the folder of the language model's tokenizer with "
            "--tokenizer_path (see README, 'Train it for real')"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)  # Auto classes may run code
    except Exception as error:  # noqa: BLE001  the tokenizers library's own are bare Exceptions
        why = str(error).partition("\n")[0]
        raise BadInput(f"the tokenizer in {folder} could not be loaded ({why}): copy or download it again") from None
    if tokenizer.eos_token_id is None or (tokenizer.bos_token_id is None and not tokenizer.chat_template):
        raise BadInput(f"the tokenizer in {folder} has no <s> or no </s>: copy its tokenizer_config.json there too")
    return tokenizer


def tokenizer_hash(tokenizer):
    """Short hash of all tokens and their ids, kept beside weights to tell which tokenizer they were trained with."""
    tokens = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return hashlib.sha256("\n".join(f"{i} {token}" for i, token in tokens).encode()).hexdigest()[:16]


def encoder_hash(encoder):
    """Short hash of a CLIP's sizes and of the signs of its position embeddings, kept beside weights as the tokenizer's is.

    Signs are the same in every precision, and differ for a CLIP that was trained otherwise.
    """
    embeddings = getattr(encoder.model, "vision_model", encoder.model).embeddings
    numbers = [embeddings.position_embedding.weight]
    if hasattr(embeddings, "class_embedding"):  # a SigLIP has none
        numbers.insert(0, embeddings.class_embedding[None])
    signs = torch.cat(numbers).signbit()
    sizes = f"{encoder.preprocess.size} {encoder.image_tokens} {encoder.vision_width} "
    return hashlib.sha256(sizes.encode() + signs.cpu().numpy().tobytes()).hexdigest()[:16]


# --- weights in -----------------------------------------------------------------------------------------------------


def weights_file(path):
    """The file with the tensors: the path itself, or what a transformers folder has."""
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    elif path.name.endswith(".index.json"):
        raise BadInput(f"{path} is the index of a folder of weights: name the folder, {path.parent}")
    if not os.path.exists(path):
        raise BadInput(
            f"{path} not found: run the stage that makes it or download it (see README, 'Which weights start which stage')"
        )
    return path


def read_weights(path):
    """The language model's and the projector's tensors in a .pth file or a transformers folder, in the layout they have.

    Wrappings (`without_wrappings`) and extra buffers of older files are removed, and so is a CLIP in the same file. Code in
    the file never runs. BadInput says what is wrong with the file.
    """
    path = weights_file(path)
    state = read_tensors(path)
    if not isinstance(state, dict):
        raise BadInput(f"{path} is not a file of weights: expected named tensors, not {type(state).__name__}")
    while key := next((key for key in CHECKPOINTS if isinstance(state.get(key), dict)), None):
        state = state[key]
    odd = [name for name, tensor in state.items() if not isinstance(name, str) or not torch.is_tensor(tensor)]
    if odd:
        raise BadInput(f"{path} is not a file of weights: expected named tensors, but {odd[0]!r:.100} is no tensor")

    # only the model's own tensors
    state = unpack_llava(state, path) if holds_llava(state) else without_wrappings(state)
    state = {name: state[name] for name in state if not name.endswith(EXTRAS) and not name.startswith(VISION)}
    if not {our_name(name) for name in state} & {*TIED}:
        raise BadInput(f"{path} is not a MiniMind: it has no {TIED[0]}, but {next(iter(state), 'nothing')}")
    return state


def without_wrappings(state):
    """Named tensors without what torch.compile, data-parallel training and a module around the model put into the names."""
    state = {".".join(part for part in name.split(".") if part not in WRAPPINGS): state[name] for name in state}
    # of a module around it, as Lightning's, only the part with the embeddings is the model
    part = next((name.removesuffix(end) for end in EMBEDDINGS for name in state if name.endswith(f".{end}")), "")
    return {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}


def in_our_layout(state, config):
    """Named tensors as a model of this configuration has them, the tied one under both of its names."""
    state = from_llama(state, config.head_dim) if is_llama(state) else dict(state)
    if config.tie_word_embeddings:
        for name, twin in (TIED, TIED[::-1]):
            if twin in state:
                state.setdefault(name, state[twin].detach())
    return state


def read_metadata(path):
    """What comes with weights: the .json beside a .pth (config, hashes of tokenizer and CLIP, step, ...), or the
    `config.json` of a transformers folder under "config"; {} for a bare .pth made elsewhere. BadInput if it is damaged."""
    path = Path(path)
    content = read_json_object(path / "config.json" if path.is_dir() else path.with_suffix(".json"))
    if not path.is_dir() or not content:
        return content
    if "minimind" in content:  # a LLaVA that was exported here
        return content["minimind"]
    if "dim" in content:
        known = inspect.signature(LMConfig.__init__).parameters.keys() - {"self", "kwargs"}
        config = {name: content[name] for name in content if name in known}
    else:  # a folder of another layout
        config = fields_of_config(content, path)

    # a published MiniMind-V; the length it names is that of its positions, not of what it was trained with
    if placeholder := placeholder_fields(content):
        config = {**config, **placeholder}
        config.pop("max_seq_len", None)
    return {**content.get("notes", {}), "config": config}


def build_config(metadata, tokenizer, encoder, sizes=None, fallback=None):
    """The model's configuration, each field from the last of these that names it.

    fallback: LMConfig fields for weights that come without any. metadata: what came with the weights (`read_metadata`).
    sizes: fields that were asked for. tokenizer, encoder: what they decide; None while they are not known.
    """
    fields = {**(fallback or {}), **metadata.get("config", {}), **(sizes or {})}
    if tokenizer is not None:
        fields |= tokenizer_fields(tokenizer, LMConfig(**fields).image_chars)
    if encoder is not None:
        fields |= {"vision_width": encoder.vision_width, "image_tokens": encoder.image_tokens}
    return LMConfig(**fields)


def read_model(path, metadata=None):
    """(named tensors, metadata, LMConfig fields that the tensors tell) of a .pth file or a transformers folder.

    metadata: in place of what comes with it. For what was made elsewhere, its config names the placeholder of its generation.
    """
    if metadata is None:
        metadata = read_metadata(path)
    state = read_weights(path)
    noted = metadata.get("config", {})
    if "image_chars" not in noted:
        metadata = {**metadata, "config": {**placeholder_of_generation(state), **noted}}
    return state, metadata, {**fields_of_generation(state), **sizes_of(state)}


def config_of(path):
    """The configuration that weights tell of themselves; of tokenizer and CLIP it knows only what came with them."""
    _, metadata, told = read_model(path)
    return build_config(metadata, None, None, fallback=told)


def check_fits(path, state, metadata, config, tokenizer=None, encoder=None):
    """BadInput names the first thing in which a file differs from the model that is expected, and the likely cause.

    tokenizer, encoder: None if they are not known yet.
    """
    found = sizes_of(state)
    other_clip = "it was trained with another CLIP: pass that one with --vision_path"
    hints = {
        "vocab_size": "it was trained with another tokenizer: pass that one with --tokenizer_path",
        "vision_width": other_clip,
        "image_tokens": other_clip,
    }
    noted = metadata.get("config", {})
    if config.drop_class_token and not noted.get("drop_class_token"):
        hints["image_tokens"] = "it was trained with the class token: leave out --drop_class_token"
    if "vision_width" in found:
        found["image_tokens"] = noted.get("image_tokens", config.image_tokens)
    found |= {name: noted[name] for name in ("n_heads", "n_kv_heads") if name in noted}  # which no shape tells
    for name, value in found.items():
        if value != getattr(config, name):
            if name in FLAGS:
                hints[name] = f"use --{name} {value}, or other weights"
            hint = hints.get(name, "the .json beside it may be that of other weights")
            raise BadInput(f"{path} has {name} {value}, expected {getattr(config, name)}: {hint}")
    if tokenizer is not None and metadata.get("tokenizer", tokenizer_hash(tokenizer)) != tokenizer_hash(tokenizer):
        raise BadInput(
            f"{path} was trained with another tokenizer of the same size: pass that one with --tokenizer_path"
        )
    # MiniMind's generations have vocabularies of the same size; only the latest has norms of queries and keys
    theirs = KNOWN_TOKENIZERS.get(tokenizer and tokenizer_hash(tokenizer))
    if "tokenizer" not in metadata and theirs and found["qk_norm"] != (theirs == "MiniMind-3"):
        own = "MiniMind-3's" if found["qk_norm"] else "those of an earlier MiniMind"
        raise BadInput(
            f"these weights are {own} ({path}), and the tokenizer is {theirs}'s: pass the one that came with them with "
            "--tokenizer_path"
        )
    # a language model alone has not seen any CLIP
    knows_clip = "vision_width" in found and encoder is not None and "encoder" in metadata
    if knows_clip and metadata["encoder"] != encoder_hash(encoder):
        raise BadInput(f"{path} was trained with another CLIP of the same size: pass that one with --vision_path")


def load_vlm(path, config: LMConfig, tokenizer, encoder=None, state=None, metadata=None, allow_missing_projector=False):
    """A `MiniMindVLM` in float32 with the weights of a .pth file or a transformers folder, and a line about what was loaded.

    state, metadata: what `read_weights` and `read_metadata` found, if they were called already. The model has a projector bias where the file has one.
    Everything else must fit exactly; only the projector may be missing, and only where the stage starts from a language
    model. BadInput names the first difference.
    """
    if metadata is None:
        metadata = read_metadata(path)
    if state is None:
        state = read_weights(path)
    check_fits(path, state, metadata, config, tokenizer, encoder)
    state = in_our_layout(state, config)
    has_projector = any(name.startswith(PROJECTOR) for name in state)
    if not has_projector and not allow_missing_projector:
        raise BadInput(f"{path} holds a language model without a vision projector: run 1-pretrain_vlm.py on it first")
    config = copy.deepcopy(config)  # the caller's stays as it is
    config.vision_bias = f"{PROJECTOR}vision_proj.0.bias" in state
    model = MiniMindVLM(config)

    # the file's names and shapes must be the model's
    expected = {name: tensor for name, tensor in model.state_dict().items() if has_projector or PROJECTOR not in name}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which this model does not"
        raise BadInput(
            f"{path} {what} ({len(missing)} missing, {len(unexpected)} unexpected tensors): it is incomplete, or not a "
            "MiniMind v1"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            raise BadInput(f"{path}: {name} is {shapes}: check --n_heads and --n_kv_heads")
    model.load_state_dict(state, strict=False)  # only the projector can be missing by now
    return model, describe(path, state, config)


def count_parameters(state, config):
    """Numbers in named tensors, a tied one counted once."""
    return sum(t.numel() for name, t in state.items() if name != TIED[1] or not config.tie_word_embeddings)


def describe(path, state, config):
    """One line about weights: file, size, number of parameters, and which parts they form."""
    megabytes = sum(file.stat().st_size for file in files_of_weights(weights_file(path))) / 1e6
    parameters = count_parameters(state, config)
    bias = " with a bias" if f"{PROJECTOR}vision_proj.0.bias" in state else ""
    parts = "language model" + (f" and projector{bias}" if any(PROJECTOR in name for name in state) else "")
    return f"loaded {path}: {megabytes:.1f} MB, {parameters:,} parameters of {parts}"


def tokenizer_warning(path, metadata, tokenizer):
    """A sentence if nothing says that the weights were trained with this tokenizer, else None."""
    if "tokenizer" in metadata or tokenizer_hash(tokenizer) in KNOWN_TOKENIZERS:
        return None
    return (
        f"warning: {path} does not say which tokenizer it was trained with, and this one is not the published "
        "minimind_tokenizer: if answers are garbled, check this first"
    )


class Parts(NamedTuple):
    """All that training and answering need of a model.

    metadata: what came with the weights. summary: what was loaded, and a warning if there is one; empty for random weights.
    """

    model: MiniMindVLM
    encoder: VisionEncoder
    tokenizer: PreTrainedTokenizerFast
    metadata: dict
    summary: str


def load_parts(
    weights,
    vision_path,
    tokenizer_path,
    device="cpu",
    dtype=torch.float32,
    *,
    sizes=None,
    fallback=None,
    metadata=None,
    allow_missing_projector=False,
    seed=None,
):
    """Loads tokenizer, CLIP and model, and makes sure that they belong together. BadInput says what is missing or differs.

    weights: a .pth file, a transformers folder, or None for random weights, drawn from `seed`.
    device, dtype: the CLIP's; the model comes on the CPU in float32.
    sizes, fallback: LMConfig fields that must hold, or that are used for weights without a config (`build_config`).
    metadata: in place of what comes with the weights; a resumed run has its own.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    if weights:
        state, metadata, told = read_model(weights, metadata)
        fallback = {**told, **(fallback or {})}
    metadata = metadata or {}
    noted = {**metadata.get("config", {}), **(sizes or {})}
    encoder = load_vision(vision_path, device, dtype, noted.get("drop_class_token", False))
    config = build_config(metadata, tokenizer, encoder, sizes, fallback)
    if config.image_tokens >= config.max_seq_len:
        raise BadInput(
            f"a picture takes {config.image_tokens} tokens with the encoder in {vision_path}, and --max_seq_len is "
            f"{config.max_seq_len}: raise it, or name another encoder"
        )

    # random tensors, of the projector or of everything, depend on the seed alone
    if seed is not None:
        torch.manual_seed(seed)
    if not weights:
        return Parts(MiniMindVLM(config), encoder, tokenizer, metadata, "")
    model, summary = load_vlm(weights, config, tokenizer, encoder, state, metadata, allow_missing_projector)
    lines = [summary, tokenizer_warning(weights, metadata, tokenizer)]
    if metadata["config"] == MINIMIND_3V:  # as of a file alone
        lines.append(f"warning: {weights} has no .json beside it; it is taken for a published minimind-3v")
    return Parts(model, encoder, tokenizer, metadata, "\n".join(filter(None, lines)))


# --- weights out ----------------------------------------------------------------------------------------------------


def save_weights(path, model, tokenizer, encoder=None, **metadata):
    """Writes the weights under their published names, and `metadata` in a .json beside them. Neither is ever half written."""
    write_weights(path, dict(model.state_dict()), {**metadata, **provenance(model.config, tokenizer, encoder)})


def provenance(config, tokenizer, encoder=None):
    """Metadata that later shows which sizes, tokenizer and CLIP weights belong to; a language model alone has no CLIP."""
    known = {"tokenizer": tokenizer_hash(tokenizer), "config": json.loads(config.to_json_string())}
    return known if encoder is None else {"encoder": encoder_hash(encoder), **known}


def write_weights(path, state, metadata):
    """Writes named tensors, and what is known about them, as `save_weights` does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), metadata)  # first: weights never exist without their metadata
    write_atomically(path, lambda f: torch.save(state, f))
