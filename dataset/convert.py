"""A CSV or JSONL file of captions, or of questions and answers, as the JSON records that training reads.

    python -m dataset.convert captions.csv photos/ my_photos.json
    python -m dataset.convert captions.csv photos/ my_photos.json --question "What is in this picture?"

CSV: UTF-8, with a header line that names the columns `image`, `caption` (or `answer`) and, where there are questions,
`question`, separated by `,`, `;` or tabs. JSONL, for files called so: an object a line with the same names, or a ready record
with `conversations`. `image` may name several pictures, as in `a.jpg, b.jpg`; the question gets an `<image>` for each in front
unless it has them. A row without a question gets that of --question.

Of each picture only the header is read, for the sake of large folders: one that is cut off is found when it is trained on.
Whatever is wrong is told by its line; the target is written only if nothing is.
"""

import argparse
import codecs
import csv
import functools
import io
import json
import os
import re
import shlex
from pathlib import Path

from PIL import Image

from model.errors import BadInput, run_script
from model.files import write_atomically
from model.LMConfig import LMConfig

from .records import CAPTION_PROMPT, parse_record, record

COLUMNS = ("image", "caption", "answer", "question")
SHOWN = 10  # bad lines told at once
SETTINGS = "--learning_rate 5e-5 --epochs 10"  # dataset/README.md, 'Your own pictures'


def read_text(source):
    """A text file without its byte order mark, its lines ended by `\\n`."""
    try:
        text = source.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    except OSError as error:
        raise BadInput(f"{source} could not be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{source}, line {line}: not UTF-8: save the file as such (in Excel, 'CSV UTF-8')") from None
    if not text.strip():
        raise BadInput(f"{source} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def csv_rows(source, text):
    """(its first line, {column: cell}) of each row; cells beyond the last column are a list under None."""
    first = text.split("\n", 1)[0]
    found = {mark: {name.strip(' "').lower() for name in first.split(mark)}.intersection(COLUMNS) for mark in ",;\t"}
    mark = max(found, key=lambda mark: len(found[mark]))
    reader = csv.reader(io.StringIO(text), delimiter=mark, skipinitialspace=True, strict=True)
    line = 1
    try:
        header = [name.strip().lower() for name in next(reader)]
        known = [name for name in header if name in COLUMNS]
        if "image" not in known or not {"caption", "answer"}.intersection(known) or len(set(known)) < len(known):
            wanted = "'image' and 'caption' (or 'answer') once each"
            raise BadInput(f"{source}, line 1: the header should name the columns {wanted}, not {', '.join(header)!r}")
        line = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, {**dict(zip(header, cells, strict=False)), None: cells[len(header) :]}
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{source}, line {line}: a quotation mark is missing or too many ({error})") from None


def json_row(text, where):
    """The object in a line of JSONL."""
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()  # half a character, as in "\ud83d", could not be written
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadInput(f"{where}: should be an object, {{...}}, not {text!r:.50}")
    return row


def to_record(row, where, question):
    """The record of a row of `COLUMNS`."""
    if any(cell.strip() for cell in row.get(None, [])):
        raise BadInput(
            f"{where}: more cells than the header has: is text with a separator in it not in quotation marks?"
        )
    cells = [row.get(name) or "" for name in COLUMNS]
    for name, value in zip(COLUMNS, cells, strict=True):
        if not isinstance(value, str):
            raise BadInput(f"{where}: '{name}' should be text, not {value!r:.50}")
    image, caption, answer, asked = (value.strip() for value in cells)
    names = [name.strip() for name in image.split(",") if name.strip()]
    if not names:
        raise BadInput(f"{where}: 'image' names no picture")
    if bool(caption) == bool(answer):
        raise BadInput(f"{where}: {'both a caption and an' if caption else 'no caption or'} answer: give one of them")
    asked = asked or question
    if "<image>" not in asked:
        asked = "<image>\n" * len(names) + asked
    return record(names, [(asked, caption or answer)])


def picture_problem(path):
    """Why Pillow can't open a picture, or None."""
    try:
        with Image.open(path):
            return None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or "save it as JPEG or PNG"
        return f"{path} could not be opened as a picture ({why})"


def check(one, where, folder, placeholder, problem_of):
    """The names of a record's pictures. BadInput if it could not be trained on."""
    _, names = parse_record(one, where, placeholder)
    if len(names) > 1 and os.path.isfile(folder / one["image"]):
        raise BadInput(f"{where}: rename the picture {one['image']!r}: a comma separates the names of two")
    problems = list(filter(None, [problem_of(folder / name) for name in names]))
    if problems:
        raise BadInput(f"{where}: {problems[0]}")
    return names


def convert(source, folder, question):
    """(the records of a file, how many pictures they name, columns not used). BadInput tells what is wrong, a line each."""
    text, placeholder = read_text(source), LMConfig().image_special_token
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder: name that of the pictures after the file of texts")
    if source.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        if re.match(r"\s*\[\s*\{", text):
            raise BadInput(f"{source} is one list: put each object on a line of its own, with no comma after it")
        rows = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    else:
        rows = csv_rows(source, text)
    records, pictures, unused, problems = [], set(), set(), []
    problem_of = functools.cache(picture_problem)  # each picture is opened once
    for number, row in rows:
        where = f"{source}, line {number}"
        try:
            row = json_row(row, where) if isinstance(row, str) else row
            ready = "conversations" in row
            records.append(row if ready else to_record(row, where, question))
            pictures.update(check(records[-1], where, folder, placeholder, problem_of))
            unused.update(() if ready else row.keys() - {*COLUMNS, None, ""})
        except BadInput as problem:
            problems.append(str(problem))
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise BadInput("\n".join(problems[:SHOWN] + more))
    if not records:
        raise BadInput(f"{source} has no rows to convert")
    return records, len(pictures), sorted(unused)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the CSV or JSONL file")
    parser.add_argument("folder", type=Path, help="where its pictures are")
    parser.add_argument("target", type=Path, help="the JSON file to write")
    parser.add_argument("--question", default=CAPTION_PROMPT, help="where a row has none (default %(default)s)")
    args = parser.parse_args()
    records, pictures, unused = convert(args.source, args.folder, args.question)
    content = json.dumps(records, ensure_ascii=False, indent=1).encode()
    try:
        if args.target.exists() and args.target.samefile(args.source):
            raise BadInput(f"{args.target} is the file to convert: name another to write")
        write_atomically(args.target, lambda f: f.write(content))
    except OSError as error:
        raise BadInput(f"{args.target} could not be written ({error.strerror})") from None
    places = shlex.join(["--data_path", str(args.target), "--images_path", str(args.folder)])
    not_used = f" (columns not used: {', '.join(unused)})" if unused else ""
    print(
        f"wrote {args.target}: {len(records)} records about {pictures} pictures{not_used}; next: "
        f"python 2-sft_vlm.py --from_weights out/512_vlm_sft.pth --out_dir out/mine {places} {SETTINGS}"
    )


if __name__ == "__main__":
    run_script(main)
