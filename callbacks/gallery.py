"""The pictures of a run as a page holds them: small enough that all of them fit."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from callbacks.pictures import IGNORED, INDEX, PREDICTIONS

JPEG_QUALITY = 72
#: Pictures are not made smaller than this on their longer side; rather there are fewer of them.
LEAST_SIDE = 96


def page_gallery(run_folder: Path, budget: int) -> dict[str, Any] | None:
    """The pictures of the newest validation, None if there are none.

    Args:
        run_folder: holds what the callback ``pictures`` wrote.
        budget: characters that all pictures may take together.

    Returns:
        ``step``, ``settings``, ``classes``, ``palette``, ``all_images`` (how many there are) and
        ``images``, those that are shown, each with

        - ``name``, ``width`` and ``height`` in pixels;
        - ``jpeg``: the image as base64;
        - ``maps``: for each pixel the label and the prediction under each setting, a byte each, as
          base64 of zlib, which takes least room in this order;
        - ``right``: for each setting the share of the labelled pixels that it gets right.
    """
    folder = run_folder / PREDICTIONS
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    pictures = [
        picture
        for picture in index["images"]
        if all((folder / f"{picture['file']}.{kind}").exists() for kind in ("jpg", "png"))
    ]
    if not pictures:
        return None
    images = _fit(folder, pictures, len(index["settings"]), budget)
    return {**index, "all_images": len(pictures), "images": images}


def _fit(
    folder: Path, pictures: Sequence[Mapping[str, str]], settings: int, budget: int
) -> list[dict[str, Any]]:
    """As many as fit, as large as they may be."""
    few = pictures[:: max(1, len(pictures) // 8)]
    side, tried = None, few
    while True:
        packed = list(_pack(folder, tried, settings, side))
        taken = sum(map(_length, packed)) * len(pictures) / len(tried)
        if taken <= budget and len(tried) == len(pictures):
            return packed
        if taken <= budget:
            tried = pictures
            continue
        longest = max(max(image["width"], image["height"]) for image in packed)
        if longest <= LEAST_SIDE:
            tried = pictures
            break
        # Boundaries grow with the side of a picture, what they enclose with its square.
        factor = min(0.95, max(0.5, (budget / taken) ** 0.6))
        side = max(LEAST_SIDE, int(longest * factor))
    shown: list[dict[str, Any]] = []
    for image in _pack(folder, pictures, settings, LEAST_SIDE):
        budget -= _length(image)
        if budget < 0:
            break
        shown.append(image)
    return shown


def _length(image: Mapping[str, Any]) -> int:
    return len(image["jpeg"]) + len(image["maps"]) + 200


def _pack(
    folder: Path, pictures: Sequence[Mapping[str, str]], settings: int, side: int | None
) -> Iterator[dict[str, Any]]:
    for picture in pictures:
        with Image.open(folder / f"{picture['file']}.png") as file:
            maps = np.asarray(file)
        maps = maps.reshape(1 + settings, -1, maps.shape[1])
        image = cv2.imread(str(folder / f"{picture['file']}.jpg"))
        assert image is not None
        height, width = maps.shape[1:]
        if side is not None and max(height, width) > side:
            small = (max(1, round(x * side / max(height, width))) for x in (height, width))
            height, width = small
            rows, columns = (
                ((np.arange(new) + 0.5) * old / new).astype(int)
                for new, old in zip((height, width), maps.shape[1:], strict=True)
            )
            maps = maps[:, rows[:, None], columns]
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        written, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        assert written
        counted = maps[0] != IGNORED
        right = (maps[1:] == maps[0])[:, counted].sum(axis=1) / max(1, counted.sum())
        together = np.ascontiguousarray(maps.transpose(1, 2, 0))
        yield {
            "name": picture["name"],
            "width": width,
            "height": height,
            "jpeg": base64.b64encode(jpeg.tobytes()).decode(),
            "maps": base64.b64encode(zlib.compress(together.tobytes())).decode(),
            "right": right.round(4).tolist(),
        }
