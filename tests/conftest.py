"""What several tests share: the repository on the path, a tiny world of pictures, small random models and CLIPs."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from dataset import demo
from model.checkpoint import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"


def formula(name, shape):
    """The golden files' weights, from their names."""
    values = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
    values *= np.float32(0.05 if len(shape) > 1 else 0.1)
    return torch.from_numpy(values + 1 if name.endswith("norm.weight") else values)


def formula_state(shapes):
    """A whole state dict of formula weights, the tied tensor under both names."""
    state = {name: formula(name, shape) for name, shape in shapes.items()}
    state["tok_embeddings.weight"] = state["output.weight"]
    return state


def golden(name):
    """A golden file's JSON."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def run(*command, **environment):
    """Runs a script of the repository in a process of its own, as a person would: (exit code, stdout, stderr)."""
    result = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline", **environment},
    )
    return result.returncode, result.stdout, result.stderr


def run_python(script, *arguments, **environment):
    return run(sys.executable, script, *arguments, **environment)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(ROOT / "model" / "demo")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small picture world on disk."""
    folder = tmp_path_factory.mktemp("world")
    demo.build(folder, pictures=48, pairs=12, held_out=6, turns=3)
    return folder


@pytest.fixture
def tiny_clip(tmp_path):
    """A folder with a random CLIP vision model: 64 pixels, patch 32, so 5 tokens an image, width 48."""
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=32
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "tiny_clip")
    return tmp_path / "tiny_clip"
