"""What data of the size of the real ones cost, by their form: seconds to the first batch, memory, pictures a second.

    python tests/benchmarks/bench_start.py                           # 600,000 records; files, zip, Parquet; 0, 2 and 8 workers
    python tests/benchmarks/bench_start.py --records 230000 --forms files --start_method spawn

In a temporary folder it writes captions of 12 to 24 words and as many JPEGs of 128x128 pixels, about 2 kB each, as files, in a zip
(stored), and inside Parquet of 12 row groups. For each form and number of workers a process of its own does what a training
does before its first step, then reads 200 batches of 16 in a training's random order. The first process of a form reads and
tokenises everything; the others find what it kept. Files are in the page cache. Memory is what Linux tells: the peak of the main
process, and of a worker what no other process shares. Every line is JSON.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from made_up import make_files, words  # puts the repository on the path
from PIL import Image
from torch.utils.data import DataLoader

from dataset.batches import LengthBatches
from dataset.dataset import VLMDataset, collate
from dataset.records import make_record
from model.checkpoint import load_tokenizer
from model.conversation import tokenizer_fields
from model.images import Preprocess
from model.LMConfig import LMConfig


def make_pictures(count):
    """JPEGs of about 2 kB, all different."""
    random_numbers = np.random.default_rng(0)
    shapes = random_numbers.integers(0, 255, (4096, 6, 6, 3), dtype=np.uint8)
    files = []
    for shape in shapes:
        file = io.BytesIO()
        Image.fromarray(shape).resize((128, 128), Image.Resampling.BICUBIC).save(file, "JPEG", quality=75)
        files.append(file.getvalue())
    for i in range(count):
        yield (
            files[random_numbers.integers(len(files))] + f"{i:08d}".encode()
        )  # what follows the end of a JPEG is ignored


def write_data(folder, count, form):
    """Writes records and pictures of a form -> (data_path, images_path)."""
    rng = random.Random(0)
    vocabulary = words(rng, 20000)
    folder.mkdir()
    archive = zipfile.ZipFile(folder / "images.zip", "w") if form == "zip" else None
    records, pictures = [], []
    for i, picture in enumerate(make_pictures(count)):
        name = f"{i // 1000:05d}/{i:09d}.jpg"
        text = " ".join(rng.choices(vocabulary, k=rng.randint(12, 24)))
        records.append(make_record([name], [("Describe the picture.\n<image>", text)]))
        if form == "zip":
            archive.writestr(name, picture)
        elif form == "parquet":
            pictures.append(picture)
        else:
            if i % 1000 == 0:
                (folder / "images" / f"{i // 1000:05d}").mkdir(parents=True)
            (folder / "images" / name).write_bytes(picture)

    if form == "parquet":
        import pyarrow.parquet

        table = {"conversations": [json.dumps(record["conversations"]) for record in records], "image_bytes": pictures}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / "data.parquet", row_group_size=-(-count // 12))
        return folder / "data.parquet", folder / "nowhere"
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    if form == "zip":
        archive.close()
        return folder / "data.json", folder / "images.zip"
    return folder / "data.json", folder / "images"


def own_memory(pid):
    """MB of a process that it shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def own_anonymous_memory():
    """MB of this process that are not pages of a file, which Linux takes back when it needs them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def peak_memory():
    """The most MB this program had; getrusage would count the one that started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(form, data_path, images_path, tokenizer_path, workers, start_method):
    """Start to first batch, and 200 batches, in this process."""
    tokenizer, base = load_tokenizer(tokenizer_path), own_memory("self")
    begun = time.time()
    config = LMConfig(**tokenizer_fields(tokenizer))
    dataset = VLMDataset(data_path, images_path, tokenizer, config, 512, Preprocess(), data_path.parent / "out")
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
    for _ in range(2 * workers):  # what was read ahead meanwhile
        next(iterator)
    reading = time.time()
    for _ in range(200):
        next(iterator)
    reading = time.time() - reading
    children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False).stdout
    own = [own_memory(pid) for pid in children.split() if os.path.exists(f"/proc/{pid}/smaps_rollup")]
    result = {
        "form": form,
        "records": len(dataset),
        "tokens": int(dataset.lengths.sum()),
        "workers": workers,
        "start_method": start_method,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "seconds_to_read": round(read, 1),
        "seconds_to_first_batch": round(first, 1),
        "pictures_a_second": round(200 * 16 / reading),
        "main_peak_mb": round(peak_memory()),
        "main_without_files_mb": round(own_anonymous_memory()),
        "main_mb": round(own_memory("self")),
        "main_mb_before": round(base),
        "worker_mb": round(max(own)) if workers else None,
    }
    print(json.dumps(result), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=600_000)
    parser.add_argument("--forms", nargs="+", choices=["files", "zip", "parquet"], default=["files", "zip", "parquet"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 0, 2, 8])
    parser.add_argument("--start_method", choices=["fork", "spawn"], default="fork")
    parser.add_argument("--measure", type=Path, nargs=3, help="data, pictures and tokenizer made by an earlier call")
    args = parser.parse_args()
    if args.measure:
        return measure(args.forms[0], *args.measure, args.workers[0], args.start_method)
    with tempfile.TemporaryDirectory() as name:
        make_files(Path(name), 64)
        for form in args.forms:
            paths = write_data(Path(name) / form, args.records, form)
            for workers in args.workers:
                flags = ["--forms", form, "--workers", str(workers), "--start_method", args.start_method]
                paths_flags = ["--measure", *map(str, paths), f"{name}/tokenizer"]
                subprocess.run([sys.executable, __file__, *flags, *paths_flags], check=True)


if __name__ == "__main__":
    main()
