"""From images of any size to label maps: whole image or sliding window, never whole at K classes.

Bilinear resizing is linear and separable, so whatever lies between a window's scores and the
label map (upsampling to the window, averaging where windows overlap, resizing to the original
size) is one matrix per axis. The label map is made of these in stripes of rows.

Networks that classify masks have a sigmoid on the way, at the size of the image: there masks are
upsampled, and classes made of them, for the rows of one stripe at a time.

Scaled and flipped copies of an image (test-time augmentation) are all scored first, at the
network's own stride, and averaged in the same stripes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
#: The same of stripes that are made of masks, or of several copies of an image. They are higher, as
#: what two neighbours both need is computed for each.
MASK_STRIPE_ELEMENTS = {"cpu": 2**22}


class Copy(NamedTuple):
    """A scaled copy of an image, mirrored or not.

    Attributes:
        size: (height, width).
        flipped: whether left is right.
    """

    size: Grid
    flipped: bool

    def of(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, *size)."""
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False)
        return images.flip(3) if self.flipped else images


@dataclass(frozen=True)
class Inference:
    """How a network is applied to an image, and its scores to the size that is asked for.

    With several ``scales``, or ``flip``, copies of the image are scored in this way, one pass each.
    Mirrored ones are mirrored back, and probabilities averaged at the size that is asked for: the
    softmax of scores, as MMSegmentation does, or what masks say, as Mask2Former does, which is made
    of probabilities already.

    Args:
        mode: ``whole`` scores the image at once; ``slide`` scores overlapping windows and averages
            their scores where they overlap; the last window of an axis is shifted inwards.
        window: (height, width) of a window, in pixels.
        stride: (vertical, horizontal) step between windows, in pixels.
        scales: sides of the copies, times those of the image; bilinear.
        flip: whether each copy is scored as its mirror image, too.
        size_divisor: sides of copies at other scales than 1 go up to multiples of it; None rounds
            them.
    """

    mode: Literal["whole", "slide"] = "whole"
    window: Sequence[int] = (1024, 1024)
    stride: Sequence[int] = (768, 768)
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    size_divisor: int | None = None

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
        """Scores at the asked size, (B, K, rows, W) at a time from top to bottom, float32.

        Those of several copies are the mean of their probabilities.
        """
        image_size = images.shape[2], images.shape[3]
        copies = self.copies(image_size)
        if copies == [Copy(image_size, flipped=False)]:
            scores = self._score(network, images, size)
            for top in range(0, size[0], scores.step):
                yield scores.stripe(slice(top, min(top + scores.step, size[0])))
            return
        several = [self._score(network, copy.of(images), size, widen=False) for copy in copies]
        step = min(scores.step for scores in several)
        are_logits = getattr(network, "mask_stride", None) is None
        for top in range(0, size[0], step):
            total: Tensor | None = None
            for copy, scores in zip(copies, several, strict=True):
                stripe = scores.stripe(slice(top, min(top + step, size[0])))
                stripe = stripe.softmax(dim=1) if are_logits else stripe
                stripe = stripe.flip(3) if copy.flipped else stripe
                total = stripe if total is None else total.add_(stripe)
            assert total is not None
            yield total.div_(len(copies))

    def copies(self, size: Grid) -> list[Copy]:
        """The copies that are scored of an image of (height, width), by scale, unmirrored first."""
        sizes = [
            size if scale == 1 else scaled_size(size, scale, self.size_divisor)
            for scale in self.scales
        ]
        return [Copy(each, flip) for each in sizes for flip in (False, True)[: 1 + self.flip]]

    def _score(
        self, network: nn.Module, images: Tensor, size: Sequence[int], widen: bool = True
    ) -> WindowScores | MaskScores:
        """One pass over images.

        Args:
            widen: windows to the width of the labels at once: less work, but more to hold.
        """
        height, width = images.shape[2:]
        mask_stride = getattr(network, "mask_stride", None)
        if self.mode == "whole" and mask_stride is not None:
            prediction = network.masks(images)  # type: ignore[operator]
            return MaskScores(prediction, mask_stride, (height, width), size)
        if self.mode == "whole":
            tops, lefts, window = [0], [0], (height, width)
        else:
            window = min(self.window[0], height), min(self.window[1], width)
            tops = window_offsets(height, window[0], self.stride[0])
            lefts = window_offsets(width, window[1], self.stride[1])

        bands: list[_Band] = []
        for top in tops:
            band = _Band([])
            for j, left in enumerate(lefts):
                crop = images[:, :, top : top + window[0], left : left + window[1]]
                scores = network(crop)
                columns = axis_matrices(scores.shape[3], window[1], tuple(lefts), width, size[1])
                band.windows.append((scores, columns[j].to(scores.device)))
            bands.append(_Band([(band.read(slice(None)), None)]) if widen else band)
        height_of_scores = bands[0].windows[0][0].shape[2]
        rows = axis_matrices(height_of_scores, window[0], tuple(tops), height, size[0])
        elements = STRIPE_ELEMENTS if widen else MASK_STRIPE_ELEMENTS
        return WindowScores(rows, bands, size[1], elements)


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


def scaled_size(size: Sequence[int], scale: float, size_divisor: int | None) -> Grid:
    """(height, width) of a copy of an image at another scale."""
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return [(height, width), *evaluation_sizes((height, width), None, size_divisor)][-1]


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


class MaskScores:
    """Scores of classes that are made of masks, a few rows at a time.

    The score of a class is the sum over the queries of its probability times that of the pixel to
    be in the query's mask, at the size of the image (Mask2Former, 2112.01527, by MaskFormer's
    section 3.4).

    Args:
        prediction: of the Q queries, for images that were padded at the right and the bottom.
        stride: of the masks, in pixels of the image.
        image_size: (height, width) of the images before padding.
        size: (H, W) of the labels.

    Attributes:
        step: how many rows to make at a time.
    """

    def __init__(
        self,
        prediction: MaskPrediction,
        stride: int,
        image_size: Sequence[int],
        size: Sequence[int],
    ) -> None:
        self._masks = prediction.masks.float()
        classes = prediction.classes.float().softmax(dim=2)[:, :, :-1]
        self._classes = classes.transpose(1, 2).contiguous()
        batch, queries, mask_height, mask_width = self._masks.shape
        height, self._width = image_size
        self._padded_width = mask_width * stride
        self._final_width = size[1]
        self._upsample = interpolation_matrix(mask_height, mask_height * stride)[:height]
        self._resize = None if size[0] == height else interpolation_matrix(height, size[0])

        kinds = max(queries, self._classes.shape[1])
        elements = MASK_STRIPE_ELEMENTS.get(self._masks.device.type, STRIPE_ELEMENTS_ELSEWHERE)
        # Rows of the image count where labels are smaller than it.
        longest = max(self._width, size[1]) * max(1.0, height / size[0])
        self.step = max(1, int(elements / (batch * kinds * longest)))

    def stripe(self, rows: slice) -> Tensor:
        """(B, K, n, W) float32 of n rows of the labels."""
        if self._resize is not None:
            weights, rows = used_columns(self._resize[rows])
        upsample, mask_rows = used_columns(self._upsample[rows])
        masks = self._masks[:, :, mask_rows]
        with full_precision(masks.device):
            here = upsample.to(masks) @ masks
            # Rows stay as many, so that this interpolates the columns alone.
            here = _resize_columns(here, self._padded_width)[..., : self._width].sigmoid()
            stripe = (self._classes @ here.flatten(2)).unflatten(2, here.shape[2:])
            stripe = _resize_columns(stripe, self._final_width)
            return stripe if self._resize is None else weights.to(stripe) @ stripe


class WindowScores:
    """Scores of windows at the size of the labels, a few rows at a time.

    Args:
        rows: a (H, h) matrix for each band.
        bands: of windows side by side, from top to bottom.
        width: W of the labels.
        elements: of a stripe, by the type of the device.

    Attributes:
        step: how many rows to make at a time.
    """

    def __init__(
        self,
        rows: Sequence[Tensor],
        bands: Sequence[_Band],
        width: int,
        elements: Mapping[str, int],
    ) -> None:
        self._rows = rows
        self._bands = bands
        self._width = width
        scores = bands[0].windows[0][0]
        self._device = scores.device
        self._batch, self._classes = scores.shape[:2]
        elements_here = elements.get(scores.device.type, STRIPE_ELEMENTS_ELSEWHERE)
        self.step = max(1, elements_here // (self._batch * self._classes * width))

    def stripe(self, rows: slice) -> Tensor:
        """(B, K, n, W) float32 of n rows.

        A few rows of scores reach them (the matrices are banded); only these are multiplied.
        """
        shape = self._batch, self._classes, rows.stop - rows.start, self._width
        stripe = torch.zeros(shape, device=self._device)
        for matrix, band in zip(self._rows, self._bands, strict=True):
            weights = matrix[rows]
            if weights.any():
                weights, used = used_columns(weights)
                scores = band.read(used)
                with full_precision(self._device):
                    stripe += weights.to(scores) @ scores
        return stripe


class _Band(NamedTuple):
    """Windows side by side: their scores (B, K, h, w), and what widens these to the labels.

    That is a (W, w) matrix, on the scores' device; None where they are widened already.
    """

    windows: list[tuple[Tensor, Tensor | None]]

    def read(self, rows: slice) -> Tensor:
        """(B, K, n, W) float32 of n of the h rows, summed over the windows."""
        total: Tensor | None = None
        for scores, columns in self.windows:
            here = scores[:, :, rows].float()
            if columns is not None:
                with full_precision(here.device):
                    here = here @ columns.T
            total = here if total is None else total + here
        assert total is not None
        return total


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
