"""Where the demo's model looks as it answers, in right and in wrong answers, and whether that is what it answers from.

    python tests/benchmarks/looking.py

Draws scenes of two or three things that no training has shown, and asks about each thing in every way that means no other:
by its place, its colour, its shape. For each way, the share of the fifth layer's attention on the picture that falls on the
patches of that thing as the word asked for is written. Then, where "what colour is the ring?" was answered with another
thing's colour, that other thing is painted anew, and the question asked again. Last, how many of a colour, where there are
two. After `python 1-pretrain_vlm.py --demo && python 2-sft_vlm.py --demo`, two minutes; the last line is JSON.
"""

import argparse
import collections
import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from dataset.demo import drawing
from dataset.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, UNSEEN_PAIRS, only, random_scene
from dataset.demo.sentences import LANGUAGES, subjects, values
from model.chat import Chat
from model.images import to_pixels

KINDS = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "where": PLACES,
}  # of questions, with the words that answer them
FIELDS = {"colour": "colour", "shape": "shape", "size": "size", "where": "place"}
LAYER = 4  # counted from 0: of the six, the one that looks most at the thing that is asked about
PAPER = Image.new("RGB", (drawing.PICTURE, drawing.PICTURE), (244, 244, 244))


class Asker:
    """Asks about drawn scenes in one language."""

    def __init__(self, chat, language):
        self.chat, self.language = chat, language

    def ask(self, looks, question):
        """(the answer, its token ids, the pixels)."""
        pixels = [to_pixels(drawing.paint(looks, PAPER), self.chat.encoder.preprocess)]
        answer = self.chat.stream(question, pixels, temperature=0)
        return "".join(answer), answer.token_ids, pixels

    def word(self, answer, kind):
        """The word of an answer that a question of this kind asks for, the longest that is there."""
        found = [word for word in KINDS[kind] if self.language.words[word] in answer]
        return max(found, key=lambda word: len(self.language.words[word]), default=None)

    def attention(self, question, pixels, token_ids, word):
        """The fifth layer's attention (49,) on the patches as the last token of a word was written, as shares of 1."""
        turns = [("user", f"{self.chat.config.image_special_token}\n{question}")]
        attention = self.chat.attention(turns, pixels, token_ids)
        pieces = [self.chat.tokenizer.decode(token_ids[: end + 1]) for end in range(len(token_ids))]
        step = next((i for i, text in enumerate(pieces) if word in text), len(token_ids) - 1)
        fifth = attention[LAYER, step, 0, 1:].numpy()  # without the class token
        return fifth / fifth.sum()


def painted(looks, thing, colour):
    """The looks with one thing in another colour."""
    tone = drawing.random_colour(colour, random.Random(0))
    return {**looks, thing: looks[thing]._replace(colour=tone, shade=tone)}


def patches(looks, thing):
    """Which of the 7 x 7 patches the thing covers, by a twentieth or more: those that change with its colour."""
    before, after = (np.asarray(drawing.paint(painted(looks, thing, colour), PAPER)) for colour in ("red", "blue"))
    changed = (before != after).any(axis=2).reshape(7, 32, 7, 32).mean(axis=(1, 3))
    return changed.flatten() >= 0.05


def ask_all(asker, scenes):
    """One row for each thing, way to name it and property to ask for."""
    rows, language = [], asker.language
    for seed, scene in enumerate(scenes):
        looks = drawing.random_looks(scene, random.Random(seed))
        covered = {thing: patches(looks, thing) for thing in scene}
        for thing in scene:
            for kind, field in FIELDS.items():
                for by, subject in subjects(language, scene, thing, without=field):
                    if by == "colour shape":
                        continue
                    question = language.questions[kind][0].format(subject=subject)
                    said, token_ids, pixels = asker.ask(looks, question)
                    expected = language.answers[kind].format(**{**values(language, thing), "subject": subject})
                    word = asker.word(said, kind)
                    row = {"scene": scene, "looks": looks, "thing": thing, "by": by, "kind": kind, "question": question}
                    row |= {"right": said == language.sentence(expected), "said": word}
                    shares = asker.attention(question, pixels, token_ids, language.words.get(word, ""))
                    shares = {one: shares[covered[one]].sum() for one in scene}
                    row |= {"share": shares[thing], "even": covered[thing].mean()}
                    row |= {"looked at it": max(shares, key=shares.get) == thing}
                    rows.append(row | {"never seen": (thing.colour, thing.shape) in UNSEEN_PAIRS})
    return rows


def others(row):
    """Other things of the scene that the answer would be true of."""
    field = FIELDS[row["kind"]]
    return [one for one in row["scene"] if one is not row["thing"] and getattr(one, field) == row["said"]]


def paint_and_ask_again(asker, wrong):
    """What is answered once the thing whose colour was told has each colour that the scene has not."""
    counts = collections.Counter()
    for row in wrong:
        told = others(row)[0]
        for colour in set(COLOURS) - {one.colour for one in row["scene"]}:
            if (colour, told.shape) not in UNSEEN_PAIRS:
                said, _, _ = asker.ask(painted(row["looks"], told, colour), row["question"])
                kinds = {colour: "new", row["thing"].colour: "right", row["said"]: "as before"}
                counts[kinds.get(asker.word(said, "colour"), "other")] += 1
    return counts


def count_two(asker, scenes):
    """Answers to "how many of this colour", where there are two."""
    counts, language = collections.Counter(), asker.language
    for seed, scene in enumerate(scenes):
        looks = drawing.random_looks(scene, random.Random(seed))
        for colour in {thing.colour for thing in scene if len(only(scene, colour=thing.colour)) == 2}:
            question = language.questions["count"][0].format(things=language.nouns(colour=colour))
            counts[asker.ask(looks, question)[0].replace(language.words[colour], "…")] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scenes", type=int, default=200, help="half of them with pairs of colour and shape never seen"
    )
    parser.add_argument("--language", choices=LANGUAGES, default="en")
    parser.add_argument("--weights", default=str(ROOT / "out" / "192_vlm_sft.pth"))
    args = parser.parse_args()
    asker = Asker(Chat(args.weights, ROOT / "model" / "demo", ROOT / "model" / "demo"), LANGUAGES[args.language])
    rng = random.Random(7)
    splits = ["heldout", "unseen"] * (args.scenes // 2)
    scenes = [random_scene(rng, split, counts=(2, 3)) for split in splits]
    rows = ask_all(asker, scenes)
    result = {}
    for by in ("place", "colour", "shape"):
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
    shape_for_colour = [row for row in rows if (row["by"], row["kind"]) == ("shape", "colour") and not row["right"]]
    result["painted anew"] = paint_and_ask_again(asker, [row for row in shape_for_colour if others(row)])
    result["of two"] = count_two(asker, scenes)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
