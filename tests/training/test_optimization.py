"""Learning rates and parameter groups of the papers."""

import json
import re
from pathlib import Path

import pytest
import torch
from timm.layers import create_norm_layer
from torch import nn

from segtrain import UserError, create_network
from segtrain.config import read_file
from segtrain.training import SGD, AdamW, PolynomialSchedule, create_optimizer
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


def test_segformer_groups_are_the_official_ones():
    """OpenMMLab exempts names with ``norm`` from decay: not ``layers.i.2``, the stage norms."""
    exempt = re.compile(
        r"encoder\.stages\.\d\."
        r"(embedding\.norm|blocks\.\d+\.norm[12]|blocks\.\d+\.attention\.norm)\.(weight|bias)"
    )
    values = read_file(Path("configs/optimizer/adamw_segformer.yaml"))
    network = create_network("segformer_b0", num_classes=19)
    optimizer = create_optimizer(**values).build(network)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    exempted = 0
    for name, parameter in network.named_parameters():
        group = group_of.pop(id(parameter))
        decay = 0.0 if exempt.fullmatch(name) else 0.01
        exempted += not decay
        assert group["weight_decay"] == pytest.approx(decay), name
        learning_rate = 6e-4 if name.startswith("decoder.") else 6e-5
        assert group["lr"] == pytest.approx(learning_rate), name
    assert not group_of
    # Weights and biases of 4 embeddings' norms, 2 in each of 8 blocks, 6 behind a reduction.
    assert exempted == 2 * (4 + 2 * 8 + 6)


def test_mask2former_groups_are_the_official_ones():
    """Norms and embeddings are known by their kind: no name of theirs here says so."""
    network = nn.ModuleDict(
        {
            "encoder": nn.ModuleDict(
                {
                    "convolution": nn.Conv2d(3, 4, 1),
                    "bn": nn.SyncBatchNorm(4),
                    "stage": create_norm_layer("layernorm2d", 4),
                }
            ),
            "decoder": nn.ModuleDict(
                {
                    "pixels": nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)),
                    "queries": nn.ModuleDict(
                        {"level_embedding": nn.Embedding(3, 4), "classifier": nn.Linear(4, 2)}
                    ),
                    "renormalised": nn.Linear(4, 4),
                }
            ),
        }
    )
    encoder, pixels = network["encoder"], network["decoder"]["pixels"]
    table = nn.Parameter(torch.ones(3))
    encoder["convolution"].register_parameter("relative_position_bias_table", table)
    pixels.register_parameter("level_embedding", nn.Parameter(torch.ones(3, 4)))
    values = read_file(Path("configs/optimizer/adamw_mask2former.yaml"))
    optimizer = create_optimizer(**values).build(network)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        "encoder.convolution.weight": (1e-5, 0.05),
        "encoder.convolution.bias": (1e-5, 0.05),
        "encoder.convolution.relative_position_bias_table": (1e-5, 0.0),
        "encoder.bn.weight": (1e-5, 0.0),
        "encoder.bn.bias": (1e-5, 0.0),
        "encoder.stage.weight": (1e-5, 0.0),
        "encoder.stage.bias": (1e-5, 0.0),
        "decoder.pixels.level_embedding": (1e-4, 0.05),
        "decoder.pixels.0.weight": (1e-4, 0.05),
        "decoder.pixels.0.bias": (1e-4, 0.05),
        "decoder.pixels.1.weight": (1e-4, 0.0),
        "decoder.pixels.1.bias": (1e-4, 0.0),
        "decoder.queries.level_embedding.weight": (1e-4, 0.0),
        "decoder.queries.classifier.weight": (1e-4, 0.05),
        "decoder.queries.classifier.bias": (1e-4, 0.05),
        "decoder.renormalised.weight": (1e-4, 0.05),
        "decoder.renormalised.bias": (1e-4, 0.05),
    }
    assert len(optimizer.param_groups) == 4


def test_scales_of_a_rule_and_of_a_kind_are_multiplied():
    network = nn.ModuleDict({"early": nn.LayerNorm(2), "late": nn.Embedding(2, 2)})
    rules = {"early": {"weight_decay_scale": 0.5}}
    described = AdamW(1.0, 1.0, groups=rules, norm_decay_scale=0.5, embedding_decay_scale=0.125)
    assert [group["weight_decay"] for group in described.build(network).param_groups] == [
        0.25,
        0.125,
    ]


def test_groups_of_sgd_are_those_of_adamw():
    network = create_network("edaformer_nano", num_classes=4)
    described = {"learning_rate": 0.01, "weight_decay": 0.1, "groups": RULES}
    sgd = create_optimizer("sgd", **described, momentum=0.8)
    assert sgd == SGD(0.01, 0.1, groups=RULES, momentum=0.8)
    built, other = sgd.build(network), create_optimizer("adamw", **described).build(network)
    assert isinstance(built, torch.optim.SGD)
    for group, theirs in zip(built.param_groups, other.param_groups, strict=True):
        assert group["momentum"] == 0.8
        for key in ("params", "lr", "weight_decay"):
            assert group[key] is theirs[key] or group[key] == theirs[key]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sgd", "betas": [0.9, 0.999]}, "name=sgd has no argument 'betas'.*momentum"),
        ({"name": "adamw", "momentum": 0.9}, "name=adamw has no argument 'momentum'.*betas"),
        ({"name": "sgd", "weight_decay": None}, "name=sgd needs optimizer.weight_decay"),
    ],
)
def test_arguments_of_another_optimiser_are_refused(arguments, message):
    described = {"learning_rate": 0.01, "weight_decay": 0.0} | arguments
    given = {key: value for key, value in described.items() if value is not None}
    with pytest.raises(UserError, match=message):
        create_optimizer(**given)


def test_an_underscore_in_a_key_also_stands_for_a_dot():
    rules = {"stages_0_norm": {"weight_decay_scale": 1.0}, "class_embed": {"weight_decay_scale": 2}}
    optimizer = AdamW(6e-5, 0.01, groups=rules)
    assert optimizer.rule_for("encoder.stages.0.norm.weight") == rules["stages_0_norm"]
    assert optimizer.rule_for("decoder.class_embed.weight") == rules["class_embed"]
    for other in ("encoder.stages.1.norm.weight", "encoder.stages.0.blocks.0.norm1.weight"):
        assert optimizer.rule_for(other) == {}


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


def test_the_decay_may_begin_late_and_leave_a_rest():
    schedule = PolynomialSchedule(100, 10, 0.5, power=2, end_factor=0.1, decay_start=20)
    assert [schedule(step) for step in (0, 5, 10, 20)] == [0.5, 0.75, 1, 1]
    assert schedule(60) == pytest.approx(0.1 + 0.9 * 0.25)
    assert schedule(100) == schedule(101) == pytest.approx(0.1)
    for start in (100, 200):
        late = PolynomialSchedule(100, 0, decay_start=start)
        assert [late(step) for step in (0, 50, 100)] == [1, 1, 1]


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
