"""What networks predict that classify masks instead of pixels (MaskFormer, 2107.06278)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MaskPrediction(NamedTuple):
    """What the Q queries of one head say, each about one mask.

    Attributes:
        classes: (B, Q, n) logits of the kinds of things, "no object" last. n = K + 1, or n = 2 of
            the query's own class being there and not.
        masks: (B, Q, h, w) logits of where.
    """

    classes: Tensor
    masks: Tensor


class MaskPredictions(NamedTuple):
    """What all heads of a network say in training.

    Attributes:
        heads: the final one first, then those before it, first to last.
        weight: factor on the loss.
    """

    heads: tuple[MaskPrediction, ...]
    weight: float = 1.0


def score_classes(classes: Tensor, masks: Tensor) -> Tensor:
    """(B, K, h, w): the queries' probabilities to be of each class, times those of being there.

    Args:
        classes: (B, Q, K+1) logits.
        masks: (B, Q, h, w) logits, at the size of the scores.
    """
    probabilities = classes.softmax(dim=2)[:, :, :-1]
    return torch.einsum("bqk,bqhw->bkhw", probabilities, masks.sigmoid())
