"""How good answers are: exact match on labelled files, and the questions that go with the evaluation pictures."""

import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path

import torch

from dataset.records import chunked, parse_record
from dataset.source import Source

from .conversation import split_at_images
from .errors import BadInput


def score(chat, data_path, images_path, out_dir=None, seed=0):
    """Exact match on a labelled file -> (table, answers).

    table: {kind: (questions, right with its own picture, right with another record's)}; "all" sums the kinds up. The last
    number shows how far guessing from the question alone gets; None if all records have the same picture.
    answers: (question, label, answer) of each record.

    Asks each record's first question with a picture, after the turns before it; an answer is right if it equals the label.
    data_path, images_path, out_dir: as in `Source`.
    """
    # read all questions and labels
    kinds, texts, questions, labels, names = [], [], [], [], []
    source = Source(data_path, images_path, out_dir)
    for where, record in source.records():
        turns, images = parse_record(record, where, chat.config.image_special_token)
        # the turns up to the question, and the pictures in them
        num_pictures = 0
        for length, (role, text) in enumerate(turns, 1):
            num_pictures += len(split_at_images(text, chat.config.image_special_token)) - 1
            if role == "user" and num_pictures:
                break
        else:
            raise BadInput(f"{where}: to score, a record needs a question with a picture")
        kind = record.get("kind")
        kinds.append(kind if isinstance(kind, str) else "question")
        try:
            questions.append(chat.encode_prompt(turns[:length])[0].tolist())
        except BadInput as problem:
            raise BadInput(f"{where}: {problem}") from None
        texts.append("".join(split_at_images(text, chat.config.image_special_token)).strip())
        labels.append(turns[length][1])
        names.append(tuple(images[:num_pictures]))

    # run CLIP once over each different set of pictures
    sets = list(dict.fromkeys(names))
    if len({len(one) for one in sets}) != 1:
        raise BadInput(f"{source}: to score, there should be questions, all with the same number of pictures")
    source.compare_names({name for one in sets for name in one})
    features = {}  # what a set of pictures looks like, as a hash -> (n, P, V)
    looks = {}  # set of names -> that hash
    for begin in range(0, len(sets), 32):
        part = sets[begin : begin + 32]
        pixels = [source.read_pixels(name, chat.encoder.preprocess) for one in part for name in one]
        for one, its_pixels in zip(part, chunked(pixels, len(sets[0])), strict=True):
            looks[one] = hashlib.sha256(torch.stack(its_pixels).numpy().tobytes()).hexdigest()
        features.update(zip(map(looks.get, part), chat.encode_images(pixels).split(len(sets[0])), strict=True))

    # swap pictures in a ring, shuffled, so that none is given its own
    own = [looks[one] for one in names]
    shuffled = list(features)
    random.Random(seed).shuffle(shuffled)
    swapped = dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True))

    # ask everything twice: about the right pictures, and about the swapped ones
    own_answers = chat.answer_all(questions, [features[look] for look in own])
    other_answers = chat.answer_all(questions, [features[swapped[look]] for look in own])

    # count right answers per kind
    counts = defaultdict(lambda: [0, 0, 0])  # kind -> questions, right, right with swapped pictures
    for kind, label, own_answer, other_answer in zip(kinds, labels, own_answers, other_answers, strict=True):
        for row in (counts[kind], counts["all"]):
            row[0] += 1
            row[1] += own_answer == label
            row[2] += other_answer == label
    counts["all"] = counts.pop("all")  # last

    only_one = len(features) == 1
    table = {
        kind: (total, right / total, None if only_one else right_swapped / total)
        for kind, (total, right, right_swapped) in counts.items()
    }
    return table, list(zip(texts, labels, own_answers, strict=True))


def read_questions(folder):
    """`questions.json` of a folder of evaluation pictures: a list of ([picture files], question)."""
    file = Path(folder) / "questions.json"
    if not file.exists():
        raise BadInput(f"{file} not found: it lists the questions to ask, as [[picture, ...], question] pairs")
    questions = []
    try:
        pairs = json.loads(file.read_text(encoding="utf-8-sig"))  # Windows' editors begin it with a mark
        if not isinstance(pairs, list):
            raise TypeError(f"it is a {type(pairs).__name__}")
        for pair in pairs:
            names, question = pair
            names = [names] if isinstance(names, str) else names  # a single picture needs no list
            texts = [question, *names]
            if not (isinstance(pair, list) and all(isinstance(text, str) for text in texts)):
                raise ValueError(f"{json.dumps(pair, ensure_ascii=False)[:100]} is none")
            questions.append(([file.parent / name for name in names], question))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{file} is not a JSON list of [[picture, ...], question] pairs ({error}): fix it") from None
    return questions
