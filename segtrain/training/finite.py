"""Losses that are NaN or infinite: noticed without waiting for the device, or made harmless."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class NonFiniteLoss(ArithmeticError):
    """A loss or the weights are NaN or infinite; the message says at which step and for what."""


@dataclass(frozen=True)
class Loss:
    """The loss of one batch, on its way from the device.

    Attributes:
        step: the optimiser step that it belongs to, counted from 1.
        names: of the batch's images.
    """

    step: int
    names: Sequence[str]
    value: Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, names: Sequence[str], loss: Tensor) -> Loss:
        """Start to copy a loss, a scalar, to the host."""
        value = loss.detach().to("cpu", non_blocking=loss.is_cuda, copy=True)
        copied = None
        if loss.is_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(loss.device))
        return cls(step, names, value, copied)

    def problem(self) -> str | None:
        """What is wrong with it, None if it is finite; waits until the device has computed it."""
        if self.copied is not None:
            self.copied.synchronize()
        if self.value.isfinite():
            return None
        images = f" ({', '.join(self.names)})" if self.names else ""
        return f"the loss of step {self.step} is {self.value.item()}{images}"


def first_problem(losses: Iterable[Loss]) -> str | None:
    """What is wrong with the first of these losses that is not finite; None if all are."""
    return next((problem for loss in losses if (problem := loss.problem())), None)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value is NaN or infinite; of a sharded tensor, this rank's part counts."""
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in tensors]
    parts = [part for part in parts if part.numel() > 0]
    # The largest magnitude is not finite if any value is not; no sum of squares can overflow.
    largest = torch.nn.utils.get_total_norm(parts, norm_type=float("inf"))
    return bool(largest.isfinite())


class Buffers:
    """The buffers of a network, such as the running statistics of batch norm, at some moment."""

    def __init__(self, network: nn.Module) -> None:
        self._kept = [(buffer, buffer.clone()) for buffer in network.buffers()]

    def restore(self) -> None:
        """Give the network's buffers back the values that they had."""
        for buffer, value in self._kept:
            buffer.copy_(value)
