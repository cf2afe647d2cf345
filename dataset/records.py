"""A row of any form -> a record of one form -> checked turns; and counting the records that can't be used.

The one form (dataset/README.md has the others):

    {"image": ["a.jpg", "b.jpg"],
     "conversations": [{"role": "user", "content": "<image>\n<image>\n..."}, {"role": "assistant", "content": "..."}]}
"""

import json
import re
from itertools import islice

from model.conversation import split_at_images
from model.errors import BadInput, BadRecord

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
CAPTION_PROMPT = "描述这张图片。"  # the question for a picture that comes with a caption only
TALK_KEYS = ("conversations", "messages", "texts")  # where a row has its turns
IMAGE_PARTS = ("image", "image_url")  # types of a message's parts
URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)  # not C:/
MAX_EXAMPLES = 20  # messages that are kept of each reason
PICTURE_KEYS = ("image_bytes", "images", "image")  # where it has its pictures, or their names


def chunked(items, size):
    """Yields lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


# --- row -> record --------------------------------------------------------------------------------------------------


def as_record(row):
    """A row of any known form -> a record: `conversations`, a list of turns, and `image`, a list of names or bytes.

    Turns: `conversations`, a list or its JSON text; `messages`, whose content may come in parts; `texts` of the Cauldron,
    question and answer in one. The last two need no `<image>`: without any, one per picture goes before the first question.
    Pictures: `image`, `images` or `image_bytes`; names, bytes or {"bytes", "path"}, one or a list of them.
    What fits none of this stays as it is, and `parse_record` refuses it.
    """
    if not isinstance(row, dict):
        return row
    talk_key = next((key for key in TALK_KEYS if row.get(key) is not None), None)
    if talk_key is None:
        return row
    picture_key = next((key for key in PICTURE_KEYS if row.get(key)), None)

    record = {key: value for key, value in row.items() if key not in (*TALK_KEYS, *PICTURE_KEYS)}
    record["image"] = pictures_of(row[picture_key]) if picture_key else names_in_parts(row[talk_key])
    record["conversations"] = turns_of(row[talk_key])
    if talk_key != "conversations":
        put_images_first(record)
    return record


def pictures_of(value):
    """The pictures of a row as a list of names or bytes; names in one text are separated by commas."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, (bytes, dict)):
        value = [value]
    if not isinstance(value, list):
        return value
    return [picture.get("bytes") or picture.get("path") if isinstance(picture, dict) else picture for picture in value]


def turns_of(talk):
    """The turns of a row as a list of {"role", "content"}; a turn of no known form stays as it is."""
    if isinstance(talk, str):
        try:
            talk = json.loads(talk)
        except (ValueError, RecursionError):
            return talk
    if not isinstance(talk, list):
        return talk
    turns = []
    for turn in talk:
        if isinstance(turn, dict) and "user" in turn and "assistant" in turn:
            turns.append({"role": "user", "content": turn["user"]})
            turns.append({"role": "assistant", "content": turn["assistant"]})
        elif isinstance(turn, dict):
            content = turn.get("content")
            if content is None:
                content = turn.get("value")
            turns.append({**turn, "role": turn.get("role") or turn.get("from"), "content": join_parts(content)})
        else:
            turns.append(turn)
    return turns


def join_parts(content):
    """The text of a message that may come in parts: texts, and pictures, which become `<image>`."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = "<image>" if kind in IMAGE_PARTS else part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            return content  # a part of an unknown type: the turn will be refused
        texts.append(text)
    return "\n".join(texts)


def names_in_parts(talk):
    """The names of pictures that the parts of messages hold themselves: {"type": "image", "image": "a.png"}."""
    names = []
    for turn in talk if isinstance(talk, list) else []:
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") in IMAGE_PARTS:
                value = part.get(part["type"])
                names.append(value.get("url") if isinstance(value, dict) else value)
    return [name for name in names if isinstance(name, str)]


def put_images_first(record):
    """Puts one `<image>` per picture before the first question, unless some turn has one already."""
    pictures = record["image"]
    turns = record["conversations"]
    if not isinstance(pictures, list) or not isinstance(turns, list) or "<image>" in str(turns):
        return
    for i, turn in enumerate(turns):
        if isinstance(turn, dict) and ROLES.get(str(turn.get("role"))) == "user" and isinstance(turn["content"], str):
            turns[i] = {**turn, "content": "<image>\n" * len(pictures) + turn["content"]}
            return


# --- record -> checked turns ----------------------------------------------------------------------------------------


def parse_record(row, where, placeholder):
    """A row or record -> (turns, image names), turns as (role, text) pairs. BadRecord says what is wrong, and `where`.

    A row that could not be read is itself a BadRecord.
    """
    if isinstance(row, BadRecord):
        raise row
    record = as_record(row)  # of Parquet, it is one already
    refuse_wrong_shape(record, where)
    names = record["image"]
    for name in names:
        if URL.match(name):
            says = f"the picture {name!r:.80} is a URL, and nothing is downloaded: save the file, and give its name"
            raise BadRecord("picture is a URL", f"{where}: {says}")
    turns = [parse_turn(turn, where) for turn in record["conversations"]]
    try:
        "".join([*names, *(text for _, text in turns)]).encode()
    except UnicodeEncodeError as error:
        raise BadRecord("wrong shape", f"{where}: half a character, as in a text that was cut ({error})") from None

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
    num_placeholders = sum(len(split_at_images(text, placeholder)) - 1 for _, text in turns)
    if num_placeholders != len(names):
        counts = f"{len(names)} images, but {num_placeholders} <image> in its conversations"
        if len(names) > num_placeholders and isinstance(row.get("image"), str):
            counts += ": a comma separates names, so put a name that has one into a list"
        raise BadRecord("images and <image> differ", f"{where}: {counts}")
    return turns, names


def refuse_wrong_shape(record, where):
    """BadRecord unless a record has a list of names and at least one turn."""
    if isinstance(record, dict):
        names = record.get("image")
        turns = record.get("conversations")
        if (
            isinstance(names, list)
            and all(isinstance(name, str) for name in names)
            and isinstance(turns, list)
            and turns
        ):
            return
    expected = "expected an object with 'image' (names) and 'conversations' (a list of turns)"
    raise BadRecord("wrong shape", f"{where}: {expected}, not {shortened(record)}")


def parse_turn(turn, where):
    """A turn -> (role, text)."""
    role = turn.get("role") if isinstance(turn, dict) else None
    text = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        expected = f"expected a turn with a role ({', '.join(ROLES)}) and text as its content"
        raise BadRecord("wrong shape", f"{where}: {expected}, not {shortened(turn)}")
    return ROLES[role], text


def shortened(value):
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
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
    is None until all have been read. notify: called with a message about the first `num_shown` records of each reason, or
    None.
    """

    def __init__(self, strict=True, max_fraction=0.0, notify=None, num_shown=1):
        self.strict = strict
        self.max_fraction = max_fraction
        self.notify = notify
        self.num_shown = num_shown
        self.total = None
        self.by_reason = {}  # reason -> set of record numbers
        self.examples = {}  # reason -> messages about the first of them

    def add(self, problem, number):
        """Counts a record, once however often it is met. BadInput if that makes too many."""
        if self.strict:
            raise BadInput(str(problem))

        # few messages per reason, since there may be thousands of records
        numbers = self.by_reason.setdefault(problem.reason, set())
        if number not in numbers:
            numbers.add(number)
            self.show(problem.reason, str(problem))

        # while the file is still being read, bad records may just be unevenly spread
        if self.total:
            self.raise_if_too_many()

    def show(self, reason, message):
        """Keeps the first messages of a reason, and passes on `num_shown` of them."""
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(message)
        if self.notify and len(self.by_reason[reason]) <= self.num_shown:
            self.notify(f"skipping this record{', and others like it' if self.num_shown == 1 else ''}: {message}")

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

    def state(self):
        """What `restore` needs, as plain values."""
        by_reason = {reason: sorted(numbers) for reason, numbers in self.by_reason.items()}
        return {"by_reason": by_reason, "examples": self.examples, "total": self.total}

    def restore(self, state):
        """Counts again what had been counted when `state` was called, with the same first messages."""
        for reason, messages in state["examples"].items():
            for message, number in zip(messages, state["by_reason"][reason], strict=False):
                self.add(BadRecord(reason, message), number)
            self.by_reason[reason].update(state["by_reason"][reason])
        self.total = state["total"]

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
