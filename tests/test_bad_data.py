"""Records and pictures that can't be used, kind by kind, and what training does with them."""

import io
import json
import shutil
import struct
import sys
import zlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TORCHRUN, attempt, begin, digest, log_lines, losses, make_place, run_python, run_whole, until
from PIL import Image

from dataset.dataset import VLMDataset, collate
from dataset.source import Source
from model.conversation import tokenizer_fields
from model.errors import BadInput, BadRecord
from model.images import Preprocess, open_picture, read_pixels
from model.LMConfig import LMConfig

RED = (255, 0, 0)


def talk(*texts):
    """A conversation of alternating turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def red(mode):
    return Image.new("RGB", (40, 30), RED).convert(mode)


def bomb():
    """A PNG whose head promises 40,000 x 40,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def turned(path, *more):
    """White with red at the left, and EXIF to turn it so that the red is at the top; `more` of its entries."""
    image = Image.new("RGB", (40, 40), "white")
    image.paste(RED, (0, 0, 20, 40))
    entries = [struct.pack("<HHII", 0x0112, 3, 1, 6), *more]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    image.save(path, exif=exif, quality=95)


def turned_oddly(path):
    """The same, from a camera that wrote its resolution as a text."""
    turned(path, struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0"))


def seen_through(path):
    """Red in the upper half, and below it black that is fully transparent."""
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 40, 20))
    image.save(path)


def turned_while_loading(path):
    """The same as a TIFF, which Pillow turns itself."""
    turned(path.with_suffix(".jpg"))
    with Image.open(path.with_suffix(".jpg")) as image:
        image.convert("RGB").save(path, tiffinfo={274: 6})


def turned_grey(path):
    """Wide, uncompressed and grey: black at the left, and white."""
    image = Image.new("L", (60, 40), "white")
    image.paste(0, (0, 0, 30, 40))
    image.save(path, tiffinfo={274: 6})


def turned_by_its_box(path):
    """The same as an AVIF, which keeps the rotation in a box of its own."""
    turned(path.with_suffix(".jpg"))
    with Image.open(path.with_suffix(".jpg")) as image:
        image.save(path, exif=image.info["exif"], quality=100)


def deep_grey(path, bits):
    """200 of 255, in more bits."""
    shades = np.full((40, 40), round(200 / 255 * (2**bits - 1)), dtype=np.uint16)
    if bits == 16:
        return Image.fromarray(shades).save(path)
    if path.suffix == ".pgm":
        return path.write_bytes(b"P5 40 40 %d\n" % (2**bits - 1) + shades.astype(">u2").tobytes())
    # TIFF of 12 bits: two numbers in three bytes
    first, second = shades.reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    tags = {256: 40, 257: 40, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 40, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    end = struct.pack("<H", len(tags)) + entries + bytes(4)
    return path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + end)


def grey_of_unknown_range(path, mode):
    Image.new("F", (40, 30), 0.5).convert(mode).save(path)


def deep(path):
    shades = np.full((40, 40), 200 * 257, dtype=np.uint16)
    Image.fromarray(shades).save(path)


USED = {  # how a picture is made, and what is seen in the middle of its upper and of its lower half
    "cmyk.jpg": (lambda path: red("CMYK").save(path, quality=95), RED, RED),
    "palette.png": (lambda path: red("P").save(path), RED, RED),
    "grey.jpg": (lambda path: Image.new("L", (40, 40), 90).save(path), (90,) * 3, (90,) * 3),
    "deep.png": (deep, (200,) * 3, (200,) * 3),
    "deep.tiff": (lambda path: deep_grey(path, 16), (200,) * 3, (200,) * 3),
    "deep_12.tiff": (lambda path: deep_grey(path, 12), (200,) * 3, (200,) * 3),
    "deep.pgm": (lambda path: deep_grey(path, 16), (200,) * 3, (200,) * 3),
    "deep_10.pgm": (lambda path: deep_grey(path, 10), (200,) * 3, (200,) * 3),
    "deep.jp2": (lambda path: deep_grey(path, 16), (200,) * 3, (200,) * 3),
    "red.avif": (lambda path: red("RGB").save(path, quality=100), RED, RED),
    "red.ico": (lambda path: red("RGB").save(path), RED, RED),
    "alpha.png": (seen_through, RED, (255,) * 3),
    "turned.jpg": (turned, RED, (255,) * 3),
    "turned_oddly.jpg": (turned_oddly, RED, (255,) * 3),
    "turned_while_loading.tiff": (turned_while_loading, RED, (255,) * 3),
    "turned_grey.tiff": (turned_grey, (0,) * 3, (255,) * 3),
    "turned_by_its_box.avif": (turned_by_its_box, RED, (255,) * 3),
    "moving.gif": (
        lambda path: red("RGB").save(path, save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")]),
        RED,
        RED,
    ),
}
LEFT_OUT = {  # how a file is made, and the reason that is counted
    "missing.jpg": (lambda path: None, "picture missing"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "picture unreadable"),
    "cut.jpg": (
        lambda path: (red("RGB").resize((400, 300)).save(path), path.write_bytes(path.read_bytes()[:700])),
        "picture unreadable",
    ),
    "text.jpg": (lambda path: path.write_text("<html>404</html>"), "picture unreadable"),
    "bomb.png": (lambda path: path.write_bytes(bomb()), "picture unreadable"),
    "floats.tiff": (lambda path: grey_of_unknown_range(path, "F"), "picture unreadable"),
    "numbers.tiff": (lambda path: grey_of_unknown_range(path, "I"), "picture unreadable"),
    "folder.jpg": (lambda path: path.mkdir(), "picture unreadable"),
    "clip.mp4": (lambda path: path.write_bytes(b"\0\0\0\x18ftypmp42"), "picture unreadable"),
}
WRONG = {  # record -> the reason that is counted, and what the message says
    "not an object": (5, "wrong shape", "expected an object with 'image' (names) and 'conversations'"),
    "no conversation": ({"image": "a.png"}, "wrong shape", "expected an object"),
    "empty conversation": ({"image": "", "conversations": []}, "wrong shape", "expected an object"),
    "a number for a name": ({"image": [5], "conversations": talk("<image>", "x")}, "wrong shape", "'image' (names)"),
    "half a character": ({"image": "", "conversations": talk("?", "\ud83d")}, "wrong shape", "half a character"),
    "half a character in a name": (
        {"image": "\ud83d.png", "conversations": talk("<image>", "x")},
        "wrong shape",
        "half a character",
    ),
    "half a character in a role": (
        {"image": "", "conversations": [{"role": "\ud83d", "content": "?"}]},
        "wrong shape",
        'not {"role": "\\ud83d"',
    ),
    "half a character in another form": ({"image": "", "talk": "\ud83d"}, "wrong shape", '"talk": "\\ud83d"'),
    "foreign role": (
        {"image": "", "conversations": [{"role": "cat", "content": "?"}]},
        "wrong shape",
        "expected a turn with a role (user, ",
    ),
    "no text": (
        {"image": "", "conversations": [{"role": "user", "content": None}]},
        "wrong shape",
        "and text as its content",
    ),
    "empty answer": (
        {"image": "a.png", "conversations": talk("<image>", " ")},
        "no answer",
        "no assistant turn has any text",
    ),
    "question alone": ({"image": "", "conversations": talk("?")}, "unpaired turns", "should take turns, not user"),
    "two questions": (
        {"image": "", "conversations": [*talk("?"), *talk("?", "x")]},
        "unpaired turns",
        "not user, user, assistant",
    ),
    "answer first": ({"image": "", "conversations": talk("?", "x")[::-1]}, "unpaired turns", "not assistant, user"),
    "too few pictures": (
        {"image": "a.png", "conversations": talk("<image><image>", "x")},
        "images and <image> differ",
        "1 images, but 2 <image>",
    ),
    "too many pictures": (
        {"image": "a.png, a.png", "conversations": talk("<image>", "x")},
        "images and <image> differ",
        "2 images, but 1 <image>",
    ),
    "a URL": (
        {"image": "https://example.com/a,b.jpg", "conversations": talk("<image>", "x")},
        "picture is a URL",
        "the picture 'https://example.com/a' is a URL, and nothing is downloaded: save the file",
    ),
    "a picture as text": (
        {"image": "data:image/png;base64,AAAA", "conversations": talk("<image>", "x")},
        "picture is a URL",
        "is a URL, and nothing is downloaded",
    ),
    "a comma in a name": (
        {"image": "a,b.png", "conversations": talk("<image>", "x")},
        "images and <image> differ",
        "a comma separates names, so put a name that has one into a list",
    ),
    "answer truncated": (
        {"image": "", "conversations": talk("圆" * 600, "x")},
        "answer beyond --max_seq_len",
        "its answers lie beyond --max_seq_len 512",
    ),
}


def load(folder, records, tokenizer, **strictness):
    red("RGB").save(folder / "a.png")
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    config = LMConfig(**tokenizer_fields(tokenizer))
    return VLMDataset(folder / "data.json", folder, tokenizer, config, 512, Preprocess(32), **strictness)


@pytest.mark.parametrize("name", USED)
def test_odd_pictures_are_used_properly(tmp_path, tokenizer, name):
    make, upper, lower = USED[name]
    make(tmp_path / name)
    item = load(tmp_path, [{"image": name, "conversations": talk("<image>", "x")}], tokenizer)[0]
    assert item["problems"] == []
    for row, colour in ((8, upper), (24, lower)):
        assert item["pixel_values"][0][:, row, 16].tolist() == pytest.approx(colour, abs=4)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_bad_pictures_are_replaced_and_reported(tmp_path, tokenizer, name):
    make, reason = LEFT_OUT[name]
    make(tmp_path / name)
    records = [{"image": picture, "conversations": talk("<image>", "x")} for picture in (name, "a.png", "a.png")]
    dataset = load(tmp_path, records, tokenizer)
    batch = collate([dataset[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 32, 32) and (batch["pixel_values"][0, 0] == 255).all()
    ((problem, number),) = batch["problems"]
    assert isinstance(problem, BadRecord) and (problem.reason, number) == (reason, 0)
    assert str(tmp_path / name) in str(problem) and "replace it or leave it out" in str(problem)


def test_grey_of_an_unknown_range_is_refused_by_name(tmp_path):
    for mode, says in (("F", "its grey values are floats"), ("I", "its grey values are 32-bit or signed numbers")):
        grey_of_unknown_range(tmp_path / "a.tiff", mode)
        with pytest.raises(BadRecord, match=f"a.tiff .*{says}, .* save it with 8 or 16 bits"):
            read_pixels(tmp_path / "a.tiff", Preprocess(32))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_a_phone_s_heic_is_named_and_read_where_pillow_heif_is(tmp_path, monkeypatch):
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(HEIC)
    sources = path, io.BytesIO(HEIC)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    for source in sources:
        with pytest.raises(ValueError, match="an iPhone's HEIC: pip install pillow-heif, or save it as JPEG"):
            open_picture(source)
    with pytest.raises(BadRecord, match="IMG_0001.HEIC could not be read as a picture .an iPhone's HEIC: pip install"):
        read_pixels(path, Preprocess(32))

    # stands for pillow-heif: any picture is red
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    register = partial(Image.register_open, "HEIF", lambda fp, name: red("RGB"), lambda prefix: prefix[4:8] == b"ftyp")
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    for source in sources:
        assert open_picture(source, formats=["JPEG"]).getpixel((0, 0)) == RED
    assert read_pixels(path, Preprocess(32))[:, 16, 16].tolist() == list(RED)


@pytest.mark.parametrize("name", ["x" * 300 + ".jpg", "a\0b.jpg", "a" * 5000, "x" * 300 + "/a.jpg"])
def test_names_that_no_file_can_have(tmp_path, tokenizer, name):
    records = [{"image": picture, "conversations": talk("<image>", "x")} for picture in (name, "a.png")]
    dataset = load(tmp_path, records, tokenizer)
    ((problem, number),) = dataset[0]["problems"]
    assert (problem.reason, number) == ("picture unreadable", 0) and len(str(problem)) < 400
    assert len([*dataset.fingerprints()]) == 2  # what a feature cache asks for


@pytest.mark.parametrize("name", WRONG)
def test_wrong_records_are_left_out_and_counted(tmp_path, tokenizer, name):
    wrong, reason, says = WRONG[name]
    good = {"image": "a.png", "conversations": talk("<image>", "x")}
    messages = []
    dataset = load(
        tmp_path, [good, wrong, wrong, good], tokenizer, strict=False, max_fraction=0.5, notify=messages.append
    )
    assert len(dataset) == 2 and dataset.problems.by_reason == {reason: {1, 2}}
    (line,) = messages  # one per reason, about the first
    assert "data.json, record 1: " in line and says in line and line.encode()
    with pytest.raises(BadInput, match="record 1"):
        load(tmp_path, [good, wrong], tokenizer, strict=True)
    with pytest.raises(BadInput, match=f"2 records skipped .2 {reason}., over --max_bad_fraction 0.4 of 4"):
        load(tmp_path, [good, wrong, wrong, good], tokenizer, strict=False, max_fraction=0.4)


def test_the_fraction_is_of_the_whole_file(tmp_path, tokenizer):
    """The bad records may all stand in one part of the file."""
    records = [{"image": "a.png", "conversations": talk("<image>", "x")}] * 9000
    records[5000:5400] = [5] * 400
    dataset = load(tmp_path, records, tokenizer, strict=False, max_fraction=0.05)
    assert dataset.problems.count == 400 and dataset.problems.total == 9000


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "is empty"),
        (b"hello", "begins with 'hello'"),
        (b"[]", "is an empty list"),
        (b'[{"a": 1}, {"a": 2}, {"a": oops}]', "record 2, is not valid JSON (Expecting value near 'oops"),
        (b'[{"a": 1} {"a": 2}]', "record 1, is not valid JSON (Expecting ',' or ']'"),
        (b'[{"a": 1}, {"a": "xy', "record 1, is not valid JSON"),
        (b'[{"a": 1}, {"a": 2}', "record 2, is not valid JSON"),
        (b'[{"a": 1}, ' + b"[" * 100000, "record 1, is not valid JSON (maximum recursion depth"),
        (b'[{"a": "\xff\xfe"}]', "is not UTF-8 text"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_list_of_records(tmp_path, content, says):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(BadInput) as error:
        list(Source(path, tmp_path).records())
    assert str(path) in str(error.value) and says in str(error.value)


def test_records_come_whole_out_of_a_file_read_in_parts(tmp_path, monkeypatch):
    records = [{"text": "字" * (i % 50), "numbers": [i, {"]": "[, "}]} for i in range(300)]
    path = tmp_path / "data.json"
    for indent in (None, 1):
        path.write_text("\ufeff \n" + json.dumps(records, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
        for size in (3, 7, 100, 10**6):
            monkeypatch.setattr("dataset.source.CHUNK", size)
            assert [record for _, record in Source(path, tmp_path).records()] == records


# --- in a training --------------------------------------------------------------------------------------------------


def spoil(place, folder):
    """The same place with a data file of its own, in which 1 of 47 records has no answer and 2 have a bad picture."""
    records = json.loads((place.world / "pretrain.json").read_text(encoding="utf-8"))
    shutil.copytree(place.world / "images", folder / "images")
    records.pop()  # so that the good ones can be dealt to two processes
    records[10]["conversations"].pop()
    records[20]["image"] = "nowhere.jpg"
    (folder / "images" / records[30]["image"]).write_bytes(b"")
    place.world = folder
    (folder / "pretrain.json").write_text(json.dumps(records), encoding="utf-8")
    return place


@pytest.fixture
def spoilt(place, tmp_path):
    return spoil(place, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world, tokenizer):
    """A spoilt place in which a training has gone on to its end; what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    place = spoil(make_place(folder, world, tokenizer), folder)
    return place, run_whole(place, *ALLOWED)


COUNTED = {"unpaired turns": 1, "picture missing": 1, "picture unreadable": 1}
ALLOWED = ["--max_bad_fraction", 0.1]


def test_training_continues_and_counts(undisturbed):
    place, text = undisturbed
    assert len(losses(place)) == 18  # 46 of 47 records, in batches of 8, 3 epochs
    assert text.count("skipping this record, and others like it: ") == 3  # once each, not once an epoch
    for says in (
        "record 10: user and assistant",
        "nowhere.jpg could not be read",
        "picture (not a known picture format",
    ):
        assert says in text
    assert "3 records skipped (1 unpaired turns, 1 picture " in text
    assert log_lines(place)[-1]["left_out"] == COUNTED


def test_in_workers_processes_and_from_a_cache_it_counts_the_same(spoilt, undisturbed):
    alone = losses(undisturbed[0])
    for flags, launcher in (
        (["--num_workers", 2], ()),
        (["--batch_size", 4], [*TORCHRUN, "--nproc_per_node", 2]),
        (["--cache_features"], ()),
    ):
        (spoilt.out / "64_vlm_pretrain.jsonl").unlink(missing_ok=True)
        text = run_whole(spoilt, *ALLOWED, *flags, launcher=launcher)
        assert log_lines(spoilt)[-1]["left_out"] == COUNTED, text
        assert losses(spoilt) == pytest.approx(alone, abs=1e-3 if "--cache_features" in flags else 1e-5)


def test_resumed_among_bad_records_it_is_as_if_nothing_had_happened(spoilt, undisturbed):
    place, _ = undisturbed
    process = begin(spoilt, *ALLOWED)
    until(process, 11)
    process.kill()
    process.wait()
    run_whole(spoilt, *ALLOWED, "--resume")
    assert (losses(spoilt), digest(spoilt)) == (losses(place), digest(place))
    assert log_lines(spoilt)[-1]["left_out"] == COUNTED


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--strict"], "record 10: user and assistant should take turns"),
        (["--max_bad_fraction", 0.05], "3 records skipped (1 unpaired turns, "),
    ],
)
def test_too_much_is_too_much(spoilt, flags, says):
    code, text = attempt(spoilt, *flags)
    assert code == 1 and f"error: {says}" in text.replace(f"{spoilt.world}/pretrain.json, ", "")
    assert "Traceback" not in text


def test_a_file_is_checked_beforehand(spoilt):
    flags = ["--images_path", spoilt.world / "images", "--tokenizer_path", "model/demo"]
    code, out, err = run_python("-m", "dataset.check", spoilt.world / "pretrain.json", *flags)
    assert code == 1 and "Traceback" not in err
    assert "47 records, 44 can be used" in out and "100%" in err
    for reason, count in COUNTED.items():
        assert f"{count} skipped: {reason}" in out
    assert sum(int(line.split()[3]) for line in out.splitlines() if " to " in line and "#" in line) == 46
    nothing = spoilt.world / "nothing.json"
    nothing.write_text(json.dumps([record for record, *_ in WRONG.values() if record != WRONG["answer truncated"][0]]))
    code, out, err = run_python("-m", "dataset.check", nothing, *flags)
    assert code == 1 and f"{len(WRONG) - 1} records, 0 can be used\n" in out and "skipped: wrong shape" in out
    assert "max_seq_len" not in out + err and "Traceback" not in err
    good = spoilt.world / "good.json"
    good.write_text(json.dumps(json.loads((spoilt.world / "pretrain.json").read_text())[:10]))
    code, out, err = run_python("-m", "dataset.check", good, *flags)
    assert code == 0 and "10 records, 10 can be used" in out
    code, out, err = run_python("-m", "dataset.check", good, *flags, "--max_seq_len", 80)
    assert "records are truncated" in out
