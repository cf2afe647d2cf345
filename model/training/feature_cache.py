"""CLIP's features of all pictures, computed once and kept on disk: a frozen encoder gives the same ones every time.

Shapes: N pictures of a batch, S picture size, P tokens per image, V vision width.
"""

import errno
import hashlib
import json
import os
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.dataset import Pictures, collate_pictures
from model.errors import BadInput, BadRecord
from model.files import read_json_object


def cache_key(vision_path, fingerprints):
    """Hash of what the features depend on: name, size and time of change of the encoder's files and of each picture.

    fingerprints: a text for each picture that changes when the picture does.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(vision_path).glob("*")):
        if file.suffix in (".safetensors", ".bin", ".json"):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    for fingerprint in fingerprints:
        digest.update(f"{fingerprint}\n".encode(errors="backslashreplace"))
    return digest.hexdigest()


class FeatureCache:
    """float16 features of a list of pictures in one memory-mapped file (pictures, P, V), named after its `cache_key`.

    Until all rows are there it is a .tmp file. The .json beside it, the note, holds the whole `key`, the number of rows
    `done`, and in `bad`, for each row whose picture could not be read, the reason and the message.
    """

    def __init__(self, folder, key):
        self.key = key
        self.file = Path(folder) / f"{key[:16]}.npy"
        self.partial = self.file.with_suffix(".tmp")
        self.note = self.file.with_suffix(".json")
        self.array = None
        self.bad = {}

    def __getstate__(self):
        """What pickle sends to a DataLoader worker: not the array, as each worker maps the file itself."""
        return {**self.__dict__, "array": None}

    def open(self):
        """Opens the cache if it is complete; False if it must be built."""
        complete = self.note.exists() and self.file.exists() and not self.partial.exists()
        if self.array is None and complete:
            note = read_json_object(self.note)
            if note.get("key") == self.key:
                try:
                    self.array = np.load(self.file, mmap_mode="r")
                except (OSError, EOFError, ValueError):  # damaged
                    return False
                self.bad = {int(row): problem for row, problem in note.get("bad", {}).items()}
        return self.array is not None

    def progress(self):
        """Progress of an interrupted build: (rows done, their problems)."""
        note = read_json_object(self.note) if self.partial.exists() else {}
        if note.get("key") != self.key:
            return 0, {}
        return note.get("done", 0), note["bad"]

    def build(self, encoder, num_pictures, loader, update):
        """Runs CLIP over `num_pictures` pictures and writes their features, continuing after the rows that are done.

        loader: yields the rest, in the order of the rows, as uint8 pixels (N, 3, S, S) and a list of N problems, None
        for a good picture. update: called with the number of new rows. OSError if the disk has no room for all rows.
        """
        # the note comes first: a file without one would be of unknown content
        self.file.parent.mkdir(parents=True, exist_ok=True)
        done, bad = self.progress()
        self.write_note(done, bad)

        shape = (num_pictures, encoder.image_tokens, encoder.vision_width)
        mode = "r+" if done else "w+"
        array = np.lib.format.open_memmap(self.partial, mode=mode, dtype=np.float16, shape=shape)
        if hasattr(os, "posix_fallocate"):
            # reserve the space now: a full disk would otherwise kill us with SIGBUS
            with open(self.partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.partial.stat().st_size)

        for pixels, problems in loader:
            # a picture that can't be read is black, and its problem is noted instead
            features = encoder(pixels).to(device="cpu", dtype=torch.float16).numpy()  # (N, P, V)
            array[done : done + len(features)] = features
            for row, problem in enumerate(problems, start=done):
                if problem:
                    bad[row] = problem
            done += len(features)
            update(len(features))

            # rows reach the disk before the note counts them, so a killed build never counts too many
            array.flush()
            self.write_note(done, bad)

        # only the complete file has the final name; Windows renames no file that is still mapped
        del array
        os.replace(self.partial, self.file)

    def write_note(self, done, bad):
        """Writes the note, atomically."""
        new = self.note.with_suffix(".new")
        new.write_text(json.dumps({"key": self.key, "done": done, "bad": bad}), encoding="utf-8")
        os.replace(new, self.note)

    def __getitem__(self, rows):
        """Features (len(rows), P, V) as a float16 tensor. BadRecord if one of these pictures could not be read."""
        if self.array is None:  # first access in a worker
            self.open()
        for row in self.bad.keys() & set(rows.tolist()):
            raise BadRecord(*self.bad[row])
        return torch.from_numpy(self.array[rows])


def open_cache(dataset, encoder, processes, *, folder, vision_path, num_workers):
    """The FeatureCache of a VLMDataset's pictures, in `folder`. The main process builds what is missing of it."""
    # hashing looks at every picture's file, so only one process does it
    key = None
    if processes.is_main:
        differs = ["without class token"] if encoder.first else []
        key = cache_key(vision_path, chain(differs, dataset.fingerprints()))
    cache = FeatureCache(folder, processes.broadcast(key))

    if processes.is_main and not cache.open():
        pictures = Pictures(dataset)
        done, _ = cache.progress()
        rows = range(done, len(pictures))
        loader = DataLoader(pictures, 64, sampler=rows, collate_fn=collate_pictures, num_workers=num_workers)
        with tqdm(total=len(pictures), initial=done, unit="picture", desc="CLIP", disable=None) as bar:
            if bar.disable:
                print(f"running CLIP over {len(rows)} pictures ...", file=sys.stderr, flush=True)
            try:
                cache.build(encoder, len(pictures), loader, bar.update)
            except OSError as error:
                gigabytes = len(pictures) * encoder.image_tokens * encoder.vision_width * 2 / 1e9
                # only a full disk, or a limit on the size of files, is a matter of room
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                advice = f"it takes {gigabytes:.1f} GB; make room, " if full else ""
                raise BadInput(
                    f"{cache.file} could not be written ({error.strerror}): {advice}name another --out_dir, or use "
                    "--cache_features False"
                ) from None

    # the others wait until it is built
    processes.barrier()
    if not cache.open():
        raise BadInput(
            f"{cache.file} was not found by process {processes.rank}: --out_dir must be shared by all machines"
        )
    return cache
