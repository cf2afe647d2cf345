"""The benchmarks that compare with other engines: that these compute the same, else their times would say nothing."""

import importlib.util
import sys

import pytest
from helpers import ROOT, run_python
from transformers import CLIPVisionConfig

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

from bench_train import beside_transformers, parse
from made_up import make_files

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


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp"), reason="the packages are there")
def test_a_comparison_says_which_packages_it_lacks():
    code, _, err = run_python(ROOT / "tests" / "benchmarks" / "bench_decode.py", "--device=cpu", "--beside=llama.cpp")
    assert code == 1
    assert "pip install -r tests/benchmarks/requirements.txt" in err


def test_a_comparison_refuses_what_the_other_engine_has_not():
    code, _, err = run_python(ROOT / "tests" / "benchmarks" / "bench_train.py", "--beside=transformers", "--use_moe")
    assert code == 1
    assert "leave out --use_moe" in err
