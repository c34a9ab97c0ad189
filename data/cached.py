"""A split's cache on disk: decoded images, and labels as compressed train ids.

Its folder holds at most 64 files, ``part-00.bin`` and so on, each of as many images in the order of
the split (the last one of fewer). A part consists of

- the pixels of each image, (height, width, 3) uint8 RGB, left out where labels alone are cached,
  followed by its label, (height, width) uint8 train ids compressed by zstd;
- an `_ENTRY` for each image: where its pixels and its label are, and the label's CRC-32;
- four int64 for each image: size and modification time in seconds (in a zip: CRC-32) of its file
  and of its label's;
- JSON: version of this format, first and last image (exclusive), whether their pixels are there,
  and SHA-256 of the split's file names and of its class table;
- `_END`: the bytes of the two tables, those of the JSON, the CRC-32 of all three, and ``segtrain``.

Numbers are little-endian. A part gets its name once all of it is on the disk, and needs no other
file to be checked. Pixels have no CRC: all of an image would have to be read for a window of it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import uuid
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from data.dataset import load, load_label
from data.files import Place, Split
from segtrain.errors import UserError

# Counts up whenever the format changes, or the same files would give other pixels.
_VERSION = 1
# Every process that loads maps each part, and a map takes one of its file descriptors.
_MOST_PARTS = 64
_FEWEST_IMAGES = 16
# zstd decompresses as fast at any level; this one compresses as fast as a PNG is decoded.
_LEVEL = 9
_ENTRY = np.dtype(
    [
        ("height", "<u4"),
        ("width", "<u4"),
        ("image", "<u8"),
        ("label", "<u8"),
        ("label_bytes", "<u4"),
        ("label_crc", "<u4"),
    ]
)
_END = struct.Struct("<III8s")
_MAGIC = b"segtrain"
_REMEDY = "`python -m data.cache` with this data set's arguments"


@dataclass(frozen=True)
class Part:
    """What a part says of itself.

    Attributes:
        path: its file.
        about: the JSON.
        entries: (n,) `_ENTRY`; none if the part is of another version.
        sources: (n, 4) int64.
        end: the last bytes, by which it is recognised.
    """

    path: Path
    about: dict[str, Any]
    entries: np.ndarray
    sources: np.ndarray
    end: bytes


class Cache:
    """The images and labels of a split as they are in its cache.

    Parts are mapped into memory when they are first read from, in each process.

    Args:
        parts: all of them.

    Attributes:
        has_images: whether there are images beside the labels.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.has_images = all(part.about["has_images"] for part in parts)
        self._images_per_part = len(parts[0].entries)
        # Workers that are spawned get a copy, which has no use for the sources.
        self._parts = [replace(part, sources=part.sources[:0].copy()) for part in parts]
        self._maps: dict[int, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def image(self, index: int) -> np.ndarray:
        """An image, (H, W, 3) uint8 RGB, mapped read-only: what is not looked at is not read.

        Raises:
            UserError: the cache is not what it was when it was opened.
        """
        entry, content = self._find(index)
        shape = (int(entry["height"]), int(entry["width"]), 3)
        return np.ndarray(shape, np.uint8, content, int(entry["image"]))

    def label(self, index: int) -> np.ndarray:
        """The train ids of an image, (H, W) uint8.

        Raises:
            UserError: they are damaged, or the cache is not what it was when it was opened.
        """
        entry, content = self._find(index)
        start = int(entry["label"])
        compressed = content[start : start + int(entry["label_bytes"])]
        if zlib.crc32(compressed) != entry["label_crc"]:
            raise _damaged(self._parts[index // self._images_per_part].path)
        ids = np.empty(int(entry["height"]) * int(entry["width"]), np.uint8)
        imagecodecs.zstd_decode(compressed, out=ids.data)
        return ids.reshape(int(entry["height"]), int(entry["width"]))

    def _find(self, index: int) -> tuple[np.ndarray, mmap.mmap]:
        number, position = divmod(index, self._images_per_part)
        part = self._parts[number]
        if number not in self._maps:
            try:
                with part.path.open("rb") as file:
                    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # ValueError: it is empty
                content = None
            if content is None or content[-_END.size :] != part.end:
                raise UserError(
                    f"{part.path} has changed or gone since it was opened: start again if the cache"
                    f" was built anew meanwhile; otherwise mend it by {_REMEDY}"
                )
            self._maps[number] = content
        return part.entries[position], self._maps[number]


class CacheFolder:
    """Where the cache of a split is or will be, and what it has to be made from.

    Args:
        path: of the folder.
        split: the files.

    Attributes:
        ranges: the images of each part.
        sources: (N, 4) int64, of all images: see the module.
    """

    def __init__(self, path: Path, split: Split) -> None:
        self.path = path
        self.split = split
        images = len(split.files)
        size = max(_FEWEST_IMAGES, -(-images // _MOST_PARTS))
        self.ranges = [range(i, min(i + size, images)) for i in range(0, images, size)]
        _, image_names, label_names = zip(*split.files, strict=True)
        places = ((split.images, image_names), (split.labels, label_names))
        self.sources = np.concatenate([_sizes_and_times(*place) for place in places], axis=1)
        names = "\0".join("\0".join(file) for file in split.files)
        colors = b"" if split.table.raw_colors is None else split.table.raw_colors.tobytes()
        self._hashes = {
            "names": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
            "table": hashlib.sha256(split.table.raw_to_train.tobytes() + colors).hexdigest(),
        }

    def part(self, number: int) -> Path:
        return self.path / f"part-{number:02}.bin"

    def _about(self, images: range) -> dict[str, Any]:
        return {"version": _VERSION, "images": [images.start, images.stop], **self._hashes}

    def difference(self, number: int, part: Part) -> str | None:
        """Why a part is of no use any more; None if it is."""
        images = self.ranges[number]
        about = self._about(images)
        for key, difference in (
            ("version", "has another format"),
            ("names", "is of other files: some were added, removed or renamed"),
            ("table", "has the labels of another class table"),
            ("images", "is divided otherwise"),
        ):
            if part.about[key] != about[key]:
                return difference
        changed = (part.sources != self.sources[images.start : images.stop]).nonzero()
        if len(changed[0]):
            _, image, label = self.split.files[images[changed[0][0]]]
            is_label = changed[1][0] >= 2
            place, name = (self.split.labels, label) if is_label else (self.split.images, image)
            return f"is older than its files: {place}/{name} has another size or date, or is gone"
        return None

    def write(self, number: int, with_images: bool, advance: Callable[[], None]) -> list[str]:
        """Write a part, unless files that it is made from cannot be read.

        Args:
            number: of the part.
            with_images: whether to write images beside the labels.
            advance: is called after each image.

        Returns:
            what is wrong with which files.
        """
        images, unreadable = self.ranges[number], []
        entries = np.zeros(len(images), _ENTRY)
        unfinished = self.part(number).with_suffix(f".{uuid.uuid4().hex}.unfinished")
        try:
            with unfinished.open("wb") as file:
                for entry, index in zip(entries, images, strict=True):
                    try:
                        image, label, compressed = encode(self.split, index, with_images)
                    except UserError as error:
                        unreadable.append(str(error))
                        continue
                    finally:
                        advance()
                    entry["height"], entry["width"] = label.shape
                    entry["image"] = file.tell()
                    if image is not None:
                        file.write(np.ascontiguousarray(image).data)
                    entry["label"], entry["label_bytes"] = file.tell(), len(compressed)
                    entry["label_crc"] = zlib.crc32(compressed)
                    file.write(compressed)
                about = {**self._about(images), "has_images": with_images}
                tables = entries.tobytes() + self.sources[images.start : images.stop].tobytes()
                text = json.dumps(about).encode()
                crc = zlib.crc32(tables + text)
                file.write(tables + text + _END.pack(len(tables), len(text), crc, _MAGIC))
                file.flush()
                os.fsync(file.fileno())
            if not unreadable:
                unfinished.replace(self.part(number))
        finally:
            unfinished.unlink(missing_ok=True)
        return unreadable


def encode(
    split: Split, index: int, with_image: bool
) -> tuple[np.ndarray | None, np.ndarray, bytes | bytearray]:
    """An image (None without), its label, and that compressed.

    Raises:
        UserError: a file cannot be read.
    """
    if with_image:
        _, image, label = load(split, index)
    else:
        image, label = None, load_label(split, index)
    return image, label, imagecodecs.zstd_encode(label.tobytes(), level=_LEVEL)


def read_part(path: Path) -> Part:
    """What a part says of itself.

    Raises:
        UserError: the file is not whole.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END.size))
        end = file.read()
        if len(end) < _END.size or not end.endswith(_MAGIC):
            raise _damaged(path)
        table_bytes, text_bytes, crc, _ = _END.unpack(end)
        start = size - _END.size - table_bytes - text_bytes
        file.seek(max(0, start))
        content = file.read(table_bytes + text_bytes)
    if zlib.crc32(content) != crc:
        raise _damaged(path)
    about = json.loads(content[table_bytes:])
    if about["version"] != _VERSION:
        return Part(path, about, np.empty(0, _ENTRY), np.empty((0, 4), np.int64), end)
    start_image, stop_image = about["images"]
    images = stop_image - start_image
    entries = np.frombuffer(content, _ENTRY, images)
    sources = np.frombuffer(content, "<i8", 4 * images, entries.nbytes).reshape(images, 4)
    if entries["label"][-1] + entries["label_bytes"][-1] != start:
        raise _damaged(path)
    return Part(path, about, entries, sources, end)


def open_cache(split: Split, folder: Path) -> Cache | None:
    """The cache of a split, if there is one and it is of these files; a warning if it is not.

    Args:
        split: the files.
        folder: of the split's cache.

    Raises:
        UserError: a part is damaged.
    """
    if not folder.is_dir():
        return None
    expected, parts = CacheFolder(folder, split), []
    unfinished, difference = False, None
    for number in range(len(expected.ranges)):
        try:
            part = read_part(expected.part(number))
        except FileNotFoundError:
            unfinished = True
            continue
        difference = expected.difference(number, part)
        if difference is not None:
            break
        parts.append(part)
    if difference is None and unfinished:
        difference = f"is unfinished: {len(parts)} of {len(expected.ranges)} parts are there"
    if difference is not None:
        rank_zero_warn(
            f"the cache in {folder} {difference}. The files are read instead; {_REMEDY} brings it"
            " up to date"
        )
        return None
    return Cache(parts)


def _sizes_and_times(place: Place, names: Sequence[str]) -> np.ndarray:
    """(N, 2) int64, size and modification time in seconds of files, or in a zip CRC-32; or -1."""
    values: list[int] = []
    if place.is_zip:
        with zipfile.ZipFile(place.path) as archive:
            for name in names:
                member = archive.getinfo(place.inside + name)
                values += (member.file_size, member.CRC)
    else:
        for name in names:
            try:
                # A Path of each would take twice as long.
                status = os.stat(f"{place.path}/{name}")  # noqa: PTH116
                values += (status.st_size, int(status.st_mtime))  # archives keep whole seconds
            except OSError:
                values += (-1, -1)
    return np.array(values, np.int64).reshape(-1, 2)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged or cut short: mend the cache by {_REMEDY}")
