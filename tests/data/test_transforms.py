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
    one_class_dominates,
    resize_for_evaluation,
    scale_and_shift,
    scale_saturation,
    seed_transform,
    shift_hue,
    shift_pil_hue,
    training_transform,
)
from segtrain.errors import UserError
from segtrain.inference import IMAGE_MEAN, IMAGE_STD, keep_ratio_size

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


@pytest.mark.parametrize(
    ("base", "sides"),
    [
        (512, "256 307 358 409 460 512 563 614 665 716 768 819 870 921 972 1024"),
        (640, "320 384 448 512 576 640 704 768 832 896 960 1024 1088 1152 1216 1280"),
        (1024, "512 614 716 819 921 1024 1126 1228 1331 1433 1536 1638 1740 1843 1945 2048"),
    ],
)
def test_short_sides_are_those_that_mask2former_chooses_from(base, sides):
    resize = RandomResize((4 * base, base), (0.5, 2.0), 0.1, shortest_edge=True)
    drawn = []
    for i in range(600):
        seed_transform(A.Compose([resize]), 0, 0, i)
        size = resize.get_params_dependent_on_data({"shape": (90, 120, 3)}, {})["size"]
        assert size[1] == pytest.approx(size[0] * 4 / 3, abs=0.51)
        drawn.append(size[0])
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [int(side) for side in sides.split()]
    assert counts.min() > 18  # of 37.5
    assert counts.max() < 60


@pytest.mark.parametrize(
    ("size", "factor", "resized"),
    [
        ((90, 120), 1.5, (150, 200)),  # 200 is the longest
        ((90, 180), 1.0, (100, 200)),
        ((90, 180), 1.5, (100, 200)),
        ((400, 100), 0.5, (200, 50)),
        ((400, 100), 2.0, (200, 50)),
        ((90, 90), 3.0, (200, 200)),  # not even the short side is longer
    ],
)
def test_the_long_side_of_the_shortest_edge_is_a_limit_for_all_factors(size, factor, resized):
    resize = RandomResize((200, 100), (factor, factor), shortest_edge=True)
    parameters = resize.get_params_dependent_on_data({"shape": (*size, 3)}, {})
    assert parameters == {"size": resized}


def test_images_and_masks_are_resized_alike_by_the_shortest_edge():
    regions = np.stack([MASK * 20] * 3, -1)
    for i in range(20):
        compose = A.Compose([RandomResize((240, 90), (0.5, 2.0), 0.1, shortest_edge=True)])
        seed_transform(compose, 0, 0, i)
        result = compose(image=regions, mask=MASK)
        same = result["image"][..., 0] == result["mask"] * 20
        assert same.mean() > 0.9  # all but the borders, where bilinear values lie in between


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


def test_a_joint_offset_places_crops_on_the_diagonal():
    rows, columns = np.mgrid[:90, :120].astype(np.uint8)
    places = []
    for i in range(500):
        compose = A.Compose([RandomCrop((50, 100), 1.0, joint_offset=True)])
        seed_transform(compose, 0, 0, i)
        result = compose(image=np.stack([rows, columns, rows], -1), mask=columns)
        assert result["image"].shape == (50, 100, 3)
        np.testing.assert_array_equal(result["image"][..., 1], result["mask"])
        places.append(result["image"][0, 0, :2].astype(int))
    tops, lefts = np.transpose(places)
    assert np.abs(tops / 40 - lefts / 20).max() < 0.5 / 40 + 0.5 / 20 + 1e-9
    assert {*tops} == {*range(41)}
    assert np.mean(lefts) == pytest.approx(10, abs=0.8)
    # Rounded, so that the first and the last place are half as likely as the others.
    assert np.mean(lefts == 0) + np.mean(lefts == 20) == pytest.approx(1 / 20, abs=0.025)


def test_a_joint_offset_is_drawn_behind_the_flip():
    """So that crops lie on both diagonals of the image: flipped ones on the other."""
    rows, columns = np.mgrid[:90, :120].astype(np.uint8)
    transform = training_transform(
        (50, 80), None, (1.0, 1.0), 1.0, photometric=False, joint_crop_offset=True
    )
    flips = []
    for i in range(200):
        seed_transform(transform, 0, 0, i)
        result = transform(image=np.stack([rows, columns, rows], -1), mask=columns)
        top, left = result["image"][0, 0, :2].astype(int)
        flips.append(left > result["image"][0, -1, 1])
        assert left == (119 - top if flips[-1] else top)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.1)


def test_large_scale_jitter():
    """Into a box times 0.1 to 2, cropped to the box, padded right and below."""
    image = np.stack([MASK * 20] * 3, -1)
    transform = training_transform(
        (100, 100), (100, 100), (0.1, 2.0), 1.0, False, joint_crop_offset=True, pad_color=[128] * 3
    )
    widths = []
    for i in range(500):
        seed_transform(transform, 0, 0, i)
        result = transform(image=image, mask=MASK)
        assert result["image"].shape == (100, 100, 3)
        padded = result["mask"] == 255
        height, width = (~padded).any(1).sum(), (~padded).any(0).sum()
        assert padded[height:].all()
        assert padded[:, width:].all()
        assert not padded[:height, :width].any()
        assert (result["image"][padded] == 128).all()
        same = result["image"][..., 0] == result["mask"] * 20
        assert same[:height, :width].mean() > 0.6  # but for borders
        assert height == pytest.approx(0.75 * width, abs=1) or width == 100
        widths.append(width)
    widths = np.array(widths)
    assert 10 <= widths.min() < 13
    assert np.mean(widths == 100) == pytest.approx(1.0 / 1.9, abs=0.07)
    assert np.mean(widths[widths < 100]) == pytest.approx(55, abs=5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (((240, 90), (0.5, 2.0)), [(130, 173, 28, 5), (105, 140, 1, 35), (129, 172, 31, 52)]),
        ((None, (0.5, 2.0), 0.25), [(158, 210, 75, 82), (180, 240, 55, 146), (68, 90, 18, 14)]),
    ],
)
def test_samples_stay_what_they_are_from_version_to_version(arguments, expected):
    """Sizes and offsets that the first versions drew: an old run goes on with the same samples."""
    drawn = []
    for i in range(3):
        compose = A.Compose([RandomResize(*arguments), RandomCrop((40, 50), 0.75)])
        seed_transform(compose, 0, 0, i)
        compose(image=IMAGE, mask=MASK)
        parameters = compose[1].get_applied_params()
        rows, columns = parameters["window"]
        drawn.append((*parameters["shape"][:2], rows.start, columns.start))
    assert drawn == expected


def test_the_options_of_mask2former_reach_the_transforms(open_small):
    options = {"shortest_edge": True, "joint_crop_offset": True, "pad_color": [128, 127, 126]}
    images = open_small("ade20k", train_scale=(99, 20), scale_range=(1, 1), **options)
    resize, flip, crop, _, pad = images.training_images().transform
    assert (resize.scale, resize.shortest_edge) == ((99, 20), True)
    assert isinstance(flip, A.HorizontalFlip)
    assert crop.joint_offset
    assert pad.fill == (128, 127, 126)
    resize, crop, *_, pad = open_small("ade20k").training_images().transform
    assert not resize.shortest_edge
    assert not crop.joint_offset
    assert pad.fill == (124, 116, 104)
    with pytest.raises(UserError, match=r"shortest_edge=true needs .* data.train_scale is null"):
        open_small("ade20k", train_scale=None, shortest_edge=True)


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
