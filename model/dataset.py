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

from model.LMConfig import BadInput
from model.vision_utils import read_pixels

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


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
    """The list of records of a JSON file. BadInput if it is missing or of another shape."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} not found: see dataset/README.md for where to get it, use --data_path, or try --demo")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error})") from None
    if not isinstance(records, list) or not records:
        raise BadInput(f"{path} should be a JSON list of records with 'image' and 'conversations'")
    return records


def parse_record(record, where, config):
    """A record -> (turns, image names). BadInput says what is wrong `where`."""
    try:
        names = [name.strip() for name in record.get("image", "").split(",") if name.strip()]
        turns = [
            (ROLES[turn.get("role", turn.get("from"))], turn.get("content", turn.get("value")))
            for turn in record["conversations"]
        ]
        wanted = sum(len(split_at_images(text, config)) - 1 for _, text in turns)
    except (AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"{where}: expected 'image' and 'conversations' of role and content ({error!r})") from None
    if wanted != len(names):
        raise BadInput(f"{where}: {len(names)} images in 'image', but {wanted} <image> in its conversations")
    return turns, names


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
    and of the `</s>` that ends each; all else is -100. Records whose answers lie wholly beyond `max_seq_len` are left out
    and counted in `dropped`. With `features` set (a FeatureCache over `image_paths`), items carry `image_features`
    (n, P, V) instead of pixels and no picture is opened.
    """

    def __init__(self, data_path, images_path, tokenizer, config, max_seq_len, image_size):
        self.images_path, self.image_size = Path(images_path), image_size
        self.features = None
        records = read_records(data_path)
        if not self.images_path.is_dir():
            raise BadInput(
                f"{images_path} is not a folder: see dataset/README.md for the pictures, or use --images_path"
            )
        row_of = {}  # image name -> its row in `names`
        ids, flags, rows, self.dropped = [], [], [], 0
        for begin in range(0, len(records), 4096):
            parsed = [
                parse_record(record, f"{data_path}, record {begin + i}", config)
                for i, record in enumerate(records[begin : begin + 4096])
            ]
            encoded = encode_conversations(tokenizer, [turns for turns, _ in parsed], config)
            for (_, names), (one_ids, one_flags) in zip(parsed, encoded, strict=True):
                if len(one_ids) > max_seq_len:
                    one_ids, one_flags, kept = cut(one_ids, one_flags, max_seq_len, config)
                    names = names[:kept]
                if not any(one_flags):
                    self.dropped += 1
                    continue
                ids.append(np.array(one_ids, dtype=np.int32))
                flags.append(np.array(one_flags, dtype=bool))
                rows.append(np.array([row_of.setdefault(name, len(row_of)) for name in names], dtype=np.int64))
        if not ids:
            raise BadInput(f"{data_path}: no record has an answer within --max_seq_len {max_seq_len} tokens")
        self.lengths = np.array([len(one) for one in ids])
        self.offsets = np.concatenate([[0], self.lengths.cumsum()])
        self.ids, self.flags = np.concatenate(ids), np.concatenate(flags)
        self.row_offsets = np.concatenate([[0], np.cumsum([len(one) for one in rows])])
        self.rows = np.concatenate(rows)
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
        return read_pixels(self.paths[index], self.image_size)


# --- batches --------------------------------------------------------------------------------------------------------


def collate(items):
    """Items -> `input_ids`, `labels` (B, T), T the longest rounded up to 8; pictures of all samples in one flat list."""
    length = -(-max(len(item["input_ids"]) for item in items) // 8) * 8
    batch = {
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
    shuffled again. All processes draw the same order. A global batch has batch_size * accumulation * world samples: rank r
    takes every world-th of them from r on, and yields them as `accumulation` batches, so that the samples of a step don't
    depend on how they are divided. The last global batch of an epoch may be smaller; the fewer than `world` samples that
    can't be dealt evenly are left out of that epoch.
    """

    def __init__(self, lengths, batch_size, seed=0, rank=0, world=1, accumulation=1):
        self.lengths, self.batch_size, self.accumulation = lengths, batch_size, accumulation
        self.seed, self.rank, self.world = seed, rank, world
        self.used = len(lengths) // world * world
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    @property
    def steps(self):
        """Global batches an epoch."""
        return math.ceil(self.used / (self.batch_size * self.accumulation * self.world))

    def __len__(self):
        return math.ceil(self.used / self.world / self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))[: self.used]
        size = self.batch_size * self.accumulation * self.world
        # a stable sort by (group, length) keeps the random order among samples of the same length
        order = order[np.lexsort((self.lengths[order], np.arange(len(order)) // (64 * size)))]
        whole = len(order) // size
        for i in [*rng.permutation(whole), *range(whole, self.steps)]:  # the smaller one, if any, is the last
            own = order[i * size : (i + 1) * size][self.rank :: self.world].tolist()
            for begin in range(0, len(own), self.batch_size):
                yield own[begin : begin + self.batch_size]
