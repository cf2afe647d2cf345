"""Pictures by name: in a folder, or read in place from a zip or tar archive; and which file a record's name means.

Zip format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7 (local header).
"""

import contextlib
import hashlib
import io
import os
import re
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from model.errors import BadInput
from model.files import refuse_lfs_pointer, stamp
from model.images import open_picture, read_pixels

COCO_PREFIX = "COCO_train2014_"
MAX_FOLDERS = 32  # in which names are looked for, as that takes time


def open_pictures(path):
    """The pictures of a folder or an archive. BadInput if it is neither."""
    path = Path(path)
    if path.is_dir():
        return PictureFolder(path)
    if path.is_file():
        return PictureArchive(path)
    raise BadInput(f"{path} is not a folder or archive: see dataset/README.md for the pictures, or use --images_path")


class PictureFolder:
    """Pictures in a folder. folders: those in it."""

    def __init__(self, path):
        self.path = path
        folders = [entry.name for entry in os.scandir(path) if entry.is_dir()]
        self.folders = sorted(folders) if len(folders) <= MAX_FOLDERS else []

    def has(self, name):
        return os.path.exists(self.path / name)

    def read_pixels(self, name, preprocess):
        """A picture as uint8 pixels (3, size, size). BadRecord if it is missing or unreadable."""
        return read_pixels(self.path / name, preprocess)

    def fingerprint(self, name):
        """A text that changes when the picture does."""
        return f"{self.path / name} {stamp(self.path / name)}"


class PictureArchive:
    """Pictures in a zip or an uncompressed tar file, read in place.

    Half a million names would fill the memory of each worker process; the index has 40 bytes a member, in tensors that
    workers share: `hashes` (M,), sorted, of the names; `places` (M, 4): offset in the file, stored bytes, whether they are
    deflated, CRC-32. Of a zip, the offset is that of the local header, which precedes the data. folders: those that most
    members are in, at any depth.
    BadInput if the archive is damaged, encrypted, or compressed in another way.
    """

    def __init__(self, path):
        self.path = path
        refuse_lfs_pointer(path)
        try:
            self.is_zip = not is_tar(path) and zipfile.is_zipfile(path)
            names, places = (read_zip_index if self.is_zip else read_tar_index)(path)
        except (zipfile.BadZipFile, tarfile.TarError, NotImplementedError, EOFError, UnicodeDecodeError) as error:
            raise BadInput(
                f"{path} is truncated, or not a zip or tar archive ({error}): download it again, or unpack it"
            ) from None
        except OSError as error:
            raise BadInput(f"{path} could not be read ({error.strerror})") from None
        if not names:
            raise BadInput(f"{path} has no files in it")

        folders = {str(PurePosixPath(name).parent) for name in names} - {"."}
        self.folders = sorted(folders) if len(folders) <= MAX_FOLDERS else []
        hashes = np.fromiter(map(name_hash, names), dtype=np.int64, count=len(names))
        order = np.argsort(hashes, stable=True)
        self.hashes = torch.from_numpy(hashes[order])
        self.places = torch.tensor(places, dtype=torch.int64)[order]

    def find(self, name):
        """The index of a member, or None."""
        wanted = name_hash(name)
        index = int(np.searchsorted(self.hashes.numpy(), wanted, side="right")) - 1  # of members of one name, the last
        return index if index >= 0 and self.hashes[index] == wanted else None

    def has(self, name):
        return self.find(name) is not None

    def read(self, name):
        """The bytes of a member. FileNotFoundError if there is none of this name, ValueError if it is damaged."""
        index = self.find(name)
        if index is None:
            raise FileNotFoundError(2, "no such file in the archive")
        offset, size, deflated, checksum = self.places[index].tolist()
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            if self.is_zip:
                # a local header of 30 bytes, a name and extra fields, whose lengths are in its last 4 bytes
                header = file.read(30)
                file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
            content = file.read(size)
        if deflated:
            content = zlib.decompress(content, wbits=-15)
        if self.is_zip and zlib.crc32(content) != checksum:
            raise ValueError("its checksum is wrong")
        return content

    def read_pixels(self, name, preprocess):
        """A picture as uint8 pixels (3, size, size). BadRecord if it is missing or damaged."""
        return read_pixels(f"{self.path}/{name}", preprocess, lambda _: open_picture(io.BytesIO(self.read(name))))

    def fingerprint(self, name):
        """A text that changes when the archive does."""
        return f"{self.path}/{name} {stamp(self.path)}"


def read_zip_index(path):
    """(names, places) of the members of a zip file."""
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
    for info in members:
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadInput(f"{path}: {info.filename} is encrypted, or not compressed by deflate: unpack the archive")
    names = [member_name(info) for info in members]
    places = [(info.header_offset, info.compress_size, info.compress_type != 0, info.CRC) for info in members]
    return names, places


def member_name(info):
    """The name of a zip's member; without the flag for UTF-8, one that isn't ASCII may be in the encoding of a Chinese Windows."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    for encoding in ("utf-8", "gbk"):
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode(encoding)
    return info.filename


def is_tar(path):
    """Whether a file begins as a tar does; the last member of one may be a zip, by whose end zips are recognised."""
    with open(path, "rb") as file:
        return file.read(512)[257:262] == b"ustar"


def read_tar_index(path):
    """(names, places) of the members of a tar file; a hard link has the place of what it links to."""
    with open(path, "rb") as file:
        if file.read(3) in (b"\x1f\x8b\x08", b"BZh", b"\xfd7z"):
            raise BadInput(
                f"{path} is compressed, so no picture in it can be read alone: decompress it to a .tar first"
            )
    with tarfile.open(path, "r:") as archive:
        places = {}
        for info in archive:
            if info.isfile():
                places[info.name] = (info.offset_data, info.size, 0, 0)
            elif info.islnk() and info.linkname in places:
                places[info.name] = places[info.linkname]
    return [name.removeprefix("./") for name in places], list(places.values())


def name_hash(name):
    """64 bits of a name, the same in every process and for both forms of composed characters and of slashes."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    return int.from_bytes(
        hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big", signed=True
    )


# --- names in records -> names of files -----------------------------------------------------------------------------


def can_shorten(names):
    """Whether these different names are still different without the folders in them."""
    return len({re.split(r"[/\\]", name)[-1] for name in names}) == len(names)


def find_file(pictures, name, may_shorten):
    """The name of the file that a record's name means; the name as it is, if none is found.

    `coco/train2017/1.jpg` may lie there as `train2017/1.jpg` or `1.jpg`, if no other record's picture is called `1.jpg`
    (`may_shorten`); and `1.jpg` in one of the folders, if no other has a file of that name. Each also with COCO's prefix.
    """
    spellings = [name, name.replace("\\", "/")]
    spellings += [unicodedata.normalize(form, spellings[-1]) for form in ("NFC", "NFD")]
    places = [spellings]
    if may_shorten:
        paths = [PurePosixPath(spelling).parts for spelling in spellings[1:]]
        places += [[str(PurePosixPath(*parts[dropped:])) for parts in paths] for dropped in range(len(paths[0]))]
    for place in places:
        if found := first_there(pictures, place):
            return found
    deeper = [[f"{folder}/{spelling}" for spelling in spellings[1:]] for folder in pictures.folders]
    found = [there for place in deeper if (there := first_there(pictures, place))]
    return found[0] if len(found) == 1 else name


def first_there(pictures, names):
    """The first of several names under which there is a picture, with COCO's prefix or without; None if there is none."""
    for name in dict.fromkeys(names):
        for spelling in (name, with_prefix(name)):
            if pictures.has(spelling):
                return spelling
    return None


def with_prefix(name):
    """A name with COCO's prefix before its last part."""
    path = PurePosixPath(name)
    return str(path.parent / f"{COCO_PREFIX}{path.name}")
