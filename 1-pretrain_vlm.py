"""Stage 1: the language model learns to see, from pictures with captions.

python 1-pretrain_vlm.py --demo                        # the embedded demo, minutes on a laptop
python 1-pretrain_vlm.py                               # 512+8 (27M): out/512_llm.pth -> out/512_vlm_pretrain.pth
python 1-pretrain_vlm.py --dim 768 --n_layers 16       # 768+16 (109M)
torchrun --nproc_per_node 2 1-pretrain_vlm.py          # two GPUs
"""

import argparse
from pathlib import Path

from dataset import demo
from model.arguments import add_switch, add_training_arguments, parse_with_demo
from model.checkpoint import weights_name
from model.errors import run_script
from model.stages import DATA, DEMO_DATA, DEMO_LLM, DEMO_MODEL
from model.training.trainer import train

DEMO = {
    **DEMO_MODEL,
    **DEMO_DATA["pretrain"],
    "from_weights": DEMO_LLM,
    "cache_features": True,
    "epochs": 4,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_iters": 20,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, 4e-4, **DATA["pretrain"])
    add_switch(parser, "--from_scratch", help="start from a random language model instead of a trained one")
    args = parse_with_demo(parser, DEMO)
    demo.build_if_asked_for(args.data_path)
    args.wandb_run_name = args.wandb_run_name or (
        f"MiniMind-V Pretrain-Epoch-{args.epochs}-BatchSize-{args.batch_size}-LearningRate-{args.learning_rate}"
    )
    out = Path(args.out_dir)
    weights = None if args.from_scratch else args.from_weights or out / weights_name(args, "llm")
    train(args, "pretrain", weights, out / weights_name(args, "vlm_pretrain"), allow_missing_projector=True)


if __name__ == "__main__":
    run_script(main)
