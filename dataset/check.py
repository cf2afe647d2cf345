"""Reads files of records, of any form, and all their pictures before training does; reports which can't be used, and why.

Of each reason the first ten are shown. Ends with exit code 1 if any record can't be used.

python -m dataset.check dataset/pretrain_vlm_data.json --images_path dataset/pretrain_images
python -m dataset.check dataset/pretrain_i2t.parquet     # with the pictures inside
"""

import argparse
import math
import os
import sys

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from model.arguments import PROCESSES, TOKENS, parse_with_demo
from model.checkpoint import load_tokenizer
from model.conversation import tokenizer_fields
from model.errors import BadRecord, run_script
from model.files import in_repository
from model.images import Preprocess
from model.LMConfig import LMConfig
from model.stages import DEMO_MODEL, STAGES, TOKENIZER_PATH

from .dataset import Pictures, VLMDataset, collate_pictures

SMALL = Preprocess(32)  # only whether a picture can be read matters
BIN = 32  # tokens per line of the histogram


def check_pictures(dataset, workers):
    """Opens all pictures of a VLMDataset and adds the records whose pictures can't be read to its `problems`."""
    pictures = Pictures(dataset)
    loader = DataLoader(pictures, batch_size=64, collate_fn=collate_pictures, num_workers=workers)
    bad = {}  # row of a picture -> (reason, message)
    row = 0
    with tqdm(total=len(pictures), unit=" pictures", desc="pictures") as bar:
        for _, problems in loader:
            for problem in problems:
                if problem:
                    bad[row] = problem
                row += 1
            bar.update(len(problems))

    # a bad picture spoils every record that names it
    for index, number in enumerate(dataset.record_numbers.tolist()):
        for row in bad.keys() & set(dataset.image_rows[index].tolist()):
            reason, message = bad[row]
            dataset.problems.add(BadRecord(reason, f"record {number}: {message}"), number)


def report(dataset):
    """The problems found and a histogram of the records' lengths, as text."""
    total = dataset.problems.total
    by_reason = dataset.problems.by_reason
    bad = set().union(*by_reason.values())
    lines = [f"{total:,} records, {total - len(bad):,} can be used"]
    lines += [f"  {len(numbers):,} skipped: {reason}" for reason, numbers in by_reason.items()]
    if not len(dataset):
        return "\n".join(lines)
    lines.insert(0, dataset.describe())

    lengths = dataset.lengths
    lines.append(
        f"{lengths.sum():,} tokens, {lengths.mean():.0f} a record on average; {dataset.num_truncated:,} records are truncated"
    )
    counts, edges = np.histogram(lengths, bins=np.arange(0, lengths.max() + BIN, BIN))
    for count, edge in zip(counts, edges, strict=False):
        if count:
            bar = "#" * math.ceil(60 * count / counts.max())
            lines.append(f"  {edge:>5} to {edge + BIN - 1:<5}{count:>10,}  {bar}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="files of records, or a folder of them")
    parser.add_argument(
        "--images_path", default=STAGES["pretrain"].images_path, help="folder or archive of their pictures"
    )
    parser.add_argument(
        "--out_dir", default=in_repository("out"), help="folder in which Parquet rows and tokens are kept"
    )
    parser.add_argument("--tokenizer_path", default=TOKENIZER_PATH, help="folder of the tokenizer")
    parser.add_argument("--max_seq_len", type=TOKENS, default=512, help="tokens a record, as in training")
    parser.add_argument("--num_workers", type=PROCESSES, default=os.cpu_count(), help="processes that read pictures")
    demo = {name: DEMO_MODEL[name] for name in ("images_path", "tokenizer_path")}
    args = parse_with_demo(parser, demo)
    tokenizer = load_tokenizer(args.tokenizer_path)
    config = LMConfig(**tokenizer_fields(tokenizer))

    # any number of bad records is tolerated: all of them should be reported
    strictness = {"strict": False, "max_fraction": 1.0, "notify": tqdm.write, "num_shown": 10, "allow_empty": True}
    dataset = VLMDataset(
        args.files, args.images_path, tokenizer, config, args.max_seq_len, SMALL, args.out_dir, **strictness
    )
    check_pictures(dataset, args.num_workers)
    print(report(dataset))
    sys.exit(bool(dataset.problems.count))


if __name__ == "__main__":
    run_script(main)
