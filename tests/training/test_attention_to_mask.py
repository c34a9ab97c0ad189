"""The loss of attention to mask against the official one, and at the edges."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from segtrain import UserError, create_network
from segtrain.networks.mask_prediction import MaskPrediction
from segtrain.training import AttentionToMaskLoss, CrossEntropy
from segtrain.training.attention_to_mask import losses

REFERENCE = Path("tests/reference/plain_vit")
TENSORS = load_file(REFERENCE / "segvit_atm_micro_io.safetensors")
LOSSES = json.loads((REFERENCE / "segvit_atm_micro.json").read_text())["losses"]
LABELS = TENSORS["gt"][:, 0].long()
CRITERION = {
    "reduction": "valid",
    "class_weights": "balanced",
    "auxiliary_weight": 0.4,
    "hard_examples": None,
    "label_smoothing": 0.0,
}


@pytest.fixture
def predictions():
    """Of the two heads whose masks are stored whole."""
    return [
        MaskPrediction(TENSORS[f"train.aux{i}.pred_logits"], TENSORS[f"train.aux{i}.pred_masks"])
        for i in (0, 1)
    ]


def test_losses_of_the_official_code(predictions):
    criterion, total = AttentionToMaskLoss(), 0.0
    targets = criterion.targets(LABELS, 7)
    for number, prediction in enumerate(predictions):
        expected = [LOSSES[f"loss_{name}_{number}"] for name in ("ce", "mask", "dice")]
        found = [loss.item() for loss in losses(prediction, targets, (128, 128))]
        assert found == pytest.approx(expected, abs=1e-4)
        total += sum(expected)
    assert criterion(predictions, LABELS).item() == pytest.approx(total, abs=1e-4)


def test_classes_of_the_main_head(predictions):
    """The third head's, whose masks are stored at a part of the image's pixels."""
    head = MaskPrediction(TENSORS["train.pred_logits"], predictions[0].masks)
    targets = AttentionToMaskLoss().targets(LABELS, 7)
    found, *_ = losses(head, targets, (128, 128))
    assert found.item() == pytest.approx(LOSSES["loss_ce"], abs=1e-4)


def test_targets():
    labels = torch.tensor([[[0, 2], [2, 255]], [[255, 255], [255, 255]]])
    targets = AttentionToMaskLoss().targets(labels, 3)
    assert targets.present.tolist() == [[True, False, True], [False, False, False]]
    assert targets.images.tolist() == [0, 0]
    assert targets.classes.tolist() == [0, 2]
    assert targets.masks.tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    assert targets.divisor.item() == 2
    other = AttentionToMaskLoss(ignore_index=0).targets(labels.clamp(max=2), 3)
    assert other.classes.tolist() == [2, 2]


def test_nothing_but_ignored_pixels(predictions):
    """The queries learn that nothing is there, and the masks nothing."""
    heads = [MaskPrediction(*(t.clone().requires_grad_() for t in p)) for p in predictions]
    loss = AttentionToMaskLoss()(heads, torch.full_like(LABELS, 255))
    loss.backward()
    targets = torch.full((2, 7), 7)
    expected = sum(
        torch.nn.functional.cross_entropy(head.classes.transpose(1, 2), targets) for head in heads
    )
    torch.testing.assert_close(loss, expected)
    for head in heads:
        assert head.classes.grad.any()
        assert not head.masks.grad.any()


def test_classes_that_are_there_or_not(predictions):
    """Of two kinds, every class's presence is the first."""
    targets = AttentionToMaskLoss().targets(LABELS[:, :40, :40], 7)
    there = targets.present[..., None].float() * torch.tensor([20.0, -20.0]) + torch.tensor(
        [-10, 10]
    )
    head = MaskPrediction(there, predictions[0].masks)
    right, *_ = losses(head, targets, (40, 40))
    wrong, *_ = losses(head._replace(classes=-there), targets, (40, 40))
    assert right.item() == pytest.approx(0, abs=1e-6)
    assert wrong.item() == pytest.approx(20, abs=1e-4)


def test_masks_are_averaged_over_the_processes(predictions, monkeypatch):
    criterion = AttentionToMaskLoss()
    alone = losses(predictions[0], criterion.targets(LABELS, 7), (128, 128))
    count = criterion.targets(LABELS, 7).divisor.item()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    # The other process has no mask.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total)
    targets = criterion.targets(LABELS, 7)
    assert targets.divisor.item() == count / 2
    together = losses(predictions[0], targets, (128, 128))
    torch.testing.assert_close(torch.stack(together[1:]), 2 * torch.stack(alone[1:]))
    assert together[0] == alone[0]


def test_half_precision(predictions):
    halves = [MaskPrediction(*(t.bfloat16() for t in p)) for p in predictions]
    exact, rounded = (AttentionToMaskLoss()(heads, LABELS) for heads in (predictions, halves))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


def build(name, **criterion):
    config = {"criterion": CRITERION | criterion, "model": {"name": name}, "task": "fit"}
    data = SimpleNamespace(ignore_index=255, class_counts=lambda: torch.tensor([1, 2, 3]).numpy())
    with torch.device("meta"):
        network = create_network(name, 3)
    return train.build_criterion(config, network, data)


def test_a_network_chooses_its_criterion():
    assert isinstance(build("segvit_b"), AttentionToMaskLoss)
    assert isinstance(build("dtop_b", class_weights=None), AttentionToMaskLoss)
    assert isinstance(build("rtformer_slim"), CrossEntropy)


@pytest.mark.parametrize(
    "criterion",
    [{"class_weights": [1, 1, 2]}, {"hard_examples": {}}, {"label_smoothing": 0.1}],
)
def test_options_of_the_cross_entropy_alone(criterion):
    key = next(iter(criterion))
    with pytest.raises(UserError, match=f"^criterion.{key} is of the cross-entropy, and dtop_b"):
        build("dtop_b", **criterion)
