"""The masks, random points and losses that the official criterion was recorded with."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from segtrain.training import SetCriterion
from segtrain.training.mask_targets import Targets

REFERENCE = Path("tests/reference/mask2former_proscale")
LOSS = json.loads((REFERENCE / "micro.json").read_text())["loss"]
POST = load_file(REFERENCE / "proscale_micro_post.safetensors")


class Replayed(SetCriterion):
    """With points that are given: first the matchings' of all heads, then those of the losses."""

    def __init__(self, points, **arguments):
        super().__init__(**arguments)
        self.given = iter(points)

    def random_points(self, rows, number, device):
        points = next(self.given)
        assert points.shape == (rows, number, 2)
        return points


def official_targets():
    """The stored masks, which overlap: each is a layer of its own."""
    masks = [POST[f"loss.target{i}.masks"] for i in (0, 1)]
    maps = torch.stack([F.pad(m, (0, 0, 0, 0, 0, 4 - len(m))) for m in masks])
    return Targets(
        maps=maps,
        images=torch.tensor([0, 0, 0, 0, 1, 1]),
        layers=torch.tensor([0, 1, 2, 3, 0, 1]),
        labels=torch.ones(6, dtype=torch.int64),
        classes=torch.cat([POST[f"loss.target{i}.labels"] for i in (0, 1)]),
        counts=(4, 2),
        divisor=torch.tensor(6.0),
    )


def official_points():
    """They are stored head by head: the matching's of each image, then the two of the loss."""
    stored = [POST[f"loss.rand{i}"] for i in range(LOSS["n_rand"])]
    heads = [stored[first : first + 4] for first in range(0, len(stored), 4)]
    matching = [torch.cat(head[:2]) for head in heads]
    return [*matching, *(points for head in heads for points in head[2:])]
