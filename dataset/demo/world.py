"""The demo's picture world: coloured shapes, drawn from a seed, with captions and questions in Chinese and English.

    python -m dataset.demo.world                     # into dataset/demo_world; `--demo` does this if it is missing
    python -m dataset.demo.world --eval_pictures     # redraws dataset/eval_images and dataset/eval_multi_images

What a scene is and which split it belongs to: scenes.py. How it looks: drawing.py. What is said about it: sentences.py.

The files have the real formats (dataset/README.md): `pretrain.json`, `sft.json` and `sft_multi.json` to train on, with their
pictures in `images/`. The files to score have a `kind` in each record, its language first: `score_heldout.json` and
`score_unseen.json`, `score_multi.json` about two pictures, `score_clips.json` about animations, and
`score_clips_shuffled.json` with their frames out of order.
"""

import argparse
import hashlib
import itertools
import json
import random
import sys
from pathlib import Path

from dataset.records import make_record
from model.arguments import COUNT, COUNT_OR_NONE, SEED
from model.errors import run_script
from model.files import in_repository

from .drawing import draw, draw_change, draw_frames
from .scenes import ALIKE, CHANGES, MOVING_CHANGES, changed_scene, random_scene
from .sentences import LANGUAGES, QUESTIONS, change_in_words, question, questions

FOLDER = Path(in_repository("dataset/demo_world"))
FRAMES = 4  # of an animation
NAMELESS = 4  # training pictures for each one of things without a name


class World:
    """Draws pictures into `folder`/images and returns the records about them."""

    def __init__(self, folder, seed):
        self.folder = Path(folder)
        self.rng = random.Random(seed)
        (self.folder / "images").mkdir(parents=True, exist_ok=True)

    def save(self, pictures, names):
        for picture, name in zip(pictures, names, strict=True):
            picture.save(self.folder / "images" / name, quality=92)

    def write(self, name, records):
        with open(self.folder / name, "w", encoding="utf-8") as f:
            json.dump(records, f, ensure_ascii=False, indent=1)

    def language(self):
        return self.rng.choice(list(LANGUAGES.values()))

    def captions_and_questions(self, pictures, turns):
        """Records to train on, one picture each: (captions, conversations of `turns` questions about the same pictures)."""
        captions = []
        conversations = []
        for i in range(pictures):
            scene = random_scene(self.rng, alike=self.rng.choice(ALIKE))
            name = f"train_{i:05d}.jpg"
            self.save([draw(scene, self.rng)], [name])

            # stage 1: a caption, with the picture before or after the prompt
            prompt, caption = question(self.language(), scene, self.rng, "caption")
            prompt = self.rng.choice([f"{prompt}\n<image>", f"<image>\n{prompt}"])
            captions.append(make_record([name], [(prompt, caption)]))

            # stage 2: questions, and now and then the caption
            conversations.append(self.conversation(name, questions(scene, self.rng, turns)))
        return captions, conversations

    def conversation(self, name, pairs):
        """A record of (question, answer) pairs about one picture."""
        (first_question, first_answer), *others = pairs
        return make_record([name], [(f"<image>\n{first_question}", first_answer), *others])

    def nameless_things(self, pictures, turns):
        """Records about things in colours, or of shapes, that have no name here, with questions about anything else.

        They teach to see a shape whatever its colour is, and a colour whatever its shape is.
        """
        records = []
        for i in range(pictures):
            scene, nameless = random_scene(self.rng, alike=self.rng.choice(ALIKE)), ("colour", "shape")[i % 2]
            name = f"nameless_{i:05d}.jpg"
            self.save([draw([thing._replace(**{nameless: None}) for thing in scene], self.rng)], [name])
            records.append(self.conversation(name, questions(scene, self.rng, turns, nameless)))
        return records

    def questions_of_every_kind(self, prefix, pictures, split):
        """Records to score, one for every kind of question about each picture, of one language."""
        records = []
        for i in range(pictures):
            scene = random_scene(self.rng, split)
            name = f"{prefix}_{i:05d}.jpg"
            self.save([draw(scene, self.rng)], [name])
            code, language = list(LANGUAGES.items())[i % len(LANGUAGES)]
            for kind in QUESTIONS:
                pair = question(language, scene, self.rng, kind)
                if pair:
                    text, answer = pair
                    records.append(make_record([name], [(f"<image>\n{text}", answer)], kind=f"{code} {kind}"))
        return records

    def changes(self, prefix, count, split, animated=False):
        """Records of two pictures each, or of the frames of an animation; the answer is what has changed."""
        records = []
        for i in range(count):
            if animated:
                scene, change = changed_scene(self.rng, split, counts=(1, 2, 2), kinds=MOVING_CHANGES)
                pictures = draw_frames(scene, change, self.rng, FRAMES)
            else:
                scene, change = changed_scene(self.rng, split)
                pictures = draw_change(scene, change, self.rng)
            names = [f"{prefix}_{i:05d}_{number}.jpg" for number in range(len(pictures))]
            self.save(pictures, names)
            language = list(LANGUAGES.values())[i % len(LANGUAGES)]
            text = self.rng.choice(language.questions["animation" if animated else "change"])
            asked = "<image>\n" * len(pictures) + language.as_typed(text, self.rng)
            records.append(make_record(names, [(asked, change_in_words(language, change))], kind=change.kind))
        return records

    def shuffled(self, records):
        """The same questions about the same frames, out of order."""
        in_order = tuple(range(FRAMES))
        orders = [order for order in itertools.permutations(range(FRAMES)) if order != in_order]
        changed = []
        for record in records:
            names = record["image"].split(", ")
            order = self.rng.choice(orders)
            changed.append({**record, "image": ", ".join(names[number] for number in order)})
        return changed


def build(folder, pictures=6000, pairs=3000, animations=1500, held_out=200, turns=4, seed=0):
    """Draws the whole world into `folder`, over one that is there. Its last file, world.json, says that it is complete."""
    folder = Path(folder)
    done = folder / "world.json"
    done.unlink(missing_ok=True)
    world = World(folder, seed)
    print(f"drawing the demo's picture world into {folder} ...", file=sys.stderr, flush=True)

    # stages 1 and 2. From here on the order matters: all draw from the same random numbers
    captions, conversations = world.captions_and_questions(pictures, turns)
    world.write("pretrain.json", captions)
    training_pairs = world.changes("pair", pairs, "train")

    # files to score, from scenes that training never shows
    world.write("score_heldout.json", world.questions_of_every_kind("heldout", held_out, "heldout"))
    world.write("score_unseen.json", world.questions_of_every_kind("unseen", held_out, "unseen"))
    world.write("score_multi.json", world.changes("heldout_pair", held_out, "heldout"))

    # stage 3, and the animations to score
    world.write("sft_multi.json", training_pairs + world.changes("clip", animations, "train", animated=True))
    animations_to_score = world.changes("heldout_clip", held_out, "heldout", animated=True)
    world.write("score_clips.json", animations_to_score)
    world.write("score_clips_shuffled.json", world.shuffled(animations_to_score))

    # the rest of stage 2
    world.write("sft.json", conversations + world.nameless_things(pictures // NAMELESS, turns))

    # complete
    settings = {
        "pictures": pictures,
        "pairs": pairs,
        "clips": animations,
        "held_out": held_out,
        "turns": turns,
        "seed": seed,
        "drawn_by": version(),
    }
    done.write_text(json.dumps(settings))


def version():
    """A digest of the code in this folder, which draws the world and asks about it."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def build_if_asked_for(files):
    """Draws the demo's world if one of `files` belongs to it and no complete world, of whatever size, is there.

    Says so if another version of the code drew the one that is there.
    """
    if not any(Path(file).resolve().parent == FOLDER.resolve() for file in files):
        return
    done = FOLDER / "world.json"
    if not done.exists():
        build(FOLDER)
    elif version() not in done.read_text():
        print(
            f"{FOLDER} was drawn by another version of dataset/demo, so results may differ: "
            "python -m dataset.demo.world draws it again",
            file=sys.stderr,
        )


def build_eval_pictures(folder, seed=1):
    """The pictures that 3-eval_chat.py asks about: held out, and named after what they show."""
    rng = random.Random(seed)
    single = Path(folder) / "eval_images"
    multi = Path(folder) / "eval_multi_images"

    def write(asked, target):
        text = json.dumps(asked, ensure_ascii=False, indent=1)
        (target / "questions.json").write_text(text, encoding="utf-8")

    single.mkdir(parents=True, exist_ok=True)
    multi.mkdir(parents=True, exist_ok=True)

    # two questions about each single picture, one of each language
    asked = []
    for split in ["heldout"] * 5 + ["unseen"] * 2:
        scene = random_scene(rng, split, counts=(2, 3, 3, 4))
        name = "_".join(f"{thing.colour}-{thing.shape}" for thing in scene) + ".png"
        draw(scene, rng).save(single / name, optimize=True)
        for language, kind in zip(
            LANGUAGES.values(), rng.sample(["caption", "colour", "shape", "count"], 2), strict=True
        ):
            text, _ = QUESTIONS[kind](language, scene, rng)
            asked.append(([name], f"<image>\n{text}"))
    write(asked, single)

    # pairs of pictures, then animations; the frames of an animation need no <image> in the question
    asked = []
    languages = itertools.cycle(LANGUAGES.values())
    for kind, language in zip(CHANGES, languages):  # endless, so not strict
        scene, change = changed_scene(rng, "heldout", kinds=[kind])
        names = [f"{kind}_before.png", f"{kind}_after.png"]
        for picture, name in zip(draw_change(scene, change, rng), names, strict=True):
            picture.save(multi / name, optimize=True)
        asked.append((names, f"<image>\n<image>\n{language.questions['change'][0]}"))
    for kind, language in zip(("move", "recolour", "remove"), languages):
        scene, change = changed_scene(rng, "heldout", counts=(1, 2, 2), kinds=[kind])
        frames = draw_frames(scene, change, rng, FRAMES)
        name = f"animation_{kind}.webp"
        frames[0].save(multi / name, save_all=True, append_images=frames[1:], duration=600, loop=0, quality=90)
        asked.append(([name], language.questions["animation"][0]))
    write(asked, multi)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default=FOLDER)
    parser.add_argument("--pictures", type=COUNT, default=6000, help="training pictures (default %(default)s)")
    parser.add_argument(
        "--pairs", type=COUNT_OR_NONE, default=3000, help="training pairs of pictures (default %(default)s)"
    )
    parser.add_argument("--clips", type=COUNT_OR_NONE, default=1500, help="training animations (default %(default)s)")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument(
        "--eval_pictures", action="store_true", help="only redraw dataset/eval_images and eval_multi_images"
    )
    args = parser.parse_args()
    if args.eval_pictures:
        build_eval_pictures(in_repository("dataset"))
        return
    build(args.folder, pictures=args.pictures, pairs=args.pairs, animations=args.clips, seed=args.seed)


if __name__ == "__main__":
    run_script(main)
