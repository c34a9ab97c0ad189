from __future__ import annotations

import warnings

import albumentations as A
import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data.transforms import (
    PhotometricDistortion,
    PILPhotometricDistortion,
    RandomCrop,
    RandomResize,
    keep_ratio_size,
    one_class_dominates,
    resize_for_evaluation,
    scale_and_shift,
    scale_saturation,
    seed_transform,
    shift_hue,
    shift_pil_hue,
    training_transform,
)
from segtrain.inference import IMAGE_MEAN, IMAGE_STD

IMAGE = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8), (120, 90))
MASK = np.repeat(np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4), 30, 0), 30, 1)


@pytest.mark.parametrize(
    ("size", "resized", "aligned"),
    [
        ((480, 640), (512, 683), (512, 704)),
        ((333, 500), (512, 769), (512, 800)),
        ((640, 480), (683, 512), (704, 512)),
        ((100, 1000), (205, 2048), (224, 2048)),  # the long side is the limit
        ((512, 2048), (512, 2048), (512, 2048)),
    ],
)
def test_evaluation_sizes_of_the_papers(size, resized, aligned):
    assert keep_ratio_size(size, (2048, 512)) == resized
    image = np.zeros((*size, 3), np.uint8)
    assert resize_for_evaluation(image, (2048, 512), None).shape[:2] == resized
    assert resize_for_evaluation(image, (2048, 512), 32).shape[:2] == aligned


def test_evaluation_may_leave_the_image_alone():
    assert resize_for_evaluation(IMAGE, None, None) is IMAGE


def test_evaluation_resizes_twice():
    image = cv2.resize(IMAGE, (100, 77))
    once = cv2.resize(image, (665, 512))
    twice = cv2.resize(once, (672, 512))
    np.testing.assert_array_equal(resize_for_evaluation(image, (2048, 512), 32), twice)


def draw(transform: A.BasicTransform, index: int, mask: np.ndarray = MASK) -> dict:
    compose = A.Compose([transform])
    seed_transform(compose, 0, 0, index)
    return compose(image=IMAGE, mask=mask)


def test_random_resize_keeps_the_shape_and_spans_the_range():
    factors = []
    for i in range(300):
        result = draw(RandomResize((240, 90), (0.5, 2.0)), i)
        height, width = result["image"].shape[:2]
        assert result["mask"].shape == (height, width)
        assert abs(width / height - 4 / 3) < 0.03
        assert set(np.unique(result["mask"])) <= set(range(12))
        factors.append(height / 90)
    assert 0.49 < min(factors) < 0.52
    assert 1.96 < max(factors) <= 2
    assert np.mean(factors) == pytest.approx(1.25, abs=0.08)


def test_random_resize_may_start_from_the_size_of_the_image():
    sizes = set()
    for i in range(300):
        sizes.add(draw(RandomResize(None, (0.5, 2.0), 0.25), i)["image"].shape[:2])
    assert sizes == {(int(22.5 * k + 0.5), 30 * k) for k in range(2, 9)}
    assert draw(RandomResize(None, (0.5, 0.5)), 0)["image"].shape[:2] == (45, 60)


def test_steps_of_the_random_resize_are_equally_likely():
    resize = RandomResize((120, 90), (0.5, 2.0), 0.25)
    widths = [draw(resize, i)["image"].shape[1] for i in range(700)]
    _, counts = np.unique(widths, return_counts=True)
    assert len(counts) == 7
    assert counts.min() > 70
    assert counts.max() < 130


@pytest.mark.parametrize(
    ("scale_range", "step", "widths"),
    [
        ((1.0, 1.7), 0.1, {12 * k for k in range(10, 18)}),  # 0.7 / 0.1 is below 7
        ((0.5, 1.2), 0.25, {60, 90, 120}),  # nothing above the highest
    ],
)
def test_steps_end_at_the_highest_factor(scale_range, step, widths):
    resize = RandomResize(None, scale_range, step)
    assert {draw(resize, i)["image"].shape[1] for i in range(150)} == widths


def test_random_crop_reaches_every_place_and_moves_image_and_mask_together():
    image = np.arange(90 * 120, dtype=np.int64).reshape(90, 120)
    places = set()
    for i in range(400):
        compose = A.Compose([RandomCrop((88, 119), 1.0)])
        seed_transform(compose, 0, 0, i)
        pixels = np.stack([image % 251] * 3, -1).astype(np.uint8)
        result = compose(image=pixels, mask=(image % 251).astype(np.uint8))
        np.testing.assert_array_equal(result["image"][..., 0], result["mask"])
        places.add(int(result["mask"][0, 0]))
    assert places == {(120 * top + left) % 251 for top in range(3) for left in range(2)}


def test_crop_of_a_smaller_image_keeps_it_whole_in_that_direction():
    assert draw(RandomCrop((200, 50), 0.75), 0)["image"].shape == (90, 50, 3)


@pytest.mark.parametrize(
    ("counts", "dominated"),
    [
        ({1: 75, 2: 25}, True),
        ({1: 74, 2: 26}, False),
        ({1: 100}, True),
        ({255: 100}, True),
        ({255: 90, 1: 5, 2: 5}, False),  # ignored pixels do not count
        ({255: 90, 1: 10}, True),
    ],
)
def test_cat_max_ratio(counts, dominated):
    mask = np.concatenate([np.full(n, k, np.uint8) for k, n in counts.items()]).reshape(10, 10)
    assert one_class_dominates(mask, 0.75) is dominated


def test_crops_are_redrawn_up_to_ten_times():
    """Two classes meet in a narrow strip; a crop off the strip shows one class only."""
    mask = np.zeros((90, 120), np.uint8)
    mask[:, 80:] = 1
    crop = RandomCrop((20, 20), 0.75)
    dominated = np.mean(
        [one_class_dominates(draw(crop, i, mask)["mask"], 0.75) for i in range(500)]
    )
    # Of 101 places those from 66 to 74 show both classes well enough: 9.
    assert dominated == pytest.approx((1 - 9 / 101) ** 11, abs=0.07)
    ignoring = RandomCrop((20, 20), 1.0)
    once = np.mean([one_class_dominates(draw(ignoring, i, mask)["mask"], 0.75) for i in range(500)])
    assert once == pytest.approx(1 - 9 / 101, abs=0.05)


def test_gain_and_offset_clip_and_truncate():
    values = np.array([[0, 1, 100, 101, 200, 255]], np.uint8)
    np.testing.assert_array_equal(scale_and_shift(values, 1.5, 0), [[0, 1, 150, 151, 255, 255]])
    np.testing.assert_array_equal(scale_and_shift(values, 1, -1.5), [[0, 0, 98, 99, 198, 253]])


def test_hue_and_saturation():
    red = np.array([[[200, 0, 0]]], np.uint8)
    np.testing.assert_array_equal(shift_hue(red, 60), [[[0, 200, 0]]])
    np.testing.assert_array_equal(shift_hue(red, -60), [[[0, 0, 200]]])
    np.testing.assert_array_equal(scale_saturation(red, 0.5), [[[200, 100, 100]]])
    grey = np.full((1, 1, 3), 77, np.uint8)
    np.testing.assert_array_equal(scale_saturation(shift_hue(grey, 7), 1.5), grey)


def test_photometric_distortion_draws_what_the_papers_say():
    distortion = PhotometricDistortion()
    draws = []
    for i in range(2000):
        seed_transform(A.Compose([distortion]), 0, 0, i)
        draws.append(distortion.get_params())
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 17),
    ):
        values = [d[name] for d in draws if d[name] is not None]
        assert len(values) / len(draws) == pytest.approx(0.5, abs=0.05)
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    assert np.mean([d["contrast_last"] for d in draws]) == pytest.approx(0.5, abs=0.05)
    both = np.mean([d["brightness"] is not None and d["hue"] is not None for d in draws])
    assert both == pytest.approx(0.25, abs=0.05)  # independent coins


def test_contrast_comes_second_or_last():
    parameters = {"brightness": 30.0, "contrast": 1.5, "saturation": 0.5, "hue": 9}
    apply = PhotometricDistortion().apply
    bright = scale_and_shift(IMAGE, 1, 30)
    second = shift_hue(scale_saturation(scale_and_shift(bright, 1.5, 0), 0.5), 9)
    last = scale_and_shift(shift_hue(scale_saturation(bright, 0.5), 9), 1.5, 0)
    np.testing.assert_array_equal(apply(IMAGE, contrast_last=False, **parameters), second)
    np.testing.assert_array_equal(apply(IMAGE, contrast_last=True, **parameters), last)
    assert (second != last).any()


def test_pil_distortion_draws_what_paddleseg_does():
    distortion = PILPhotometricDistortion()
    draws = []
    for i in range(2000):
        seed_transform(A.Compose([distortion]), 0, 0, i)
        draws.append(distortion.get_params()["steps"])
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("hue", -18, 17),
    ):
        values = [amount for steps in draws for step, amount in steps if step == name]
        assert len(values) / len(draws) == pytest.approx(0.5, abs=0.05)
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    whole = [tuple(name for name, _ in steps) for steps in draws if len(steps) == 4]
    assert len(whole) / len(draws) == pytest.approx(1 / 16, abs=0.02)  # independent coins
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


def test_padding_is_zero_after_normalisation_and_ignored():
    transform = training_transform((150, 100), (120, 90), (1.0, 1.0), 1.0, photometric=True)
    seed_transform(transform, 0, 0, 0)
    result = transform(image=IMAGE, mask=MASK)
    assert result["image"].shape == (150, 100, 3)
    assert (result["mask"][90:] == 255).all()
    assert (result["mask"][:90] != 255).all()
    normalised = (result["image"][90:] - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    assert np.abs(normalised).max() < 0.02


def test_albumentations_knows_every_argument_it_is_given():
    """It only warns about others, and would go on with its defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_transform((90, 120), (120, 90), (1.0, 1.0), 1.0, photometric=True)
        training_transform((90, 120), None, (0.5, 2.0), 1.0, "pil", scale_step=0.25)


def test_the_options_of_rtformer_reach_the_transforms():
    transform = training_transform((180, 240), None, (0.5, 2.0), 1.0, "pil", scale_step=0.25)
    assert isinstance(transform[3], PILPhotometricDistortion)
    widths = set()
    for i in range(60):
        seed_transform(transform, 0, 0, i)
        widths.add(int((transform(image=IMAGE, mask=MASK)["mask"][0] != 255).sum()))
    assert widths == {30 * k for k in range(2, 9)}


def test_flip_happens_half_of_the_time_and_not_with_anything_else():
    transform = training_transform((90, 120), (120, 90), (1.0, 1.0), 1.0, photometric=False)
    flips = []
    for i in range(400):
        seed_transform(transform, 0, 0, i)
        result = transform(image=IMAGE, mask=MASK)
        flipped = result["mask"][0, 0] == MASK[0, -1]
        expected = IMAGE[:, ::-1] if flipped else IMAGE
        np.testing.assert_array_equal(result["image"], expected)
        flips.append(flipped)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.08)
