"""How fast pictures and texts become batches: decoding, resizing and tokenising, on one core and in workers.

    python tests/benchmarks/bench_data.py
    python tests/benchmarks/bench_data.py --workers 0 4 16 --seconds 5

In a temporary folder it makes JPEGs of several sizes, 128x128 (the published data's) to a phone's 4,032x3,024, and captions.
Pictures a second and core are measured one by one; with workers, whole batches of 16 as a training gets them. The last line is
JSON.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from made_up import make_files  # puts the repository on the path
from PIL import Image
from torch.utils.data import DataLoader

from dataset.batches import LengthBatches
from dataset.dataset import VLMDataset, collate
from dataset.records import parse_record
from model.checkpoint import load_tokenizer
from model.conversation import encode_conversations, tokenizer_fields
from model.images import Preprocess, read_pixels
from model.LMConfig import LMConfig

SIZES = [(128, 128), (640, 480), (1600, 1200), (4032, 3024)]


def a_second(work, seconds):
    """How often `work` is done in a second."""
    work()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        work()
        count += 1
    return count / (time.perf_counter() - begun)


def batches_a_second(dataset, workers, seconds):
    """Of 16 samples each; the time in which workers start is not counted."""
    sampler = LengthBatches(torch.arange(len(dataset)).numpy(), dataset.lengths, 16, 16)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for _ in range(2 * workers + 1):  # what was read ahead meanwhile
        next(batches)
    return a_second(lambda: next(batches), seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, 512)
        pictures, path = {}, folder / "photo.jpg"
        photo = Image.effect_mandelbrot(SIZES[-1], (-2, -1.2, 1, 1.2), 100).convert("RGB")
        for size in SIZES:
            photo.resize(size).save(path, quality=90)
            pictures["x".join(map(str, size))] = round(
                a_second(lambda: read_pixels(path, Preprocess()), args.seconds), 1
            )
        tokenizer = load_tokenizer(folder / "tokenizer")
        config = LMConfig(**tokenizer_fields(tokenizer))
        records = json.loads((folder / "data.json").read_text())

        def tokenise():
            turns = [parse_record(record, "", config.image_special_token)[0] for record in records]
            encode_conversations(tokenizer, turns, config)

        rate = a_second(tokenise, args.seconds) * len(records)
        dataset = VLMDataset(folder / "data.json", folder / "images", tokenizer, config, 512, Preprocess())
        in_workers = {workers: 16 * batches_a_second(dataset, workers, args.seconds) for workers in args.workers}
    result = {
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "pictures_per_s_and_core": pictures,
        "records_tokenised_per_s": round(rate),
        "samples_per_s_with_workers": {workers: round(rate) for workers, rate in in_workers.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
