"""Stage 2: questions and answers about one picture; with --multi, stage 3: tasks about several.

python 2-sft_vlm.py --demo                     # after 1-pretrain_vlm.py --demo
python 2-sft_vlm.py --demo --multi             # after that
python 2-sft_vlm.py                            # out/512_vlm_pretrain.pth -> out/512_vlm_sft.pth
python 2-sft_vlm.py --multi                    # out/512_vlm_sft.pth      -> out/512_vlm_sft_multi.pth
torchrun --nproc_per_node 2 2-sft_vlm.py       # two GPUs
"""

import argparse
from pathlib import Path

from dataset import demo
from model.arguments import add_switch, add_training_arguments, parse_with_demo
from model.checkpoint import weights_name
from model.errors import run_script
from model.stages import DATA, DEMO_DATA, DEMO_MODEL
from model.training.trainer import train

DEMO = {
    **DEMO_MODEL,
    **DEMO_DATA["sft"],
    "cache_features": True,
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "warmup_iters": 20,
}
DEMO_MULTI = {**DEMO, **DEMO_DATA["sft_multi"], "epochs": 6}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, 1e-6, **DATA["sft"])
    add_switch(parser, "--multi", help="train on several pictures per question, from the weights of stage 2")
    given, _ = parser.parse_known_args()
    if given.multi:
        parser.set_defaults(**DATA["sft_multi"])
    args = parse_with_demo(parser, DEMO_MULTI if given.multi else DEMO)
    demo.build_if_asked_for(args.data_path)
    args.wandb_run_name = args.wandb_run_name or (
        f"MiniMind-V SFT-Epoch-{args.epochs}-BatchSize-{args.batch_size}-LearningRate-{args.learning_rate}"
    )
    out = Path(args.out_dir)
    before, after = ("vlm_sft", "vlm_sft_multi") if args.multi else ("vlm_pretrain", "vlm_sft")
    weights = args.from_weights or out / weights_name(args, before)
    train(args, after.removeprefix("vlm_"), weights, out / weights_name(args, after))


if __name__ == "__main__":
    run_script(main)
