"""One training step of RTFormer against the authors' code: loss to optimiser.

The reference is an official run in float32, whose own rounding the tolerances allow for.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from segtrain import create_network, load_weights
from segtrain.config import compose
from segtrain.training import CrossEntropy, PolynomialSchedule, create_optimizer
from segtrain.weights.rtformer import PADDLESEG

REFERENCE = Path("tests/reference/rtformer")
LEARNING_RATE = 1e-3


def values(experiment):
    return compose([f"experiment={experiment}"], Path("configs")).values


@pytest.fixture(scope="module")
def network():
    created = create_network(
        "rtformer_slim",
        num_classes=19,
        base_channels=4,
        context_channels=12,
        num_heads=4,
        head_channels=10,
        cross_size=6,
        injection=(True, False),
        drop_path=0.0,
    )
    load_weights(created, REFERENCE / "rtformer_micro.safetensors")
    return created.train()


@pytest.fixture(scope="module")
def official():
    return load_file(REFERENCE / "rtformer_micro_train.safetensors")


def by_our_names(tensors, kind):
    """The tensors of one kind in the reference, all of which have a counterpart."""
    prefix = f"{kind}."
    theirs = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    named, unknown = PADDLESEG.rename(theirs)
    assert not unknown
    assert len(named) == len(theirs)
    return named


@pytest.fixture(scope="module")
def step(network, official):
    """The step, and what the network held behind each of its parts."""
    optimizer = values("rtformer_slim_cityscapes")["optimizer"]
    optimizer |= {"learning_rate": LEARNING_RATE, "weight_decay": 0.0125}
    optimizer = create_optimizer(**optimizer).build(network)
    criterion, mask = CrossEntropy("valid"), official["labels"].long()
    scores = network(official["input"].float())
    loss = criterion(scores, mask)
    loss.backward()
    result = {
        "scores": scores,
        "losses": [loss, *(criterion(head, mask) for head in scores)],
        "buffers": {name: buffer.clone() for name, buffer in network.named_buffers()},
        "gradients": {name: parameter.grad for name, parameter in network.named_parameters()},
        "rates": {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]},
    }
    optimizer.step()
    return SimpleNamespace(**result)


def assert_close(ours, theirs, tolerance, name=""):
    """Equal up to a share of the tensor's largest magnitude."""
    difference = (ours.detach() - theirs).abs().max()
    assert difference <= tolerance * theirs.abs().max(), (name, difference)


def test_losses(step, official):
    for ours, name in zip(step.losses, ("loss_total", "loss_main", "loss_aux"), strict=True):
        assert_close(ours, official[name][0], 1e-6, name)


def test_scores(step, official):
    main, auxiliary = step.scores
    assert_close(main, official["train_logits_low"], 3e-5)
    assert_close(auxiliary, official["train_aux_logits_low"], 3e-5)


def test_gradients(step, official):
    expected = by_our_names(official, "grad")
    assert len(expected) == 13
    for name, gradient in expected.items():
        assert_close(step.gradients[name], gradient, 1e-4, name)


def test_running_statistics(step, official):
    expected = by_our_names(official, "after")
    statistics = {name for name in step.buffers if "running" in name}
    # The reference leaves out this one norm.
    missing = {f"decoder.auxiliary_head.norm2.running_{kind}" for kind in ("mean", "var")}
    assert expected.keys() == statistics - missing
    for name, buffer in expected.items():
        assert_close(step.buffers[name], buffer, 5e-5, name)


def test_optimiser(step, network, official):
    parameters = dict(network.named_parameters())
    gradients, expected = by_our_names(official, "grad"), by_our_names(official, "adamw")
    assert gradients.keys() == expected.keys()
    for name, after in expected.items():
        # A first step of Adam is the gradient's sign: where that is close to 0, it is rounding.
        known = gradients[name].abs() > 1e-6
        assert known.float().mean() > 0.95
        difference = (parameters[name].detach() - after)[known].abs().max()
        assert difference <= 1e-3 * step.rates[id(parameters[name])], (name, difference)


def test_ten_times_the_learning_rate_where_the_authors_have_it(step, network):
    described = json.loads((REFERENCE / "rtformer_micro.json").read_text())
    factors = {name: torch.tensor(factor) for name, factor in described["lr_mult"].items()}
    faster, unknown = PADDLESEG.rename(factors)
    assert not unknown
    assert len(faster) == 47
    for name, parameter in network.named_parameters():
        factor = faster.get(name, torch.tensor(1.0)).item()
        assert step.rates[id(parameter)] == pytest.approx(LEARNING_RATE * factor), name


@pytest.mark.parametrize("data", ["cityscapes", "ade20k"])
@pytest.mark.parametrize("size", ["slim", "base"])
def test_learning_rates_of_the_recipes_are_the_official_ones(size, data):
    measured = json.loads((REFERENCE / "rtformer_lr_schedule.json").read_text())[data]
    composed = values(f"rtformer_{size}_{data}")
    keys = PolynomialSchedule.__dataclass_fields__
    schedule = PolynomialSchedule(**{key: composed["schedule"][key] for key in keys})
    assert schedule.steps == measured["args"]["iters"]
    for step, learning_rate in measured["lr_used_at_zero_based_iteration"].items():
        ours = composed["optimizer"]["learning_rate"] * schedule(int(step))
        assert ours == pytest.approx(learning_rate, rel=1e-12), step
