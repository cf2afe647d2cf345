"""How good answers are: exact match on labelled files, and the questions that go with the evaluation pictures."""

import json
import random
from collections import defaultdict
from pathlib import Path

from dataset.records import parse_record, read_records

from .errors import BadInput


def score(chat, data_path, images_path, seed=0):
    """Exact match on a labelled file: {kind: (questions, right with its own picture, right with another record's)}.

    Each record's first question is asked, after its system turn if it has one, and its answer compared to the letter; `kind`
    groups records, "all" sums them up. The last figure tells how far one gets by guessing from the question alone; None if
    all records have the same picture.
    """
    records = read_records(data_path)
    kinds, questions, wanted, names = [], [], [], []
    for number, record in enumerate(records):
        turns, images = parse_record(record, f"{data_path}, record {number}", chat.config.image_special_token)
        kinds.append(record.get("kind", "question"))
        asked = 2 if turns[0][0] == "system" else 1
        questions.append(chat.encode_prompt(turns[:asked])[0].tolist())
        wanted.append(turns[asked][1])
        names.append(tuple(images))
    sets = list(dict.fromkeys(names))
    if len({len(one) for one in sets}) > 1 or not sets[0]:
        raise BadInput(f"{data_path}: to score, all records need pictures, and the same number of them")
    seen = {}
    for begin in range(0, len(sets), 32):
        part = sets[begin : begin + 32]
        features = chat.encode_images([Path(images_path) / name for one in part for name in one])
        seen.update(zip(part, features.split(len(sets[0])), strict=True))
    shuffled = sets[:]
    random.Random(seed).shuffle(shuffled)
    other = dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True))  # everyone's neighbour: never its own picture
    results = [
        [answer == right for answer, right in zip(chat.answer_all(questions, features), wanted, strict=True)]
        for features in ([seen[one] for one in names], [seen[other[one]] for one in names])
    ]
    table = defaultdict(lambda: [0, 0, 0])
    for kind, own, others in zip(kinds, *results, strict=True):
        for row in (table[kind], table["all"]):
            for column, value in enumerate((1, own, others)):
                row[column] += value
    table["all"] = table.pop("all")  # last
    alone = len(sets) == 1
    return {
        kind: (count, own / count, None if alone else others / count) for kind, (count, own, others) in table.items()
    }


def read_questions(folder):
    """`questions.json` of a folder of evaluation pictures: a list of ([picture files], question)."""
    file = Path(folder) / "questions.json"
    if not file.exists():
        raise BadInput(f"{file} not found: it lists the questions to ask, as [[picture, ...], question] pairs")
    try:
        pairs = json.loads(file.read_text(encoding="utf-8"))
        return [([file.parent / name for name in names], str(question)) for names, question in pairs]
    except (ValueError, TypeError) as error:
        raise BadInput(f"{file} is no JSON list of [[picture, ...], question] pairs ({error}): mend it") from None
