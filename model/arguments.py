"""The command line: what the scripts share of it."""

import argparse
import os
from functools import partial
from pathlib import Path

import torch

from .chat import Chat
from .checkpoint import weights_name
from .errors import BadInput
from .generate import SETTINGS

MAX_BAD_FRACTION = 0.05  # of the records, which a training leaves out
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def yes_or_no(text):
    """For `--multi`, `--multi True` and `--multi False`."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} should be True or False")


def add_switch(parser, name, help):
    """An option that is off, on when named, and may be spelled out as True or False."""
    parser.add_argument(name, nargs="?", const=True, default=False, type=yes_or_no, metavar="True|False", help=help)


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def add_model_arguments(parser):
    """Sizes and places of the model: what training and chatting share."""
    parser.add_argument("--dim", type=int, default=512, help="width of the language model (published: 512 or 768)")
    parser.add_argument("--n_layers", type=int, default=8, help="its layers (published: 8 or 16)")
    parser.add_argument("--n_heads", type=int, default=16, help="its attention heads")
    parser.add_argument("--n_kv_heads", type=int, default=8, help="its key/value heads")
    parser.add_argument("--max_seq_len", type=int, default=512, help="longest conversation in tokens, 50 a picture")
    add_switch(parser, "--use_moe", help="experts in place of each feed-forward")
    parser.add_argument("--out_dir", default="out", help="where weights and logs are written and looked for")
    parser.add_argument("--vision_path", default="model/clip_model/clip-vit-base-patch32", help="folder of the CLIP")
    parser.add_argument("--tokenizer_path", default="model/minimind_tokenizer", help="folder of the tokenizer")
    parser.add_argument("--device", default=default_device(), help="cuda, mps or cpu (default: the first at hand)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 or float16 on a GPU, float32 on a CPU")


def model_sizes(args):
    """The LMConfig fields that `add_model_arguments` asks for."""
    return {
        name: getattr(args, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "use_moe")
    }


def add_training_arguments(parser, learning_rate, data_path, images_path):
    """The published training arguments, with the defaults of one stage."""
    add_model_arguments(parser)
    parser.add_argument("--data_path", default=data_path, help="JSON file of records (default %(default)s)")
    parser.add_argument("--images_path", default=images_path, help="folder of its pictures (default %(default)s)")
    parser.add_argument(
        "--from_weights", help="start from this file, or transformers folder, instead of the previous stage's"
    )
    add_switch(parser, "--freeze_llm", help="train the projector only, and leave the language model as it is")
    parser.add_argument("--seed", type=int, default=1337, help="of random weights and of the order of samples")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=16, help="samples per step and process (default %(default)s)")
    parser.add_argument(
        "--batch_tokens",
        type=int,
        help="instead: as many samples of like length as this many tokens hold, padding included",
    )
    parser.add_argument("--learning_rate", type=float, default=learning_rate, help="its peak (default %(default)s)")
    parser.add_argument("--accumulation_steps", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--grad_clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--warmup_iters", type=int, default=0, help="optimizer steps of rising learning rate")
    parser.add_argument("--log_interval", type=int, default=10, help="optimizer steps between log lines")
    parser.add_argument("--save_interval", type=int, default=1000, help="optimizer steps between saved weights")
    add_switch(parser, "--strict", help="end at the first record that can't be used instead of leaving it out")
    parser.add_argument(
        "--max_bad_fraction",
        type=float,
        default=MAX_BAD_FRACTION,
        help="end if more of the records can't be used (default %(default)s)",
    )
    add_switch(parser, "--resume", help="go on from where a run of the same arguments was cut off, if one was")
    parser.add_argument("--val_fraction", type=float, default=0.0, help="part of the data to hold out and measure on")
    parser.add_argument("--val_path", help="JSON file of records to measure on instead")
    parser.add_argument("--eval_interval", type=int, default=1000, help="optimizer steps between measurements")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=min(4, os.cpu_count()) if torch.cuda.is_available() else 0,
        help="processes that read pictures ahead (default: 4 with a GPU, 0 without)",
    )
    add_switch(parser, "--cache_features", help="run CLIP once over all pictures and keep the result in out_dir")
    add_switch(parser, "--compile", help="compile the model before training (needs a C++ compiler, on a GPU Triton)")
    add_switch(parser, "--use_wandb", help="log to Weights & Biases")
    parser.add_argument("--wandb_project", default="MiniMind-V")
    parser.add_argument(
        "--wandb_run_name", help="default: the published form, with epochs, batch size and learning rate"
    )


def add_chat_arguments(parser):
    """The arguments of a program that answers: which weights, and how answers are drawn."""
    parser.add_argument(
        "--weights",
        help="a .pth file or a transformers folder (default: stage 2's, or with --multi stage 3's, in out_dir)",
    )
    parser.add_argument(
        "--max_frames",
        type=int,
        default=8,
        help="frames taken of a clip, as many as the context holds (default %(default)s)",
    )
    parser.add_argument("--quantize", choices=["int8"], help="keep weights in 8 bits (CPU only)")
    for name, setting in SETTINGS.items():
        default = "" if setting.default is None else " (default %(default)s)"
        parser.add_argument(
            f"--{name}", default=setting.default, type=partial(read_flag, name), help=setting.help + default
        )


def read_flag(name, text):
    """A setting's value on the command line."""
    try:
        return SETTINGS[name].read(name, text)
    except BadInput as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def parse_with_demo(parser, demo, flags=None):
    """Parses the command line; `--demo` only puts the defaults `demo` in place of others, and each can still be given."""
    add_switch(parser, "--demo", help="the embedded demo: a drawn picture world and small models, nothing downloaded")
    args = parser.parse_args(flags)
    if args.demo:
        parser.set_defaults(**demo)
        args = parser.parse_args(flags)
    return args


def settings_of(args):
    """The options of `Chat.stream` that were chosen on the command line."""
    return {name: getattr(args, name) for name in SETTINGS}


def pick_dtype(name, device):
    """The precision of matrix products: as asked, or the best the device has."""
    if name:
        return DTYPES[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def load_chat(args):
    """The `Chat` that the command line asks for. BadInput says which stage to run where its weights are missing."""
    weights = args.weights
    if not weights:
        weights = Path(args.out_dir) / weights_name(args, "vlm_sft_multi" if args.multi else "vlm_sft")
        if args.demo and not weights.exists():
            stages = "python 1-pretrain_vlm.py --demo && python 2-sft_vlm.py --demo"
            more = " && python 2-sft_vlm.py --demo --multi" if args.multi else ""
            raise BadInput(f"{weights} not found: train the demo first, with {stages}{more}")
    dtype, int8 = pick_dtype(args.dtype, args.device), args.quantize == "int8"
    return Chat(
        weights,
        args.vision_path,
        args.tokenizer_path,
        args.device,
        dtype,
        int8,
        args.max_frames,
        **model_sizes(args),
    )
