"""web_server.py: its API, called by Flask's client and by the real openai package; its queue; what it refuses."""

import base64
import http.client
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import zlib
from urllib.parse import quote

import numpy as np
import openai
import pytest
from helpers import (
    ROOT,
    RawClient,
    animated,
    ask,
    data_url,
    eventually,
    heed_interrupts,
    part,
    picture_url,
    question,
    run_python,
    save_random_vlm,
    say,
    serving,
)
from PIL import Image

from model.chat import Chat
from model.checkpoint import save_weights
from model.conversation import as_conversation, tokenizer_fields
from model.errors import BadInput
from model.LMConfig import LMConfig
from model.model_vlm import MiniMindVLM
from model.score import read_questions
from web.requests import COMPLETION_FIELDS, MARKS, NEUTRAL
from web_server import create_app


@pytest.fixture
def app(flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    return create_app(*flags)


@pytest.fixture
def client(app):
    return app.test_client()


def save_seeing(path, tokenizer):
    """Random weights for the demo's CLIP, whose pictures take 50 tokens, and a context of 512."""
    width = json.loads((ROOT / "model" / "demo" / "config.json").read_text())["vision_config"]["hidden_size"]
    config = LMConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vision_width=width, **tokenizer_fields(tokenizer))
    save_weights(path, MiniMindVLM(config), tokenizer, stage="sft")
    return path


def chunks(response):
    """The JSON of each event of a streamed answer."""
    lines = [line for line in response.get_data(as_text=True).splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


# --- answers --------------------------------------------------------------------------------------------------------


def test_whole_and_streamed_answers_equal_those_of_chat(app, client, pictures):
    answer = app.chat.stream("颜色？", pictures[:2], max_new_tokens=15, temperature=0)
    text = "".join(answer)
    body = {"messages": question("颜色？", *map(data_url, pictures[:2])), "max_tokens": 15, "return_token_ids": True}

    whole = ask(client, **body).get_json()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": text, "token_ids": answer.token_ids}
    assert whole["choices"][0]["finish_reason"] == "length" and whole["model"] == "64_vlm_sft"
    usage = whole["usage"]
    assert usage["prompt_tokens"] == answer.prompt_tokens and usage["completion_tokens"] == 15
    assert usage["total_tokens"] == answer.prompt_tokens + 15 and usage["tokens_per_second"] > 0

    streamed = chunks(ask(client, **body, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert sum((delta.get("token_ids", []) for delta in deltas), []) == answer.token_ids  # noqa: RUF017
    assert len(deltas) > 5 and streamed[-2]["choices"][0]["finish_reason"] == "length"
    assert streamed[-1]["choices"] == [] and streamed[-1]["usage"]["completion_tokens"] == 15


def test_options_reach_the_model(app, client, pictures):
    messages = question("颜色？", data_url(pictures[0]))

    def text(**options):
        return ask(client, messages=messages, max_tokens=20, **options).get_json()["choices"][0]["message"]["content"]

    assert (
        text(temperature=2, top_k=0, seed=1)
        == text(temperature=2, top_k=0, seed=1)
        != text(temperature=2, top_k=0, seed=2)
    )
    assert text(temperature=2, top_k=1) == text() == text(max_completion_tokens=20, n=1, user="me", top_p=None)
    assert text(repetition_penalty=2.0) != text()
    say(app.chat, "左上角红色大圆形")
    assert text(stop="大") == text(stop=["大圆", "圆"]) == "左上角红色"


def test_earlier_messages_and_parts_are_read(app, client, pictures):
    url = data_url(pictures[0])
    messages = [
        {"role": "system", "content": "简短。"},
        *question("颜色？", url),
        {"role": "assistant", "content": "红色", "name": None},
        {"role": "user", "content": "形状？"},
    ]
    turns = [("system", "简短。"), ("user", "<image>\n颜色？"), ("assistant", "红色"), ("user", "形状？")]
    expected = "".join(app.chat.stream(turns, pictures[:1], max_new_tokens=9, temperature=0))
    assert ask(client, messages=messages, max_tokens=9).get_json()["choices"][0]["message"]["content"] == expected

    # the position of the picture among the parts makes no difference
    after = [{"role": "user", "content": [{"type": "text", "text": "颜色？"}, part(url)]}]
    placed = [{"role": "user", "content": [part(url), {"type": "text", "text": "<image>\n颜色？"}]}]
    answers = [
        ask(client, messages=m, max_tokens=9).get_json()["choices"] for m in (question("颜色？", url), after, placed)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_pictures_of_any_kind_are_read(app, client, pictures):
    with Image.open(pictures[0]) as image:
        kinds = [
            *(
                picture_url(image, kind)
                for kind in ("png", "webp", "gif", "bmp", "tiff", "avif", "jpeg2000", "ppm", "ico")
            ),
            picture_url(image.convert("I;16"), "ppm"),
            picture_url(image.convert("CMYK"), "jpeg"),
            picture_url(image.convert("RGBA"), "png"),
            picture_url(image.convert("P"), "png"),
            picture_url(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "png"),
        ]
    for url in kinds:
        assert ask(client, messages=question("?", url), max_tokens=2).status_code == 200, url[:40]


def test_pictures_are_read_as_any_client_writes_them(client, pictures):
    head, data = data_url(pictures[0]).split(",")

    def text(part, role="user"):
        messages = [{"role": role, "content": [part, {"type": "text", "text": "颜色？"}]}]
        reply = ask(client, messages=messages, max_tokens=12)
        assert reply.status_code == 200, (reply.get_data(as_text=True), str(part)[:80])
        return reply.get_json()["choices"][0]["message"]["content"]

    lines = "\r\n".join(data[i : i + 76] for i in range(0, len(data), 76))
    forms = [data.rstrip("="), lines, f" {data}\n", quote(data, safe=""), data.replace("+", "-").replace("/", "_")]
    urls = [f"{head},{form}" for form in forms] + [
        f"\n{head.upper()},{data}",
        head.replace(";", ";name=a.jpg;") + f",{data}",
    ]
    parts = [part(url) for url in urls]
    parts += [{"type": kind, "image_url": f"{head},{data}"} for kind in ("image_url", "input_image")]
    parts += [{"type": "input_image", "image_url": {"url": f"{head},{data}"}, "detail": "auto"}]
    parts += [{"type": "video_url", "video_url": f"{head},{data}"}]
    wanted = text(part(f"{head},{data}"))
    assert [text(one) for one in parts] == [wanted] * len(parts) and len(wanted) > 3


def test_pictures_without_words_ask_what_is_in_them(app, client, pictures):
    def text(*images, **message):
        content = [part(data_url(image)) for image in images]
        content += [{"type": "text", "text": message["words"]}] if "words" in message else []
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12}
        return ask(client, **body).get_json()["choices"][0]["message"]["content"]

    wanted = "".join(app.chat.stream("描述这张图片。", pictures[:1], max_new_tokens=12, temperature=0))
    assert [text(pictures[0]), *(text(pictures[0], words=words) for words in ("", " \n", "<image>", "<image>\n"))] == [
        wanted
    ] * 5
    two = "".join(app.chat.stream("描述这张图片。", pictures[:2], max_new_tokens=12, temperature=0))
    assert text(*pictures[:2]) == text(*pictures[:2], words="<image><image>") == two != wanted


def test_as_many_pictures_fit_as_the_page_and_the_api_say(tokenizer, tiny_clip, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert Chat(save_seeing(tmp_path / "demo.pth", tokenizer), "model/demo", "model/demo").max_pictures == 9
    for max_seq_len in (20, 64, 100):
        weights = save_random_vlm(tmp_path / "64_vlm_sft.pth", tokenizer, max_seq_len=max_seq_len)
        app = create_app("--weights", str(weights), "--vision_path", str(tiny_clip), "--tokenizer_path", "model/demo")
        client = app.test_client()
        most = client.get("/info").get_json()["max_pictures"]
        assert most == max(1, (max_seq_len - 32 - 8) // 6) == app.chat.max_pictures >= app.chat.max_frames
        say(app.chat, "左上角红色")
        reply = ask(client, messages=question("?", *[data_url(pictures[0])] * most)).get_json()
        assert reply["choices"][0]["message"]["content"].startswith("左上角")
        reply = ask(client, messages=question("?", *[data_url(pictures[0])] * (most + 1)))
        says = f"{most + 1} pictures were sent, but the model's context holds {most} at most"
        assert reply.status_code == 400 and reply.get_json()["error"]["message"] == says

    # the frames of videos count as pictures
    clip = animated(tmp_path / "clip.gif", [Image.open(path) for path in pictures[:4]])
    url = f"data:image/gif;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    clips = [{"type": "video_url", "video_url": {"url": url}}] * 3
    reply = ask(client, messages=[{"role": "user", "content": clips}])
    says = "the pictures and videos have 12 frames together, but the model's context holds 10 at most"
    assert reply.get_json()["error"]["message"] == says


def test_attention_of_an_answer(app, client, pictures):
    answer = app.chat.stream("颜色？", pictures[:2], max_new_tokens=6, temperature=0)
    list(answer)
    messages = question("颜色？", *map(data_url, pictures[:2]))
    result = client.post("/attention", json={"messages": messages, "token_ids": answer.token_ids}).get_json()
    expected = app.chat.attention(as_conversation("颜色？", 2, app.chat.config), pictures[:2], answer.token_ids)[
        ..., 1:
    ]
    assert result["grid"] == 2
    assert np.array(result["shares"]) == pytest.approx(expected.numpy(), abs=1e-5)
    for body in ({"token_ids": [1]}, {"messages": question("?"), "token_ids": [1]}):
        assert client.post("/attention", json=body).status_code == 400
    for ids in ([], [app.chat.config.vocab_size], [-1], ["1"], [True], [1] * 200, None):
        response = client.post("/attention", json={"messages": messages, "token_ids": ids})
        assert response.status_code == 400 and "token_ids should be" in response.get_json()["error"]["message"]


def test_a_picture_is_checked_before_it_is_asked_about(client, pictures, tmp_path):
    clip = animated(tmp_path / "clip.gif", [Image.open(path) for path in pictures[:4]])
    clip = f"data:image/gif;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    for kind, url, frames in (("image_url", data_url(pictures[0]), 1), ("video_url", clip, 4), ("image_url", clip, 1)):
        assert client.post("/check", json={"type": kind, "url": url}).get_json() == {"frames": frames}
    broken = client.post("/check", json={"type": "image_url", "url": "data:image/png;base64,bm8="})
    assert broken.status_code == 200 and "picture 1 can't be read" in broken.get_json()["problem"]
    for body in ({"type": "text", "url": clip}, {"type": "image_url"}, {"type": "image_url", "url": clip, "more": 1}):
        assert client.post("/check", json=body).status_code == 400


# --- the real client ------------------------------------------------------------------------------------------------


def test_openai_client(app, pictures):
    expected = "".join(app.chat.stream("颜色？", pictures[:1], max_new_tokens=15, temperature=0))
    messages = question("颜色？", data_url(pictures[0]))
    with serving(app) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["64_vlm_sft"]
        assert client.models.retrieve("64_vlm_sft").owned_by == "minimind-v"
        create = client.chat.completions.create
        whole = create(model="64_vlm_sft", messages=messages, max_tokens=15, temperature=0)
        assert whole.choices[0].message.content == expected and whole.usage.completion_tokens == 15
        stream = create(model="64_vlm_sft", messages=messages, max_tokens=15, temperature=0, stream=True)
        parts = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(parts) == expected and len(parts) > 5
        with pytest.raises(openai.BadRequestError, match="temperature should be a number from 0 to 2"):
            create(model="64_vlm_sft", messages=messages, temperature=7)
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; this server has '64_vlm_sft'"):
            create(model="gpt-4", messages=messages)


def test_fields_that_ask_for_nothing_are_taken(app, pictures):
    with serving(app) as address:
        create = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0).chat.completions.create
        body = {"model": "64_vlm_sft", "max_tokens": 9, "temperature": 0}
        messages = [{"role": "system", "content": "简短。"}, *question("颜色？", data_url(pictures[0]))]
        first = create(messages=messages, extra_body={"return_token_ids": True}, **body).choices[0].message
        assert first.content and first.token_ids

        # its own answer, with all that came with it, as part of the next question
        again = [*messages, first.model_dump(), {"role": "user", "content": "形状？"}]
        plain = [*messages, {"role": "assistant", "content": first.content}, {"role": "user", "content": "形状？"}]
        wanted = create(messages=plain, **body).choices[0].message.content
        assert create(messages=again, **body).choices[0].message.content == wanted
        again[0] = {"role": "developer", "content": [{"type": "input_text", "text": "简短。"}]}
        again[-2] |= {"refusal": "", "annotations": [], "tool_calls": []}
        assert create(messages=again, **body).choices[0].message.content == wanted

        # every field that OpenAI knows, null or neutral
        marks = {"metadata": {"a": "b"}, "user": "me", "safety_identifier": "x", "prompt_cache_key": "y"}
        neutral = {name: values[-1] for name, values in NEUTRAL.items() if values}
        known = {*openai.types.chat.completion_create_params.CompletionCreateParamsNonStreaming.__annotations__}
        known |= {*openai.types.chat.completion_create_params.CompletionCreateParamsBase.__annotations__}
        assert known == (COMPLETION_FIELDS | NEUTRAL.keys() | MARKS) & known
        for extra in (marks, neutral, dict.fromkeys(known - body.keys() - {"messages"})):
            assert create(messages=plain, **body, extra_body=extra).choices[0].message.content == wanted, extra


# --- what is refused ------------------------------------------------------------------------------------------------


def bomb(width, height):
    """A PNG that claims to be this large, in a hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def malformed(good):
    """(body, what the error says) for every kind of bad request; `good` is the URL of a valid picture."""

    def broken(data, kind="jpeg"):
        return question("?", f"data:image/{kind};base64,{base64.b64encode(data).decode()}")

    content = base64.b64decode(good.split(",")[1])
    fine = question("?", good)
    messages = [
        (None, "messages should be a list"),
        ([], "messages should be a list"),
        ("你好", "messages should be a list"),
        (["你好"], "each message should be an object"),
        ([{"role": "robot", "content": "?"}], "role should be one of system, user, assistant, not 'robot'"),
        ([{"role": ["user"], "content": "?"}], "role should be one of"),
        ([{"role": "user"}], "content should be text or a list of parts"),
        ([{"role": "user", "content": 7}], "content should be text or a list of parts"),
        (
            [{"role": "user", "content": "?", "refusal": "no"}],
            "refusal can only be '' here, not 'no'",
        ),
        (
            [{"role": "user", "content": "?", "mood": "good"}],
            "a message has no field 'mood'; it can have content, name, role",
        ),
        ([{"role": "user", "content": ["?"]}], "parts of type None are not supported, only text, image_url, video_url"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "parts of type 'audio' are not supported"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "should have a string under text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": [good]}]}],
            "should have a string under image_url.url",
        ),
        ([{"role": "system", "content": [part(good)]}], "only user messages can have pictures, not system messages"),
        ([{"role": "assistant", "content": "<image>!"}, *fine], "only user messages can have pictures"),
        ([{"role": "system", "content": "<" * 25 + ">" * 25}, *fine], "only user messages can have pictures"),
        (
            [{"role": "system", "content": ""}] * 128 + fine,
            "there are 129 messages, more than the 128 tokens of the model's context",
        ),
        ([*fine, {"role": "assistant", "content": "!"}], "the last message should be the user's question"),
        (question(""), "the question is empty"),
        (question("字" * 100_000), "the text has over 10000 characters"),
        (question("字" * 9_000), r"the question has \d+ tokens, the model reads at most 128"),
        (question("\ud800"), "lone surrogate"),
        (question("<image>?"), "0 images were given, but the question has 1 <image>"),
        (question("<image><image>?", good), "1 images were given, but the question has 2 <image>"),
        (question("?", *[good] * 50), "50 pictures were sent, but the model's context holds 14 at most"),
        (
            question("?", "https://example.com/a.png"),
            "picture 1: only data: URLs are supported, this server downloads nothing",
        ),
        (question("?", "file:///etc/passwd"), "only data: URLs are supported"),
        (question("?", good, ""), "picture 2: only data: URLs are supported"),
        (question("?", "data:image/png,abc"), "should be in base64"),
        (question("?", "data:image/png;base64,@@@@"), "its base64 is invalid"),
        (question("?", "data:image/png;base64,图图图图"), "its base64 is invalid"),
        (question("?", "data:image/png;base64,"), "picture 1 can't be read: not a picture"),
        (
            broken(b"not a picture at all"),
            "picture 1 can't be read: not a picture or video, or not in a supported format",
        ),
        (broken(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), "can't be read: not a picture"),
        (broken(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "eps"), "can't be read: not a picture"),
        (
            broken(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic"),
            "picture 1 can't be read: an iPhone's HEIC: pip install pillow-heif, or save it as JPEG",
        ),
        (broken(content[: len(content) // 2]), "picture 1 can't be read: .*truncated"),
        (broken(content[:20]), "picture 1 can't be read"),
        (question("?", bomb(10_000, 10_000)), "picture 1: it has 100 megapixels, over the limit of 50"),
        (question("?", bomb(60_000, 60_000)), "picture 1 can't be read: Image size .* exceeds limit"),
        (question("?", bomb(100, 100)), "picture 1 can't be read"),
    ]
    options = [
        ({"temperature": "hot"}, "temperature should be a number, not 'hot'"),
        ({"temperature": "0.5"}, "temperature should be a number, not '0.5'"),
        ({"temperature": -1}, "temperature should be a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature should be a number from 0 to 2"),
        ({"temperature": True}, "temperature should be a number"),
        ({"max_tokens": 0}, "max_tokens should be a whole number from 1"),
        ({"max_tokens": 1.5}, "max_tokens should be a whole number"),
        ({"max_tokens": float("inf")}, "max_tokens should be a whole number"),
        ({"top_p": 1.1}, "top_p should be a number from 0 to 1"),
        ({"top_k": [8]}, r"top_k should be a number, not \[8\]"),
        ({"seed": 2**80}, "seed should be a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty should be a number from 0.1"),
        ({"stop": ["a", ""]}, "stop should be a text, or a list of up to four texts"),
        ({"stop": ["a"] * 5}, "stop should be a text"),
        ({"stop": 5}, "stop should be a text"),
        ({"tools": [{"type": "function"}]}, r"tools can only be \[\] here, not \[\{'type': 'function'\}\]"),
        ({"tool_choice": "required"}, "tool_choice can only be 'none' or 'auto' here, not 'required'"),
        ({"response_format": {"type": "json_object"}}, "response_format can only be {'type': 'text'} here"),
        ({"logit_bias": {"5": 1}}, "logit_bias can only be {} here"),
        ({"top_logprobs": 2}, "top_logprobs can only be 0 here"),
        ({"store": True}, "store can only be False here"),
        ({"audio": {"voice": "alloy"}}, "audio can only be null here"),
        ({"n": 3}, "n can only be 1 here, not 3"),
        ({"logprobs": True}, "logprobs can only be False here"),
        ({"stream": "yes"}, "stream should be true or false"),
        ({"stream_options": [1]}, "stream_options should be an object"),
        ({"colour": "red"}, "the request has no field 'colour'; it can have max_completion_tokens, "),
        ({"model": ["64_vlm_sft"]}, "there is no model"),
    ]
    return [({"messages": m}, says) for m, says in messages] + [({"messages": fine, **o}, says) for o, says in options]


RAW = [
    (b"", "the request is not valid JSON"),
    (b"{", "the request is not valid JSON"),
    (b'{"messages": "\xff\xfe"}', "the request is not valid JSON"),
    (b"[" * 100_000, "the request is not valid JSON"),
    (b"9" * 10_000, "the request is not valid JSON"),
    (b"[1]", "the request should be a JSON object"),
    (b'"text"', "the request should be a JSON object"),
]


def test_bad_requests_get_one_clear_sentence(client, pictures):
    good = data_url(pictures[0])
    bodies = [(json.dumps(body).encode(), says) for body, says in malformed(good)]
    for body, says in bodies + RAW:
        response = client.post("/v1/chat/completions", data=body, content_type="application/json")
        assert response.status_code in (400, 404), (says, response.data[:300])
        error = response.get_json()["error"]
        assert re.search(says, error["message"]), error["message"]
        assert len(error["message"]) < 300 and "\n" not in error["message"] and error["type"] == "invalid_request_error"
    response = client.post("/v1/chat/completions", data="hello")
    assert response.status_code == 415 and "application/json" in response.get_json()["error"]["message"]
    assert client.get("/nowhere").status_code == 404 and client.get("/v1/chat/completions").status_code == 405
    assert client.get("/v1/models/gpt").get_json()["error"]["message"].startswith("there is no model 'gpt'")
    for name in ("..%2F..%2FREADME.md", "../questions.json", "nothing.png"):
        assert client.get(f"/samples/{name}").status_code == 404


def test_sample_pictures_may_have_any_name(app, flags, pictures, tmp_path, monkeypatch):
    folder = tmp_path / "dataset" / "eval_images"
    folder.mkdir(parents=True)
    name = "50% #1?.jpg"
    (folder / name).write_bytes(pictures[0].read_bytes())
    (folder / "questions.json").write_text(json.dumps([[[name], "<image>\n?"]]))
    monkeypatch.setattr("web_server.load_chat", lambda args: app.chat)
    monkeypatch.setattr("web_server.in_repository", lambda path: tmp_path / path)
    client = create_app(*flags).test_client()
    (sample,) = client.get("/info").get_json()["samples"]
    assert client.get(f"/{sample['pictures'][0]}").data == pictures[0].read_bytes()
    (folder / "questions.json").write_text('[[["a.jpg"], "?"],]')
    with pytest.raises(BadInput, match="questions.json is not a JSON list of .* fix it"):
        create_app(*flags)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_questions_about_one_picture_need_no_list(tmp_path, encoding):
    file = tmp_path / "questions.json"
    pairs = [["图.png", "是什么？"], [["a.png"], "?"], [["a.png", "b.png"], "<image><image>?"], [[], "你好"]]
    file.write_text(json.dumps(pairs, ensure_ascii=False), encoding=encoding)
    names = [["图.png"], ["a.png"], ["a.png", "b.png"], []]
    wanted = [([tmp_path / name for name in own], text) for own, (_, text) in zip(names, pairs, strict=True)]
    assert read_questions(tmp_path) == wanted
    for bad in (
        {"ab": 1},
        "ab",
        [["a.png"]],
        [["a.png", 5]],
        [[[5], "?"]],
        ["ab"],
        [{"a": 1, "b": 2}],
        [5],
        [["a", "b", "c"]],
    ):
        file.write_text(json.dumps(bad), encoding=encoding)
        with pytest.raises(BadInput, match="questions.json is not a JSON list of .* fix it"):
            read_questions(tmp_path)


def test_too_large_requests_are_refused(app, client):
    response = ask(client, messages=question("?", "data:image/png;base64," + "A" * 27_000_000))
    assert response.status_code == 413 and "picture 1 is over 20 MB" in response.get_json()["error"]["message"]
    with serving(app) as address:
        # sent in chunks, without a length that could be looked at before
        for parts, status in (([b'{"messages": []', b"}"], 400), ([b"{", *[b"A" * 1_000_000] * 28, b"}"], 413)):
            connection = http.client.HTTPConnection(address.removeprefix("http://"))
            connection.request("POST", "/v1/chat/completions", iter(parts), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == status
            says = "messages should be a list" if status == 400 else "the request is over 28 MB"
            assert says in json.loads(response.read())["error"]["message"]
            connection.close()
        # over a real connection, the rest of the upload must not hide the answer
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIStatusError, match="the request is over 28 MB") as caught:
            client.chat.completions.create(model="64_vlm_sft", messages=question("?", "data:" + "A" * 40_000_000))
        assert caught.value.status_code == 413


def test_a_server_for_one_computer_refuses_other_sites(app, flags, monkeypatch, capsys):
    client = app.test_client()

    def status(client, server="127.0.0.1", **headers):
        response = client.get("/info", headers=headers, environ_overrides={"SERVER_NAME": server})
        assert response.headers.get("Access-Control-Allow-Origin") is None
        return response.status_code

    own = ("localhost:7788", "127.0.0.1:7788", "127.1.2.3", "[::1]:7788", "LOCALHOST", "demo.localhost:1")
    assert {status(client, Host=host) for host in own} == {200}
    assert {status(client, Host=host, Origin=f"http://{host}") for host in own if host != "LOCALHOST"} == {200}
    others = (
        "evil.example",
        "evil.example:7788",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "[::",
    )
    assert {status(client, Host=host) for host in others} == {403}
    origins = ("http://evil.example", "null", "http://localhost:3000", "https://localhost.evil.example")
    assert {status(client, Host="localhost:7788", Origin=origin) for origin in origins} == {403}
    assert {status(client, "0.0.0.0", Host=host) for host in others} == {200}

    # the sentence, and the way out that it names
    evil = {"Host": "localhost", "Origin": "http://evil.example"}
    says = client.post("/v1/chat/completions", json={}, headers=evil).get_json()["error"]["message"]
    assert says == (
        "this server is for its own pages, not for those of 'http://evil.example': "
        "to allow them, start it with --cors http://evil.example"
    )
    says = client.get("/", headers={"Host": "evil.example:80"}).get_json()["error"]["message"]
    assert says.startswith("this server is for its own computer, not for requests to 'evil.example:80'")
    monkeypatch.setattr("web_server.load_chat", lambda args: app.chat)
    client = create_app(*flags, "--cors", "http://evil.example", "https://b.example").test_client()
    for headers in (evil, {"Host": "evil.example", "Origin": "http://evil.example"}):
        response = client.get("/info", headers=headers)
        assert response.status_code == 200 and response.headers["Access-Control-Allow-Origin"] == "http://evil.example"
    asked = {
        **evil,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,x-stainless-os",
    }
    response = client.options("/v1/chat/completions", headers=asked)
    assert response.status_code == 200 and "POST" in response.headers["Access-Control-Allow-Methods"]
    assert response.headers["Access-Control-Allow-Headers"] == "content-type,x-stainless-os"
    assert status(client, Host="localhost", Origin="http://c.example") == 403
    assert "Origin" in client.get("/info").headers["Vary"]
    for bad in ("evil.example", "http://evil.example/page", ""):
        with pytest.raises(SystemExit):
            create_app(*flags, "--cors", bad)
        assert f"{bad!r} should be a site without a path, like https://example.com" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads its own memory from Linux's /proc")
def test_two_hundred_bad_requests_leak_no_memory(client, pictures):
    def memory():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    good = data_url(pictures[0])
    bodies = [json.dumps(body).encode() for body, _ in malformed(good)] + [body for body, _ in RAW]
    sizes = []
    for round_number in range(3):
        for i in range(200):
            response = client.post(
                "/v1/chat/completions", data=bodies[(i + round_number) % len(bodies)], content_type="application/json"
            )
            assert 400 <= response.status_code < 500
        sizes.append(memory())
    assert sizes[2] - sizes[0] < 30e6, sizes
    assert ask(client, messages=question("颜色？", good), max_tokens=3).get_json()["usage"]["completion_tokens"] == 3
    assert client.get("/health").get_json()["waiting"] == 0


# --- many clients ---------------------------------------------------------------------------------------------------


def at_once(client, bodies):
    """Sends all requests at the same time; returns the responses in order."""
    responses = [None] * len(bodies)

    def one(i):
        with client.application.test_client() as one_client:
            responses[i] = one_client.post("/v1/chat/completions", json=bodies[i], buffered=True)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return responses


def test_sixteen_at_once_get_what_each_gets_alone(flags, pictures, monkeypatch):
    monkeypatch.chdir(ROOT)
    client = create_app(*flags, "--queue", "15").test_client()
    bodies = [
        {"messages": question(f"第{i}张？", data_url(pictures[i])), "max_tokens": 12, "seed": i, "temperature": i % 2}
        for i in range(16)
    ]
    alone = [ask(client, **body).get_json()["choices"][0] for body in bodies]
    together = [response.get_json()["choices"][0] for response in at_once(client, bodies)]
    assert together == alone and len({choice["message"]["content"] for choice in alone}) > 8


def test_a_full_queue_is_503(app, client):
    say(app.chat, "左上角红色大圆形", seconds=0.1)
    responses = at_once(client, [{"messages": question(f"{i}？")} for i in range(16)])
    assert sorted(response.status_code for response in responses) == [200] * 9 + [503] * 7
    for response in responses:
        if response.status_code == 503:
            assert response.headers["Retry-After"] == "5"
            assert response.get_json()["error"]["message"] == "8 others are waiting already: try again soon"
        else:
            assert response.get_json()["choices"][0]["message"]["content"] == "左上角红色大圆形"
    assert client.get("/health").get_json()["waiting"] == 0


def test_waiting_clients_see_their_position(app, client):
    say(app.chat, "左上角红色大圆形", seconds=0.2)
    bodies = [{"messages": question(f"{i}？"), "stream": True} for i in range(3)]
    texts = [response.get_data(as_text=True) for response in at_once(client, bodies)]
    waits = sorted([int(n) for n in re.findall(r"^: waiting (\d)$", text, re.MULTILINE)] for text in texts)
    assert waits[0] == [] and set(waits[1]) == {1} and set(waits[2]) == {1, 2} and waits[2][0] == 2
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)


def test_uploads_at_once_are_bounded(app):
    with serving(app) as address:
        slow = [RawClient(address, slow=True, messages=question("？")) for _ in range(9)]
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def ask():
            return client.chat.completions.create(model="64_vlm_sft", messages=question("？"), max_tokens=2)

        def refused():
            try:
                ask()
            except openai.InternalServerError as error:
                return "8 others are waiting already" in str(error)

        eventually(refused)
        for client_connection in slow:
            client_connection.hang_up()
        eventually(lambda: not refused())
        assert ask().usage.completion_tokens == 2


def test_clients_that_hang_up_are_dropped(app):
    say(app.chat, "左上角红色大圆形" * 20, seconds=0.05)
    with serving(app) as address:
        reader = RawClient(address, messages=question("？"), stream=True)
        reader.read_pieces(3)
        waiting = RawClient(address, messages=question("？"), stream=True)
        whole = RawClient(address, messages=question("？"))  # not streamed
        eventually(lambda: len(app.api.queue.tickets) == 3)
        waiting.hang_up()
        eventually(lambda: len(app.api.queue.tickets) == 2)
        generated = app.api.generated_tokens
        reader.hang_up()
        eventually(lambda: len(app.api.queue.tickets) == 1)
        assert app.api.generated_tokens - generated <= 2
        before = app.api.generated_tokens
        eventually(lambda: app.api.generated_tokens > before)
        generated = app.api.generated_tokens
        whole.hang_up()
        eventually(lambda: not app.api.queue.tickets)
        assert app.api.generated_tokens - generated <= 2


def test_attention_is_not_computed_for_a_client_that_hung_up(app, pictures, monkeypatch):
    computed = []
    attention = app.chat.attention
    monkeypatch.setattr(app.chat, "attention", lambda *args: computed.append(args) or attention(*args))
    body = {"path": "/attention", "messages": question("？", data_url(pictures[0])), "token_ids": [5, 6]}
    with serving(app) as address:
        busy = app.api.queue.join()  # as if an answer were being written
        waiting = RawClient(address, **body)
        eventually(lambda: len(app.api.queue.tickets) == 2)
        waiting.hang_up()
        eventually(lambda: app.api.queue.tickets == [busy])  # it left the queue, although the answer is not finished
        late = RawClient(address, **body)
        eventually(lambda: len(app.api.queue.tickets) == 2)
        late.hang_up()
        app.api.queue.leave(busy)  # nobody is ahead of it any more
        eventually(lambda: not app.api.queue.tickets)
        assert computed == []
        patient = RawClient(address, **body)
        eventually(lambda: len(computed) == 1)
        patient.hang_up()


# --- the script -----------------------------------------------------------------------------------------------------


def test_the_script_serves_until_it_is_stopped(flags):
    process = subprocess.Popen(
        [sys.executable, "web_server.py", *flags, "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509  no thread of the test runs while this does
    )
    try:
        assert "64_vlm_sft.pth: 0.7 MB, 161,856 parameters of language model and projector" in process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline()).group()
        assert openai.OpenAI(base_url=f"{address}/v1", api_key="none").models.list().data[0].id == "64_vlm_sft"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and process.stderr.read() == ""
    finally:
        process.kill()


def test_the_script_says_what_to_run_first(tmp_path):
    code, out, err = run_python("web_server.py", "--demo", "--out_dir", tmp_path)
    assert code == 1 and "Traceback" not in err and not out
    assert "192_vlm_sft.pth not found: train the demo first" in err and "python 1-pretrain_vlm.py --demo" in err
