"""What a file of as many records as the real ones costs: seconds to the first batch, memory of the run and of each worker.

    python tests/benchmarks/bench_start.py                           # 595,000 records; 0, 2 and 8 workers
    python tests/benchmarks/bench_start.py --records 230000 --start_method spawn

In a temporary folder it writes captions of 30 to 60 tokens with a picture each (links to 64 files), and for every number of
workers starts a process of its own that does what a training does before its first step, then reads 20 batches of 16. Memory
is what Linux tells: the peak of the main process, and of a worker what no other process shares. Every line is JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from made_up import make_files, words  # puts the repository on the path
from torch.utils.data import DataLoader

from dataset.batches import LengthBatches
from dataset.dataset import VLMDataset, collate
from dataset.records import make_record
from model.checkpoint import load_tokenizer
from model.conversation import tokenizer_fields
from model.LMConfig import LMConfig


def write_records(folder, count):
    """As many records of their own name and words as asked, over the few pictures that are there."""
    rng = random.Random(0)
    vocabulary, pictures = words(rng, 20000), sorted((folder / "images").iterdir())
    with open(folder / "data.json", "w", encoding="utf-8") as file:
        for i in range(count):
            name = f"GCC_train_{i:09d}.jpg"
            os.link(pictures[i % len(pictures)], folder / "images" / name)
            text = " ".join(rng.choices(vocabulary, k=rng.randint(12, 24)))
            record = make_record([name], [("Describe the picture.\n<image>", text)])
            file.write(("[" if i == 0 else ",\n") + json.dumps(record))
        file.write("]")


def own_memory(pid):
    """MB of a process that it shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def peak_memory():
    """The most MB this program had; getrusage would count the one that started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(folder, workers, start_method):
    """Start to first batch, and 20 batches, in this process."""
    tokenizer, base = load_tokenizer(folder / "tokenizer"), own_memory("self")
    begun = time.time()
    config = LMConfig(**tokenizer_fields(tokenizer))
    dataset = VLMDataset(folder / "data.json", folder / "images", tokenizer, config, 512, 224)
    read = time.time() - begun
    batches = LengthBatches(np.arange(len(dataset)), dataset.lengths, 16, 16)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context=start_method if workers else None,
    )
    iterator = iter(loader)
    next(iterator)
    first = time.time() - begun
    for _ in range(20):
        next(iterator)
    children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False).stdout
    own = [own_memory(pid) for pid in children.split() if os.path.exists(f"/proc/{pid}/smaps_rollup")]
    result = {
        "records": len(dataset),
        "tokens": int(dataset.lengths.sum()),
        "workers": workers,
        "start_method": start_method,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "seconds_to_read": round(read, 1),
        "seconds_to_first_batch": round(first, 1),
        "main_peak_mb": round(peak_memory()),
        "main_mb": round(own_memory("self")),
        "main_mb_before": round(base),
        "worker_mb": round(max(own)) if workers else None,
    }
    print(json.dumps(result), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=595_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 8])
    parser.add_argument("--start_method", choices=["fork", "spawn"], default="fork")
    parser.add_argument("--folder", type=Path, help="measure in this folder, made by an earlier call")
    args = parser.parse_args()
    if args.folder:
        return measure(args.folder, args.workers[0], args.start_method)
    with tempfile.TemporaryDirectory() as name:
        make_files(Path(name), 64)
        write_records(Path(name), args.records)
        for workers in args.workers:
            flags = ["--folder", name, "--workers", str(workers), "--start_method", args.start_method]
            subprocess.run([sys.executable, __file__, *flags], check=True)


if __name__ == "__main__":
    main()
