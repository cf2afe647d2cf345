"""The demo's picture world: coloured shapes on light backgrounds, drawn from a seed, with captions and questions in Chinese.

    python -m dataset.demo                       # into dataset/demo_world, as `--demo` does by itself when it is missing
    python -m dataset.demo --eval_pictures       # the pictures of dataset/eval_images and dataset/eval_multi_images again

A scene is one to three things; each has a place, a size, a colour and a shape. A scene belongs to exactly one split, decided
by its content, so that no held-out scene has a twin in training: "unseen" if any thing has one of the eight shape-colour
pairs that training never shows, else "heldout" for one scene in ten, else "train". The demo's CLIP, its language model and
the picture stages all keep to this split.

The files written are of the real formats (dataset/README.md): `pretrain.json`, `sft.json`, `sft_multi.json`, with
`images/`, and the questions to score, whose records carry a `kind`: `score_heldout.json`, `score_unseen.json`,
`score_multi.json` about two pictures, `score_clips.json` about animations, and `score_clips_shuffled.json` with their frames out
of order.
"""

import argparse
import itertools
import json
import random
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from .records import CAPTION_PROMPT, make_record

FOLDER = Path("dataset/demo_world")
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
    """A thing at `place`; its pair of colour and shape is one that training shows, unless the split is "unseen"."""
    while True:
        thing = Thing(place, rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES))
        if split == "unseen" or (thing.colour, thing.shape) not in UNSEEN_PAIRS:
            return thing


def random_scene(rng, split="train", counts=(1, 2, 2, 3, 3)):
    """Some things (one of `counts`) in different places, in reading order, as a tuple."""
    while True:
        places = rng.sample(list(PLACES), rng.choice(counts))
        scene = tuple(random_thing(rng, place, split) for place in sorted(places, key=list(PLACES).index))
        if split_of(scene) == split:
            return scene


# --- pictures -------------------------------------------------------------------------------------------------------


def outline(shape, radius):
    """Corners of a shape around (0, 0) as complex numbers, x + yj; None for the two that are not polygons."""
    up = -1j * radius
    if shape == "方形":
        side = radius * 0.84
        return [side * corner for corner in (-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j)]
    if shape == "三角形":
        return [up * 1.08 * rotation(k / 3) + 0.2j * radius for k in range(3)]
    if shape == "星形":
        return [up * (1.1 if k % 2 == 0 else 0.45) * rotation(k / 10) for k in range(10)]
    if shape == "十字形":
        arm, end = radius * 0.32, radius
        corner = [-arm - end * 1j, arm - end * 1j, arm - arm * 1j]
        return [point * rotation(k / 4) for k in range(4) for point in corner]
    return None


def rotation(fraction):
    """The complex number that turns a point by this fraction of a circle."""
    return 1j ** (4 * fraction)


def draw_thing(picture, thing, rng, places):
    """Draws a thing onto the picture, a little off its place, tilted and tinted, with smooth edges."""
    radius = SIZES[thing.size] + rng.randint(-2, 2)
    scale, half = 3, radius + 6  # drawn three times larger in a tile of its own, then scaled down
    tile = Image.new("L", (2 * half * scale,) * 2)
    pen, centre = ImageDraw.Draw(tile), half * scale
    points = outline(thing.shape, radius * scale)
    if points:
        tilt = rotation(rng.uniform(-0.03, 0.03))
        pen.polygon([(centre + (p * tilt).real, centre + (p * tilt).imag) for p in points], fill=255)
    else:
        for r, fill in ((radius, 255), (radius * 0.58, 0))[: 2 if thing.shape == "圆环" else 1]:
            pen.ellipse([centre - r * scale, centre - r * scale, centre + r * scale, centre + r * scale], fill=fill)
    tile = tile.reduce(scale)
    colour = tuple(min(255, max(0, channel + rng.randint(-10, 10))) for channel in COLOURS[thing.colour])
    x, y = (coordinate + rng.randint(-4, 4) for coordinate in places[thing.place])
    picture.paste(colour, (x - half, y - half), tile)


def draw(scene, rng, places=PLACES):
    """A scene as a 224x224 RGB picture; `rng` decides what its words leave open, `places` where on it they are."""
    background = [channel - rng.randint(0, 10) for channel in rng.choice(BACKGROUNDS)]
    shade = rng.randint(-14, 14)  # from one side to the other
    corners = [tuple(min(255, c + (shade if dark else 0)) for c in background) for dark in (0, 1)]
    picture = Image.new("RGB", (2, 2), corners[0])
    picture.paste(corners[1], (1, 0, 2, 2) if rng.random() < 0.5 else (0, 1, 2, 2))
    picture = picture.resize((PICTURE, PICTURE), Image.Resampling.BILINEAR)
    for thing in scene:
        draw_thing(picture, thing, rng, places)
    return picture


# --- captions -------------------------------------------------------------------------------------------------------

CAPTION_PROMPTS = [CAPTION_PROMPT, "图中有什么？", "请说明画面内容。", "看图说话。"]
# The demo's Chinese is that of telegrams: what is known stands directly before what it tells ("左上角红色大圆形"), never a
# filling word between. A model this small finds what belongs to the word it has just read ("左上角") within a minute of
# training; to use a word that stands one or two further back ("左上角有一个红色的...") it did not learn in an hour.


CAPTION_ORDERS = ["place colour size shape", "place colour shape", "colour shape place", "shape place colour size"]


def caption(scene, rng):
    """The whole scene, things in any order, each with its words in the same order."""
    words = rng.choice(CAPTION_ORDERS).split()
    things = ["".join(getattr(thing, word) for word in words) for thing in rng.sample(scene, len(scene))]
    return rng.choice(["", "图中", "画面里"]) + rng.choice("，；").join(things) + "。"


def scene_in_words(scene, rng, form=None):
    """The scene in words, in a given form or any: what the language model reads in place of a picture."""
    form = form or rng.choice(["caption", "words", "pairs", "pairs", "places"])
    if form == "caption":
        return caption(scene, rng)
    if form == "pairs":  # two words of a thing at a time
        pairs = [f"{a}{b}" for thing in scene for a in thing for b in thing if a != b]
        return "，".join(rng.sample(pairs, len(pairs))) + "。"
    if form == "words":  # all words of each thing, in an order of its own
        return "；".join("".join(rng.sample(t, 4)) for t in rng.sample(scene, len(scene))) + "。"
    at = {t.place: f"{t.colour}{t.size}{t.shape}" for t in scene}
    return "；".join(f"{place}{at.get(place, '空')}" for place in rng.sample(list(PLACES), len(PLACES))) + "。"


# --- questions about one picture ------------------------------------------------------------------------------------
# Every answer repeats what was asked about before it says what is new, for the reason above.


def only(scene, **wanted):
    """The things of a scene with the wanted words."""
    return [t for t in scene if all(getattr(t, name) == word for name, word in wanted.items())]


def naming(scene, thing, *sorts):
    """Words that name a thing so that no other is meant: its place, and of the given sorts each that it alone has."""
    return [thing.place] + [getattr(thing, s) for s in sorts if len(only(scene, **{s: getattr(thing, s)})) == 1]


def ask_colour(scene, rng):
    thing = rng.choice(scene)
    subject = rng.choice(naming(scene, thing, "shape"))
    return rng.choice(["{}什么颜色？", "{}是什么颜色？"]).format(subject), f"{subject}{thing.colour}"


def ask_shape(scene, rng):
    thing = rng.choice(scene)
    subject = rng.choice(naming(scene, thing, "colour"))
    return rng.choice(["{}什么形状？", "{}是什么形状？"]).format(subject), f"{subject}{thing.shape}"


def ask_size(scene, rng):
    thing = rng.choice(scene)
    subject = rng.choice(naming(scene, thing, "shape"))
    return rng.choice(["{}是大的还是小的？", "{}有多大？"]).format(subject), f"{subject}{thing.size}"


def ask_where(scene, rng):
    thing = rng.choice(scene)
    subjects = naming(scene, thing, "colour", "shape")[1:]
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
    """As often yes as no; what is not there differs by one word from something that is."""
    thing, wanted = rng.choice(scene), rng.random() < 0.5
    while True:
        colour, shape = thing.colour, thing.shape
        if not wanted:
            colour, shape = rng.choice([(rng.choice(list(COLOURS)), shape), (colour, rng.choice(SHAPES))])
        subject, found = rng.choice(
            [
                (f"{colour}{shape}", only(scene, colour=colour, shape=shape)),
                (colour, only(scene, colour=colour)),
                (shape, only(scene, shape=shape)),
            ]
        )
        if bool(found) == wanted:
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
    """A question of this kind and its answer, or None where the scene has nothing to ask so."""
    return QUESTIONS[kind](scene, rng)


def questions(scene, rng, count):
    """`count` different questions with their answers, of random kinds."""
    asked = {}
    while len(asked) < count:
        pair = question(scene, rng, rng.choice(list(QUESTIONS)))
        if pair:
            asked.setdefault(*pair)
    return list(asked.items())


# --- two pictures ---------------------------------------------------------------------------------------------------


EDITS = ["recolour", "reshape", "resize", "move", "remove", "add"]


def edit(scene, rng, kinds):
    """A change to a scene: (the thing as it was, as it becomes, the instruction, its kind); None for no thing."""
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
    """A scene with one thing put in place of another, in reading order."""
    things = [thing for thing in (*scene, new) if thing not in (old, None)]
    return tuple(sorted(things, key=lambda thing: list(PLACES).index(thing.place)))


def scene_pair(rng, split="train"):
    """(a scene, an edited scene of the same split, the instruction that leads from one to the other, its kind)."""
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
    """A thing moves, changes colour, vanishes or appears: (pictures, what happened in words, its kind).

    The words are those of `edit`. All else stays as it is; what does not move changes between two frames.
    """
    while True:
        scene = random_scene(rng, split, counts=(1, 2, 2))
        old, new, told, kind = edit(scene, rng, kinds)
        after = replaced(scene, old, new)
        if after and split_of(after) == split:
            break
    rest = [thing for thing in scene if thing != old]
    seed, change = rng.random(), rng.randrange(1, FRAMES)
    pictures = []
    for frame in range(FRAMES):
        thing, places = (old if frame < change else new), PLACES
        if kind == "move":
            thing = old
            way = zip(PLACES[old.place], PLACES[new.place], strict=True)
            places = {**PLACES, old.place: [round(a + (b - a) * frame / (FRAMES - 1)) for a, b in way]}
        things = [*rest, thing] if thing else rest
        pictures.append(draw(things, random.Random(seed), places))  # the same tints and tilts in every frame
    return pictures, told, kind


# --- files ----------------------------------------------------------------------------------------------------------


class World:
    """Draws pictures into `folder`/images and collects their records."""

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
        """The training files for one picture at a time: every picture has a caption, and a conversation of `turns`."""
        captions, talks = [], []
        for i in range(pictures):
            scene = random_scene(self.rng)
            name = self.picture(scene, f"train_{i:05d}.jpg")
            prompt = self.rng.choice(CAPTION_PROMPTS)
            prompt = self.rng.choice([f"{prompt}\n<image>", f"<image>\n{prompt}"])
            captions.append(make_record([name], [(prompt, caption(scene, self.rng))]))
            asked = questions(
                scene, self.rng, turns - 1
            )  # and a caption, lest what the first stage taught be forgotten
            asked.insert(self.rng.randrange(turns), (self.rng.choice(CAPTION_PROMPTS), caption(scene, self.rng)))
            asked[0] = (f"<image>\n{asked[0][0]}", asked[0][1])
            talks.append(make_record([name], asked))
        self.write("pretrain.json", captions)
        self.write("sft.json", talks)

    def pairs(self, prefix, count, split):
        """Two pictures and what leads from the first to the second."""
        records = []
        for i in range(count):
            before, after, instruction, kind = scene_pair(self.rng, split)
            names = [self.picture(s, f"{prefix}_{i:05d}_{k}.png") for k, s in enumerate((before, after))]
            asked = f"<image>\n<image>\n{self.rng.choice(PAIR_PROMPTS)}"
            records.append(make_record(names, [(asked, instruction)], kind=kind))
        return records

    def animations(self, prefix, count, split):
        """The frames of animations and what happens in them."""
        records = []
        for i in range(count):
            pictures, told, kind = animation(self.rng, split)
            names = [f"{prefix}_{i:05d}_{frame}.png" for frame in range(FRAMES)]
            for picture, name in zip(pictures, names, strict=True):
                picture.save(self.folder / "images" / name)
            asked = "<image>\n" * FRAMES + self.rng.choice(ANIMATION_PROMPTS)
            records.append(make_record(names, [(asked, told)], kind=kind))
        return records

    def shuffled(self, records):
        """The same questions about the same frames, out of order."""
        orders = [order for order in itertools.permutations(range(FRAMES)) if order != tuple(range(FRAMES))]
        changed = []
        for one in records:
            names, order = one["image"].split(", "), self.rng.choice(orders)
            changed.append({**one, "image": ", ".join(names[frame] for frame in order)})
        return changed

    def score(self, name, prefix, pictures, split):
        """One question of every kind about each picture."""
        records = []
        for i in range(pictures):
            scene = random_scene(self.rng, split)
            picture = self.picture(scene, f"{prefix}_{i:05d}.jpg")
            for kind in QUESTIONS:
                pair = question(scene, self.rng, kind)
                if pair:
                    records.append(make_record([picture], [(f"<image>\n{pair[0]}", pair[1])], kind=kind))
        self.write(name, records)


def build(folder, pictures=6000, pairs=3000, animations=1500, held_out=200, turns=4, seed=0):
    """Draws the whole world into `folder`, anew if there is one; its last file says that it is complete."""
    folder = Path(folder)
    done = folder / "world.json"
    done.unlink(missing_ok=True)
    world = World(folder, seed)
    print(f"drawing the demo's picture world into {folder} ...", file=sys.stderr, flush=True)
    world.captions_and_questions(pictures, turns)
    training_pairs = world.pairs("pair", pairs, "train")
    world.score("score_heldout.json", "heldout", held_out, "heldout")
    world.score("score_unseen.json", "unseen", held_out, "unseen")
    world.write("score_multi.json", world.pairs("heldout_pair", held_out, "heldout"))
    world.write("sft_multi.json", training_pairs + world.animations("clip", animations, "train"))
    animations_to_score = world.animations("heldout_clip", held_out, "heldout")
    world.write("score_clips.json", animations_to_score)
    world.write("score_clips_shuffled.json", world.shuffled(animations_to_score))
    settings = {
        "pictures": pictures,
        "pairs": pairs,
        "clips": animations,
        "held_out": held_out,
        "turns": turns,
        "seed": seed,
    }
    done.write_text(json.dumps(settings))


def build_if_asked_for(data_path):
    """Draws the world when a file of its own folder is about to be read, unless it, or a smaller one, is there."""
    if Path(data_path).parent == FOLDER and not (FOLDER / "world.json").exists():
        build(FOLDER)


def build_eval_pictures(folder, seed=1):
    """The pictures that 3-eval_chat.py asks about: held out, and named by what is in them."""
    rng, folder = random.Random(seed), Path(folder)

    def save(scene, place):
        place.mkdir(parents=True, exist_ok=True)
        name = "_".join("".join(thing) for thing in scene) + ".png"
        draw(scene, rng).save(place / name, optimize=True)
        return name

    def write(asked, place):
        (place / "questions.json").write_text(json.dumps(asked, ensure_ascii=False, indent=1), encoding="utf-8")

    asked = []
    for split in ["heldout"] * 5 + ["unseen"] * 2:
        scene = random_scene(rng, split)
        name = save(scene, folder / "eval_images")
        asked += [([name], f"<image>\n{text}") for text in (CAPTION_PROMPTS[0], questions(scene, rng, 1)[0][0])]
    write(asked, folder / "eval_images")

    asked = []
    for _ in range(5):
        before, after, _, _ = scene_pair(rng, "heldout")
        names = [save(scene, folder / "eval_multi_images") for scene in (before, after)]
        asked.append((names, f"<image>\n<image>\n{PAIR_PROMPTS[0]}"))
    for kind in ("move", "recolour", "remove"):
        frames, told, _ = animation(rng, "heldout", [kind])
        name = f"动画_{told}.webp"
        place = folder / "eval_multi_images" / name
        frames[0].save(place, save_all=True, append_images=frames[1:], duration=600, loop=0, quality=90)
        asked.append(([name], ANIMATION_PROMPTS[0]))  # its frames are put in front
    write(asked, folder / "eval_multi_images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default=FOLDER)
    parser.add_argument("--pictures", type=int, default=6000, help="training pictures (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=3000, help="training pairs of pictures (default %(default)s)")
    parser.add_argument("--clips", type=int, default=1500, help="training animations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--eval_pictures", action="store_true", help="make only dataset/eval_images and eval_multi_images"
    )
    args = parser.parse_args()
    if args.eval_pictures:
        build_eval_pictures("dataset")
        sys.exit()
    build(args.folder, pictures=args.pictures, pairs=args.pairs, animations=args.clips, seed=args.seed)
