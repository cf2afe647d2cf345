"""Videos and animations: which of their frames are read, and that an answer about one is an answer about its frames."""

import base64
import io
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, animated, ask, picture_url, question, video
from PIL import Image

from dataset.demo.world import FRAMES
from model.errors import BadInput
from model.images import Preprocess, frame_indices, read_frames, to_pixels
from web_server import create_app


def shades(count, size=(64, 48)):
    """Plain grey pictures, each a little brighter than the one before, starting from black."""
    return [Image.new("RGB", size, (5 * i, 5 * i, 5 * i)) for i in range(count)]


def seen(path, most=8):
    """Which of `shades` the frames read from a file are, by their brightness."""
    return [round(frame.float().mean().item() / 5) for frame in read_frames(path, Preprocess(32), most)]


@pytest.mark.parametrize(
    "durations, most, expected",
    [
        ([1], 8, [0]),
        ([0.1] * 9, 1, [0]),
        ([0.1] * 3, 8, [0, 1, 2]),  # few frames of the same length: each once
        ([0.1] * 100, 4, [0, 33, 66, 99]),
        ([0.1] * 9, 4, [0, 3, 6, 8]),
        ([1.2, 0.6, 0.6], 8, [0, 0, 1, 2]),  # two equal frames that were written as one
        ([1.8, 0.6], 8, [0, 0, 0, 1]),
        ([1.2, 1.2], 8, [0, 0, 1, 1]),  # no step longer than a second
        ([1.2, 1.2], 3, [0, 1]),
        ([5, 5, 5, 5], 4, [0, 1, 2, 3]),
        ([0.033, 0.033, 0.034], 8, [0, 1, 2]),  # of a video in milliseconds
        ([3, *[0.1] * 10], 4, [0, 0, 0, 10]),
        ([*[0.1] * 10, 3], 4, [0, 10, 10, 10]),
        ([0.05, 0.3, 0.11], 4, [0, 1, 1, 2]),  # no equal steps
    ],
)
def test_frames_are_spread_evenly_in_time(durations, most, expected):
    starts = np.cumsum([0, *durations])
    assert frame_indices(starts[:-1], starts[-1], most) == expected


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_an_animation_with_equal_frames_is_its_pictures(tmp_path, name):
    """All but AVIF write equal frames once, with their durations added up."""
    for shown in ("0011", "0001", "0111", "0112", "0012", "0123"):
        pictures = [shades(13)[int(shade) * 4] for shade in shown]
        path = animated(tmp_path / name, pictures, duration=600)
        assert [shade // 4 for shade in seen(path)] == [int(shade) for shade in shown]
    # the last frame is seen most of the time
    path = animated(tmp_path / name, shades(6), duration=[100] * 5 + [2500])
    assert np.abs(np.array(seen(path, 4)) - [0, 5, 5, 5]).max() <= (1 if name == "a.avif" else 0)


def test_the_animations_of_the_repository_have_the_four_frames_that_were_drawn():
    """Two of the three were written with two frames."""
    for path in (ROOT / "dataset" / "eval_multi_images").glob("*.webp"):
        frames = read_frames(path, Preprocess(32), 8)
        changed = [not torch.equal(a, b) for a, b in itertools.pairwise(frames)]
        assert len(frames) == FRAMES and sum(changed) == (3 if "_move" in path.name else 1)


def test_an_apng_s_picture_for_other_programs_is_no_frame(tmp_path):
    first, *frames = shades(4)
    first.save(tmp_path / "a.png", save_all=True, append_images=frames, default_image=True)
    assert seen(tmp_path / "a.png") == [1, 2, 3]


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libx264")])
def test_a_video_of_a_variable_rate_is_read_by_time(tmp_path, name, codec):
    """As a recording of a screen: nothing moves for 3 s, then everything within one."""
    times = [0, *range(3000, 4000, 100)]
    path = video(tmp_path / name, shades(11), codec, times=times)
    assert np.abs(np.array(seen(path, 4)) - [0, 0, 0, 10]).max() <= 1
    path = video(tmp_path / name, shades(3), codec, times=[500, 533, 567])
    assert np.abs(np.array(seen(path)) - [0, 1, 2]).max() <= 1


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.mp4", "a.webm", "a.mov"])
def test_frames_of_every_kind_of_video_and_animation(tmp_path, name):
    path = tmp_path / name
    for count, most, expected in ((40, 4, [0, 13, 26, 39]), (3, 8, [0, 1, 2])):
        if name[-3:] in ("gif", "ebp", "png"):
            animated(path, shades(count))
        else:
            video(path, shades(count), "libvpx-vp9" if name == "a.webm" else "libx264")
        frames = read_frames(path, Preprocess(32), most)
        assert {tuple(frame.shape) for frame in frames} == {(3, 32, 32)}
        assert np.abs(np.array(seen(path, most)) - expected).max() <= 1  # video codecs change shades a little


def test_multipage_and_still_files_give_one_picture(tmp_path, pictures):
    tiff = animated(tmp_path / "pages.tiff", shades(5))
    assert seen(tiff) == [0]
    preprocess = Preprocess(64)
    with Image.open(pictures[0]) as image:
        assert (read_frames(pictures[0], preprocess, 8)[0] == to_pixels(image, preprocess)).all()
        assert len(read_frames(pictures[0], preprocess, 8)) == 1


def test_a_video_held_upright_is_seen_upright(tmp_path):
    picture = Image.new("RGB", (64, 48))
    picture.paste((255, 0, 0), (0, 0, 32, 48))  # the left half is red
    frame = read_frames(video(tmp_path / "a.mp4", [picture] * 3, "libx264", rotation=90), Preprocess(32), 1)[0]
    assert (
        frame[0, 24:].float().mean() > 200 and frame[0, :8].float().mean() < 60
    )  # rotated to the left: now the lower half is red


def test_unreadable_videos_are_reported(tmp_path, monkeypatch):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(video(tmp_path / "a.mp4", shades(9), "libx264").read_bytes()[:300])
    for path, says in (
        (broken, "broken.mp4 could not be read as a picture .Invalid data"),
        (tmp_path / "nowhere.webm", "nowhere.webm could not be read as a picture .No such file"),
        ("https://example.com/a.webm", "could not be read as a picture .it is a URL, and nothing is downloaded"),
        (Path("https://example.com/a.png"), "could not be read as a picture .it is a URL, and nothing is downloaded"),
    ):
        with pytest.raises(BadInput, match=says):
            read_frames(path, Preprocess(32), 8)
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    with pytest.raises(BadInput, match="to read videos, PyAV is needed: pip install av"):
        read_frames(tmp_path / "a.mp4", Preprocess(32), 8)


def test_an_answer_about_an_animation_equals_one_about_its_frames(chat, tmp_path):
    frames = [Image.new("RGB", (224, 224), colour) for colour in ("white", "black", "red")]
    animation = animated(tmp_path / "a.webp", frames)
    apart = []
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
        apart.append(tmp_path / f"{i}.png")
    greedy = {"temperature": 0, "max_new_tokens": 12}
    expected = "".join(chat.stream("动画里有什么变化？", apart, **greedy))
    assert "".join(chat.stream("动画里有什么变化？", chat.load_frames([animation]), **greedy)) == expected
    assert "".join(chat.stream("动画里有什么变化？", apart[::-1], **greedy)) != expected
    chat.max_frames = 2
    assert len(chat.load_frames([animation, *apart])) == 2 + 3


@pytest.fixture
def client(flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    return create_app(*flags, "--max_frames", "3").test_client()


def part(kind, url):
    return {"type": kind, kind: {"url": url}}


def data_url(path, type):
    return f"data:{type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_the_api_takes_videos_and_animations(client, pictures, tmp_path):
    frames = [Image.open(path) for path in pictures[:5]]
    animation = data_url(animated(tmp_path / "a.webp", frames), "image/webp")
    stills = [picture_url(frames[i]) for i in (0, 2, 4)]

    def asked(*parts):
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "动画里有什么变化？"}]}]
        return {"messages": messages, "max_tokens": 12, "return_token_ids": True}

    def answer(*parts):
        reply = ask(client, **asked(*parts))
        assert reply.status_code == 200, reply.get_json()
        return reply.get_json()["choices"][0]["message"]

    whole = answer(part("video_url", animation))
    assert whole == answer(*(part("image_url", still) for still in stills))
    first = answer(part("image_url", animation))
    assert first == answer(part("image_url", stills[0])) == answer(part("video_url", stills[0])) != whole

    body = {
        "messages": asked(part("image_url", stills[0]), part("video_url", animation))["messages"],
        "token_ids": [5, 6],
    }
    looked = client.post("/attention", json=body).get_json()
    assert np.array(looked["shares"]).shape[:3] == (2, 2, 4)
    assert looked["frames"][0] == [None] and len(looked["frames"][1]) == 3
    jpeg = Image.open(io.BytesIO(base64.b64decode(looked["frames"][1][1].partition(",")[2])))
    assert jpeg.size == (64, 64)
    small = np.asarray(frames[2].resize((64, 64), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(jpeg, dtype=float) - small).mean() < 6

    for suffix, type in ((".mp4", "video/mp4"), (".webm", "video/webm")):
        codec = "libx264" if suffix == ".mp4" else "libvpx-vp9"
        film = data_url(video(tmp_path / f"a{suffix}", shades(20), codec), type)
        assert answer(part("video_url", film))["content"]


def test_the_api_refuses_unreadable_videos(client, tmp_path, monkeypatch):
    monkeypatch.setattr("web.requests.MAX_VIDEO_PIXELS", 100_000)
    film = video(tmp_path / "a.mp4", shades(9), "libx264")
    long = video(tmp_path / "long.mp4", shades(50), "libx264")
    heavy = animated(tmp_path / "heavy.gif", shades(40))
    for one, says in (
        (part("image_url", data_url(film, "video/mp4")), "a video should be sent as video_url"),
        (part("video_url", "data:video/mp4;base64,AAAA"), "picture 1 can't be read: Invalid data"),
        (part("video_url", data_url(film, "video/x-msvideo")), "not a picture or video, or not in a supported format"),
        (part("video_url", data_url(long, "video/mp4")), "50 frames of 64x48, too many of this size: shorten it"),
        (part("video_url", data_url(heavy, "image/gif")), "it has 40 frames, too many of this size: shorten it"),
        (part("video_url", "http://example.com/a.mp4"), "only data: URLs are supported"),
    ):
        reply = ask(client, messages=[{"role": "user", "content": [one, {"type": "text", "text": "?"}]}])
        assert reply.status_code == 400 and says in reply.get_json()["error"]["message"], reply.get_json()
    assert ask(client, messages=question("颜色？"), max_tokens=2).status_code == 200
