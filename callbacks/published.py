"""The points that papers print, for the network and the data set of a run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segtrain.config import read_file

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class PublishedPoint:
    """One printed pair of cost and accuracy.

    Attributes:
        network: its name.
        setting: ours of that name, or what the authors call theirs.
        gmacs: as printed, of one image.
        miou: in percent, single scale.
        source: where it was read.
        convention: how the cost was counted.
        remark: what else is to be known, or nothing.
    """

    network: str
    setting: str
    gmacs: float
    miou: float
    source: str
    convention: str
    remark: str = ""


def published_points(config: Mapping[str, Any]) -> list[PublishedPoint]:
    """The points of a run's network on its data set; none where nothing is known of either.

    Args:
        config: the composed configuration of the run, or a part of it.
    """
    network: Any = (config.get("model") or {}).get("name")
    data = config.get("data") or {}
    name = data.get("name")
    if data.get("variant"):
        name = f"{name}_{data['variant']}"
    content = _read()
    entry = content["networks"].get(network, {}).get(name)
    if entry is None:
        return []
    source = content["sources"][entry["source"]]
    return [
        PublishedPoint(
            network,
            str(setting),
            float(gmacs),
            float(miou),
            source["title"],
            source["convention"],
            "; ".join(map(str, remark)),
        )
        for setting, gmacs, miou, *remark in entry["points"]
    ]


@functools.cache
def _read() -> dict[str, Any]:
    return read_file(FILE, dotted=True)
