"""The stages: what each of them reads, starts from and makes, and what the demo puts in its place."""

from typing import NamedTuple

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


class Script(NamedTuple):
    """What a script starts from, reads and makes, by the names of stages."""

    weights: str
    data: str | None = None
    makes: str | None = None


SCRIPTS = {
    "1-pretrain_vlm.py": Script("llm", "pretrain", "vlm_pretrain"),
    "2-sft_vlm.py": Script("vlm_pretrain", "sft", "vlm_sft"),
    "2-sft_vlm.py --multi": Script("vlm_sft", "sft_multi", "vlm_sft_multi"),
    "3-eval_chat.py": Script("vlm_sft"),
}
