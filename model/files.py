"""Files in and out: JSON objects, files that are whole or not there at all, and where a folder keeps its weights."""

import contextlib
import json
import os

from .errors import BadInput


def read_json_object(path):
    """The object in a JSON file; {} where there is no file. BadInput if it is not whole, or something else."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not UTF-8
        content = None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a whole JSON object: copy or download it again")
    return content


def write_json(path, content):
    """A JSON file, as a person would like to read it."""
    text = json.dumps(content, ensure_ascii=False, indent=1)
    write_atomically(path, lambda f: f.write(text.encode()))


def write_atomically(path, write):
    """Calls write(open file) on a temporary file and puts it, once it is on disk, in the place of `path`.

    OSError if there is no room or no right to write; `path` is then what it was. A process that is killed meanwhile leaves
    the temporary file behind, to be overwritten by the next.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except RuntimeError as error:  # what torch.save makes of a file that could not be written
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else error from None
    finally:
        partial.unlink(missing_ok=True)


def refuse_lfs_pointer(path):
    """BadInput if a file is the few lines that Git leaves in the place of a large one until Git LFS has fetched it.

    What can't be opened is left to the loader to tell.
    """
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise BadInput(f"{path} is a Git LFS pointer and not yet the file: run `git lfs pull` in its folder")


def find_weights(folder):
    """The file with the tensors in a transformers folder, or the index of several such files, or where it should be."""
    names = ("model.safetensors", "pytorch_model.bin")
    files = [folder / f"{name}{index}" for name in names for index in ("", ".index.json")]
    return next((file for file in files if file.exists()), files[0])
