"""The stages of training: what each of them starts from, reads and writes. Scripts, doctor and README all follow this table."""

from pathlib import Path
from typing import NamedTuple

from .files import in_repository

# the embedded demo's defaults for flags that training and answering share
DEMO_MODEL = {
    "dim": 192,
    "n_layers": 4,
    "n_heads": 6,
    "n_kv_heads": 3,
    "vision_path": in_repository("model/demo"),
    "tokenizer_path": in_repository("model/demo"),
    "images_path": in_repository("dataset/demo_world/images"),
}
DEMO_LLM = in_repository("model/demo/192_llm.pth")
# its defaults for training alone
DEMO_TRAINING = {"cache_features": True, "learning_rate": 1e-3, "warmup_iters": 20}
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
        }
        | {"epochs": 4, "batch_size": 32},
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
            "epochs": 3,
            "batch_size": 16,
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
        | {"epochs": 6, "batch_size": 16},
    ),
}


def answering_stage(multi):
    """The stage whose weights answer questions: about one picture, or about several."""
    return STAGES["sft_multi" if multi else "sft"]


def weights_path(out_dir, config_or_args, name):
    """The path of the weights `name`, e.g. out/512_moe_vlm_sft.pth; takes anything with `dim` (None: 512) and `use_moe`."""
    return Path(out_dir) / f"{config_or_args.dim or 512}{'_moe' if config_or_args.use_moe else ''}_{name}.pth"
