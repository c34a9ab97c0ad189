"""Images, labels and files: the data sets as LightningDataModules. Knows nothing of networks."""

from __future__ import annotations

import inspect
import os
from typing import Any

# albumentations would ask the package index for its newest version whenever it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from data.ade20k import ADE20K
from data.camvid import CamVid
from data.cityscapes import Cityscapes
from data.cocostuff import COCOStuff
from data.imagenet import ImageNet
from data.module import SegmentationData
from data.scenes import Scenes
from segtrain.errors import UserError, check_arguments, did_you_mean

__all__ = [
    "ADE20K",
    "COCOStuff",
    "CamVid",
    "Cityscapes",
    "ImageNet",
    "Scenes",
    "SegmentationData",
    "create_data_module",
]

_DATA_MODULES: dict[str, type[SegmentationData]] = {
    "ade20k": ADE20K,
    "camvid": CamVid,
    "cityscapes": Cityscapes,
    "cocostuff": COCOStuff,
    "imagenet": ImageNet,
    "scenes": Scenes,
}


def create_data_module(name: str, **options: Any) -> SegmentationData:
    """Build a data module by its plain name.

    Args:
        name: ade20k, camvid, cityscapes, cocostuff, imagenet or scenes.
        options: constructor arguments of the class.

    Raises:
        UserError: there is no data set of this name, or it takes no such argument.
    """
    if name not in _DATA_MODULES:
        raise UserError(f"no data set is called '{name}': {did_you_mean(name, _DATA_MODULES)}")
    data_module = _DATA_MODULES[name]
    accepted = set(inspect.signature(data_module).parameters)
    if "options" in accepted:  # what it hands on
        accepted = accepted - {"options"} | set(inspect.signature(SegmentationData).parameters)
    check_arguments(f"data set '{name}'", options, accepted)
    return data_module(**options)
