"""CLIP's features of all pictures, computed once and kept on disk: a frozen encoder gives the same every time.

Shapes: P tokens per image, V vision width.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.dataset import Pictures, collate_pictures
from model.errors import BadInput, BadRecord
from model.files import read_object


def cache_key(vision_path, image_paths):
    """What a feature cache belongs to: the encoder's files and each picture's name, size and time of change."""
    digest = hashlib.sha256()
    for file in sorted(Path(vision_path).glob("*")):
        if file.suffix in (".safetensors", ".bin", ".json"):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    for path in image_paths:
        try:
            stat = os.stat(path)
        except OSError:
            stat = None
        digest.update(f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


class FeatureCache:
    """fp16 features of a list of pictures in one memory-mapped file (pictures, P, V), named after the key of `cache_key`.

    Until all rows are there it is a .tmp file. The .json beside it has the whole key, how many rows are `done`, and in
    `bad` why for each row whose picture could not be read.
    """

    def __init__(self, folder, key):
        self.file, self.partial, self.note = (Path(folder) / f"{key[:16]}{end}" for end in (".npy", ".tmp", ".json"))
        self.key = key
        self.array, self.bad = None, {}

    def __getstate__(self):
        """What a worker process is sent: it opens the file itself."""
        return {**self.__dict__, "array": None}

    def open(self):
        """Opens the cache if it is whole; False if it must be built."""
        whole = self.note.exists() and self.file.exists() and not self.partial.exists()
        if self.array is None and whole:
            note = read_object(self.note)
            if note.get("key") == self.key:
                self.array = np.load(self.file, mmap_mode="r")
                self.bad = {int(row): why for row, why in note.get("bad", {}).items()}
        return self.array is not None

    def progress(self):
        """How many rows a build that was cut off has left, and the problems among them."""
        note = read_object(self.note) if self.partial.exists() else {}
        return (note.get("done", 0), note["bad"]) if note.get("key") == self.key else (0, {})

    def build(self, encoder, pictures, loader, update):
        """Runs CLIP once over that many pictures, less what `progress` counts. `loader` yields the rest, in the order of
        the cache's rows, as uint8 pixels (N, 3, S, S) and a list of N problems, None for a good picture. OSError if there is
        no room for all of them."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        shape = (pictures, encoder.image_tokens, encoder.vision_width)
        done, bad = self.progress()
        self.write_note(done, bad)
        array = np.lib.format.open_memmap(self.partial, mode="r+" if done else "w+", dtype=np.float16, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process without a word
            with open(self.partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.partial.stat().st_size)
        for pixels, problems in loader:
            features = encoder(pixels).to(device="cpu", dtype=torch.float16).numpy()
            array[done : done + len(features)] = features
            bad |= {done + i: problem for i, problem in enumerate(problems) if problem}
            done += len(features)
            update(len(features))
            array.flush()  # before the note says that they are there
            self.write_note(done, bad)
        os.replace(self.partial, self.file)

    def write_note(self, done, bad):
        """Writes the note, which is never half there."""
        fresh = self.note.with_suffix(".new")
        fresh.write_text(json.dumps({"key": self.key, "done": done, "bad": bad}, ensure_ascii=False), encoding="utf-8")
        os.replace(fresh, self.note)

    def __getitem__(self, rows):
        """Features (len(rows), P, V) as a float16 tensor. BadRecord if a picture of them could not be read."""
        if self.array is None:
            self.open()
        for row in self.bad.keys() & set(rows.tolist()):
            raise BadRecord(*self.bad[row])
        return torch.from_numpy(self.array[rows])


def open_cache(args, dataset, encoder, processes):
    """Gives the dataset its feature cache, which the first process builds, or goes on building, if need be."""
    key = cache_key(args.vision_path, dataset.image_paths) if processes.is_main else None
    cache = FeatureCache(Path(args.out_dir) / "features", processes.broadcast(key))
    if processes.is_main and not cache.open():
        pictures, (done, _) = Pictures(dataset), cache.progress()
        rows = range(done, len(pictures))
        loader = DataLoader(pictures, 64, sampler=rows, collate_fn=collate_pictures, num_workers=args.num_workers)
        with tqdm(total=len(pictures), initial=done, unit="picture", desc="CLIP", disable=None) as bar:
            if bar.disable:
                print(f"running CLIP over {len(rows)} pictures ...", file=sys.stderr, flush=True)
            try:
                cache.build(encoder, len(pictures), loader, bar.update)
            except OSError as error:
                gigabytes = len(pictures) * encoder.image_tokens * encoder.vision_width * 2 / 1e9
                raise BadInput(
                    f"{cache.partial} could not be written ({error.strerror}): it takes {gigabytes:.1f} GB; make room, name "
                    "another --out_dir, or leave out --cache_features"
                ) from None
    processes.barrier()
    if not cache.open():
        raise BadInput(
            f"{cache.file} was not found by process {processes.rank}: --out_dir must be shared by all machines"
        )
    dataset.features = cache
