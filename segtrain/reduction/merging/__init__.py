"""Token merging: pure functions that give a ``(merge, unmerge)`` pair, for any network."""

from segtrain.reduction.merging.bipartite import match_bipartite
from segtrain.reduction.merging.neighbours import match_runs, match_windows
from segtrain.reduction.merging.pair import NO_MERGING, Pair
from segtrain.reduction.merging.token_merging import TokenMerging

__all__ = [
    "NO_MERGING",
    "Pair",
    "TokenMerging",
    "match_bipartite",
    "match_runs",
    "match_windows",
]
