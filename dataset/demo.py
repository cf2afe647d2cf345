"""The demo's picture world: coloured shapes on light backgrounds, drawn from a seed, with captions and questions in Chinese.

    python -m dataset.demo                       # into dataset/demo_world; `--demo` does this if it is missing
    python -m dataset.demo --eval_pictures       # redraws dataset/eval_images and dataset/eval_multi_images

A scene is one to three things; each has a place, a size, a colour and a shape. A scene belongs to exactly one split, decided
by its content, so that no held-out scene has a twin in training: "unseen" if any thing has one of the eight shape-colour
pairs that training never shows, else "heldout" for one scene in ten, else "train". The demo's CLIP, its language model and
the picture stages all keep to this split.

The files have the real formats (dataset/README.md): `pretrain.json`, `sft.json` and `sft_multi.json` to train on, with their
pictures in `images/`. The files to score have a `kind` in each record: `score_heldout.json` and `score_unseen.json`,
`score_multi.json` about two pictures, `score_clips.json` about animations, and `score_clips_shuffled.json` with their frames
out of order.
"""

import argparse
import itertools
import json
import random
import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from model.arguments import COUNT, COUNT_OR_NONE, SEED
from model.errors import BadInput, run_script
from model.files import in_repository

from .records import CAPTION_PROMPT, make_record

FOLDER = Path(in_repository("dataset/demo_world"))
COLOURS = {
    "红色": (222, 45, 45),
    "橙色": (245, 140, 25),
    "黄色": (245, 215, 35),
    "绿色": (45, 165, 70),
    "青色": (70, 205, 215),
    "蓝色": (40, 80, 210),
    "紫色": (140, 60, 185),
    "黑色": (35, 35, 40),
}
SHAPES = ["圆形", "方形", "三角形", "星形", "十字形", "圆环"]
SIZES = {"大": 40, "小": 25}  # radius in pixels
PLACES = {"左上角": (48, 48), "右上角": (176, 48), "中间": (112, 112), "左下角": (48, 176), "右下角": (176, 176)}
NUMBERS = ["零", "一", "两", "三", "四", "五"]
BACKGROUNDS = [(250, 250, 250), (222, 226, 230), (246, 236, 214), (220, 234, 246)]
UNSEEN_PAIRS = {(colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS)}
PICTURE = 224  # pixels on a side


class Thing(NamedTuple):
    """One shape of a scene, in the words that describe it."""

    place: str
    size: str
    colour: str
    shape: str


# --- scenes ---------------------------------------------------------------------------------------------------------


def split_of(scene):
    """The split a scene (a tuple of things) belongs to: "train", "heldout" or "unseen"."""
    if any((thing.colour, thing.shape) in UNSEEN_PAIRS for thing in scene):
        return "unseen"
    return "heldout" if zlib.crc32(repr(sorted(scene)).encode()) % 10 == 0 else "train"


def random_thing(rng, place, split):
    """A thing at `place`. Unless the split is "unseen", its shape-colour pair is one that training shows."""
    while True:
        thing = Thing(place, rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES))
        if split == "unseen" or (thing.colour, thing.shape) not in UNSEEN_PAIRS:
            return thing


def random_scene(rng, split="train", counts=(1, 2, 2, 3, 3)):
    """A tuple of things, as many as one of `counts`, in different places and in reading order."""
    # draw scenes until one belongs to the split
    while True:
        places = sorted(rng.sample(list(PLACES), rng.choice(counts)), key=list(PLACES).index)
        scene = tuple(random_thing(rng, place, split) for place in places)
        if split_of(scene) == split:
            return scene


ENGLISH = """
    red orange yellow green cyan blue purple black
    circle square triangle star cross ring
    big small
    top left, top right, middle, bottom left, bottom right
"""
ENGLISH = dict(zip(re.findall(r"top \w+|bottom \w+|\w+", ENGLISH), [*COLOURS, *SHAPES, *SIZES, *PLACES], strict=True))


def read_scene(text):
    """The scene that words describe, Chinese or English: things between commas, each with a colour and a shape.

    A thing is big where no size is named, and in the first free place, beginning in the middle, where no place is. BadInput
    says what is missing or not understood.
    """
    example = "for example: 红色 星形 左上角, small blue circle middle"
    scene = []
    for part in filter(str.strip, re.split("[,，;；、。]", text.lower())):
        # English words become Chinese ones; then take out each field's word
        rest = re.sub(r"\b(" + "|".join(ENGLISH) + r")\b", lambda match: ENGLISH[match[0]], part)
        words = {}
        for field, known in (("place", PLACES), ("size", SIZES), ("colour", COLOURS), ("shape", SHAPES)):
            found = [word for word in known if word in rest]
            if len(found) > 1:
                raise BadInput(
                    f"{part.strip()} has two words for its {field}, {' and '.join(found)}: put a comma between things"
                )
            words[field] = found[0] if found else None
            rest = rest.replace(found[0], " ") if found else rest
        if rest.strip():
            raise BadInput(f"{rest.strip()} is not a word for a place, size, colour or shape here; {example}")
        if not (words["colour"] and words["shape"]):
            raise BadInput(f"{part.strip()} should name a colour and a shape; {example}")
        free = [place for place in ("中间", *PLACES) if place not in [thing.place for thing in scene]]
        place = words["place"] or next(iter(free), None)
        if place not in free:
            raise BadInput(f"{part.strip()} has no place of its own: there are {', '.join(PLACES)}, each for one thing")
        scene.append(Thing(place, words["size"] or "大", words["colour"], words["shape"]))
    if not scene:
        raise BadInput(f"name what to draw, {example}")
    return tuple(scene)


# --- pictures -------------------------------------------------------------------------------------------------------


def outline(shape, radius):
    """Corners of a shape around (0, 0) as complex numbers x + yj; None for the two shapes that are not polygons."""
    up = -1j * radius
    if shape == "方形":
        side = radius * 0.84
        return [side * corner for corner in (-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j)]
    if shape == "三角形":
        return [up * 1.08 * rotation(k / 3) + 0.2j * radius for k in range(3)]
    if shape == "星形":
        return [up * (1.1 if k % 2 == 0 else 0.45) * rotation(k / 10) for k in range(10)]
    if shape == "十字形":
        arm = radius * 0.32  # half of its width
        corners = [-arm - radius * 1j, arm - radius * 1j, arm - arm * 1j]
        return [point * rotation(k / 4) for k in range(4) for point in corners]
    return None


def rotation(fraction):
    """Multiplying a point by this complex number rotates it by a fraction of a circle."""
    return 1j ** (4 * fraction)


def draw_thing(picture, thing, rng, places):
    """Draws a thing onto the picture, slightly shifted, tilted and tinted, with smooth edges."""
    # draw a white shape on a tile of its own, three times as large: scaled down, its edges are smooth
    radius = SIZES[thing.size] + rng.randint(-2, 2)
    scale = 3
    half = radius + 6  # half the tile's width in the picture
    tile = Image.new("L", (2 * half * scale,) * 2)
    pen = ImageDraw.Draw(tile)
    centre = half * scale
    points = outline(thing.shape, radius * scale)
    if points:
        tilt = rotation(rng.uniform(-0.03, 0.03))
        pen.polygon([(centre + (p * tilt).real, centre + (p * tilt).imag) for p in points], fill=255)
    else:
        discs = [(radius, 255), (radius * 0.58, 0)] if thing.shape == "圆环" else [(radius, 255)]
        for r, fill in discs:
            pen.ellipse([centre - r * scale, centre - r * scale, centre + r * scale, centre + r * scale], fill=fill)
    tile = tile.reduce(scale)

    # paste the colour through the tile
    colour = tuple(min(255, max(0, channel + rng.randint(-10, 10))) for channel in COLOURS[thing.colour])
    x, y = (coordinate + rng.randint(-4, 4) for coordinate in places[thing.place])
    picture.paste(colour, (x - half, y - half), tile)


def draw(scene, rng, places=PLACES):
    """A scene as a 224x224 RGB picture; `rng` decides what its words leave open, `places` where each place is in pixels."""
    # the background shades from one side to the other, or from top to bottom: 2 x 2 pixels, enlarged
    background = [channel - rng.randint(0, 10) for channel in rng.choice(BACKGROUNDS)]
    shade = rng.randint(-14, 14)
    plain = tuple(min(255, channel) for channel in background)
    shaded = tuple(min(255, channel + shade) for channel in background)
    picture = Image.new("RGB", (2, 2), plain)
    picture.paste(shaded, (1, 0, 2, 2) if rng.random() < 0.5 else (0, 1, 2, 2))
    picture = picture.resize((PICTURE, PICTURE), Image.Resampling.BILINEAR)

    for thing in scene:
        draw_thing(picture, thing, rng, places)
    return picture


# --- captions -------------------------------------------------------------------------------------------------------

CAPTION_PROMPTS = [CAPTION_PROMPT, "图中有什么？", "请说明画面内容。", "看图说话。"]
# The demo's Chinese is telegraphic: what is asked about comes directly before what is said about it ("左上角红色大圆形"),
# without filler words. A model this small learns within a minute of training to find what belongs to the word it has just
# read ("左上角"); to use a word one or two further back ("左上角有一个红色的...") it did not learn in an hour.

CAPTION_ORDERS = ["place colour size shape", "place colour shape", "colour shape place", "shape place colour size"]


def caption(scene, rng):
    """The whole scene: things in random order, each with its words in the same order."""
    fields = rng.choice(CAPTION_ORDERS).split()
    things = []
    for thing in rng.sample(scene, len(scene)):
        things.append("".join(getattr(thing, field) for field in fields))
    opening = rng.choice(["", "图中", "画面里"])
    return opening + rng.choice("，；").join(things) + "。"


def scene_in_words(scene, rng, form=None):
    """The scene as text, in a given or random form: what the language model reads where a picture will be later."""
    form = form or rng.choice(["caption", "words", "pairs", "pairs", "places"])
    if form == "caption":
        return caption(scene, rng)
    if form == "pairs":  # two words of a thing at a time
        pairs = [f"{a}{b}" for thing in scene for a in thing for b in thing if a != b]
        return "，".join(rng.sample(pairs, len(pairs))) + "。"
    if form == "words":  # all four words of each thing, each time in another order
        return "；".join("".join(rng.sample(t, 4)) for t in rng.sample(scene, len(scene))) + "。"
    # every place, with what is there
    found = {t.place: f"{t.colour}{t.size}{t.shape}" for t in scene}
    return "；".join(f"{place}{found.get(place, '空')}" for place in rng.sample(list(PLACES), len(PLACES))) + "。"


# --- questions about one picture ------------------------------------------------------------------------------------
# Every answer repeats what was asked about before it says what is new, for the reason given at CAPTION_PROMPTS.


def only(scene, **words):
    """The things of a scene that have all these words, as in only(scene, colour="红色")."""
    return [t for t in scene if all(getattr(t, field) == word for field, word in words.items())]


def unique_names(scene, thing, *fields):
    """Words that name this thing and no other: its place, and its word for each of `fields` if no other thing has it."""
    unique = [field for field in fields if len(only(scene, **{field: getattr(thing, field)})) == 1]
    return [thing.place] + [getattr(thing, field) for field in unique]


def ask_colour(scene, rng):
    thing = rng.choice(scene)
    subject = rng.choice(unique_names(scene, thing, "shape"))
    return rng.choice(["{}什么颜色？", "{}是什么颜色？"]).format(subject), f"{subject}{thing.colour}"


def ask_shape(scene, rng):
    thing = rng.choice(scene)
    subject = rng.choice(unique_names(scene, thing, "colour"))
    return rng.choice(["{}什么形状？", "{}是什么形状？"]).format(subject), f"{subject}{thing.shape}"


def ask_size(scene, rng):
    thing = rng.choice(scene)
    subject = rng.choice(unique_names(scene, thing, "shape"))
    return rng.choice(["{}是大的还是小的？", "{}有多大？"]).format(subject), f"{subject}{thing.size}"


def ask_where(scene, rng):
    thing = rng.choice(scene)
    subjects = unique_names(scene, thing, "colour", "shape")[1:]
    if len(only(scene, colour=thing.colour, shape=thing.shape)) == 1:
        subjects.append(f"{thing.colour}{thing.shape}")
    if not subjects:
        return None
    subject = rng.choice(subjects)
    return rng.choice(["{}在哪里？", "{}在什么位置？"]).format(subject), f"{subject}{thing.place}"


def ask_count(scene, rng):
    thing = rng.choice(scene)
    subject, found = rng.choice(
        [
            ("图形", scene),
            (f"{thing.size}图形", only(scene, size=thing.size)),
            (f"{thing.colour}图形", only(scene, colour=thing.colour)),
        ]
    )
    return rng.choice(["有几个{}？", "图中一共有多少个{}？"]).format(subject), f"{subject}{NUMBERS[len(found)]}个"


def ask_exist(scene, rng):
    """Yes as often as no; what is not there differs by one word from something that is."""
    thing = rng.choice(scene)
    answer_yes = rng.random() < 0.5
    # for a no, change a word until nothing in the scene matches
    while True:
        colour = thing.colour
        shape = thing.shape
        if not answer_yes:
            colour, shape = rng.choice([(rng.choice(list(COLOURS)), shape), (colour, rng.choice(SHAPES))])
        subject, found = rng.choice(
            [
                (f"{colour}{shape}", only(scene, colour=colour, shape=shape)),
                (colour, only(scene, colour=colour)),
                (shape, only(scene, shape=shape)),
            ]
        )
        if bool(found) == answer_yes:
            break
    return rng.choice(["有{}吗？", "图中有没有{}？"]).format(subject), f"{subject}{'有' if found else '没有'}"


QUESTIONS = {
    "colour": ask_colour,
    "shape": ask_shape,
    "size": ask_size,
    "where": ask_where,
    "count": ask_count,
    "exist": ask_exist,
}


def question(scene, rng, kind):
    """(a question of this kind, its answer), or None if the scene allows none."""
    return QUESTIONS[kind](scene, rng)


def questions(scene, rng, count):
    """`count` different (question, answer) pairs, of random kinds."""
    answers = {}
    while len(answers) < count:
        pair = question(scene, rng, rng.choice(list(QUESTIONS)))
        if pair:
            answers.setdefault(*pair)
    return list(answers.items())


# --- two pictures ---------------------------------------------------------------------------------------------------


EDITS = ["recolour", "reshape", "resize", "move", "remove", "add"]


def edit(scene, rng, kinds):
    """A change to a scene: (the thing before, the thing after, the instruction, its kind); None for no thing."""
    thing = rng.choice(scene)
    kind = rng.choice(kinds)
    free = [place for place in PLACES if not only(scene, place=place)]
    if kind == "recolour":
        new = thing._replace(colour=rng.choice([c for c in COLOURS if c != thing.colour]))
        return thing, new, f"{thing.place}变成{new.colour}", kind
    if kind == "reshape":
        new = thing._replace(shape=rng.choice([s for s in SHAPES if s != thing.shape]))
        return thing, new, f"{thing.place}变成{new.shape}", kind
    if kind == "resize":
        new = thing._replace(size="小" if thing.size == "大" else "大")
        return thing, new, f"{thing.place}变成{new.size}", kind
    if kind == "move":
        new = thing._replace(place=rng.choice(free))
        return thing, new, f"{thing.place}移到{new.place}", kind
    if kind == "remove":
        return thing, None, f"去掉{thing.place}", kind
    new = random_thing(rng, rng.choice(free), "train")
    return None, new, f"加{new.place}{new.colour}{new.size}{new.shape}", kind


def replaced(scene, old, new):
    """The scene with `new` instead of `old`, in reading order; either may be None."""
    things = [thing for thing in (*scene, new) if thing not in (old, None)]
    return tuple(sorted(things, key=lambda thing: list(PLACES).index(thing.place)))


def scene_pair(rng, split="train"):
    """(a scene, an edited scene of the same split, the instruction that turns one into the other, its kind)."""
    # draw edits until one gives a scene that is not empty and belongs to the split
    while True:
        before = random_scene(rng, split)
        old, new, instruction, kind = edit(before, rng, EDITS)
        after = replaced(before, old, new)
        if after and split_of(after) == split:
            return before, after, instruction, kind


PAIR_PROMPTS = ["怎样把第一张图变成第二张图？", "两张图有什么不同？"]


# --- animations -----------------------------------------------------------------------------------------------------

ANIMATION_PROMPTS = ["动画里有什么变化？", "先后有什么不同？"]
ANIMATION_EDITS = ["recolour", "move", "remove", "add"]
FRAMES = 4


def animation(rng, split="train", kinds=ANIMATION_EDITS):
    """A thing moves, changes colour, vanishes or appears: (frames, what happens in words, its kind).

    The words are those of `edit`. Everything else stays the same. A move takes all frames; any other change happens between
    two of them.
    """
    # a scene before and after the change, both of the split
    while True:
        scene = random_scene(rng, split, counts=(1, 2, 2))
        old, new, description, kind = edit(scene, rng, kinds)
        after = replaced(scene, old, new)
        if after and split_of(after) == split:
            break

    unchanged = [thing for thing in scene if thing != old]
    seed = rng.random()  # the same tints and tilts in every frame
    change = rng.randrange(1, FRAMES)  # the first frame after the change
    frames = []
    for number in range(FRAMES):
        thing = old if number < change else new
        places = PLACES
        if kind == "move":
            # the old thing, with its place part of the way to the new one
            thing = old
            way = zip(PLACES[old.place], PLACES[new.place], strict=True)
            places = {**PLACES, old.place: [round(a + (b - a) * number / (FRAMES - 1)) for a, b in way]}
        things = [*unchanged, thing] if thing else unchanged
        frames.append(draw(things, random.Random(seed), places))
    return frames, description, kind


# --- files ----------------------------------------------------------------------------------------------------------


class World:
    """Draws pictures into `folder`/images and returns the records about them."""

    def __init__(self, folder, seed):
        self.folder = Path(folder)
        self.rng = random.Random(seed)
        (self.folder / "images").mkdir(parents=True, exist_ok=True)

    def picture(self, scene, name):
        draw(scene, self.rng).save(self.folder / "images" / name, quality=92)
        return name

    def write(self, name, records):
        with open(self.folder / name, "w", encoding="utf-8") as f:
            json.dump(records, f, ensure_ascii=False, indent=1)

    def captions_and_questions(self, pictures, turns):
        """Records to train on, one picture each: (captions, conversations of `turns` questions about the same pictures)."""
        captions = []
        conversations = []
        for i in range(pictures):
            scene = random_scene(self.rng)
            name = self.picture(scene, f"train_{i:05d}.jpg")

            # stage 1: a caption, with the picture before or after the prompt
            prompt = self.rng.choice(CAPTION_PROMPTS)
            prompt = self.rng.choice([f"{prompt}\n<image>", f"<image>\n{prompt}"])
            captions.append(make_record([name], [(prompt, caption(scene, self.rng))]))

            # stage 2: questions plus a caption, so that stage 1 is not forgotten
            qa_pairs = questions(scene, self.rng, turns - 1)
            position = self.rng.randrange(turns)
            qa_pairs.insert(position, (self.rng.choice(CAPTION_PROMPTS), caption(scene, self.rng)))
            first_question, first_answer = qa_pairs[0]
            qa_pairs[0] = (f"<image>\n{first_question}", first_answer)
            conversations.append(make_record([name], qa_pairs))
        return captions, conversations

    def questions_of_every_kind(self, prefix, pictures, split):
        """Records to score, one for every kind of question about each picture."""
        records = []
        for i in range(pictures):
            scene = random_scene(self.rng, split)
            name = self.picture(scene, f"{prefix}_{i:05d}.jpg")
            for kind in QUESTIONS:
                pair = question(scene, self.rng, kind)
                if pair:
                    text, answer = pair
                    records.append(make_record([name], [(f"<image>\n{text}", answer)], kind=kind))
        return records

    def pairs(self, prefix, count, split):
        """Records of two pictures each; the answer is the instruction that turns the first into the second."""
        records = []
        for i in range(count):
            before, after, instruction, kind = scene_pair(self.rng, split)
            names = [self.picture(s, f"{prefix}_{i:05d}_{k}.png") for k, s in enumerate((before, after))]
            text = f"<image>\n<image>\n{self.rng.choice(PAIR_PROMPTS)}"
            records.append(make_record(names, [(text, instruction)], kind=kind))
        return records

    def animations(self, prefix, count, split):
        """Records of the frames of an animation each; the answer is what happens in it."""
        records = []
        for i in range(count):
            frames, description, kind = animation(self.rng, split)
            names = [f"{prefix}_{i:05d}_{number}.png" for number in range(FRAMES)]
            for frame, name in zip(frames, names, strict=True):
                frame.save(self.folder / "images" / name)
            text = "<image>\n" * FRAMES + self.rng.choice(ANIMATION_PROMPTS)
            records.append(make_record(names, [(text, description)], kind=kind))
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
    world.write("sft.json", conversations)
    training_pairs = world.pairs("pair", pairs, "train")

    # files to score, from scenes that training never shows
    world.write("score_heldout.json", world.questions_of_every_kind("heldout", held_out, "heldout"))
    world.write("score_unseen.json", world.questions_of_every_kind("unseen", held_out, "unseen"))
    world.write("score_multi.json", world.pairs("heldout_pair", held_out, "heldout"))

    # stage 3, and the animations to score
    world.write("sft_multi.json", training_pairs + world.animations("clip", animations, "train"))
    animations_to_score = world.animations("heldout_clip", held_out, "heldout")
    world.write("score_clips.json", animations_to_score)
    world.write("score_clips_shuffled.json", world.shuffled(animations_to_score))

    # complete
    settings = {
        "pictures": pictures,
        "pairs": pairs,
        "clips": animations,
        "held_out": held_out,
        "turns": turns,
        "seed": seed,
    }
    done.write_text(json.dumps(settings))


def build_if_asked_for(files):
    """Draws the demo's world if one of `files` belongs to it and no complete world, of whatever size, is there."""
    if any(Path(file).resolve().parent == FOLDER.resolve() for file in files) and not (FOLDER / "world.json").exists():
        build(FOLDER)


def build_eval_pictures(folder, seed=1):
    """The pictures that 3-eval_chat.py asks about: held out, and named after what they show."""
    rng = random.Random(seed)
    single = Path(folder) / "eval_images"
    multi = Path(folder) / "eval_multi_images"

    def save(scene, target):
        name = "_".join("".join(thing) for thing in scene) + ".png"
        draw(scene, rng).save(target / name, optimize=True)
        return name

    def write(asked, target):
        text = json.dumps(asked, ensure_ascii=False, indent=1)
        (target / "questions.json").write_text(text, encoding="utf-8")

    single.mkdir(parents=True, exist_ok=True)
    multi.mkdir(parents=True, exist_ok=True)

    # two questions about each single picture
    asked = []
    for split in ["heldout"] * 5 + ["unseen"] * 2:
        scene = random_scene(rng, split)
        name = save(scene, single)
        for text in (CAPTION_PROMPTS[0], questions(scene, rng, 1)[0][0]):
            asked.append(([name], f"<image>\n{text}"))
    write(asked, single)

    # pairs of pictures, then animations; the frames of an animation need no <image> in the question
    asked = []
    for _ in range(5):
        before, after, _, _ = scene_pair(rng, "heldout")
        names = [save(scene, multi) for scene in (before, after)]
        asked.append((names, f"<image>\n<image>\n{PAIR_PROMPTS[0]}"))
    for kind in ("move", "recolour", "remove"):
        frames, description, _ = animation(rng, "heldout", [kind])
        name = f"动画_{description}.webp"
        frames[0].save(multi / name, save_all=True, append_images=frames[1:], duration=600, loop=0, quality=90)
        asked.append(([name], ANIMATION_PROMPTS[0]))
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
