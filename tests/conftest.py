"""Fixtures of several tests: a tiny world of pictures, small random models and CLIPs, a place to train in, a browser."""

import os
import shutil

import pytest
import torch
from helpers import FLAGS, ROOT, make_place, save_clip, save_random_vlm

from dataset.demo.world import build
from model.chat import Chat
from model.checkpoint import load_tokenizer

# more threads make such small models no faster, and only take time from the tests beside
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(ROOT / "model" / "demo")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small picture world on disk."""
    folder = tmp_path_factory.mktemp("world")
    build(folder, pictures=48, pairs=12, animations=12, held_out=6, turns=3)
    return folder


@pytest.fixture
def tiny_clip(tmp_path):
    return save_clip(tmp_path / "tiny_clip")


@pytest.fixture
def weights(tmp_path, tokenizer):
    """A random VLM's file. Answers mean nothing but are what they are."""
    return save_random_vlm(tmp_path / "64_vlm_sft.pth", tokenizer)


@pytest.fixture
def chat(weights, tiny_clip):
    return Chat(weights, tiny_clip, ROOT / "model" / "demo", "cpu", torch.float32)


@pytest.fixture
def pictures(world):
    return sorted((world / "images").glob("*.jpg"))


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        assert not os.environ.get("CI"), "no Chromium here, and .ci/run should have installed one"
        pytest.skip("no Chromium on this machine: install it to test the page (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def place(tmp_path, world, tokenizer):
    return make_place(tmp_path, world, tokenizer)


@pytest.fixture
def flags(weights, tiny_clip):
    flags = ["--weights", weights, "--vision_path", tiny_clip, "--tokenizer_path", "model/demo", "--device", "cpu"]
    return [str(flag) for flag in [*flags, "--temperature", 0]]
