"""A network with exits, and a gate trained behind it, through the command line."""

import json
from pathlib import Path

import pytest
import torch

import train

pytestmark = pytest.mark.filterwarnings("ignore:.*officially")

NETWORK = [
    "model=mask2former_swin_t",
    "+model.backbone_arguments={embed_dim: 16, depths: [1, 1, 1, 1], num_heads: [1, 2, 2, 2]}",
    "model.num_queries=5",
    "model.encoder_layers=[0,0,3]",
    "model.decoder_layers=2",
    "model.exits=[2,3]",
    "+model.width=64",
    "+model.num_heads=4",
    "+model.encoder_mlp_width=32",
    "+model.decoder_mlp_width=32",
]
SHORT = ["schedule.steps=2", "data.limit_train=6", "~callbacks.pictures"]


@pytest.fixture
def checkpoint(in_folder, small):
    """Of a network that is trained with exits."""
    assert train.main([*small, *NETWORK, *SHORT, "name=network"]) == 0
    return "ckpt=runs/network/checkpoints/last.ckpt"


def gate_of(run):
    state = torch.load(f"runs/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if ".pixels.gate." in name}, state


def rows(run):
    return [json.loads(line) for line in Path(f"runs/{run}/curve.jsonl").read_text().splitlines()]


def test_a_gate_is_trained_and_scored(checkpoint, capsys):
    assert train.main(["task=gate", checkpoint, "name=gated"]) == 0
    printed = capsys.readouterr().out
    assert "exits of 6 training images at beta=0" in printed
    (before, former), (after, gated) = gate_of("network"), gate_of("gated")
    assert len(after) == 2
    assert not any(torch.equal(before[name], value) for name, value in after.items())
    for name in former.keys() - before.keys():
        assert torch.equal(former[name], gated[name])
    curve = {row["setting"]: row for row in rows("gated")}
    assert curve["gate"]["cost"]["gmacs_std"] is not None
    assert curve["layers_002"]["cost"]["macs"] < curve["full"]["cost"]["macs"]

    # Another beta by the same scores: no training image is read.
    scores = "gate.data=runs/gated/gate.safetensors"
    again = ["task=gate", checkpoint, scores, "gate.beta=1", "name=cheap", "data.limit_train=0"]
    assert train.main(again) == 0
    cheap = {row["setting"]: row for row in rows("cheap")}
    assert not Path("runs/cheap/gate.safetensors").exists()
    # Every layer costs more than it can bring.
    assert cheap["gate"]["mIoU"] == cheap["layers_002"]["mIoU"]
    assert cheap["gate"]["cost"]["macs"] == pytest.approx(
        cheap["layers_002"]["cost"]["macs"], rel=1e-3
    )

    # A run of its own: what is saved is the network with its gate.
    validate = ["task=validate", "ckpt=runs/cheap/checkpoints/last.ckpt", "name=validated"]
    assert train.main([*validate, "setting=gate"]) == 0
    assert rows("validated")[0]["mIoU"] == cheap["gate"]["mIoU"]


def test_a_gate_needs_exits_and_weights(small, fails):
    Path("weights.pth").write_bytes(b"")
    weights = "weights=weights.pth"
    assert "task=gate needs the weights" in fails(*small, *NETWORK, "task=gate")
    error = fails(*small, "task=gate", weights)
    assert "model=edaformer_nano has none" in error
    error = fails(*small, *NETWORK, "model.exits=null", "task=gate", weights)
    assert "model.exits=[2,3,4,5,6]" in error
    gate = [*small, *NETWORK, "task=gate", weights]
    assert "no such file" in fails(*gate, "gate.data=missing.safetensors")
    assert "at least 0, not -1" in fails(*gate, "gate.beta=-1")
    assert "inference.mode=whole" in fails(*gate, "inference.mode=slide")
    assert "fsdp2" in fails(*gate, "trainer.strategy=fsdp2")


def test_ddp_is_told_of_layers_that_are_left_out(small, fails):
    two = ["trainer.accelerator=cpu", "trainer.devices=2", "name=two"]
    error = fails(*small, *NETWORK, *two)
    assert "trainer.strategy=ddp_find_unused_parameters_true" in error
    assert not Path("runs/two").exists()
