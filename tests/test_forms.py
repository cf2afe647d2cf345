"""The forms in which data come: each read to the same samples, trained on, resumed, checked, scored and cached; and bad files."""

import io
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import TORCHRUN, begin, digest, losses, run_python, run_whole, until
from PIL import Image

from dataset import dataset as dataset_module
from dataset.dataset import VLMDataset
from dataset.pictures import PictureArchive
from dataset.source import Source
from model.conversation import tokenizer_fields
from model.errors import BadInput, BadRecord
from model.images import Preprocess
from model.LMConfig import LMConfig

SOME = {"strict": False, "max_fraction": 1.0, "notify": lambda message: None}


@pytest.fixture(scope="module")
def records(world):
    """Records of one, two and no pictures, with `<image>` at the front, as every form can hold them."""
    found = json.loads((world / "pretrain.json").read_text(encoding="utf-8"))[:24]
    for i, record in enumerate(found):
        names = [record["image"], found[0]["image"]][: (1, 2, 0)[i % 3]]
        question = record["conversations"][0]["content"].replace("<image>", "").strip()
        record["image"] = ", ".join(names)
        record["conversations"][0]["content"] = "<image>\n" * len(names) + question
        record["kind"] = "colour"
    return found


# --- each form, as it is published ----------------------------------------------------------------------------------


def save_json(path, records, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


def save_parquet(path, columns, types, row_group_size=10):
    """columns: {name: values}; types: {name: Arrow type} of those that need one, as of empty lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pyarrow.array(values, types.get(name)) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), path, row_group_size=row_group_size)
    return path


def names_of(record):
    return [name for name in record["image"].split(", ") if name]


def bytes_of(record, images):
    return [(images / name).read_bytes() for name in names_of(record)]


def black():
    """What text-only rows of MiniMind-3v's data carry."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


def structs_of(record, images):
    return [{"bytes": picture, "path": None} for picture in bytes_of(record, images)]


def from_value(record):
    """A record with LLaVA's keys."""
    keys = {"user": "human", "assistant": "gpt"}
    return [{"from": keys[turn["role"]], "value": turn["content"]} for turn in record["conversations"]]


def json_list(records, images, folder):
    return save_json(folder / "data.json", records), images


def json_lines(records, images, folder):
    """MiniMind2-V's of 2025-02: no id."""
    return save_json(folder / "data.jsonl", records, lines=True), images


def llava(records, images, folder):
    """LLaVA's lists: ids, from/value, paths of COCO 2017, and text-only records without `image`."""
    rows = []
    for i, record in enumerate(records):
        names = ", ".join(f"coco/train2017/{name}" for name in names_of(record))
        rows.append({"id": f"{i:09d}", **({"image": names} if names else {}), "conversations": from_value(record)})
    shutil.copytree(images, folder / "coco" / "train2017")
    return save_json(folder / "llava_instruct_150k.json", rows), folder


def llava_in_a_flat_folder(records, images, folder):
    data, _ = llava(records, images, folder)
    return data, folder / "coco" / "train2017"


def coco_prefixed(records, images, folder):
    """llava_instruct_230k.json and the files of COCO 2014, one folder further down."""
    (folder / "train2014").mkdir()
    for picture in images.iterdir():
        shutil.copy(picture, folder / "train2014" / f"COCO_train2014_{picture.name}")
    return save_json(folder / "data.json", records), folder


def chat_with_lists_of_names(records, images, folder):
    """LLaMA-Factory's and ms-swift's JSON: messages, and a list of files."""
    rows = [{"messages": record["conversations"], "images": names_of(record)} for record in records]
    return save_json(folder / "data.json", rows), images


def zipped(records, images, folder, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(folder / "images.zip", "w", method) as archive:
        archive.mkdir("images")
        for picture in sorted(images.iterdir()):
            archive.write(picture, f"images/{picture.name}")
    return save_json(folder / "chat.json", records), folder / "images.zip"


def zipped_as_they_are(records, images, folder):
    return zipped(records, images, folder, zipfile.ZIP_STORED)


def tarred(records, images, folder):
    with tarfile.open(folder / "images.tar", "w") as archive:
        archive.add(images, "./train2017")
    rows = [{**r, "image": [f"coco/train2017/{name}" for name in names_of(r)]} for r in records]
    return save_json(folder / "chat.jsonl", rows, lines=True), folder / "images.tar"


def parquet_of_2025_12(records, images, folder):
    """`conversations` is JSON text, `image_bytes` one picture; several aren't in this form, so a list as of 2026-02."""
    columns = {
        "conversations": [json.dumps(record["conversations"]) for record in records],
        "image_bytes": [bytes_of(record, images) for record in records],
        "image_names": [record["image"] for record in records],
    }
    types = {"image_bytes": pyarrow.list_(pyarrow.binary())}
    return save_parquet(folder / "pretrain_i2t.parquet", columns, types), folder / "nowhere"


def parquet_shards(records, images, folder):
    """Hugging Face's chat form in three shards: `messages` and `images`; text-only rows have none."""
    for i in range(3):
        part = records[i * 10 : (i + 1) * 10]
        columns = {
            "messages": [record["conversations"] for record in part],
            "images": [structs_of(record, images) for record in part],
            "kind": [record["kind"] for record in part],
        }
        picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        save_parquet(folder / f"data/train-{i:05d}-of-00003.parquet", columns, {"images": pyarrow.list_(picture)}, 3)
    return folder / "data", folder / "nowhere"


def parquet_in_parts(records, images, folder):
    """Messages whose content is a list of parts, as for transformers' chat templates."""
    messages = []
    for record in records:
        question, *rest = record["conversations"]
        text = question["content"].replace("<image>\n", "")
        parts = [{"type": "image", "text": None}] * len(names_of(record)) + [{"type": "text", "text": text}]
        answers = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in rest]
        messages.append([{"role": "user", "content": parts}, *answers])
    columns = {"messages": messages, "images": [bytes_of(record, images) for record in records]}
    return save_parquet(folder / "data.parquet", columns, {"images": pyarrow.list_(pyarrow.binary())}), folder / "no"


def cauldron(records, images, folder):
    """`texts` with question and answer in one, no `<image>`."""
    texts = []
    for record in records:
        contents = [turn["content"].replace("<image>\n", "") for turn in record["conversations"]]
        pairs = zip(contents[::2], contents[1::2], strict=True)
        texts.append([{"user": user, "assistant": assistant, "source": "x"} for user, assistant in pairs])
    columns = {"texts": texts, "images": [structs_of(record, images) for record in records]}
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return save_parquet(folder / "ai2d.parquet", columns, {"images": pyarrow.list_(picture)}), folder / "nowhere"


def parquet_with_names(records, images, folder):
    """Pictures beside the Parquet file, and structs of turns with LLaVA's keys."""
    columns = {"conversations": [from_value(r) for r in records], "image": [r["image"] for r in records]}
    return save_parquet(folder / "data.parquet", columns, {}), images


def a_mixture(records, images, folder):
    """A Parquet file with pictures inside, and a JSON list whose pictures are in a zip."""
    parquet, _ = parquet_of_2025_12(records[:11], images, folder)
    data, archive = zipped(records[11:], images, folder)
    return [parquet, data], archive


FORMS = [
    json_list,
    json_lines,
    llava,
    llava_in_a_flat_folder,
    coco_prefixed,
    chat_with_lists_of_names,
    zipped,
    zipped_as_they_are,
    tarred,
    parquet_of_2025_12,
    parquet_shards,
    parquet_in_parts,
    cauldron,
    parquet_with_names,
    a_mixture,
]


def load(data, images, tokenizer, out_dir, **strictness):
    config = LMConfig(**tokenizer_fields(tokenizer))
    return VLMDataset(data, images, tokenizer, config, 512, Preprocess(32), out_dir, **strictness)


def items(dataset):
    return [dataset[i] for i in range(len(dataset))]


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a["input_ids"], b["input_ids"])
        and np.array_equal(a["labels"], b["labels"])
        and len(a["pixel_values"]) == len(b["pixel_values"])
        and all(map(torch.equal, a["pixel_values"], b["pixel_values"]))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_same_records_in_every_form_are_the_same_samples(form, records, world, tokenizer, tmp_path):
    plain = load(save_json(tmp_path / "plain.json", records), world / "images", tokenizer, None)
    assert sorted({len(item["pixel_values"]) for item in items(plain)}) == [0, 1, 2]
    (tmp_path / "form").mkdir()
    data, images = form(records, world / "images", tmp_path / "form")
    for _ in range(2):  # the second time from what was kept
        found = load(data, images, tokenizer, tmp_path / "out")
        assert same(items(plain), items(found))
        assert "24 records, 24 usable, 8 of them text only" in found.describe()
    assert len({*found.fingerprints()}) == len(found.image_names)


@pytest.mark.parametrize("form", [json_lines, zipped, parquet_shards], ids=lambda form: form.__name__)
def test_a_form_is_trained_on_resumed_shared_cached_checked_and_scored(form, records, world, place, tmp_path):
    """As a JSON list is, to the last digit."""
    flags = ["--val_fraction", 1 / 3, "--data_path", save_json(tmp_path / "plain.json", records)]
    flags += ["--images_path", world / "images"]
    text = run_whole(place, *flags)
    plain = losses(place), digest(place)
    assert len(plain[0]) == 6 and f"data: {tmp_path / 'plain.json'} (JSON list): 24 records" in text

    (tmp_path / "form").mkdir()
    data, images = form(records, world / "images", tmp_path / "form")
    flags = ["--val_fraction", 1 / 3, "--data_path", data, "--images_path", images]
    run_whole(place, *flags, "--num_workers", 2)
    assert (losses(place), digest(place)) == plain
    run_whole(place, *flags, "--cache_features")
    assert losses(place) == pytest.approx(plain[0], abs=1e-3)

    # killed between two saves, and resumed
    process = begin(place, *flags)
    until(process, 4)
    process.kill()
    process.wait()
    assert "resuming after step 3 of 6" in run_whole(place, *flags, "--resume")
    assert (losses(place), digest(place)) == plain

    # in two processes, of which one reads the files
    shutil.rmtree(place.out / "data")
    text = run_whole(place, *flags, "--batch_size", 4, launcher=[*TORCHRUN, "--nproc_per_node", 2])
    assert losses(place) == pytest.approx(plain[0], abs=1e-5) and text.count("data: ") == 1

    # checked, and scored: those of one picture
    where = ["--tokenizer_path", "model/demo", "--out_dir", place.out, "--images_path"]
    code, out, err = run_python("-m", "dataset.check", data, *where, images)
    assert code == 0 and "24 records, 24 can be used" in out, err
    (tmp_path / "alike").mkdir()
    data, images = form(records[::3], world / "images", tmp_path / "alike")
    weights = ["--weights", place.out / "64_vlm_pretrain.pth", "--images_path", images]
    code, out, err = run_python("3-eval_chat.py", *place.model, *weights, "--score", data)
    assert code == 0 and f"{'all':<12}{8:>10}" in out, err


# --- what is odd in them ----------------------------------------------------------------------------------------------


def one_row(folder, conversations, pictures):
    """A Parquet file of one row in MiniMind-3v's form."""
    columns = {"conversations": [conversations and json.dumps(conversations)], "image_bytes": [pictures]}
    types = {"conversations": pyarrow.string(), "image_bytes": pyarrow.list_(pyarrow.binary())}
    return save_parquet(folder / "row.parquet", columns, types)


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def red(size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


def test_a_black_picture_that_no_text_mentions_stands_for_none(tokenizer, tmp_path):
    found = load(one_row(tmp_path, talk("?", "x"), [black()]), tmp_path / "no", tokenizer, tmp_path / "out")
    assert found[0]["pixel_values"] == [] and "1 usable, 1 of them text only" in found.describe()


@pytest.mark.parametrize(
    "conversations, pictures, reason",
    [
        (talk("<image>" * 3, "x"), [red(), red()], "images and <image> differ"),
        (talk("?", "x"), [red()], "images and <image> differ"),
        (talk("?", "x"), [red((8, 8))], "images and <image> differ"),
        ([{"role": "system", "content": "<image>"}, *talk("<image>", "x")], [red()], "images and <image> differ"),
        (talk("<image>", ""), [red()], "no answer"),
        (talk("<image>", "x"), [b""], "picture unreadable"),
        (talk("<image>", "x"), [b"no picture"], "picture unreadable"),
        ("talk", [red()], "wrong shape"),
        (None, [red()], "wrong shape"),
        ([{"role": "tool", "content": "<image>"}], [red()], "wrong shape"),
    ],
)
def test_known_faults_of_published_sets_are_counted(conversations, pictures, reason, tokenizer, tmp_path):
    good = save_json(tmp_path / "good.json", [{"conversations": talk("?", "x")}])
    row = one_row(tmp_path, conversations, pictures)
    found = load([row, good], tmp_path / "no", tokenizer, tmp_path / "out", **SOME)
    for index in range(len(found)):
        for problem, number in found[index]["problems"]:
            found.problems.add(problem, number)
    assert {name: len(numbers) for name, numbers in found.problems.by_reason.items()} == {reason: 1}
    assert f"{row}, row 0" in found.problems.examples[reason][0]


def test_a_line_that_is_not_json_is_counted(tokenizer, tmp_path):
    (tmp_path / "data.jsonl").write_text(f"{json.dumps({'conversations': talk('?', 'x')})}\n\n{{'image': 1}}\n")
    found = load(tmp_path / "data.jsonl", tmp_path, tokenizer, None, **SOME)
    assert len(found) == 1 and "data.jsonl, line 3: not valid JSON (" in found.problems.examples["not valid JSON"][0]


def test_parts_of_characters_are_counted(tokenizer, tmp_path):
    """The demo's tokenizer knows no emoji: four bytes, four tokens, and beside them the end of the answer."""
    path = save_json(tmp_path / "data.json", [{"conversations": talk("?", "\U0001f600")}])
    found = load(path, tmp_path, tokenizer, tmp_path / "out")
    assert (
        found.num_partial == 4 and "5 of them in answers, 80.0% of them only parts of a character" in found.describe()
    )
    assert "\nwarning: the tokenizer doesn't know many characters" in found.describe()
    answer = "\U0001f600" + "红色" * 8  # below a third
    path = save_json(tmp_path / "data.json", [{"conversations": talk("?", answer)}])
    found = load(path, tmp_path, tokenizer, tmp_path / "out")
    assert "30.8% of them only" in found.describe() and "warning" not in found.describe()


def test_parts_of_other_types(tokenizer, tmp_path):
    """Pictures named within their part; a part of an unknown type, or a text that is none, is counted."""
    (tmp_path / "a.png").write_bytes(red())
    good = ({"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "image": "a.png"})
    bad = ({"type": "video", "video": "a.mp4"}, {"type": "text", "text": 5})
    rows = [
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, *talk("?", "x")[1:]]}
        for part in (*good, *bad)
    ]
    found = load(save_json(tmp_path / "data.json", rows), tmp_path, tokenizer, None, **SOME)
    assert [len(item["pixel_values"]) for item in items(found)] == [1, 1]
    assert found.problems.by_reason == {"wrong shape": {2, 3}}


def test_a_name_never_means_a_picture_of_another_record(tokenizer, tmp_path):
    """`train/1.png` and `val/1.png` with only one of their folders there: neither is looked for as `1.png`."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.png").write_bytes(red())
    rows = [{"image": name, "conversations": talk("<image>", "x")} for name in ("train/1.png", "val/1.png")]
    alone = load(save_json(tmp_path / "alone.json", rows[:1]), tmp_path / "train", tokenizer, None)
    assert alone.read_pixels(0).shape == (3, 32, 32)
    both = load(save_json(tmp_path / "both.json", rows), tmp_path / "train", tokenizer, None)
    for row in range(2):
        with pytest.raises(BadRecord, match="No such file"):
            both.read_pixels(row)


# --- the second start -------------------------------------------------------------------------------------------------


def test_what_was_read_is_kept_until_something_changes(records, world, tokenizer, tmp_path, monkeypatch):
    data = save_json(tmp_path / "data.json", [*records, {"conversations": talk("?")}])
    times, encode = [], dataset_module.encode_source
    monkeypatch.setattr(dataset_module, "encode_source", lambda *args: times.append(1) or encode(*args))
    told = []
    strictness = {**SOME, "notify": told.append}

    def read(max_seq_len=512):
        config = LMConfig(**tokenizer_fields(tokenizer))
        found = VLMDataset(
            data, world / "images", tokenizer, config, max_seq_len, Preprocess(32), tmp_path / "out", **strictness
        )
        return found, len(times)

    first, _ = read()
    second, count = read()
    assert count == 1 and same(items(first), items(second))
    assert first.problems.by_reason == second.problems.by_reason == {"unpaired turns": {24}}
    assert told[0] == told[1] and "record 24: user and assistant should take turns" in told[0]

    # what allowed a bad record then may not allow it now
    with pytest.raises(BadInput, match="record 24: user and assistant should take turns"):
        load(data, world / "images", tokenizer, tmp_path / "out", strict=True)

    assert read(256)[1] == 2
    assert read()[1] == 3
    save_json(data, records)
    assert read()[1] == 4
    (kept,) = (tmp_path / "out" / "data").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    assert same(items(read()[0]), items(first)) and len(times) == 5


def test_a_damaged_arrow_file_is_made_again_and_old_ones_go(tokenizer, tmp_path):
    row = row_file(tmp_path)
    for change in (None, b"", b"ARROW1", None):
        found = load(row, None, tokenizer, tmp_path / "out")
        assert found.read_pixels(0).shape == (3, 32, 32)
        (arrow,) = (tmp_path / "out" / "data").glob("*.arrow")
        if change is not None:
            arrow.write_bytes(change)
    row = one_row(tmp_path, talk("<image>", "changed"), [red()])
    load(row, None, tokenizer, tmp_path / "out")
    assert len([*(tmp_path / "out" / "data").glob("*.arrow")]) == 1


# --- files that can't be read -----------------------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])
    return path


def with_bytes_changed(path, begin=4, count=400):
    content = bytearray(path.read_bytes())
    content[begin : begin + count] = bytes(255 - byte for byte in content[begin : begin + count])
    path.write_bytes(content)
    return path


def row_file(folder):
    return one_row(folder, talk("<image>", "x"), [red()])


def shards(folder, *numbers, name="train"):
    for number in numbers:
        save_parquet(folder / f"{name}-{number:05d}-of-00003.parquet", {"messages": [talk("?", "x")]}, {})
    return folder


def save_text(path, text):
    path.write_text(text, encoding="utf-8")
    return path


BAD_FILES = {  # how a file is made, and what is said of it
    "truncated Parquet": (lambda f: truncated(row_file(f)), "row.parquet is damaged, or not a Parquet file"),
    "damaged Parquet": (lambda f: with_bytes_changed(row_file(f)), "row.parquet is damaged"),
    "other columns": (
        lambda f: save_parquet(f / "x.parquet", {"url": ["a"], "text": ["b"]}, {}),
        "x.parquet has the columns url, text, but none of conversations, messages, texts",
    ),
    "a shard missing": (lambda f: shards(f, 0, 2), "has 2 of the 3 shards train-*; missing: 00001: download it"),
    "two sets": (
        lambda f: shards(shards(f, 0, 1, 2), 0, 1, 2, name="test"),
        "has the shards of several sets (test, train): name those of one, as in",
    ),
    "an empty folder": (lambda f: f, "has no .parquet, .jsonl or .json file in it"),
    "nothing usable": (
        lambda f: save_json(f / "x.json", [{"conversations": talk("?")}]),
        "x.json has no record that can be used: 1 records skipped (1 unpaired turns)",
    ),
    "named twice": (lambda f: [shards(f, 0, 1, 2), f / "train-00000-of-00003.parquet"], "is named twice"),
    "an object": (
        lambda f: save_text(f / "x.json", '{\n "data": []}'),
        "x.json is one JSON object: put the records into",
    ),
    "an archive": (lambda f: zip_of(f / "a.zip", {"a": b""}), "a.zip should be Parquet, a JSON list of records"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_of_records_is_named(name, tokenizer, tmp_path):
    make, says = BAD_FILES[name]
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInput) as error:
        load(make(tmp_path / "data"), tmp_path, tokenizer, tmp_path / "out", **SOME)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not [*tmp_path.glob("out/data/*")]


def test_shards_named_one_by_one_need_not_be_all(tokenizer, tmp_path):
    found = load(sorted(shards(tmp_path, 0, 2).iterdir()), tmp_path, tokenizer, tmp_path / "out")
    assert len(found) == 2


def test_without_pyarrow_or_room_it_is_said(tokenizer, tmp_path, monkeypatch):
    row = row_file(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(BadInput, match="make room, or name another --out_dir"):
        load(row, tmp_path, tokenizer, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BadInput, match="pip install pyarrow"):
        load(row, tmp_path, tokenizer, tmp_path / "out")


# --- archives ---------------------------------------------------------------------------------------------------------


def zip_of(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_gz(folder):
    with tarfile.open(folder / "images.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    return folder / "images.tar.gz"


BAD_ARCHIVES = {
    "truncated zip": (
        lambda f: truncated(zip_of(f / "i.zip", {"a.png": red() * 9})),
        "i.zip is truncated, or not a zip or tar archive",
    ),
    "bzip2": (
        lambda f: zip_of(f / "i.zip", {"a.png": red()}, compression=zipfile.ZIP_BZIP2),
        "not compressed by deflate",
    ),
    "empty zip": (lambda f: zip_of(f / "i.zip", {}), "has no files in it"),
    "compressed tar": (tar_gz, "images.tar.gz is compressed"),
    "a picture": (
        lambda f: Path(shutil.copy(Path(__file__), f / "a.png")),
        "is truncated, or not a zip or tar archive",
    ),
    "nothing": (lambda f: f / "nowhere", "nowhere is not a folder or archive: see dataset/README.md"),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_a_bad_archive_is_named(name, tokenizer, tmp_path):
    make, says = BAD_ARCHIVES[name]
    data = save_json(tmp_path / "data.json", [{"image": "a.png", "conversations": talk("<image>", "x")}])
    with pytest.raises(BadInput) as error:
        load(data, make(tmp_path), tokenizer, None)
    assert says in str(error.value)


def test_a_bad_member_and_a_missing_one_are_counted(tokenizer, tmp_path):
    names = ["good.png", "stored.png", "deflated.png", "nowhere.png"]
    rows = [{"image": name, "conversations": talk("<image>", "x")} for name in names]
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        for name in names[:3]:
            method = zipfile.ZIP_DEFLATED if name == "deflated.png" else zipfile.ZIP_STORED
            archive.writestr(name, red((300, 300)), method)
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    for name in names[1:3]:
        with_bytes_changed(tmp_path / "i.zip", offsets[name] + 30 + len(name) + 20, 20)
    found = load(save_json(tmp_path / "data.json", rows), tmp_path / "i.zip", tokenizer, None)
    says = {}
    for row, name in enumerate(names):
        try:
            found.read_pixels(row)
        except BadRecord as problem:
            says[name] = (problem.reason, str(problem))
    assert {name: reason for name, (reason, _) in says.items()} == {
        "stored.png": "picture unreadable",
        "deflated.png": "picture unreadable",
        "nowhere.png": "picture missing",
    }
    assert "i.zip/stored.png could not be read as a picture (its checksum is wrong)" in says["stored.png"][1]


def test_archives_are_read_as_their_own_programs_read_them(tmp_path):
    """Of members of one name the last, in a tar's hard link what it links to, names of a Chinese Windows."""
    first, second = red(), red((20, 20))
    zip_of(tmp_path / "i.zip", {"a.png": first, "@@.png": first})
    with zipfile.ZipFile(tmp_path / "i.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.png", second)
    content = (tmp_path / "i.zip").read_bytes().replace(b"@@.png", "花.png".encode("gbk"))
    (tmp_path / "i.zip").write_bytes(content)
    with tarfile.open(tmp_path / "i.tar", "w") as archive:
        for content in (first, second):
            info = tarfile.TarInfo("a.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("花.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    assert (
        PictureArchive(tmp_path / "i.zip").read("a.png") == PictureArchive(tmp_path / "i.tar").read("a.png") == second
    )
    assert PictureArchive(tmp_path / "i.zip").find("花.png") is not None
    assert PictureArchive(tmp_path / "i.tar").read("花.png") == second


def test_names_are_found_wherever_the_pictures_lie(tmp_path):
    """Flat and nested, with and without COCO's prefix; the same in a folder and in an archive."""
    for file in ("images/a.png", "train2014/COCO_train2014_b.png", "c.png", "images/d.png", "train2014/d.png"):
        (tmp_path / "folder" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / file).write_bytes(red())
    members = {str(path.relative_to(tmp_path / "folder")): red() for path in (tmp_path / "folder").rglob("*.png")}
    names = ("a.png", "images/a.png", "x/images/a.png", "b.png", "coco/train2014/b.png", "x/c.png", "./c.png")
    not_found = ("nowhere.png", "x/a.png", "d.png", "long" * 99, "\0x.png")  # d.png is in two folders
    for pictures in (tmp_path / "folder", zip_of(tmp_path / "i.zip", members)):
        source = Source(save_json(tmp_path / "data.json", []), pictures)
        source.compare_names(["d.png"])
        for name in names:
            assert source.read_pixels(name, Preprocess(32)).shape == (3, 32, 32)
        for name in not_found:
            with pytest.raises(BadRecord):
                source.read_pixels(name, Preprocess(32))
