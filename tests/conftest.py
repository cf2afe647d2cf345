"""What several tests share: the repository on the path, a tiny world of pictures, small random models and CLIPs."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import CausalLMOutput

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from dataset import demo
from model.chat import Chat
from model.checkpoint import load_tokenizer, save_weights
from model.conversation import tokenizer_fields
from model.LMConfig import LMConfig
from model.model_vlm import MiniMindVLM

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


def run(*command, cwd=ROOT, **environment):
    """Runs a script of the repository in a process of its own, as a person would: (exit code, stdout, stderr)."""
    result = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline", **environment},
    )
    return result.returncode, result.stdout, result.stderr


def run_python(script, *arguments, **environment):
    return run(sys.executable, script, *arguments, **environment)


def heed_interrupts():
    """For a new process: Ctrl-C ends it, even if the tests run in the background, where it would be ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(ROOT / "model" / "demo")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small picture world on disk."""
    folder = tmp_path_factory.mktemp("world")
    demo.build(folder, pictures=48, pairs=12, clips=12, held_out=6, turns=3)
    return folder


@pytest.fixture
def tiny_clip(tmp_path):
    """A folder with a random CLIP vision model: 64 pixels, patch 32, so 5 tokens an image, width 48."""
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=32
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "tiny_clip")
    return tmp_path / "tiny_clip"


@pytest.fixture
def weights(tmp_path, tokenizer):
    """A random VLM's file. Answers mean nothing but are what they are."""
    return save_random_vlm(tmp_path / "64_vlm_sft.pth", tokenizer)


def save_random_vlm(path, tokenizer, max_seq_len=128):
    torch.manual_seed(0)
    config = LMConfig(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=max_seq_len,
        vision_width=48,
        image_tokens=5,
        **tokenizer_fields(tokenizer),
    )
    model = MiniMindVLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # so that answers depend on the question and the picture
    save_weights(path, model, tokenizer, stage="sft")
    return path


@pytest.fixture
def chat(weights, tiny_clip):
    return Chat(weights, tiny_clip, ROOT / "model" / "demo", "cpu", torch.float32)


@pytest.fixture
def pictures(world):
    return sorted((world / "images").glob("*.jpg"))


def say(chat, text, seconds=0.0):
    """Makes the model write these tokens and then `</s>`, whatever it is asked, each token in so many seconds."""
    script = [*chat.tokenizer(text, add_special_tokens=False)["input_ids"], chat.config.eos_token_id]

    def forward(input_ids, features=None, past_key_values=None, logits_to_keep=0):
        time.sleep(seconds)
        past_key_values.written = getattr(past_key_values, "written", -1) + 1
        token = script[min(past_key_values.written, len(script) - 1)]
        return CausalLMOutput(logits=F.one_hot(torch.tensor([[token]]), chat.config.vocab_size) * 100.0)

    chat.model.forward = forward
    return script
