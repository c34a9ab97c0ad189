"""Learning rates and parameter groups of the papers."""

import json
from pathlib import Path

import pytest
import torch

from segtrain import UserError, create_network
from segtrain.training import AdamW, PolynomialSchedule
from segtrain.weights.edaformer import OFFICIAL

RULES = {"norm": {"weight_decay_scale": 0.0}, "decoder": {"learning_rate_scale": 10.0}}


def test_edaformer_groups_are_the_official_ones():
    stored = json.loads(Path("tests/reference/edaformer/edaformer_param_groups.json").read_text())
    network = create_network("edaformer_tiny", num_classes=150)
    optimizer = AdamW(6e-5, 0.01, groups=RULES).build(network)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    ours = {
        names[id(parameter)]: [group["lr"], group["weight_decay"]]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected, unknown = OFFICIAL.rename(stored["tiny"])
    assert not unknown
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        assert ours[name] == pytest.approx(values), name


@pytest.mark.parametrize(
    ("step", "learning_rate"),
    [
        (0, 6.0e-11),
        (1, 4.005971e-8),
        (750, 2.985940e-5),
        (1499, 5.939825e-5),
        (1500, 5.94375e-5),
        (40000, 4.5e-5),
        (80000, 3e-5),
        (159999, 3.75e-10),
    ],
)
def test_learning_rate_is_the_measured_one(step, learning_rate):
    assert 6e-5 * PolynomialSchedule(160000)(step) == pytest.approx(learning_rate, rel=1e-6)


def test_the_schedule_drives_the_optimiser():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=2.0)
    schedule = PolynomialSchedule(10, warmup_steps=0)
    scheduler = schedule.build(optimizer)
    for step in range(10):
        assert scheduler.get_last_lr() == [pytest.approx(2.0 * (1 - step / 10))]
        optimizer.step()
        scheduler.step()


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="did you mean 'weight_decay_scale'"):
        AdamW(6e-5, 0.01, groups={"norm": {"weight_decay": 0.0}})
