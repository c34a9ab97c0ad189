"""Pretraining an encoder on images of one class each, through the command line."""

import json
from pathlib import Path

import pytest
import torch

import train
from segtrain import create_network, load_weights
from tests.data.layouts import write_imagenet

pytestmark = pytest.mark.filterwarnings("ignore:.*officially")


@pytest.fixture
def tiny(in_folder):
    """The recipe with four images of each of five classes, eight in a step."""
    write_imagenet(in_folder / "imagenet", classes=5, train=4, val=1)
    return [
        "experiment=rtformer_slim_imagenet",
        "+model.base_channels=8",
        "data.root=imagenet",
        "data.crop_size=[64,64]",
        "data.batch_size=8",
        "data.workers=0",
        "schedule.steps=2",
        "schedule.validate_every=1",
        "schedule.warmup_steps=1",
        "callbacks.cost_curve.latency=false",
        "tracking.mode=disabled",
        "trainer.accelerator=cpu",
        "name=pretrained",
    ]


def rows(name):
    lines = Path(f"runs/pretrained/{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_an_encoder_is_pretrained_and_starts_a_segmentation_network(tiny):
    assert train.main(tiny) == 0
    curve = rows("curve")
    assert {row["step"] for row in curve} == {1, 2}
    assert curve[0]["setting"] == "full"
    assert curve[0]["cost"]["image_size"] == [64, 64]
    assert list(curve[0]["IoU"]) == [f"n{k:08d}" for k in range(5)]
    # A mask of one pixel: the share of right pixels is that of right images.
    assert {row["images"] for row in curve} == {5}
    right = [5 * row["pixel_accuracy"] for row in curve]
    assert right == pytest.approx([round(images) for images in right])
    report = Path("runs/pretrained/report.html").read_text()
    assert "n00000004" in report
    assert not Path("runs/pretrained/predictions").exists()

    checkpoint = Path("runs/pretrained/checkpoints/last.ckpt")
    network = create_network("rtformer_slim", num_classes=19, base_channels=8)
    load_weights(network, checkpoint, backbone_only=True)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    own = network.encoder.state_dict()
    assert all(torch.equal(own[name], weights[f"network.encoder.{name}"]) for name in own)


def test_pretraining_goes_on_where_it_was(tiny):
    assert train.main([*tiny, "schedule.steps=1"]) == 0
    assert train.main(["resume=runs/pretrained", "schedule.steps=3"]) == 0
    assert sorted({row["step"] for row in rows("curve")}) == [1, 2, 3]
    checkpoint = torch.load("runs/pretrained/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["ImageNet"] == {"samples_seen": 24}
