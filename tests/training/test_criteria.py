import pytest
import torch
import torch.nn.functional as F

from segtrain import UserError
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


def test_further_heads_count_by_the_auxiliary_weight(batch):
    scores, mask = batch
    heads = (scores, scores.flip(1), scores[..., :4])
    for weight in (0.4, 0.0, 1.5):
        criterion = CrossEntropy("valid", auxiliary_weight=weight)
        main, first, second = (criterion(head, mask) for head in heads)
        expected = main + weight * (first + second)
        torch.testing.assert_close(criterion(heads, mask), expected)
        torch.testing.assert_close(criterion([scores], mask), main)


def test_label_smoothing(batch):
    scores, mask = batch
    weights = [1.0, 2.0, 0.5, 3.0]
    for given in (None, weights):
        factors = None if given is None else torch.tensor(given)
        expected = F.cross_entropy(
            upsampled(scores), mask, factors, ignore_index=255, label_smoothing=0.1
        )
        smooth = CrossEntropy("valid", given, label_smoothing=0.1)
        torch.testing.assert_close(smooth(scores, mask), expected)


def test_a_class_of_an_image_is_a_label_map_of_one_pixel():
    torch.manual_seed(0)
    scores, classes = torch.randn(5, 1000), torch.tensor([3, 999, -1, 0, 300])
    criterion = CrossEntropy("valid", ignore_index=-1, label_smoothing=0.1)
    loss = criterion(scores[:, :, None, None], classes[:, None, None])
    expected = F.cross_entropy(scores, classes, ignore_index=-1, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def mined(scores, mask, threshold, min_kept, weights=None):
    """The loss of HRNet's code: sorted probabilities, the first `min_kept` or those below."""
    labelled = mask != 255
    losses = F.cross_entropy(upsampled(scores), mask, weights, ignore_index=255, reduction="none")
    label = mask.where(labelled, 0)
    probability = upsampled(scores).softmax(dim=1).gather(1, label[:, None])[:, 0][labelled]
    probability, order = probability.sort()
    least = probability[min(min_kept, len(probability) - 1)]
    kept = probability < max(least, threshold)
    factors = torch.ones(4) if weights is None else weights
    return losses[labelled][order][kept].sum() / factors[mask[labelled]][order][kept].sum()


@pytest.mark.parametrize(
    ("threshold", "min_kept"), [(0.9, 1), (0.2, 1), (0.2, 200), (0.2, 300), (1e-6, 1), (0.9, 383)]
)
def test_hard_examples_are_those_of_hrnet(batch, threshold, min_kept):
    scores, mask = batch
    for given in (None, [1.0, 2.0, 0.5, 3.0]):
        hard = {"threshold": threshold, "min_kept": min_kept}
        criterion = CrossEntropy("valid", given, hard_examples=hard)
        factors = None if given is None else torch.tensor(given)
        expected = mined(scores, mask, threshold, min_kept, factors)
        torch.testing.assert_close(criterion(scores, mask), expected)


def test_hard_examples_under_all_divide_by_all_pixels(batch):
    scores, mask = batch
    hard = {"threshold": 1e-6, "min_kept": 100}
    kept_share = 100 / mask.numel()
    valid = CrossEntropy("valid", hard_examples=hard)(scores, mask)
    all_pixels = CrossEntropy("all", hard_examples=hard)(scores, mask)
    torch.testing.assert_close(all_pixels, valid * kept_share)


@pytest.mark.parametrize("min_kept", [384, 385, 512, 131072])  # labelled: 384 of 512
def test_fewer_labelled_pixels_than_are_to_be_kept_all_count(batch, min_kept):
    scores, mask = batch
    hard = {"threshold": 1e-6, "min_kept": min_kept}
    criterion = CrossEntropy("valid", hard_examples=hard)
    torch.testing.assert_close(criterion(scores, mask), CrossEntropy("valid")(scores, mask))


def test_among_equally_hard_examples_no_more_are_kept_than_asked():
    """Float32 gives many pixels a loss of exactly 0; they are not to thin out the others."""
    scores = torch.tensor([[0.0, 0.0], [200.0, 200.0]]).T.reshape(2, 2, 1, 1).expand(2, 2, 8, 8)
    mask = torch.ones(2, 8, 8, dtype=torch.int64)
    mask[0, 0, :3] = 0
    criterion = CrossEntropy("valid", hard_examples={"min_kept": 6})
    torch.testing.assert_close(criterion(scores, mask), torch.tensor(100.0))


def test_each_head_has_hard_examples_of_its_own(batch):
    scores, mask = batch
    heads = (scores, scores.flip(1))
    hard = {"threshold": 0.2, "min_kept": 50}
    expected = mined(heads[0], mask, **hard) + 0.4 * mined(heads[1], mask, **hard)
    torch.testing.assert_close(CrossEntropy("valid", hard_examples=hard)(heads, mask), expected)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]])
@pytest.mark.parametrize("reduction", ["all", "valid"])
def test_hard_examples_of_a_batch_without_labels(batch, reduction, weights):
    scores, mask = batch
    scores.requires_grad_()
    loss = CrossEntropy(reduction, weights, hard_examples={})(scores, torch.full_like(mask, 255))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.eq(0).all()


def test_a_loss_that_is_not_a_number_is_among_the_hard_examples(batch):
    scores, mask = batch
    scores[1, :, 7, 7] = torch.nan
    assert CrossEntropy("valid", hard_examples={"min_kept": 1})(scores, mask).isnan()


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]])
def test_the_loss_waits_for_no_device(batch, weights):
    """Tensors without values: what depends on them (``item``, a boolean index) would fail."""
    scores, mask = (tensor.to("meta") for tensor in batch)
    criterion = CrossEntropy("valid", weights, hard_examples={}, label_smoothing=0.1).to("meta")
    criterion((scores.requires_grad_(), scores), mask).backward()
    with pytest.raises((NotImplementedError, RuntimeError)):
        mask[mask != 255]
    with pytest.raises(RuntimeError):
        scores.sum().item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hard_examples": {"treshold": 0.7}}, "hard_examples.*did you mean 'threshold'"),
        ({"hard_examples": {"threshold": 0}}, "hard_examples.threshold lies between 0 and 1"),
        ({"hard_examples": {"threshold": "low"}}, "hard_examples.threshold lies between"),
        ({"hard_examples": {"min_kept": 0}}, "hard_examples.min_kept is a whole number"),
        ({"hard_examples": {"min_kept": 0.5}}, "hard_examples.min_kept is a whole number"),
        ({"label_smoothing": 1.5}, "label_smoothing lies between 0 and 1, not at 1.5"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        CrossEntropy("valid", **arguments)


def test_balanced_weights_average_to_one_over_the_pixels():
    counts = torch.tensor([400, 100, 100, 0])
    weights = balanced_weights(counts)
    assert weights[1] == weights[2] == pytest.approx(2 * weights[0])
    assert sum(w * c for w, c in zip(weights, counts.tolist(), strict=True)) == pytest.approx(600)
    assert weights[3] == 1


def test_balanced_weights_have_a_limit():
    assert balanced_weights(torch.tensor([1_000_000, 1]))[1] == 3
