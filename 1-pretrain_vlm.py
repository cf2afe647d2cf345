"""Stage 1: the model learns to see, from pictures with captions.

python 1-pretrain_vlm.py --demo                        # the embedded demo, minutes on a laptop
python 1-pretrain_vlm.py                               # 512+8 (27M): out/512_llm.pth -> out/512_vlm_pretrain.pth
python 1-pretrain_vlm.py --dim 768 --n_layers 16       # 768+16 (109M)
torchrun --nproc_per_node 2 1-pretrain_vlm.py          # two GPUs
"""

import argparse

from dataset.demo import world
from model.arguments import add_switch, add_training_arguments, parse_stage
from model.errors import run_script
from model.stages import STAGES
from model.training.trainer import train


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, STAGES["pretrain"])
    add_switch(parser, "--from_scratch", help="start from a random language model instead of a trained one")
    args, stage = parse_stage(parser, lambda args: "pretrain")
    world.build_if_asked_for(args.data_path)
    train(args, stage, from_scratch=args.from_scratch)


if __name__ == "__main__":
    run_script(main)
