"""The split of tokens by turns, of which one half may merge into the other (ToMe)."""

from __future__ import annotations

import torch
from torch import Tensor

from segtrain.reduction.merging.bipartite import fill_slots, find_nearest


class Alternation:
    """Tokens by turns sources and destinations, and how near each source is to its nearest.

    The sources are every other token of the whole sequence from its first on; what is in front of
    the patches takes part in the turns, but merges with nothing. (Bolya et al., "Token Merging:
    Your ViT But Faster", 2210.09461, section 3.)

    Args:
        metric: (B, T, X), of the patches, compared by cosine.
        num_prefix: how many tokens stand in front of them.

    Attributes:
        num_sources: how many can merge; none where there is no destination.
        similarity: (B, s) of each source to its nearest destination; None if there is none.
    """

    similarity: Tensor | None = None

    def __init__(self, metric: Tensor, num_prefix: int) -> None:
        positions = torch.arange(metric.shape[1], device=metric.device)
        first = num_prefix % 2
        self.sources, self.destinations = positions[first::2], positions[1 - first :: 2]
        #: The place of each token among sources and, behind them, destinations.
        self.order = positions // 2
        self.order[1 - first :: 2] += len(self.sources)
        self.num_sources = len(self.sources) if len(self.destinations) else 0
        if self.num_sources:
            self.similarity, self.nearest = find_nearest(metric, self.destinations, self.sources)

    def merge(self, removed: int) -> tuple[Tensor, int] | None:
        """Slots (B, T) and their number when the sources of highest similarity merge.

        Slots begin with the kept sources in their order, then come the destinations.
        """
        removed = min(removed, self.num_sources)
        if removed <= 0 or self.similarity is None:
            return None
        num_destinations = len(self.destinations)
        slots = fill_slots(self.similarity, self.nearest, num_destinations, removed)
        return slots[:, self.order], len(self.order) - removed
