"""llama.cpp must write the same greedy tokens as our model; otherwise comparing their speeds means nothing.

Not part of the other tests, for its packages: pip install -r tests/benchmarks/requirements.txt, then

    python -m pytest -n 0 tests/engines/test_llama_cpp.py
"""

import sys

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import llama_cpp
from made_up import make_model

from model.LMConfig import LMConfig


@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_writes_the_tokens_of_the_model(tmp_path, tied):
    torch.manual_seed(0)
    config = LMConfig(dim=256, n_layers=4, vocab_size=300, tie_word_embeddings=tied)
    model = make_model(config).eval()
    prompt = torch.randint(3, 300, (1, 40))
    expected = model.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False)[0, 40:].tolist()
    server = llama_cpp.serve(tmp_path / "model.gguf", model, "float32")
    ids, rate, first = llama_cpp.answer(server, prompt[0].tolist(), 32)
    assert ids == expected
    assert len(set(ids)) > 8  # no token over and over
    assert rate > 0
    assert first > 0
