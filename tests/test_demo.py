"""The demo: its world, what is said about it, and what is shipped: small enough, made of real parts, good at what each is for."""

import itertools
import random
import re

import numpy as np
import pytest
import torch
from helpers import ROOT, run_python

from dataset.demo import drawing, sentences, world
from dataset.demo.scenes import (
    CHANGES,
    COLOURS,
    MOVING_CHANGES,
    SHAPES,
    UNSEEN_PAIRS,
    Thing,
    changed_scene,
    random_scene,
    split_of,
)
from dataset.demo.sentences import LANGUAGES, QUESTIONS
from model.checkpoint import read_weights
from model.demo.make_clip import contrasted, probe, reading_loss
from model.demo.make_llm import as_picture, coined, score, text_model
from model.errors import BadInput
from model.vision_utils import load_vision

FOLDER = ROOT / "model" / "demo"
CHINESE, ENGLISH = LANGUAGES.values()


# --- the world ------------------------------------------------------------------------------------------------------


def test_splits_share_no_scene():
    rng = random.Random(0)
    for split in ("train", "heldout", "unseen"):
        scenes = [random_scene(rng, split) for _ in range(300)]
        assert {split_of(scene) for scene in scenes} == {split}
        pairs = {(thing.colour, thing.shape) for scene in scenes for thing in scene}
        assert bool(pairs & UNSEEN_PAIRS) == (split == "unseen")
    for alike in ("colour", "shape"):
        scenes = [random_scene(rng, alike=alike) for _ in range(300)]
        assert all(len({getattr(thing, alike) for thing in scene}) < len(scene) or len(scene) == 1 for scene in scenes)
        assert {len(scene) for scene in scenes} == {1, 2, 3, 4}
    kinds = set()
    for _ in range(300):
        scene, change = changed_scene(rng)
        after = change.apply(scene)
        assert split_of(scene) == split_of(after) == "train" and 1 <= len(after) <= 4
        assert len(set(scene) ^ set(after)) == (1 if change.kind in ("add", "remove") else 2)
        kinds.add(change.kind)
    assert kinds == set(CHANGES)


def test_things_are_drawn_where_and_as_their_words_say():
    """On grey paper, every thing's colour is at its middle (a ring's beside it), and none covers another's."""
    rng = random.Random(0)
    for _ in range(100):
        scene = random_scene(rng)
        looks = drawing.random_looks(scene, rng)
        paper = drawing.Image.new("RGB", (drawing.PICTURE, drawing.PICTURE), (90, 90, 90))
        picture = np.asarray(drawing.paint(looks, paper))
        for thing, look in looks.items():
            row, column = int(look.y / 224 * 3), int(look.x / 224 * 3)
            assert drawing.PLACES[3 * row + column] == thing.place
            assert (look.radius > 30) == (thing.size == "big")
            wide = 1 - look.stretch / 4 if look.stretch < 0.5 else 1
            x = look.x + (0.83 * look.radius * wide if thing.shape == "ring" else 0)
            found = picture[round(look.y), round(x)].astype(int)
            between = [sorted(pair) for pair in zip(look.colour, look.shade, strict=True)]
            assert all(low - 8 <= c <= high + 8 for c, (low, high) in zip(found, between, strict=True)), (thing, found)


@pytest.mark.parametrize("nameless", ["colour", "shape"])
def test_things_without_a_name_are_asked_about_anything_else(nameless):
    rng = random.Random(0)
    own = "|".join(language.words[key] for language in LANGUAGES.values() for key in sentences.FIELDS[nameless])
    seen = set()
    for _ in range(100):
        scene = random_scene(rng)
        pairs = sentences.questions(scene, rng, 4, nameless)
        assert len(pairs) == 4
        assert not any(re.search(rf"(?<!colou)({own})", text) for pair in pairs for text in pair)
        seen.update(answer for _, answer in pairs)
        nobody = [thing._replace(**{nameless: None}) for thing in scene]
        named, without = (drawing.draw(things, random.Random(1)).tobytes() for things in (scene, nobody))
        assert named != without
    answered = "形。|a (star|ring)" if nameless == "colour" else "色的。|is (red|blue)"
    assert sum(bool(re.search(answered, answer)) for answer in seen) > 20


def test_pairs_that_training_never_shows_are_not_named_in_it():
    never = [
        language.noun(colour=colour, shape=shape) for language in LANGUAGES.values() for colour, shape in UNSEEN_PAIRS
    ]
    rng = random.Random(0)
    said = [text for _ in range(400) for pair in sentences.questions(random_scene(rng), rng, 4) for text in pair]
    assert not [text for text in said if any(noun in text.lower() for noun in never)]
    asked = [sentences.question(CHINESE, random_scene(rng, "unseen"), rng, "exist") for _ in range(200)]
    assert {answer[0] for text, answer in asked if any(noun in text for noun in never)} == {"有", "没"}


def test_animations_show_what_their_change_says():
    rng = random.Random(0)
    kinds = set()
    for _ in range(60):
        scene, change = changed_scene(rng, counts=(1, 2, 2), kinds=MOVING_CHANGES)
        kinds.add(change.kind)
        frames = np.stack([np.asarray(frame, dtype=int) for frame in drawing.draw_frames(scene, change, rng, 4)])
        moved = np.abs(np.diff(frames, axis=0)).max(axis=(1, 2, 3)) > 20  # between which frames something changes
        assert moved.all() if change.kind == "move" else moved.sum() == 1
        row, column = divmod(drawing.PLACES.index((change.old or change.new).place), 3)
        place = frames[:, row * 75 : row * 75 + 75, column * 75 : column * 75 + 75]
        assert np.abs(place[0] - place[-1]).max() > 20  # and at the place that it names
    assert kinds == set(MOVING_CHANGES)


# --- what is said about it ------------------------------------------------------------------------------------------

SCENE = (Thing("top left", "big", "red", "circle"), Thing("middle", "small", "blue", "star"))


def test_answers_are_true_whole_sentences_of_the_questions_language():
    rng = random.Random(0)
    seen = {}
    for code, language in LANGUAGES.items():
        for kind in QUESTIONS:
            seen[code, kind] = {sentences.question(language, SCENE, rng, kind) for _ in range(4000)}
    for expected in (
        ("zh", "colour", "左上角的图形是什么颜色的？", "左上角的图形是红色的。"),
        ("zh", "colour", "星形是什么颜色？", "星形是蓝色的。"),
        ("zh", "colour", "右边的图形是什么颜色？", "右边没有图形。"),
        ("zh", "shape", "蓝色的图形是什么形状？", "蓝色的图形是星形。"),
        ("zh", "size", "圆形有多大？", "圆形是大的。"),
        ("zh", "where", "红色的圆形在哪里？", "红色的圆形在左上角。"),
        ("zh", "count", "图中有几个图形？", "图中有两个图形。"),
        ("zh", "exist", "有红色的星形吗？", "没有，图中没有红色的星形。"),
        ("zh", "caption", "图中有什么？", "左上角有一个红色的大圆形，中间有一个蓝色的小星形。"),
        ("en", "colour", "What colour is the shape at the top left?", "The shape at the top left is red."),
        ("en", "colour", "What color is the star?", "The star is blue."),
        ("en", "shape", "What is in the middle?", "The shape in the middle is a star."),
        ("en", "size", "Is the star big or small?", "The star is small."),
        ("en", "where", "Where is the red shape?", "The red shape is at the top left."),
        ("en", "count", "How many shapes are there?", "There are two shapes."),
        ("en", "exist", "Is there a blue star?", "Yes, there is a blue star."),
        ("en", "exist", "is there a blue circle?", "No, there is no blue circle."),
        ("en", "other", "What animal is this?", "I only see coloured shapes."),
        (
            "en",
            "caption",
            "What do you see?",
            "There is a big red circle at the top left and a small blue star in the middle.",
        ),
    ):
        code, kind, *pair = expected
        assert tuple(pair) in seen[code, kind], expected
    for pairs in seen.values():
        assert len({asked for asked, _ in pairs}) == len(pairs)  # one question, one answer
        for _, answer in pairs:
            assert re.fullmatch(r"[A-Z][a-z, ]+\.|[\u4e00-\u9fff，]+。", answer), answer
    answers = [sentences.question(ENGLISH, random_scene(rng), rng, "exist")[1] for _ in range(1000)]
    assert 0.44 < sum(answer.startswith("Yes") for answer in answers) / 1000 < 0.56


def test_changes_are_said_in_both_languages():
    rng = random.Random(0)
    found = set()
    for _ in range(4000):
        _, change = changed_scene(rng)
        found.update(sentences.change_in_words(language, change) for language in LANGUAGES.values())
    assert found >= {
        "左上角的图形变成了红色。",
        "左边的图形变小了。",
        "中间的图形不见了。",
        "The shape in the middle turned into a star.",
        "The shape at the top left moved to the right.",
        "The shape on the left got bigger.",
    }
    assert any(re.fullmatch(r"An? (big|small) \w+ \w+ appeared (at|on|in) the [a-z ]+\.", text) for text in found)


def test_a_scene_is_read_from_words_and_from_captions():
    assert sentences.read_scene("红色 星形 左上角, small blue circle middle") == (
        Thing("top left", "big", "red", "star"),
        Thing("middle", "small", "blue", "circle"),
    )
    assert sentences.read_scene("Green RING；大黑色十字形右下角") == (
        Thing("middle", "big", "green", "ring"),
        Thing("bottom right", "big", "black", "cross"),
    )
    assert [thing.place for thing in sentences.read_scene("red star, " * 3)] == ["middle", "top left", "top"]
    rng = random.Random(0)
    for language in LANGUAGES.values():
        for _ in range(100):
            scene = random_scene(rng)
            assert sentences.read_scene(language.caption(scene)) == scene
    for text, says in (
        ("", "name what to draw"),
        ("pink star", "pink is not a word for a place, size, colour or shape here; for example: 红色 星形"),
        ("red", "red should name a colour and a shape"),
        ("red blue star", "red blue star has two words for its colour, red and blue: put a comma between things"),
        ("red star middle, blue ring middle", "blue ring middle has no place of its own"),
        ("red star, " * 10, "red star has no place of its own"),
    ):
        with pytest.raises(BadInput, match=re.escape(says)):
            sentences.read_scene(text)


# --- what is shipped ------------------------------------------------------------------------------------------------


def test_shipped_files_are_small():
    files = [FOLDER / name for name in ("model.safetensors", "192_llm.pth", "tokenizer.json")]
    assert sum(file.stat().st_size for file in files) < 16e6


def test_tokenizer_has_the_published_special_ids_and_a_token_for_each_word(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<", ">"]) == [0, 1, 2, 30, 32]
    for text in ("左上角有一个红色的大圆形。", "a photo of 🐈 猫", "<image>"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    for language, key in itertools.product(LANGUAGES.values(), sentences.KEYS):
        word = language.words[key]
        text = f" {word}" if language is ENGLISH else word
        assert len(tokenizer.tokenize(text)) == len(word.split()), word


def test_encoder_tells_words_apart_that_it_never_saw_together():
    """A linear probe on the patch tokens, trained on shown scenes, reads held-out ones and unseen shape-colour pairs."""
    encoder = load_vision(FOLDER)
    assert (encoder.image_tokens, encoder.vision_width) == (50, 192)
    shares = probe(encoder, seen=400, tested=100)
    assert min(shares.values()) > 0.8, shares


def test_coined_words_stand_on_patches_and_in_what_is_said(tokenizer):
    """In place of all colours, all shapes or both; no two alike."""
    replaced = set()
    for seed in range(60):
        rng = random.Random(seed)
        languages, scene = coined(tokenizer, rng), random_scene(rng)
        words = [{*language.words.values()} for language in languages.values()]
        assert [len(own) for own in words] == [25, 25]
        replaced.add(
            tuple(len(own - {*known.words.values()}) for own, known in zip(words, LANGUAGES.values(), strict=True))
        )
        chinese, english = (sentences.question(language, scene, rng, "caption")[1] for language in languages.values())
        patches = as_picture(scene, rng, languages)
        for zh_place, place, zh_size, size, zh_colour, colour, zh_shape, shape in patches.values():
            assert f"{size}{colour}{shape} " in english and place in english
            assert f"{zh_place}有一个{zh_colour}的{zh_size}{zh_shape}" in chinese
    assert replaced == {(8, 8), (6, 6), (14, 14)}


def test_words_that_are_never_shown_together_are_not_contrasted():
    """Of all colours and shapes, and of those without a name, -100."""
    looks = [(colour, shape) for colour in (-100, *range(8)) for shape in (-100, *range(6))]
    others = contrasted(torch.tensor([[4, 0, *look] for look in looks]))
    assert others.shape == (63, 25) and others[:, :11].all()  # places and sizes
    for (colour, shape), own in zip(looks, others.tolist(), strict=True):
        for number, word in enumerate(COLOURS):
            assert own[11 + number] == (shape < 0 or (word, SHAPES[shape]) not in UNSEEN_PAIRS)
        for number, word in enumerate(SHAPES):
            assert own[19 + number] == (colour < 0 or (COLOURS[colour], word) not in UNSEEN_PAIRS)


def test_reading_loss_asks_for_the_words_that_things_have():
    """Of two things in two pictures, the second in a colour without a name."""
    rows, patches = torch.tensor([0, 1]), torch.tensor([8, 30])
    words = torch.tensor([[0, 1, 2, 3], [8, 0, -100, 5]])
    right = torch.zeros(2, 50, 26)
    right[..., 25] = 1.0  # "nothing"
    right[rows, patches] = 0.0
    right[0, 8, [0, 9 + 1, 11 + 2, 19 + 3]] = 1.0
    right[1, 30, [8, 9 + 0, 19 + 5]] = 1.0
    right[0, 8, [11 + 3, 19 + 2]] = torch.randn(2)  # a yellow star, as no star is green, and no triangle yellow
    right[1, 30, 11:19] = torch.randn(8)  # any colour
    right[:, 0] = 7.0  # the class token
    assert reading_loss(right, rows, patches, words) == 0
    for position in ((0, 8, 13), (1, 30, 24), (1, 5, 25)):
        wrong = right.clone()
        wrong[position] = 0.0
        assert reading_loss(wrong, rows, patches, words) > 0


def test_language_model_answers_about_scenes_in_words(tokenizer):
    """In sentences, and as the words of each thing added up on a patch."""
    model = text_model(tokenizer)
    model.load_state_dict(read_weights(FOLDER / "192_llm.pth"))
    shares = score(model, tokenizer, "heldout", count=20)
    for kinds in (
        {kind for kind in shares if kind.startswith("image")},
        {kind for kind in shares if "image" not in kind},
    ):
        assert len(kinds) == 17 and sum(shares[kind] for kind in kinds) / 17 > 0.95, shares


@pytest.mark.slow
def test_a_short_demo_run_sees(tmp_path):
    """A few minutes' worth of the demo: clearly better with the right picture than with another one."""
    folder, out = tmp_path / "world", tmp_path / "out"
    world.build(folder, pictures=1500, pairs=2, animations=2, held_out=60)
    places = ["--demo", "--images_path", folder / "images", "--out_dir", out]
    for script, data in (("1-pretrain_vlm.py", "pretrain.json"), ("2-sft_vlm.py", "sft.json")):
        code, _, err = run_python(script, *places, "--data_path", folder / data, "--epochs", 2)
        assert code == 0, err
    code, text, err = run_python("3-eval_chat.py", *places, "--score", folder / "score_heldout.json")
    assert code == 0, err
    own, other = (float(share) for share in re.search(r"\nall +\d+ +([\d.]+)% +([\d.]+)%", text).groups())
    assert own > other + 15, text
