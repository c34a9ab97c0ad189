"""Activation checkpointing: less memory for training, for one more forward pass of the blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from segtrain.errors import UserError
from segtrain.networks import Network


def recompute_blocks(network: Network) -> None:
    """Let each block keep its input alone in training, and compute the rest again in the backward.

    Gradients are the same, random drops included; no parameter and no module changes its name.

    Raises:
        UserError: the network names no blocks.
    """
    blocks = network.blocks
    if not blocks:
        raise UserError(
            f"activation_checkpointing: {type(network).__name__} names no blocks to recompute"
        )
    for block in blocks:
        # A partial of a bound method, and not a closure, so that a copy runs its own block.
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, **named)
