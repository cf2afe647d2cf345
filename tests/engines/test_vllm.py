"""An exported LLaVA in vLLM: the same greedy answers as here, asked by OpenAI's client, directly and through --backend.

Not part of the other tests, as vLLM takes gigabytes: see requirements_vllm.txt beside this file, then

    python -m pytest -n 0 tests/engines/test_vllm.py
"""

import http.client
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from helpers import ROOT, data_url, question, run_python, save_random_vlm, serving

from model.chat import Chat
from web_server import create_app

QUESTIONS = ["颜色？", "图中有什么？", "左上角是什么形状？", "有几个？", "什么颜色最多？", "大的还是小的？"]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(params=["a Llama", "a Qwen3"])
def exported(request, tmp_path, tiny_clip, tokenizer):
    """The exported folder of a random model, and the file that it was made of."""
    sizes = dict(n_heads=2, n_kv_heads=1, qk_norm=request.param == "a Qwen3")
    source = save_random_vlm(tmp_path / "weights.pth", tokenizer, **sizes)
    paths = ["--vision_path", tiny_clip, "--tokenizer_path", "model/demo"]
    code, _, err = run_python("-m", "model.export", source, tmp_path / "minimind", *paths)
    assert code == 0, err
    return tmp_path / "minimind", source


@pytest.fixture
def engine(exported, dtype):
    """The address of vLLM's server of that folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [
        "--dtype",
        dtype,
        "--enforce-eager",
        "--max-model-len",
        128,
        "--port",
        port,
        "--served-model-name",
        "minimind",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *map(str, [exported[0], *flags])],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"},
    )
    try:
        for _ in range(240):
            assert process.poll() is None, "vLLM ended before it answered"
            time.sleep(1)
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_answers_are_those_of_this_repository(engine, exported, dtype, tiny_clip, pictures, monkeypatch):
    chat = Chat(exported[1], tiny_clip, ROOT / "model" / "demo", "cpu", getattr(torch, dtype))
    asked = [(text, pictures[i : i + 1 + i % 2]) for i, text in enumerate(QUESTIONS)]  # one picture, then two
    expected = [list(chat.stream(*each, max_new_tokens=12, temperature=0).tokens()) for each in asked]

    def answer(address, text, own):
        client = openai.OpenAI(base_url=address, api_key="none")
        messages = question(text, *map(data_url, own))
        options = {"temperature": 0, "max_tokens": 12, "extra_body": {"return_token_ids": True}}
        reply = client.chat.completions.create(model="minimind", messages=messages, **options)
        return reply.choices[0].token_ids

    # all at once, as vLLM batches them; in bfloat16 rounding may decide between two tokens
    monkeypatch.chdir(ROOT)
    with serving(create_app("--backend", engine)) as front, ThreadPoolExecutor(len(asked)) as threads:
        for address in (engine, f"{front}/v1"):
            got = list(threads.map(lambda each, address=address: answer(address, *each), asked))
            same = sum(a == b for a, b in zip(got, expected, strict=True))
            assert same >= (len(asked) if dtype == "float32" else len(asked) / 2), (got, expected)
    assert len(set(map(tuple, expected))) > 3
