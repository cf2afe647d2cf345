"""Ask a trained model about pictures.

python 3-eval_chat.py --demo                   # the demo's pictures, then its score on held-out ones
python 3-eval_chat.py --demo --multi           # the same for two pictures at a time
python 3-eval_chat.py                          # every picture of dataset/eval_images, with out/512_vlm_sft.pth
python 3-eval_chat.py --score FILE --images_path FOLDER     # exact match on a labelled file of the SFT format
"""

import argparse
from pathlib import Path

from dataset import demo
from model.chat import Chat, read_questions, score
from model.checkpoint import weights_name
from model.trainer import (
    DEMO_MODEL,
    add_model_arguments,
    add_switch,
    model_sizes,
    parse_with_demo,
    pick_dtype,
    run_script,
)

DEMO = {**DEMO_MODEL, "score": [demo.FOLDER / "score_heldout.json", demo.FOLDER / "score_unseen.json"]}
DEMO_MULTI = {**DEMO_MODEL, "score": [demo.FOLDER / "score_multi.json"]}


def show_answers(chat, args):
    """Every question of the evaluation folder, with its answer as it comes."""
    for paths, question in read_questions("dataset/eval_multi_images" if args.multi else "dataset/eval_images"):
        print(f"\n[{' + '.join(path.name for path in paths)}]\n问: {question}\n答: ", end="", flush=True)
        for piece in chat.stream(question, paths, args.max_new_tokens, args.temperature, args.top_k):
            print(piece, end="", flush=True)
        print()


def show_score(chat, args):
    """A table of exact matches per kind of question for each labelled file."""
    for file in args.score:
        print(
            f"\n{file}: share of exactly right answers\n{'kind':<12}{'questions':>10}{'right image':>14}{'shuffled image':>17}"
        )
        for kind, (count, own, others) in score(chat, file, args.images_path).items():
            print(f"{kind:<12}{count:>10}{own:>14.1%}{others:>17.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--weights", help="a .pth file (default: stage 2's, or stage 3's with --multi, in out_dir)")
    add_switch(parser, "--multi", help="two pictures at a time: dataset/eval_multi_images")
    parser.add_argument(
        "--score", nargs="+", metavar="FILE", help="answer these labelled files and count the right answers"
    )
    parser.add_argument("--images_path", default="dataset/sft_images", help="folder of the pictures of --score")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=8)
    given, _ = parser.parse_known_args()
    args = parse_with_demo(parser, DEMO_MULTI if given.multi else DEMO)
    weights = args.weights or Path(args.out_dir) / weights_name(args, "vlm_sft_multi" if args.multi else "vlm_sft")
    chat = Chat(
        weights,
        args.vision_path,
        args.tokenizer_path,
        args.device,
        pick_dtype(args.dtype, args.device),
        **model_sizes(args),
    )
    if args.demo or not args.score:
        show_answers(chat, args)
    if args.score:
        demo.build_if_asked_for(args.score[0])
        show_score(chat, args)


if __name__ == "__main__":
    run_script(main)
