"""A plain transcription of SegFormer++ as its paper and our specification put it in words.

Only for benchmarks/merging.py: attention maps are materialised, matching sorts.
"""

import torch
from torch import nn

from segtrain.networks.blocks import merge_heads, split_heads
from segtrain.networks.segformer import EfficientAttention
from segtrain.reduction.merging import NO_MERGING


def match_by_sorting(metric, grid, stride, removed):
    """As ``segtrain.reduction.merging.match_bipartite``."""
    (height, width), (vertical, horizontal) = grid, stride
    batch, length, _ = metric.shape
    rows, columns = height // vertical, width // horizontal
    if removed <= 0 or rows * columns == 0:
        return NO_MERGING
    with torch.no_grad():
        marks = torch.zeros(height, width, dtype=torch.int64, device=metric.device)
        marks[: rows * vertical : vertical, : columns * horizontal : horizontal] = -1
        order = marks.reshape(1, -1, 1).argsort(dim=1)
        destinations = order[:, : rows * columns].expand(batch, -1, 1)
        sources = order[:, rows * columns :].expand(batch, -1, 1)

        def split(values):
            channels = values.shape[2]
            return (
                values.gather(1, sources.expand(-1, -1, channels)),
                values.gather(1, destinations.expand(-1, -1, channels)),
            )

        starts, ends = split(metric / metric.norm(dim=2, keepdim=True))
        best, nearest = (starts @ ends.mT).max(dim=2)
        removed = min(removed, sources.shape[1])
        falling = best.argsort(dim=1, descending=True)[:, :, None]
        merged, kept = falling[:, :removed], falling[:, removed:]
        into = nearest[:, :, None].gather(1, merged)

    def merge(values):
        channels = values.shape[2]
        starts, ends = split(values)
        stay = starts.gather(1, kept.expand(-1, -1, channels))
        go = starts.gather(1, merged.expand(-1, -1, channels))
        means = ends.scatter_reduce(1, into.expand(-1, -1, channels), go, reduce="mean")
        return torch.cat([stay, means], dim=1)

    def unmerge(values):
        channels = values.shape[2]
        stay, means = values[:, : kept.shape[1]], values[:, kept.shape[1] :]
        copies = means.gather(1, into.expand(-1, -1, channels))
        result = values.new_zeros(batch, length, channels)
        result.scatter_(1, destinations.expand(-1, -1, channels), means)
        for part, chosen in ((stay, kept), (copies, merged)):
            positions = sources.gather(1, chosen)
            result.scatter_(1, positions.expand(-1, -1, channels), part)
        return result

    return merge, unmerge


class PlainAttention(EfficientAttention):
    """Attention whose map (B, heads, N, M) is a tensor, with sorted matching around it."""

    def forward(self, tokens, grid, reduction):
        merging, pool = reduction
        sources, key_grid = self.reduce(tokens, grid, pool)
        if merging.kv is not None:
            sources = _match(merging.kv, sources, key_grid)[0](sources)
        merge, unmerge = NO_MERGING
        if merging.q is not None:
            merge, unmerge = _match(merging.q, tokens, grid)
        queries = split_heads(self.query(merge(tokens)), self.num_heads)
        keys, values = (split_heads(x, self.num_heads) for x in self.key_value(sources).chunk(2, 2))
        scale = queries.shape[3] ** -0.5
        attention = (queries * scale @ keys.mT).softmax(dim=3)
        return unmerge(self.projection(merge_heads(attention @ values)))


def _match(merging, tokens, grid):
    if merging.mode != "bsm":
        return merging.match(tokens, grid)
    return match_by_sorting(tokens, grid, merging.stride, int(tokens.shape[1] * merging.ratio))


def transcribe(network: nn.Module):
    """Make a SegFormer compute as described above; the same parameters, the same scores."""
    for module in network.modules():
        if isinstance(module, EfficientAttention):
            module.__class__ = PlainAttention
    network.as_published = True
    return network
