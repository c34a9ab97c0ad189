import pytest
import torch
import torch.nn.functional as F

from segtrain import inference
from segtrain.inference import Inference, window_offsets


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
