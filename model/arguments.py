"""The command line: what the scripts share of it."""

import argparse
import os

import torch

# the demo's preset of the arguments that training and chatting share
DEMO_MODEL = {
    "dim": 192,
    "n_layers": 4,
    "n_heads": 6,
    "n_kv_heads": 3,
    "vision_path": "model/demo",
    "tokenizer_path": "model/demo",
    "images_path": "dataset/demo_world/images",
}
DEMO_LLM = "model/demo/192_llm.pth"  # what its first stage starts from
# what each stage reads, unless told otherwise
DATA = {
    "pretrain": {"data_path": "dataset/pretrain_vlm_data.json", "images_path": "dataset/pretrain_images"},
    "sft": {"data_path": "dataset/sft_vlm_data.json", "images_path": "dataset/sft_images"},
    "sft_multi": {"data_path": "dataset/sft_multi_vlm_data.json", "images_path": "dataset/sft_multi_images"},
}
DEMO_DATA = {
    stage: {"data_path": f"dataset/demo_world/{stage}.json", "images_path": DEMO_MODEL["images_path"]} for stage in DATA
}
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


def parse_with_demo(parser, demo, flags=None):
    """Parses the command line; `--demo` only puts the defaults `demo` in place of others, and each can still be given."""
    add_switch(parser, "--demo", help="the embedded demo: a drawn picture world and small models, nothing downloaded")
    args = parser.parse_args(flags)
    if args.demo:
        parser.set_defaults(**demo)
        args = parser.parse_args(flags)
    return args


def pick_dtype(name, device):
    """The precision of matrix products: as asked, or the best the device has."""
    if name:
        return DTYPES[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32
