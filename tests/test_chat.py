"""Answers: streamed, batched and scored; where the model looked; and what is refused."""

import json
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, save_random_vlm, say
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    StaticCache,
    TextIteratorStreamer,
)

from dataset.records import make_record
from model.chat import Chat
from model.checkpoint import load_tokenizer
from model.conversation import as_conversation, encode, pad_left
from model.decoder import Decoder, GraphDecoder, OnnxDecoder
from model.errors import BadInput
from model.generate import until_stop
from model.model_vlm import find_placeholders
from model.onnx_graphs import vision_graph
from model.score import score
from model.vision_utils import load_vision

GREEDY = {"temperature": 0}


def test_sizes_come_with_the_weights(chat):
    assert (chat.model.config.dim, chat.model.config.n_layers, chat.model.config.image_tokens) == (64, 2, 5)


def ids_of(chat, text, pictures):
    return chat.encode_prompt(as_conversation(text, len(pictures), chat.config))


def generate(chat, text, pictures, **options):
    """The same question put to transformers' own `generate`: the new token ids."""
    input_ids = ids_of(chat, text, pictures)
    output = chat.model.generate(input_ids, image_features=chat.encode_images(pictures), **options)
    return [token for token in output[0, input_ids.shape[1] :].tolist() if token != chat.config.eos_token_id]


def test_streamed_answer_is_the_batched_one(chat, pictures):
    asked = ["颜色？", "图中有几个图形？", "在哪里？"]
    streamed = [
        "".join(chat.stream(text, [path], max_new_tokens=20, **GREEDY))
        for text, path in zip(asked, pictures, strict=False)
    ]
    prompts = [ids_of(chat, text, [path])[0].tolist() for text, path in zip(asked, pictures, strict=False)]
    batched = chat.answer_all(prompts, [chat.encode_images([path]) for path in pictures[:3]], max_new_tokens=20)
    assert streamed == batched and all(streamed)


def test_generate_writes_the_same_tokens(chat, pictures):
    """Greedy, with a growing and with a fixed cache, without any, with a repetition penalty; and through a streamer."""
    answer = chat.stream("两张图有什么不同？", pictures[:2], max_new_tokens=40, **GREEDY)
    text = "".join(answer)
    plain = {"max_new_tokens": 40, "do_sample": False}
    for cache in (
        {},
        {"past_key_values": StaticCache(config=chat.config, max_cache_len=128)},
        {"use_cache": False},
    ):
        assert generate(chat, "两张图有什么不同？", pictures[:2], **plain, **cache) == answer.token_ids
    streamer = TextIteratorStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate(chat, "两张图有什么不同？", pictures[:2], streamer=streamer, **plain)
    assert "".join(streamer) == text

    penalised = chat.stream("颜色？", pictures[:1], max_new_tokens=40, repetition_penalty=1.5, **GREEDY)
    list(penalised)
    expected = generate(chat, "颜色？", pictures[:1], repetition_penalty=1.5, **plain)
    assert penalised.token_ids == expected


def test_sampling_follows_the_seed_and_its_limits(chat, pictures):
    def tokens(**options):
        answer = chat.stream("颜色？", pictures[:1], max_new_tokens=30, **options)
        list(answer)
        return answer.token_ids

    wild = {"temperature": 2.0, "top_k": 0}
    assert tokens(seed=7, **wild) == tokens(seed=7, **wild) != tokens(seed=8, **wild)
    assert tokens(seed=1, temperature=2.0, top_k=1) == tokens(**GREEDY)
    assert tokens(seed=1, temperature=2.0, top_k=0, top_p=1e-6) == tokens(**GREEDY)


def test_nothing_is_lost_between_pieces(chat, pictures):
    """Of random tokens, which are full of broken characters."""
    for seed in range(8):
        answer = chat.stream("颜色？", pictures[:1], max_new_tokens=70, temperature=5.0, top_k=0, seed=seed)
        pieces = list(answer)
        assert "".join(pieces) == chat.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert all(pieces) and len(pieces) > 20


def test_a_character_of_several_tokens_comes_whole(chat):
    script = say(chat, "猫🐈")
    answer = chat.stream("?", max_new_tokens=50, **GREEDY)
    assert list(answer) == ["猫", "🐈"]
    assert len(script) - 1 == len(answer.token_ids) > 2 and answer.finish_reason == "stop"


def test_says_why_it_ended(chat, pictures):
    answer = chat.stream("颜色？", pictures[:1], max_new_tokens=5, **GREEDY)
    list(answer)
    assert answer.finish_reason == "length" and len(answer.token_ids) == 5
    assert answer.prompt_tokens == ids_of(chat, "颜色？", pictures[:1]).shape[1]

    stop = threading.Event()
    answer = chat.stream("颜色？", pictures[:1], max_new_tokens=1000, stop_event=stop, **GREEDY)
    for _ in answer:
        if len(answer.token_ids) >= 3:
            stop.set()
            wanted = len(answer.token_ids)
    assert answer.finish_reason == "cancelled" and len(answer.token_ids) == wanted

    answer = chat.stream("颜色？", pictures[:1], max_new_tokens=1000, **GREEDY)
    chat.config.eos_token_id = -1  # from here on, nothing ends it
    list(answer)
    assert answer.finish_reason == "context"
    assert answer.prompt_tokens + len(answer.token_ids) == chat.config.max_seq_len


@pytest.mark.parametrize(
    "stops, text",
    [(["红色"], "左上角"), (["无"], "左上角红色大圆形"), (["角红", "大圆"], "左上"), (["形。"], "左上角红色大圆形")],
)
def test_stop_texts_end_the_answer_before_them(chat, stops, text):
    pieces = (character for character in "左上角红色大圆形")
    found = []
    assert "".join(until_stop(stops, pieces, lambda: found.append(True))) == text
    assert bool(found) == (text != "左上角红色大圆形")
    say(chat, "左上角红色大圆形")
    answer = chat.stream("?", max_new_tokens=50, stop=stops, **GREEDY)
    assert "".join(answer) == text and answer.finish_reason == "stop"


def test_users_at_once_get_what_each_gets_alone(chat, pictures):
    """Eight threads, each with pictures, a question and sampling of its own."""

    def ask(i, results):
        options = {"temperature": 1.5, "top_k": 0, "seed": i} if i % 2 else GREEDY
        answer = chat.stream(f"第{i}张？", pictures[i : i + 1 + i % 3], max_new_tokens=20, **options)
        results[i] = ("".join(answer), answer.token_ids)

    alone, together = {}, {}
    for i in range(8):
        ask(i, alone)
    threads = [threading.Thread(target=ask, args=(i, together)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and len({text for text, _ in alone.values()}) > 4


def test_several_pictures_are_one_clip_forward(chat, pictures):
    calls = []
    chat.encoder.model.register_forward_hook(lambda *_: calls.append(1))
    list(chat.stream("?", pictures[:3], max_new_tokens=10, **GREEDY))
    assert len(calls) == 1


def test_pictures_without_a_place_come_first(chat, pictures):
    assert as_conversation("颜色？", 2, chat.config) == as_conversation("<image>\n<image>\n颜色？", 2, chat.config)


def test_encoding_leaves_the_shared_tokenizer_as_it_was():
    """Someone else may read `</s>` as a token with it, pad with it, or add tokens to it."""
    tokenizer = load_tokenizer(ROOT / "model" / "demo")
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(length=8)
    backend.enable_truncation(3)
    plain = encode(tokenizer, ["</s>", "颜色颜色颜色颜色"])
    assert tokenizer.eos_token_id not in plain[0] and tokenizer.decode(plain[0]) == "</s>"
    assert len(plain[1]) > 3 and 0 not in plain[1]
    assert backend.encode("</s>").ids == [tokenizer.eos_token_id, *[0] * 7]
    assert backend.padding["length"] == 8 and backend.truncation["max_length"] == 3
    tokenizer.add_tokens(["新词"])
    assert encode(tokenizer, ["新词"]) == [[len(tokenizer) - 1]]


def test_prompts_of_different_length_are_padded_on_the_left():
    input_ids, attention_mask = pad_left([[5, 6, 7], [8]])
    assert input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_earlier_turns_are_read(chat, pictures):
    turns = [("system", "简短。"), ("user", "<image>\n颜色？"), ("assistant", "红色"), ("user", "形状？")]
    answer = chat.stream(turns, pictures[:1], max_new_tokens=20, **GREEDY)
    alone = chat.stream("形状？", pictures[:1], max_new_tokens=20, **GREEDY)
    assert "".join(answer) != "".join(alone) and answer.prompt_tokens > alone.prompt_tokens


def test_attention_is_that_of_the_softmax(chat, pictures):
    """Against all of it, computed densely from every query to every key, layer by layer."""
    answer = chat.stream("颜色？", pictures[:2], max_new_tokens=12, **GREEDY)
    list(answer)
    turns = as_conversation("颜色？", 2, chat.config)
    shares = chat.attention(turns, pictures[:2], answer.token_ids)
    assert shares.shape == (2, len(answer.token_ids), 2, 5)

    seen = []

    def attend(q, k, v, **_):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
        seen.append(scores.softmax(dim=-1))
        return seen[-1] @ v

    features, prompt = chat.encode_images(pictures[:2]), chat.encode_prompt(turns)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("model.model.F.scaled_dot_product_attention", attend)
        chat.model(torch.cat([prompt, torch.tensor([answer.token_ids])], dim=1), features)
    rows = torch.stack(seen)[:, 0].mean(dim=1)[:, prompt.shape[1] - 1 : -1]  # (layers, A, T)
    starts = find_placeholders(prompt, chat.config.image_ids)[0].nonzero()[:, 0].tolist()
    for number, start in enumerate(starts):
        assert torch.allclose(shares[:, :, number], rows[:, :, start : start + 5], atol=1e-5)


@torch.inference_mode()
def scores_of_steps(chat, rows, pictures, decoder=None):
    """Scores of the next token after one question or two of different length, and after each of eight tokens more."""
    decoder = decoder or chat.new_decoder(rows, 100)
    texts = ("?", "左上角是什么颜色?")[:rows]
    input_ids, mask = pad_left([ids_of(chat, text, pictures[:1])[0].tolist() for text in texts])
    scores = [decoder.prompt(input_ids, chat.encode_images(pictures[:rows]), mask).clone()]
    for token in range(40, 48):
        scores.append(decoder.step(torch.tensor([[token], [token + 9]])[:rows]).clone())
    return torch.stack(scores)


@pytest.mark.parametrize("sizes", [{}, {"qk_norm": True}, {"n_heads": 2, "n_kv_heads": 1, "head_dim": 64}], ids=str)
def test_onnx_runtime_scores_as_pytorch_does(tokenizer, tiny_clip, pictures, tmp_path, sizes):
    chat = Chat(save_random_vlm(tmp_path / "vlm.pth", tokenizer, **sizes), tiny_clip, ROOT / "model" / "demo")
    small = Chat(tmp_path / "vlm.pth", tiny_clip, ROOT / "model" / "demo", int8=True)
    for rows in (1, 2):
        assert isinstance(chat.new_decoder(rows, 9), OnnxDecoder)
        expected = scores_of_steps(chat, rows, pictures, Decoder(chat.model, rows, 100))
        torch.testing.assert_close(scores_of_steps(chat, rows, pictures), expected, atol=1e-4, rtol=1e-4)

        # and in 8 bits, which are close
        rounded = scores_of_steps(small, rows, pictures)
        assert not torch.equal(rounded, expected)
        assert F.cosine_similarity(rounded.flatten(), expected.flatten(), dim=0) > 0.99
    assert list(small.stream("颜色？", pictures[:1], max_new_tokens=5, **GREEDY))
    half = Chat(tmp_path / "vlm.pth", tiny_clip, ROOT / "model" / "demo", dtype=torch.bfloat16, int8=True)
    assert list(half.stream("颜色？", pictures[:1], max_new_tokens=5, **GREEDY))


@torch.inference_mode()
def test_in_8_bits_a_token_with_large_numbers_does_not_spoil_the_others(tokenizer, tiny_clip, pictures, tmp_path):
    """As in trained models: the first token of a prompt has a hidden unit a thousand times as large as all others."""
    weights = save_random_vlm(tmp_path / "vlm.pth", tokenizer)
    state = torch.load(weights)

    # number 0 of a vector is the first token's alone, and so is hidden unit 0, which reads it
    first = tokenizer.bos_token_id
    state["tok_embeddings.weight"][:, 0] = 0
    state["tok_embeddings.weight"][first, 0] = 1
    state["vision_proj.vision_proj.0.weight"][0] = state["layers.0.attention.wo.weight"][0] = 0
    for name in ("w1", "w3"):
        state[f"layers.0.feed_forward.{name}.weight"][0] = 100 * F.one_hot(torch.tensor(0), 64)
    state["layers.0.feed_forward.w2.weight"][:, 0] = 0
    torch.save(state, weights)

    exact, small = (Chat(weights, tiny_clip, ROOT / "model" / "demo", int8=int8) for int8 in (False, True))
    expected, rounded = (scores_of_steps(chat, 2, pictures) for chat in (exact, small))
    assert F.cosine_similarity(rounded, expected, dim=-1).min() > 0.98


def save_encoder(folder, **changes):
    sizes = dict(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=32
    )
    kind, config = (
        (SiglipVisionModel, SiglipVisionConfig) if "vision_use_head" in changes else (CLIPVisionModel, CLIPVisionConfig)
    )
    kind(config(**sizes, **changes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu"}, {"vision_use_head": False}], ids=str)
def test_an_encoder_s_graph_gives_its_features(tmp_path, changes):
    encoder = load_vision(save_encoder(tmp_path / "encoder", **changes))
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = encoder(pixels)
    encoder.session = vision_graph(encoder.model).session()
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-4)
    graph = vision_graph(encoder.model, int8=True)
    largest = max(abs(value.astype(int)).max() for name, value in graph.tensors.items() if name.endswith(".int8"))
    assert 2 * 255 * largest < 2**15  # what a CPU without VNNI adds up in 16 bits
    encoder.session = graph.session()
    rounded = encoder(pixels)
    assert not torch.equal(rounded, expected)
    assert F.cosine_similarity(rounded.flatten(), expected.flatten(), dim=0) > 0.999


def test_without_onnx_runtime_pytorch_answers_and_8_bits_say_what_is_missing(
    chat, weights, tiny_clip, pictures, monkeypatch
):
    expected = list(chat.stream("颜色？", pictures[:1], max_new_tokens=20, **GREEDY))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    other = Chat(weights, tiny_clip, ROOT / "model" / "demo")
    assert type(other.new_decoder(1, 9)) is Decoder
    hint = "answers come faster on a CPU after: pip install onnxruntime onnx"
    assert hint in other.summary and hint not in chat.summary
    assert list(other.stream("颜色？", pictures[:1], max_new_tokens=20, **GREEDY)) == expected
    with pytest.raises(BadInput, match="--quantize int8 needs ONNX Runtime: pip install onnxruntime onnx"):
        Chat(weights, tiny_clip, ROOT / "model" / "demo", int8=True)


@pytest.mark.parametrize(("sizes", "what"), [({"use_moe": True}, "experts"), ({"head_dim": 24}, "heads of width 24")])
def test_what_onnx_runtime_can_t_run_pytorch_does_but_not_in_8_bits(
    tokenizer, tiny_clip, pictures, tmp_path, sizes, what
):
    weights = save_random_vlm(tmp_path / "vlm.pth", tokenizer, **sizes)
    chat = Chat(weights, tiny_clip, ROOT / "model" / "demo")
    assert list(chat.stream("颜色？", pictures[:1], max_new_tokens=5, **GREEDY))
    with pytest.raises(BadInput, match=f"ONNX Runtime can't run this model: it has {what}"):
        Chat(weights, tiny_clip, ROOT / "model" / "demo", int8=True)


def test_refusals(chat, weights, tiny_clip, tokenizer, pictures, tmp_path):
    with pytest.raises(BadInput, match="1 images were given, but the question has 2"):
        chat.stream("<image><image>", pictures[:1])
    with pytest.raises(BadInput, match="0 images were given, but the question has 1"):
        chat.stream("<image>？")
    with pytest.raises(BadInput, match=r"the question has 188 tokens, the model reads at most 128"):
        chat.stream("字" * 90)
    with pytest.raises(BadInput, match="could not be read as a picture"):
        chat.stream("?", [weights])
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
        answer = "".join(chat.stream(f"<image>\n{kind}？", [picture], max_new_tokens=48, **GREEDY))
        records.append(make_record([picture.name], [(f"<image>\n{kind}？", answer)], kind=kind))
    records[1]["conversations"][1]["content"] += "错"  # one wrong label
    (tmp_path / "score.json").write_text(json.dumps(records), encoding="utf-8")
    table, asked = score(chat, tmp_path / "score.json", world / "images")
    assert list(table) == ["colour", "shape", "all"]
    assert table["colour"][:2] == (12, 1.0)
    assert table["shape"][:2] == (12, pytest.approx(11 / 12))
    assert table["all"][:2] == (24, pytest.approx(23 / 24))
    assert table["all"][2] < table["all"][1]
    assert [(question, label) for question, label, answer in asked if answer != label] == [
        ("shape？", asked[1][2] + "错")
    ]


def test_score_keeps_the_system_turn_and_compares_no_picture_with_itself(chat, pictures, tmp_path):
    asked = [("system", "简短。"), ("user", "<image>\n颜色？")]
    answer = "".join(chat.stream(asked, pictures[:1], max_new_tokens=48, **GREEDY))
    assert answer != "".join(chat.stream(asked[1:], pictures[:1], max_new_tokens=48, **GREEDY))
    turns = [*asked, ("assistant", answer), ("user", "形状？"), ("assistant", "圆形")]
    conversations = [{"role": role, "content": text} for role, text in turns]
    records = [{"image": pictures[0].name, "conversations": conversations}] * 2
    (tmp_path / "score.json").write_text(json.dumps(records), encoding="utf-8")
    table, _ = score(chat, tmp_path / "score.json", pictures[0].parent)
    assert table == {"question": (2, 1.0, None), "all": (2, 1.0, None)}


def test_score_asks_the_first_question_with_a_picture(chat, pictures, tmp_path):
    """What was said before it goes along; pictures that come later don't count."""
    asked = [("user", "你好"), ("assistant", "好"), ("user", "<image>\n颜色？")]
    answer = "".join(chat.stream(asked, pictures[:1], max_new_tokens=48, **GREEDY))
    assert answer != "".join(chat.stream(asked[2:], pictures[:1], max_new_tokens=48, **GREEDY))
    turns = [*asked, ("assistant", answer), ("user", "<image>\n形状？"), ("assistant", "圆形")]
    conversations = [{"role": role, "content": text} for role, text in turns]
    records = [{"image": [pictures[0].name, pictures[1].name], "conversations": conversations}]
    records.append({"image": [pictures[0].name], "conversations": conversations[:4]})
    file = tmp_path / "score.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    assert score(chat, file, pictures[0].parent)[0] == {"question": (2, 1.0, None), "all": (2, 1.0, None)}
    for wrong, says in (
        ({"image": [], "conversations": conversations[:2]}, "record 2: to score, a record needs a question with a pict"),
        ({"image": ["a"] * 2, "conversations": [{"role": "user", "content": "<image><image>?"}, conversations[1]]},
         "score.json: to score, there should be questions, all with the same number of pictures"),
        ({"image": ["a"], "conversations": [{"role": "user", "content": "<image>" + "字" * 90}, conversations[1]]},
         "record 2: the question has .* tokens, the model reads at most 128"),
    ):  # fmt: skip
        file.write_text(json.dumps([*records, wrong]), encoding="utf-8")
        with pytest.raises(BadInput, match=says):
            score(chat, file, pictures[0].parent)


@torch.inference_mode()
def test_a_step_of_fixed_shapes_scores_as_one_that_grows(chat, pictures):
    """What a GPU captures as a graph, here without one: two questions of different length, padded on the left."""
    prompts = [
        chat.encode_prompt(as_conversation(text, 1, chat.config))[0].tolist() for text in ("?", "左上角是什么颜色?")
    ]
    input_ids, mask = pad_left(prompts)
    features = chat.encode_images(pictures[:2])
    growing, fixed = Decoder(chat.model, 2, 128), GraphDecoder(chat.model, 2, 128)
    for decoder in (growing, fixed, fixed):  # the second time over what the first left behind
        scores = [decoder.prompt(input_ids, features, mask)]
        for _ in range(8):
            scores.append(decoder.step(scores[-1].argmax(dim=-1, keepdim=True)).clone())
        if decoder is growing:
            expected = torch.stack(scores)
        torch.testing.assert_close(torch.stack(scores), expected)


def test_a_long_question_leaves_the_other_answers_of_its_batch_as_they_are(chat, pictures):
    turns = [as_conversation(text, 1, chat.config) for text in ("?", "左上角是什么颜色?", "?" * 110)]
    prompts = [chat.encode_prompt(one)[0].tolist() for one in turns]
    assert 128 - 10 < len(prompts[2]) < 128  # the context holds 128
    features = list(chat.encode_images(pictures[:3])[:, None])
    alone = [chat.answer_all([prompt], [one])[0] for prompt, one in zip(prompts, features, strict=True)]
    assert chat.answer_all(prompts, features) == alone
    written = [len(chat.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in alone]
    assert written[2] <= 128 - len(prompts[2]) < min(written[:2])
