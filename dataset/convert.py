"""Converts a CSV or JSON file of captions, or of questions and answers, to the JSON records that training reads.

    python -m dataset.convert captions.csv photos/ my_photos.json
    python -m dataset.convert captions.csv photos/ my_photos.json --question "What is in this picture?"

CSV: UTF-8, with a header line that names the columns `image`, `caption` (or `answer`) and, if there are questions,
`question`, separated by `,`, `;` or tabs. JSON, in a file named .jsonl, .ndjson or .json: one object per line, or a list of
them, with the same names, or records that training could read itself. `image` may name several pictures, as in
`a.jpg, b.jpg`; one `<image>` for each is put before the question unless it has its own. A row without a question gets the one
of --question.

Only the headers of pictures are read, which keeps large folders fast; truncated pictures surface in training. Errors are
reported with their line or number, and the target is written only if there are none.
"""

import argparse
import codecs
import contextlib
import csv
import io
import json
import os
import shlex
from pathlib import Path

from model.arguments import TOKENIZER_PATH
from model.checkpoint import load_tokenizer
from model.conversation import tokenizer_fields
from model.errors import BadInput, BadRecord, run_script
from model.files import in_repository, write_atomically
from model.images import Preprocess, opened
from model.LMConfig import LMConfig
from model.stages import DEMO_MODEL

from .dataset import VLMDataset
from .pictures import can_shorten, find_file, open_pictures
from .records import CAPTION_PROMPT, TALK_KEYS, make_record, parse_record
from .source import Source

COLUMNS = ("image", "caption", "answer", "question")
ANY_LENGTH = 2**30  # tokens of a record; training has a limit
MAX_SHOWN = 10  # bad lines that are listed
SETTINGS = "--learning_rate 5e-5 --epochs 10"  # dataset/README.md, 'Your own pictures'


# --- file -> rows ---------------------------------------------------------------------------------------------------


def read_text(source):
    """The text of a file, without a byte order mark, all line ends as `\\n`."""
    try:
        text = source.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    except OSError as error:
        raise BadInput(f"{source} could not be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{source}, line {line}: not UTF-8: save the file as UTF-8 (in Excel, 'CSV UTF-8')") from None
    if not text.strip():
        raise BadInput(f"{source} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def csv_rows(source, text):
    """Yields (where, {column: cell}) for each row, by its first line; cells beyond the last column are a list under None."""
    # the separator is the one that finds most of our columns in the header
    header_line = text.split("\n", 1)[0]
    columns_found = {}
    for separator in ",;\t":
        names = {name.strip(' "').lower() for name in header_line.split(separator)}
        columns_found[separator] = len(names.intersection(COLUMNS))
    separator = max(columns_found, key=columns_found.get)

    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True)
    line = 1
    try:
        # an image and a text are needed, and no column twice
        header = [name.strip().lower() for name in next(reader)]
        known = [name for name in header if name in COLUMNS]
        has_text = "caption" in known or "answer" in known
        if "image" not in known or not has_text or len(set(known)) < len(known):
            expected = "'image' and 'caption' (or 'answer') once each"
            raise BadInput(f"{source}, line 1: the header should name {expected}, not {', '.join(header)!r}")

        # a row may span several lines; spreadsheets add empty ones
        line = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                row = dict(zip(header, cells, strict=False))
                row[None] = cells[len(header) :]
                yield f"{source}, line {line}", row
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{source}, line {line}: a missing or extra quotation mark ({error})") from None


def check_row(row, where):
    """BadInput unless a row of a JSON file is an object that can be saved."""
    if isinstance(row, BadRecord):
        raise row
    if not isinstance(row, dict):
        raise BadInput(f"{where}: should be an object, {{...}}, not {row!r:.50}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # half a character, as in "\ud83d"
        raise BadInput(f"{where}: not valid JSON ({error})") from None


# --- row -> record --------------------------------------------------------------------------------------------------


def to_record(row, where, default_question):
    """The record of a row with `COLUMNS`. BadInput if something is missing or given twice."""
    # unquoted separators give more cells than columns
    if any(cell.strip() for cell in row.get(None, [])):
        raise BadInput(
            f"{where}: more cells than the header has: put text that contains the separator in quotation marks"
        )
    cells = [row.get(name) or "" for name in COLUMNS]
    for name, value in zip(COLUMNS, cells, strict=True):
        if not isinstance(value, str):
            raise BadInput(f"{where}: '{name}' should be text, not {value!r:.50}")
    image, caption, answer, question = (value.strip() for value in cells)

    # at least one picture, and one text about it
    names = [name.strip() for name in image.split(",") if name.strip()]
    if not names:
        raise BadInput(f"{where}: 'image' names no picture")
    if caption and answer:
        raise BadInput(f"{where}: both a caption and an answer: give one of them")
    if not caption and not answer:
        raise BadInput(f"{where}: no caption or answer: give one of them")

    question = question or default_question
    if "<image>" not in question:
        question = "<image>\n" * len(names) + question
    return make_record(names, [(question, caption or answer)])


def picture_problem(path):
    """Why Pillow can't open a picture, or None."""
    try:
        with opened(path):
            return None
    except BadRecord as problem:
        return str(problem)


def validated_names(row, record, where, folder, placeholder):
    """The names of a record's pictures. BadInput if training could not use the record."""
    text = row.get("image")
    if isinstance(text, str) and "," in text and os.path.isfile(folder / text.strip()):
        raise BadInput(f"{where}: rename the picture {text.strip()!r}: a comma separates two names")
    return parse_record(record, where, placeholder)[1]


# --- all of it ------------------------------------------------------------------------------------------------------


def convert(source, folder, default_question):
    """(the records of a file, how many pictures they name, unused columns). BadInput lists what is wrong, one line each."""
    with contextlib.suppress(OSError), open(source, "rb") as file:
        if file.read(4) == b"PAR1":
            raise BadInput(f"{source} is Parquet, which training reads as it is: --data_path {source}")
    is_json = source.suffix.lower() in (".jsonl", ".ndjson", ".json")
    rows = Source(source, folder).records() if is_json else csv_rows(source, read_text(source))
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder: after the file of texts, name the folder of the pictures")

    placeholder = LMConfig().image_special_token
    records = []
    names_of = {}  # number of a row -> (where it is, the names of its pictures)
    unused = set()
    problems = []  # with the numbers of their rows
    for number, (where, row) in enumerate(rows):
        try:
            # every row becomes a record that training would accept, or an error
            if is_json:
                check_row(row, where)
            is_ready = any(key in row for key in TALK_KEYS)
            record = row if is_ready else to_record(row, where, default_question)
            records.append(record)
            names_of[number] = where, validated_names(row, record, where, folder, placeholder)
            if not is_ready:
                unused.update(row.keys() - {*COLUMNS, None, ""})
        except BadInput as problem:
            # collect errors, so that they can all be fixed at once
            problems.append((number, str(problem)))

    # each picture is opened once, however many rows name it, and found as training finds it
    pictures = open_pictures(folder)
    names = {name for _, names in names_of.values() for name in names}
    may_shorten = can_shorten(names)
    problem_of = {name: picture_problem(folder / find_file(pictures, name, may_shorten)) for name in names}
    for number, (where, names) in names_of.items():
        problems += [(number, f"{where}: {problem_of[name]}") for name in names if problem_of[name]][:1]

    lines = [line for _, line in sorted(problems)]
    if len(lines) > MAX_SHOWN:
        lines[MAX_SHOWN:] = [f"and {len(lines) - MAX_SHOWN} more"]
    if lines:
        raise BadInput("\n".join(lines))
    if not records:
        raise BadInput(f"{source} has no rows to convert")
    return records, len(problem_of), sorted(unused)


def quoted(path):
    """A path for a command line: in double quotes if it needs any, as Windows knows no single ones."""
    word = shlex.quote(str(path))
    return word if word == str(path) or set(str(path)) & set('"$`!') else f'"{path}"'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the CSV or JSON file")
    parser.add_argument("folder", type=Path, help="the folder of its pictures")
    parser.add_argument("target", type=Path, help="the JSON file to write")
    parser.add_argument("--question", default=CAPTION_PROMPT, help="for rows that have none (default %(default)s)")
    there = [path for path in (TOKENIZER_PATH, DEMO_MODEL["tokenizer_path"]) if Path(path, "tokenizer.json").exists()]
    parser.add_argument(
        "--tokenizer_path",
        default=next(iter(there), None),
        help="folder of the tokenizer, to tell how well it knows the answers' characters (default %(default)s)",
    )
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer_path) if args.tokenizer_path else None
    records, num_pictures, unused = convert(args.source, args.folder, args.question)

    # write to a temporary file and rename, never over the source
    content = json.dumps(records, ensure_ascii=False, indent=1).encode()
    try:
        if args.target.exists() and args.target.samefile(args.source):
            raise BadInput(f"{args.target} is the file to convert: name another to write")
        write_atomically(args.target, lambda f: f.write(content))
    except OSError as error:
        raise BadInput(f"{args.target} could not be written ({error.strerror})") from None

    # what training will say of the texts, with the tokenizer that is there
    if tokenizer:
        config = LMConfig(**tokenizer_fields(tokenizer))
        lenient = {"strict": False, "max_fraction": 1.0}
        dataset = VLMDataset(args.target, args.folder, tokenizer, config, ANY_LENGTH, Preprocess(), **lenient)
        print(f"with the tokenizer in {args.tokenizer_path}: {dataset.describe()}")

    # the summary ends with the next command to run, which fits the tokenizer
    is_demo = (
        bool(args.tokenizer_path) and Path(args.tokenizer_path).resolve() == Path(in_repository("model/demo")).resolve()
    )
    weights = in_repository(f"out/{192 if is_demo else 512}_vlm_sft.pth")
    settings = "--epochs 30" if is_demo else SETTINGS
    command = [in_repository("2-sft_vlm.py"), *(["--demo"] if is_demo else []), "--from_weights", weights]
    if not is_demo and args.tokenizer_path not in (None, TOKENIZER_PATH):
        command += ["--tokenizer_path", args.tokenizer_path]
    command += ["--out_dir", in_repository("out/mine")]
    command += ["--data_path", str(args.target), "--images_path", str(args.folder)]
    not_used = f" (columns not used: {', '.join(unused)})" if unused else ""
    print(
        f"wrote {args.target}: {len(records)} records about {num_pictures} pictures{not_used}; next: "
        f"python {' '.join(map(quoted, command))} {settings}"
    )


if __name__ == "__main__":
    run_script(main)
