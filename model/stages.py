"""The stages of training: what each of them starts from, reads and writes. Scripts, doctor and README all follow this table."""

from pathlib import Path
from typing import NamedTuple

import torch

from .files import in_repository

# the embedded demo's defaults for flags that training and answering share
DEMO_MODEL = {
    "dim": 192,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 3,
    "vision_path": in_repository("model/demo"),
    "tokenizer_path": in_repository("model/demo"),
    "images_path": in_repository("dataset/demo_world/images"),
}
DEMO_LLM = in_repository("model/demo/192_llm.pth")
# its defaults for training alone; x86 CPUs that multiply bfloat16 train 1.3 to 1.8 times as fast in it
CPU = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch can't tell
DEMO_TRAINING = {"cache_features": True, "warmup_iters": 20}
if not torch.cuda.is_available() and (CPU.get("avx512_bf16") or CPU.get("amx_bf16")):
    DEMO_TRAINING["dtype"] = "bfloat16"
# and for answering: its questions have one right answer
DEMO_ANSWERING = {**DEMO_MODEL, "temperature": 0.0}


class Stage(NamedTuple):
    """One stage of training. Its weights are files in `out_dir`, e.g. 512_vlm_sft.pth or 768_moe_vlm_sft.pth."""

    command: str  # what a person types
    title: str  # of its runs in Weights & Biases
    starts_from: str  # {dim}[_moe]_{starts_from}.pth
    writes: str  # {dim}[_moe]_{writes}.pth
    data_path: str
    images_path: str
    learning_rate: float
    demo: dict  # the demo's defaults for this stage's flags

    @property
    def defaults(self):
        """Defaults of the training flags that differ from stage to stage."""
        return {name: getattr(self, name) for name in ("data_path", "images_path", "learning_rate")}


STAGES = {
    "pretrain": Stage(
        command="1-pretrain_vlm.py",
        title="Pretrain",
        starts_from="llm",
        writes="vlm_pretrain",
        data_path=in_repository("dataset/pretrain_vlm_data.json"),
        images_path=in_repository("dataset/pretrain_images"),
        learning_rate=4e-4,
        demo={
            **DEMO_MODEL,
            **DEMO_TRAINING,
            "data_path": in_repository("dataset/demo_world/pretrain.json"),
            "from_weights": DEMO_LLM,
            # until the projector says something, a language model learns which words are likely, whatever a picture shows;
            # the learning rate below is for the projector alone
            "freeze_llm": True,
        }
        | {"epochs": 2, "batch_size": 32, "learning_rate": 3e-3},
    ),
    "sft": Stage(
        command="2-sft_vlm.py",
        title="SFT",
        starts_from="vlm_pretrain",
        writes="vlm_sft",
        data_path=in_repository("dataset/sft_vlm_data.json"),
        images_path=in_repository("dataset/sft_images"),
        learning_rate=1e-6,
        demo={
            **DEMO_MODEL,
            **DEMO_TRAINING,
            "data_path": in_repository("dataset/demo_world/sft.json"),
            "epochs": 2,
            "batch_size": 16,
            "learning_rate": 5e-4,
        },
    ),
    "sft_multi": Stage(
        command="2-sft_vlm.py --multi",
        title="SFT",
        starts_from="vlm_sft",
        writes="vlm_sft_multi",
        data_path=in_repository("dataset/sft_multi_vlm_data.json"),
        images_path=in_repository("dataset/sft_multi_images"),
        learning_rate=1e-6,
        demo={**DEMO_MODEL, **DEMO_TRAINING, "data_path": in_repository("dataset/demo_world/sft_multi.json")}
        | {"epochs": 4, "batch_size": 16, "learning_rate": 1e-3},
    ),
}


def answering_stage(multi):
    """The stage whose weights answer questions: about one picture, or about several."""
    return STAGES["sft_multi" if multi else "sft"]


def weights_path(out_dir, config_or_args, name):
    """The path of the weights `name`, e.g. out/512_moe_vlm_sft.pth; takes anything with `dim` (None: 512) and `use_moe`."""
    return Path(out_dir) / f"{config_or_args.dim or 512}{'_moe' if config_or_args.use_moe else ''}_{name}.pth"


# --- published parts ------------------------------------------------------------------------------------------------

VISION_PATH = in_repository("model/clip_model/clip-vit-base-patch32")
TOKENIZER_PATH = in_repository("model/minimind_tokenizer")
DATA_REPOSITORY = "jingyaogong/minimind-v_dataset"


class Parts(NamedTuple):
    """Parts that fit together: where each belongs, and the repository at Hugging Face that has it, if one does."""

    title: str
    dim: int
    llm: str
    llm_repository: str | None
    tokenizer_path: str
    vision_path: str
    vision_repository: str
    data_paths: dict  # stage -> file of its records; pictures are inside, or in the stage's folder

    def command(self, name):
        """What a person types for a stage with these parts; flags that say what is the default anyway are left out."""
        stage = STAGES[name]
        flags = ["python", stage.command]
        if self.llm_repository and name == "pretrain":
            flags += ["--from_weights", self.llm]
        elif self.dim != 512:
            flags += ["--dim", str(self.dim)]
        for flag, value, default in (
            ("--tokenizer_path", self.tokenizer_path, TOKENIZER_PATH),
            ("--vision_path", self.vision_path, VISION_PATH),
            ("--data_path", self.data_paths[name], stage.data_path),
        ):
            flags += [flag, value] if value != default else []
        return " ".join(flags)


def published_parts(args):
    """Name -> Parts that were published for a model of the width `args.dim`. README, "Train it for real", tells the same.

    Those of "v1" are where other flags say, so that they can be a person's own.
    """
    dim = args.dim or 512
    own_data = {name: stage.data_path for name, stage in STAGES.items()}
    parquet = {**own_data, "pretrain": in_repository("dataset/pretrain_i2t.parquet")}
    parquet["sft"] = in_repository("dataset/sft_i2t.parquet")
    minimind2 = "MiniMind2" if dim == 768 else "MiniMind2-Small"
    folder2, folder3 = in_repository(minimind2), in_repository("minimind-3")
    clip = VISION_PATH, "openai/clip-vit-base-patch32"
    siglip = in_repository("model/siglip2-base-p32-256-ve"), "jingyaogong/siglip2-base-p32-256-ve"
    return {
        "minimind2": Parts(
            f"Path A: {minimind2} with CLIP", dim, folder2, f"jingyaogong/{minimind2}", folder2, *clip, parquet
        ),
        "minimind3": Parts(
            "Path B: MiniMind-3 with SigLIP2", 768, folder3, "jingyaogong/minimind-3", folder3, *siglip, parquet
        ),
        "v1": Parts(
            "the files of 2024, or your own",
            dim,
            str(weights_path(args.out_dir, args, "llm")),
            None,
            args.tokenizer_path,
            args.vision_path,
            clip[1],
            own_data,
        ),
    }
