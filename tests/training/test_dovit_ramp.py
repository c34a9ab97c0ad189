"""DoViT's thresholds over a training that is interrupted."""

import pytest
import torch

from segtrain import create_network
from tests.callbacks.tiny import NUM_CLASSES, TinyData, create_module, create_trainer


def create():
    """A training module, and where the threshold of each training pass is kept."""
    torch.manual_seed(0)
    network = create_network(
        "dovit_segmenter_s",
        NUM_CLASSES,
        {"threshold": 0.5},
        backbone="vit_tiny_patch16_384",
        image_size=(32, 32),
        decisions=(1,),
        ramp_steps=10,
        backbone_arguments={"embed_dim": 16, "depth": 2, "num_heads": 2},
    )
    thresholds = []
    network.register_forward_hook(
        lambda network, images, outputs: (
            thresholds.append(network.threshold(0)) if network.training else None
        )
    )
    return create_module(network=network), thresholds


def test_the_ramp_goes_on_where_it_was(tmp_path):
    module, thresholds = create()
    trainer = create_trainer([], steps=4, accumulate=2)
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    # Two batches make a step.
    assert thresholds == pytest.approx([1 - 0.05 * step for step in (0, 0, 1, 1, 2, 2, 3, 3)])
    assert module.network.eval().threshold(0) == 0.5

    resumed, thresholds = create()
    trainer = create_trainer([], steps=6)
    trainer.fit(resumed, TinyData(), ckpt_path=tmp_path / "last.ckpt")
    assert thresholds == pytest.approx([1 - 0.05 * step for step in (4, 5)])
