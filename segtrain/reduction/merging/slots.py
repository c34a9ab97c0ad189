"""Tokens that become fewer: where each one ends up, and what then stands there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def add_up(values: Tensor, slots: Tensor, length: int) -> Tensor:
    """The sums of what ends up in each slot: (B, N, D) at slots (B, N) -> (B, length, D)."""
    sums = values.new_zeros(len(values) * length, values.shape[2])
    rows = rows_of_batch(slots, length)
    return sums.index_add(0, rows, values.flatten(0, 1)).unflatten(0, (-1, length))


def take(values: Tensor, slots: Tensor) -> Tensor:
    """A copy for each token of what stands in its slot: (B, n, D) at slots (B, N) -> (B, N, D)."""
    rows = rows_of_batch(slots, values.shape[1])
    return values.flatten(0, 1).index_select(0, rows).unflatten(0, slots.shape)


def rows_of_batch(positions: Tensor, length: int) -> Tensor:
    """Positions (B, n) in images of some length -> (B * n,) in the list of all their tokens.

    Whole rows of one list are copied and added several times faster than along a middle axis.
    """
    first = length * torch.arange(len(positions), device=positions.device)
    return (positions + first[:, None]).flatten()


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Computation in the precision of its inputs."""
    if not torch.amp.is_autocast_available(device_type):  # as for tensors without data
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def at_least_float32(values: Tensor) -> Tensor:
    """The values themselves, or in float32 those of a shorter type."""
    return values.float() if values.dtype.itemsize < 4 else values
