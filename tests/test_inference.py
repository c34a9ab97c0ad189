import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from segtrain import inference
from segtrain.cost import _Meter
from segtrain.inference import Inference, window_offsets
from segtrain.networks.mask_prediction import MaskPrediction

MASKS = Path(__file__).parent / "reference/mask2former_proscale/proscale_micro_io.safetensors"


class Scores(torch.nn.Module):
    """Scores at stride 4 that depend on the image, and remember how large they came."""

    def __init__(self, classes=5):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, classes, 4, 4)

    def forward(self, images):
        return self.convolution(images)


def resize(scores, size):
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", [(64, 96), (50, 101), (128, 90)])
@torch.inference_mode()
def test_whole_image_equals_two_resizes(size, monkeypatch):
    monkeypatch.setitem(inference.STRIPE_ELEMENTS, "cpu", 5000)
    network, images = Scores(), torch.randn(2, 3, 64, 96)
    stripes = list(Inference().score_stripes(network, images, size))
    assert len(stripes) > 3
    expected = resize(resize(network(images), (64, 96)), size)
    torch.testing.assert_close(torch.cat(stripes, dim=2), expected, atol=1e-5, rtol=0)
    prediction = Inference()(network, images, size)
    assert (prediction == expected.argmax(dim=1)).float().mean() > 0.999


@torch.inference_mode()
def test_sliding_window_averages_overlapping_scores():
    network, images = Scores(), torch.randn(1, 3, 72, 100)
    total, count = torch.zeros(1, 5, 72, 100), torch.zeros(72, 100)
    for top in (0, 24, 40):
        for left in (0, 24, 48, 68):
            here = slice(top, top + 32), slice(left, left + 32)
            total[:, :, *here] += resize(network(images[:, :, *here]), (32, 32))
            count[here] += 1
    slide = Inference("slide", window=(32, 32), stride=(24, 24))
    scores = torch.cat(list(slide.score_stripes(network, images, (72, 100))), dim=2)
    torch.testing.assert_close(scores, total / count, atol=1e-5, rtol=0)


def test_the_last_window_is_shifted_inwards():
    assert window_offsets(2048, 1024, 768) == [0, 768, 1024]
    assert window_offsets(1024, 1024, 768) == [0]
    assert window_offsets(72, 32, 24) == [0, 24, 40]


@torch.inference_mode()
def test_a_window_larger_than_the_image_is_the_image():
    network, images = Scores(), torch.randn(1, 3, 40, 60)
    slide = Inference("slide", window=(64, 64), stride=(48, 48))
    torch.testing.assert_close(
        slide(network, images, (40, 60)), Inference()(network, images, (40, 60))
    )


@torch.inference_mode()
def test_stripes_stay_small_at_the_largest_size(monkeypatch):
    """150 classes at 1024 x 2048 would be 1.2 GB whole."""
    largest = 0
    network, images = Scores(150), torch.zeros(1, 3, 1024, 2048)
    for stripe in Inference().score_stripes(network, images, (1024, 2048)):
        largest = max(largest, stripe.numel())
    assert largest <= inference.STRIPE_ELEMENTS["cpu"]


class Masks(torch.nn.Module):
    """Masks at stride 4 of images padded to multiples of 32, whatever the image."""

    mask_stride = 4

    def __init__(self, classes, masks):
        super().__init__()
        self.prediction = MaskPrediction(classes, masks)

    def masks(self, images):
        return self.prediction


def score_plainly(network, image_size, size):
    classes, masks = network.prediction
    padded = resize(masks, tuple(4 * side for side in masks.shape[2:])).sigmoid()
    scores = torch.einsum("bqk,bqhw->bkhw", classes.softmax(dim=2)[..., :-1], padded)
    return resize(scores[:, :, : image_size[0], : image_size[1]], size)


@pytest.mark.parametrize("setting", ["base", "l123_residual"])
@torch.inference_mode()
def test_masks_are_scored_as_officially(setting, monkeypatch):
    monkeypatch.setitem(inference.MASK_STRIPE_ELEMENTS, "cpu", 10000)
    reference = load_file(MASKS)
    network = Masks(reference[f"{setting}/pred_logits"], reference[f"{setting}/pred_masks"])
    images = torch.zeros(2, 3, 64, 96)
    stripes = list(Inference().score_stripes(network, images, (64, 96)))
    assert len(stripes) > 10
    scores = torch.cat(stripes, dim=2)
    plain = score_plainly(network, (64, 96), (64, 96))
    torch.testing.assert_close(scores, plain, atol=1e-5, rtol=0)
    step = 4 if setting == "base" else 8
    expected = reference[f"{setting}/semseg_sub{step}"]
    torch.testing.assert_close(scores[:, :, ::step, ::step], expected, atol=1e-5, rtol=0)
    prediction = Inference()(network, images, (64, 96))
    assert torch.equal(prediction, reference[f"{setting}/semseg_argmax"].long())


@pytest.mark.parametrize("size", [(50, 75), (31, 47), (120, 101)])
@pytest.mark.parametrize("elements", [3000, 2**22])
@torch.inference_mode()
def test_masks_of_padded_images_at_other_sizes(size, elements, monkeypatch):
    """Of an image of 50x75, padded to 64x96."""
    monkeypatch.setitem(inference.MASK_STRIPE_ELEMENTS, "cpu", elements)
    network = Masks(torch.randn(2, 9, 6), 3 * torch.randn(2, 9, 16, 24))
    stripes = Inference().score_stripes(network, torch.zeros(2, 3, 50, 75), size)
    expected = score_plainly(network, (50, 75), size)
    torch.testing.assert_close(torch.cat(list(stripes), dim=2), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_windows_of_networks_with_masks_slide_over_their_scores():
    class Both(Scores):
        mask_stride = 4

    network, images = Both(), torch.randn(1, 3, 72, 100)
    slide = Inference("slide", window=(32, 32), stride=(24, 24))
    plain = Scores()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(slide(network, images, (72, 100)), slide(plain, images, (72, 100)))


@torch.inference_mode()
def test_masks_never_become_classes_at_full_size():
    """100 queries and 150 classes at 1024 x 2048: 2 GB whole."""
    network = Masks(torch.randn(1, 100, 151), torch.randn(1, 100, 256, 512))
    images = torch.zeros(1, 3, 1024, 2048)
    with _Meter({}, []) as meter:
        stripes = Inference().score_stripes(network, images, (1024, 2048))
        for stripe in itertools.islice(stripes, 10):
            stripe.max(dim=1)
    assert meter.peak_bytes < 200e6


class MaskScores(torch.nn.Module):
    """Masks at stride 4, of images that it pads to multiples of 32."""

    mask_stride = 4

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 9, 4, 4)
        self.classes = torch.nn.Linear(9, 6)

    def masks(self, images):
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % 32, 0, -height % 32))
        masks = 5 * self.convolution(padded)
        return MaskPrediction(self.classes(F.adaptive_avg_pool2d(masks, 3).flatten(2)), masks)


def whole(network, images, size):
    return resize(resize(network(images), images.shape[2:]), size).softmax(dim=1)


def slide(network, images, size):
    """Windows of 32x32, 24 apart."""
    height, width = images.shape[2:]
    total, count = torch.zeros(len(images), 5, height, width), torch.zeros(height, width)
    for top in window_offsets(height, min(32, height), 24):
        for left in window_offsets(width, min(32, width), 24):
            crop = images[:, :, top : top + 32, left : left + 32]
            here = slice(top, top + 32), slice(left, left + 32)
            total[:, :, *here] += resize(network(crop), crop.shape[2:])
            count[here] += 1
    return resize(total / count, size).softmax(dim=1)


def masked(network, images, size):
    return score_plainly(Masks(*network.masks(images)), images.shape[2:], size)


@pytest.mark.parametrize(
    ("network", "score", "mode"),
    [(Scores(), whole, "whole"), (Scores(), slide, "slide"), (MaskScores(), masked, "whole")],
    ids=["whole", "slide", "masks"],
)
@torch.inference_mode()
def test_copies_are_averaged_as_probabilities(network, score, mode, monkeypatch):
    monkeypatch.setitem(inference.MASK_STRIPE_ELEMENTS, "cpu", 5000)
    images, size = torch.randn(2, 3, 52, 76), (60, 71)
    total = torch.zeros(2, 5, *size)
    for copy in ((26, 38), (52, 76), (78, 114)):
        scaled = resize(images, copy)
        total += score(network, scaled, size)
        total += score(network, scaled.flip(3), size).flip(3)
    augmented = Inference(mode, (32, 32), (24, 24), scales=[0.5, 1.0, 1.5], flip=True)
    stripes = list(augmented.score_stripes(network, images, size))
    assert len(stripes) > 3
    torch.testing.assert_close(torch.cat(stripes, dim=2), total / 6, atol=1e-5, rtol=0)
    prediction = augmented(network, images, size)
    assert (prediction == total.argmax(dim=1)).float().mean() > 0.999


@torch.inference_mode()
def test_the_image_alone_is_scored_as_it_is():
    seen = []

    class Seeing(Scores):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    images = torch.randn(1, 3, 64, 96)
    Inference(scales=[1.0], flip=False, size_divisor=32)(Seeing(), images, (64, 96))
    Inference(scales=[1.0], flip=True)(Seeing(), images, (64, 96))
    assert len(seen) == 3
    assert seen[0].data_ptr() == seen[1].data_ptr() == images.data_ptr()
    assert torch.equal(seen[2], images.flip(3))


def test_sizes_of_copies():
    scales = [0.5, 0.75, 1.0, 1.25]
    sizes = [copy.size for copy in Inference(scales=scales).copies((333, 500))]
    assert sizes == [(167, 250), (250, 375), (333, 500), (416, 625)]
    augmented = Inference(scales=[0.75, 1.0], flip=True, size_divisor=32)
    copies = augmented.copies((512, 704))
    assert copies == [((384, 544), False), ((384, 544), True), ((512, 704), False),
                      ((512, 704), True)]  # fmt: skip


@torch.inference_mode()
def test_copies_never_become_classes_at_full_size():
    """150 classes at 1024 x 2048 would be 1.2 GB, four times."""
    network, images = Scores(150), torch.zeros(1, 3, 256, 512)
    augmented = Inference(scales=[0.5, 1.0], flip=True)
    with _Meter({}, []) as meter:
        stripes = augmented.score_stripes(network, images, (1024, 2048))
        for stripe in itertools.islice(stripes, 5):
            assert stripe.numel() <= inference.MASK_STRIPE_ELEMENTS["cpu"]
    assert meter.peak_bytes < 120e6
