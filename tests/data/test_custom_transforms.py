"""Transforms of albumentations by name, and what is refused of them."""

from __future__ import annotations

import re

import albumentations as A
import cv2
import numpy as np
import pytest

from data.custom_transforms import build_transforms
from data.transforms import sample_generator, seed_transform
from segtrain.errors import UserError

CROP = (64, 96)
PAD_COLOR = (124, 116, 104)
# Nearest in images as well mixes no colours.
NEAREST = {"interpolation": 0, "p": 1.0}
NESTED = {
    "name": "OneOf",
    "p": 0.9,
    "transforms": [
        {"name": "GaussianBlur", "blur_limit": [3, 7]},
        {
            "name": "SomeOf",
            "n": 2,
            "transforms": [
                {"name": "Affine", "rotate": [-20, 20]},
                {"name": "CoarseDropout"},
                {"name": "Sequential", "transforms": [{"name": "HorizontalFlip"}], "p": 0.5},
            ],
        },
        {"name": "NoOp"},
    ],
}


def build(*described):
    return build_transforms(described, CROP, PAD_COLOR)


@pytest.fixture(scope="module")
def sample():
    """Classes 1 to 4 in blocks; the image shows 10 times the class in each channel."""
    blocks = np.random.default_rng(0).integers(1, 5, (4, 6), dtype=np.uint8)
    mask = cv2.resize(blocks, CROP[::-1], interpolation=cv2.INTER_NEAREST)
    return np.repeat(mask[..., None] * 10, 3, axis=2), mask


def apply(compose, sample, index=0):
    seed_transform(compose, sample_generator(0, 0, index))
    result = compose(image=sample[0], mask=sample[1])
    return result["image"], result["mask"]


def check_together(described, sample):
    """The mask of a transformed sample, whose image shows what the mask says."""
    image, mask = apply(A.Compose(build(described)), sample)
    labelled = mask != 255
    assert labelled.any()
    assert not np.array_equal(mask, sample[1])
    assert (image[labelled] == mask[labelled, None] * 10).all()
    assert (image[~labelled] == PAD_COLOR).all()
    return mask


@pytest.mark.parametrize(
    "described",
    [
        {"name": "Transpose", "p": 1.0},
        {"name": "RandomGridShuffle", "grid": [2, 3], "p": 1.0},
        {"name": "RandomResizedCrop", "size": [48, 64], **NEAREST},
        {"name": "GridElasticDeform", "num_grid_xy": [3, 3], "magnitude": 8, **NEAREST},
    ],
    ids=lambda described: described["name"],
)
def test_image_and_mask_move_together(described, sample):
    assert (check_together(described, sample) != 255).all()


@pytest.mark.parametrize(
    "described",
    [
        {"name": "Affine", "rotate": [30, 40], "scale": {"x": [0.6, 0.8], "y": 1}, **NEAREST},
        {"name": "Rotate", "limit": [30, 60], **NEAREST},
        {"name": "Perspective", "scale": [0.2, 0.3], "fit_output": True, **NEAREST},
        {"name": "ElasticTransform", "alpha": 400, "sigma": 8, **NEAREST},
        {"name": "GridDistortion", "distort_limit": [0.4, 0.5], "normalized": False, **NEAREST},
        {"name": "OpticalDistortion", "distort_limit": [0.6, 0.8], **NEAREST},
        {"name": "ThinPlateSpline", "scale_range": [0.4, 0.5], **NEAREST},
        {"name": "Pad", "padding": 4, "p": 1.0},
    ],
    ids=lambda described: described["name"],
)
def test_what_is_uncovered_is_ignored_and_has_the_padding_color(described, sample):
    assert (check_together(described, sample) == 255).any()


def test_a_fill_that_is_given_stays(sample):
    described = {"name": "Affine", "scale": 0.5, "fill": 7, "fill_mask": 9, **NEAREST}
    image, mask = apply(A.Compose(build(described)), sample)
    assert (image[mask == 9] == 7).all()
    assert set(np.unique(mask)) == {1, 2, 3, 4, 9}


@pytest.mark.parametrize(
    "described",
    [
        {"name": "GaussianBlur", "blur_limit": [3, 7], "p": 1.0},
        {"name": "GaussNoise", "p": 1.0},
        {"name": "RandomBrightnessContrast", "p": 1.0},
        {"name": "ImageCompression", "quality_range": [20, 40], "p": 1.0},
        {"name": "RandomFog", "p": 1.0},
        {"name": "Downscale", "scale_range": [0.25, 0.5], "p": 1.0},
        {"name": "PhotometricDistortion"},
    ],
    ids=lambda described: described["name"],
)
def test_masks_stay_where_images_alone_change(described, sample):
    image, mask = apply(A.Compose(build(described)), sample)
    assert not np.array_equal(image, sample[0])
    np.testing.assert_array_equal(mask, sample[1])


def test_what_is_blanked_out_keeps_its_labels_and_has_the_padding_color(sample):
    dropout = {"name": "CoarseDropout", "num_holes_range": [3, 5], "p": 1.0}
    image, mask = apply(A.Compose(build(dropout)), sample)
    blank = (image != sample[0]).any(axis=2)
    assert blank.any()
    assert (image[blank] == PAD_COLOR).all()
    np.testing.assert_array_equal(mask, sample[1])


def test_probabilities_are_those_of_albumentations():
    blur, jpeg, one_of = build(
        {"name": "GaussianBlur"},
        {"name": "ImageCompression", "p": 0.1},
        {"name": "OneOf", "transforms": [{"name": "D4"}]},
    )
    assert (blur.p, jpeg.p) == (A.GaussianBlur().p, 0.1)
    assert one_of.p == A.OneOf([A.D4()]).p
    assert one_of.transforms[0].p == A.D4().p


def test_a_sample_is_the_same_wherever_it_is_made(sample):
    noise = {"name": "AdditiveNoise", "noise_type": "gaussian", "p": 1.0} | {
        "noise_params": {"mean_range": [0, 0], "std_range": [0.1, 0.2]}
    }
    one, other = (A.Compose(build(NESTED, noise)) for _ in range(2))
    wanted = [apply(one, sample, index) for index in range(12)]
    for index in (7, 0, 11, 3):  # after others than there
        for made, same in zip(apply(other, sample, index), wanted[index], strict=True):
            np.testing.assert_array_equal(made, same)
    assert len({image.tobytes() for image, _ in wanted}) == 12
    assert len({mask.tobytes() for _, mask in wanted}) > 3


def test_neighbours_do_not_draw_the_same_numbers(sample):
    flips = A.Compose(build({"name": "HorizontalFlip"}, {"name": "VerticalFlip"}))
    both = {apply(flips, sample, index)[1].tobytes() for index in range(32)}
    assert len(both) == 4


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"name": "GausianBlur"}, "[0]: there is no transform 'GausianBlur': did you mean 'Gaus"),
        ({"name": "CenterCrop3D"}, "[0]: there is no transform 'CenterCrop3D'"),
        ({"name": "Compose", "transforms": []}, "[0]: there is no transform 'Compose'"),
        ({"p": 0.1}, "[0] has no name: write {name: GaussianBlur, p: 0.1}"),
        ("GaussianBlur", "[0] has no name"),
        (
            {"name": "GaussianBlur", "blur": 3},
            "[0]: GaussianBlur has no argument 'blur': Have: blur_limit, p, sigma_limit",
        ),
        (
            {"name": "GaussianBlur", "blur_limit": "x"},
            "[0]: GaussianBlur: blur_limit='x': Input should be a valid tuple (tuple[int, int] | i",
        ),
        ({"name": "Blur", "p": 2}, "[0]: Blur: p=2: Input should be less than or equal to 1 (flo"),
        ({"name": "RandomCrop", "height": 8}, "[0]: RandomCrop: width: Field required (int)"),
        ({"name": "CropAndPad"}, "[0]: CropAndPad: Both px and percent parameters cannot be None"),
        ({"name": "Rotate", "mask_interpolation": 1}, "[0]: Rotate: mask_interpolation is 0 or 6"),
        ({"name": "Normalize"}, "[0]: Normalize makes a ndarray float32 (64, 96, 3) of an image"),
        ({"name": "ToTensorV2"}, "[0]: ToTensorV2 makes a Tensor torch.uint8 (3, 64, 96) of an i"),
        ({"name": "ToFloat"}, "which is to stay an array uint8 (height, width, 3): it is normali"),
        ({"name": "ToGray", "num_output_channels": 1}, "[0]: ToGray makes a ndarray uint8"),
        ({"name": "BBoxSafeRandomCrop"}, "[0]: BBoxSafeRandomCrop fails on an image of 96x64 and"),
        ({"name": "Mosaic"}, "and its mask: Mosaic requires ['mosaic_metadata']"),
        ({"name": "OneOf"}, "[0].transforms is a list of transforms"),
        (
            {"name": "OneOf", "transforms": [{"name": "Blur"}, {"name": "Bluur"}]},
            "[0].transforms[1]: there is no transform 'Bluur': did you mean 'Blur'",
        ),
        (
            {"name": "SomeOf", "number": 2, "transforms": []},
            "[0]: SomeOf has no argument 'number': Have: n, p, replace, transforms",
        ),
    ],
)
def test_slips_are_named(described, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        build(described)
    assert str(raised.value).startswith("data.transforms[0]")


def test_what_is_no_list_is_refused():
    with pytest.raises(UserError, match=r"data\.transforms is a list of transforms"):
        build_transforms({"name": "Blur"}, CROP, PAD_COLOR)
