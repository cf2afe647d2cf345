"""Where the demo's model looks as it answers, in right and in wrong answers, and whether that is what it answers from.

    python tests/benchmarks/looking.py

Draws scenes of two or three things that no training has shown, and asks about each thing in every way that means no other:
by its place, its colour, its shape. For each way, the share of the first layer's attention on the picture that falls on the
patches of that thing as the last word is written. Then, where "what colour is the ring?" was answered with another thing's
colour, that other thing is painted anew, and the question asked again. Last, how many of a colour, where there are two. After
`python 1-pretrain_vlm.py --demo && python 2-sft_vlm.py --demo`, two minutes; the last line is JSON.
"""

import argparse
import collections
import json
import random
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from dataset import demo
from model.chat import Chat
from model.images import to_pixels

QUESTIONS = {"colour": "{}什么颜色？", "shape": "{}什么形状？", "size": "{}有多大？", "place": "{}在哪里？"}
WAYS = {"place": ("colour", "shape", "size"), "colour": ("shape", "place"), "shape": ("colour", "size", "place")}


def draw(scene, seed):
    """The scene as a picture (224, 224, 3) in which a seed decides all that its words leave open."""
    return demo.draw(scene, random.Random(seed))


def painted(scene, thing, colour):
    return tuple(one._replace(colour=colour) if one is thing else one for one in scene)


def patches(scene, thing, seed):
    """Which of the 7 x 7 patches the thing covers, by a twentieth or more: those that change with its colour."""
    before, after = (np.asarray(draw(painted(scene, thing, colour), seed)) for colour in ("红色", "蓝色"))
    changed = (before != after).any(axis=2).reshape(7, 32, 7, 32).mean(axis=(1, 3))
    return changed.flatten() >= 0.05


def ask(chat, picture, question):
    answer = chat.stream(question, [to_pixels(picture, chat.encoder.preprocess)], temperature=0)
    return "".join(answer), answer.token_ids


def look(chat, picture, question, token_ids):
    """The first layer's attention (49,) on the patches as it wrote the last token, as shares of 1."""
    pixels = [to_pixels(picture, chat.encoder.preprocess)]
    turns = [("user", f"{chat.config.image_special_token}\n{question}")]
    first = chat.attention(turns, pixels, token_ids)[0, -1, 0, 1:].numpy()  # without the class token
    return first / first.sum()


def ask_all(chat, scenes):
    """One row for each thing, way to name it and property to ask for."""
    rows = []
    for seed, scene in enumerate(scenes):
        picture = draw(scene, seed)
        covered = {thing: patches(scene, thing, seed) for thing in scene}
        for thing in scene:
            for by, asked_for in WAYS.items():
                name = getattr(thing, by)
                if len(demo.only(scene, **{by: name})) > 1:
                    continue
                for wanted in asked_for:
                    question = QUESTIONS[wanted].format(name)
                    said, token_ids = ask(chat, picture, question)
                    row = {
                        "scene": scene,
                        "seed": seed,
                        "thing": thing,
                        "by": by,
                        "wanted": wanted,
                        "question": question,
                    }
                    row |= {"right": said == f"{name}{getattr(thing, wanted)}", "said": said.removeprefix(name)}
                    first = look(chat, picture, question, token_ids)
                    shares = {one: first[covered[one]].sum() for one in scene}
                    row |= {"share": shares[thing], "even": covered[thing].mean()}
                    row |= {"looked at it": max(shares, key=shares.get) == thing}
                    rows.append(row | {"never seen": (thing.colour, thing.shape) in demo.UNSEEN_PAIRS})
    return rows


def others(row):
    """Other things of the scene, of which the answer would be true."""
    return [one for one in row["scene"] if one is not row["thing"] and getattr(one, row["wanted"]) == row["said"]]


def paint_and_ask_again(chat, wrong):
    """What is answered once the thing whose colour was told has each colour that the scene has not."""
    counts = collections.Counter()
    for row in wrong:
        told = others(row)[0]
        for colour in set(demo.COLOURS) - {one.colour for one in row["scene"]}:
            if (colour, told.shape) not in demo.UNSEEN_PAIRS:
                picture = draw(painted(row["scene"], told, colour), row["seed"])
                said = ask(chat, picture, row["question"])[0].removeprefix(row["thing"].shape)
                kinds = {colour: "new", row["thing"].colour: "right", row["said"]: "as before"}
                counts[kinds.get(said, "other")] += 1
    return counts


def count_two(chat, scenes):
    """Answers to "how many of this colour", where there are two."""
    counts = collections.Counter()
    for seed, scene in enumerate(scenes):
        for colour, number in collections.Counter(thing.colour for thing in scene).items():
            if number == 2:
                subject = f"{colour}图形"
                counts[ask(chat, draw(scene, seed), f"有几个{subject}？")[0].removeprefix(subject)] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scenes", type=int, default=200, help="half of them with pairs of colour and shape never seen"
    )
    parser.add_argument("--weights", default=str(ROOT / "out" / "192_vlm_sft.pth"))
    args = parser.parse_args()
    chat = Chat(args.weights, ROOT / "model" / "demo", ROOT / "model" / "demo")
    rng = random.Random(7)
    splits = ["heldout", "unseen"] * (args.scenes // 2)
    scenes = [demo.random_scene(rng, split, counts=(2, 3)) for split in splits]
    rows = ask_all(chat, scenes)
    result = {}
    for by in WAYS:
        asked = [row for row in rows if row["by"] == by]
        result[by] = {"share": round(float(np.mean([row["share"] for row in asked])), 3)}
        result[by]["even"] = round(float(np.mean([row["even"] for row in asked])), 3)
        for name, never in (("known pairs", False), ("pairs never seen", True)):
            some = [row for row in asked if row["never seen"] == never]
            wrong = [row for row in some if not row["right"]]
            result[by][name] = {
                "asked": len(some),
                "wrong": len(wrong),
                "looking at it": sum(row["looked at it"] for row in wrong),
                "true of another thing": sum(bool(others(row)) for row in wrong),
            }
        print(by, result[by], flush=True)
    shape_for_colour = [row for row in rows if (row["by"], row["wanted"]) == ("shape", "colour") and not row["right"]]
    result["painted anew"] = paint_and_ask_again(chat, [row for row in shape_for_colour if others(row)])
    result["of two"] = count_two(chat, scenes)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
