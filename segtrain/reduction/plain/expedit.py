"""Expedit: the middle blocks run on cluster centres, and all patches come back behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from segtrain.errors import UserError
from segtrain.reduction.merging.slots import at_least_float32, rows_of_batch, without_autocast
from segtrain.reduction.plain.level import Encoder, Grid, Level, finish

#: A patch belongs to centres at most so many cells away, along either axis: 5x5 of them.
REACH = 2
#: Sums of weights below it are taken for nothing.
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Expedit:
    """Clustering and reconstruction without parameters (Expedit, 2210.01035).

    Shapes depend on the size of the image alone.

    Attributes:
        grid: the centres along each side, as a share of the patches along it; rounded, at least 1.
        cluster_after: how many blocks run before; a third of all if None.
        reconstruct_after: how many blocks have run when the patches come back; all if None. A
            level that is asked for on the way is one of patches, too.
        nearest: from how many centres a patch comes back; all, where there are fewer.
        temperature: by which squared distances are multiplied before a softmax.
        iterations: of the clustering.
    """

    main: ClassVar[str] = "grid"

    grid: float
    cluster_after: int | None = None
    reconstruct_after: int | None = None
    nearest: int = 20
    temperature: float = 0.01
    iterations: int = 5

    def __post_init__(self) -> None:
        if type(self.grid) not in (int, float) or not 0 < self.grid <= 1:
            raise UserError(f"'grid' of 'expedit' is above 0 and at most 1, not {self.grid!r}")
        if type(self.temperature) not in (int, float) or not 0 < self.temperature < float("inf"):
            raise UserError(
                f"'temperature' of 'expedit' is a number above 0, not {self.temperature!r}"
            )
        for name, least in (
            ("cluster_after", 0),
            ("reconstruct_after", 1),
            ("nearest", 1),
            ("iterations", 1),
        ):
            value = getattr(self, name)
            absent = value is None and name.endswith("_after")
            if not absent and (type(value) is not int or value < least):
                raise UserError(
                    f"'{name}' of 'expedit' is a whole number from {least}, not {value!r}"
                )

    def check(self, depth: int) -> None:
        """Raise UserError if it does not fit that many blocks."""
        start, end = self.span(depth)
        if not start < end <= depth:
            raise UserError(
                f"'expedit' clusters after block {start} and reconstructs after block {end}; "
                f"the encoder has {depth}"
            )

    def describe(self) -> str:
        """Its grid."""
        return str(self.grid)

    def span(self, depth: int) -> tuple[int, int]:
        """How many blocks run before the clustering, and before the reconstruction."""
        start = depth // 3 if self.cluster_after is None else self.cluster_after
        return start, depth if self.reconstruct_after is None else self.reconstruct_after


def run_expedit(
    encoder: Encoder, tokens: Tensor, grid: Grid, expedit: Expedit, outputs: Sequence[int]
) -> list[Level]:
    """Run all blocks up to the last output, the middle ones on the centres.

    Args:
        encoder: whose blocks run.
        tokens: (B, P+N, C), as embedded.
        grid: (h, w) of the patches.
        expedit: what is clustered where.
        outputs: indices of blocks, ascending.

    Returns:
        the level after each of them, whose tokens are all patches.
    """
    start, end = expedit.span(encoder.depth)
    levels, clusters = [], None
    for block in range(outputs[-1] + 1):
        if block == start:
            patches = tokens[:, encoder.num_prefix :]
            clusters = cluster(patches, grid, expedit)
            tokens = torch.cat([tokens[:, : encoder.num_prefix], clusters.centres], dim=1)
        tokens = whole = encoder.run([block], tokens)
        if clusters is not None and (block == end - 1 or block in outputs):
            prefix, centres = tokens.tensor_split([encoder.num_prefix], dim=1)
            whole = torch.cat([prefix, clusters.restore(centres)], dim=1)
        if block == end - 1:
            tokens, clusters = whole, None
        if block in outputs:
            levels.append(Level(finish(encoder, block, whole)[:, encoder.num_prefix :]))
    return levels


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Centres, and how patches come back from them.

    Attributes:
        centres: (B, T, C).
        nearest: (B, N, k), the centres nearest to each patch.
        weights: (B, N, k), of them; they add up to 1.
    """

    centres: Tensor
    nearest: Tensor
    weights: Tensor

    def restore(self, values: Tensor) -> Tensor:
        """What the centres have become, (B, T, X), to the patches, (B, N, X)."""
        batch, length = values.shape[:2]
        rows = rows_of_batch(self.nearest.flatten(1), length).view(-1, self.nearest.shape[2])
        weights = self.weights.flatten(0, 1)
        rows_of_values = values.flatten(0, 1).to(weights.dtype)
        sums = F.embedding_bag(rows, rows_of_values, mode="sum", per_sample_weights=weights)
        return sums.unflatten(0, (batch, -1)).to(values.dtype)


def cluster(patches: Tensor, grid: Grid, expedit: Expedit) -> Clusters:
    """Soft clustering of (B, h*w, C), each patch to the centres around it.

    Gradients flow through the means, not through what they are weighed by.
    """
    height, width = (max(1, round(side * expedit.grid)) for side in grid)
    reachable = centres_in_reach(grid, (height, width), patches.device)
    with without_autocast(patches.device.type):
        values = at_least_float32(patches)
        features = values.unflatten(1, grid).permute(0, 3, 1, 2)
        centres = F.adaptive_avg_pool2d(features, (height, width)).flatten(2).mT
        for _ in range(expedit.iterations):
            with torch.no_grad():
                logits = expedit.temperature * closeness(values, centres)
                weights = logits.masked_fill(~reachable, float("-inf")).softmax(2)
                sums = weights.sum(1)[:, :, None]
            means = weights.mT @ values / sums.clamp(min=TINY)
            centres = torch.where(sums > TINY, means, centres)
        with torch.no_grad():
            logits = expedit.temperature * closeness(values, centres)
            logits, nearest = logits.topk(min(expedit.nearest, height * width), dim=2)
            weights = logits.softmax(2)
    return Clusters(centres.to(patches), nearest, weights)


def closeness(patches: Tensor, centres: Tensor) -> Tensor:
    """Negative squared distances (B, N, T), but for what is the same for all centres."""
    return 2 * patches @ centres.mT - centres.square().sum(2)[:, None]


def centres_in_reach(grid: Grid, centres: Grid, device: torch.device) -> Tensor:
    """(h*w, T) whether a centre is at most `REACH` cells away from the patch's own."""
    rows, columns = (
        (torch.arange(side, device=device) * number // side)[:, None]
        - torch.arange(number, device=device)
        for side, number in zip(grid, centres, strict=True)
    )  # (h, gh), (w, gw)
    near = (rows.abs() <= REACH)[:, None, :, None] & (columns.abs() <= REACH)[None, :, None]
    return near.flatten(2).flatten(0, 1)
