"""Pictures of the demo's scenes: what the words of a scene leave open is decided by a random generator.

A thing is anywhere in the ninth of the picture that its place names, of any radius that its size allows, of a colour that one
would call by its name, more or less tilted, stretched and shaded, with smooth or jagged edges. Things may touch, but hide
nothing of each other. The paper is plain, from white to black, or has a light pattern.
"""

import colorsys
import itertools
import math
from typing import NamedTuple

from PIL import Image, ImageDraw

from .scenes import PLACES

PICTURE = 224  # pixels on a side
MARGIN = 8  # pixels between a thing's middle and the edge of its ninth of the picture
RADII = {"big": (33, 48), "small": (14, 26)}  # pixels
# ranges of hue in degrees, saturation and value
COLOURS = {
    "red": ((-10, 7), (0.7, 1), (0.65, 1)),
    "orange": ((20, 39), (0.75, 1), (0.85, 1)),
    "yellow": ((49, 63), (0.6, 1), (0.85, 1)),
    "green": ((90, 152), (0.45, 1), (0.4, 1)),
    "cyan": ((172, 192), (0.45, 1), (0.65, 1)),
    "blue": ((208, 242), (0.65, 1), (0.5, 1)),
    "purple": ((267, 302), (0.45, 1), (0.45, 0.9)),
    "black": ((0, 360), (0, 0.3), (0, 0.2)),
}
# colours without a name here: pink, vermilion, brown, amber, olive, lime, sea green, sky blue, indigo, grey, white
NAMELESS = [
    ((308, 346), (0.3, 1), (0.7, 1)),
    ((9, 18), (0.7, 1), (0.7, 1)),
    ((15, 35), (0.5, 0.8), (0.3, 0.55)),
    ((41, 47), (0.7, 1), (0.85, 1)),
    ((45, 65), (0.4, 0.9), (0.3, 0.5)),
    ((67, 86), (0.5, 1), (0.5, 1)),
    ((155, 169), (0.5, 1), (0.5, 1)),
    ((195, 205), (0.5, 1), (0.6, 1)),
    ((245, 263), (0.5, 1), (0.5, 1)),
    ((0, 360), (0, 0.1), (0.27, 0.75)),
    ((0, 360), (0, 0.05), (0.9, 1)),
]
CONTRAST = 80  # the distance between a thing's colour and the paper's, of RGB; less where a scene's colours leave none


class Look(NamedTuple):
    """How a thing looks: its middle and radius in pixels, its colour on two sides, and numbers from 0 to 1 for its form."""

    x: float
    y: float
    radius: float
    colour: tuple
    shade: tuple
    tilt: float
    proportion: float
    stretch: float


def centre_range(index, radius):
    """The range of a coordinate of things in the first, second or third part (index 0, 1 or 2) of the picture."""
    third = PICTURE / 3
    least, most = index * third + MARGIN, (index + 1) * third - MARGIN
    return max(least, radius + 1), min(most, PICTURE - radius - 1)


def random_colour(name, rng):
    """An RGB colour of this name; None for one that has none."""
    (h0, h1), (s0, s1), (v0, v1) = COLOURS[name] if name else rng.choice(NAMELESS)
    hue = rng.uniform(h0, h1) / 360 % 1
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, rng.uniform(s0, s1), rng.uniform(v0, v1)))


def shaded(colour, amount):
    return tuple(min(255, max(0, channel + amount)) for channel in colour)


def fits(look, others):
    """Whether it touches the others at most."""
    return all(math.hypot(look.x - o.x, look.y - o.y) >= 0.97 * (look.radius + o.radius) for o in others)


def random_look(thing, rng, others, like=None):
    """A look of a thing that doesn't hide the others; with the middle and the radius of the look `like` if its words allow.

    Radii become smaller if they leave no room. None if there is none at all.
    """
    row, column = divmod(PLACES.index(thing.place), 3)
    least, most = RADII[thing.size]
    colour = random_colour(thing.colour, rng)
    shade = shaded(colour, rng.choice([0, 0, rng.randint(-45, 45)]))
    form = rng.random(), rng.random(), rng.random()
    for attempt in range(60):
        radius = rng.uniform(least, most - (most - least) * attempt / 60)
        if like and attempt < 30 and least <= like.radius <= most:
            radius = like.radius
        (x0, x1), (y0, y1) = centre_range(column, radius), centre_range(row, radius)
        x, y = rng.uniform(x0, x1), rng.uniform(y0, y1)
        if like and attempt == 0 and x0 <= like.x <= x1 and y0 <= like.y <= y1:
            x, y = like.x, like.y
        look = Look(x, y, radius, colour, shade, *form)
        if fits(look, others):
            return look
    return None


def random_looks(scene, rng):
    """{thing: its look} of a scene."""
    while True:
        looks = {}
        for thing in rng.sample(scene, len(scene)):
            looks[thing] = random_look(thing, rng, looks.values())
            if looks[thing] is None:
                break
        else:
            return looks


def changed_looks(looks, change, rng):
    """The looks after a change; None if the new thing finds no room."""
    after = {thing: look for thing, look in looks.items() if thing != change.old}
    if change.new:
        old = looks.get(change.old)
        look = random_look(change.new, rng, after.values(), like=old)
        if look is None:
            return None
        if old:  # what the change doesn't name stays
            keep = {"tilt": old.tilt, "proportion": old.proportion, "stretch": old.stretch}
            keep |= {} if change.kind == "recolour" else {"colour": old.colour, "shade": old.shade}
            look = look._replace(**keep)
        after[change.new] = look
    return after


# --- paper ----------------------------------------------------------------------------------------------------------


def random_paper(rng, colours=()):
    """A background (224, 224) as a PIL picture that contrasts with these colours: plain, shaded or with a light pattern."""
    for attempt in itertools.count():
        kind = rng.random()
        if kind < 0.35:  # nearly white
            base = (rng.randint(242, 255),) * 3
        elif kind < 0.6:  # grey of any brightness
            base = (rng.randint(0, 255),) * 3
        else:  # light or dark, with a tint
            value = rng.uniform(0.85, 1) if rng.random() < 0.75 else rng.uniform(0.05, 0.5)
            base = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.03, 0.22), value))
        if all(math.dist(base, colour) >= CONTRAST - attempt // 4 for colour in colours):
            break
    pattern = rng.choice(["plain", "plain", "shaded", "stripes", "checks", "dots"])
    second = shaded(base, rng.choice([-1, 1]) * rng.randint(6, 16))
    paper = Image.new("RGB", (PICTURE, PICTURE), base)
    pen = ImageDraw.Draw(paper)
    pitch = rng.randint(8, 40)
    if pattern == "shaded":  # 2 x 2 pixels, enlarged
        paper = Image.new("RGB", (2, 2), base)
        paper.paste(second, (1, 0, 2, 2) if rng.random() < 0.5 else (0, 1, 2, 2))
        paper = paper.resize((PICTURE, PICTURE), Image.Resampling.BILINEAR)
    elif pattern == "stripes":
        slope = rng.choice([-PICTURE, 0, PICTURE])
        for x in range(-PICTURE, 2 * PICTURE, 2 * pitch):
            pen.line((x, 0, x + slope, PICTURE), second, max(2, pitch // 2))
    elif pattern in ("checks", "dots"):
        draw = pen.rectangle if pattern == "checks" else pen.ellipse
        side = pitch if pattern == "checks" else pitch // 2
        for x in range(0, PICTURE, pitch):
            for y in range(0, PICTURE, pitch):
                if (x // pitch + y // pitch) % 2:
                    draw((x, y, x + side, y + side), second)
    return paper


# --- things ---------------------------------------------------------------------------------------------------------


def rotation(fraction):
    """Multiplying a point by this complex number rotates it by a fraction of a circle."""
    return 1j ** (4 * fraction)


NAMELESS_OUTLINES = [
    [-1j, 0.9 - 0.1j, 0.35 - 0.1j, 0.35 + 0.95j, -0.35 + 0.95j, -0.35 - 0.1j, -0.9 - 0.1j],
    [-0.35j + rotation(k / 32) for k in range(17)],
    [-0.75 - 0.95j, -0.05 - 0.95j, -0.05 + 0.25j, 0.8 + 0.25j, 0.8 + 0.9j, -0.75 + 0.9j],
    [0.3 - 1j, -0.6 + 0.15j, -0.05 + 0.15j, -0.3 + 1j, 0.6 - 0.2j, 0.05 - 0.2j],
]


def outline(shape, radius, proportion):
    """Corners of a shape around (0, 0) as complex numbers x + yj; None for the two shapes that are not polygons.

    shape None: an arrow, half a disc, an L, a zigzag, or any stone with five to eight corners, which have no names here.
    """
    up = -1j * radius
    if shape is None:
        number, turn = divmod(8 * proportion, 1)
        if number >= 4:
            corners = int(number) + 1
            return [
                radius * (0.7 + 0.3 * math.sin(99 * turn * k)) * rotation((k + turn) / corners) for k in range(corners)
            ]
        return [radius * corner * rotation(turn) for corner in NAMELESS_OUTLINES[int(number)]]
    if shape == "square":
        side = radius * 0.8
        return [side * corner for corner in (-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j)]
    if shape == "triangle":
        return [up * 1.05 * rotation(k / 3) + 0.2j * radius for k in range(3)]
    if shape == "star":
        inner = 0.38 + 0.14 * proportion
        return [up * (1.05 if k % 2 == 0 else inner) * rotation(k / 10) for k in range(10)]
    if shape == "cross":
        arm = radius * (0.2 + 0.18 * proportion)  # half of its width
        corners = [-arm - radius * 1j, arm - radius * 1j, arm - arm * 1j]
        return [point * rotation(k / 4) for k in range(4) for point in corners]
    return None


def draw_thing(picture, shape, look, smooth):
    """Draws a thing onto the picture, with smooth or jagged edges."""
    # a white shape on a tile of its own; to be smooth, three times as large and scaled down
    scale = 3 if smooth else 1
    half = math.ceil(look.radius * 1.15) + 2  # half the tile's width in the picture
    left, top = round(look.x) - half, round(look.y) - half
    tile = Image.new("L", (2 * half * scale,) * 2)
    pen = ImageDraw.Draw(tile)
    centre = half * scale
    radius = look.radius * scale
    points = outline(shape, radius, look.proportion)
    # up to an eighth narrower or lower, then tilted by up to 20 degrees
    wide, high = (1 - look.stretch / 4, 1) if look.stretch < 0.5 else (1, 1 - (look.stretch - 0.5) / 4)
    if points:
        tilt = rotation((look.tilt - 0.5) / 9)
        points = [complex(p.real * wide, p.imag * high) * tilt for p in points]
        pen.polygon([(centre + p.real, centre + p.imag) for p in points], fill=255)
    else:
        discs = [(radius, 255), (radius * (0.45 + 0.22 * look.proportion), 0)] if shape == "ring" else [(radius, 255)]
        for r, fill in discs:
            pen.ellipse([centre - r * wide, centre - r * high, centre + r * wide, centre + r * high], fill=fill)
    tile = tile.reduce(scale) if smooth else tile

    # paste the colour through the tile; a shaded one from left to right
    if look.colour == look.shade:
        picture.paste(look.colour, (left, top), tile)
        return
    colours = Image.new("RGB", (2, 1), look.colour)
    colours.putpixel((1, 0), look.shade)
    picture.paste(colours.resize(tile.size, Image.Resampling.BILINEAR), (left, top), tile)


def paint(looks, paper, smooth=True):
    """Things on a copy of the paper, as a PIL picture."""
    picture = paper.copy()
    for thing, look in looks.items():
        draw_thing(picture, thing.shape, look, smooth)
    return picture


def tones(*several):
    """The colours of several scenes' looks, to choose a paper by."""
    return [colour for looks in several for look in looks.values() for colour in (look.colour, look.shade)]


def draw(scene, rng):
    """A scene as a 224x224 RGB picture."""
    looks = random_looks(scene, rng)
    return paint(looks, random_paper(rng, tones(looks)), smooth=rng.random() < 0.7)


def looks_before_and_after(scene, change, rng):
    """(looks before a change, looks after it, paper for both, whether edges are smooth)."""
    while True:
        before = random_looks(scene, rng)
        after = changed_looks(before, change, rng)
        if after is not None:
            return before, after, random_paper(rng, tones(before, after)), rng.random() < 0.7


def draw_change(scene, change, rng):
    """Two pictures, before and after a change; what it doesn't name differs by a pixel or two, as if drawn twice."""
    before, after, paper, smooth = looks_before_and_after(scene, change, rng)
    moved = {
        t: look._replace(x=look.x + rng.uniform(-2, 2), y=look.y + rng.uniform(-2, 2)) for t, look in after.items()
    }
    return paint(before, paper, smooth), paint(moved, paper, smooth)


def draw_frames(scene, change, rng, count):
    """The frames of an animation: a move takes all of them, any other change happens between two of them."""
    before, after, paper, smooth = looks_before_and_after(scene, change, rng)
    first = rng.randrange(1, count)  # the first frame after the change
    frames = []
    for number in range(count):
        looks = before if number < first else after
        if change.kind == "move":
            old, new, way = before[change.old], after[change.new], number / (count - 1)
            between = old._replace(x=old.x + (new.x - old.x) * way, y=old.y + (new.y - old.y) * way)
            looks = {**before, change.old: between}
        frames.append(paint(looks, paper, smooth))
    return frames
