import pytest
import torch
import torch.nn.functional as F

from segtrain.training import CrossEntropy, balanced_weights


@pytest.fixture
def batch():
    torch.manual_seed(0)
    scores, mask = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 16, 16))
    mask[:, :4] = 255
    return scores, mask


def upsampled(scores):
    return F.interpolate(scores, size=(16, 16), mode="bilinear", align_corners=False)


def test_valid_is_the_mean_over_labelled_pixels(batch):
    scores, mask = batch
    expected = F.cross_entropy(upsampled(scores), mask, ignore_index=255)
    torch.testing.assert_close(CrossEntropy("valid")(scores, mask), expected)


def test_all_counts_ignored_pixels_as_zero(batch):
    scores, mask = batch
    labelled = (mask != 255).float().mean()
    valid = CrossEntropy("valid")(scores, mask)
    torch.testing.assert_close(CrossEntropy("all")(scores, mask), valid * labelled)


def test_class_weights(batch):
    scores, mask = batch
    weights = [1.0, 2.0, 0.5, 3.0]
    expected = F.cross_entropy(upsampled(scores), mask, torch.tensor(weights), ignore_index=255)
    torch.testing.assert_close(CrossEntropy("valid", weights)(scores, mask), expected)


@pytest.mark.parametrize("reduction", ["all", "valid"])
def test_a_batch_without_labels_gives_zero(batch, reduction):
    scores, mask = batch
    assert CrossEntropy(reduction)(scores, torch.full_like(mask, 255)).item() == 0


def test_balanced_weights_average_to_one_over_the_pixels():
    counts = torch.tensor([400, 100, 100, 0])
    weights = balanced_weights(counts)
    assert weights[1] == weights[2] == pytest.approx(2 * weights[0])
    assert sum(w * c for w, c in zip(weights, counts.tolist(), strict=True)) == pytest.approx(600)
    assert weights[3] == 1


def test_balanced_weights_have_a_limit():
    assert balanced_weights(torch.tensor([1_000_000, 1]))[1] == 3
