"""The chat page in a real browser: Chromium, driven by Playwright."""

import base64
import colorsys
import io
import itertools
import json
import mimetypes
import re

import numpy as np
import pytest
from helpers import ROOT, animated, eventually, say, serving, video
from PIL import Image
from playwright.sync_api import expect

from dataset.demo import drawing
from dataset.demo.scenes import SHAPES
from dataset.demo.sentences import LANGUAGES
from web_server import create_app

LONG = "左上角红色大圆形，右下角蓝色小方形。" * 3


@pytest.fixture
def app(weights, tiny_clip, monkeypatch):
    """The model writes one fixed, long answer, a token every 40 ms."""
    monkeypatch.chdir(ROOT)
    flags = ["--weights", weights, "--vision_path", tiny_clip, "--tokenizer_path", "model/demo", "--device", "cpu"]
    app = create_app(*map(str, flags))
    say(app.chat, LONG, seconds=0.04)
    return app


@pytest.fixture
def visit(app, browser):
    """A function that opens the page in a language, colour scheme and width, at the address of the model's server or another.

    The test fails on any error of the page.
    """
    contexts, problems = [], []
    with serving(app) as address:

        def open_page(locale="zh-CN", colour_scheme="light", width=1000, at=address):
            context = browser.new_context(
                locale=locale,
                color_scheme=colour_scheme,
                viewport={"width": width, "height": 800},
                has_touch=width < 500,
            )
            contexts.append(context)
            page = context.new_page()
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on(
                "request",
                lambda request: (
                    None if request.url.startswith((at, "data:", "blob:")) else problems.append(f"asked {request.url}")
                ),
            )
            page.goto(at)
            expect(page.locator("#samples img")).to_have_count(7)
            return page

        yield open_page
        for context in contexts:
            context.close()
    assert problems == []


def drop(page, *files):
    """Drops files on the page, as if dragged from a folder."""
    contents = [
        [file.name, mimetypes.guess_type(file.name)[0], base64.b64encode(file.read_bytes()).decode()] for file in files
    ]
    page.evaluate(
        """contents => {
            const transfer = new DataTransfer();
            for (const [name, type, data] of contents) {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type }));
            }
            for (const type of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        contents,
    )


def ask(page, text):
    page.locator("#question").fill(text)
    page.locator("#question").press("Enter")


def bubble(page, number=-1):
    return page.locator(".answer .bubble").nth(number)


def test_ask_watch_stop_ask_again(visit, app, pictures):
    page = visit()
    expect(page.locator("#model")).to_have_text("64_vlm_sft · 0.2M 参数")
    drop(page, *pictures[:2])
    expect(page.locator("#thumbnails img")).to_have_count(2)
    page.locator("#thumbnails .remove").nth(1).click()
    expect(page.locator("#thumbnails img")).to_have_count(1)

    ask(page, "左上角什么颜色？")
    expect(page.locator(".mine .bubble")).to_have_text("左上角什么颜色？")
    expect(page.locator(".mine img")).to_have_count(1)
    expect(bubble(page)).to_contain_text("左上角")
    early = bubble(page).inner_text()
    assert LONG.startswith(early) and early != LONG  # it streams
    expect(bubble(page)).to_have_text(LONG)
    expect(page.locator(".speed")).to_have_text(re.compile(r"^\d+ 个 token，\d+ token/s$"))
    expect(page.locator("#thumbnails img")).to_have_count(1)  # the next question needs no second upload

    ask(page, "再看看？")
    expect(bubble(page, 1)).to_contain_text("左上角红色")
    page.locator("#send-button").click()  # stops the answer
    expect(page.locator(".speed").nth(1)).to_contain_text("已停止")
    shown, generated = bubble(page, 1).inner_text(), app.api.generated_tokens
    page.wait_for_timeout(300)
    assert bubble(page, 1).inner_text() == shown != LONG
    assert app.api.generated_tokens - generated <= 2  # the server stopped too

    page.locator(".answer").nth(1).get_by_role("button", name="重新回答").click()
    expect(bubble(page, 1)).to_have_text(LONG)
    page.locator("#clear-button").click()
    expect(page.locator(".exchange")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#welcome")).not_to_contain_text("彩色图形")  # what only the demo's model knows


def test_heat_maps_of_an_answer(visit, pictures):
    page = visit("en-US")
    drop(page, *pictures[:2])
    ask(page, "?")
    expect(bubble(page)).to_have_text(LONG)
    with page.expect_request("**/attention") as request:
        page.get_by_role("button", name="What it looked at").click()
    assert len(request.value.post_data_json["token_ids"]) > 20
    canvases = page.locator(".heat canvas")
    expect(canvases).to_have_count(2)
    expect(page.locator(".heat figcaption").first).to_have_text(re.compile(r"^\d+% of this step's attention"))
    maps = set()
    for token in range(3):
        page.locator(".token").nth(token).hover()
        expect(page.locator(".token.shown")).to_have_count(1)
        maps.add(canvases.first.evaluate("canvas => canvas.toDataURL()"))
    page.locator(".token").nth(2).click()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token").nth(3)).to_have_class("token shown")
    page.locator(".heat select").select_option("2")
    maps.add(canvases.first.evaluate("canvas => canvas.toDataURL()"))
    assert len(maps) == 4  # another map for another token or layer
    page.get_by_role("button", name="Hide").click()
    expect(canvases).to_have_count(0)


def test_an_answer_is_never_shown_with_the_attention_of_an_earlier_one(visit, app, pictures):
    page = visit("en-US")
    drop(page, pictures[0])
    ask(page, "?")
    expect(bubble(page)).to_have_text(LONG)
    held = []
    page.route("**/attention", lambda route: held.append(route))
    page.get_by_role("button", name="What it looked at").click()
    say(app.chat, "左上角红色")
    page.get_by_role("button", name="Regenerate").click()
    expect(bubble(page)).to_have_text("左上角红色")
    held[0].continue_()
    page.unroute("**/attention")
    page.wait_for_timeout(500)
    expect(page.locator(".heat")).to_have_count(0)
    page.get_by_role("button", name="What it looked at").click()
    expect(page.locator(".heat canvas")).to_have_count(1)


def test_a_piece_without_tokens_of_its_own_has_a_heat_map(visit, pictures):
    """As at an end within a character: its first token comes with the text before it, and no other token follows."""
    page = visit("en-US")
    drop(page, pictures[0])
    deltas = [{"content": "左", "token_ids": [5, 6]}, {"content": "\ufffd", "token_ids": []}]
    events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    events.append({"choices": [{"delta": {}, "finish_reason": "length"}]})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route("**/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(page, "?")
    page.get_by_role("button", name="What it looked at").click()
    expect(page.locator(".heat canvas")).to_have_count(1)
    page.locator(".token").nth(1).hover()
    expect(page.locator(".token").nth(1)).to_have_class("token shown")
    expect(page.locator(".heat figcaption")).to_have_text(re.compile(r"^\d+% of this step's attention"))


def test_videos_play_and_the_frames_that_the_model_saw_are_shown(visit, pictures, tmp_path):
    page = visit("en-US")
    film = video(tmp_path / "film.webm", [Image.open(path).resize((64, 64)) for path in pictures[:20]], "libvpx-vp9")
    animation = animated(tmp_path / "animation.gif", [Image.open(path) for path in pictures[:3]])
    drop(page, film, animation, pictures[0])
    playing = page.locator("#thumbnails video")
    expect(playing).to_have_count(1)
    eventually(lambda: playing.evaluate("video => video.currentTime") > 0)
    expect(page.locator("#thumbnails img")).to_have_count(2)
    with page.expect_request("**/completions") as request:
        ask(page, "?")
    parts = request.value.post_data_json["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["video_url", "video_url", "image_url", "text"]
    expect(bubble(page)).to_have_text(LONG)
    page.get_by_role("button", name="What it looked at").click()
    expect(page.locator(".heat canvas")).to_have_count(8 + 3 + 1)
    seen = page.locator(".heat img").evaluate_all("images => images.map((image) => image.naturalWidth)")
    assert seen == [64] * 11 + [224]  # frames as the model saw them, and the picture as it was sent


def test_samples_and_their_questions(visit):
    page = visit()
    page.locator("#samples button").first.click()
    expect(page.locator("#thumbnails img")).to_have_attribute("alt", "green-ring_blue-star_purple-triangle.png")
    chinese, english = "左下角的图形的颜色是什么？", "How many rings can you see?"
    expect(page.locator("#chips button")).to_have_text([chinese, "请描述这张图片。"])
    page.locator("#language").click()  # the questions are in the page's language
    expect(page.locator("#chips button")).to_have_text([english, "Describe the picture."])
    page.locator("#chips button").first.click()
    expect(page.locator(".mine .bubble")).to_have_text(english)
    expect(bubble(page)).to_have_text(LONG)


def test_the_chosen_language_is_remembered(visit):
    page = visit("en-US")
    expect(page.locator("h2").nth(1)).to_have_text("Show a tiny model a picture")
    expect(page.locator("#hint")).to_contain_text("Each question is answered on its own")
    page.locator("#language").click()
    expect(page.locator("h2").nth(1)).to_have_text("让小小的模型看一看")
    expect(page.locator("#hint")).to_contain_text("每个问题单独回答")
    page.reload()
    expect(page.locator("h2").nth(1)).to_have_text("让小小的模型看一看")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"


def test_settings_reach_the_model(visit):
    page = visit("en-US")
    page.locator("#settings-button").click()
    page.get_by_label("Max new tokens").fill("3")
    page.get_by_label("Seed").fill("7")
    page.keyboard.press("Escape")
    expect(page.locator("#settings-panel")).to_be_hidden()
    with page.expect_request("**/completions") as request:
        ask(page, "?")
    body = request.value.post_data_json
    assert (body["max_tokens"], body["seed"]) == (3, 7)
    assert "temperature" not in body and "top_k" not in body  # what was not changed is the server's
    expect(page.locator(".speed")).to_have_text(
        re.compile("^3 tokens, .* stopped at the length limit · saw no picture, so it guesses$")
    )


@pytest.mark.parametrize("colour_scheme", ["light", "dark"])
def test_everything_fits_on_a_phone(visit, pictures, colour_scheme):
    page = visit(colour_scheme=colour_scheme, width=360)
    drop(page, *pictures[:3])
    ask(page, "三张图有什么不同？")
    expect(bubble(page)).to_have_text(LONG)
    page.get_by_role("button", name="它看了哪里").tap()
    expect(page.locator(".heat canvas")).to_have_count(3)
    page.locator(".token").nth(2).tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # no horizontal scrolling
    for name in ("#send-button", "#add", "#draw", "#settings-button", "#language"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    red, green, blue = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).color"))[:3])
    assert (red + green + blue > 384) == (colour_scheme == "dark")


def test_output_is_shown_as_text_never_as_html(visit, app):
    page = visit()
    nasty = '<img src=x onerror="document.title=1"><b>'
    say(app.chat, nasty)
    ask(page, nasty)
    expect(bubble(page)).to_have_text(nasty)
    assert page.locator(".bubble img, .bubble b").count() == 0 and page.title() == "MiniMind-V"


@pytest.mark.parametrize(
    "locale, words, says",
    [
        ("zh-CN", "请描述这张图片。", "（模型什么也没写。）"),
        ("en-US", "Describe the picture.", "(The model wrote nothing.)"),
    ],
)
def test_a_picture_alone_is_a_question_and_an_empty_answer_says_so(visit, app, pictures, locale, words, says):
    page = visit(locale)
    drop(page, pictures[0])
    say(app.chat, "")
    page.locator("#send-button").click()
    expect(page.locator(".mine .bubble")).to_have_text(words)
    expect(bubble(page)).to_have_text(says)
    say(app.chat, "红色")
    page.locator(".answer button").first.click()  # regenerates
    expect(bubble(page)).to_have_text("红色")


def test_the_page_takes_as_many_pictures_as_fit(visit, app, pictures):
    page = visit("en-US")
    drop(page, *pictures[: app.chat.max_pictures + 1])
    expect(page.locator("#thumbnails img")).to_have_count(app.chat.max_pictures)
    expect(page.locator("#notice")).to_have_text(f"The model sees at most {app.chat.max_pictures} pictures at a time.")
    ask(page, "?")
    expect(bubble(page)).to_contain_text("左上角")
    page.locator("#draw").click()
    expect(page.locator("#pad")).to_be_hidden()  # nothing is drawn in vain


# --- the drawing pad, in pixels of the drawing: 448 x 448 --------------------------------------------------------------

WHITE, GREY, BLACK = (255, 255, 255), (0xDE, 0xE2, 0xE6), (0x23, 0x23, 0x28)
RED, GREEN, BLUE = (0xDE, 0x2D, 0x2D), (0x2D, 0xA5, 0x46), (0x28, 0x50, 0xD2)


def choose(page, *names):
    for name in names:
        page.locator("#pad").get_by_role("button", name=name, exact=True).click()


def on_screen(page, points):
    box = page.locator("#pad canvas").bounding_box()
    scale = page.locator("#pad canvas").evaluate("canvas => canvas.clientWidth") / 448
    border = (box["width"] - 448 * scale) / 2
    return [(box["x"] + border + x * scale, box["y"] + border + y * scale) for x, y in points]


def drag(page, *points):
    """Presses the mouse at the first point, and lets go at the last."""
    for number, (x, y) in enumerate(on_screen(page, points)):
        page.mouse.move(x, y)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def decoded(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def drawn(page):
    return decoded(page.locator("#pad canvas").evaluate("canvas => canvas.toDataURL()"))


def test_a_drawing_is_attached_and_sent_and_the_next_one_begins_empty(visit):
    page = visit("en-US")
    page.locator("#draw").click()
    choose(page, "Circle", "Red")
    drag(page, (96, 96), (176, 96))  # from its centre: a radius of 80
    choose(page, "Square", "Blue")
    drag(page, (352, 352))  # one of middle size
    choose(page, "Star")
    drag(page, (224, 224), (224, 300))
    page.keyboard.press("Control+z")
    choose(page, "Brush", "Green")
    drag(page, (60, 400), (160, 400))
    drag(page, (60, 300), (160, 300))
    choose(page, "Undo", "Light grey background", "Eraser")
    drag(page, (96, 96))
    choose(page, "Use the drawing")

    attached = page.locator("#thumbnails img")
    expect(attached).to_have_attribute("alt", "drawing.png")
    picture = decoded(attached.get_attribute("src"))
    assert picture.size == (448, 448)
    found = {point: picture.getpixel(point) for point in [(150, 96), (190, 96), (352, 352), (352, 420), (110, 400)]}
    assert found == {(150, 96): RED, (190, 96): GREY, (352, 352): BLUE, (352, 420): GREY, (110, 400): GREEN}
    gone = [picture.getpixel(point) for point in [(96, 96), (224, 224), (110, 300)]]  # erased, and undone twice
    assert gone == [GREY] * 3

    with page.expect_request("**/completions") as request:
        ask(page, "?")
    part = request.value.post_data_json["messages"][0]["content"][0]
    assert decoded(part[part["type"]]["url"]).tobytes() == picture.tobytes()
    page.locator("#draw").click()
    assert drawn(page).getcolors() == [(448 * 448, GREY)]


def test_the_pads_shapes_and_colours_are_those_of_the_demo(visit):
    page = visit()
    page.locator("#draw").click()
    chinese = LANGUAGES["zh"].words
    for name, shape in zip(drawing.COLOURS, itertools.cycle(SHAPES), strict=False):
        choose(page, "清空", chinese[name], chinese[shape])
        drag(page, (224, 224), (304, 224))
        picture = drawn(page)
        # its colour is one that the demo has for the name
        (h0, h1), *limits = drawing.COLOURS[name]
        colour = next(c for count, c in sorted(picture.getcolors(448 * 448), reverse=True) if c != WHITE)
        hue, *others = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
        assert h0 <= hue * 360 <= h1 or h0 <= hue * 360 - 360 <= h1
        assert all(low - 0.01 <= value <= high + 0.01 for value, (low, high) in zip(others, limits, strict=True)), name
        # and so is its form
        expected = Image.new("RGB", (224, 224), "white")
        look = drawing.Look(112, 112, 40, colour, colour, tilt=0.5, proportion=0.5, stretch=0)
        drawing.draw_thing(expected, shape, look, smooth=True)
        difference = np.asarray(picture.reduce(2), float) - np.asarray(expected)
        assert np.abs(difference).mean() < 1, (name, shape)  # only edges differ; circle for square: 2 or more
    choose(page, "清空")
    page.get_by_label("其他颜色").fill("#123456")
    drag(page, (224, 224))
    assert drawn(page).getpixel((184, 224)) == (0x12, 0x34, 0x56)  # the last shape was a square


def test_a_finger_draws_and_everything_fits_on_a_small_phone(visit, pictures):
    page = visit(width=320)
    drop(page, pictures[0])
    expect(page.locator("#thumbnails img")).to_have_count(1)
    page.locator("#draw").tap()
    pad = page.locator("#pad")
    for button in pad.locator("button, input, canvas").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 320 and min(box["width"], box["height"]) >= 24
    assert pad.locator("canvas").bounding_box()["width"] >= 260
    assert pad.evaluate("pad => pad.scrollWidth - pad.clientWidth") == 0

    def touch(*points):
        session = page.context.new_cdp_session(page)
        for number, (x, y) in enumerate(on_screen(page, points)):
            kind = "touchMove" if number else "touchStart"
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    pad.get_by_role("button", name="圆环").tap()
    touch((150, 150), (200, 150), (250, 150))
    pad.get_by_role("button", name="画笔").tap()
    pad.get_by_role("button", name="蓝色", exact=True).tap()
    touch((40, 400), (200, 400), (400, 400))
    pad.get_by_role("button", name="用这张画").tap()
    expect(page.locator("#thumbnails img").nth(1)).to_have_attribute("alt", "我的画.png")
    picture = decoded(page.locator("#thumbnails img").nth(1).get_attribute("src"))
    points = [(150, 150), (230, 150), (150, 70), (300, 150), (300, 400), (300, 300)]
    assert [picture.getpixel(point) for point in points] == [WHITE, RED, RED, WHITE, BLUE, WHITE]


def test_drawing_over_the_attached_picture(visit, pictures, tmp_path):
    wide = tmp_path / "wide.png"
    halves = Image.new("RGB", (300, 100), RED)
    halves.paste(BLUE, (150, 0, 300, 100))
    halves.save(wide)
    page = visit("en-US")
    over = page.get_by_role("button", name="Over the picture")
    page.locator("#draw").click()
    expect(over).to_be_hidden()
    choose(page, "Cancel")
    drop(page, wide)
    expect(page.locator("#thumbnails img")).to_have_count(1)
    page.locator("#draw").click()
    assert drawn(page).getcolors() == [(448 * 448, WHITE)]  # offered, not forced
    over.click()
    choose(page, "Circle", "Black")
    drag(page, (112, 224), (192, 224))
    choose(page, "Eraser")
    drag(page, (112, 224))  # leaves the picture
    choose(page, "Use the drawing")
    expect(page.locator("#thumbnails img")).to_have_count(2)
    picture = decoded(page.locator("#thumbnails img").nth(1).get_attribute("src"))
    points = [(5, 5), (5, 440), (440, 5), (440, 440), (112, 224), (160, 224)]  # squeezed to the square
    assert [picture.getpixel(point) for point in points] == [RED, RED, BLUE, BLUE, RED, BLACK]

    # not offered for one of two, nor for what moves
    page.locator("#draw").click()
    expect(over).to_be_hidden()
    assert drawn(page).getcolors() == [(448 * 448, WHITE)]
    choose(page, "Cancel")
    frames = [Image.open(path) for path in pictures[:3]]
    for file in (
        animated(tmp_path / "moves.gif", frames),
        animated(tmp_path / "moves.webp", frames),
        animated(tmp_path / "moves.png", frames),
        video(tmp_path / "film.webm", [frame.resize((64, 64)) for frame in frames], "libvpx-vp9"),
    ):
        page.locator("#clear-button").click()
        drop(page, file)
        expect(page.locator("#thumbnails li")).to_have_count(1)
        page.locator("#draw").click()
        expect(page.locator("#pad")).to_be_visible()
        expect(over).to_be_hidden()
        choose(page, "Cancel")


@pytest.mark.parametrize("way_out", ["Escape", "Cancel"])
def test_leaving_the_pad_attaches_nothing_stops_no_answer_and_keeps_the_drawing(visit, way_out):
    page = visit("en-US")
    ask(page, "?")
    expect(bubble(page)).to_contain_text("左上角")
    page.locator("#draw").click()
    choose(page, "Circle")
    drag(page, (224, 224))
    page.keyboard.press("Escape") if way_out == "Escape" else choose(page, "Cancel")
    expect(page.locator("#pad")).to_be_hidden()
    expect(page.locator("#draw")).to_be_focused()
    expect(bubble(page)).to_have_text(LONG)
    expect(page.locator("#thumbnails li")).to_have_count(0)
    page.locator("#draw").click()
    assert drawn(page).getpixel((224, 224)) == RED
    choose(page, "Clear")
    assert drawn(page).getpixel((224, 224)) == WHITE
    choose(page, "Undo")
    assert drawn(page).getpixel((224, 224)) == RED


def test_the_pad_by_keyboard(visit):
    page = visit("en-US")
    page.locator("#draw").press("Enter")
    canvas = page.get_by_role("application", name="Canvas")
    expect(canvas).to_be_focused()
    pad = page.locator("#pad")
    pad.get_by_role("button", name="Square").press("Enter")
    expect(pad.get_by_role("button", name="Square")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="Brush")).to_have_attribute("aria-pressed", "false")
    canvas.focus()
    for key in ["ArrowRight"] * 5 + ["ArrowUp"] * 3 + ["+"] * 2 + ["Enter"]:  # to (304, 176), with a radius of 92
        page.keyboard.press(key)
    page.get_by_role("button", name="Use the drawing").press("Enter")
    picture = decoded(page.locator("#thumbnails img").get_attribute("src"))
    side = round(0.8 * 92)
    assert np.asarray(picture)[..., 0].min() == RED[0]  # no trace of the cursor, which is black
    assert picture.getpixel((304 + side - 2, 176 + side - 2)) == picture.getpixel((304 - side + 2, 176)) == RED
    assert picture.getpixel((304 + side + 2, 176)) == picture.getpixel((224, 224 + side + 2)) == WHITE


@pytest.mark.parametrize("locale", ["zh-CN", "en-US"])
def test_everything_on_the_pad_has_a_name_in_both_languages(visit, locale):
    page = visit(locale)
    page.locator("#draw").click()
    names = (
        page.locator("#pad")
        .locator("button, input, canvas, [role=group]")
        .evaluate_all("all => all.map((one) => one.getAttribute('aria-label') ?? one.textContent)")
    )
    assert len(names) == len(set(names)) == 1 + 3 + 8 + 9 + 6 + 4
    assert all(name and name != "undefined" for name in names)
    assert all(bool(re.search("[\u4e00-\u9fff]", name)) == (locale == "zh-CN") for name in names)


def test_problems_are_shown(visit, tmp_path):
    page = visit()
    ask(page, "")
    expect(page.locator("#notice")).to_have_text("请先输入问题。")
    assert page.locator(".exchange").count() == 0
    (tmp_path / "note.txt").write_text("?")
    page.locator("#files").set_input_files(tmp_path / "note.txt")
    expect(page.locator("#notice")).to_contain_text("note.txt 不是图片")
    (tmp_path / "photo.HEIC").write_bytes(b"?")  # browsers know no type for it
    page.locator("#files").set_input_files(tmp_path / "photo.HEIC")
    expect(page.locator("#notice")).to_contain_text(
        "读不了 photo.HEIC，换一个试试"
    )  # at once, not when it is asked about
    expect(page.locator("#thumbnails li")).to_have_count(0)
    error = page.locator("#notice").evaluate("notice => getComputedStyle(notice).color")
    page.locator("#question").fill("第一行")
    page.locator("#question").press("Shift+Enter")
    page.locator("#question").press_sequentially("第二行")
    page.locator("#question").press("Enter")
    expect(page.locator(".mine .bubble")).to_have_text("第一行\n第二行")
    expect(bubble(page)).to_have_text(LONG)
    page.get_by_role("button", name="复制").click()
    expect(page.locator("#notice")).to_have_text("已复制")
    assert (
        page.locator("#notice").evaluate("notice => getComputedStyle(notice).color") != error
    )  # good news looks otherwise


@pytest.mark.parametrize(
    "locale, long, busy",
    [
        ("zh-CN", "图片和问题一共 999 个 token，模型最多读 512 个", "现在提问的人太多"),
        (
            "en-US",
            "Pictures and question are 999 tokens, and the model reads at most 512",
            "Too many questions at once",
        ),
    ],
)
def test_the_servers_refusals_are_in_the_language_of_the_page(visit, app, locale, long, busy):
    page = visit(locale)
    events = []
    page.route("**/completions", lambda route: route.fulfill(content_type="text/event-stream", body=events.pop()))
    for says, text in (
        ("the question has 999 tokens, the model reads at most 512", long),
        (app.api.queue.busy().description, busy),
    ):
        events.append(f"data: {json.dumps({'error': {'message': says}})}\n\n")
        ask(page, "?")
        expect(bubble(page)).to_contain_text(text)


def test_a_picture_is_enlarged_and_its_size_and_frames_are_shown(visit, pictures, tmp_path):
    wide = tmp_path / "wide.png"
    Image.new("RGB", (300, 100), RED).save(wide)
    page = visit("en-US")
    drop(page, wide, animated(tmp_path / "moves.gif", [Image.open(path) for path in pictures[:3]]))
    expect(page.locator("#thumbnails .size")).to_have_text(["300×100", "224×224 · sees 3 frames"])
    ask(page, "?")
    expect(page.locator(".mine .size")).to_have_text(["300×100", "224×224 · sees 3 frames"])
    page.locator(".mine .enlarge").first.click()
    expect(page.locator("#viewer img")).to_have_attribute("alt", "wide.png")
    expect(page.locator("#viewer")).to_contain_text("wide.png")
    assert page.locator("#viewer img").bounding_box()["width"] > page.locator(".mine img").first.bounding_box()["width"]
    page.keyboard.press("Escape")  # closes the picture, and leaves the answer alone
    expect(page.locator("#viewer")).to_be_hidden()
    expect(bubble(page)).to_have_text(LONG)
    page.locator("#thumbnails .enlarge").nth(1).click()
    page.locator("#viewer").click()
    expect(page.locator("#viewer")).to_be_hidden()


def test_a_new_chat_can_be_taken_back(visit, pictures):
    page = visit("en-US")
    drop(page, pictures[0])
    ask(page, "What?")
    expect(bubble(page)).to_have_text(LONG)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".exchange")).to_have_count(0)
    expect(page.locator("#thumbnails li")).to_have_count(0)
    page.get_by_role("button", name="Bring back the last one").click()
    expect(bubble(page)).to_have_text(LONG)
    expect(page.locator("#thumbnails li")).to_have_count(1)
    expect(page.locator("#welcome")).to_be_hidden()
    expect(page.locator("#notice")).to_be_hidden()


def test_a_reload_keeps_the_talk(visit, pictures):
    page = visit("en-US")
    drop(page, pictures[0])
    ask(page, "First?")
    expect(page.locator(".speed")).to_contain_text("tokens/s")
    ask(page, "Second?")
    expect(bubble(page)).to_contain_text("左")
    page.reload()  # amid an answer
    expect(page.locator(".mine .bubble")).to_have_text(["First?", "Second?"])
    expect(bubble(page, 0)).to_have_text(LONG)
    expect(page.locator(".speed").nth(1)).to_contain_text("stopped")
    expect(page.locator("#thumbnails img")).to_have_attribute("alt", pictures[0].name)
    page.get_by_role("button", name="What it looked at").first.click()
    expect(page.locator(".heat canvas")).to_have_count(1)
    page.get_by_role("button", name="Regenerate").nth(1).click()
    expect(bubble(page)).to_have_text(LONG)
    page.get_by_role("button", name="New chat").click()
    page.reload()
    expect(page.locator("#samples img")).to_have_count(7)
    expect(page.locator(".exchange")).to_have_count(0)


def test_pictures_too_large_to_keep_are_said_to_be(visit, pictures, tmp_path):
    large = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)).save(large)
    page = visit("en-US")
    drop(page, pictures[0], large)
    expect(page.locator("#notice")).to_contain_text("The browser can't hold all pictures")
    ask(page, "What?")
    expect(bubble(page)).to_have_text(LONG)
    page.reload()
    expect(page.locator(".mine .gone")).to_have_text("Picture too large to keep over a reload")
    expect(page.locator(".mine img")).to_have_count(1)
    expect(bubble(page)).to_have_text(LONG)
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(0)  # it would be another question
    expect(page.locator("#thumbnails img")).to_have_count(1)


def test_a_question_is_edited_and_asked_again(visit, pictures):
    page = visit("en-US")
    drop(page, pictures[0])
    ask(page, "What shape?")
    expect(bubble(page)).to_have_text(LONG)
    page.locator("#thumbnails .remove").click()
    page.get_by_role("button", name="Edit and ask again").click()
    expect(page.locator("#question")).to_have_value("What shape?")
    page.keyboard.press("End")
    page.keyboard.press("Backspace")
    page.keyboard.type(" is it?")
    page.keyboard.press("Enter")
    expect(page.locator(".mine .bubble").nth(1)).to_have_text("What shape is it?")
    expect(page.locator(".mine").nth(1).locator("img")).to_have_attribute("alt", pictures[0].name)


def test_a_button_leads_to_the_newest_answer(visit, pictures):
    page = visit("en-US")
    down = page.get_by_role("button", name="To the bottom")
    drop(page, *pictures[:4])
    for number in range(4):
        ask(page, "?")
        expect(page.locator(".speed")).to_have_count(number + 1)
    expect(down).to_be_hidden()
    page.mouse.move(500, 300)
    page.mouse.wheel(0, -5000)
    down.click()
    expect(page.locator(".speed").last).to_be_in_viewport()
    expect(down).to_be_hidden()


@pytest.mark.parametrize("width", [320, 360, 390, 430])
def test_the_header_and_the_heat_map_fit_phones(visit, pictures, width):
    for locale in ("zh-CN", "en-US"):
        page = visit(locale, width=width)
        box = page.locator("header .title").bounding_box()
        model = page.locator("#model").bounding_box()
        end = page.locator("#language").bounding_box()["x"]
        assert max(box["x"] + box["width"], model["x"] + model["width"]) <= end and model["width"] > 60
    drop(page, pictures[0])
    ask(page, "?")
    expect(bubble(page)).to_have_text(LONG)
    page.get_by_role("button", name="What it looked at").tap()
    page.locator(".heat").evaluate("heat => heat.scrollIntoView({ block: 'end' })")
    token, image = page.locator(".token").first, page.locator(".heat figure")
    expect(token).to_be_in_viewport()
    expect(image).to_be_in_viewport(ratio=0.5)
    header = page.locator("header").bounding_box()
    assert token.bounding_box()["y"] >= header["y"] + header["height"]  # not under it
    token.tap()
    expect(token).to_have_class("token shown")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_before_an_engine_the_page_shows_what_engines_tell(visit, app, pictures, tmp_path):
    animation = animated(tmp_path / "animation.gif", [Image.open(path) for path in pictures[:3]])
    with serving(app) as address, serving(create_app("--backend", f"{address}/v1")) as front:
        page = visit("en-US", at=front)
        expect(page.locator("#model")).to_have_text("64_vlm_sft")
        drop(page, pictures[0], animation)
        expect(page.locator("#thumbnails img")).to_have_count(2)
        with page.expect_request("**/completions") as request:
            ask(page, "?")
        body = request.value.post_data_json
        assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]
        assert "return_token_ids" not in body and "max_tokens" not in body
        expect(bubble(page)).to_have_text(LONG)
        expect(page.locator(".speed")).to_contain_text("tokens")
        expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)
        expect(page.get_by_role("button", name="What it looked at")).to_have_count(0)

        # stopped: nobody tells how many tokens there were
        page.get_by_role("button", name="Regenerate").click()
        expect(bubble(page)).to_contain_text("左上角")
        page.locator("#send-button").click()
        expect(page.locator(".speed")).to_have_text("stopped")

        # how many pictures it takes isn't known, which keeps nobody from drawing one
        page.locator("#draw").click()
        page.get_by_role("button", name="Use the drawing").click()
        expect(page.locator("#thumbnails img")).to_have_count(3)

        # the settings: the longest answer is the engine's, until the visitor sets it
        page.locator("#settings-button").click()
        limit = page.locator("label:has([name=max_tokens]) b")
        expect(limit).to_have_text("–")
        page.get_by_label("Max new tokens").fill("3")
        expect(limit).to_have_text("3")
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator(".speed")).to_contain_text(re.compile("^3 tokens"))


def test_waiting_visitors_see_how_many_are_ahead(visit):
    first, second = visit(), visit()
    ask(first, "?")
    expect(bubble(first)).to_contain_text("左")
    ask(second, "?")
    expect(second.locator(".tools")).to_have_text("前面还有 1 位，请稍候……")
    expect(bubble(second)).to_have_text(LONG, timeout=10_000)
