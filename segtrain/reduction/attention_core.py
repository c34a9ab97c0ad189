"""What takes the place of plain attention inside a block that knows of none of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AttentionCore(TorchFunctionMode):
    """While entered, ``scaled_dot_product_attention`` goes through ``attend``.

    The blocks are timm's, and their projections, norms and rotations are right for every layout of
    tokens; the one operator that mixes tokens is all that differs.
    """

    def attend(
        self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """(1 or B, heads, T, d) each -> the same; ``attention`` is the plain one."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(lambda *tensors, **options: func(*tensors, **options), *args[:3])
        return func(*args, **(kwargs or {}))


class PackedAttention(AttentionCore):
    """Attention within each image of tokens that stand one image after the other, (1, S, C).

    Args:
        lengths: tokens of each image; they add up to S.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self.lengths = list(lengths)
        self._ends: Tensor | None = None

    def attend(
        self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            return self._attend_by_length(query, key, value)
        images = zip(
            *(tensor.split(self.lengths, dim=2) for tensor in (query, key, value)), strict=True
        )
        # Attention gives a token's heads side by side: so the copy is of whole rows.
        attended = [attention(*image).transpose(1, 2) for image in images]
        return torch.cat(attended, dim=1).transpose(1, 2)

    def _attend_by_length(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One kernel for all images."""
        from torch.nn.attention.varlen import varlen_attn

        if self._ends is None:  # one copy for all blocks, which the device is not waited for
            ends = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
            self._ends = ends.to(query.device, non_blocking=True)
        ends, longest = self._ends, max(self.lengths)
        query, key, value = (
            tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)
        )
        attended = varlen_attn(query, key, value, ends, ends, longest, longest)
        assert isinstance(attended, Tensor)
        return attended.transpose(0, 1)[None]


class ProportionalAttention(AttentionCore):
    """Attention in which a token counts as often as the tokens that it was merged from.

    softmax(q k / sqrt(d) + log(size)), by one more channel that is sqrt(d) in the queries and
    log(size) in the keys, so that the fused kernels still apply; zeros fill up to a multiple of 8,
    in the values, too, because most kernels take no other width of those.

    Args:
        sizes: (B, T), how many tokens each one stands for.
    """

    def __init__(self, sizes: Tensor) -> None:
        super().__init__()
        self.sizes = sizes

    def attend(
        self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        width = query.shape[-1]
        extra = 8 - width % 8
        query, key, value = (F.pad(tensor, (0, extra)) for tensor in (query, key, value))
        query[..., width] = math.sqrt(width)
        key[..., width] = self.sizes.log().to(key.dtype)[:, None]
        return attention(query, key, value, scale=1 / math.sqrt(width))[..., :width]
