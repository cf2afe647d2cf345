"""From a JSON file to its records, and from a record to checked turns; counts the records that can't be used.

All three stages read one JSON format, a list of records (dataset/README.md):

    {"image": "a.jpg, b.jpg", "conversations": [{"role": "user", "content": "<image>\n<image>\n..."}, {"role": "assistant", ...}]}
"""

import json
import re
from itertools import islice

from model.conversation import split_at_images
from model.errors import BadInput, BadRecord
from model.files import refuse_lfs_pointer

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
CAPTION_PROMPT = "描述这张图片。"  # the question for a picture that comes with a caption only
COCO_PREFIX = "COCO_train2014_"
CHUNK = 2**22  # characters read from a file at a time
SPACE = re.compile(r"\s*")
COMMA = re.compile(r"\s*,\s*")
END = re.compile(r"\s*\]\s*$")


# --- file -> records ------------------------------------------------------------------------------------------------


def read_records(path):
    """Streams the records of a JSON list without loading the whole file.

    BadInput if the file is missing or not such a list; it names the first record that is not valid JSON.
    """
    refuse_lfs_pointer(path)
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
    """Yields the items of the JSON list in an open file, reading CHUNK characters at a time."""
    text = file.read(CHUNK).lstrip()
    if not text.startswith("["):
        raise BadInput(
            f"{path} should be a JSON list of records with 'image' and 'conversations', but begins with {text[:20]!r}"
        )
    decoder = json.JSONDecoder()
    number = 0  # of the next record
    position = 1  # in `text`: everything before it has been parsed
    end_of_file = False
    while not END.match(text, position):
        try:
            # a comma, unless this is the first record, then the record
            separator = (COMMA if number else SPACE).match(text, position)
            if not separator:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            record, end = decoder.raw_decode(text, separator.end())
        except (ValueError, RecursionError) as error:
            # either the record continues in the next chunk, or it is not valid
            if end_of_file:
                why = f"{error.msg} near {text[error.pos :][:20]!r}" if hasattr(error, "msg") else error
                raise BadInput(f"{path}, record {number}, is not valid JSON ({why})") from None
            chunk = file.read(CHUNK)
            text = text[position:] + chunk
            position = 0
            end_of_file = not chunk
            continue
        yield record
        number += 1
        position = end
    if not number:
        raise BadInput(f"{path} is an empty list")


def chunked(items, size):
    """Yields lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def coco_prefix(folder, name):
    """`COCO_train2014_` if the folder's files have that prefix and the records' names don't, else "". name: one of them."""
    prefixed = not (folder / name).exists() and (folder / f"{COCO_PREFIX}{name}").exists()
    return COCO_PREFIX if prefixed else ""


# --- record -> checked turns ----------------------------------------------------------------------------------------


def parse_record(record, where, placeholder):
    """A record -> (turns, image names), turns as (role, text) pairs. BadRecord says what is wrong, and `where`."""
    turns = [parse_turn(turn, where) for turn in conversations_of(record, where)]

    # after an optional system turn, questions and answers alternate
    roles = [role for role, _ in turns]
    dialogue = roles[1:] if roles[0] == "system" else roles
    if dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        raise BadRecord(
            "unpaired turns", f"{where}: user and assistant should take turns, not {', '.join(roles)[:200]}"
        )

    # without any answer there would be nothing to learn
    if not any(role == "assistant" and text.strip() for role, text in turns):
        raise BadRecord("no answer", f"{where}: no assistant turn has any text")

    # each image takes the place of one <image>, in order, so the two counts must agree
    names = [name.strip() for name in record.get("image", "").split(",") if name.strip()]
    num_placeholders = sum(len(split_at_images(text, placeholder)) - 1 for _, text in turns)
    if num_placeholders != len(names):
        counts = f"{len(names)} images in 'image', but {num_placeholders} <image> in its conversations"
        raise BadRecord("images and <image> differ", f"{where}: {counts}")
    return turns, names


def conversations_of(record, where):
    """The record's turns, not yet checked; BadRecord if it has none."""
    well_formed = isinstance(record, dict) and isinstance(record.get("image", ""), str)
    turns = record.get("conversations") if well_formed else None
    if not isinstance(turns, list) or not turns:
        expected = "expected an object with 'image' (text) and 'conversations' (a list of turns)"
        raise BadRecord("wrong shape", f"{where}: {expected}, not {shortened(record)}")
    return turns


def parse_turn(turn, where):
    """A turn, spelled role/content or from/value, -> (role, text)."""
    role = None
    text = None
    if isinstance(turn, dict):
        role = turn.get("role", turn.get("from"))
        text = turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        expected = f"expected a turn with a role ({', '.join(ROLES)}) and text as its content"
        raise BadRecord("wrong shape", f"{where}: {expected}, not {shortened(turn)}")
    return ROLES[role], text


def shortened(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."


def make_record(images, qa_pairs, **extra):
    """One record of the JSON format, from the images' file names and (question, answer) pairs; `extra` fields come first."""
    conversations = []
    for question, answer in qa_pairs:
        conversations.append({"role": "user", "content": question})
        conversations.append({"role": "assistant", "content": answer})
    return {**extra, "image": ", ".join(images), "conversations": conversations}


# --- records that can't be used -------------------------------------------------------------------------------------


class Problems:
    """Counts the records that can't be used, by reason.

    strict: stop at the first one. max_fraction: the largest tolerated fraction of `total`, the records in the data, which
    is None until all have been read. notify: called with a message about the first record of each reason, or None.
    """

    def __init__(self, strict=True, max_fraction=0.0, notify=None):
        self.strict = strict
        self.max_fraction = max_fraction
        self.notify = notify
        self.total = None
        self.by_reason = {}  # reason -> set of record numbers

    def add(self, problem, number):
        """Counts a record, once however often it is met. BadInput if that makes too many."""
        if self.strict:
            raise BadInput(str(problem))

        # one message per reason, since there may be thousands of records
        numbers = self.by_reason.setdefault(problem.reason, set())
        if self.notify and not numbers:
            self.notify(f"skipping this record, and others like it: {problem}")
        numbers.add(number)

        # while the file is still being read, bad records may just be unevenly spread
        if self.total:
            self.raise_if_too_many()

    def take(self, batch):
        """Removes `problems` from a collated batch and counts them."""
        for problem, number in batch.pop("problems"):
            self.add(problem, number)

    def raise_if_too_many(self):
        """BadInput if more than `max_fraction` of the records can't be used."""
        if self.count > self.max_fraction * self.total:
            raise BadInput(
                f"{self}, over --max_bad_fraction {self.max_fraction:g} of {self.total}: fix the data or raise the limit"
            )

    def merge(self, others):
        """Adds what was counted by other processes, or earlier in the run: dicts like `by_reason`."""
        for by_reason in others:
            for reason, numbers in by_reason.items():
                self.by_reason.setdefault(reason, set()).update(numbers)

    @property
    def count(self):
        return sum(map(len, self.by_reason.values()))

    def __str__(self):
        reasons = [f"{len(numbers)} {reason}" for reason, numbers in self.by_reason.items()]
        return f"{self.count} records skipped ({', '.join(reasons)})"
