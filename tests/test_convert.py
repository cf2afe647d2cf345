"""Texts about your own pictures: from CSV and JSONL to records, and from there to a finetuned model."""

import json
import shlex
import sys

import pytest
from helpers import ROOT, run_python, save_random_vlm
from PIL import Image

from dataset import convert
from dataset.dataset import VLMDataset
from dataset.records import CAPTION_PROMPT
from model.checkpoint import read_metadata
from model.conversation import tokenizer_fields
from model.errors import BadInput, run_script
from model.images import Preprocess
from model.LMConfig import LMConfig


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the pictures photos/a.png, b.jpg and "two words.png"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.jpg", "two words.png"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / "photos" / name)
    return tmp_path


def converted(name, content, *flags):
    """What `python -m dataset.convert NAME photos my.json` writes for a file of this content, text or bytes."""
    with open(name, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    arguments, sys.argv = sys.argv, ["convert", name, "photos", "my.json", *flags]
    try:
        convert.main()
    finally:
        sys.argv = arguments
    with open("my.json", encoding="utf-8") as f:
        return json.load(f)


def said(one):
    """A record as (image, the texts of its turns)."""
    return one["image"], *(turn["content"] for turn in one["conversations"])


def test_captions_as_a_spreadsheet_writes_them(place, capsys):
    """A byte order mark, `;`, Windows' line ends, quoted line breaks and quotation marks, empty rows at the end."""
    text = '\ufeffImage;"caption";date\r\na.png;"红色，\r\n""亮""的";1 May\r\n two words.png ; A red one, it is;\r\n\r\n;;\r\n'
    records = converted("my.csv", text)
    asked = f"<image>\n{CAPTION_PROMPT}"
    assert [said(one) for one in records] == [
        ("a.png", asked, '红色，\n"亮"的'),
        ("two words.png", asked, "A red one, it is"),
    ]
    out = capsys.readouterr().out.splitlines()[-1]
    assert out.startswith("wrote my.json: 2 records about 2 pictures")
    assert (
        "not used: date" in out
        and "2-sft_vlm.py --from_weights " in out
        and "--data_path my.json --images_path photos" in out
    )


def test_questions_in_any_order_of_columns(place):
    """Rows about one picture stay apart; a row without a question is a caption; tabs and a quoted comma."""
    text = "question,answer,image\nWhat colour?,red,a.png\n,a red one,a.png\n" + 'And this?,"red, too",b.jpg\n'
    expected = [
        ("a.png", "<image>\nWhat colour?", "red"),
        ("a.png", "<image>\nLook:", "a red one"),
        ("b.jpg", "<image>\nAnd this?", "red, too"),
    ]
    assert [said(one) for one in converted("my.csv", text, "--question", "Look:")] == expected
    tabs = text.replace('"red, too"', "red; too").replace(",", "\t").replace(";", ",")
    assert [said(one) for one in converted("my.tsv", tabs, "--question", "Look:")] == expected


def test_json_lines_and_lists_and_ready_records(place):
    ready = {
        "image": "a.png",
        "kind": "colour",
        "conversations": [{"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": "red"}],
    }
    lines = [{"image": "a.png", "caption": "红", "question": None}, ready, {"image": "b.jpg", "answer": "red\u2028"}]
    records = converted("my.jsonl", "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert said(records[0]) == ("a.png", f"<image>\n{CAPTION_PROMPT}", "红")
    assert records[1] == ready and said(records[2])[0] == "b.jpg"
    assert converted("their.json", json.dumps(lines)) == records
    two = {
        **ready,
        "image": ["a.png", "b.jpg"],
        "conversations": [{"from": "human", "value": "<image><image>"}, ready["conversations"][1]],
    }
    assert converted("my.jsonl", json.dumps(two)) == [two]


def test_several_pictures_in_one_question(place):
    text = 'image,question,answer\n"a.png, b.jpg",Same?,no\n"a.png,b.jpg",One <image> two <image>,no\n'
    assert [said(one)[:2] for one in converted("my.csv", text)] == [
        ("a.png, b.jpg", "<image>\n<image>\nSame?"),
        ("a.png, b.jpg", "One <image> two <image>"),
    ]


def test_names_of_other_systems_are_found_as_training_finds_them(place, tokenizer):
    """A Mac takes letters apart, Windows writes backslashes and drives."""
    for name in ("Cafe\u0301.png", "B\u00fccher.png", "it's.png"):
        Image.new("RGB", (40, 30), "red").save(place / "photos" / name)
    (place / "photos" / "de\u0301ja\u0300").mkdir()
    Image.new("RGB", (40, 30), "red").save(place / "photos" / "de\u0301ja\u0300" / "vu.png")
    names = ["Caf\u00e9.png", "Bu\u0308cher.png", "it's.png", "d\u00e9j\u00e0\\vu.png", r"C:\Users\me\photos\a.png"]
    records = converted("my.csv", "image,caption\n" + "".join(f"{name},red\n" for name in names))
    assert [one["image"] for one in records] == names
    data = VLMDataset("my.json", "photos", tokenizer, LMConfig(**tokenizer_fields(tokenizer)), 512, Preprocess(32))
    assert all(data[i]["problems"] == [] for i in range(5))


def test_what_is_written_is_what_training_reads(place, tokenizer):
    converted("my.csv", 'image,caption\na.png,red\n"a.png, b.jpg",both red\n')
    data = VLMDataset("my.json", "photos", tokenizer, LMConfig(**tokenizer_fields(tokenizer)), 512, Preprocess(32))
    assert len(data) == 2 and [len(data[i]["pixel_values"]) for i in range(2)] == [1, 2]
    labels = data[0]["labels"]
    assert tokenizer.decode(labels[labels >= 0]) == "red</s>"


HEADER = "image,caption,question\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("my.csv", "", "my.csv is empty"),
        ("my.csv", HEADER, "my.csv has no rows"),
        ("my.csv", "file,caption\na.png,red\n", "my.csv, line 1: the header .* not 'file, caption'"),
        ("my.csv", "image,caption,caption\na.png,red,red\n", "line 1: the header .* once each"),
        ("my.csv", HEADER.encode() + b"a.png,red\na.png,\xba\xec\n", "my.csv, line 3: not UTF-8"),
        ("my.csv", HEADER + 'a.png,"red\nor blue"\na.png,\n', "my.csv, line 4: no caption or answer"),
        ("my.csv", "image,caption,answer\na.png,red,red\n", "line 2: both a caption and an answer"),
        ("my.csv", HEADER + "\n,red\n", "line 3: 'image' names no picture"),
        ("my.csv", HEADER + "c.png,red\n", r"line 2: photos/c.png .*No such file"),
        ("my.csv", HEADER + f"{'long ' * 60},red\n", r"line 2: photos/long .*too long"),
        ("my.csv", HEADER + "notes.txt,red\n", r"line 2: photos/notes.txt could not .*not a known picture format"),
        ("my.csv", HEADER + '"c, d.png",red\n', "line 2: rename the picture 'c, d.png'"),
        ("my.csv", HEADER + '"e,f.png",red\n', "line 2: rename the picture 'e,f.png'"),
        (
            "my.csv",
            HEADER + "https://example.com/a.png,red\n",
            "line 2: the picture 'https://example.com/a.png' is a URL",
        ),
        ("my.csv", HEADER + '"a.png, b.jpg",red,"And <image>?"\n', "line 2: 2 images, but 1 <image>"),
        ("my.csv", HEADER + 'a.png,red\na.png,"red\na.png,blue\n', "line 3: a missing or extra quotation mark"),
        ("my.csv", HEADER + "a.png,red,What?,or\n", "line 2: more cells"),
        ("my.jsonl", "\n{'image': 'a.png'}\n", "my.jsonl, line 2: not valid JSON"),
        ("my.jsonl", '["a.png"]', "record 0: should be an object"),
        ("my.jsonl", "[" * 100_000, "record 0, is not valid JSON"),
        ("my.jsonl", '{"image": ["a.png"], "caption": "red"}', "line 1: 'image' should be text"),
        ("my.jsonl", '{"image": "a.png", "caption": "\\ud83d"}', "line 1: not valid JSON .*surrogates"),
        ("my.jsonl", '{"image": "a.png", "conversations": "red"}', "line 1: expected an object with 'image'"),
        ("my.jsonl", '{"image": "", "conversations": []}', "line 1: expected an object"),
    ],
)
def test_errors_name_their_line_and_nothing_is_written(place, name, content, message):
    (place / "photos" / "notes.txt").write_text("no picture")
    for picture in ("c, d.png", "e,f.png"):
        Image.new("RGB", (8, 8)).save(place / "photos" / picture)
    (place / "my.json").write_text("precious")
    with pytest.raises(BadInput, match=message) as problem:
        converted(name, content)
    assert "\n" not in str(problem.value)
    assert (place / "my.json").read_text() == "precious"
    assert sorted(path.name for path in place.iterdir()) == sorted(["photos", "my.json", name])


def test_characters_that_the_tokenizer_does_not_know_are_told(place, capsys):
    tokenizer = ["--tokenizer_path", str(ROOT / "model" / "demo")]
    for answer, share, warns in (("黄色", "0.0%", False), ("樱桃树开花了。", "82.4%", True)):
        converted("my.csv", f"image,caption\na.png,{answer}\n", *tokenizer)
        out = capsys.readouterr().out
        assert f"in answers, {share} of them only parts of a character" in out
        assert ("\nwarning: the tokenizer doesn't know many characters of these answers" in out) == warns
        assert out.splitlines()[-1].startswith("wrote my.json")


def test_the_next_command_can_be_pasted_on_windows_too(place, capsys):
    """Its shells know no single quotes; double ones are for all."""
    (place / "photos").rename("my photos")
    for folder, target, flags in (
        ("my photos", "it's.json", """--data_path "it's.json" --images_path "my photos" """),
        ("my photos", "a\\b.json", """--data_path "a\\b.json" --images_path "my photos" """),
        ("my photos", "$1.json", """--data_path '$1.json' --images_path "my photos" """),
    ):
        (place / "my.csv").write_text("image,caption\na.png,red\n")
        arguments = ["convert", "my.csv", folder, target]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            convert.main()
        assert flags in capsys.readouterr().out and (place / target).exists()
        assert shlex.split(flags)[1::2] == [target, folder]


def test_ten_bad_lines_are_listed_and_the_rest_counted(place):
    rows = "".join(f"{i}.png,red\na.png,red\n" for i in range(13))
    with pytest.raises(BadInput) as problem:
        converted("my.csv", "image,caption\n" + rows)
    lines = str(problem.value).split("\n")
    assert len(lines) == 11 and lines[0].startswith("my.csv, line 2: photos/0.png") and lines[-1] == "and 3 more"
    assert lines[9].startswith("my.csv, line 20: photos/9.png")


def test_files_that_cannot_be_read_or_written_are_reported(place, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert", "my.csv", "photos", "my.json"])
    with pytest.raises(SystemExit, match="error: my.csv could not be read"):
        run_script(convert.main)
    (place / "my.json").mkdir()
    with pytest.raises(BadInput, match="my.json could not be written"):
        converted("my.csv", "image,caption\na.png,red\n")
    with pytest.raises(BadInput, match="a.png is not a folder"):
        convert.convert(place / "my.csv", place / "photos" / "a.png", "?")
    (place / "my.json").rmdir()
    with pytest.raises(BadInput, match="my.json is the file to convert"):
        converted("my.json", '{"image": "a.png", "caption": "red"}')
    assert not list(place.glob("*.tmp"))


def test_from_a_folder_of_pictures_to_a_finetuned_model(place, tokenizer, tiny_clip):
    """Convert, then the command that it prints, with a tiny model."""
    (place / "my.csv").write_text("image,caption\na.png,红色\nb.jpg,红色\n", encoding="utf-8")
    tokenizer.save_pretrained(place / "tokenizer")
    arguments = ["-m", "dataset.convert", place / "my.csv", place / "photos", place / "my.json"]
    code, out, err = run_python(*arguments, "--tokenizer_path", "./model/demo/")
    assert code == 0 and "python 2-sft_vlm.py --demo --from_weights out/192_vlm_sft.pth " in out, err
    code, out, err = run_python(*arguments, "--tokenizer_path", place / "tokenizer")
    assert code == 0 and not err and f"--tokenizer_path {place / 'tokenizer'} --out_dir out/mine " in out, err
    start = save_random_vlm(place / "64_vlm_sft.pth", tokenizer)
    settings = shlex.split(out.split("--out_dir out/mine ")[1])
    sizes = ["--dim", 64, "--n_layers", 2, "--n_heads", 4, "--n_kv_heads", 2, "--device", "cpu"]
    places = ["--vision_path", tiny_clip, "--tokenizer_path", "model/demo", "--out_dir", place / "mine"]
    code, out, err = run_python("2-sft_vlm.py", "--from_weights", start, *settings, *sizes, *places, "--epochs", 1)
    assert code == 0 and "step 1/1: loss" in out, err
    training = read_metadata(place / "mine" / "64_vlm_sft.pth")["training"]
    assert training[-1]["data_path"] == [str(place / "my.json")] and training[-1]["learning_rate"] == 5e-5
