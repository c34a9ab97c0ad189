"""Checkpoints as a run leaves them, of a network of a moment."""

from __future__ import annotations

from pathlib import Path

import torch

from segtrain import create_network
from segtrain.config import compose

CONFIGS = Path(__file__).parents[1] / "configs"

#: As many as Scenes has.
CLASSES = {
    "names": ["sky", "road", "car", "tree", *(f"thing {n}" for n in range(4, 19))],
    "palette": [[0, 0, 255], [90, 90, 90], [255, 0, 0], *([n, 9 * n, 99] for n in range(3, 19))],
    "ignore_index": 255,
}
MODEL = {
    "name": "edaformer_nano",
    "widths": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "fuse_width": 16,
}


def write_checkpoint(path, model=MODEL, classes=CLASSES, data=(), seed=0, **changes):
    """A checkpoint of a network with weights by chance; changes of None leave a key out."""
    torch.manual_seed(seed)
    network = create_network(**model, num_classes=len((classes or CLASSES)["names"]))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # so that classes differ
    config = compose(["data.root=nowhere", "trainer.precision=32-true"], CONFIGS).values
    config |= {"model": model, "data": config["data"] | dict(data)}
    content = {
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "global_step": 3,
        "config": config,
        "classes": classes,
    }
    content |= changes
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def write_run(folder, **arguments):
    """A run's folder with ``best.ckpt`` and, of other weights, ``last.ckpt``."""
    write_checkpoint(folder / "checkpoints" / "best.ckpt", **arguments)
    write_checkpoint(folder / "checkpoints" / "last.ckpt", **{"seed": 1} | arguments)
    return folder
