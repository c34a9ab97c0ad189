"""Multi-scale deformable attention (Deformable DETR, 2010.04159, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.networks.blocks import Grid


class DeformableAttention(nn.Module):
    """Each token looks at a few points of every level, which it chooses itself (equation 3).

    Args:
        width: d of the tokens.
        num_heads: h, which divides d.
        num_levels: L.
        num_points: P, of each head in each level.
    """

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int = 4) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(width, 2 * points)
        self.attention_weights = nn.Linear(width, points)
        self.value_projection = nn.Linear(width, width)
        self.output_projection = nn.Linear(width, width)
        self.initialise()

    def initialise(self) -> None:
        """Point p of a head lies p + 1 pixels away in the head's direction, all weigh the same."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)[:, None]
        offsets = (directions[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        for zero in (
            self.sampling_offsets.weight,
            self.attention_weights.weight,
            self.attention_weights.bias,
            self.value_projection.bias,
            self.output_projection.bias,
        ):
            nn.init.zeros_(zero)
        nn.init.xavier_uniform_(self.value_projection.weight)
        nn.init.xavier_uniform_(self.output_projection.weight)

    def forward(
        self, queries: Tensor, tokens: Tensor, references: Tensor, grids: Sequence[Grid]
    ) -> Tensor:
        """(B, N, d) and tokens (B, T, d) -> (B, N, d).

        Args:
            queries: what the points are chosen by.
            tokens: of L levels, one after the other.
            references: (N, 2), x and y in [0, 1] that each query's offsets begin at.
            grids: (height, width) of the levels.
        """
        values = self.value_projection(tokens).unflatten(2, (self.num_heads, -1))
        shape = self.num_heads, self.num_levels, self.num_points
        # Half a pixel of a large map is lost in bfloat16.
        offsets = self.sampling_offsets(queries).float().unflatten(2, (*shape, 2))
        # Filled where they are: a GPU would be waited for until a list is copied to it.
        sides = [offsets.new_full((1,), side) for grid in grids for side in reversed(grid)]
        sizes = torch.cat(sides).view(-1, 1, 2)
        locations = references.float()[:, None, None, None] + offsets / sizes
        weights = self.attention_weights(queries).unflatten(2, (self.num_heads, -1))
        weights = weights.softmax(dim=3).unflatten(3, shape[1:])
        return self.output_projection(attend(values, grids, locations, weights))


def attend(values: Tensor, grids: Sequence[Grid], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of values, sampled bilinearly with zeros around every level.

    Args:
        values: (B, T, h, c) of L levels, one after the other.
        grids: (height, width) of the levels.
        locations: (B, N, h, L, P, 2), x and y in [0, 1] of a level, float32.
        weights: (B, N, h, L, P).

    Returns:
        (B, N, h * c).
    """
    if values.device.type == "cpu" and not _traced():
        return attend_by_gathering(values, grids, locations, weights)
    return attend_by_sampling(values, grids, locations, weights)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def attend_by_sampling(
    values: Tensor, grids: Sequence[Grid], locations: Tensor, weights: Tensor
) -> Tensor:
    """`attend` by one ``grid_sample`` for each level, whose samples do not outlive it."""
    batch, _, num_heads, width = values.shape
    attended = torch.zeros((), device=values.device)
    levels = values.split([height * width for height, width in grids], dim=1)
    for index, (level, grid) in enumerate(zip(levels, grids, strict=True)):
        maps = level.permute(0, 2, 3, 1).reshape(batch * num_heads, width, *grid)
        points = (2 * locations[:, :, :, index] - 1).transpose(1, 2).flatten(0, 1)
        shares = weights[:, :, :, index].transpose(1, 2).flatten(0, 1)[:, None]
        # Both of one type; autocast does not see to it everywhere.
        samples = F.grid_sample(maps.to(points.dtype), points, align_corners=False)
        attended = attended + (samples * shares).sum(dim=3)  # (B*h, c, N)
    return attended.unflatten(0, (batch, num_heads)).flatten(1, 2).transpose(1, 2).to(values.dtype)


def attend_by_gathering(
    values: Tensor, grids: Sequence[Grid], locations: Tensor, weights: Tensor
) -> Tensor:
    """`attend` by summing the rows of values around every point, with no samples in between.

    On a CPU it is several times as fast as sampling, and faster with its gradients, too
    (``benchmarks/deformable_attention.py``).
    """
    batch, count, num_heads, width = values.shape
    arange = partial(torch.arange, dtype=torch.int32, device=values.device)
    # Rows of the table of all images, tokens and heads; their numbers fit into 32 bits.
    firsts = (arange(batch)[:, None] * count * num_heads + arange(num_heads))[:, None, :, None]
    indices, shares = [], []
    for index, (rows, columns) in enumerate(grids):
        x, y = locations[:, :, :, index].unbind(4)
        around = list(_around(x, columns))
        for row, vertical in _around(y, rows):
            row_share = vertical * weights[:, :, :, index]
            row_start = row * (columns * num_heads) + firsts
            for column, horizontal in around:
                indices.append(row_start + column * num_heads)
                shares.append(row_share * horizontal)
        firsts = firsts + rows * columns * num_heads
    attended = F.embedding_bag(
        torch.cat(indices, dim=3).flatten(0, 2),
        values.reshape(-1, width),
        mode="sum",
        per_sample_weights=torch.cat(shares, dim=3).flatten(0, 2).to(values.dtype),
    )
    return attended.view(batch, -1, num_heads * width)


def _around(places: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The two pixels of an axis around each place in [0, 1], and their shares, 0 outside it."""
    positions = places * length - 0.5
    before = positions.floor()
    beyond = positions - before
    for pixel, share in ((before, 1 - beyond), (before + 1, beyond)):
        inside = (pixel >= 0) & (pixel < length)
        yield pixel.int().clamp(0, length - 1), share * inside


def reference_points(grid: Grid, device: torch.device) -> Tensor:
    """(h*w, 2): x and y in [0, 1] of the centres of a grid's pixels, row by row."""
    rows, columns = (
        (torch.arange(length, device=device, dtype=torch.float32) + 0.5) / length for length in grid
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=2).flatten(0, 1)
