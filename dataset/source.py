"""Files in, records and pictures out, whatever the form: JSON lists, JSON Lines, Parquet; folders, zip and tar archives.

dataset/README.md has the forms, with examples.
"""

import json
import re
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from model.errors import BadInput, BadRecord
from model.files import refuse_lfs_pointer, stamp
from model.images import read_pixels

from .parquet import Rows, unpack
from .pictures import can_shorten, find_file, open_pictures

CHUNK = 2**22  # characters read from a file at a time
SPACE = re.compile(r"\s*")
COMMA = re.compile(r"\s*,\s*")
END = re.compile(r"\s*\]\s*$")
INSIDE = re.compile(r"\0(\d+) (\d+) (\d+)")
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(-[0-9a-f]+)?$")  # as Hugging Face names the parts of a set


class Source:
    """The data of a training, a check or a score: its records, and the pictures that they name.

    data_path: a file of records, a folder of Parquet (or JSON) files, or a list of both. images_path: the folder or archive
    of their pictures; it need not exist if pictures are inside the Parquet files. out_dir: Parquet files are unpacked into
    its folder `data`. quiet: shows no progress. BadInput if a file is missing, damaged or of no known form.
    """

    def __init__(self, data_path, images_path, out_dir=None, quiet=False):
        self.files = find_files(data_path)
        self.forms = [form_of(file) for file in self.files]
        self.images_path = images_path
        self.cache_dir = out_dir and Path(out_dir) / "data"
        self.quiet = quiet
        self.rows = {}  # number of a Parquet file -> its Rows
        for number, form in enumerate(self.forms):
            if form == "Parquet":
                self.rows[number] = Rows(unpack(self.files[number], self.cache_dir, quiet))
        self.pictures = None  # those of images_path, once `open_images_path` is called
        self.may_shorten = False  # see `compare_names`

    def __str__(self):
        return f"{self.files[0]}" + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")

    def records(self):
        """Yields (where, record) of all files, one after the other; `where` names file and record in messages."""
        for number, (file, form) in enumerate(zip(self.files, self.forms, strict=True)):
            with tqdm(desc=str(file), unit=" records", disable=self.quiet or None, leave=False) as bar:
                for where, record in self.read_parquet(number) if form == "Parquet" else read_json(file, form):
                    bar.update()
                    yield where, record

    def read_parquet(self, number):
        """Yields (where, record) of a Parquet file; pictures that are inside get names for `place_inside`."""
        for row, (record, num_inside) in enumerate(self.rows[number].records()):
            if num_inside:
                record["image"] = [f"\0{number} {row} {i}" for i in range(num_inside)]
            yield f"{self.files[number]}, row {row}", record

    def open_images_path(self):
        """Opens images_path, once. BadInput if it is neither a folder nor an archive."""
        if self.pictures is None:
            self.pictures = open_pictures(self.images_path)

    def compare_names(self, names):
        """Lets pictures be found without the folders in their names, unless two of these different names would then be the same."""
        self.may_shorten = can_shorten([name for name in names if place_inside(name) is None])

    def read_pixels(self, name, preprocess):
        """A picture as uint8 pixels (3, S, S). BadRecord if it is missing or unreadable."""
        place = place_inside(name)
        if place is None:
            self.open_images_path()
            return self.pictures.read_pixels(find_file(self.pictures, name, self.may_shorten), preprocess)
        number, row, i = place
        shown = f"{self.files[number]}, row {row}, picture {i}"
        return read_pixels(shown, preprocess, lambda _: self.rows[number].open_picture(row, i))

    def fingerprint(self, name):
        """A text that changes when the picture does."""
        place = place_inside(name)
        if place is None:
            self.open_images_path()
            return self.pictures.fingerprint(find_file(self.pictures, name, self.may_shorten))
        return f"{self.files[place[0]]} {place} {stamp(self.files[place[0]])}"

    def describe(self):
        """The forms of the files, as text."""
        counts = Counter(self.forms)
        return ", ".join(form if count == 1 else f"{count} {form} files" for form, count in counts.items())


def place_inside(name):
    """(number of the Parquet file, row, number in the row) of a picture inside a Parquet file; None of one that is a file.

    Such a name begins with a null character, which no file's name can have.
    """
    place = INSIDE.fullmatch(name)
    return place and tuple(map(int, place.groups()))


# --- which files, in which form -------------------------------------------------------------------------------------


def find_files(data_path):
    """The files of a path, or of a list of paths; for a folder, those in it. BadInput if there are none."""
    files = []
    for path in map(Path, [data_path] if isinstance(data_path, (str, Path)) else data_path):
        files += files_of_folder(path) if path.is_dir() else [path]
    for file in files:
        if not file.exists():
            raise BadInput(
                f"{file} not found: see dataset/README.md for where to get it, use --data_path, or try --demo"
            )
        refuse_lfs_pointer(file)
    twice = [file for file, count in Counter(file.resolve() for file in files).items() if count > 1]
    if twice:
        raise BadInput(f"{twice[0]} is named twice: name each file once")
    return files


def files_of_folder(folder):
    """The Parquet files of a folder, or if there are none, its JSON files. BadInput if one of the shards is missing."""
    for suffixes in ((".parquet",), (".jsonl", ".json")):
        files = sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
        # not what programs hide: copies of Jupyter, macOS's ._ files
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
        if files:
            break
    else:
        raise BadInput(f"{folder} has no .parquet, .jsonl or .json file in it")

    # shards, named train-00000-of-00003: all of one set
    sets = {}
    for file in files:
        shard = SHARD.match(file.stem)
        if shard:
            name = file.with_name(shard[1]).relative_to(folder)
            sets.setdefault((name, int(shard[3])), set()).add(int(shard[2]))
    if len(sets) > 1:
        names = [str(name) for name, _ in sets]
        raise BadInput(
            f"{folder} has the shards of several sets ({', '.join(names)}): name those of one, as in {folder}/{names[-1]}-*"
        )
    for (name, count), numbers in sets.items():
        missing = sorted(set(range(count)) - numbers)
        if missing:
            raise BadInput(
                f"{folder} has {len(numbers)} of the {count} shards {name}-*; missing: {missing[0]:05d}"
                f"{' and others' if len(missing) > 1 else ''}: download it, or name the files to use"
            )
    return files


def form_of(file):
    """`Parquet`, `JSON list` or `JSON Lines`, by what a file begins with. BadInput if it is none of them."""
    try:
        with open(file, "rb") as opened:
            begin = opened.read(4096)
    except OSError as error:
        raise BadInput(f"{file} could not be read ({error.strerror})") from None
    if begin.startswith(b"PAR1"):
        return "Parquet"
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise BadInput(f"{file} is empty")
    if text.startswith(b"["):
        return "JSON list"
    if text.startswith(b"{"):
        if text[1:].lstrip(b" \t\r").startswith(b"\n"):
            raise BadInput(f"{file} is one JSON object: put the records into a list, or one on each line")
        return "JSON Lines"
    raise BadInput(
        f"{file} should be Parquet, a JSON list of records with 'image' and 'conversations', or one such record per line, "
        f"but begins with {text[:20].decode(errors='replace')!r}"
    )


# --- JSON -> records ------------------------------------------------------------------------------------------------


def read_json(file, form):
    """Yields (where, record) of a JSON file. BadInput if it can't be read."""
    try:
        with open(file, encoding="utf-8-sig") as opened:
            yield from (parse_list if form == "JSON list" else parse_lines)(opened, file)
    except OSError as error:
        raise BadInput(f"{file} could not be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from None


def parse_lines(opened, file):
    """Yields (where, record) of each line that is not empty; for a line that is not valid JSON, a BadRecord that says so."""
    for number, line in enumerate(opened, 1):
        if not line.isspace():
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                record = BadRecord("not valid JSON", f"{where}: not valid JSON ({error})")
            yield where, record


def parse_list(opened, file):
    """Yields (where, record) of the JSON list in an open file, reading CHUNK characters at a time.

    BadInput names the first record that is not valid JSON.
    """
    text = opened.read(CHUNK).lstrip()
    decoder = json.JSONDecoder()
    number = 0  # of the next record
    position = 1  # in `text`: everything before it has been parsed
    end_of_file = False
    while not (end_of_file and END.match(text, position)):
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
                raise BadInput(f"{file}, record {number}, is not valid JSON ({why})") from None
            chunk = opened.read(CHUNK)
            text = text[position:] + chunk
            position = 0
            end_of_file = not chunk
            continue
        yield f"{file}, record {number}", record
        number += 1
        position = end
    if not number:
        raise BadInput(f"{file} is an empty list")
