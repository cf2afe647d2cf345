"""Conversations and pictures in, batches of token ids, labels and pixels out.

`python -m model.dataset --check FILE` reads a whole file and its pictures and tells what can't be used, and why.

All three stages read one JSON format, a list of records (dataset/README.md):

    {"image": "a.jpg, b.jpg", "conversations": [{"role": "user", "content": "<image>\n<image>\n..."}, {"role": "assistant", ...}]}

Shapes: B batch, T tokens, N images in the batch, P tokens per image.
"""

import argparse
import json
import math
import os
import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .conversation import encode_conversations, split_at_images, tokenizer_fields
from .errors import BadInput, BadRecord
from .files import refuse_pointer
from .images import read_pixels
from .LMConfig import LMConfig
from .model import positions_before_labels

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
MOST_IN_A_ROW = 100  # bad records that are passed over for one good one


# --- records --------------------------------------------------------------------------------------------------------


CHUNK = 2**22  # characters of a file that are read at a time
SPACE, COMMA, END = re.compile(r"\s*"), re.compile(r"\s*,\s*"), re.compile(r"\s*\]\s*$")


def read_records(path):
    """The records of a JSON file, a list, one after the other, so that it is never whole in memory.

    BadInput if it is missing or no such list, with the number of the record that is not valid JSON.
    """
    refuse_pointer(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from parse_list(file, path)
    except FileNotFoundError:
        raise BadInput(
            f"{path} not found: see dataset/README.md for where to get it, use --data_path, or try --demo"
        ) from None
    except OSError as error:
        raise BadInput(f"{path} could not be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from None


def parse_list(file, path):
    """The items of the JSON list in an open file."""
    text = file.read(CHUNK).lstrip()
    if not text.startswith("["):
        raise BadInput(
            f"{path} should be a JSON list of records with 'image' and 'conversations', and begins with {text[:20]!r}"
        )
    decoder, number, at, whole = json.JSONDecoder(), 0, 1, False
    while not END.match(text, at):
        before = (COMMA if number else SPACE).match(text, at)
        try:
            if not before:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            record, end = decoder.raw_decode(text, before.end())
        except (ValueError, RecursionError) as error:
            if whole:
                why = f"{error.msg} near {text[error.pos :][:20]!r}" if hasattr(error, "msg") else error
                raise BadInput(f"{path}, record {number}, is not valid JSON ({why})") from None
            chunk = file.read(CHUNK)
            text, at, whole = text[at:] + chunk, 0, not chunk
            continue
        yield record
        number, at = number + 1, end
    if not number:
        raise BadInput(f"{path} is an empty list")


def parse_record(record, where, placeholder):
    """A record -> (turns, image names). BadRecord says what is wrong `where`."""
    turns = [parse_turn(turn, where) for turn in conversations_of(record, where)]
    roles = [role for role, _ in turns]
    asked = roles[1:] if roles[0] == "system" else roles
    if asked != ["user", "assistant"] * (len(asked) // 2):
        raise BadRecord(
            "unpaired turns", f"{where}: user and assistant should take turns, not {', '.join(roles)[:200]}"
        )
    if not any(role == "assistant" and text.strip() for role, text in turns):
        raise BadRecord("no answer", f"{where}: no turn of the assistant says anything")
    names = [name.strip() for name in record.get("image", "").split(",") if name.strip()]
    wanted = sum(len(split_at_images(text, placeholder)) - 1 for _, text in turns)
    if wanted != len(names):
        many = f"{len(names)} images in 'image', but {wanted} <image> in its conversations"
        raise BadRecord("images and <image> differ", f"{where}: {many}")
    return turns, names


def conversations_of(record, where):
    """A record's list of turns, once it is certain that it has one."""
    good = isinstance(record, dict) and isinstance(record.get("image", ""), str)
    turns = record.get("conversations") if good else None
    if not isinstance(turns, list) or not turns:
        shape = "expected an object with 'image', a text, and 'conversations', a list of turns"
        raise BadRecord("wrong shape", f"{where}: {shape}, not {shortened(record)}")
    return turns


def parse_turn(turn, where):
    """A turn of either spelling -> (role, text)."""
    role, text = None, None
    if isinstance(turn, dict):
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        shape = f"expected a turn with a role ({', '.join(ROLES)}) and a text as content"
        raise BadRecord("wrong shape", f"{where}: {shape}, not {shortened(turn)}")
    return ROLES[role], text


def shortened(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."


class Problems:
    """Records that can't be used, counted by reason.

    strict: the first one ends the run; more than `most` of them, as a fraction of the `total`, do so anyway.
    tell: called with a line about the first of each reason, or None. total: records in the data, None until all have been seen.
    """

    def __init__(self, strict=True, most=0.0, tell=None):
        self.strict, self.most, self.tell, self.total = strict, most, tell, None
        self.numbers = {}  # reason -> numbers of such records

    def add(self, problem, number):
        """Counts a record once, however often it is met. BadInput if that makes too many."""
        if self.strict:
            raise BadInput(str(problem))
        numbers = self.numbers.setdefault(problem.reason, set())
        if self.tell and not numbers:
            self.tell(f"left out, as are others like it: {problem}")
        numbers.add(number)
        if self.total:
            self.check()

    def take(self, batch):
        """Counts what a batch of `collate` tells of, and takes it out."""
        for problem, number in batch.pop("problems"):
            self.add(problem, number)

    def check(self):
        """BadInput if there are too many."""
        if self.count > self.most * self.total:
            raise BadInput(
                f"{self}, over --max_bad_fraction {self.most:g} of {self.total}: mend the data, or allow more"
            )

    def merge(self, others):
        """Takes over what other processes, or an earlier part of the run, have counted."""
        for numbers in others:
            for reason, some in numbers.items():
                self.numbers.setdefault(reason, set()).update(some)

    @property
    def count(self):
        return sum(map(len, self.numbers.values()))

    def __str__(self):
        parts = [f"{len(numbers)} {reason}" for reason, numbers in self.numbers.items()]
        return f"{self.count} records left out ({', '.join(parts)})"


def fitting(ids, limit, config):
    """How many tokens of a conversation, and how many images, fit into `limit` tokens without a part of an image."""
    ids, image = ids.tolist(), config.image_ids
    place, images = 0, 0
    while place < limit:
        if ids[place] != image[0] or ids[place : place + len(image)] != image:
            place += 1
        elif place + len(image) > limit:
            return place, images
        else:
            place, images = place + len(image), images + 1
    return limit, images


class Column:
    """Many small arrays of one type, end to end in one tensor, which worker processes share; grown row by row.

    Item i is a slice of it. It is filled with `add`, and read after `freeze`.
    """

    def __init__(self, dtype):
        self.dtype, self.values, self.lengths = np.dtype(dtype), bytearray(), []

    def add(self, values):
        self.values += values.astype(self.dtype).tobytes()
        self.lengths.append(len(values))

    def freeze(self):
        self.offsets = torch.from_numpy(np.cumsum([0, *self.lengths]))
        self.values = torch.frombuffer(self.values or bytearray(1), dtype=torch.uint8)
        del self.lengths

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        begin, end = self.offsets[i : i + 2].tolist()
        size = self.dtype.itemsize
        return self.values[begin * size : end * size].numpy().view(self.dtype)


class VLMDataset(Dataset):
    """One record an item: `input_ids` (T,), `labels` (T,), and its pictures as `pixel_values` (n, 3, S, S) uint8.

    Everything is tokenised once, here, into flat arrays that worker processes share. `labels` are the ids of the answers
    and of the `</s>` that ends each; all else is -100. Records that can't be used, or whose answers lie wholly beyond
    `max_seq_len`, are left out and counted in `problems`, whose arguments are `strictness`; `cut_off` counts those that lose
    only their end. A record whose picture turns out to be bad when it is read is replaced by the next good one, so that
    batches keep their size and resumed runs their place; items tell of it in `problems`. With `features` set (a
    FeatureCache over `image_paths`), items carry `image_features` (n, P, V) instead of pixels and no picture is opened.
    """

    def __init__(self, data_path, images_path, tokenizer, config, max_seq_len, image_size, **strictness):
        self.images_path, self.image_size = Path(images_path), image_size
        self.features, self.cut_off = None, 0
        self.problems = Problems(**strictness)
        if not self.images_path.is_dir():
            raise BadInput(
                f"{images_path} is not a folder: see dataset/README.md for the pictures, or use --images_path"
            )
        row_of = {}  # image name -> its row in `names`
        numbers = []
        self.ids, self.answers = Column(np.min_scalar_type(config.vocab_size)), Column(bool)
        self.rows, self.names = Column(np.int32), Column(np.uint8)
        for number, ids, answers, names in self.read(data_path, tokenizer, config, max_seq_len):
            numbers.append(number)
            self.ids.add(ids)
            self.answers.add(answers)
            self.rows.add(np.array([row_of.setdefault(name, len(row_of)) for name in names]))
        if not numbers:
            raise BadInput(f"{data_path}: no record has an answer within --max_seq_len {max_seq_len} tokens")
        for name in row_of:
            self.names.add(np.frombuffer(name.encode(), np.uint8))
        for column in (self.ids, self.answers, self.rows, self.names):
            column.freeze()
        self.numbers = torch.tensor(numbers)
        self.coco_prefix = ""
        if row_of:
            self.coco_prefix = coco_prefix(self.images_path, next(iter(row_of)))

    def read(self, data_path, tokenizer, config, max_seq_len):
        """Yields (number, token ids, is_answer flags, image names) of each record that can be used."""
        silent = None if self.problems.tell else True  # None: on a terminal only
        records = tqdm(read_records(data_path), desc=str(data_path), unit=" records", disable=silent)
        records, placeholder = enumerate(records), config.image_special_token
        while block := list(islice(records, 4096)):
            parsed = []
            for number, record in block:
                try:
                    parsed.append((number, *parse_record(record, f"{data_path}, record {number}", placeholder)))
                except BadRecord as problem:
                    self.problems.add(problem, number)
            encoded = encode_conversations(tokenizer, [turns for _, turns, _ in parsed], config)
            for (number, _, names), (ids, answers) in zip(parsed, encoded, strict=True):
                if len(ids) > max_seq_len:
                    tokens, images = fitting(ids, max_seq_len, config)
                    ids, answers, names = ids[:tokens], answers[:tokens], names[:images]
                    self.cut_off += answers.any()
                if answers.any():
                    yield number, ids, answers, names
                else:
                    long = f"{data_path}, record {number}: its answers lie beyond --max_seq_len {max_seq_len}"
                    self.problems.add(BadRecord("answer beyond --max_seq_len", long), number)
        if self.cut_off and self.problems.tell:
            self.problems.tell(f"{self.cut_off} records lose the end of an answer at --max_seq_len {max_seq_len}")
        self.problems.total = number + 1
        self.problems.check()

    @property
    def lengths(self):
        """Tokens of each item."""
        return np.diff(self.ids.offsets)

    def image_path(self, row):
        return self.images_path / f"{self.coco_prefix}{self.names[row].tobytes().decode()}"

    @property
    def image_paths(self):
        """The files of all pictures, each once, in the order of a FeatureCache's rows."""
        return map(self.image_path, range(len(self.names)))

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        problems = []
        for i in range(MOST_IN_A_ROW):
            other = (index + i) % len(self)
            try:
                return {**self.item(other), "problems": problems}
            except BadRecord as problem:
                problems.append((problem, self.numbers[other].item()))
        raise BadInput(f"{MOST_IN_A_ROW} records in a row can't be used; the last: {problems[-1][0]}")

    def item(self, index):
        """A record as it is in the file. BadRecord if one of its pictures can't be read."""
        ids, rows = self.ids[index].astype(np.int64), self.rows[index]
        item = {"input_ids": ids, "labels": np.where(self.answers[index], ids, -100)}
        if self.features is not None:
            item["image_features"] = self.features[rows]
        else:
            item["pixel_values"] = [read_pixels(self.image_path(row), self.image_size) for row in rows]
        return item


def coco_prefix(folder, name):
    """What stands before the names of a folder's files and not in its records, which name this one."""
    prefix = "COCO_train2014_"
    return prefix if not (folder / name).exists() and (folder / f"{prefix}{name}").exists() else ""


class Pictures(Dataset):
    """Only the pictures of a VLMDataset, each once, as uint8 (3, S, S): what a FeatureCache is built from."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset.names)

    def __getitem__(self, row):
        """(pixels, None), or for a picture that can't be read a black one and (reason, message)."""
        size = self.dataset.image_size
        try:
            return read_pixels(self.dataset.image_path(row), size), None
        except BadRecord as problem:
            return torch.zeros(3, size, size, dtype=torch.uint8), (problem.reason, str(problem))


# --- batches --------------------------------------------------------------------------------------------------------


def collate_pictures(items):
    """Items of `Pictures` -> (pixels (N, 3, S, S), list of N problems)."""
    pixels, problems = zip(*items, strict=True)
    return torch.stack(pixels), list(problems)


def collate(items):
    """Items -> `input_ids`, `labels` (B, T), T the longest rounded up to 8; pictures of all samples in one flat list.

    `label_positions` (L,) are the places before labels that count, for `MiniMindLM`.
    `problems` lists the records that could not be used, each with its number in the file.
    """
    length = -(-max(len(item["input_ids"]) for item in items) // 8) * 8
    batch = {
        "problems": [problem for item in items for problem in item["problems"]],
        "input_ids": torch.zeros(len(items), length, dtype=torch.long),
        "labels": torch.full((len(items), length), -100, dtype=torch.long),
    }
    for row, item in enumerate(items):
        for name in ("input_ids", "labels"):
            batch[name][row, : len(item[name])] = torch.from_numpy(item[name])
    batch["label_positions"] = positions_before_labels(batch["labels"])
    if "image_features" in items[0]:
        batch["image_features"] = torch.cat([item["image_features"] for item in items])  # (N, P, V)
    else:
        pixels = [pixels for item in items for pixels in item["pixel_values"]]
        batch["pixel_values"] = torch.stack(pixels) if pixels else None  # (N, 3, S, S)
    return batch


class LengthBatches:
    """Batch sampler: a new random order each epoch, in which every batch holds samples of like length.

    Each group of 64 global batches of the shuffled order is sorted by length, cut into batches, and the batches are
    shuffled again. All processes draw the same order. A global batch has `size` samples: rank r takes every world-th of
    them from r on, and yields them as `parts` batches of `batch_size`, so that the samples of a step don't depend on how
    they are divided. The last global batch of an epoch may be smaller; the fewer than `world` samples that can't be dealt
    evenly are left out of that epoch.

    indices: the samples to use; lengths: of all samples. BadInput if a step has fewer samples than there are processes.
    """

    def __init__(self, indices, lengths, size, batch_size, rank=0, world=1, seed=0):
        self.indices, self.lengths, self.size, self.batch_size = indices, lengths[indices], size, batch_size
        self.rank, self.world, self.seed = rank, world, seed
        if size < world:
            raise BadInput(f"{world} processes can't share the {size} samples of a step: resume with at most {size}")
        self.begin(0)

    def begin(self, epoch, done=0):
        """Sets the epoch that is iterated next, and how many of its global batches have been seen already."""
        self.epoch, self.done = epoch, done

    @property
    def steps(self):
        """Global batches an epoch."""
        return len(self.indices) // self.size + (len(self.indices) % self.size >= self.world)

    @property
    def parts(self):
        """Batches that this process yields of a whole global batch."""
        return math.ceil(len(range(self.rank, self.size, self.world)) / self.batch_size)

    def __len__(self):
        left = len(self.indices) % self.size // self.world
        return self.parts * (len(self.indices) // self.size) + math.ceil(left / self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.indices))
        # a stable sort by (group, length) keeps the random order among samples of the same length
        order = order[np.lexsort((self.lengths[order], np.arange(len(order)) // (64 * self.size)))]
        whole = len(order) // self.size
        for i in [*rng.permutation(whole), *range(whole, self.steps)][self.done :]:  # the smaller one is the last
            batch = order[i * self.size : (i + 1) * self.size]
            if i == whole:
                batch = batch[: len(batch) // self.world * self.world]
            yield from cut_up(self.indices[batch[self.rank :: self.world]], self.batch_size)


class TokenBatches:
    """Batch sampler: as many samples of like length a batch as fit into `batch_tokens`, padding included.

    Where a batch ends hangs on the lengths alone, which are sorted from long to short; the order among samples of the same
    length, and that of the batches, is a new one each epoch. A step has `size` batches, of which rank r takes every world-th,
    so that they don't depend on how they are dealt. The last step's may be smaller; fewer than `size` samples are left out.

    indices, lengths: as in `LengthBatches`. BadInput if the longest sample alone is longer than a batch.
    """

    def __init__(self, indices, lengths, batch_tokens, size, rank=0, world=1, seed=0):
        self.indices, self.lengths, self.size = indices, lengths[indices], size
        self.rank, self.world, self.seed = rank, world, seed
        rounded = np.sort(-self.lengths) // 8 * -8  # as `collate` rounds, from long to short
        if rounded[0] > batch_tokens:
            raise BadInput(f"the longest sample has {rounded[0]} tokens, over --batch_tokens {batch_tokens}: raise it")
        if size < world:
            raise BadInput(f"{world} processes can't share the {size} batches of a step: resume with at most {size}")
        self.cuts = [0]  # where each step's samples begin, and the last one's end
        while len(rounded) - self.cuts[-1] >= size:
            samples = min(batch_tokens // rounded[self.cuts[-1]], (len(rounded) - self.cuts[-1]) // size)
            self.cuts.append(self.cuts[-1] + int(samples) * size)
        self.begin(0)

    def begin(self, epoch, done=0):
        """Sets the epoch that is iterated next, and how many of its steps have been seen already."""
        self.epoch, self.done = epoch, done

    @property
    def steps(self):
        """Optimizer steps an epoch."""
        return len(self.cuts) - 1

    @property
    def parts(self):
        """Batches that this process yields for each step."""
        return len(range(self.rank, self.size, self.world))

    def __len__(self):
        return self.parts * self.steps

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.indices))
        order = self.indices[order[np.argsort(-self.lengths[order], kind="stable")]]
        for i in rng.permutation(self.steps)[self.done :]:
            step = order[self.cuts[i] : self.cuts[i + 1]]
            for batch in range(self.rank, self.size, self.world):
                yield step[batch :: self.size].tolist()


class SortedBatches:
    """Batch sampler for measuring: each sample once, in batches of like length; rank r takes every world-th batch."""

    def __init__(self, indices, lengths, batch_size, rank=0, world=1):
        batches = cut_up(indices[np.argsort(lengths[indices], kind="stable")], batch_size)
        self.batches = list(batches)[rank::world]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def cut_up(indices, size):
    """An array as lists of `size` of its numbers, the last one possibly shorter."""
    for begin in range(0, len(indices), size):
        yield indices[begin : begin + size].tolist()


# --- python -m model.dataset --check FILE ---------------------------------------------------------------------------


def check(dataset, workers):
    """Opens all pictures of a VLMDataset, and adds to its `problems` the records whose pictures can't be read."""
    pictures = Pictures(dataset)
    loader = DataLoader(pictures, batch_size=64, collate_fn=collate_pictures, num_workers=workers)
    bad = {}
    with tqdm(total=len(pictures), unit="picture", desc="pictures") as bar:
        for pixels, problems in loader:
            bad.update((bar.n + i, BadRecord(*problem)) for i, problem in enumerate(problems) if problem)
            bar.update(len(pixels))
    for index, number in enumerate(dataset.numbers.tolist()):
        for row in bad.keys() & set(dataset.rows[index].tolist()):
            dataset.problems.add(bad[row], number)


def report(dataset):
    """What `check` found, and how long the records are, as text."""
    numbers = dataset.problems.numbers
    good = dataset.problems.total - len(set().union(*numbers.values()))
    lines = [f"{dataset.problems.total:,} records, {good:,} can be used"]
    lines += [f"  {len(some):,} left out: {reason}" for reason, some in numbers.items()]
    lengths = dataset.lengths
    lines.append(f"{lengths.sum():,} tokens, {lengths.mean():.0f} a record, of which {dataset.cut_off:,} are cut off")
    counts, edges = np.histogram(lengths, bins=np.arange(0, lengths.max() + 32, 32))
    for count, edge in zip(counts, edges, strict=False):
        if count:
            lines.append(f"  {edge:>5} to {edge + 31:<5}{count:>10,}  {'#' * math.ceil(60 * count / counts.max())}")
    return "\n".join(lines)


def main():
    from model.arguments import DEMO_MODEL, parse_with_demo
    from model.checkpoint import load_tokenizer

    parser = argparse.ArgumentParser(description="Reads a file of records and all its pictures before a training does.")
    parser.add_argument("--check", required=True, metavar="FILE", help="the JSON file of records")
    parser.add_argument("--images_path", default="dataset/pretrain_images", help="folder of its pictures")
    parser.add_argument("--tokenizer_path", default="model/minimind_tokenizer", help="folder of the tokenizer")
    parser.add_argument("--max_seq_len", type=int, default=512, help="as in training")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that read pictures")
    demo = {name: DEMO_MODEL[name] for name in ("images_path", "tokenizer_path")}
    args = parse_with_demo(parser, demo)
    tokenizer = load_tokenizer(args.tokenizer_path)
    config = LMConfig(**tokenizer_fields(tokenizer))
    strictness = {"strict": False, "most": 1.0, "tell": tqdm.write}
    dataset = VLMDataset(args.check, args.images_path, tokenizer, config, args.max_seq_len, 32, **strictness)
    check(dataset, args.num_workers)
    print(report(dataset))
    sys.exit(bool(dataset.problems.count))


if __name__ == "__main__":
    from model.errors import run_script

    run_script(main)
