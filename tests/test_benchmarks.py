"""The benchmarks that compare with other engines: that these compute the same, else their times would say nothing."""

import importlib.util
import sys

import pytest
import torch
from helpers import ROOT, run_python
from transformers import CLIPVisionConfig

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

from bench_train import beside_transformers, parse
from made_up import make_files, make_model

from model.LMConfig import LMConfig
from model.training.distributed import Processes
from model.training.trainer import Run, prepare


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_transformers_llava_has_the_losses_of_the_trainer_step_by_step(tmp_path, dtype, most):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    make_files(tmp_path, 24, clip=CLIPVisionConfig(**sizes))
    flags = ["--dim=64", "--n_layers=2", "--batch_size=2", "--accumulation_steps=2", "--steps=4", "--warm_up=1"]
    places = {"vision_path": "clip", "tokenizer_path": "tokenizer", "data_path": "data.json", "images_path": "images"}
    places = [f"--{name}={tmp_path / file}" for name, file in places.items()]
    args = parse([*flags, *places, f"--out_dir={tmp_path}", "--device=cpu", f"--dtype={dtype}", "--learning_rate=0.01"])
    processes = Processes("cpu")
    parts, dataset, _ = prepare(args, None, True, None, processes)
    options = {"stage": "pretrain", "processes": processes, "parts": parts, "dataset": dataset}
    result = beside_transformers(args, Run(args=args, weights_file=tmp_path / "weights.pth", **options))
    assert result["largest_loss_difference"] < most
    assert min(result["samples_per_s"].values()) > 0


@pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="needs tests/benchmarks/requirements.txt")
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_writes_the_tokens_of_the_model(tmp_path, tied):
    import llama_cpp

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


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp"), reason="the packages are there")
def test_a_comparison_says_which_packages_it_lacks():
    code, _, err = run_python(ROOT / "tests" / "benchmarks" / "bench_decode.py", "--device=cpu", "--beside=llama.cpp")
    assert code == 1
    assert "pip install -r tests/benchmarks/requirements.txt" in err


def test_a_comparison_refuses_what_the_other_engine_has_not():
    code, _, err = run_python(ROOT / "tests" / "benchmarks" / "bench_train.py", "--beside=transformers", "--use_moe")
    assert code == 1
    assert "leave out --use_moe" in err
