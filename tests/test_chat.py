"""Answers: streamed, batched and scored, and what is refused."""

import json

import pytest
import torch
from conftest import ROOT

from dataset import demo
from model.chat import Chat, score
from model.checkpoint import load_tokenizer, save_weights, tokenizer_fields
from model.LMConfig import BadInput, LMConfig
from model.model_vlm import MiniMindVLM


@pytest.fixture
def weights(tmp_path, tiny_clip, tokenizer):
    """A random VLM's file. Answers mean nothing but are what they are."""
    torch.manual_seed(0)
    config = LMConfig(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=128,
        vision_width=48,
        image_tokens=5,
        **tokenizer_fields(tokenizer),
    )
    model = MiniMindVLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # so that answers depend on the question and the picture
    save_weights(tmp_path / "64_vlm_sft.pth", model, tokenizer, stage="sft")
    return tmp_path / "64_vlm_sft.pth"


@pytest.fixture
def chat(weights, tiny_clip):
    return Chat(weights, tiny_clip, ROOT / "model" / "demo", "cpu", torch.float32)


def test_sizes_come_with_the_weights(chat):
    assert (chat.model.config.dim, chat.model.config.n_layers, chat.model.config.image_tokens) == (64, 2, 5)


def test_streamed_answer_is_the_batched_one(chat, world):
    pictures = sorted((world / "images").glob("*.jpg"))[:3]
    asked = ["颜色？", "图中有几个图形？", "在哪里？"]
    streamed = [
        "".join(chat.stream(text, [path], max_new_tokens=20)) for text, path in zip(asked, pictures, strict=True)
    ]
    prompts = [chat.prompt(text, [path])[0].tolist() for text, path in zip(asked, pictures, strict=True)]
    batched = chat.answer_all(prompts, [chat.see([path]) for path in pictures], max_new_tokens=20)
    assert streamed == batched and all(streamed)


def test_pictures_without_a_place_come_first(chat, world):
    picture = next((world / "images").glob("*.jpg"))
    assert torch.equal(chat.prompt("颜色？", [picture]), chat.prompt("<image>\n颜色？", [picture]))


def test_refusals(chat, world, weights, tiny_clip, tokenizer, tmp_path):
    picture = next((world / "images").glob("*.jpg"))
    with pytest.raises(BadInput, match="1 images were given, but the question has 2"):
        chat.prompt("<image><image>", [picture])
    with pytest.raises(BadInput, match="the question has .* tokens, the model reads at most 128"):
        chat.prompt("字" * 200, [])
    tokenizer_folder = tmp_path / "other_tokenizer"
    other = load_tokenizer(ROOT / "model" / "demo")
    other.add_tokens(["新词"])
    other.save_pretrained(tokenizer_folder)
    with pytest.raises(BadInput, match="another tokenizer"):
        Chat(weights, tiny_clip, tokenizer_folder, "cpu", torch.float32)


def test_score_counts_exact_answers_per_kind(chat, world, tmp_path):
    """Labels made from the model's own answers: all right with the right picture, fewer with another one."""
    pictures = sorted((world / "images").glob("train_*.jpg"))[:24]
    records = []
    for number, picture in enumerate(pictures):
        kind = ["colour", "shape"][number % 2]
        answer = "".join(chat.stream(f"<image>\n{kind}？", [picture], max_new_tokens=48))
        records.append(demo.record([picture.name], [(f"<image>\n{kind}？", answer)], kind=kind))
    records[1]["conversations"][1]["content"] += "错"  # one wrong label
    (tmp_path / "score.json").write_text(json.dumps(records), encoding="utf-8")
    table = score(chat, tmp_path / "score.json", world / "images")
    assert list(table) == ["colour", "shape", "all"]
    assert table["colour"][:2] == (12, 1.0)
    assert table["shape"][:2] == (12, pytest.approx(11 / 12))
    assert table["all"][:2] == (24, pytest.approx(23 / 24))
    assert table["all"][2] < table["all"][1]
