"""The demo's scenes: one to four coloured shapes, each in a place of its own, and the changes that turn one into another.

A scene is a tuple of things in reading order, and nothing but words: how it looks is up to drawing.py, how one speaks about it
to sentences.py. It belongs to exactly one split, decided by its content, so that no held-out scene has a twin in training:
"unseen" if any thing has one of the eight shape-colour pairs that training never shows, else "heldout" for one scene in ten,
else "train". The demo's CLIP, its language model and the picture stages all keep to this split.
"""

import zlib
from typing import NamedTuple

PLACES = ["top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"]
SIZES = ["big", "small"]
COLOURS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "black"]
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
UNSEEN_PAIRS = {(colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS)}
COUNTS = (1, 2, 2, 3, 3, 4)  # things in a scene, each number as often as it is here
# half of the training scenes are drawn until two of their things have the same colour, or shape: more to count
ALIKE = (None, None, "colour", "shape")


class Thing(NamedTuple):
    """One shape of a scene, in the words that describe it."""

    place: str
    size: str
    colour: str
    shape: str


def in_reading_order(things):
    return tuple(sorted(things, key=lambda thing: PLACES.index(thing.place)))


def split_of(scene):
    """The split a scene belongs to: "train", "heldout" or "unseen"."""
    if any((thing.colour, thing.shape) in UNSEEN_PAIRS for thing in scene):
        return "unseen"
    return "heldout" if zlib.crc32(repr(sorted(scene)).encode()) % 10 == 0 else "train"


def random_thing(rng, place, split):
    """A thing at `place`. Unless the split is "unseen", its shape-colour pair is one that training shows."""
    while True:
        thing = Thing(place, rng.choice(SIZES), rng.choice(COLOURS), rng.choice(SHAPES))
        if split == "unseen" or (thing.colour, thing.shape) not in UNSEEN_PAIRS:
            return thing


def random_scene(rng, split="train", counts=COUNTS, alike=None):
    """A scene of as many things as one of `counts`, in different places.

    alike: "colour" or "shape" if two things, where there are two, are to have the same one.
    """
    # draw scenes until one belongs to the split
    while True:
        places = rng.sample(PLACES, rng.choice(counts))
        scene = in_reading_order(random_thing(rng, place, split) for place in places)
        different = alike and len({getattr(thing, alike) for thing in scene}) == len(scene) > 1
        if split_of(scene) == split and not different:
            return scene


def only(scene, **words):
    """The things of a scene that have all these words, as in only(scene, colour="red")."""
    return [thing for thing in scene if all(getattr(thing, field) == word for field, word in words.items())]


def free_places(scene):
    return [place for place in PLACES if not only(scene, place=place)]


# --- changes --------------------------------------------------------------------------------------------------------

CHANGES = ["recolour", "reshape", "resize", "move", "remove", "add"]
MOVING_CHANGES = ["recolour", "move", "remove", "add"]  # those that animations show


class Change(NamedTuple):
    """One thing of a scene becomes another; None for one that appears or vanishes."""

    kind: str
    old: Thing | None
    new: Thing | None

    def apply(self, scene):
        """The scene after it."""
        return in_reading_order(thing for thing in (*scene, self.new) if thing not in (self.old, None))


def random_change(scene, rng, kinds=CHANGES):
    """A change of one of these kinds to a scene."""
    kind, thing = rng.choice(kinds), rng.choice(scene)
    if kind == "remove":
        return Change(kind, thing, None)
    if kind == "add":
        return Change(kind, None, random_thing(rng, rng.choice(free_places(scene)), "train"))
    field, words = {
        "recolour": ("colour", COLOURS),
        "reshape": ("shape", SHAPES),
        "resize": ("size", SIZES),
        "move": ("place", free_places(scene)),
    }[kind]
    word = rng.choice([word for word in words if word != getattr(thing, field)])
    return Change(kind, thing, thing._replace(**{field: word}))


def changed_scene(rng, split="train", counts=COUNTS, kinds=CHANGES):
    """(a scene, a change to it) where both the scene and what becomes of it belong to the split and are not empty."""
    while True:
        scene = random_scene(rng, split, counts)
        change = random_change(scene, rng, kinds)
        after = change.apply(scene)
        if after and len(after) <= max(COUNTS) and split_of(after) == split:
            return scene, change
