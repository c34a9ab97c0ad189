"""CTS: Segmenter's names; the policy's are our own, as its authors' files are not published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segtrain.weights import segmenter
from segtrain.weights.vit import timm_table


def _read_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``create_network`` takes for weights by our names; empty if unclear."""
    arguments = segmenter.OFFICIAL.read_arguments(weights)
    if "decoder" in arguments or not arguments:  # a linear one, which CTS has not
        return {}
    return arguments | {"name": arguments["name"].replace("segmenter", "cts")}


TIMM = timm_table("cts", _read_arguments)

AUTHORS = dataclasses.replace(
    segmenter.OFFICIAL,
    origin="the authors of Segmenter and CTS",
    network="cts",
    read_arguments=_read_arguments,
)
