"""The command line: flags that several scripts share, their defaults, and the model that they ask for."""

import argparse
import math
import os
import re
from functools import partial

import torch

from .chat import Chat
from .errors import BadInput
from .files import in_repository
from .generate import SETTINGS
from .stages import STAGES, TOKENIZER_PATH, VISION_PATH, answering_stage, weights_path

MAX_BAD_FRACTION = 0.05  # of the records; training skips them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def number(kind, least, most):
    """The type of a flag whose value is a number of a kind, int or float, from `least` to `most`."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:  # as is nan
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"should be {what} from {least} to {most}, not {text!r:.50}")
        return value

    return read


COUNT = number(int, 1, 10**9)
COUNT_OR_NONE = number(int, 0, 10**9)
FRACTION = number(float, 0, 1)
LEARNING_RATE = number(float, 1e-12, 1e30)
SEED = number(int, 0, 2**63 - 1)
# sizes that can be computed with, however long it takes
WIDTH = number(int, 1, 10**6)
LAYERS = number(int, 1, 10**4)
TOKENS = number(int, 2, 10**6)
PROCESSES = number(int, 0, 1000)
THREADS = number(int, 1, 1000)
MINUTES = number(float, 1e-3, 10**6)


def parse_bool(text):
    """The value in `--multi True` and `--multi False`."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} should be True or False")


def add_switch(parser, name, help):
    """A flag that is off by default and on when named; True or False may follow."""
    parser.add_argument(name, nargs="?", const=True, default=False, type=parse_bool, metavar="True|False", help=help)


def parse_device(text):
    """The value of `--device`; whether there is such a device, `check_device` knows."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"should be cuda, cuda:0, mps or cpu, not {text!r:.50}")
    return text


def check_device(device):
    """BadInput if this machine, or its PyTorch, has no such device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch without CUDA
        why = re.split(r"\n|\. ", str(error))[0]  # PyTorch's first sentence
        raise BadInput(f"{device} can't be used here ({why}): name another --device, or leave it out") from None


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def add_model_arguments(parser):
    """Sizes of the model, paths and device: what training and answering share."""
    parser.add_argument("--dim", type=WIDTH, help="width of the language model (default: that of the weights, or 512)")
    parser.add_argument("--n_layers", type=LAYERS, help="layers (default: those of the weights, or 8)")
    parser.add_argument("--n_heads", type=LAYERS, help="attention heads (default: those of the weights, or 16)")
    parser.add_argument(
        "--n_kv_heads",
        type=LAYERS,
        help="key/value heads, each shared by several attention heads (default: those of the weights, or 8)",
    )
    parser.add_argument(
        "--max_seq_len",
        type=TOKENS,
        default=512,
        help="longest conversation in tokens; a picture takes 50 with ViT-B/32 (default %(default)s)",
    )
    add_switch(parser, "--use_moe", help="experts in place of each feed-forward")
    parser.add_argument(
        "--out_dir", default=in_repository("out"), help="folder of weights and logs (default %(default)s)"
    )
    add_path_arguments(parser)
    parser.add_argument(
        "--device",
        type=parse_device,
        default=default_device(),
        help="cuda, mps or cpu (default: the first that is there)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: bfloat16 or float16 on a GPU, float32 on a CPU, where the demo trains in bfloat16 if it can",
    )


def add_path_arguments(parser):
    """Where the CLIP and the tokenizer are."""
    parser.add_argument("--vision_path", default=VISION_PATH, help="folder of the CLIP or SigLIP (default %(default)s)")
    parser.add_argument(
        "--tokenizer_path", default=TOKENIZER_PATH, help="folder of the tokenizer (default %(default)s)"
    )


def model_sizes(args):
    """The LMConfig fields among the flags that were given."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "use_moe", "projector", "drop_class_token")
    return {name: getattr(args, name) for name in names if getattr(args, name, None)}


def add_training_arguments(parser, stage=STAGES["pretrain"]):
    """The flags of training, with the defaults of a stage."""
    add_model_arguments(parser)
    parser.add_argument(
        "--data_path",
        nargs="+",
        default=stage.data_path,
        help="files of records, JSON or Parquet, or a folder of them; see dataset/README.md (default %(default)s)",
    )
    parser.add_argument(
        "--images_path",
        default=stage.images_path,
        help="folder, zip or tar of their pictures, if they aren't inside (default %(default)s)",
    )
    parser.add_argument(
        "--from_weights", help="start from this file, or transformers folder, instead of the previous stage's"
    )
    parser.add_argument(
        "--projector",
        choices=["linear", "mlp"],
        help="form of the map from pictures to the language model (default: that of the weights, or linear)",
    )
    add_switch(
        parser,
        "--drop_class_token",
        help="leave out the first of CLIP's vectors (default: as the weights were trained)",
    )
    add_switch(parser, "--freeze_llm", help="train only the projector, as stage 1 of --demo does")
    parser.add_argument(
        "--seed",
        type=SEED,
        default=1337,
        help="seed of random weights, dropout and the order of samples (default %(default)s)",
    )
    parser.add_argument("--epochs", type=COUNT, default=1, help="passes over the data (default %(default)s)")
    parser.add_argument(
        "--batch_size", type=COUNT, default=16, help="samples per batch and process (default %(default)s)"
    )
    parser.add_argument(
        "--batch_tokens",
        type=COUNT,
        help="tokens per batch, padding included, instead of --batch_size: as many samples of similar length as fit",
    )
    parser.add_argument(
        "--learning_rate",
        type=LEARNING_RATE,
        default=stage.learning_rate,
        help="peak learning rate (default %(default)s)",
    )
    parser.add_argument("--accumulation_steps", type=COUNT, default=1, help="batches per optimizer step")
    parser.add_argument(
        "--grad_clip",
        type=number(float, 0, 1e30),
        default=1.0,
        help="scale larger gradients down to this norm; 0 leaves them as they are (default %(default)s)",
    )
    parser.add_argument("--warmup_iters", type=COUNT_OR_NONE, default=0, help="optimizer steps of linear warm-up")
    parser.add_argument(
        "--log_interval",
        type=COUNT_OR_NONE,
        default=10,
        help="optimizer steps between log lines; 0 writes none (default %(default)s)",
    )
    parser.add_argument(
        "--save_interval",
        type=COUNT_OR_NONE,
        default=1000,
        help="optimizer steps between saves; 0 saves only at the end (default %(default)s)",
    )
    add_switch(parser, "--strict", help="stop at the first record that can't be used instead of skipping it")
    parser.add_argument(
        "--max_bad_fraction",
        type=FRACTION,
        default=MAX_BAD_FRACTION,
        help="stop if more of the records can't be used (default %(default)s)",
    )
    add_switch(parser, "--resume", help="continue an interrupted run with the same arguments, if there is one")
    parser.add_argument(
        "--val_fraction", type=FRACTION, default=0.0, help="fraction of the samples to hold out for validation"
    )
    parser.add_argument("--val_path", nargs="+", help="files of records to validate on instead")
    parser.add_argument(
        "--eval_interval",
        type=COUNT_OR_NONE,
        default=1000,
        help="optimizer steps between validations; 0 makes none, not even at the end (default %(default)s)",
    )
    parser.add_argument(
        "--num_workers",
        type=PROCESSES,
        default=min(8, os.cpu_count()) if torch.cuda.is_available() else 0,
        help="processes that read pictures ahead (default: 8 with a GPU, 0 without)",
    )
    add_switch(parser, "--cache_features", help="run CLIP once over all pictures and keep the result in out_dir")
    add_switch(parser, "--compile", help="compile the layers first (needs a C++ compiler, or Triton on a GPU)")
    add_switch(parser, "--use_wandb", help="log to Weights & Biases")
    parser.add_argument(
        "--wandb_project", default="MiniMind-V", help="project at Weights & Biases (default %(default)s)"
    )
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
        type=COUNT,
        default=8,
        help="most frames to use of a video or animation; fewer if the context has no room (default %(default)s)",
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
    """Parses the command line; `--demo` only changes defaults, to those in `demo`, and each can still be overridden."""
    return parse_with_defaults(parser, lambda args: demo if args.demo else {}, flags)


def parse_stage(parser, name_of):
    """Parses a training script's command line -> (arguments, name of their stage). The stage decides the defaults.

    name_of: called with the arguments, returns the name of the stage they ask for.
    """

    def defaults_of(args):
        stage = STAGES[name_of(args)]
        return stage.demo if args.demo else stage.defaults

    args = parse_with_defaults(parser, defaults_of)
    if isinstance(args.data_path, str):  # a default
        args.data_path = [args.data_path]
    name = name_of(args)
    args.wandb_run_name = args.wandb_run_name or (
        f"MiniMind-V {STAGES[name].title}-Epoch-{args.epochs}-BatchSize-{args.batch_size}"
        f"-LearningRate-{args.learning_rate}"
    )
    return args, name


def parse_with_defaults(parser, defaults_of, flags=None):
    """Parses the command line twice, as its own flags decide some defaults: those that `defaults_of(arguments)` returns."""
    add_switch(parser, "--demo", help="the embedded demo: a drawn picture world and small models, nothing downloaded")
    parser.set_defaults(**defaults_of(parser.parse_args(flags)))
    return parser.parse_args(flags)


def settings_of(args):
    """The options of `Chat.stream` on the command line."""
    return {name: getattr(args, name) for name in SETTINGS}


def pick_dtype(name, device):
    """The precision of matrix products: the one named, or the best that the device has."""
    if name:
        return DTYPES[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def load_chat(args):
    """The `Chat` that the command line asks for; the script must have added `--multi`.

    BadInput says which stages to run if the demo's weights are missing.
    """
    check_device(args.device)
    weights = args.weights
    if not weights:
        wanted = answering_stage(args.multi)
        weights = weights_path(args.out_dir, args, wanted.writes)
        if args.demo and not weights.exists():
            stages = list(STAGES.values())
            needed = stages[: stages.index(wanted) + 1]
            there = [i for i, stage in enumerate(needed) if weights_path(args.out_dir, args, stage.writes).exists()]
            commands = [f"python {stage.command} --demo" for stage in needed[max(there, default=-1) + 1 :]]
            raise BadInput(f"{weights} not found: train the demo first, with {' && '.join(commands)}")
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
