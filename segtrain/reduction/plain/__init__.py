"""Reductions of a plain vision transformer: tokens merge on the way, and come back at the end."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from segtrain.reduction.plain.algm import ALGM
from segtrain.reduction.plain.expedit import Expedit, run_expedit
from segtrain.reduction.plain.level import Encoder, Grid, Level, run_plainly
from segtrain.reduction.plain.merged import run_merging
from segtrain.reduction.plain.setting import PlainReduction, published_settings
from segtrain.reduction.plain.tome import ToMe

__all__ = [
    "ALGM",
    "Encoder",
    "Expedit",
    "Grid",
    "Level",
    "PlainReduction",
    "ToMe",
    "published_settings",
    "run_levels",
    "run_plainly",
]


def run_levels(
    encoder: Encoder, images: Tensor, setting: PlainReduction, outputs: Sequence[int]
) -> tuple[list[Level], Grid]:
    """Run an encoder on images (B, 3, H, W) under a setting.

    Returns:
        the level after each block of ``outputs`` (ascending), and the grid of the patches.
    """
    tokens, grid, rotations = encoder.embed(images)
    kind = setting.kind
    if isinstance(kind, Expedit):
        return run_expedit(encoder, tokens, grid, kind, outputs), grid
    if kind is not None:
        return run_merging(encoder, tokens, grid, kind, outputs), grid
    return run_plainly(encoder, tokens, rotations, outputs), grid
