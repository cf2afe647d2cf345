"""Conversations and pictures in, batches of token ids, labels and pixels out.

All three stages read one JSON format, a list of records (dataset/README.md):

    {"image": "a.jpg, b.jpg", "conversations": [{"role": "user", "content": "<image>\n<image>\n..."}, {"role": "assistant", ...}]}

Shapes: B batch, T tokens, N images in the batch, P tokens per image.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from model.LMConfig import BadInput, BadRecord
from model.vision_utils import read_pixels

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
MOST_IN_A_ROW = 100  # bad records that are passed over for one good one


# --- text -> token ids ----------------------------------------------------------------------------------------------


def tokenizer_fields(tokenizer):
    """The LMConfig fields that a tokenizer decides."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "image_char_ids": tokenizer.convert_tokens_to_ids(["<", ">"]),
    }


def split_at_images(text, config):
    """Splits at each `<image>` and each literal placeholder; n images give n + 1 pieces of text."""
    return re.split(f"<image>|{re.escape(config.image_special_token)}", text)


def conversation_pieces(turns, config):
    """The published prompt form, `<s>user\\n...</s>\\n<s>assistant\\n...</s>\\n`, as a list of (piece, is_answer).

    turns: (role, text) pairs. A piece is text to be tokenised, or a list of ready token ids: special tokens and images
    never come from tokenising, so that neither what stands beside them nor what a text contains can change them.
    """
    bos, eos = [config.bos_token_id], [config.eos_token_id]
    pieces = []
    for role, text in turns:
        answer = role == "assistant"
        first, *rest = split_at_images(text, config)
        if role == "user":
            pieces.append((bos, False))
            first = "user\n" + first
        pieces.append((first, answer))
        for piece in rest:
            pieces += [(config.image_ids, False), (piece, answer)]
        if role == "user":
            pieces += [(eos, False), ("\n", False), (bos, False), ("assistant\n", False)]
        elif answer:
            pieces += [(eos, True), ("\n", False)]
    return [(piece, answer) for piece, answer in pieces if piece]


def encode(tokenizer, texts):
    """Token ids of each text; special tokens written out in it are plain characters."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)[
        "input_ids"
    ]


def encode_conversations(tokenizer, conversations, config):
    """Lists of (role, text) turns -> for each, (token ids, is_answer flags), two lists of equal length."""
    all_pieces = [conversation_pieces(turns, config) for turns in conversations]
    encoded = iter(encode(tokenizer, [p for pieces in all_pieces for p, _ in pieces if isinstance(p, str)]))
    result = []
    for pieces in all_pieces:
        ids, flags = [], []
        for piece, answer in pieces:
            tokens = next(encoded) if isinstance(piece, str) else piece
            ids += tokens
            flags += [answer] * len(tokens)
        result.append((ids, flags))
    return result


def as_conversation(text, images, config):
    """A question about some images as a conversation; images that no `<image>` mentions are put in front, one a line.

    BadInput if it mentions another number of them.
    """
    wanted = len(split_at_images(text, config)) - 1
    if not wanted:
        text, wanted = "<image>\n" * images + text, images
    if wanted != images:
        raise BadInput(f"{images} images were given, but the question has {wanted} <image>")
    return [("user", text)]


def encode_prompt(tokenizer, question, config):
    """Token ids of one question, ready to be answered."""
    return encode_conversations(tokenizer, [[("user", question)]], config)[0][0]


# --- records --------------------------------------------------------------------------------------------------------


def read_records(path):
    """The list of records of a JSON file. BadInput if it is missing or no such list."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} not found: see dataset/README.md for where to get it, use --data_path, or try --demo")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON ({error})") from None
    if not isinstance(records, list) or not records:
        raise BadInput(f"{path} should be a JSON list of records with 'image' and 'conversations'")
    return records


def parse_record(record, where, config):
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
    wanted = sum(len(split_at_images(text, config)) - 1 for _, text in turns)
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

    total: records in the data. strict: the first one ends the run; more than `most` of them, as a fraction, do so anyway.
    tell: called with the first of each reason, or None.
    """

    def __init__(self, total, strict=True, most=0.0, tell=None):
        self.total, self.strict, self.most, self.tell = total, strict, most, tell
        self.numbers = {}  # reason -> numbers of such records

    def add(self, problem, number):
        """Counts a record once, however often it is met. BadInput if that makes too many."""
        if self.strict:
            raise BadInput(str(problem))
        numbers = self.numbers.setdefault(problem.reason, set())
        if self.tell and not numbers:
            self.tell(f"left out, as are others like it: {problem}")
        numbers.add(number)
        if self.count > self.most * self.total:
            raise BadInput(
                f"{self}, over --max_bad_fraction {self.most:g} of {self.total}: mend the data, or allow more; "
                f"the last: {problem}"
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


def cut(ids, flags, limit, config):
    """Cuts a conversation to `limit` tokens, never inside a placeholder: (ids, flags, images kept)."""
    images, place = 0, 0
    first, size = config.image_ids[0], config.image_tokens
    while place < len(ids):
        if ids[place] == first and ids[place : place + size] == config.image_ids:
            if place + size > limit:
                limit = min(limit, place)
                break
            images, place = images + 1, place + size
        else:
            place += 1
    return ids[:limit], flags[:limit], images


class VLMDataset(Dataset):
    """One record an item: `input_ids` (T,), `labels` (T,), and its pictures as `pixel_values` (n, 3, S, S) uint8.

    Everything is tokenised once, here, into flat arrays that worker processes share. `labels` are the ids of the answers
    and of the `</s>` that ends each; all else is -100. Records that can't be used, or whose answers lie wholly beyond
    `max_seq_len`, are left out and counted in `problems`, whose arguments are `strictness`. A record whose picture turns out
    to be bad when it is read is replaced by the next good one, so that batches keep their size and resumed runs their
    place; items tell of it in `problems`. With `features` set (a FeatureCache over `image_paths`), items carry
    `image_features` (n, P, V) instead of pixels and no picture is opened.
    """

    def __init__(self, data_path, images_path, tokenizer, config, max_seq_len, image_size, **strictness):
        self.images_path, self.image_size = Path(images_path), image_size
        self.features = None
        records = read_records(data_path)
        self.problems = Problems(len(records), **strictness)
        if not self.images_path.is_dir():
            raise BadInput(
                f"{images_path} is not a folder: see dataset/README.md for the pictures, or use --images_path"
            )
        row_of = {}  # image name -> its row in `names`
        ids, flags, rows, numbers = [], [], [], []
        for begin in range(0, len(records), 4096):
            parsed = []
            for number, record in enumerate(records[begin : begin + 4096], begin):
                try:
                    parsed.append((number, *parse_record(record, f"{data_path}, record {number}", config)))
                except BadRecord as problem:
                    self.problems.add(problem, number)
            encoded = encode_conversations(tokenizer, [turns for _, turns, _ in parsed], config)
            for (number, _, names), (one_ids, one_flags) in zip(parsed, encoded, strict=True):
                if len(one_ids) > max_seq_len:
                    one_ids, one_flags, kept = cut(one_ids, one_flags, max_seq_len, config)
                    names = names[:kept]
                if not any(one_flags):
                    long = f"{data_path}, record {number}: its answers lie beyond --max_seq_len {max_seq_len}"
                    self.problems.add(BadRecord("answer beyond --max_seq_len", long), number)
                    continue
                numbers.append(number)
                ids.append(np.array(one_ids, dtype=np.int32))
                flags.append(np.array(one_flags, dtype=bool))
                rows.append(np.array([row_of.setdefault(name, len(row_of)) for name in names], dtype=np.int64))
        if not ids:
            raise BadInput(f"{data_path}: no record has an answer within --max_seq_len {max_seq_len} tokens")
        self.lengths = np.array([len(one) for one in ids])
        self.offsets = np.concatenate([[0], self.lengths.cumsum()])
        self.ids, self.flags = np.concatenate(ids), np.concatenate(flags)
        self.row_offsets = np.concatenate([[0], np.cumsum([len(one) for one in rows])])
        self.rows, self.numbers = np.concatenate(rows), np.array(numbers)
        self.names = np.array(list(row_of))
        self.coco_prefix = "COCO_train2014_" if len(self.names) and self._has_prefix(self.names[0]) else ""

    def _has_prefix(self, name):
        """Whether the files carry the prefix that COCO gave them; the records name them without it."""
        return not (self.images_path / name).exists() and (self.images_path / f"COCO_train2014_{name}").exists()

    def image_path(self, row):
        return self.images_path / f"{self.coco_prefix}{self.names[row]}"

    @property
    def image_paths(self):
        """The files of all pictures, each once, in the order of a FeatureCache's rows."""
        return [self.image_path(row) for row in range(len(self.names))]

    def __len__(self):
        return len(self.lengths)

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
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        rows = self.rows[self.row_offsets[index] : self.row_offsets[index + 1]]
        ids = self.ids[tokens].astype(np.int64)
        item = {"input_ids": ids, "labels": np.where(self.flags[tokens], ids, -100)}
        if self.features is not None:
            item["image_features"] = self.features[rows]
        else:
            item["pixel_values"] = [read_pixels(self.image_path(row), self.image_size) for row in rows]
        return item


class Pictures(Dataset):
    """Only the pixels of a list of files, uint8 (3, S, S) each: what a FeatureCache is built from."""

    def __init__(self, paths, image_size):
        self.paths, self.image_size = paths, image_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """(pixels, None), or for a picture that can't be read a black one and (reason, message)."""
        try:
            return read_pixels(self.paths[index], self.image_size), None
        except BadRecord as problem:
            return torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8), (problem.reason, str(problem))


# --- batches --------------------------------------------------------------------------------------------------------


def collate_pictures(items):
    """Items of `Pictures` -> (pixels (N, 3, S, S), list of N problems)."""
    pixels, problems = zip(*items, strict=True)
    return torch.stack(pixels), list(problems)


def collate(items):
    """Items -> `input_ids`, `labels` (B, T), T the longest rounded up to 8; pictures of all samples in one flat list.

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

    indices: the samples to use; lengths: of all samples.
    """

    def __init__(self, indices, lengths, size, batch_size, rank=0, world=1, seed=0):
        self.indices, self.lengths, self.size, self.batch_size = indices, lengths[indices], size, batch_size
        self.rank, self.world, self.seed = rank, world, seed
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
