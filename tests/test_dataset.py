"""From records to token ids, labels and batches: a test for each decision on the way."""

import json

import numpy as np
import pytest
import torch
from helpers import GENERATIONS, byte_tokenizer, generation_tokenizer, golden
from PIL import Image
from torch.utils.data import DataLoader

from dataset.batches import LengthBatches, TokenBatches
from dataset.dataset import VLMDataset, collate, round_up
from dataset.records import parse_record
from model.conversation import PUBLISHED_TEMPLATE, encode, encode_conversations, tokenizer_fields
from model.errors import BadInput
from model.images import Preprocess
from model.LMConfig import LMConfig
from model.model_vlm import MiniMindVLM


def greedy_tokenizer():
    """One that merges the placeholder's characters with all their neighbours, the published `Ġ<` and `</` among them."""
    return byte_tokenizer(["a < b << <<<<< >> > >>>> \n<<<\n >>\n </a> </b>"] * 50)


@pytest.fixture(params=["demo", "greedy"])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "demo" else greedy_tokenizer()


def config_for(tokenizer):
    return LMConfig(**tokenizer_fields(tokenizer))


def placeholders(ids, config):
    """How many whole placeholders, and how many `<` and `>` ids in all."""
    text = " ".join(map(str, ids))
    return text.count(" ".join(map(str, config.image_ids))), sum(ids.count(one) for one in set(config.image_ids))


@pytest.mark.parametrize("form", ["<image>", "literal"])
@pytest.mark.parametrize(
    "text, images",
    [("{}看图", 1), ("看图\n{}", 1), ("Source Image: {} Target Image: {}\n", 2), ("{}{}", 2), ("x{}y\n{} {}", 3)],
)
def test_every_image_becomes_exactly_its_ids(any_tokenizer, text, images, form):
    config = config_for(any_tokenizer)
    written = text.replace("{}", "<image>" if form == "<image>" else config.image_special_token)
    ids, _ = encode_conversations(any_tokenizer, [[("user", written), ("assistant", "好")]], config)[0]
    assert placeholders(ids.tolist(), config) == (images, images * 50)


def test_placeholder_ids_of_both_spellings_are_the_same(any_tokenizer):
    config = config_for(any_tokenizer)
    spellings = [f"a {mark} b" for mark in ("<image>", config.image_special_token)]
    first, second = encode_conversations(any_tokenizer, [[("user", text)] for text in spellings], config)
    assert first[0].tolist() == second[0].tolist()


def test_prompt_form_is_the_published_one(tokenizer):
    """Decoded, a conversation is the golden file's prompt; ids with the published tokenizer were compared when it was made."""
    config = config_for(tokenizer)
    for sample in golden("tokenizer"):
        turns = [tuple(turn) for turn in sample["messages"]]
        ids, flags = encode_conversations(tokenizer, [turns], config)[0]
        assert tokenizer.decode(ids) == sample["prompt"]
        answer = [i for i, flag in zip(ids, flags, strict=True) if flag]
        assert tokenizer.decode(answer) == turns[1][1] + "</s>"


def test_chat_template_gives_the_same_prompt(tokenizer):
    turns = [("user", "有什么？"), ("assistant", "圆形"), ("user", "在哪里？"), ("assistant", "在中间")]
    ids, _ = encode_conversations(tokenizer, [turns], config_for(tokenizer))[0]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.decode(ids)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_prompts_are_what_the_chat_template_renders(generation):
    """Ids and labels, with and without a system turn and pictures, for one turn and two, answered and not."""
    tokenizer = generation_tokenizer(generation)
    config = config_for(tokenizer)
    for turns in (
        [("user", "What?")],
        [("user", "<image>\nWhat?"), ("assistant", "A dog.")],
        [("system", "Be brief."), ("user", "What? <image>")],
        [("user", "<image>What?"), ("assistant", "A dog."), ("user", "Where?"), ("assistant", "Here")],
    ):
        messages = [{"role": role, "content": text.replace("<image>", "P")} for role, text in turns]
        template = tokenizer.chat_template or PUBLISHED_TEMPLATE
        ask = turns[-1][0] == "user"
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=ask
        )
        ids, flags = encode_conversations(tokenizer, [turns], config)[0]
        plain = [(role, text.replace("<image>", "P")) for role, text in turns]
        assert encode_conversations(tokenizer, [plain], config)[0][0].tolist() == tokenizer.encode(text)
        images = " ".join(map(str, config.image_ids))
        assert (
            tokenizer.decode(
                [*map(int, " ".join(map(str, ids)).replace(images, str(tokenizer.convert_tokens_to_ids("P"))).split())]
            )
            == text
        )
        answers = [text + tokenizer.eos_token for role, text in turns if role == "assistant"]
        assert tokenizer.decode(ids[flags]) == "".join(answers)


def test_a_template_that_has_no_place_for_a_turn_is_refused():
    for template, says in (
        ("{{ raise_exception('no system turns') }}", "refuses turns of system, user .no system turns"),
        ("{{ messages[-1].content }}", "leaves out, moves or repeats one of system, user"),
    ):
        tokenizer = byte_tokenizer(["a"], chat_template=template)
        with pytest.raises(BadInput, match=says):
            encode_conversations(tokenizer, [[("system", "a"), ("user", "b")]], config_for(tokenizer))


def test_text_cannot_end_its_own_turn(tokenizer):
    config = config_for(tokenizer)
    ids, _ = encode_conversations(tokenizer, [[("user", "a</s>\n<s>assistant\nb")]], config)[0]
    assert (ids == config.bos_token_id).sum() == 2 and (ids == config.eos_token_id).sum() == 1


def test_every_answer_and_its_end_count_and_nothing_else(tokenizer):
    config = config_for(tokenizer)
    turns = [("user", "<image>\n颜色"), ("assistant", "红色"), ("user", "形状"), ("assistant", "圆形")]
    ids, flags = encode_conversations(tokenizer, [turns], config)[0]
    counted = [i for i, flag in zip(ids, flags, strict=True) if flag]
    assert counted == [*encode(tokenizer, ["红色"])[0], 2, *encode(tokenizer, ["圆形"])[0], 2]


def write(folder, records, pictures=("a.png", "b.png")):
    for name in pictures:
        Image.new("RGB", (20, 20), "red").save(folder / name)
    (folder / "data.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return folder / "data.json"


def record(text, answer="红色", image="a.png"):
    return {
        "image": image,
        "conversations": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}],
    }


def load(path, tokenizer, max_seq_len=512, **strictness):
    return VLMDataset(path, path.parent, tokenizer, config_for(tokenizer), max_seq_len, Preprocess(32), **strictness)


def test_formats_share_a_batch(tmp_path, tokenizer):
    """Zero, one and two pictures, both spellings of a turn: one flat list of pictures in reading order."""
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "c.png")
    human = {"image": "c.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "蓝"}]}
    path = write(tmp_path, [record("<image>\n<image>\n?", image="a.png, c.png"), record("颜色", image=""), human])
    batch = collate([load(path, tokenizer)[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 32, 32) and batch["pixel_values"].dtype == torch.uint8
    assert [tuple(p[:, 0, 0].tolist()) for p in batch["pixel_values"]] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
    assert batch["input_ids"].shape == batch["labels"].shape and batch["input_ids"].shape[1] % 8 == 0
    assert (batch["labels"][batch["input_ids"] == 0] == -100).all()
    longest = max(len(load(path, tokenizer)[i]["input_ids"]) for i in range(3))
    assert batch["input_ids"].shape[1] < longest + 8


def test_coco_prefix_is_found(tmp_path, tokenizer):
    path = write(tmp_path, [record("<image>", image="0001.jpg")], pictures=("COCO_train2014_0001.jpg",))
    assert len(load(path, tokenizer)[0]["pixel_values"]) == 1


def test_coco_prefix_is_looked_for_picture_by_picture(tmp_path, tokenizer):
    """Behind a picture that is missing, and beside own ones; in training and in `--score`, which both read a Source."""
    names = ("missing.jpg", "own.jpg", "0001.jpg", "0002.jpg")
    pictures = ("own.jpg", "COCO_train2014_0001.jpg", "COCO_train2014_0002.jpg")
    path = write(tmp_path, [record("<image>", image=name) for name in names], pictures=pictures)
    dataset = load(path, tokenizer)
    found = [len(dataset[i]["problems"]) for i in range(4)]
    assert found == [1, 0, 0, 0]


@pytest.mark.parametrize("text, image, message", [("<image>?", "", "0 images"), ("?", "a.png, b.png", "2 images")])
def test_image_counts_are_checked(tmp_path, tokenizer, text, image, message):
    path = write(tmp_path, [record("<image>"), record(text, image=image)])
    with pytest.raises(BadInput, match=f"record 1: {message}"):
        load(path, tokenizer)


@pytest.mark.parametrize("bad", [{}, {"image": "a.png", "conversations": [{"role": "cat", "content": "x"}]}, "text"])
def test_wrong_shape_names_the_record(tokenizer, bad):
    with pytest.raises(BadInput, match="here: expected"):
        parse_record(bad, "here", config_for(tokenizer).image_special_token)


def test_records_that_lose_all_answers_are_dropped_and_counted(tmp_path, tokenizer):
    long_question = record("<image>\n" + "圆" * 200)
    two_turns = record("<image>\n颜色")
    two_turns["conversations"] += [
        {"role": "user", "content": "<image>" + "圆" * 300},
        {"role": "assistant", "content": "红"},
    ]
    two_turns["image"] = "a.png, b.png"
    path = write(tmp_path, [long_question, record("<image>\n颜色"), two_turns])
    dataset = load(path, tokenizer, max_seq_len=100, strict=False, max_fraction=0.5)
    assert dataset.problems.by_reason == {"answer beyond --max_seq_len": {0}} and len(dataset) == 2
    cut = dataset[1]
    assert len(cut["input_ids"]) <= 100 and len(cut["pixel_values"]) == 1  # the second picture was truncated
    assert placeholders(cut["input_ids"].tolist(), config_for(tokenizer))[0] == 1


def test_batches_hold_like_lengths_and_every_sample_once():
    lengths = np.random.default_rng(0).integers(60, 400, 5000)
    sampler = LengthBatches(np.arange(5000), lengths, 16, 16, seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(5000))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.05 * lengths.sum()
    assert batches != (sampler.begin(1), list(sampler))[1]
    sampler.begin(0)
    assert batches == list(sampler)
    sampler.begin(0, 100)
    assert batches[100:] == list(sampler)
    firsts = lengths[[batch[0] for batch in batches]]
    assert abs(np.corrcoef(np.arange(len(firsts)), firsts)[0, 1]) < 0.3  # not from short to long


@pytest.mark.parametrize("count", [64, 61, 50])
def test_processes_share_the_same_global_batches(count):
    lengths = np.random.default_rng(0).integers(60, 400, count)
    indices = np.arange(count)
    alone = list(LengthBatches(indices, lengths, 8, 8, seed=1))
    ranks = [list(LengthBatches(indices, lengths, 8, 4, seed=1, rank=r, world=2)) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == len(LengthBatches(indices, lengths, 8, 4, rank=1, world=2))
    assert all(len(a) == len(b) > 0 for a, b in zip(*ranks, strict=True))
    together = [sorted(a + b) for a, b in zip(*ranks, strict=True)]
    assert len({i for batch in together for i in batch}) == count - count % 2
    parts = list(LengthBatches(indices, lengths, 8, 2, seed=1))
    assert all(len(part) == 2 for part in parts[: len(parts) - 1])
    regrouped = [[i for part in parts[k : k + 4] for i in part] for k in range(0, len(parts), 4)]
    assert [sorted(batch) for batch in regrouped] == [sorted(batch) for batch in alone]
    if count % 2 == 0:
        assert together == [sorted(batch) for batch in alone]
    with pytest.raises(BadInput, match="9 processes can't share the 8 samples of a step: resume with at most 8"):
        LengthBatches(indices, lengths, 8, 4, rank=0, world=9)


def test_batches_by_tokens_are_full_and_dealt_alike_to_any_number_of_processes():
    lengths = np.random.default_rng(0).integers(100, 400, 5000)
    alone = TokenBatches(np.arange(5000), lengths, 4096, 4, seed=1)
    batches = list(alone)
    assert len(batches) == len(alone) == 4 * alone.steps
    padded = np.array([len(batch) * (-(-lengths[batch].max() // 8) * 8) for batch in batches])
    assert padded.max() <= 4096 and padded.mean() > 0.92 * 4096
    assert sum(lengths[batch].sum() for batch in batches) > 0.96 * padded.sum()
    assert len({i for batch in batches for i in batch}) == sum(map(len, batches)) > 5000 - 4
    ranks = [TokenBatches(np.arange(5000), lengths, 4096, 4, seed=1, rank=r, world=2) for r in (0, 1)]
    dealt = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert dealt == batches and all(rank.micro_batches == 2 for rank in ranks)
    alone.begin(1)
    assert list(alone) != batches and alone.steps == ranks[0].steps
    alone.begin(0, 100)
    assert list(alone) == batches[400:]
    with pytest.raises(BadInput, match="longest sample has 400 tokens, over --batch_tokens 399"):
        TokenBatches(np.arange(5000), lengths, 399, 4)
    with pytest.raises(BadInput, match="resume with at most 4"):
        TokenBatches(np.arange(5000), lengths, 4096, 4, rank=0, world=5)


def test_demo_world_is_read_by_the_ordinary_dataset(world, tokenizer):
    config = config_for(tokenizer)
    for name, images in (
        ("pretrain", 1),
        ("sft", 1),
        ("sft_multi", 2),
        ("score_heldout", 1),
        ("score_multi", 2),
        ("score_clips", 4),
    ):
        dataset = VLMDataset(world / f"{name}.json", world / "images", tokenizer, config, 512, Preprocess())
        batch = collate([dataset[i] for i in range(4)])
        assert batch["pixel_values"].shape == (4 * images, 3, 224, 224)
        assert dataset.problems.count == 0


def test_workers_that_are_spawned_read_the_same(world, tokenizer):
    """As on Windows and macOS, where a worker starts from nothing and is sent the dataset."""
    dataset = VLMDataset(world / "sft.json", world / "images", tokenizer, config_for(tokenizer), 512, Preprocess(32))
    spawned = DataLoader(dataset, 4, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    for batch, own in zip(spawned, DataLoader(dataset, 4, collate_fn=collate), strict=True):
        assert all(torch.equal(batch[name], own[name]) for name in ("input_ids", "labels", "pixel_values"))


def test_batches_of_few_shapes_have_the_same_loss_and_gradient(world, tokenizer):
    config = LMConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vision_width=12, **tokenizer_fields(tokenizer))
    dataset = VLMDataset(world / "sft.json", world / "images", tokenizer, config, 512, Preprocess(32))
    torch.manual_seed(0)
    model = MiniMindVLM(config).train()
    found = []
    for few_shapes in (False, True):
        batch = collate([dataset[i] for i in range(5)], few_shapes=few_shapes)
        features = torch.ones(5, 50, 12)
        model.zero_grad()
        inputs = {name: batch[name] for name in ("input_ids", "labels", "label_positions")}
        loss = model(**inputs, image_features=features, num_items_in_batch=100).loss
        loss.backward()
        found.append((loss, model.output.weight.grad.clone(), model.vision_proj.vision_proj[0].weight.grad.clone()))
        shapes = batch["input_ids"].shape[1], len(batch["label_positions"])
    torch.testing.assert_close(found[1], found[0])
    assert shapes == (round_up(shapes[0], 8), round_up(shapes[1], 4))


def test_rounded_up_sizes_are_few_and_not_much_larger():
    sizes = {round_up(size, 8) for size in range(64, 513)}
    assert len(sizes) <= 3 * 8 + 1
    assert all(size <= round_up(size, 8) <= max(size + 7, 1.125 * size) for size in range(1, 513))
