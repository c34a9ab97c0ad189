from __future__ import annotations

import itertools

import albumentations as A
import cv2
import numpy as np
import pytest
from scipy import stats

from data.geometry import Crop, RandomScaledCrop, one_class_dominates
from tests.data.reference_pipeline import draw_sample, resize

IMAGE = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8), (120, 90))
MASK = np.repeat(np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4), 30, 0), 30, 1)
LARGE = (10**6, 10**6)  # a crop that no image fills


def draws(transform, count, mask=MASK):
    generator = np.random.default_rng(0)
    return [transform.draw(mask, generator) for _ in range(count)]


def cut(transform, crop, image=IMAGE, mask=MASK):
    return transform.apply(image, crop), transform.apply_to_mask(mask, crop)


def test_images_keep_their_shape_and_scales_span_the_range():
    transform = RandomScaledCrop(LARGE, (240, 90), (0.5, 2.0), 1.0)
    factors = []
    for crop in draws(transform, 300):
        image, mask = cut(transform, crop)
        height, width = crop.size
        assert image.shape == (height, width, 3)
        assert mask.shape == (height, width)
        assert abs(width / height - 4 / 3) < 0.03
        assert set(np.unique(mask)) <= set(range(12))
        factors.append(height / 90)
    assert 0.49 < min(factors) < 0.52
    assert 1.96 < max(factors) <= 2
    assert np.mean(factors) == pytest.approx(1.25, abs=0.08)


def test_scales_may_be_of_the_size_of_the_image():
    transform = RandomScaledCrop(LARGE, None, (0.5, 2.0), 1.0, 0.25)
    sizes = {crop.size for crop in draws(transform, 300)}
    assert sizes == {(int(22.5 * k + 0.5), 30 * k) for k in range(2, 9)}
    assert RandomScaledCrop(LARGE, None, (0.5, 0.5), 1.0).scaled_size((90, 120), 0.5) == (45, 60)


def test_steps_are_equally_likely():
    transform = RandomScaledCrop(LARGE, (120, 90), (0.5, 2.0), 1.0, 0.25)
    _, counts = np.unique([crop.size[1] for crop in draws(transform, 700)], return_counts=True)
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
    transform = RandomScaledCrop(LARGE, None, scale_range, 1.0, step)
    assert {crop.size[1] for crop in draws(transform, 150)} == widths


@pytest.mark.parametrize(
    ("base", "sides"),
    [
        (512, "256 307 358 409 460 512 563 614 665 716 768 819 870 921 972 1024"),
        (640, "320 384 448 512 576 640 704 768 832 896 960 1024 1088 1152 1216 1280"),
        (1024, "512 614 716 819 921 1024 1126 1228 1331 1433 1536 1638 1740 1843 1945 2048"),
    ],
)
def test_short_sides_are_those_that_mask2former_chooses_from(base, sides):
    transform = RandomScaledCrop(LARGE, (4 * base, base), (0.5, 2.0), 1.0, 0.1, shortest_edge=True)
    sizes = [crop.size for crop in draws(transform, 600)]
    for height, width in sizes:
        assert width == pytest.approx(height * 4 / 3, abs=0.51)
    values, counts = np.unique([height for height, _ in sizes], return_counts=True)
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
    transform = RandomScaledCrop(LARGE, (200, 100), (factor, factor), 1.0, shortest_edge=True)
    assert transform.scaled_size(size, factor) == resized


@pytest.mark.parametrize("shortest_edge", [False, True])
def test_image_and_mask_stay_together(shortest_edge):
    regions = np.stack([MASK * 20] * 3, -1)
    transform = RandomScaledCrop((60, 70), (240, 90), (0.5, 2.0), 1.0, 0.1, shortest_edge)
    for crop in draws(transform, 50):
        image, mask = cut(transform, crop, image=regions)
        # All but the borders, where bilinear values lie in between.
        assert (image[..., 0] == mask * 20).mean() > 0.85


def test_windows_reach_every_place():
    pixels = (np.arange(90 * 120).reshape(90, 120) % 251).astype(np.uint8)
    image = np.stack([pixels] * 3, -1)
    transform = RandomScaledCrop((88, 119), None, (1.0, 1.0), 1.0)
    places = set()
    for crop in draws(transform, 400, pixels):
        cropped, mask = cut(transform, crop, image, pixels)
        np.testing.assert_array_equal(cropped[..., 0], mask)
        places.add((int(mask[0, -1 if crop.flip else 0]), crop.flip))
    assert len(places) == 12
    assert {place for place, _ in places} == {
        (120 * top + left) % 251 for top in range(3) for left in range(2)
    }


def test_every_second_crop_is_flipped_and_not_with_anything_else():
    transform = RandomScaledCrop((90, 120), (120, 90), (1.0, 1.0), 1.0)
    crops = draws(transform, 400)
    for crop in crops[:20]:
        image, mask = cut(transform, crop)
        np.testing.assert_array_equal(image, IMAGE[:, ::-1] if crop.flip else IMAGE)
        np.testing.assert_array_equal(mask, MASK[:, ::-1] if crop.flip else MASK)
    assert np.mean([crop.flip for crop in crops]) == pytest.approx(0.5, abs=0.08)


def test_a_joint_offset_places_windows_on_both_diagonals():
    """On the other one where the image is flipped: it was flipped before it was cropped."""
    transform = RandomScaledCrop((50, 100), None, (1.0, 1.0), 1.0, joint_offset=True)
    crops = draws(transform, 500)
    tops = np.array([crop.window[0].start for crop in crops])
    flips = np.array([crop.flip for crop in crops])
    lefts = np.array([crop.window[1].start for crop in crops])
    lefts = np.where(flips, 20 - lefts, lefts)
    assert np.abs(tops / 40 - lefts / 20).max() < 0.5 / 40 + 0.5 / 20 + 1e-9
    assert {*tops} == {*range(41)}
    assert np.mean(lefts) == pytest.approx(10, abs=0.8)
    # Rounded, so that the first and the last place are half as likely as the others.
    assert np.mean(lefts == 0) + np.mean(lefts == 20) == pytest.approx(1 / 20, abs=0.025)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.08)


def test_an_image_smaller_than_the_crop_is_kept_whole_in_that_direction():
    (crop,) = draws(RandomScaledCrop((200, 50), None, (1.0, 1.0), 0.75), 1)
    assert crop.size == (90, 50)
    assert crop.window[0] == slice(0, 90)


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
@pytest.mark.parametrize("side", [10, 400])
def test_cat_max_ratio(counts, dominated, side):
    mask = np.concatenate([np.full(n, k, np.uint8) for k, n in counts.items()]).reshape(10, 10)
    mask = np.repeat(np.repeat(mask, side // 10, 0), side // 10, 1)
    assert one_class_dominates(mask, 0.75) is dominated


def test_windows_are_redrawn_up_to_ten_times():
    """Two classes meet in a narrow strip; a window off the strip shows one class only."""
    mask = np.zeros((90, 120), np.uint8)
    mask[:, 80:] = 1

    def share_dominated(cat_max_ratio):
        transform = RandomScaledCrop((20, 20), None, (1.0, 1.0), cat_max_ratio)
        crops = draws(transform, 500, mask)
        return np.mean([one_class_dominates(mask[crop.window], 0.75) for crop in crops])

    # Of 101 places those from 66 to 74 show both classes well enough: 9.
    assert share_dominated(0.75) == pytest.approx((1 - 9 / 101) ** 11, abs=0.07)
    assert share_dominated(1.0) == pytest.approx(1 - 9 / 101, abs=0.05)


def scene(size=(150, 200)):
    """Regions of uneven size, so that many windows are dominated by one."""
    generator = np.random.default_rng(1)
    mask = np.zeros(size, np.uint8)
    for label in range(1, 14):
        center = [int(generator.integers(side)) for side in size[::-1]]
        axes = [int(generator.integers(8, 60)) for _ in range(2)]
        cv2.ellipse(mask, center, axes, float(generator.integers(180)), 0, 360, label, -1)
    mask[:6] = 255
    image = generator.integers(0, 256, (14, 3), dtype=np.uint8)[mask % 255]
    return cv2.GaussianBlur(image, (7, 7), 0), mask


@pytest.mark.parametrize("cat_max_ratio", [0.4, 0.75])
def test_crops_are_distributed_as_those_of_the_reference(cat_max_ratio):
    """Scales, places, flips and classes of thousands, by two-sample Kolmogorov-Smirnov tests."""
    image, mask = scene()
    arguments = ((64, 80), (200, 100), (0.5, 2.0), cat_max_ratio)
    count = 3000
    transform = RandomScaledCrop(*arguments)
    drawn = {"ours": [], "theirs": []}
    classes = {"ours": [], "theirs": []}
    generator = np.random.default_rng(2)
    for crop in draws(transform, count, mask):
        rows, columns = crop.window
        scale = crop.size[0] / (rows.stop - rows.start)
        drawn["ours"].append((scale, rows.start, columns.start, crop.flip))
        labels = transform.apply_to_mask(mask, crop)
        classes["ours"].append(np.bincount(labels.ravel(), minlength=256) / labels.size)
    for _ in range(count):
        sample = draw_sample(image, mask, generator, *arguments)
        scale = sample.scaled[0] / 150
        place = [offset / scale for offset in sample.offset]
        drawn["theirs"].append((scale, *place, sample.flip))
        labels = sample.mask
        classes["theirs"].append(np.bincount(labels.ravel(), minlength=256) / labels.size)
    ours, theirs = np.array(drawn["ours"]), np.array(drawn["theirs"])
    for column in range(3):
        # Window bounds are whole pixels here, and were not there.
        jitter = generator.uniform(-0.5, 0.5, count) if column else 0
        result = stats.ks_2samp(ours[:, column] + jitter, theirs[:, column] + jitter)
        assert result.pvalue > 0.001, column
    assert ours[:, 3].mean() == pytest.approx(theirs[:, 3].mean(), abs=0.04)
    # Places of small crops against their scale: not only each by itself is the same.
    products = [values[:, 0] * values[:, 2] for values in (ours, theirs)]
    assert stats.ks_2samp(*products).pvalue > 0.001
    shares = [np.mean(classes[side], axis=0) for side in ("ours", "theirs")]
    assert np.abs(shares[0] - shares[1]).max() < 0.012
    largest = [np.max(np.array(classes[side])[:, :255], axis=1) for side in ("ours", "theirs")]
    assert stats.ks_2samp(*largest).statistic < 0.05


@pytest.mark.parametrize("factor", [0.63, 1.0, 1.37, 1.94])
def test_a_crop_is_that_of_the_resized_image_but_for_a_part_of_a_pixel(factor):
    image, mask = scene()
    transform = RandomScaledCrop((64, 80), None, (factor, factor), 1.0)
    scaled = transform.scaled_size(mask.shape, factor)
    whole, whole_mask = resize(image, mask, scaled)
    for crop in draws(transform, 40, mask):
        crop = Crop(crop.window, crop.size, flip=False)
        ours, ours_mask = cut(transform, crop, image, mask)
        starts = [
            round(part.start * scaled[axis] / mask.shape[axis])
            for axis, part in enumerate(crop.window)
        ]
        # The offset that was drawn is one of those that round to this window.
        differences = []
        for top, left in itertools.product(*(range(start - 1, start + 2) for start in starts)):
            at = np.s_[max(top, 0) : top + crop.size[0], max(left, 0) : left + crop.size[1]]
            if whole_mask[at].shape == crop.size:
                colors = np.abs(whole[at].astype(int) - ours).mean()
                differences.append(((whole_mask[at] != ours_mask).mean(), colors))
        labels, colors = min(differences)
        assert labels < (1e-9 if factor == 1 else 0.06)
        assert colors < (1e-9 if factor == 1 else 4)


def test_it_is_a_transform_of_albumentations():
    compose = A.Compose([RandomScaledCrop((40, 50), (240, 90), (0.5, 2.0), 0.75)])
    result = compose(image=IMAGE, mask=MASK)
    assert result["image"].shape[:2] == result["mask"].shape
    sizes = {compose(image=IMAGE, mask=MASK)["mask"].shape for _ in range(20)}
    assert sizes <= {(40, 50)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ((240, 90), (0.5, 2.0)),
            [(19, 47, 82, 117, True), (10, 87, 23, 118, False), (39, 68, 46, 82, False)],
        ),
        (
            (None, (0.5, 2.0), 0.25),
            [(43, 66, 63, 92, True), (2, 82, 4, 104, True), (47, 74, 55, 88, False)],
        ),
    ],
)
def test_samples_stay_what_they_are_from_version_to_version(arguments, expected):
    """An old run goes on with the crops that it would have drawn."""
    size, scale_range, *step = arguments
    transform = RandomScaledCrop((40, 50), size, scale_range, 0.75, *step)
    drawn = []
    for crop in draws(transform, 3):
        rows, columns = crop.window
        drawn.append((rows.start, rows.stop, columns.start, columns.stop, crop.flip))
    assert drawn == expected
