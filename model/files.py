"""Reading and writing files: JSON objects, atomic writes, Git LFS pointers, and where a folder keeps its weights."""

import contextlib
import json
import os

from .errors import BadInput


def stamp(path):
    """Size and time of change of a file as text; "None" if it is missing."""
    try:
        stat = os.stat(path)
    except OSError:
        stat = None
    return str(stat and (stat.st_size, stat.st_mtime_ns))


def read_json_object(path):
    """Reads a JSON object; {} if there is no file. BadInput if it is truncated or not an object."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not UTF-8
        content = None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is truncated, or not a JSON object: copy or download it again")
    return content


def write_json(path, content):
    """Writes JSON for people to read: indented, and without escaped characters."""
    text = json.dumps(content, ensure_ascii=False, indent=1)
    write_atomically(path, lambda f: f.write(text.encode()))


def write_atomically(path, write):
    """Calls write(open file) on a temporary file, syncs it to disk, and renames it to `path`.

    OSError if there is no room or no permission to write; `path` is then unchanged. A killed process leaves the temporary
    file behind; the next write overwrites it.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except RuntimeError as error:  # torch.save raises this when the file can't be written
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else error from None
    finally:
        partial.unlink(missing_ok=True)


def refuse_lfs_pointer(path):
    """BadInput if the file is a Git LFS pointer: a few lines of text that stand for a large file not fetched yet.

    A file that can't be opened passes: the loader has the better message.
    """
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise BadInput(f"{path} is a Git LFS pointer and not yet the file: run `git lfs pull` in its folder")


def find_weights(folder):
    """The weights file of a transformers folder, or its index if they are sharded; the usual name if there is neither."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.exists():
                return file
    return folder / "model.safetensors"
