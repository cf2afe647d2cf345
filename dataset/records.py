"""Records: a JSON file in, (turns, image names) out, one record after the other; and those that can't be used, counted.

All three stages read one JSON format, a list of records (dataset/README.md):

    {"image": "a.jpg, b.jpg", "conversations": [{"role": "user", "content": "<image>\n<image>\n..."}, {"role": "assistant", ...}]}
"""

import json
import re

from model.conversation import split_at_images
from model.errors import BadInput, BadRecord
from model.files import refuse_lfs_pointer

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
CAPTION_PROMPT = "描述这张图片。"  # asks for a caption where a picture comes with nothing but one
CHUNK = 2**22  # characters of a file that are read at a time
SPACE, COMMA, END = re.compile(r"\s*"), re.compile(r"\s*,\s*"), re.compile(r"\s*\]\s*$")


def read_records(path):
    """The records of a JSON file, a list, one after the other, so that it is never whole in memory.

    BadInput if it is missing or no such list, with the number of the record that is not valid JSON.
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


def coco_prefix(folder, name):
    """What stands before the names of a folder's files and not in its records, which name this one."""
    prefix = "COCO_train2014_"
    return prefix if not (folder / name).exists() and (folder / f"{prefix}{name}").exists() else ""


def record(images, turns, **extra):
    """One record of the published JSON formats; turns are (question, answer) pairs, images their file names."""
    conversations = []
    for asked, answer in turns:
        conversations += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {**extra, "image": ", ".join(images), "conversations": conversations}


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
