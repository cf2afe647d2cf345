"""Files: paths in the repository, JSON objects, atomic writes, Git LFS pointers, and where a folder keeps its weights."""

import contextlib
import json
import os
from pathlib import Path

import safetensors.torch
import torch

from .errors import BadInput

REPOSITORY = Path(__file__).resolve().parent.parent


def in_repository(path):
    """A path in this repository: absolute, unless the script was started there, so that messages are short."""
    return path if Path.cwd() == REPOSITORY else str(REPOSITORY / path)


def stamp(path):
    """Size and time of change of a file as text; "None" if it is missing."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # the latter for a name that no file can have
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
    content = text.encode(errors="backslashreplace")  # as JSON escapes half a character, of a name that isn't UTF-8
    write_atomically(path, lambda f: f.write(content))


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


def files_of_weights(path):
    """The files in which the tensors are: the one named, or those that the index of a sharded folder lists."""
    if not path.name.endswith(".index.json"):
        return [path]
    names = read_json_object(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise BadInput(f"{path} lists no files of weights: copy or download it again")
    return [path.with_name(name) for name in sorted(set(names.values()))]


def read_tensors(path):
    """The content of a file of weights, .pth, .bin or .safetensors, or of all files of an index. Code in it never runs.

    BadInput if a file is missing, damaged or none of these.
    """
    if path.name.endswith(".index.json"):
        state = {}
        for file in files_of_weights(path):
            shard = read_tensors(file)
            if not isinstance(shard, dict):
                raise BadInput(f"{file} is not a file of weights: expected named tensors")
            state |= shard
        return state
    if not os.path.exists(path):
        raise BadInput(f"{path} not found: copy or download it again")
    refuse_lfs_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  unpickling bytes that are no pickle can raise any
        if "GLOBAL" in str(error):  # the pickle wants to call something
            raise BadInput(
                f"{path} contains pickled code, not only tensors: refusing to load it; where it was made, save "
                "model.state_dict() alone"
            ) from None
        raise BadInput(f"{path} is truncated, or not a file of weights: copy or download it again") from None
