"""A .pth file to a folder that transformers loads without this repository, and back.

python -m model.export out/512_vlm_sft.pth my-minimind-v                  # a LLaVA with its CLIP, for transformers, vLLM, ...
python -m model.export --reverse my-minimind-v out/back/512_vlm_sft.pth   # the same tensors, bit for bit
python -m model.export out/192_vlm_sft.pth demo-folder --demo             # with the demo's tokenizer and CLIP
python -m model.export out/512_vlm_sft.pth a-llama --language_model       # without vision, as a Llama or Qwen3

With `--format onnx`, or `onnx-int8` with matrices in 8 bits, ONNX Runtime alone answers: see onnx_export.py.
What a LLaVA can't express (experts, an mlp as projector, a SigLIP) becomes a folder with code, which transformers runs
with trust_remote_code=True; so does any model with `--format code`, and then CLIP is copied only with `--with_vision`.
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
from .files import read_json_object, write_atomically, write_json
from .layouts import sizes_of, to_llama, transformers_config
from .llava import chat_template, llava_config, not_a_llava, pack_llava
from .model_vlm import MiniMindVLM
from .onnx_export import export_onnx
from .onnx_graphs import not_a_graph
from .stages import DEMO_MODEL
from .vision_utils import VISION

FORMATS = ("llava", "code", "onnx", "onnx-int8")
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
{image_tokens} vectors a picture from a frozen encoder ({encoder}).

```{language}
{example}
```

{note}

## Sizes

| | |
|---|---|
{sizes}

## Training

{training}
"""
# the commonest word of a language, with the space before it: one token where the tokenizer was made for that language
COMMONEST_WORDS = {"zh": "的", "en": " the"}
LLAVA_EXAMPLE = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model, processor = (kind.from_pretrained("{name}") for kind in (AutoModelForImageTextToText, AutoProcessor))
picture, question = Image.open("picture.png"), "描述这张图片。"
chat = [{{"role": "user", "content": [{{"type": "image", "image": picture}}, {{"type": "text", "text": question}}]}}]
options = {{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}}
inputs = processor.apply_chat_template(chat, **options)
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))"""
LLAVA_NOTE = """\
It is a LLaVA: no code of its own is run, and vLLM serves it (`vllm serve FOLDER --max-model-len {max_seq_len}`)."""
ONNX_EXAMPLE = """\
# pip install onnxruntime numpy pillow tokenizers
python {name}/ask.py picture.png 描述这张图片。"""
ONNX_NOTE = "ONNX Runtime runs it, without PyTorch and transformers; `ask.py` shows how its files work together."
CODE_NOTE = "`trust_remote_code=True` runs the code in this folder, and nothing else. Use float32 or bfloat16."
EXAMPLE = """\
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "{name}"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=Image.open("picture.png"), text="描述这张图片。")
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))"""


def export(weights, folder, tokenizer_path, vision_path, format=None, with_vision=False, fallback=None):
    """Writes the folder, as one of FORMATS; by default as a LLaVA if it can express the model, else with code.

    The encoder in vision_path is copied into a LLaVA, and into a folder with code if `with_vision`. fallback: LMConfig fields
    for weights without a config. BadInput says what a LLaVA can't express.
    """
    parts = load_parts(weights, vision_path, tokenizer_path, fallback=fallback)  # refuses what doesn't fit
    config = parts.model.config
    reason = not_a_llava(config, parts.encoder)
    if format == "llava" and reason:
        raise BadInput(f"{weights} has {reason}, which a LLaVA can't express: export it with --format code")
    state = in_our_layout(read_weights(weights), config)  # in the precision of the file
    metadata = {**parts.metadata, **provenance(config, parts.tokenizer)}
    if format in ("onnx", "onnx-int8") and not_a_graph(config):
        raise BadInput(
            f"{weights} has {not_a_graph(config)}, which ONNX Runtime can't run: export it with --format code"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if format in ("onnx", "onnx-int8"):
        export_onnx(folder, parts, int8=format == "onnx-int8")
        copy_tokenizer(tokenizer_path, folder)
        write_card(folder, parts, state, metadata, "included in this folder", ONNX_EXAMPLE, ONNX_NOTE)
    elif format == "code" or reason:
        export_code(folder, parts, state, metadata, tokenizer_path, with_vision)
    else:
        export_llava(folder, parts, state, metadata, tokenizer_path)


def export_llava(folder, parts, state, metadata, tokenizer_path):
    """Writes a folder of transformers' `LlavaForConditionalGeneration`, with all that it needs to answer."""
    config, encoder, tokenizer = parts.model.config, parts.encoder, parts.tokenizer
    vision, preprocess = encoder.model.config, encoder.preprocess
    # the token of pictures, which no text may contain and no answer should
    image_token = tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    theirs = llava_config(config, encoder, image_token_id, minimind=metadata)
    theirs.dtype = state[TIED[0]].dtype
    write_safetensors(folder, pack_llava(state, config, encoder.model.state_dict()))
    write_json(folder / "config.json", json.loads(theirs.to_json_string()))
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.eos_token_id,
    }
    write_json(folder / "generation_config.json", {**ids, "suppress_tokens": [image_token_id]})

    # how pictures become pixels, and how many tokens they take
    square = {"height": preprocess.size, "width": preprocess.size}
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": square,
            "resample": int(preprocess.resample),
            "do_center_crop": False,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": preprocess.mean,
            "image_std": preprocess.std,
        },
    )
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": theirs.vision_feature_select_strategy,
    }
    write_json(folder / "processor_config.json", processor)

    # the tokenizer; what pads a batch must not be the token of pictures
    copy_tokenizer(tokenizer_path, folder)
    settings = read_json_object(folder / "tokenizer_config.json") | {"pad_token": tokenizer.eos_token}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor"}
    settings.pop("chat_template", None)
    write_json(folder / "tokenizer_config.json", settings)
    template = chat_template(tokenizer.chat_template or PUBLISHED_TEMPLATE, image_token)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    note = LLAVA_NOTE.format(max_seq_len=config.max_seq_len)
    write_card(folder, parts, state, metadata, "included in this folder", LLAVA_EXAMPLE, note)


def export_code(folder, parts, state, metadata, tokenizer_path, with_vision):
    """Writes a folder with the code of this repository, which transformers runs."""
    config, encoder = parts.model.config, parts.encoder
    metadata = {name: value for name, value in metadata.items() if name != "config"}
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
    where = "included in this folder" if with_vision else "not in this folder: set `model.vision_encoder`"
    write_card(folder, parts, state, metadata, where, EXAMPLE, CODE_NOTE)


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


def write_card(folder, parts, state, metadata, encoder, example, note):
    """The folder's README.md. encoder: where it is; example: code that asks the model."""
    config = parts.model.config
    languages = [name for name, word in COMMONEST_WORDS.items() if len(parts.tokenizer.tokenize(word)) == 1]
    shown = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len", "use_moe", "vision_width")
    stages = [
        f"{number}. " + ", ".join(f"{field} {value}" for field, value in stage.items())
        for number, stage in enumerate(metadata.get("training", []), 1)
    ]
    card = CARD.format(
        name=folder.name,
        languages=", ".join(languages),
        parameters=count_parameters(state, config),
        image_tokens=config.image_tokens,
        encoder=encoder,
        language="bash" if example == ONNX_EXAMPLE else "python",
        example=example.format(name=folder.name),
        note=note,
        sizes="\n".join(f"| {field} | {getattr(config, field)} |" for field in shown),
        training="\n".join(stages) or "The weights came without a record of how they were trained.",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


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
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="the folder's form: llava (the default for what it can express), code (the default for the rest), or onnx, "
        "onnx-int8 for ONNX Runtime without PyTorch",
    )
    parser.add_argument("--with_vision", action="store_true", help="put the encoder into a folder with code, too")
    parser.add_argument(
        "--language_model", action="store_true", help="only the language model, as a Llama or Qwen3 of transformers"
    )
    parser.add_argument("--reverse", action="store_true", help="from a folder back to a .pth file")
    add_path_arguments(parser)
    args = parse_with_demo(parser, {name: DEMO_MODEL[name] for name in ("tokenizer_path", "vision_path")})
    if args.format and (args.reverse or args.language_model):
        raise BadInput("--format is for exporting a whole model: leave it out, or --reverse and --language_model")
    if not args.reverse and args.target.suffix == ".pth":
        raise BadInput(f"{args.target} would become a folder: to write the .pth file of a folder, add --reverse")
    try:
        if args.reverse:
            reverse(args.source, args.target)
        elif args.language_model:
            export_language_model(args.source, args.target, args.tokenizer_path)
        else:
            paths = args.tokenizer_path, args.vision_path
            heads = {name: DEMO_MODEL[name] for name in ("n_heads", "n_kv_heads")} if args.demo else None
            export(args.source, args.target, *paths, args.format, args.with_vision, heads)
    except OSError as error:
        raise BadInput(f"{error.filename or args.target} could not be written ({error.strerror})") from None
    print(f"wrote {args.target}")


if __name__ == "__main__":
    run_script(main)
