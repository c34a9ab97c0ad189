"""What torch.hub.load gives of this repository: networks of runs, and networks to be trained.

trained = torch.hub.load("OWNER/segtrain", "trained", "runs/NAME")  # or FILE.ckpt, or wandb:...
network = torch.hub.load("OWNER/segtrain", "network", name="segformer_b0", num_classes=19)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segtrain import Network, TrainedNetwork, create_network, from_run

dependencies = ["torch", "numpy", "timm", "safetensors"]


def trained(
    run: str | Path,
    checkpoint: str = "best",
    setting: Any = None,
    device: str | None = None,
) -> TrainedNetwork:
    """The network of a run, ready to label images: ``trained.predict(image)``.

    Args:
        run: a run's folder, a checkpoint of one, or ``wandb:entity/project/RUN_ID[:alias]``.
        checkpoint: which of a run's: best, last, ...
        setting: what the network computes under, by name or values; its training setting if None.
        device: where it computes; a GPU if there is one.
    """
    return from_run(run, checkpoint, setting, device)


def network(name: str, num_classes: int, **arguments: Any) -> Network:
    """A network with freshly initialised weights.

    Args:
        name: one of ``segtrain.list_networks()``.
        num_classes: that it scores.
        arguments: what the network's constructor takes.
    """
    return create_network(name, num_classes, **arguments)
