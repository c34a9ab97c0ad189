"""segtrain: efficient semantic-segmentation transformers, their reductions and their cost.

Names load on first use, so that checking a configuration does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segtrain.cost import Cost, measure_cost
    from segtrain.errors import UserError
    from segtrain.networks import Network, create_network, list_networks
    from segtrain.trained import TrainedNetwork, from_run
    from segtrain.weights import load_weights

_HOME = {
    "Cost": "segtrain.cost",
    "Network": "segtrain.networks",
    "TrainedNetwork": "segtrain.trained",
    "UserError": "segtrain.errors",
    "create_network": "segtrain.networks",
    "from_run": "segtrain.trained",
    "list_networks": "segtrain.networks",
    "load_weights": "segtrain.weights",
    "measure_cost": "segtrain.cost",
}

__all__ = [
    "Cost",
    "Network",
    "TrainedNetwork",
    "UserError",
    "create_network",
    "from_run",
    "list_networks",
    "load_weights",
    "measure_cost",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'segtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
