"""Costs that depend on the image, and thresholds for budgets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.averaging import ExponentialMovingAverage
from callbacks.cost_curve import CostCurve, resolve_settings
from callbacks.jsonl import JsonLinesLogger, read_rows
from callbacks.setting_costs import cut_middle
from segtrain import UserError, measure_cost
from segtrain.inference import Inference
from segtrain.training import SegmentationModule
from tests.callbacks.tiny import NUM_IMAGES, TinyData, create_module, create_trainer
from tests.stopping import Stopping

BUDGET = 4.3e-4  # GMACs; the network takes 4.01e-4 to 4.67e-4 for 64 tokens


def images_for_cost(data, count, size=(64, 64)):
    first = [round(i * (NUM_IMAGES - 1) / (count - 1)) for i in range(count)]
    batch = {key: torch.as_tensor(data.val.images[first][:, :, ::2]) for key in ("image", "mask")}
    return cut_middle(data.on_after_batch_transfer(batch, 0)["image"], size)


class MeasureWhatIsScored(Callback):
    """The costs of the network as it is while it scores."""

    def __init__(self, count):
        self.count = count
        self.rows = {}

    def on_validation_batch_end(self, trainer, pl_module, *args):
        images = images_for_cost(trainer.datamodule, self.count)
        for name in pl_module.network.settings:
            cost = measure_cost(pl_module.network, setting=name, images=images, latency=False)
            self.rows[trainer.global_step, name] = cost


@pytest.mark.parametrize("averaged", [False, True])
def test_costs_that_depend_on_the_image_are_those_of_the_weights_scored(tmp_path, averaged):
    average = [ExponentialMovingAverage(decay=0.5)] if averaged else []
    curve, measured = CostCurve(tmp_path, latency=False, cost_images=3), MeasureWhatIsScored(3)
    module, data = create_module(network=Stopping()), TinyData()
    module.optimizer = dataclasses.replace(module.optimizer, learning_rate=0.01)
    create_trainer([*average, curve, measured]).fit(module, data)
    assert [row["step"] for row in curve.rows] == [2] * 3 + [4] * 3
    for row in curve.rows:
        cost, expected = row["cost"], measured.rows[row["step"], row["setting"]]
        assert (cost["macs"], cost["image_size"]) == (expected.macs, [64, 64])
        if row["setting"] == "full":
            assert (cost["gmacs_std"], cost["gmacs_worst"]) == (None, None)
        else:
            assert cost["gmacs_std"] == expected.macs_std / 1e9 > 0
            assert cost["gmacs_worst"] == expected.macs_worst / 1e9 > cost["gmacs"]
    before, after = (
        [row["cost"]["macs"] for row in rows] for rows in (curve.rows[:3], curve.rows[3:])
    )
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, False]
    assert sum(data.val.reads) == 2 * NUM_IMAGES + 3


def test_costs_that_depend_on_the_image_are_timed(tmp_path):
    curve = CostCurve(tmp_path, ["half"], cost_images=2)
    create_trainer([curve]).validate(create_module(network=Stopping()), TinyData())
    cost = curve.rows[0]["cost"]
    assert 0 < cost["latency_low_ms"] <= cost["latency_ms"] <= cost["latency_high_ms"]


@pytest.mark.parametrize("of_window", [False, True])
def test_cost_of_a_window_or_of_the_whole_image(tmp_path, of_window):
    module, curve = create_module(network=Stopping()), CostCurve(tmp_path, latency=False)
    module.network.cost_of_window = of_window
    module.inference = Inference("slide", window=(32, 96), stride=(16, 96))
    create_trainer([curve]).validate(module, TinyData())
    height, width = TinyData().image_size_for_cost
    assert (height, width) == (64, 64)
    expected = (32, 64) if of_window else (64, 64)
    assert {tuple(row["cost"]["image_size"]) for row in curve.rows} == {expected}


def test_a_threshold_is_chosen_for_a_budget_before_every_validation(tmp_path):
    settings = [{"budget_gmacs": BUDGET}, "full"]
    curve = CostCurve(tmp_path, settings, latency=False)
    module = create_module(network=Stopping())
    module.optimizer = dataclasses.replace(module.optimizer, learning_rate=0.01)
    trainer = create_trainer([curve], [JsonLinesLogger(tmp_path)], num_sanity_val_steps=1)
    trainer.fit(module, TinyData())
    assert [row["setting"] for row in curve.rows] == ["half", "budget_0.00043", "full"] * 2
    rows = [row for row in curve.rows if row["setting"] == "budget_0.00043"]
    for row in rows:
        assert row["cost"]["gmacs"] == pytest.approx(BUDGET, rel=0.01)
        assert row["values"] == {"threshold": row["threshold"], "above": True}
        assert not row["training_setting"]
    assert rows[0]["threshold"] != rows[1]["threshold"]
    assert {row["threshold"] for row in curve.rows if row not in rows} == {None}
    key, logged = "cost/threshold/budget_0.00043", read_rows(tmp_path / "metrics.jsonl")
    assert [row[key] for row in logged if key in row] == [row["threshold"] for row in rows]


def test_one_checkpoint_is_scored_under_a_budget(tmp_path):
    network, usual = Stopping(), create_module(network=Stopping())
    chosen = [{"budget_gmacs": BUDGET}]
    module = SegmentationModule(
        network,
        usual.criterion,
        usual.optimizer,
        usual.schedule,
        setting=resolve_settings(network, chosen, "setting")[0],
    )
    curve, used = CostCurve(tmp_path, chosen, latency=False), set()
    predict = module.predict
    module.predict = lambda batch: used.add(module.setting.threshold) or predict(batch)
    create_trainer([curve]).validate(module, TinyData())
    (row,) = curve.rows
    assert row["setting"] == "budget_0.00043"
    assert used == {row["threshold"]}
    assert row["threshold"] not in {setting.threshold for setting in network.settings.values()}


def test_a_budget_out_of_reach_ends_what_has_not_trained_yet(tmp_path):
    module = create_module(network=Stopping())
    curve = CostCurve(tmp_path, [{"budget_gmacs": 40}], latency=False)
    with pytest.raises(UserError, match="budget of 40 GMACs is out of reach"):
        create_trainer([curve]).validate(module, TinyData())
    with pytest.raises(UserError, match="budget of 40 GMACs is out of reach"):
        create_trainer([curve], num_sanity_val_steps=1).fit(module, TinyData())
    with pytest.warns(UserWarning, match="out of reach.*the threshold stays as it was"):
        create_trainer([curve]).fit(module, TinyData())
    assert [row["setting"] for row in curve.rows[-2:]] == ["half", "budget_40"]
    assert curve.rows[-1]["cost"]["macs"] == curve.rows[-2]["cost"]["macs"]


def test_a_network_without_thresholds_takes_no_budget(tmp_path):
    curve = CostCurve(tmp_path, [{"budget_gmacs": 40}], latency=False)
    with pytest.raises(UserError, match=r"callbacks\.cost_curve\.settings: .*no setting of EDAF"):
        create_trainer([curve]).validate(create_module(), TinyData())
    with pytest.raises(UserError, match="'cost_images' are at least 1"):
        CostCurve(tmp_path, cost_images=0)


def test_middles_of_images():
    images = torch.arange(6.0)[:, None] + 10 * torch.arange(8.0)  # (6, 8)
    images = images.expand(2, 3, 6, 8)
    assert cut_middle(images, (6, 8)).equal(images)
    assert cut_middle(images, (2, 4)).equal(images[:, :, 2:4, 2:6])
    enlarged = cut_middle(images, (12, 4))
    assert enlarged.shape == (2, 3, 12, 4)
    assert enlarged[0, 0, :, 0].diff().unique().tolist() == pytest.approx([0.25, 0.5])
