"""The demo's model on pictures that another hand has drawn: plain ImageDraw, and the drawing pad of the page.

    python tests/benchmarks/other_hand.py            # 300 pictures by ImageDraw
    python tests/benchmarks/other_hand.py --pad      # and 60 drawn on the pad, in a real browser (tests/requirements.txt)

ImageDraw: jagged edges, upright shapes of its own proportions, Pillow's pure colours ("red", "cyan"), ten plain backgrounds.
Things lie where the demo's do: anywhere in the ninth of the picture that their place names, 8 pixels or more from its edge,
and hide nothing of each other. Scenes are held-out ones. Each picture is asked three questions, in either
language, and its caption; an answer is right if every word is. After `python 1-pretrain_vlm.py --demo && python 2-sft_vlm.py
--demo`; the last line is JSON.
"""

import argparse
import base64
import collections
import io
import json
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dataset.demo import drawing
from dataset.demo.scenes import random_scene
from dataset.demo.sentences import LANGUAGES, QUESTIONS, question
from model.images import to_pixels
from web_server import create_app

BACKGROUNDS = [
    "white",
    "black",
    "gray",
    "dimgray",
    "lightyellow",
    "lightblue",
    "mistyrose",
    "honeydew",
    "lavender",
    "beige",
]


def star(x, y, radius):
    corners = [(math.pi * k / 5, radius if k % 2 == 0 else radius * 0.4) for k in range(10)]
    return [(x + r * math.sin(angle), y - r * math.cos(angle)) for angle, r in corners]


def draw_by_imagedraw(scene, rng):
    """A picture of the scene: (PIL picture, 224 pixels)."""
    dark = any(thing.colour == "black" for thing in scene)
    background = rng.choice([name for name in BACKGROUNDS if not (dark and name in ("black", "dimgray"))])
    picture = Image.new("RGB", (drawing.PICTURE, drawing.PICTURE), background)
    pen = ImageDraw.Draw(picture)
    for thing, look in drawing.random_looks(scene, rng).items():
        x, y, r = look.x, look.y, look.radius
        box = (x - r, y - r, x + r, y + r)
        if thing.shape == "circle":
            pen.ellipse(box, thing.colour)
        elif thing.shape == "ring":
            pen.ellipse(box, outline=thing.colour, width=round(r * 0.4))
        elif thing.shape == "square":
            pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), thing.colour)
        elif thing.shape == "triangle":
            pen.polygon([(x, y - r), (x - 0.9 * r, y + 0.8 * r), (x + 0.9 * r, y + 0.8 * r)], thing.colour)
        elif thing.shape == "star":
            pen.polygon(star(x, y, r), thing.colour)
        else:  # a cross
            pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), thing.colour)
            pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), thing.colour)
    return picture


def draw_on_pad(page, scene, rng):
    """The same by clicks and strokes of the mouse on the page's pad; shapes are pulled up from their middle."""
    page.locator("#draw").click()
    pad = page.locator("#pad")

    def choose(name):
        pad.get_by_role("button", name=name, exact=True).click()

    choose(rng.choice(["White background", "Light grey background", "Beige background", "Light blue background"]))
    box = pad.locator("canvas").bounding_box()
    scale = box["width"] / drawing.PICTURE
    for thing, look in drawing.random_looks(scene, rng).items():
        choose(thing.shape.capitalize())
        choose(thing.colour.capitalize())
        x, y = box["x"] + look.x * scale, box["y"] + look.y * scale
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + look.radius * scale, y)
        page.mouse.up()
    choose("Use the drawing")
    url = page.locator("#thumbnails img").get_attribute("src")
    page.locator("#thumbnails .remove").click()
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def ask(chat, scene, picture, rng, counts):
    """Three questions and the caption."""
    kinds = rng.sample([kind for kind in QUESTIONS if kind not in ("caption", "other")], 3) + ["caption"]
    pixels = [to_pixels(picture, chat.encoder.preprocess)]
    for kind in kinds:
        pair = question(rng.choice(list(LANGUAGES.values())), scene, rng, kind)
        if pair:
            right = "".join(chat.stream(pair[0], pixels, temperature=0)) == pair[1]
            counts[kind] += [1, right]


def report(hand, counts):
    """{kind: share right}, and of all questions without captions."""
    shares = {kind: round(sum(asked[1::2]) / sum(asked[::2]), 3) for kind, asked in counts.items()}
    asked = [number for kind, numbers in counts.items() if kind != "caption" for number in numbers]
    shares["all questions"] = round(sum(asked[1::2]) / sum(asked[::2]), 3)
    print(hand, shares, flush=True)
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--pad", action="store_true", help="draw 60 on the page's pad, too")
    parser.add_argument("--out_dir", default=str(ROOT / "out"), help="where the demo's weights are")
    args = parser.parse_args()
    app = create_app("--demo", "--out_dir", args.out_dir)
    rng, counts = random.Random(0), collections.defaultdict(list)
    for _ in range(args.pictures):
        scene = random_scene(rng, "heldout")
        ask(app.chat, scene, draw_by_imagedraw(scene, rng), rng, counts)
    result = {"ImageDraw": report("ImageDraw", counts)}

    if args.pad:
        import shutil

        from helpers import FLAGS, serving
        from playwright.sync_api import sync_playwright

        counts = collections.defaultdict(list)
        with serving(app) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            page = browser.new_page(locale="en-US", viewport={"width": 1000, "height": 900})
            page.goto(address)
            for _ in range(60):
                scene = random_scene(rng, "heldout")
                ask(app.chat, scene, draw_on_pad(page, scene, rng), rng, counts)
        result["pad"] = report("pad", counts)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
