"""Where the files of a data set lie: a folder, or a folder inside a zip, read without unpacking."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import imagecodecs
import numpy as np

from data.classes import ClassTable
from segtrain.errors import UserError

if TYPE_CHECKING:
    from data.cached import Cache

# Of the header before each member of a zip (APPNOTE 4.3.7).
_HEADER_START = b"PK\x03\x04"
_HEADER_SIZE = 30
_NAME_AND_EXTRA_SIZES = 26
_ENCRYPTED = 1


@dataclass(frozen=True)
class Place:
    """A folder on disk, or the folder `inside` of the zip file `path`."""

    path: Path
    inside: str = ""

    def __truediv__(self, folder: str) -> Place:
        if self.is_zip:
            return Place(self.path, f"{self.inside}{folder}/")
        return Place(self.path / folder)

    def __str__(self) -> str:
        return f"{self.path}:{self.inside}".rstrip("/:") if self.is_zip else str(self.path)

    @property
    def is_zip(self) -> bool:
        return self.path.suffix == ".zip"

    def exists(self) -> bool:
        return self.path.is_file() if self.is_zip else self.path.is_dir()

    def names(self, suffix: str) -> list[str]:
        """The sorted names, relative to this place, of all files below it that end in `suffix`.

        Files that archive programs leave behind (`._*`) do not count.
        """
        if self.is_zip:
            paths = _open_zip(self.path).rows
            names = [p[len(self.inside) :] for p in paths if p.startswith(self.inside)]
        elif self.exists():
            names = [
                (Path(folder).relative_to(self.path) / name).as_posix()
                for folder, _, files in os.walk(self.path, followlinks=True)
                for name in files
            ]
        else:
            names = []
        return sorted(n for n in names if n.endswith(suffix) and "/._" not in f"/{n}")

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        if self.is_zip:
            return self.exists() and self.inside + name in _open_zip(self.path).rows
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            UserError: it is missing, damaged (in a zip), or cannot be read.
        """
        try:
            if self.is_zip:
                return _open_zip(self.path).read(self.inside + name)
            return (self.path / name).read_bytes()
        except (FileNotFoundError, KeyError):
            raise UserError(
                f"{self}/{name} is missing: put it back from the data set's archive"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self}/{name} cannot be read ({error.strerror}): look at its permissions and at"
                " the disk"
            ) from None
        except zipfile.BadZipFile:
            raise UserError(f"{self}/{name} is damaged: get {self.path.name} again") from None
        except NotImplementedError:
            raise UserError(
                f"{self}/{name} is encrypted or compressed by a rare method: unpack"
                f" {self.path.name}"
            ) from None


class _Zip:
    """A zip that is read by its directory: several processes and threads at once, and quickly.

    `zipfile` reads through one file position, which forked processes share, takes twice the time,
    and holds three times as much of each member.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        with zipfile.ZipFile(self._file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
        #: Name -> row of what the directory says about a member.
        self.rows = {member.filename: row for row, member in enumerate(members)}
        self._members = np.fromiter(
            ((m.header_offset, m.compress_size, m.file_size, m.CRC, _method(m)) for m in members),
            dtype=(np.int64, 5),
        )

    def read(self, name: str) -> bytes:
        """The content of a member.

        Raises:
            KeyError: there is none of this name.
            NotImplementedError: it is encrypted, or compressed by a rare method.
            zipfile.BadZipFile: it is cut short, or its checksum is another.
        """
        offset, packed_size, size, checksum, method = self._members[self.rows[name]].tolist()
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotImplementedError
        header = os.pread(self._file.fileno(), _HEADER_SIZE, offset)
        if len(header) < _HEADER_SIZE or not header.startswith(_HEADER_START):
            raise zipfile.BadZipFile
        # Between header and content are a name and extra fields; the directory has other ones.
        name_and_extra = sum(struct.unpack_from("<HH", header, _NAME_AND_EXTRA_SIZES))
        start = offset + _HEADER_SIZE + name_and_extra
        content = os.pread(self._file.fileno(), packed_size, start)
        if method == zipfile.ZIP_DEFLATED:
            try:
                content = bytes(imagecodecs.deflate_decode(content, raw=True, out=size))
            except imagecodecs.DeflateError:
                raise zipfile.BadZipFile from None
        if len(content) != size or imagecodecs.deflate_crc32(content) != checksum:
            raise zipfile.BadZipFile
        return content


def _method(member: zipfile.ZipInfo) -> int:
    """How a member is compressed; -1 if it is encrypted."""
    return -1 if member.flag_bits & _ENCRYPTED else member.compress_type


@lru_cache(maxsize=8)
def _open_zip(path: Path) -> _Zip:
    try:
        return _Zip(path)
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is not a complete zip file: the download was cut short; get it again"
        ) from None


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def first_existing(places: Iterable[Place]) -> Place | None:
    """The first of several ways in which a folder may be there."""
    return next((place for place in places if place.exists()), None)


@dataclass(frozen=True)
class Split:
    """Images with their labels, and the table for the ids of the label files.

    `files` holds (stem, image name, label name), sorted by stem. A cache is read in their place.
    """

    images: Place
    labels: Place
    files: list[tuple[str, str, str]]
    table: ClassTable
    cache: Cache | None = None
