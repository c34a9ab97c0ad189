"""The set criterion against the official one and a slow one, and at the edges."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensorMode

from segtrain.networks.mask_prediction import MaskPrediction, MaskPredictions
from segtrain.training import SetCriterion, mask_classification
from segtrain.training.mask_targets import Targets, sample_labels, surround
from tests.training.recorded_criterion import LOSS, Replayed, official_points, official_targets

REFERENCE = Path("tests/reference/mask2former_proscale")
OUTPUTS = load_file(REFERENCE / "proscale_micro_io.safetensors")


class Recorded(SetCriterion):
    """Keeps the points that it draws, and the pairs that it finds."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.drawn = []

    def random_points(self, rows, number, device):
        self.drawn.append(super().random_points(rows, number, device))
        return self.drawn[-1]


def official_predictions():
    names = ("", "aux0.", "aux1.", "aux2.")
    return MaskPredictions(
        tuple(
            MaskPrediction(OUTPUTS[f"base/{n}pred_logits"], OUTPUTS[f"base/{n}pred_masks"])
            for n in names
        )
    )


def test_losses_and_matches_of_the_official_code(monkeypatch):
    targets, predictions = official_targets(), official_predictions()
    criterion = Replayed(official_points(), num_points=64)
    maps = surround(targets.maps, (64, 96))
    pairs = criterion.match(predictions, targets, maps)
    for head, (queries, found) in enumerate(pairs):
        expected = [
            [image * 10 + query, first + mask]
            for image, first in ((0, 0), (1, 4))
            for query, mask in zip(*LOSS["matches"][head][image], strict=True)
        ]
        assert torch.stack((queries, found), dim=1).tolist() == expected
        losses = criterion.losses(predictions.heads[head], targets, maps, queries, found)
        suffix = f"_{head - 1}" if head else ""
        names = [f"loss_{name}{suffix}" for name in ("ce", "mask", "dice")]
        for name, loss in zip(names, losses, strict=True):
            assert loss.item() == pytest.approx(LOSS["unweighted"][name], rel=1e-5), name
    criterion = Replayed(official_points(), num_points=64)
    total = criterion.loss(predictions, targets).item()
    assert total == pytest.approx(LOSS["weighted_total"], rel=1e-5)
    weighted = Replayed(official_points(), num_points=64)
    loss = weighted.loss(predictions._replace(weight=3.0), targets)
    assert loss.item() == pytest.approx(3 * total, rel=1e-6)


def random_predictions(queries, classes, size, heads=2, batch=2, scale=3.0):
    return MaskPredictions(
        tuple(
            MaskPrediction(
                torch.randn(batch, queries, classes + 1, requires_grad=True),
                (scale * torch.randn(batch, queries, *size)).requires_grad_(),
            )
            for _ in range(heads)
        )
    )


def values_at(mask, points):
    """Of one map (h, w) at points (P, 2)."""
    return F.grid_sample(mask[None, None], 2 * points[None, None] - 1, align_corners=False)[0, 0, 0]


def dice(inside, wanted):
    return 1 - (2 * (inside * wanted).sum() + 1) / (inside.sum() + wanted.sum() + 1)


def slow_loss(predictions, mask, drawn, points, padded):
    """As the paper has it: one head, one image and one pair at a time."""
    wanted = []
    for labels in mask:
        classes = [c for c in labels.unique().tolist() if c != 255]
        whole = torch.zeros(len(classes), *padded)
        for number, kind in enumerate(classes):
            whole[number, : labels.shape[0], : labels.shape[1]] = labels == kind
        wanted.append((classes, whole))
    divisor = max(1, sum(len(classes) for classes, _ in wanted))
    drawn = iter(drawn)
    of_matching = [next(drawn) for _ in predictions.heads]
    total = 0.0
    for (logits, masks), where in zip(predictions.heads, of_matching, strict=True):
        kinds = logits.shape[2]
        said = torch.full(logits.shape[:2], kinds - 1)
        pairs = []
        for image, (classes, whole) in enumerate(wanted):
            costs = torch.zeros(masks.shape[1], len(classes))
            for query in range(len(costs)):
                x = values_at(masks[image, query].detach(), where[image])
                for number, kind in enumerate(classes):
                    t = values_at(whole[number], where[image])
                    costs[query, number] = (
                        5 * F.binary_cross_entropy_with_logits(x, t)
                        - 2 * logits[image, query].detach().softmax(0)[kind]
                        + 5 * dice(x.sigmoid(), t)
                    )
            for query, number in zip(*linear_sum_assignment(costs.numpy()), strict=True):
                said[image, query] = classes[number]
                pairs.append((masks[image, query], whole[number]))
        many, others = next(drawn), next(drawn)
        weight = torch.tensor([1.0] * (kinds - 1) + [0.1])
        total = total + 2 * F.cross_entropy(logits.flatten(0, 1), said.flatten(), weight)
        for (predicted, true), candidates, rest in zip(pairs, many, others, strict=True):
            certainty = values_at(predicted.detach(), candidates).abs()
            chosen = certainty.argsort()[: points - len(rest)]
            at = torch.cat((candidates[chosen], rest))
            x, t = values_at(predicted, at), values_at(true, at)
            total = total + 5 / divisor * F.binary_cross_entropy_with_logits(x, t)
            total = total + 5 / divisor * dice(x.sigmoid(), t)
    return total


@pytest.mark.parametrize("queries", [8, 3])  # more than there are masks, and fewer
def test_a_slow_criterion_agrees_in_loss_and_gradients(queries):
    """On images that are padded, with ignored pixels."""
    torch.manual_seed(0)
    mask = torch.randint(0, 5, (2, 5, 7)).repeat_interleave(8, 1).repeat_interleave(8, 2)[..., :50]
    mask[0, :9], mask[1, :, 20:] = 255, 2
    predictions = random_predictions(queries, 6, (16, 16))
    criterion = Recorded(num_points=40)
    loss = criterion(predictions, mask)
    expected = slow_loss(predictions, mask, criterion.drawn, 40, (64, 64))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    inputs = [tensor for head in predictions.heads for tensor in head]
    for ours, theirs in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert ours.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_targets():
    labels = torch.tensor([[[0, 2], [2, 255]], [[255, 255], [255, 255]], [[1, 1], [1, 1]]])
    targets = SetCriterion().targets(labels, 3)
    assert targets.counts == (2, 0, 1)
    assert targets.images.tolist() == [0, 0, 2]
    assert targets.classes.tolist() == targets.labels.tolist() == [0, 2, 1]
    assert targets.layers.tolist() == [0, 0, 0]
    assert targets.divisor.item() == 3
    other = SetCriterion(ignore_index=0).targets(labels[:1].clamp(max=2), 3)
    assert other.classes.tolist() == [2]


def test_points_of_label_maps_are_those_of_masks():
    """At the edges of the image and of its padding too."""
    torch.manual_seed(0)
    maps = torch.randint(0, 3, (2, 2, 5, 6))
    points = torch.cat(
        (torch.rand(4, 50, 2), torch.tensor([[0.0, 0], [1, 1], [0, 1]]).repeat(4, 1, 1)), 1
    )
    labels = torch.tensor([[0, 1, 2], [2, 1, 0], [0, 0, 1], [2, 2, 2]])
    found = sample_labels(
        surround(maps, (8, 9)).flatten(0, 1), torch.tensor([0, 3, 1, 1]), labels, points
    )
    for row, (number, kinds) in enumerate(zip([0, 3, 1, 1], labels, strict=True)):
        for column, kind in enumerate(kinds):
            mask = F.pad((maps.flatten(0, 1)[number] == kind).float(), (0, 3, 0, 3))
            expected = values_at(mask, points[row])
            torch.testing.assert_close(found[row, column], expected, rtol=0, atol=1e-5)


def test_nothing_but_ignored_pixels():
    """The queries learn that nothing is there, and the masks nothing, but none is left out."""
    torch.manual_seed(0)
    predictions = random_predictions(4, 3, (8, 8))
    loss = SetCriterion(num_points=16)(predictions, torch.full((2, 32, 32), 255))
    loss.backward()
    nothing = torch.full((2, 4), 3)
    expected = sum(
        2 * F.cross_entropy(h.classes.transpose(1, 2), nothing) for h in predictions.heads
    )
    torch.testing.assert_close(loss, expected)
    for head in predictions.heads:
        assert head.classes.grad.any()
        assert not head.masks.grad.any()


def test_masks_are_averaged_over_the_processes(monkeypatch):
    labels = torch.arange(4).repeat(2, 8, 2)
    assert SetCriterion().targets(labels, 4).divisor.item() == 8
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    # No other process has a mask.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total)
    assert SetCriterion().targets(labels, 4).divisor.item() == 2
    assert SetCriterion().targets(labels[:, :, :1], 4).divisor.item() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["classes", "masks"])
def test_what_is_no_number_reaches_the_loss(field, value):
    """Of a query that finds nothing too."""
    torch.manual_seed(0)
    predictions = random_predictions(4, 3, (8, 8), heads=1)
    with torch.no_grad():
        getattr(predictions.heads[0], field)[0, 2] = value
    loss = SetCriterion(num_points=16)(predictions, torch.zeros(2, 32, 32, dtype=torch.int64))
    assert not loss.isfinite()


def test_half_precision(monkeypatch):
    """Numbers in bfloat16 are computed with in float32, under autocast too."""
    costs, assign = [], mask_classification.assign

    def recorded(found, counts):
        costs.append(found)
        return assign(found, counts)

    monkeypatch.setattr(mask_classification, "assign", recorded)
    torch.manual_seed(0)
    mask = torch.randint(0, 3, (2, 32, 32))
    halves = MaskPredictions(
        tuple(
            MaskPrediction(head.classes.bfloat16(), head.masks.bfloat16())
            for head in random_predictions(4, 3, (8, 8)).heads
        )
    )
    exact = MaskPredictions(
        tuple(MaskPrediction(*(t.float() for t in head)) for head in halves.heads)
    )
    losses = []
    for predictions, autocast in ((exact, False), (halves, False), (halves, True)):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(SetCriterion(num_points=64)(predictions, mask))
        assert losses[-1].dtype == torch.float32
        assert losses[-1] == losses[0]
        assert costs[-1].equal(costs[0])


def test_the_device_is_waited_for_twice(monkeypatch):
    """Once for the classes, once for all costs: all else does without a single value."""
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: copies.append(t.shape) or cpu(t))
    predictions = random_predictions(5, 3, (8, 8), heads=3)
    mask = torch.randint(0, 3, (2, 32, 32))
    criterion = SetCriterion(num_points=16)
    criterion(predictions, mask).backward()
    assert copies == [(2, 3), (3, 2, 5, 3)]

    # Fake tensors have no values: what asked for one would raise.
    assigned = []
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def assign(costs, counts):
            assigned.append(costs.shape)
            return torch.zeros(3, 2, sum(counts), dtype=torch.int64)

        monkeypatch.setattr(mask_classification, "assign", assign)
        fake = MaskPredictions(
            tuple(
                MaskPrediction(*(mode.from_tensor(t).to("cuda") for t in head))
                for head in predictions.heads
            )
        )
        flat = torch.zeros(6, dtype=torch.int64, device="cuda")
        maps = torch.zeros(2, 1, 32, 32, dtype=torch.int64, device="cuda")
        divisor = torch.ones((), device="cuda")
        targets = Targets(maps, flat, flat, flat, flat, (3, 3), divisor)
        loss = criterion.loss(fake, targets)
    assert assigned == [(3, 2, 5, 3)]
    assert loss.device.type == "cuda"
