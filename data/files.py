"""Where the files of a data set lie: a folder, or a folder inside a zip, read without unpacking."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data.classes import ClassTable
from segtrain.errors import UserError


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
            paths = _open_zip(self.path, os.getpid()).namelist()
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

    def read(self, name: str) -> bytes:
        if self.is_zip:
            # An open zip shares one file position, so every (forked) process opens its own.
            try:
                return _open_zip(self.path, os.getpid()).read(self.inside + name)
            except (zipfile.BadZipFile, zlib.error):
                raise UserError(f"{self}/{name} is damaged: get {self.path.name} again") from None
        return (self.path / name).read_bytes()


@lru_cache(maxsize=8)
def _open_zip(path: Path, process_id: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is not a complete zip file: the download was cut short; get it again"
        ) from None


def first_existing(places: Iterable[Place]) -> Place | None:
    """The first of several ways in which a folder may be there."""
    return next((place for place in places if place.exists()), None)


@dataclass(frozen=True)
class Split:
    """Images with their labels, and the table for the ids of the label files.

    `files` holds (stem, image name, label name), sorted by stem.
    """

    images: Place
    labels: Place
    files: list[tuple[str, str, str]]
    table: ClassTable
