"""Kills a training of the demo with `kill -9` at random moments, resumes it each time, and compares what comes out.

    python tests/benchmarks/kill_rounds.py --rounds 30

The run saves after every step, and every second kill waits, for 2 seconds at most, for a save to begin. In a temporary folder it is trained once
undisturbed, then with the kills: the losses of all steps and the hash of the final weights must be the same. The last line is
JSON.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def begin(out_dir):
    flags = ["--demo", "--epochs", "2", "--save_interval", "1", "--log_interval", "1", "--out_dir", out_dir, "--resume"]
    flags += ["--freeze_llm", "False", "--learning_rate", "1e-3"]  # so that all of the model is saved as it changes
    return subprocess.Popen(
        [sys.executable, "1-pretrain_vlm.py", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def result(out_dir):
    """(loss of each step, hash of the weights)."""
    lines = (out_dir / "192_vlm_pretrain.jsonl").read_text().splitlines()
    losses = [(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line]
    return losses, hashlib.sha256((out_dir / "192_vlm_pretrain.pth").read_bytes()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, torn = Path(name) / "whole", Path(name) / "torn"
        assert begin(whole).wait() == 0
        shutil.copytree(whole / "features", torn / "features")  # so that the time before the first step is short
        in_a_save, last = 0, []
        for number in range(args.rounds):
            process = begin(torn)
            try:
                assert process.wait(rng.uniform(3, 9)) == 0
            except subprocess.TimeoutExpired:
                until = time.time() + 2
                while number % 2 and time.time() < until and not list(torn.glob("*.tmp")):
                    pass
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            in_a_save += bool(list(torn.glob("*.tmp")))
            log = torn / "192_vlm_pretrain.jsonl"
            last.append(sum('"loss"' in line for line in log.read_text().splitlines()) if log.exists() else 0)
        assert begin(torn).wait() == 0
        (losses, digest), (torn_losses, torn_digest) = result(whole), result(torn)
        kept = [file.name for file in torn.glob("*.tmp")]
    outcome = {
        "rounds": args.rounds,
        "steps": len(losses),
        "steps_after_each_round": last,
        "killed_in_a_save": in_a_save,
        "same_losses": losses == torn_losses,
        "same_weights": digest == torn_digest,
        "left_behind": kept,
    }
    print(json.dumps(outcome))
    sys.exit(not (losses == torn_losses and digest == torn_digest and not kept))


if __name__ == "__main__":
    main()
