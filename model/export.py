"""A .pth file to a folder that transformers loads without this repository, and back.

python -m model.export out/512_vlm_sft.pth minimind-v-v1-small                  # weights, config, tokenizer, processor, code, card
python -m model.export out/512_vlm_sft.pth minimind-v-v1-small --with_vision    # and the vision half of CLIP
python -m model.export --reverse minimind-v-v1-small out/512_vlm_sft.pth        # the same tensors, bit for bit
python -m model.export out/512_vlm_sft.pth a-llama --language_model             # without vision, as a Llama or Qwen3
python -m model.export out/192_vlm_sft.pth demo-folder --with_vision --demo     # with the demo's tokenizer and CLIP
"""

import argparse
import json
import shutil
from pathlib import Path

import safetensors.torch
import torch

from .arguments import add_path_arguments, parse_with_demo
from .checkpoint import (
    PROJECTOR,
    TIED,
    build_config,
    config_of,
    count_parameters,
    in_our_layout,
    load_parts,
    load_tokenizer,
    provenance,
    read_metadata,
    read_weights,
    write_weights,
)
from .conversation import PUBLISHED_TEMPLATE
from .errors import BadInput, run_script
from .files import write_atomically, write_json
from .layouts import sizes_of, to_llama, transformers_config
from .model_vlm import MiniMindVLM
from .stages import DEMO_MODEL
from .vision_utils import VISION

# hf.py and what it imports; they name each other relatively, so that they run in the folder as they are
CODE = ("errors", "LMConfig", "model", "model_vlm", "conversation", "images", "hf")
AUTO_MAP = {
    "AutoConfig": "LMConfig.LMConfig",
    "AutoModelForCausalLM": "hf.MiniMindVForConditionalGeneration",
    "AutoModelForImageTextToText": "hf.MiniMindVForConditionalGeneration",
    "AutoProcessor": "hf.MiniMindVProcessor",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)

CARD = """\
---
license: apache-2.0
language: [{languages}]
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

A tiny vision-language model, made with MiniMind-V: {parameters:,} parameters of language model and projector, which read
{image_tokens} vectors a picture from a frozen CLIP ({clip}).

```python
{example}
```

`trust_remote_code=True` runs the code in this folder, and nothing else. Use float32 or bfloat16.

## Sizes

| | |
|---|---|
{sizes}

## Training

{training}
"""
# the commonest word of a language, with the space before it: one token where the tokenizer was made for that language
COMMONEST_WORDS = {"zh": "的", "en": " the"}
EXAMPLE = """\
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "{name}"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=Image.open("picture.png"), text="描述这张图片。")
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))"""


def export(weights, folder, tokenizer_path, vision_path, with_vision):
    """Writes the folder. The CLIP in vision_path is read for its sizes, and copied if `with_vision`."""
    parts = load_parts(weights, vision_path, tokenizer_path)  # refuses what doesn't fit
    config, encoder = parts.model.config, parts.encoder
    state = in_our_layout(read_weights(weights), config)  # in the precision of the file
    metadata = {**parts.metadata, **provenance(config, parts.tokenizer)}
    del metadata["config"]
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, state, config, encoder if with_vision else None)
    write_config(folder, config, metadata, encoder if with_vision else None, state[TIED[0]].dtype)
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "MiniMindVProcessor",
            "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
            "image_tokens": config.image_tokens,
            "image_chars": config.image_chars,
            "image_size": encoder.preprocess.size,
            "resample": int(encoder.preprocess.resample),
            "image_mean": encoder.preprocess.mean,
            "image_std": encoder.preprocess.std,
        },
    )

    # the code that transformers runs, and the tokenizer
    for name in CODE:
        shutil.copyfile(Path(__file__).parent / f"{name}.py", folder / f"{name}.py")
    copy_tokenizer(tokenizer_path, folder)
    clip = "included in this folder" if with_vision else "not in this folder: set `model.vision_encoder`"
    languages = [name for name, word in COMMONEST_WORDS.items() if len(parts.tokenizer.tokenize(word)) == 1]
    (folder / "README.md").write_text(card(folder.name, state, config, metadata, clip, languages), encoding="utf-8")


def export_language_model(weights, folder, tokenizer_path):
    """Writes the language model alone as a folder of transformers' own Llama, Qwen3 or Qwen3-MoE, in the file's precision."""
    config = config_of(weights)
    state = in_our_layout(read_weights(weights), config)
    theirs = transformers_config(config)
    theirs.dtype = state[TIED[0]].dtype
    language_model = {name: tensor for name, tensor in state.items() if not name.startswith(PROJECTOR)}
    if config.tie_word_embeddings:
        del language_model[TIED[1]]
    folder.mkdir(parents=True, exist_ok=True)
    theirs.save_pretrained(folder)
    write_safetensors(folder, to_llama(language_model, config.head_dim))
    copy_tokenizer(tokenizer_path, folder)


def copy_tokenizer(tokenizer_path, folder):
    """Copies the files of a tokenizer, if there is one; its chat template as a file, whether it has it elsewhere or none."""
    if not (Path(tokenizer_path) / "tokenizer.json").exists():
        return
    template = load_tokenizer(tokenizer_path).chat_template or PUBLISHED_TEMPLATE
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_path) / name).exists():
            shutil.copyfile(Path(tokenizer_path) / name, folder / name)


def write_tensors(folder, state, config, encoder):
    """`model.safetensors`: each tensor once, a tied one under its first name."""
    tensors = {name: tensor for name, tensor in state.items() if name != TIED[1] or not config.tie_word_embeddings}
    if encoder:
        vision = encoder.model.state_dict()
        tensors |= {f"{VISION}{name}": tensor.to(state[TIED[0]].dtype) for name, tensor in vision.items()}
    write_safetensors(folder, tensors)


def write_safetensors(folder, tensors):
    """`model.safetensors` of a folder."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(
        folder / "model.safetensors", lambda f: f.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    )


def write_config(folder, config, metadata, encoder, dtype):
    """`config.json`: every field of LMConfig, how transformers finds the code, and the metadata that came with the weights."""
    content = {
        **json.loads(config.to_json_string()),
        "architectures": [AUTO_MAP["AutoModelForCausalLM"].split(".")[1]],
        "auto_map": AUTO_MAP,
        "dtype": str(dtype).removeprefix("torch."),
        "notes": metadata,
    }
    if encoder:
        content["vision_config"] = encoder.model.config.to_diff_dict()
    write_json(folder / "config.json", content)


def card(name, state, config, metadata, clip, languages):
    """The folder's README.md."""
    shown = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len", "use_moe", "vision_width")
    stages = [
        f"{number}. " + ", ".join(f"{field} {value}" for field, value in stage.items())
        for number, stage in enumerate(metadata.get("training", []), 1)
    ]
    return CARD.format(
        name=name,
        languages=", ".join(languages),
        parameters=count_parameters(state, config),
        image_tokens=config.image_tokens,
        clip=clip,
        example=EXAMPLE.format(name=name),
        sizes="\n".join(f"| {field} | {getattr(config, field)} |" for field in shown),
        training="\n".join(stages) or "The weights came without a record of how they were trained.",
    )


def reverse(folder, weights):
    """Writes the .pth file, and the folder's metadata beside it. CLIP stays in the folder."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder: name the transformers folder first, then the .pth file to write")
    state, metadata = read_weights(folder), read_metadata(folder)
    bias = f"{PROJECTOR}vision_proj.0.bias" in state
    config = build_config(metadata, None, None, sizes={**sizes_of(state), "vision_bias": bias})
    state = in_our_layout(state, config)
    with torch.device("meta"):
        order = MiniMindVLM(config).state_dict().keys()
    odd = sorted(order ^ state.keys())
    if odd:
        raise BadInput(
            f"{folder} does not fit its config.json: {len(odd)} tensors are missing or unexpected, e.g. {odd[0]}"
        )
    metadata["config"] = json.loads(config.to_json_string())
    write_weights(weights, {name: state[name] for name in order}, metadata)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .pth file; with --reverse, a folder")
    parser.add_argument("target", type=Path, help="the folder to write; with --reverse, the .pth file")
    parser.add_argument("--with_vision", action="store_true", help="put the vision half of CLIP into the folder")
    parser.add_argument(
        "--language_model", action="store_true", help="only the language model, as a Llama or Qwen3 of transformers"
    )
    parser.add_argument("--reverse", action="store_true", help="from a folder back to a .pth file")
    add_path_arguments(parser)
    args = parse_with_demo(parser, {name: DEMO_MODEL[name] for name in ("tokenizer_path", "vision_path")})
    if not args.reverse and args.target.suffix == ".pth":
        raise BadInput(f"{args.target} would become a folder: to write the .pth file of a folder, add --reverse")
    try:
        if args.reverse:
            reverse(args.source, args.target)
        elif args.language_model:
            export_language_model(args.source, args.target, args.tokenizer_path)
        else:
            export(args.source, args.target, args.tokenizer_path, args.vision_path, args.with_vision)
    except OSError as error:
        raise BadInput(f"{error.filename or args.target} could not be written ({error.strerror})") from None
    print(f"wrote {args.target}")


if __name__ == "__main__":
    run_script(main)
