"""From images of any size to label maps: whole image or sliding window, never whole at K classes.

Bilinear resizing is linear and separable, so whatever lies between a window's scores and the
label map (upsampling to the window, averaging where windows overlap, resizing to the original
size) is one matrix per axis. The label map is made of these in stripes of rows.

Networks that classify masks have a sigmoid on the way, at the size of the image: there masks are
upsampled, and classes made of them, for the rows of one stripe at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.networks.blocks import Grid
from segtrain.networks.mask_prediction import MaskPrediction

#: What the red, green and blue of an image (0 to 255) are normalised by before a network sees them.
IMAGE_MEAN = (123.675, 116.28, 103.53)
IMAGE_STD = (58.395, 57.12, 57.375)

#: Scores of one stripe hold about this many numbers: on a CPU what stays in its caches, elsewhere
#: enough to fill the device.
STRIPE_ELEMENTS = {"cpu": 2**20}
STRIPE_ELEMENTS_ELSEWHERE = 2**24
#: The same of stripes that are made of masks. They are higher, as neighbours share rows of masks.
MASK_STRIPE_ELEMENTS = {"cpu": 2**22}


@dataclass(frozen=True)
class Inference:
    """How a network is applied to an image, and its scores to the size that is asked for.

    Args:
        mode: ``whole`` scores the image at once; ``slide`` scores overlapping windows and averages
            their scores where they overlap; the last window of an axis is shifted inwards.
        window: (height, width) of a window, in pixels.
        stride: (vertical, horizontal) step between windows, in pixels.
    """

    mode: Literal["whole", "slide"] = "whole"
    window: Sequence[int] = (1024, 1024)
    stride: Sequence[int] = (768, 768)

    def __call__(self, network: nn.Module, images: Tensor, size: Sequence[int]) -> Tensor:
        """Predicted classes.

        Args:
            network: images to scores. Where it has a `mask_stride`, that of the masks which its
                `masks` gives of images padded at the right and the bottom, a whole image is scored
                by its masks.
            images: (B, 3, h, w), normalised.
            size: (H, W) of the labels.

        Returns:
            (B, H, W) int64.
        """
        # Allocated first: small tensors kept between the stripes would scatter them over the heap.
        classes = torch.empty(
            (len(images), size[0], size[1]), dtype=torch.int64, device=images.device
        )
        top = 0
        for stripe in self.score_stripes(network, images, size):
            bottom = top + stripe.shape[2]
            classes[:, top:bottom] = stripe.max(dim=1).indices
            top = bottom
        return classes

    def score_stripes(
        self, network: nn.Module, images: Tensor, size: Sequence[int]
    ) -> Iterator[Tensor]:
        """Scores at the asked size, (B, K, rows, W) at a time from top to bottom, float32."""
        height, width = images.shape[2:]
        mask_stride = getattr(network, "mask_stride", None)
        if self.mode == "whole" and mask_stride is not None:
            prediction = network.masks(images)  # type: ignore[operator]
            yield from score_mask_stripes(prediction, mask_stride, (height, width), size)
            return
        if self.mode == "whole":
            tops, lefts, window = [0], [0], (height, width)
        else:
            window = min(self.window[0], height), min(self.window[1], width)
            tops = window_offsets(height, window[0], self.stride[0])
            lefts = window_offsets(width, window[1], self.stride[1])

        bands: list[Tensor] = []
        for top in tops:
            band = None
            for j, left in enumerate(lefts):
                crop = images[:, :, top : top + window[0], left : left + window[1]]
                scores = network(crop).float()
                with full_precision(scores.device):
                    columns = axis_matrices(
                        scores.shape[3], window[1], tuple(lefts), width, size[1]
                    )
                    widened = scores @ columns[j].to(scores).T
                band = widened if band is None else band + widened
            assert band is not None
            bands.append(band)
        rows = axis_matrices(bands[0].shape[2], window[0], tuple(tops), height, size[0])
        yield from _stripes(rows, bands)


def keep_ratio_size(size: Sequence[int], scale: Sequence[int]) -> Grid:
    """The largest (height, width) of the same shape as `size` within (long, short) = `scale`."""
    height, width = size
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def evaluation_sizes(
    size: Sequence[int], scale: Sequence[int] | None, size_divisor: int | None
) -> list[Grid]:
    """The (height, width) that an image is resized to for evaluation, one after the other.

    EDAFormer's test pipeline resizes twice, e.g. 333x500 -> 512x769 -> 512x800.

    Args:
        size: (height, width) of the image.
        scale: (long, short) side to fit into, keeping the shape; None leaves the image as it is.
        size_divisor: both sides go up to multiples of it; None skips this.
    """
    sizes = [] if scale is None else [keep_ratio_size(size, scale)]
    if size_divisor is not None:
        height, width = sizes[-1] if sizes else size
        sizes.append(
            (-(-height // size_divisor) * size_divisor, -(-width // size_divisor) * size_divisor)
        )
    return sizes


def window_offsets(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along an axis; the last one is shifted inwards to end at the edge."""
    count = max(0, math.ceil((length - window) / stride)) + 1
    return [min(i * stride, length - window) for i in range(count)]


def interpolation_matrix(source: int, target: int) -> Tensor:
    """(target, source) weights of linear interpolation, corners not aligned."""
    identity = torch.eye(source)[None]
    return F.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T


@functools.lru_cache(maxsize=64)
def axis_matrices(
    scores: int, window: int, offsets: tuple[int, ...], length: int, target: int
) -> list[Tensor]:
    """One axis of what leads from the scores of each window to the label map.

    Args:
        scores: length of a window's scores.
        window: length of a window, in pixels of the image.
        offsets: where the windows start.
        length: length of the image.
        target: length of the label map.

    Returns:
        a (target, scores) matrix for each window.
    """
    upsample = interpolation_matrix(scores, window)
    covered = torch.zeros(length)
    for offset in offsets:
        covered[offset : offset + window] += 1
    to_target = interpolation_matrix(length, target) / covered
    return [to_target[:, offset : offset + window] @ upsample for offset in offsets]


def score_mask_stripes(
    prediction: MaskPrediction, stride: int, image_size: Sequence[int], size: Sequence[int]
) -> Iterator[Tensor]:
    """Scores of classes at the asked size, made of masks, a few rows at a time.

    The score of a class is the sum over the queries of its probability times that of the pixel to
    be in the query's mask, at the size of the image (Mask2Former, 2112.01527, by MaskFormer's
    section 3.4).

    Args:
        prediction: of the Q queries, for images that were padded at the right and the bottom.
        stride: of the masks, in pixels of the image.
        image_size: (height, width) of the images before padding.
        size: (H, W) of the labels.

    Yields:
        (B, K, rows, W) from top to bottom, float32.
    """
    masks = prediction.masks.float()
    classes = prediction.classes.float().softmax(dim=2)[:, :, :-1].transpose(1, 2).contiguous()
    batch, queries, mask_height, mask_width = masks.shape
    height, width = image_size
    upsample = interpolation_matrix(mask_height, mask_height * stride)[:height]
    resize = None if size[0] == height else interpolation_matrix(height, size[0])

    kinds = max(queries, classes.shape[1])
    elements = MASK_STRIPE_ELEMENTS.get(masks.device.type, STRIPE_ELEMENTS_ELSEWHERE)
    # Rows of the image count where labels are smaller than it.
    longest = max(width, size[1]) * max(1.0, height / size[0])
    step = max(1, int(elements / (batch * kinds * longest)))
    for top in range(0, size[0], step):
        rows = slice(top, min(top + step, size[0]))
        if resize is not None:
            weights, rows = used_columns(resize[rows])
        upsample_rows, mask_rows = used_columns(upsample[rows])
        with full_precision(masks.device):
            here = upsample_rows.to(masks) @ masks[:, :, mask_rows]
            # Rows stay as many, so that this interpolates the columns alone.
            here = _resize_columns(here, mask_width * stride)[..., :width].sigmoid()
            stripe = (classes @ here.flatten(2)).unflatten(2, here.shape[2:])
            stripe = _resize_columns(stripe, size[1])
            if resize is not None:
                stripe = weights.to(stripe) @ stripe
        yield stripe


def used_columns(matrix: Tensor) -> tuple[Tensor, slice]:
    """The part of a banded matrix that holds all but zeros, and where its columns are."""
    used = matrix.any(dim=0).nonzero()
    columns = slice(int(used[0]), int(used[-1]) + 1)
    return matrix[:, columns], columns


def _resize_columns(features: Tensor, width: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h, width)."""
    if features.shape[3] == width:
        return features
    size = (features.shape[2], width)
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def _stripes(rows: Sequence[Tensor], bands: Sequence[Tensor]) -> Iterator[Tensor]:
    """Sum of ``rows[i] @ bands[i]`` in stripes of output rows.

    A few rows of scores reach a stripe (the matrices are banded); only these are multiplied.
    """
    batch, classes, _, width = bands[0].shape
    target = rows[0].shape[0]
    elements = STRIPE_ELEMENTS.get(bands[0].device.type, STRIPE_ELEMENTS_ELSEWHERE)
    step = max(1, elements // (batch * classes * width))
    for top in range(0, target, step):
        stripe = bands[0].new_zeros(batch, classes, min(step, target - top), width)
        for matrix, band in zip(rows, bands, strict=True):
            weights = matrix[top : top + step]
            used = weights.any(dim=0).nonzero()
            if len(used):
                first, last = int(used[0]), int(used[-1]) + 1
                with full_precision(band.device):
                    stripe += weights[:, first:last].to(band) @ band[:, :, first:last]
        yield stripe


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in float32 proper: autocast and TF32 would move the scores' order."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(former)
