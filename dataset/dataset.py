"""Records in, items of token ids, labels and pixels, and batches of them out.

From one record to its loss, and the file in which each step is decided:

    1. the record is read, whatever the form of its file                    source.py, for Parquet parquet.py
       its turns and its number of images are checked                       records.py
    2. turns become token ids and flags; the tokens of every assistant turn
       and the `</s>` that ends it are flagged as answer                    model/conversation.py
    3. ids beyond max_seq_len are truncated, never within an image          here, truncate_at_image
    4. labels are the ids where flagged, -100 everywhere else               here, VLMDataset.item
    5. a batch is padded to its longest item, labels with -100              here, collate
    6. label_positions: the tokens whose next token has a label             model/model.py, called by collate
    7. shift by one: the logits at position t predict the label at t + 1    model/model.py
    8. the loss is summed over the batch, and divided by the answer tokens  model/training/trainer.py counts them,
       in all batches of the step on all processes                          model/model.py divides

Shapes: B batch, T tokens, N images in the batch, n images of an item, P tokens per image, V vision width, S image size in
pixels, L labels in the batch.
"""

import hashlib
import json

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from model.conversation import encode_conversations, plain_backend
from model.errors import BadInput, BadRecord
from model.files import stamp, write_atomically
from model.model import positions_before_labels

from .records import Problems, chunked, parse_record
from .source import Source, place_inside

FORMAT = 2  # version of the file in which tokens are kept
BLOCK = 4096  # records that are tokenised at once
MAX_PARTIAL = 1 / 3  # of the answer tokens that are only parts of a character, without a warning
MAX_BAD_IN_A_ROW = 100  # unusable records that are skipped in search of the next good one


# --- records -> token ids -------------------------------------------------------------------------------------------


def encode_records(source, tokenizer, config, max_seq_len, problems):
    """Yields (record number, ids (T,), is_answer (T,), image names, truncated) of each record that can be used.

    The other records are counted in `problems`; so is, at the end, the total of all records.
    """
    total = 0
    for block in chunked(source.records(), BLOCK):
        # check each record's form
        parsed = []
        for number, (where, record) in enumerate(block, total):
            try:
                turns, names = parse_record(record, where, config.image_special_token)
                parsed.append((number, where, turns, names))
            except BadRecord as problem:
                problems.add(problem, number)
        total += len(block)

        # tokenise the whole block at once, which is faster than one by one
        encoded = encode_conversations(tokenizer, [turns for _, _, turns, _ in parsed], config)

        for (number, where, _, names), (ids, is_answer) in zip(parsed, encoded, strict=True):
            truncated = len(ids) > max_seq_len
            if truncated:
                num_tokens, num_images = truncate_at_image(ids, max_seq_len, config)
                ids = ids[:num_tokens]
                is_answer = is_answer[:num_tokens]
                names = names[:num_images]
            # a record that has lost all its answers has nothing left to learn
            if is_answer.any():
                yield number, ids, is_answer, names, truncated
            elif truncated:
                message = f"{where}: its answers lie beyond --max_seq_len {max_seq_len}"
                problems.add(BadRecord("answer beyond --max_seq_len", message), number)
            else:
                problems.add(BadRecord("no answer", f"{where}: the tokenizer makes no token of its answers"), number)
    problems.total = total


def truncate_at_image(ids, limit, config):
    """(tokens, images) of a conversation to keep, so that at most `limit` tokens remain and no image is split."""
    ids = ids.tolist()
    image_ids = config.image_ids
    position = 0
    num_images = 0
    while position < limit:
        end = position + len(image_ids)
        if ids[position] != image_ids[0] or ids[position:end] != image_ids:
            position += 1
        elif end > limit:
            return position, num_images
        else:
            position = end
            num_images += 1
    return limit, num_images


class RaggedArray:
    """Many small arrays of one dtype, back to back in one tensor, which worker processes share.

    It is filled with `append`, and read after `freeze`: item i is a slice of the tensor, not a copy.
    """

    def __init__(self, dtype, values=None, offsets=None):
        self.dtype = np.dtype(dtype)
        self.values = bytearray() if values is None else values  # as a tensor, (bytes,)
        self.offsets = offsets  # (items + 1,), in elements
        self.lengths = []

    def append(self, values):
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


def encode_source(source, tokenizer, config, max_seq_len, problems):
    """Reads and tokenises all records, and returns what a VLMDataset keeps of them: a dict that `torch.save` can write."""
    ids = RaggedArray(np.min_scalar_type(config.vocab_size))
    is_answer = RaggedArray(bool)
    image_rows = RaggedArray(np.int32)  # of the images in image_names
    record_numbers = []
    num_truncated = 0
    row_of = {}  # image name -> row: images that several records share are kept once
    needs_images_path = False
    encoded = encode_records(source, tokenizer, config, max_seq_len, problems)
    for number, record_ids, record_flags, names, truncated in encoded:
        record_numbers.append(number)
        ids.append(record_ids)
        is_answer.append(record_flags)
        image_rows.append(np.array([row_of.setdefault(name, len(row_of)) for name in names]))
        num_truncated += truncated
        if names and not needs_images_path and place_inside(names[0]) is None:
            source.open_images_path()  # fail now if it is missing, not after tokenising everything
            needs_images_path = True

    source.compare_names(row_of)
    image_names = RaggedArray(np.uint8)
    for name in row_of:
        image_names.append(np.frombuffer(name.encode(), np.uint8))
    arrays = {"ids": ids, "is_answer": is_answer, "image_rows": image_rows, "image_names": image_names}
    for array in arrays.values():
        array.freeze()
    return {
        **{name: (array.dtype.str, array.values, array.offsets) for name, array in arrays.items()},
        "record_numbers": torch.tensor(record_numbers),
        "num_truncated": num_truncated,
        "num_partial": count_partial(ids, is_answer, tokenizer),
        "needs_images_path": needs_images_path,
        "may_shorten": source.may_shorten,
    }


def read_encoded(file, key):
    """The dict of `encode_source` in a file, mapped into memory; None if there is no such file for this `key`."""
    try:
        encoded = torch.load(file, weights_only=True, mmap=True)
    except Exception:  # noqa: BLE001  not there, or damaged in whatever way
        return None
    return encoded if isinstance(encoded, dict) and encoded.get("key") == key else None


def count_partial(ids, is_answer, tokenizer):
    """How many answer tokens are only a part of a character, as of characters that the tokenizer doesn't know."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    partial = np.array(["\ufffd" in text for text in texts])  # (vocabulary,)
    answers = ids.values.numpy().view(ids.dtype)[is_answer.values.numpy().view(bool)] if len(ids) else []
    return int(partial[answers].sum())


# --- token ids -> items ---------------------------------------------------------------------------------------------


class VLMDataset(Dataset):
    """One item per record: `input_ids` (T,), `labels` (T,), and its images as `pixel_values`, a list of n (3, S, S) uint8.

    data_path, images_path, out_dir: as in `Source`. The constructor reads and tokenises everything once, into flat arrays that
    worker processes share; if there is an out_dir it keeps them in its folder `data`, and maps that file the next time.
    Records that can't be used, or whose answers all lie beyond `max_seq_len`, are skipped and counted in `problems`, a
    `Problems(**strictness)`; `num_truncated` counts the records that lose a part. BadInput if none is left, unless
    `allow_empty`.

    A record whose image turns out to be bad when it is opened is replaced by the next good one, so that batches keep their
    size and resumed runs continue with the same samples; the item reports it in `problems`.
    """

    def __init__(
        self,
        data_path,
        images_path,
        tokenizer,
        config,
        max_seq_len,
        preprocess,
        out_dir=None,
        allow_empty=False,
        **strictness,
    ):
        self.preprocess = preprocess
        self.problems = Problems(**strictness)
        self.features = None
        # only the process that reports shows progress
        self.source = source = Source(data_path, images_path, out_dir, quiet=not self.problems.notify)

        # per record its token ids, which of them belong to an answer, and the rows of its images; per image its name
        encoded = self.load_or_encode(tokenizer, config, max_seq_len)
        if not len(encoded["record_numbers"]) and not allow_empty:
            raise BadInput(f"{self.source} has no record that can be used: {self.problems}")
        self.ids, self.is_answer, self.image_rows, self.image_names = (
            RaggedArray(*encoded[name]) for name in ("ids", "is_answer", "image_rows", "image_names")
        )
        self.record_numbers = encoded["record_numbers"]
        self.num_truncated = encoded["num_truncated"]
        self.num_partial = encoded["num_partial"]
        source.may_shorten = encoded["may_shorten"]
        if encoded["needs_images_path"]:  # now, so that workers share the index of an archive
            source.open_images_path()

    def load_or_encode(self, tokenizer, config, max_seq_len):
        """What `encode_source` returns: from the file in which it was kept, if it was for these records and this tokenizer."""
        file, key = self.kept_file(tokenizer, config, max_seq_len)
        encoded = file and read_encoded(file, key)
        is_new = not encoded
        if is_new:
            encoded = encode_source(self.source, tokenizer, config, max_seq_len, self.problems)
        else:
            self.problems.restore(encoded["problems"])
        if encoded["num_truncated"] and self.problems.notify:
            self.problems.notify(f"{encoded['num_truncated']} records are truncated at --max_seq_len {max_seq_len}")

        # only all the files show whether too much of them is lost
        self.problems.raise_if_too_many()

        if file and is_new and len(encoded["record_numbers"]):
            encoded |= {"key": key, "problems": self.problems.state()}
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, lambda f: torch.save(encoded, f))
            except OSError as error:
                if self.problems.notify:
                    self.problems.notify(
                        f"{file} could not be written ({error.strerror}): the next start reads all again"
                    )
        return encoded

    def kept_file(self, tokenizer, config, max_seq_len):
        """(the file in which tokens are kept, or None; a text that changes with whatever decides them)."""
        paths = [str(file.resolve()) for file in self.source.files]
        special = [config.image_special_token, config.image_ids, config.bos_token_id, config.eos_token_id]
        rules = f"{plain_backend(tokenizer).to_str()} {tokenizer.chat_template}"
        rules = hashlib.sha256(rules.encode()).hexdigest()
        key = json.dumps([FORMAT, paths, [*map(stamp, paths)], rules, special, max_seq_len])
        name = f"{self.source.files[0].stem}-{hashlib.sha256(str(paths).encode()).hexdigest()[:8]}.tokens"
        return self.source.cache_dir and self.source.cache_dir / name, key

    @property
    def lengths(self):
        """Tokens of each item."""
        return np.diff(self.ids.offsets)

    def describe(self):
        """What was found, in a line for people: form, records, pictures, tokens; and a warning if the tokenizer doesn't fit."""
        text_only = int((np.diff(self.image_rows.offsets) == 0).sum())
        answers = int(self.is_answer.values.sum())
        partial = self.num_partial / answers
        line = (
            f"{self.source} ({self.source.describe()}): {self.problems.total:,} records, {len(self):,} usable, "
            f"{text_only:,} of them text only; {len(self.image_names):,} pictures; {self.lengths.sum():,} tokens, "
            f"{answers:,} of them in answers, {partial:.1%} of them only parts of a character"
        )
        if partial < MAX_PARTIAL:
            return line
        return (
            f"{line}\nwarning: the tokenizer doesn't know many characters of these answers and writes them in bytes, of "
            "which a small model makes broken characters: use a tokenizer made for this language, and weights trained "
            "with it (README, 'Train it for real')"
        )

    def image_name(self, row):
        return self.image_names[row].tobytes().decode()

    def read_pixels(self, row):
        """An image as uint8 pixels (3, S, S). BadRecord if it can't be read."""
        return self.source.read_pixels(self.image_name(row), self.preprocess)

    def fingerprints(self):
        """A text for each image that changes when the image does, in the order of a FeatureCache's rows."""
        return (self.source.fingerprint(self.image_name(row)) for row in range(len(self.image_names)))

    def use_features(self, features):
        """Makes items carry `image_features` (n, P, V), from a FeatureCache over all images, instead of pixels.

        No image is opened any more. None: pixels again.
        """
        self.features = features

    def __len__(self):
        return len(self.record_numbers)

    def __getitem__(self, index):
        """The item at `index`, or the next one that can be used; `problems` lists (problem, record number) of those skipped."""
        if index >= len(self):
            raise IndexError(index)  # ends a `for` over the dataset
        problems = []
        for i in range(MAX_BAD_IN_A_ROW):
            candidate = (index + i) % len(self)
            try:
                return {**self.item(candidate), "problems": problems}
            except BadRecord as problem:
                problems.append((problem, self.record_numbers[candidate].item()))
        # this many failures in a row mean a wrong folder or a lost disk, not bad records
        raise BadInput(f"{MAX_BAD_IN_A_ROW} records in a row can't be used; the last: {problems[-1][0]}")

    def item(self, index):
        """The record at `index` itself. BadRecord if one of its images can't be read."""
        ids = self.ids[index].astype(np.int64)  # (T,)
        labels = np.where(self.is_answer[index], ids, -100)  # (T,)
        item = {"input_ids": ids, "labels": labels}
        rows = self.image_rows[index]  # (n,)
        if self.features is not None:
            item["image_features"] = self.features[rows]
        else:
            item["pixel_values"] = [self.read_pixels(row) for row in rows]
        return item


# --- items -> batch -------------------------------------------------------------------------------------------------


def collate(items, few_shapes=False):
    """Items -> a batch: `input_ids`, `labels` (B, T), `label_positions` (L,), images of all items in one flat list.

    `label_positions` are positions b * T + t whose next token has a label. `pixel_values` (N, 3, S, S) is None if there are
    no images; with cached features it is `image_features` (N, P, V). `problems` lists (problem, record number).

    few_shapes: round T and L up further so that only few sizes occur, since each needs its own CUDA graph. L is padded with
    position 0, whose next token never has a label.
    """
    # pad to the longest item, rounded up to 8; the id 0 is arbitrary, as no token attends to padding and its label is -100
    length = max(len(item["input_ids"]) for item in items)
    length = round_up(length, 8) if few_shapes else -(-length // 8) * 8
    input_ids = torch.zeros(len(items), length, dtype=torch.long)  # (B, T)
    labels = torch.full((len(items), length), -100, dtype=torch.long)  # (B, T)
    for row, item in enumerate(items):
        num_tokens = len(item["input_ids"])
        input_ids[row, :num_tokens] = torch.from_numpy(item["input_ids"])
        labels[row, :num_tokens] = torch.from_numpy(item["labels"])

    # found here, on the CPU, where counting them costs no device sync
    label_positions = positions_before_labels(labels)  # (L,)
    if few_shapes:
        padding = round_up(len(label_positions), 4) - len(label_positions)
        label_positions = F.pad(label_positions, (0, padding))

    problems = [problem for item in items for problem in item["problems"]]
    batch = {"problems": problems, "input_ids": input_ids, "labels": labels, "label_positions": label_positions}

    # items may have any number of images, even none
    if "image_features" in items[0]:
        batch["image_features"] = torch.cat([item["image_features"] for item in items])  # (N, P, V)
    else:
        pixels = [pixels for item in items for pixels in item["pixel_values"]]
        batch["pixel_values"] = torch.stack(pixels) if pixels else None  # (N, 3, S, S)
    return batch


def round_up(size, sizes_per_doubling):
    """Rounds up to multiples of 8, so coarsely that at most `sizes_per_doubling` sizes lie between a power of two and the next."""
    power_of_two = 2 ** (size.bit_length() - 1)
    step = max(8, power_of_two // sizes_per_doubling)
    return -(-size // step) * step


# --- images alone ---------------------------------------------------------------------------------------------------


class Pictures(Dataset):
    """Only the images of a VLMDataset, each once, as uint8 (3, S, S): what a FeatureCache is built from."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset.image_names)

    def __getitem__(self, row):
        """(pixels, None), or for an image that can't be read a black one and (reason, message)."""
        size = self.dataset.preprocess.size
        try:
            return self.dataset.read_pixels(row), None
        except BadRecord as problem:
            return torch.zeros(3, size, size, dtype=torch.uint8), (problem.reason, str(problem))


def collate_pictures(items):
    """Items of `Pictures` -> (pixels (N, 3, S, S), list of N problems)."""
    pixels, problems = zip(*items, strict=True)
    return torch.stack(pixels), list(problems)
