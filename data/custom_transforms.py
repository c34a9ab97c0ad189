"""The user's own steps of the training pipeline: albumentations transforms by name, from YAML."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
from pydantic import ValidationError

from data.classes import IGNORE_INDEX
from data.colors import PhotometricDistortion, PILPhotometricDistortion
from data.geometry import RandomScaledCrop
from segtrain.errors import UserError, check_arguments, did_you_mean, first_line

_OWN = (PhotometricDistortion, PILPhotometricDistortion, RandomScaledCrop)
#: They hold other transforms, under `transforms`.
_COMPOSITIONS = (A.OneOf, A.OneOrOther, A.RandomOrder, A.Sequential, A.SomeOf)


def build_transforms(
    described: Sequence[Mapping[str, Any]], crop_size: Sequence[int], pad_color: Sequence[int]
) -> list[A.BasicTransform | A.BaseCompose]:
    """Build the transforms of `data.transforms`, and try each of them on one image.

    Their defaults are albumentations' but for two: they fill images with the padding's colour, and
    masks, where they fill these, with 255 (ignored; theirs is 0, which is the first class).

    Args:
        described: each is a name (of a class of albumentations, or of `data.colors` and
            `data.geometry`) with the arguments of its constructor. OneOf, SomeOf and the like
            hold others under `transforms`.
        crop_size: (height, width) of the crops that come in.
        pad_color: RGB of what pads images.

    Raises:
        UserError: a name, an argument or a value is wrong, or a transform cannot make another
            uint8 image and mask from an image and its mask alone.
    """
    return _build_all("data.transforms", described, crop_size, pad_color)


def _build_all(
    place: str, described: Any, crop_size: Sequence[int], pad_color: Sequence[int]
) -> list[A.BasicTransform | A.BaseCompose]:
    if not isinstance(described, Sequence) or isinstance(described, str):
        raise UserError(f"{place} is a list of transforms: [{{name: GaussianBlur, p: 0.1}}, ...]")
    return [
        _build(f"{place}[{number}]", one, crop_size, pad_color)
        for number, one in enumerate(described)
    ]


def _build(
    place: str, described: Any, crop_size: Sequence[int], pad_color: Sequence[int]
) -> A.BasicTransform | A.BaseCompose:
    if not isinstance(described, Mapping) or "name" not in described:
        raise UserError(f"{place} has no name: write {{name: GaussianBlur, p: 0.1}}")
    arguments = dict(described)
    name = str(arguments.pop("name"))
    available = _available()
    if name not in available:
        raise UserError(f"{place}: there is no transform '{name}': {did_you_mean(name, available)}")
    kind, what = available[name], f"{place}: {name}"
    accepted = inspect.signature(kind).parameters
    check_arguments(what, arguments, accepted)
    if arguments.get("mask_interpolation", cv2.INTER_NEAREST) not in (
        cv2.INTER_NEAREST,
        cv2.INTER_NEAREST_EXACT,
    ):
        raise UserError(
            f"{what}: mask_interpolation is {cv2.INTER_NEAREST} or {cv2.INTER_NEAREST_EXACT}"
            " (nearest): any other mixes the numbers of classes"
        )
    if issubclass(kind, A.BaseCompose):
        held = arguments.get("transforms")
        arguments["transforms"] = _build_all(f"{place}.transforms", held, crop_size, pad_color)
    elif "fill_mask" in accepted:
        if "tuple" in str(accepted["fill"].annotation):  # or it takes a grey alone
            arguments.setdefault("fill", tuple(pad_color))
        if accepted["fill_mask"].default is not None:  # or labels stay under what is blanked out
            arguments.setdefault("fill_mask", IGNORE_INDEX)
    transform = _create(what, kind, arguments)
    _try(what, transform, crop_size)
    return transform


@functools.cache
def _available() -> dict[str, type[A.BasicTransform] | type[A.BaseCompose]]:
    offered = [
        kind
        for _, kind in inspect.getmembers(A, inspect.isclass)
        if issubclass(kind, A.BasicTransform) and not issubclass(kind, A.Transform3D)
    ]
    return {kind.__name__: kind for kind in (*offered, *_COMPOSITIONS, *_OWN)}


def _create(
    what: str, kind: type[A.BasicTransform] | type[A.BaseCompose], arguments: Mapping[str, Any]
) -> A.BasicTransform | A.BaseCompose:
    try:
        return kind(**arguments)
    except Exception as error:
        problem = first_line(error)
        if isinstance(error.__cause__, ValidationError):
            # One is enough: there is one for each of the types that an argument may have.
            detail = error.__cause__.errors()[0]
            problem = detail["msg"].removeprefix("Value error, ")
            for name in map(str, detail["loc"][:1]):
                given = f"={arguments[name]!r}" if name in arguments else ""
                takes = inspect.signature(kind).parameters[name].annotation
                problem = f"{name}{given}: {problem} ({takes})"
        raise UserError(f"{what}: {problem}") from error


def _try(what: str, transform: A.BasicTransform | A.BaseCompose, crop_size: Sequence[int]) -> None:
    """Raise UserError unless it makes another image and mask of those of a crop."""
    height, width = crop_size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    transform.set_random_seed(0)
    try:
        result = transform(force_apply=True, image=image, mask=mask)
    except Exception as error:
        raise UserError(
            f"{what} fails on an image of {width}x{height} and its mask: {first_line(error)}"
        ) from error
    image, mask = result["image"], result["mask"]
    if not _is_uint8(image) or image.shape[2:] != (3,):
        raise UserError(
            f"{what} makes a {type(image).__name__} {image.dtype} {tuple(image.shape)} of an image,"
            " which is to stay an array uint8 (height, width, 3): it is normalised on the device"
        )
    if not _is_uint8(mask) or mask.shape != image.shape[:2]:
        raise UserError(f"{what} makes a mask that does not fit its image")


def _is_uint8(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == np.uint8
