"""A policy trained on superpatches, and a network that follows it, through the command line."""

import json
from pathlib import Path

import pytest
import torch

import train

pytestmark = pytest.mark.filterwarnings("ignore:.*officially")

NETWORK = [
    "model=cts_ti",
    "+model.backbone_arguments={embed_dim: 32, depth: 2, num_heads: 4}",
    "model.image_size=[64,64]",
    "name=network",
]


@pytest.fixture
def policy(in_folder, small):
    """The checkpoint of a policy."""
    assert train.main([*small, "model=cts_policy", "data.superpatches=all", "name=policy"]) == 0
    return "runs/policy/checkpoints/last.ckpt"


def test_a_policy_is_scored_by_superpatches(policy):
    curve = [json.loads(line) for line in Path("runs/policy/curve.jsonl").read_text().splitlines()]
    assert {row["step"] for row in curve} == {2, 4}
    assert list(curve[0]["IoU"]) == ["several labels", "one label"]
    for row in curve:
        right = row["pixel_accuracy"] * 5 * 2 * 4  # superpatches of the images
        assert right == pytest.approx(round(right))
    assert list(Path("runs/policy/predictions").iterdir())


def test_a_network_follows_a_trained_policy(policy, small, capsys):
    assert train.main([*small, *NETWORK, f"policy_weights={policy}"]) == 0
    assert "is random" not in capsys.readouterr().err
    theirs, ours = (
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("policy", "network")
    )
    prefix = "network.policy."
    of_policy = {name: value for name, value in ours.items() if name.startswith(prefix)}
    assert len(of_policy) == len(theirs)
    for name, value in of_policy.items():
        assert torch.equal(value, theirs["network." + name.removeprefix(prefix)])
    rows = [json.loads(line) for line in Path("runs/network/curve.jsonl").read_text().splitlines()]
    assert {"shared_0.3", "full"} < {row["setting"] for row in rows}


def test_a_network_goes_on_without_the_policys_file(policy, small):
    assert train.main([*small, *NETWORK, f"policy_weights={policy}", "schedule.steps=2"]) == 0
    Path(policy).unlink()
    assert train.main(["resume=runs/network", "schedule.steps=4"]) == 0


def test_a_random_policy_is_told(small, in_folder, capsys):
    assert train.main([*small, *NETWORK]) == 0
    assert "the policy of cts_ti is random" in capsys.readouterr().err


def test_a_policy_learns_from_nothing_but_superpatches(small, fails):
    assert "add data.superpatches=all" in fails(*small, "model=cts_policy")


def test_only_cts_has_a_policy(small, fails):
    Path("policy.ckpt").write_bytes(b"")
    error = fails(*small, "policy_weights=policy.ckpt")
    assert "edaformer_nano has no policy" in error
    assert "no such file" in fails(*small, *NETWORK, "policy_weights=missing.ckpt")
