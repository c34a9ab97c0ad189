from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from callbacks.cost_curve import CostCurve, find_front
from callbacks.jsonl import read_rows
from callbacks.pictures import Pictures
from segtrain import UserError, measure_cost
from segtrain.networks import Network
from segtrain.training import SegmentationModule
from tests.callbacks.tiny import (
    NUM_CLASSES,
    NUM_IMAGES,
    TinyData,
    create_module,
    create_trainer,
)


def brute_force(module, data, setting, indices=range(NUM_IMAGES)):
    """IoU of each class, image by image, in NumPy."""
    counts = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    for index in indices:
        sample = data.val[index]
        batch = {key: torch.as_tensor(sample[key])[None] for key in ("image", "mask")}
        image = data.on_after_batch_transfer(batch, 0)["image"]
        with torch.no_grad(), module.network.using(setting):
            scores = module.network.eval()(image)
        for size in (image.shape[2:], sample["mask"].shape):
            scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
        prediction, mask = scores[0].argmax(0).numpy(), sample["mask"]
        for label in range(NUM_CLASSES):
            for predicted in range(NUM_CLASSES):
                counts[label, predicted] += ((mask == label) & (prediction == predicted)).sum()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return np.where(union > 0, counts.diagonal() / np.maximum(union, 1), np.nan)


def test_every_setting_is_scored_as_if_alone(tmp_path):
    module, data = create_module(), TinyData()
    curve = CostCurve(tmp_path, latency=False)
    create_trainer([curve], num_sanity_val_steps=1).fit(module, data)
    assert [(row["step"], row["setting"]) for row in curve.rows] == [
        (step, name) for step in (2, 4) for name in module.network.settings
    ]
    accuracies = set()
    for row in curve.rows[-len(module.network.settings) :]:
        expected = brute_force(module, data, row["setting"])
        np.testing.assert_allclose(list(row["IoU"].values()), expected, atol=2e-4)
        assert row["mIoU"] == pytest.approx(np.nanmean(expected), abs=2e-4)
        assert row["images"] == NUM_IMAGES
        assert row["values"] == module.network.settings[row["setting"]].values
        cost = measure_cost(module.network, (64, 64), row["setting"], latency=False)
        assert row["cost"]["macs"] == cost.macs
        assert row["cost"]["latency_ms"] is None
        accuracies.add(row["mIoU"])
    assert len(accuracies) > 1
    assert [row["training_setting"] for row in curve.rows[:5]] == [True] + 4 * [False]
    assert read_rows(tmp_path / "curve.jsonl") == curve.rows


def test_another_label_may_be_the_one_that_counts_nowhere(tmp_path):
    usual, data = create_module(), TinyData()
    curve = CostCurve(tmp_path, latency=False)
    create_trainer([curve]).validate(usual, data)
    data.val.masks = np.where(data.val.masks == 255, -1, data.val.masks.astype(np.int64))
    other = SegmentationModule(
        usual.network, usual.criterion, usual.optimizer, usual.schedule, ignore_index=-1
    )
    other_curve = CostCurve(tmp_path, latency=False)
    create_trainer([other_curve]).validate(other, data)
    assert [row["IoU"] for row in other_curve.rows] == [row["IoU"] for row in curve.rows]
    assert other.confusion.compute().equal(usual.confusion.compute())


def test_images_are_read_once_whatever_the_number_of_settings(tmp_path):
    data = TinyData()
    callbacks = [CostCurve(tmp_path, latency=False), Pictures(tmp_path)]
    create_trainer(callbacks).validate(create_module(), data)
    assert data.val.reads == [1] * NUM_IMAGES


def test_forward_passes_are_one_for_each_setting(tmp_path):
    module = create_module()
    used = []
    module.network.register_forward_pre_hook(lambda net, args: used.append(net.setting.name))
    settings = ["isr_1111_222", {"encoder": [16, 8, 2, 1], "decoder": [2, 4, 8]}]
    curve = CostCurve(tmp_path, settings, latency=False)
    create_trainer([curve]).validate(module, TinyData())
    names = [row["setting"] for row in curve.rows]
    assert names[:2] == ["full", "isr_1111_222"]
    assert curve.rows[2]["values"] == {"encoder": [16, 8, 2, 1], "decoder": [2, 4, 8]}
    batches = math.ceil(NUM_IMAGES / 2)
    assert [used[: 3 * batches].count(name) for name in names] == [batches] * 3


def test_limited_batches_score_all_settings_on_the_same_images(tmp_path):
    module, data = create_module(), TinyData()
    curve = CostCurve(tmp_path, ["isr_4444_444"], limit_batches=2, latency=False)
    create_trainer([curve]).validate(module, data)
    assert [row["images"] for row in curve.rows] == [4, 4]
    for row in curve.rows:
        expected = brute_force(module, data, row["setting"], range(4))
        np.testing.assert_allclose(list(row["IoU"].values()), expected, atol=2e-4)


def test_every_second_validation_and_the_last(tmp_path):
    curve = CostCurve(tmp_path, every=2, latency=False)
    create_trainer([curve], steps=5, validate_every=1).fit(create_module(), TinyData())
    assert sorted({row["step"] for row in curve.rows}) == [2, 4, 5]


def test_settings_run_under_the_trainers_precision(tmp_path):
    module, autocast = create_module(), {}
    module.network.register_forward_pre_hook(
        lambda net, args: autocast.update({net.setting.name: torch.is_autocast_enabled("cpu")})
    )
    curve = CostCurve(tmp_path, latency=False)
    create_trainer([curve], precision="bf16-mixed").validate(module, TinyData())
    assert autocast == dict.fromkeys(module.network.settings, True)


def test_unknown_setting_stops_before_training(tmp_path):
    module, data = create_module(), TinyData()
    trainer = create_trainer([CostCurve(tmp_path, ["isr_2211_22"])])
    with pytest.raises(UserError, match=r"callbacks\.cost_curve\.settings.*did you mean 'isr_2211"):
        trainer.fit(module, data)
    assert sum(data.train.reads) == 0


def test_latency_is_measured_once(tmp_path, monkeypatch):
    measured = []

    def measure(network, size, setting, device, *, images, latency):
        assert images is None
        measured.append((setting.name, size, latency))
        cost = measure_cost(network, size, setting, device, latency=False)
        return dataclasses.replace(cost, latency_ms=2.0, latency_spread_ms=(1.0, 3.0))

    monkeypatch.setattr("callbacks.setting_costs.measure_cost", measure)
    module, curve = create_module(), CostCurve(tmp_path)
    create_trainer([curve]).fit(module, TinyData())
    assert measured == [(name, (64, 64), True) for name in module.network.settings]
    cost = curve.rows[-1]["cost"]
    assert (cost["latency_low_ms"], cost["latency_ms"], cost["latency_high_ms"]) == (1, 2, 3)


class Unreduced(Network):
    def __init__(self):
        super().__init__(NUM_CLASSES, stride=8)
        self.convolution = nn.Conv2d(3, NUM_CLASSES, 8, 8)

    def forward(self, images):
        return self.convolution(images)


def test_network_without_a_reduction_is_one_point(tmp_path):
    curve = CostCurve(tmp_path, latency=False)
    create_trainer([curve]).fit(create_module(network=Unreduced()), TinyData())
    assert [(row["step"], row["setting"]) for row in curve.rows] == [(2, "full"), (4, "full")]
    assert all(row["on_front"] for row in curve.rows)


def test_ranks_other_than_zero_count_but_do_not_write(tmp_path, monkeypatch):
    module, curve = create_module(), CostCurve(tmp_path, latency=False)
    trainer = create_trainer([curve])
    sums = []
    strategy = type(trainer.strategy)
    reduce = strategy.reduce
    monkeypatch.setattr(
        strategy, "reduce", lambda self, *a, **k: sums.append(a) or reduce(self, *a, **k)
    )
    monkeypatch.setattr(strategy, "is_global_zero", property(lambda self: False))
    trainer.validate(module, TinyData())
    # Took part in the sum of images, or rank zero would wait for ever.
    assert [int(a[0]) for a in sums].count(NUM_IMAGES) == 1
    assert not curve.rows
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(4, 0.5), (3, 0.4), (2, 0.45), (1, 0.1)], [True, False, True, True]),
        ([(1, 0.5), (2, 0.5)], [True, False]),
        ([(1, 0.5), (1, 0.6)], [False, True]),
        ([(1, 0.5), (1, 0.5)], [True, True]),
        ([(1, math.nan), (2, 0.3)], [False, True]),
        ([(7, 0.0)], [True]),
    ],
)
def test_front(points, front):
    assert find_front(*zip(*points, strict=True)) == front
