"""How training grows with processes: the same batch for each of them (weak), and one batch shared by all (strong).

    python tests/benchmarks/bench_scale.py                       # 1, 2 and 4 processes, each with its share of the cores
    python tests/benchmarks/bench_scale.py --processes 1 2 8     # on as many GPUs, where there are GPUs

Runs 1-pretrain_vlm.py under torchrun on made-up files, 512+8 with cached features, and takes the samples/s of its log, without
the first lines. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from made_up import ROOT, device_name, make_files

STEPS = 8


def samples_per_s(folder, processes, batch_size, device):
    """The median of a run's log lines, the first two left out."""
    out = folder / "out"
    (out / "512_vlm_pretrain.jsonl").unlink(missing_ok=True)
    places = {"vision_path": "clip", "tokenizer_path": "tokenizer", "data_path": "data.json", "images_path": "images"}
    flags = [f"--{name}={folder / file}" for name, file in places.items()]
    flags += [f"--batch_size={batch_size}", f"--device={device}", f"--out_dir={out}", "--log_interval=1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    threads = str(max(1, os.cpu_count() // processes))
    subprocess.run(
        [sys.executable, *launcher, "1-pretrain_vlm.py", "--from_scratch", "--cache_features", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    lines = map(json.loads, (out / "512_vlm_pretrain.jsonl").read_text().splitlines())
    rates = sorted([line["samples_per_s"] for line in lines if "loss" in line][2:])
    return rates[len(rates) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch_size", type=int, default=16, help="of a process (weak), of all together (strong)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rates = {"weak": {}, "strong": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, STEPS * args.batch_size * max(args.processes))
        for count in args.processes:
            rates["weak"][count] = round(samples_per_s(folder, count, args.batch_size, args.device), 1)
            rates["strong"][count] = round(samples_per_s(folder, count, args.batch_size // count, args.device), 1)
    result = {"device": device_name(args.device), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({**result, "batch_size": args.batch_size, "samples_per_s": rates}))


if __name__ == "__main__":
    main()
