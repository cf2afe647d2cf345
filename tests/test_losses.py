"""Making things faster must not change what is learned: the losses of 200 steps against those written down before.

Where arithmetic is to change on purpose, `python tests/test_losses.py` writes them anew.
"""

import json
import tempfile
from pathlib import Path

import pytest
from helpers import GOLDEN, golden, run_python

from dataset.demo.world import build


def losses(world, out_dir, *flags):
    """The losses of the first 200 steps of the demo's first stage on a small picture world; here all of the model learns."""
    places = ["--data_path", world / "pretrain.json", "--images_path", world / "images", "--out_dir", out_dir]
    settings = ["--batch_size", 8, "--epochs", 34, "--learning_rate", 3e-4, "--log_interval", 1, "--device", "cpu"]
    settings += ["--freeze_llm", "False", "--dtype", "float32"]
    code, _, err = run_python("1-pretrain_vlm.py", "--demo", *places, *settings, *flags)
    assert code == 0, err
    lines = map(json.loads, (out_dir / "192_vlm_pretrain.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line][:200]


def test_the_losses_of_200_steps_are_the_reference(world, tmp_path):
    assert losses(world, tmp_path, "--cache_features", "False") == pytest.approx(golden("losses"), abs=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        build(Path(name) / "world", pictures=48, pairs=12, animations=12, held_out=6, turns=3)  # conftest's `world`
        found = losses(Path(name) / "world", Path(name) / "out", "--cache_features", "False")
        (GOLDEN / "losses.json").write_text(json.dumps([round(loss, 6) for loss in found]))
