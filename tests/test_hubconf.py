"""What torch.hub.load gives of a checkout."""

from pathlib import Path

import numpy as np
import pytest
import torch

import hubconf
from segtrain import UserError, from_run
from tests.micro_run import write_run

ROOT = Path(hubconf.__file__).parent


def load(*arguments, **options):
    return torch.hub.load(str(ROOT), *arguments, source="local", **options)


def test_a_trained_network_in_one_line(tmp_path):
    run = write_run(tmp_path / "run")
    trained = load("trained", str(run), setting="isr_2211_222", device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
    assert trained.network.setting.name == "isr_2211_222"
    expected = from_run(run, setting="isr_2211_222", device="cpu").predict(image)
    assert (trained.predict(image) == expected).all()
    with pytest.raises(UserError, match="has no checkpoint 'step-9'"):
        load("trained", run, checkpoint="step-9")


def test_a_network_by_name():
    network = load("network", name="segformer_b0", num_classes=7, widths=(8, 16, 40, 64))
    assert network.num_classes == 7
