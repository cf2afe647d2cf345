"""Stage 2: questions and answers about one picture; with --multi, stage 3: tasks about several.

python 2-sft_vlm.py --demo                     # after 1-pretrain_vlm.py --demo
python 2-sft_vlm.py --demo --multi             # after that
python 2-sft_vlm.py                            # out/512_vlm_pretrain.pth -> out/512_vlm_sft.pth
python 2-sft_vlm.py --multi                    # out/512_vlm_sft.pth      -> out/512_vlm_sft_multi.pth
torchrun --nproc_per_node 2 2-sft_vlm.py       # two GPUs
"""

import argparse

from dataset.demo import world
from model.arguments import add_switch, add_training_arguments, parse_stage
from model.errors import run_script
from model.stages import STAGES
from model.training.trainer import train


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, STAGES["sft"])
    add_switch(parser, "--multi", help="train on several pictures per question, from the weights of stage 2")
    args, stage = parse_stage(parser, lambda args: "sft_multi" if args.multi else "sft")
    world.build_if_asked_for(args.data_path)
    train(args, stage)


if __name__ == "__main__":
    run_script(main)
