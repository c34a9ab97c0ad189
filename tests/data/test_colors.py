from __future__ import annotations

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from data.colors import (
    PhotometricDistortion,
    PILPhotometricDistortion,
    change_saturation_and_hue,
    distort_batch,
    scale,
    shift_pil_hue,
)
from segtrain.errors import UserError
from tests.data.reference_pipeline import distort, distort_exactly

IMAGE = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8), (120, 90))
NOTHING = (0, 1, 1, 0, 1)


def draws(distortion, count):
    generator = np.random.default_rng(0)
    return [distortion.draw(generator) for _ in range(count)]


def apply(amounts, image=IMAGE):
    return PhotometricDistortion().apply(image, np.array(amounts, np.float32))


def test_brightness_and_contrast_clip_and_truncate():
    values = np.array([[[0, 1, 100], [101, 200, 255]]], np.uint8)
    brighter, darker = apply((3.7, 1, 1, 0, 1), values), apply((-1.5, 1, 1, 0, 1), values)
    np.testing.assert_array_equal(brighter, [[[3, 4, 103], [104, 203, 255]]])
    np.testing.assert_array_equal(darker, [[[0, 0, 98], [99, 198, 253]]])
    np.testing.assert_array_equal(scale(values, 1.5), [[[0, 1, 150], [151, 255, 255]]])
    every = np.arange(256, dtype=np.uint8)[None]
    for gain in np.random.default_rng(0).uniform(0.5, 1.5, 500):
        expected = np.clip(every * np.float32(gain), 0, 255).astype(np.uint8)
        assert np.abs(scale(every, gain).astype(int) - expected).sum() <= 1


def test_hue_and_saturation():
    red = np.array([[[200, 0, 0]]], np.uint8)
    np.testing.assert_array_equal(change_saturation_and_hue(red, 1, 60), [[[0, 200, 0]]])
    np.testing.assert_array_equal(change_saturation_and_hue(red, 1, -60), [[[0, 0, 200]]])
    np.testing.assert_array_equal(change_saturation_and_hue(red, 0.5, 0), [[[200, 100, 100]]])
    np.testing.assert_array_equal(change_saturation_and_hue(red, 0.5, 60), [[[100, 200, 100]]])
    grey = np.full((1, 1, 3), 77, np.uint8)
    np.testing.assert_array_equal(change_saturation_and_hue(grey, 1.5, 7), grey)


def test_photometric_distortion_draws_what_the_papers_say():
    drawn = np.array(draws(PhotometricDistortion(), 4000))
    contrast = drawn[:, 1] * drawn[:, 4]
    for values, neutral, low, high in (
        (drawn[:, 0], 0, -32, 32),
        (contrast, 1, 0.5, 1.5),
        (drawn[:, 2], 1, 0.5, 1.5),
        (drawn[:, 3], 0, -18, 17),
    ):
        changed = values[values != neutral]
        share = 0.5 * 35 / 36 if neutral == 0 and high == 17 else 0.5  # a hue may be drawn as 0
        assert len(changed) / len(drawn) == pytest.approx(share, abs=0.03)
        counts, _ = np.histogram(changed, bins=6, range=(low, high))
        assert counts / len(changed) == pytest.approx(1 / 6, abs=0.03)
    assert ((drawn[:, 1] == 1) | (drawn[:, 4] == 1)).all()
    assert np.mean(drawn[contrast != 1, 4] != 1) == pytest.approx(0.5, abs=0.05)
    both = np.mean((drawn[:, 0] != 0) & (drawn[:, 2] != 1))
    assert both == pytest.approx(0.25, abs=0.03)  # independent coins


@pytest.mark.parametrize(
    "amounts",
    [
        NOTHING,
        (30.5, 1, 1, 0, 1),
        (-31, 1.383, 1, 0, 1),
        (0, 1, 0.613, 0, 1),
        (20, 0.717, 1, -17, 1),
        (-20, 1, 1.383, 0, 1.317),
        (20, 1, 1, 11, 0.613),
    ],
)
def test_with_one_conversion_it_is_that_of_mmsegmentation_to_the_bit(amounts):
    np.testing.assert_array_equal(apply(amounts), distort(IMAGE, *amounts))


def test_contrast_comes_second_or_last():
    second, last = (apply((30, *gains)) for gains in ((1.5, 0.5, 9, 1), (1, 0.5, 9, 1.5)))
    assert (second != last).any()


def test_it_is_within_a_grey_level_of_the_formula_without_rounding():
    """On average, and no farther than MMSegmentation, which truncates as often and rounds more."""
    drawn = draws(PhotometricDistortion(), 300)
    image = torch.from_numpy(IMAGE).permute(2, 0, 1).float().expand(len(drawn), -1, -1, -1)
    size = torch.tensor([IMAGE.shape[:2]]).expand(len(drawn), -1)
    on_device = distort_batch(image, torch.from_numpy(np.array(drawn)), size)
    ours, theirs, in_one_batch = [], [], []
    for amounts, distorted in zip(drawn, on_device.permute(0, 2, 3, 1).numpy(), strict=True):
        exact = distort_exactly(IMAGE, *amounts)
        ours.append(np.abs(apply(amounts) - exact).mean())
        theirs.append(np.abs(distort(IMAGE, *amounts) - exact).mean())
        in_one_batch.append(np.abs(distorted - exact).mean())
    assert np.mean(ours) < 0.8
    assert np.mean(ours) <= np.mean(theirs)
    assert np.mean(in_one_batch) < 0.8
    assert max(*ours, *in_one_batch) < 2  # three truncations and two roundings


def batch_of(*amounts):
    image = torch.from_numpy(IMAGE).permute(2, 0, 1).float().expand(len(amounts), -1, -1, -1)
    return image, torch.tensor(amounts, dtype=torch.float32)


def test_each_image_of_a_batch_has_its_own_colours():
    image, amounts = batch_of(NOTHING, (25, 1, 1, 0, 1), (0, 1.2, 0.5, 7, 1), (0, 1, 1.5, -18, 0.7))
    size = torch.tensor([[90, 120]] * 4)
    together = distort_batch(image, amounts, size)
    torch.testing.assert_close(together[0], image[0], rtol=0, atol=0)
    for i in range(4):
        alone = distort_batch(image[:1], amounts[i : i + 1], size[:1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=0)
        on_workers = torch.from_numpy(apply(amounts[i].tolist())).permute(2, 0, 1).float()
        assert (together[i] - on_workers).abs().mean() < 0.6
        assert (together[i] == together[i].round()).all()
        assert together[i].min() >= 0
        assert together[i].max() <= 255


def test_padding_keeps_its_colour():
    image, amounts = batch_of((32, 1.5, 1, 0, 1), (32, 1.5, 1, 0, 1))
    result = distort_batch(image, amounts, torch.tensor([[60, 100], [90, 120]]))
    assert (result[0, :, 60:] == image[0, :, 60:]).all()
    assert (result[0, :, :, 100:] == image[0, :, :, 100:]).all()
    assert (result[0, :, :60, :100] != image[0, :, :60, :100]).any(0).float().mean() > 0.9
    assert (result[1] != image[1]).any(0).float().mean() > 0.9


def test_batches_stay_channels_last():
    image, amounts = batch_of((5, 1, 1.2, 3, 1), (0, 1, 1, 0, 1))
    image = image.contiguous(memory_format=torch.channels_last)
    result = distort_batch(image, amounts, torch.tensor([[90, 120], [50, 50]]))
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_it_is_a_transform_of_albumentations():
    compose = A.Compose([PhotometricDistortion(), PILPhotometricDistortion()])
    result = compose(image=IMAGE, mask=IMAGE[..., 0])
    assert result["image"].shape == IMAGE.shape
    np.testing.assert_array_equal(result["mask"], IMAGE[..., 0])


def test_colours_on_the_device_are_drawn_with_the_sample(open_small):
    options = {"photometric": True, "batch_size": 3}
    on_workers = open_small("ade20k", photometric_on="workers", **options)
    on_device = open_small("ade20k", photometric_on="device", **options)
    batches = [next(iter(d.train_dataloader())) for d in (on_workers, on_device)]
    assert batches[0].keys() == batches[1].keys() - {"distortion", "content"}
    torch.testing.assert_close(batches[0]["mask"], batches[1]["mask"])
    assert (batches[0]["image"] != batches[1]["image"]).any()
    finished = [
        d.on_after_batch_transfer(b, 0)["image"]
        for d, b in zip((on_workers, on_device), batches, strict=True)
    ]
    assert (finished[0] - finished[1]).abs().mean() * 58 < 1
    assert "distortion" not in next(iter(on_device.val_dataloader()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_is_made_ready_without_waiting_for_the_device(open_small):
    data = open_small("ade20k", photometric_on="device", batch_size=3)
    batch = next(iter(data.train_dataloader()))
    expected = data.on_after_batch_transfer(batch, 0)["image"]
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    data.on_after_batch_transfer(batch, 0)  # the first one copies what all need
    torch.cuda.set_sync_debug_mode("error")
    try:
        image = data.on_after_batch_transfer(batch, 0)["image"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(image.cpu(), expected, rtol=0, atol=1e-4)


def test_colours_of_pil_are_distorted_while_loading(open_small):
    with pytest.raises(UserError, match="pil distorts colours while loading"):
        open_small("ade20k", photometric="pil", photometric_on="device")


def test_pil_distortion_draws_what_paddleseg_does():
    drawn = draws(PILPhotometricDistortion(), 2000)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("hue", -18, 17),
    ):
        values = [amount for steps in drawn for step, amount in steps if step == name]
        assert len(values) / len(drawn) == pytest.approx(0.5, abs=0.05)
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    whole = [tuple(name for name, _ in steps) for steps in drawn if len(steps) == 4]
    assert len(whole) / len(drawn) == pytest.approx(1 / 16, abs=0.02)  # independent coins
    assert len(set(whole)) == 24  # every order


def test_pil_distortion_is_that_of_pil():
    steps = [("saturation", 1.3), ("brightness", 0.7), ("hue", -9), ("contrast", 1.4)]
    result = PILPhotometricDistortion().apply(IMAGE, steps)
    image = ImageEnhance.Color(Image.fromarray(IMAGE)).enhance(1.3)
    hsv = np.array(ImageEnhance.Brightness(image).enhance(0.7).convert("HSV"))
    hsv[..., 0] -= 9  # in 8 bits: hues are a circle
    image = Image.merge("HSV", [Image.fromarray(np.ascontiguousarray(c)) for c in hsv.T])
    expected = np.array(ImageEnhance.Contrast(image.convert("RGB")).enhance(1.4))
    np.testing.assert_array_equal(result, expected.swapaxes(0, 1))
    np.testing.assert_array_equal(PILPhotometricDistortion().apply(IMAGE, []), IMAGE)


def test_pil_hue_is_a_circle():
    red = Image.new("RGB", (1, 1), (200, 0, 0))
    assert shift_pil_hue(red, 85).getpixel((0, 0)) == (0, 200, 0)
    assert shift_pil_hue(red, -86).getpixel((0, 0)) == (0, 0, 200)
