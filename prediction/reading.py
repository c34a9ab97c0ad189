"""Pictures from files, upright, read ahead in threads and grouped by their size."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from data.decoding import decode_image
from segtrain.errors import UserError

#: Pixels of a batch, but for one picture that alone has more.
MOST_PIXELS = 2**24
#: Pixels of the pictures that wait for others of their size.
MOST_WAITING = 2**26
_ORIENTATION = 0x0112  # of EXIF

Key = TypeVar("Key")
Value = TypeVar("Value")


class Unreadable(Exception):
    """A picture cannot be labelled; the message says why."""


def read_upright(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as its EXIF says. Of 16 bits the upper 8 are kept.

    Raises:
        Unreadable: it is damaged, is no picture, or has more pixels than PIL takes for safe.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    orientation = _orientation(content)
    try:
        image = decode_image(content, str(path))
    except (UserError, cv2.error):
        what = "empty" if not content else "damaged, cut short or no picture"
        raise Unreadable(what) from None
    except MemoryError:
        raise Unreadable("does not fit into the memory") from None
    return _turn(image, orientation)


def _orientation(content: bytes) -> int:
    """What EXIF says of how the camera was held; 1 where it says nothing."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise Unreadable(f"more than {limit} megapixels") from None
    except Exception:  # PIL raises many kinds; whether it can be decoded is seen after this
        return 1


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def reading_threads() -> int:
    """As many as there are cores for this process, at most 8."""
    linux = hasattr(os, "sched_getaffinity")
    return min(8, len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1)


def read_ahead(
    keys: Iterable[Key], read: Callable[[Key], Value], threads: int
) -> Iterator[tuple[Key, Value | Unreadable]]:
    """What `read` gives of each key, in their order, read in threads a few ahead."""
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        reading: deque[tuple[Key, Future[Value]]] = deque()

        def take() -> tuple[Key, Value | Unreadable]:
            key, future = reading.popleft()
            try:
                return key, future.result()
            except Unreadable as error:
                return key, error

        try:
            for key in keys:
                reading.append((key, pool.submit(read, key)))
                if len(reading) > 2 * threads:
                    yield take()
            while reading:
                yield take()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def group_by_size(
    images: Iterable[tuple[Key, np.ndarray]], batch_size: int
) -> Iterator[list[tuple[Key, np.ndarray]]]:
    """Batches of pictures of one size: as soon as one is full, or too many pictures wait."""
    groups: dict[tuple[int, ...], list[tuple[Key, np.ndarray]]] = {}
    waiting = 0
    for key, image in images:
        group = groups.setdefault(image.shape, [])
        group.append((key, image))
        pixels = image.shape[0] * image.shape[1]
        waiting += pixels
        if len(group) >= min(batch_size, max(1, MOST_PIXELS // pixels)):
            full = image.shape
        elif waiting > MOST_WAITING:
            full = max(groups, key=lambda shape: shape[0] * shape[1] * len(groups[shape]))
        else:
            continue
        waiting -= full[0] * full[1] * len(groups[full])
        yield groups.pop(full)
    yield from groups.values()
