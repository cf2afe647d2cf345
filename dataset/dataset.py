"""Records in, items of token ids, labels and pixels, and batches of them out.

Shapes: B batch, T tokens, N images in the batch, P tokens per image, V vision width, S size of a picture in pixels.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from model.conversation import encode_conversations
from model.errors import BadInput, BadRecord
from model.images import read_pixels
from model.model import positions_before_labels

from .records import Problems, chunked, coco_prefix, parse_record, read_records

MAX_BAD_IN_A_ROW = 100  # bad records that are passed over for one good one


def truncate_at_image(ids, limit, config):
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


class RaggedArray:
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
    `max_seq_len`, are left out and counted in `problems`, whose arguments are `strictness`; `num_truncated` counts those that lose
    only their end. A record whose picture turns out to be bad when it is read is replaced by the next good one, so that
    batches keep their size and resumed runs their place; items tell of it in `problems`. With `features` set (a
    FeatureCache over `image_paths`), items carry `image_features` (n, P, V) instead of pixels and no picture is opened.
    """

    def __init__(self, data_path, images_path, tokenizer, config, max_seq_len, image_size, **strictness):
        self.images_path, self.image_size = Path(images_path), image_size
        self.features, self.num_truncated = None, 0
        self.problems = Problems(**strictness)
        if not self.images_path.is_dir():
            raise BadInput(
                f"{images_path} is not a folder: see dataset/README.md for the pictures, or use --images_path"
            )
        row_of = {}  # image name -> its row in `names`
        numbers = []
        self.ids, self.is_answer = RaggedArray(np.min_scalar_type(config.vocab_size)), RaggedArray(bool)
        self.image_rows, self.image_names = RaggedArray(np.int32), RaggedArray(np.uint8)
        for number, ids, answers, names in self.read(data_path, tokenizer, config, max_seq_len):
            numbers.append(number)
            self.ids.add(ids)
            self.is_answer.add(answers)
            self.image_rows.add(np.array([row_of.setdefault(name, len(row_of)) for name in names]))
        if not numbers:
            raise BadInput(f"{data_path}: no record has an answer within --max_seq_len {max_seq_len} tokens")
        for name in row_of:
            self.image_names.add(np.frombuffer(name.encode(), np.uint8))
        for column in (self.ids, self.is_answer, self.image_rows, self.image_names):
            column.freeze()
        self.record_numbers = torch.tensor(numbers)
        self.coco_prefix = ""
        if row_of:
            self.coco_prefix = coco_prefix(self.images_path, next(iter(row_of)))

    def read(self, data_path, tokenizer, config, max_seq_len):
        """Yields (number, token ids, is_answer flags, image names) of each record that can be used."""
        silent = None if self.problems.notify else True  # None: on a terminal only
        records = tqdm(read_records(data_path), desc=str(data_path), unit=" records", disable=silent)
        records, placeholder = enumerate(records), config.image_special_token
        for block in chunked(records, 4096):
            parsed = []
            for number, record in block:
                try:
                    parsed.append((number, *parse_record(record, f"{data_path}, record {number}", placeholder)))
                except BadRecord as problem:
                    self.problems.add(problem, number)
            encoded = encode_conversations(tokenizer, [turns for _, turns, _ in parsed], config)
            for (number, _, names), (ids, answers) in zip(parsed, encoded, strict=True):
                if len(ids) > max_seq_len:
                    tokens, images = truncate_at_image(ids, max_seq_len, config)
                    ids, answers, names = ids[:tokens], answers[:tokens], names[:images]
                    self.num_truncated += answers.any()
                if answers.any():
                    yield number, ids, answers, names
                else:
                    long = f"{data_path}, record {number}: its answers lie beyond --max_seq_len {max_seq_len}"
                    self.problems.add(BadRecord("answer beyond --max_seq_len", long), number)
        if self.num_truncated and self.problems.notify:
            self.problems.notify(
                f"{self.num_truncated} records lose the end of an answer at --max_seq_len {max_seq_len}"
            )
        self.problems.total = number + 1
        self.problems.raise_if_too_many()

    @property
    def lengths(self):
        """Tokens of each item."""
        return np.diff(self.ids.offsets)

    def image_path(self, row):
        return self.images_path / f"{self.coco_prefix}{self.image_names[row].tobytes().decode()}"

    @property
    def image_paths(self):
        """The files of all pictures, each once, in the order of a FeatureCache's rows."""
        return map(self.image_path, range(len(self.image_names)))

    def use_features(self, features):
        """From now on items carry rows of this FeatureCache over `image_paths`; pixels again if it is None."""
        self.features = features

    def __len__(self):
        return len(self.record_numbers)

    def __getitem__(self, index):
        problems = []
        for i in range(MAX_BAD_IN_A_ROW):
            other = (index + i) % len(self)
            try:
                return {**self.item(other), "problems": problems}
            except BadRecord as problem:
                problems.append((problem, self.record_numbers[other].item()))
        raise BadInput(f"{MAX_BAD_IN_A_ROW} records in a row can't be used; the last: {problems[-1][0]}")

    def item(self, index):
        """A record as it is in the file. BadRecord if one of its pictures can't be read."""
        ids, rows = self.ids[index].astype(np.int64), self.image_rows[index]
        item = {"input_ids": ids, "labels": np.where(self.is_answer[index], ids, -100)}
        if self.features is not None:
            item["image_features"] = self.features[rows]
        else:
            item["pixel_values"] = [read_pixels(self.image_path(row), self.image_size) for row in rows]
        return item


def collate(items, few_shapes=False):
    """Items -> `input_ids`, `labels` (B, T), T the longest rounded up to 8; pictures of all samples in one flat list.

    `label_positions` (L,) are the places before labels that count, for `MiniMindLM`.
    `problems` lists the records that could not be used, each with its number in the file.
    few_shapes: rounds T and L up so far that few sizes occur, as each needs a CUDA graph of its own; what L gains are
    positions 0, whose next token never has a label.
    """
    length = max(len(item["input_ids"]) for item in items)
    length = round_up(length, 8) if few_shapes else -(-length // 8) * 8
    batch = {
        "problems": [problem for item in items for problem in item["problems"]],
        "input_ids": torch.zeros(len(items), length, dtype=torch.long),
        "labels": torch.full((len(items), length), -100, dtype=torch.long),
    }
    for row, item in enumerate(items):
        for name in ("input_ids", "labels"):
            batch[name][row, : len(item[name])] = torch.from_numpy(item[name])
    positions = positions_before_labels(batch["labels"])
    if few_shapes:
        positions = F.pad(positions, (0, round_up(len(positions), 4) - len(positions)))
    batch["label_positions"] = positions
    if "image_features" in items[0]:
        batch["image_features"] = torch.cat([item["image_features"] for item in items])  # (N, P, V)
    else:
        pixels = [pixels for item in items for pixels in item["pixel_values"]]
        batch["pixel_values"] = torch.stack(pixels) if pixels else None  # (N, 3, S, S)
    return batch


def round_up(size, parts):
    """The next multiple of 8, and of a `parts`-th of the power of two below: so many sizes from one power to the next."""
    step = max(8, 2 ** (size.bit_length() - 1) // parts)
    return -(-size // step) * step


class Pictures(Dataset):
    """Only the pictures of a VLMDataset, each once, as uint8 (3, S, S): what a FeatureCache is built from."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset.image_names)

    def __getitem__(self, row):
        """(pixels, None), or for a picture that can't be read a black one and (reason, message)."""
        size = self.dataset.image_size
        try:
            return read_pixels(self.dataset.image_path(row), size), None
        except BadRecord as problem:
            return torch.zeros(3, size, size, dtype=torch.uint8), (problem.reason, str(problem))


def collate_pictures(items):
    """Items of `Pictures` -> (pixels (N, 3, S, S), list of N problems)."""
    pixels, problems = zip(*items, strict=True)
    return torch.stack(pixels), list(problems)
