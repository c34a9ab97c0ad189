from __future__ import annotations

import albumentations as A
import cv2
import numpy as np
import pytest

from data.colors import PhotometricDistortion, PILPhotometricDistortion
from data.geometry import RandomScaledCrop
from data.transforms import TrainingTransform, resize_for_evaluation, sample_generator
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


def whole_image(crop_size, **options):
    """A crop that keeps the image whole."""
    return TrainingTransform(RandomScaledCrop(crop_size, None, (1.0, 1.0), 1.0), **options)


def test_large_scale_jitter():
    """Into a box times 0.1 to 2, cropped to the box, padded right and below."""
    image = np.stack([MASK * 20] * 3, -1)
    crop = RandomScaledCrop((100, 100), (100, 100), (0.1, 2.0), 1.0, joint_offset=True)
    transform = TrainingTransform(crop, pad_color=[128] * 3)
    widths = []
    for i in range(500):
        result = transform(image, MASK, sample_generator(0, 0, i))
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


def test_padding_is_zero_after_normalisation_and_ignored():
    transform = whole_image((150, 130), colors=PhotometricDistortion())
    result = transform(IMAGE, MASK, sample_generator(0, 0, 0))
    assert result["image"].shape == (150, 130, 3)
    assert (result["mask"][90:] == 255).all()
    assert (result["mask"][:, 120:] == 255).all()
    assert (result["mask"][:90, :120] != 255).all()
    normalised = (result["image"][90:] - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    assert np.abs(normalised).max() < 0.02


def test_amounts_for_the_device_come_with_what_is_not_padding():
    colors = PhotometricDistortion()
    on_workers = whole_image((150, 130), colors=colors)
    on_device = whole_image((150, 130), colors=colors, colors_on_device=True)
    changed = 0
    for i in range(8):
        left, right = (t(IMAGE, MASK, sample_generator(0, 0, i)) for t in (on_workers, on_device))
        assert right["content"].tolist() == [90, 120]
        assert right["distortion"].dtype == np.float32
        np.testing.assert_array_equal(left["mask"], right["mask"])
        inside = colors.apply(right["image"][:90, :120], right["distortion"])
        np.testing.assert_array_equal(left["image"][:90, :120], inside)
        changed += int((left["image"] != right["image"]).any())
    assert changed > 4


def test_own_transforms_come_between_crop_and_colours():
    class Note(A.ImageOnlyTransform):
        def __init__(self):
            super().__init__(p=1.0)

        def apply(self, img, **params):
            plain = any((img == image).all() for image in (IMAGE, IMAGE[:, ::-1]))
            seen.append((img.shape[:2], plain, self.random_generator.random()))
            return img

    seen = []
    transform = whole_image((150, 130), custom=[Note()], colors=PILPhotometricDistortion())
    for i in (0, 1, 0):
        transform(IMAGE, MASK, sample_generator(0, 0, i))
    sizes, plain, numbers = zip(*seen, strict=True)
    assert set(sizes) == {(90, 120)}
    assert all(plain)
    assert numbers[0] == numbers[2] != numbers[1]


def test_own_transforms_must_not_outgrow_the_crop():
    transform = whole_image((90, 120), custom=[A.Resize(height=100, width=110)])
    with pytest.raises(UserError, match=r"into 110x100 pixels, and data\.crop_size is 120x90"):
        transform(IMAGE, MASK, sample_generator(0, 0, 0))


def test_the_options_of_the_recipes_reach_the_transforms(open_small):
    options = {"shortest_edge": True, "joint_crop_offset": True, "pad_color": [128, 127, 126]}
    images = open_small("ade20k", train_scale=(99, 20), scale_range=(1, 1), **options)
    transform = images.training_images().transform
    assert (transform.crop.scale, transform.crop.shortest_edge) == ((99, 20), True)
    assert transform.crop.joint_offset
    assert transform.pad_color == (128, 127, 126)
    assert isinstance(transform.colors, PhotometricDistortion)

    transform = open_small("ade20k").training_images().transform
    assert not transform.crop.shortest_edge
    assert not transform.crop.joint_offset
    assert transform.pad_color == (124, 116, 104)

    options = {"train_scale": None, "scale_step": 0.25, "photometric": "pil"}
    transform = open_small("ade20k", **options).training_images().transform
    assert (transform.crop.scale, transform.crop.scale_step) == (None, 0.25)
    assert isinstance(transform.colors, PILPhotometricDistortion)
    assert open_small("ade20k", photometric=False).training_images().transform.colors is None
    with pytest.raises(UserError, match=r"shortest_edge=true needs .* data.train_scale is null"):
        open_small("ade20k", train_scale=None, shortest_edge=True)
