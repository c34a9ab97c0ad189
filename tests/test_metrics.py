"""Accuracy against a plain NumPy reference."""

import numpy as np
import pytest
import torch
import torch.distributed
from torch.multiprocessing import spawn

from segtrain.metrics import (
    ConfusionMatrix,
    count_pairs,
    intersection_over_union,
    mean_iou,
    pixel_accuracy,
)

CLASSES = 7


def random_maps(generator, count=3, present=CLASSES):
    """Labels with ignored pixels and predictions over the first classes only."""
    mask = generator.integers(0, present, (count, 13, 17))
    mask[generator.random(mask.shape) < 0.1] = 255
    prediction = generator.integers(0, present, mask.shape)
    return torch.from_numpy(prediction), torch.from_numpy(mask)


def numpy_iou(predictions, masks):
    ious = []
    for k in range(CLASSES):
        intersection = union = 0
        for prediction, mask in zip(predictions, masks, strict=True):
            prediction, mask = prediction.numpy(), mask.numpy()
            counted = mask != 255
            intersection += np.sum((prediction == k) & (mask == k) & counted)
            union += np.sum(((prediction == k) | (mask == k)) & counted)
        ious.append(intersection / union if union else np.nan)
    return np.array(ious)


@pytest.mark.parametrize("present", [CLASSES, 4])
def test_iou_equals_a_numpy_reference_over_several_batches(present):
    generator = np.random.default_rng(present)
    batches = [random_maps(generator, present=present) for _ in range(4)]
    confusion = ConfusionMatrix(CLASSES)
    for prediction, mask in batches:
        confusion.update(prediction, mask)
    expected = numpy_iou(*zip(*batches, strict=True))
    matrix = confusion.compute()[0]
    np.testing.assert_allclose(intersection_over_union(matrix).numpy(), expected, equal_nan=True)
    assert mean_iou(matrix).item() == pytest.approx(np.nanmean(expected))
    right = sum(int((p == m).sum()) for p, m in batches)
    counted = sum(int((m != 255).sum()) for _, m in batches)
    assert pixel_accuracy(matrix).item() == pytest.approx(right / counted)


def test_settings_are_counted_side_by_side():
    generator = np.random.default_rng(0)
    confusion = ConfusionMatrix(CLASSES, num_settings=2)
    first, second = random_maps(generator), random_maps(generator)
    confusion.update(*first, setting=0)
    confusion.update(*second, setting=1)
    for row, pair in enumerate((first, second)):
        torch.testing.assert_close(confusion.compute()[row], count_pairs(*pair, CLASSES))


def test_a_class_that_occurs_nowhere_follows_the_named_convention():
    matrix = torch.tensor([[2, 0, 1], [0, 0, 0], [0, 0, 0]])  # 1 nowhere, 2 only predicted
    thirds = 2 / 3
    expected = {
        "nan": [thirds, torch.nan, 0.0],
        "unlabelled_nan": [thirds, torch.nan, torch.nan],
        "one": [thirds, 1.0, 0.0],
        "zero": [thirds, 0.0, 0.0],
    }
    for absent, values in expected.items():
        iou = intersection_over_union(matrix, absent)
        torch.testing.assert_close(iou, torch.tensor(values).double(), equal_nan=True)


def test_only_ignored_pixels_give_nan():
    mask = torch.full((1, 4, 4), 255)
    matrix = count_pairs(torch.zeros_like(mask), mask, CLASSES)
    assert matrix.sum() == 0
    assert mean_iou(matrix).isnan()


def test_labels_may_be_bytes():
    prediction, mask = random_maps(np.random.default_rng(1))
    small = count_pairs(prediction.byte(), mask.byte(), CLASSES)
    torch.testing.assert_close(small, count_pairs(prediction, mask, CLASSES))


def score_on_one_of_two_ranks(rank, file, results):
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    generator = np.random.default_rng(2)
    confusion = ConfusionMatrix(CLASSES)
    for i in range(5):  # rank 0 scores three batches, rank 1 two
        prediction, mask = random_maps(generator)
        if i % 2 == rank:
            confusion.update(prediction, mask)
    results[rank] = confusion.compute()
    torch.distributed.destroy_process_group()


def test_two_ranks_with_an_uneven_split_count_every_image_once(tmp_path):
    results = torch.zeros(2, 1, CLASSES, CLASSES, dtype=torch.int64).share_memory_()
    spawn(score_on_one_of_two_ranks, (tmp_path / "rendezvous", results), nprocs=2)
    generator = np.random.default_rng(2)
    total = sum(count_pairs(*random_maps(generator), CLASSES) for _ in range(5))
    torch.testing.assert_close(results[0, 0], total)
    torch.testing.assert_close(results[1, 0], total)
