"""What is shipped for the demo: small enough, made of real parts, and good at what each part is for."""

import random
import re

import pytest
import torch
from helpers import ROOT, run_python

from dataset import demo
from model.checkpoint import read_weights
from model.conversation import tokenizer_fields
from model.demo.make_clip import WORDS, features_of, numbers
from model.demo.make_llm import SIZES, score
from model.errors import BadInput
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.vision_utils import load_vision

FOLDER = ROOT / "model" / "demo"


def test_shipped_files_are_small():
    files = [FOLDER / name for name in ("model.safetensors", "192_llm.pth", "tokenizer.json")]
    assert sum(file.stat().st_size for file in files) < 10e6


def test_a_scene_is_read_from_words():
    Thing = demo.Thing
    assert demo.read_scene("红色 星形 左上角, small blue circle middle") == (
        Thing("左上角", "大", "红色", "星形"),
        Thing("中间", "小", "蓝色", "圆形"),
    )
    assert demo.read_scene("Green RING；大黑色十字形右下角") == (
        Thing("中间", "大", "绿色", "圆环"),
        Thing("右下角", "大", "黑色", "十字形"),
    )
    assert [thing.place for thing in demo.read_scene("red star, " * 5)] == [
        "中间",
        "左上角",
        "右上角",
        "左下角",
        "右下角",
    ]
    for text, says in (
        ("", "name what to draw"),
        ("pink star", "pink is not a word for a place, size, colour or shape here; for example: 红色 星形"),
        ("red", "red should name a colour and a shape"),
        ("red blue star", "red blue star has two words for its colour, 红色 and 蓝色: put a comma between things"),
        ("red star middle, blue ring middle", "blue ring middle has no place of its own"),
        ("red star, " * 6, "red star has no place of its own"),
    ):
        with pytest.raises(BadInput, match=re.escape(says)):
            demo.read_scene(text)


def test_tokenizer_has_the_published_special_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<", ">"]) == [0, 1, 2, 30, 32]
    for text in ("左上角红色大圆形。", "a photo of 🐈 猫", "<image>"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_encoder_tells_words_apart_that_it_never_saw_together():
    """A linear probe on the patch tokens, trained on shown scenes, reads held-out ones and unseen shape-colour pairs."""
    encoder, rng = load_vision(FOLDER), random.Random(0)
    assert (encoder.image_tokens, encoder.vision_width) == (50, 128)
    x, things = features_of(encoder, rng, "train", 400)
    x = torch.nn.functional.pad(x, (0, 1), value=1.0)
    for split in ("heldout", "unseen"):
        test_x, test_things = features_of(encoder, rng, split, 100)
        test_x = torch.nn.functional.pad(test_x, (0, 1), value=1.0)
        for field, words in enumerate(WORDS):
            target = torch.nn.functional.one_hot(numbers(things, field), len(words)).float()
            weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ target)
            right = ((test_x @ weights).argmax(1) == numbers(test_things, field)).float().mean().item()
            assert right > 0.85, (split, words[0], right)


def test_language_model_answers_about_scenes_in_words(tokenizer):
    model = MiniMindLM(LMConfig(**SIZES, **tokenizer_fields(tokenizer)))
    model.load_state_dict(read_weights(FOLDER / "192_llm.pth"))
    shares = score(model, tokenizer, "heldout", count=60)
    assert sum(shares.values()) / len(shares) > 0.5, shares


@pytest.mark.slow
def test_a_short_demo_run_sees(tmp_path):
    """A few minutes' worth of the demo: clearly better with the right picture than with another one."""
    world, out = tmp_path / "world", tmp_path / "out"
    demo.build(world, pictures=1500, pairs=2, animations=2, held_out=60)
    places = ["--demo", "--images_path", world / "images", "--out_dir", out]
    for script, data in (("1-pretrain_vlm.py", "pretrain.json"), ("2-sft_vlm.py", "sft.json")):
        code, _, err = run_python(script, *places, "--data_path", world / data, "--epochs", 2)
        assert code == 0, err
    code, text, err = run_python("3-eval_chat.py", *places, "--score", world / "score_heldout.json")
    assert code == 0, err
    own, other = (float(share) for share in re.search(r"\nall +\d+ +([\d.]+)% +([\d.]+)%", text).groups())
    assert own > other + 15, text
