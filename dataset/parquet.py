"""Parquet files that hold pictures: unpacked once into an Arrow file, from which any row can be read at any time.

To read one row of a Parquet file, all of its row group must be decompressed, often 100 MB; training reads rows in random
order. The Arrow file has the same rows uncompressed, is mapped into memory, and is shared by all processes. Its columns:
`record`, JSON text of the one form (records.py), and `pictures`, the bytes of the row's pictures as they were.

Formats: https://parquet.apache.org/docs/file-format/, https://arrow.apache.org/docs/format/Columnar.html (IPC file).
"""

import contextlib
import functools
import glob
import hashlib
import io
import json
import mmap
import os
import shutil
import time
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from model.errors import BadInput
from model.files import stamp
from model.images import open_picture

from .records import PICTURE_KEYS, TALK_KEYS, as_record

ROWS = 64  # unpacked at a time; pictures may have megabytes
FORMAT = 2  # version of the Arrow file; those of other versions are made again
BATCH_BYTES = 2**23  # in a batch of the Arrow file; to open it, the head of each batch is read
ABANDONED = 600  # seconds after which nobody is writing to a temporary file any more


def import_pyarrow():
    """The optional package `pyarrow`. BadInput if it is not installed."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise BadInput("to read Parquet files, pyarrow is needed: pip install pyarrow") from None
    return pyarrow


def unpack(file, cache_dir, quiet):
    """The Arrow file of a Parquet file in `cache_dir`; made if it isn't there yet. quiet: shows no progress.

    BadInput if the Parquet file is damaged or has other columns, or if there is no room for the Arrow file.
    """
    pyarrow = import_pyarrow()
    folder = Path(cache_dir)
    name = f"{file.stem[:40]}-{short_hash(file.resolve())}"
    target = folder / f"{name}-{short_hash(FORMAT, stamp(file))}.arrow"
    if is_arrow(pyarrow, target):
        return target

    partial = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, name)
        free = shutil.disk_usage(folder).free
        if free < file.stat().st_size:
            raise BadInput(
                f"{file} has {file.stat().st_size / 1e9:.1f} GB of rows to unpack into {folder}, where {free / 1e9:.1f} GB "
                "are free: make room, or name another --out_dir"
            )
        write_arrow(pyarrow, file, partial, quiet)
        os.replace(partial, target)
        pyarrow.default_memory_pool().release_unused()  # hundreds of MB
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is damaged, or not a Parquet file ({first_line(error)}): download it again") from None
    except OSError as error:
        # pyarrow raises OSError for damaged pages, too, but without an error number
        if error.errno is None:
            raise BadInput(f"{file} is damaged ({first_line(error)}): download it again") from None
        raise BadInput(f"{file} could not be unpacked into {folder} ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return target


def short_hash(*values):
    """Eight characters that differ if one of the values does."""
    return hashlib.sha256(" ".join(map(str, values)).encode()).hexdigest()[:8]


def is_arrow(pyarrow, path):
    """Whether a file is there and complete; its last bytes are written last."""
    try:
        with pyarrow.memory_map(str(path)) as file:
            pyarrow.ipc.open_file(file)
        return True
    except (OSError, pyarrow.ArrowInvalid):
        return False


def remove_leftovers(folder, name):
    """Removes what older versions of a Parquet file were unpacked into, and what killed processes left behind."""
    for path in folder.glob(f"{glob.escape(name)}-*"):
        if path.suffix == ".arrow" or time.time() - path.stat().st_mtime > ABANDONED:
            with contextlib.suppress(OSError):  # gone meanwhile, or in use on Windows
                path.unlink()


def first_line(error):
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0]


def columns_of(file, parquet):
    """The columns to read: turns, pictures and the kind of a question. BadInput if there are no turns."""
    names = parquet.schema_arrow.names
    columns = [name for name in (*TALK_KEYS, *PICTURE_KEYS, "kind") if name in names]
    if not any(name in TALK_KEYS for name in columns):
        raise BadInput(
            f"{file} has the columns {', '.join(names)}, but none of {', '.join(TALK_KEYS)}: see dataset/README.md for the "
            "forms"
        )
    return columns


def write_arrow(pyarrow, source, target, quiet):
    """Writes the rows of a Parquet file to an Arrow file."""
    schema = pyarrow.schema([("record", pyarrow.string()), ("pictures", pyarrow.list_(pyarrow.binary()))])
    rows = []  # unpacked and not written yet
    size = 0  # of what they hold, in bytes
    with (
        pyarrow.parquet.ParquetFile(source) as parquet,
        pyarrow.OSFile(str(target), "wb") as file,
        pyarrow.ipc.new_file(file, schema) as writer,
        tqdm(desc=f"unpacking into {target.parent}, once", unit=" rows", disable=quiet or None) as bar,
    ):
        bar.total = parquet.metadata.num_rows
        for batch in parquet.iter_batches(ROWS, columns=columns_of(source, parquet)):
            unpacked = [unpack_row(row) for row in batch.to_pylist()]
            rows += unpacked
            size += sum(len(record) + sum(map(len, pictures)) for record, pictures in unpacked)
            bar.update(len(unpacked))
            if size > BATCH_BYTES:
                write_batch(pyarrow, writer, schema, rows)
                rows, size = [], 0
        if rows:
            write_batch(pyarrow, writer, schema, rows)


def write_batch(pyarrow, writer, schema, rows):
    """Writes rows, as `unpack_row` returns them, as one batch of an Arrow file."""
    columns = zip(*rows, strict=True)
    arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    writer.write(pyarrow.record_batch(arrays, schema=schema))


def unpack_row(row):
    """A row -> (its record as JSON text, the bytes of its pictures). A record whose pictures are names has no bytes."""
    record = as_record(row)
    pictures = record.get("image")
    inside = "conversations" in record and isinstance(pictures, list) and all(isinstance(p, bytes) for p in pictures)
    if not inside:
        return json.dumps(record, default=as_text), []

    # text-only rows of today's data carry a small black picture, as the code they are made for needs one
    if "<image>" not in str(record["conversations"]) and all(map(is_filler, pictures)):
        pictures = []
    del record["image"]
    return json.dumps(record, default=as_text), pictures


def as_text(value):
    """For values that JSON doesn't have, as dates. Bytes become null: beside names of pictures, they are a wrong shape."""
    return None if isinstance(value, bytes) else str(value)


@functools.lru_cache(64)
def is_filler(picture):
    """Whether a picture, as bytes, is 8 x 8 pixels of black."""
    try:
        with Image.open(io.BytesIO(picture)) as image:
            return image.size == (8, 8) and not any(image.convert("L").tobytes())
    except Exception:  # noqa: BLE001  Pillow's decoders raise all kinds of exceptions; a broken picture is found later
        return False


class Rows:
    """The rows of an Arrow file that `unpack` made."""

    def __init__(self, path):
        self.path = path
        self.table = None

    def __getstate__(self):
        """What pickle sends to a DataLoader worker: only the path, as each worker maps the file itself."""
        return {"path": self.path, "table": None}

    def column(self, name):
        """A column of all rows, mapped into memory."""
        if self.table is None:
            pyarrow = import_pyarrow()
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
                mapped.madvise(mmap.MADV_RANDOM)  # a picture doesn't bring its neighbours into memory
            self.table = pyarrow.ipc.open_file(pyarrow.py_buffer(mapped)).read_all()
        return self.table[name]

    def records(self):
        """Yields (record, number of its pictures that are inside) of each row."""
        chunks = zip(self.column("record").chunks, self.column("pictures").chunks, strict=True)
        for records, pictures in chunks:
            counts = pictures.value_lengths().to_pylist()
            for record, count in zip(records.to_pylist(), counts, strict=True):
                yield {"image": [], **json.loads(record)}, count

    def open_picture(self, row, number):
        """One picture of a row as a Pillow image."""
        return open_picture(io.BytesIO(self.column("pictures")[row].values[number].as_py()))
