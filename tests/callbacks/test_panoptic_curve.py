from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from callbacks.jsonl import PANOPTIC, ForgetLostSteps, JsonLinesLogger, append_rows, read_rows
from callbacks.panoptic import PanopticCurve
from segtrain import UserError
from segtrain.mask_inference import panoptic_inference
from segtrain.networks import Network
from segtrain.networks.mask_prediction import MaskPrediction
from segtrain.panoptic_quality import PanopticQuality
from segtrain.reduction import Setting
from tests.callbacks.tiny import (
    NUM_CLASSES,
    NUM_IMAGES,
    TinyData,
    create_module,
    create_trainer,
)

SCORES = ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff")


class Shades(Network):
    """One query for each class, whose mask is where the image has the class's shade.

    Under "half" the queries of the last two classes see nothing.
    """

    mask_stride = 4

    def __init__(self):
        super().__init__(NUM_CLASSES, 1, [Setting("full"), Setting("half")])
        self.steepness = torch.nn.Parameter(torch.tensor(10.0))

    def masks(self, images):
        height, width = images.shape[2:]
        shade = 58.0 * images.mean(dim=1, keepdim=True) + 118  # about what it was before
        shade = F.pad(F.avg_pool2d(shade, 4), (0, -width % 32 // 4, 0, -height % 32 // 4))
        middle = 60.0 * torch.arange(NUM_CLASSES, device=images.device).view(1, -1, 1, 1) + 30
        masks = self.steepness * (1 - (shade - middle).abs() / 30)
        if self.setting.name == "half":
            masks[:, 2:] = -100
        classes = 10 * torch.eye(NUM_CLASSES, NUM_CLASSES + 1, device=images.device)
        return MaskPrediction(classes.expand(len(images), -1, -1), masks)

    def forward(self, images):
        height, width = images.shape[2:]
        return F.interpolate(self.masks(images).masks, scale_factor=4)[..., :height, :width]


class PanopticTinyData(TinyData):
    """Columns of blocks are things of their own; sky and road are stuff."""

    things = (2, 3)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        identity = torch.where(batch["mask"] < 2, 0, torch.arange(96, device=self.where) // 48 + 1)
        return {**batch, "segments": torch.stack([batch["mask"], identity], dim=-1).int()}

    @property
    def where(self):
        return self.trainer.strategy.root_device


def expected_quality(network, data, setting, batches=None):
    """Each step by itself, at full size."""
    quality = PanopticQuality(data.things, NUM_CLASSES)
    for i, batch in enumerate(data.val_dataloader()):
        if i == batches:
            break
        batch = data.on_after_batch_transfer(batch, 0)
        with network.using(setting), torch.inference_mode():
            prediction = network.masks(batch["image"])
        padded = F.interpolate(prediction.masks, scale_factor=4, mode="bilinear")
        final = F.interpolate(padded[..., :48], size=(64, 96), mode="bilinear")
        segments = [
            panoptic_inference(*one, data.things).categories_and_ids(255)
            for one in zip(prediction.classes, final, strict=True)
        ]
        quality.update(torch.stack(segments), batch["segments"])
    return quality.compute()


def test_each_setting_gets_a_row_and_scalars(tmp_path):
    module, data, curve = (
        create_module(network=Shades()),
        PanopticTinyData(),
        PanopticCurve(tmp_path),
    )
    trainer = create_trainer([curve], [JsonLinesLogger(tmp_path)])
    trainer.validate(module, data, verbose=False)
    rows = read_rows(tmp_path / PANOPTIC)
    assert rows == curve.rows
    assert [row["setting"] for row in rows] == ["full", "half"]
    assert [row["training_setting"] for row in rows] == [True, False]
    (logged,) = (row for row in read_rows(tmp_path / "metrics.jsonl") if "val/PQ/full" in row)
    for row in rows:
        quality = expected_quality(module.network, data, row["setting"])
        assert row["images"] == NUM_IMAGES
        assert list(row["classes"].values()) == pytest.approx(quality[:, 0].tolist())
        means = (*quality.mean(dim=0).tolist(), quality[2:, 0].mean(), quality[:2, 0].mean())
        for name, mean in zip(SCORES, means, strict=True):
            assert row[name] == pytest.approx(float(mean)), name
            assert logged[f"val/{name}/{row['setting']}"] == pytest.approx(row[name])
    full, half = rows
    assert full["PQ"] > 0.3
    assert half["PQ_things"] == 0
    assert half["PQ_stuff"] == pytest.approx(full["PQ_stuff"])


def test_every_validation_of_a_training_and_only_some_batches(tmp_path):
    curve = PanopticCurve(tmp_path, settings=["half"], every=2, limit_batches=1)
    append_rows(tmp_path / PANOPTIC, [{"step": 0, "PQ": 0.5}, {"step": 9, "PQ": 0.6}])
    module, data = create_module(network=Shades()), PanopticTinyData()
    callbacks = [ForgetLostSteps(tmp_path), curve]
    trainer = create_trainer(callbacks, steps=5, validate_every=1, num_sanity_val_steps=1)
    trainer.fit(module, data)
    rows = read_rows(tmp_path / PANOPTIC)
    assert [row["step"] for row in rows] == [0, 2, 4, 5]  # what was lost is dropped
    assert {row["setting"] for row in rows[1:]} == {"half"}
    assert rows[-1]["images"] == 2
    quality = expected_quality(module.network.eval(), data, "half", batches=1)
    assert rows[-1]["PQ"] == pytest.approx(quality[:, 0].nanmean().item())
    assert curve.state_dict() == {"validations": 5}


def test_slips(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        PanopticCurve(tmp_path, every=0)
    with pytest.raises(UserError, match=r"EDAFormer scores pixels and has no masks"):
        create_trainer([PanopticCurve(tmp_path)]).validate(create_module(), PanopticTinyData())
    module = create_module(network=Shades())
    with pytest.raises(UserError, match=r"set data\.panoptic=true"):
        create_trainer([PanopticCurve(tmp_path)]).validate(module, TinyData())
    curve = PanopticCurve(tmp_path, settings=["ful"])
    with pytest.raises(UserError, match=r"callbacks\.panoptic\.settings: .*did you mean 'full'"):
        create_trainer([curve]).validate(module, PanopticTinyData())


def test_where_nothing_is_confident_all_is_void(tmp_path):
    curve = PanopticCurve(tmp_path, object_threshold=0.99999, limit_batches=1)
    module = create_module(network=Shades())
    create_trainer([curve]).validate(module, PanopticTinyData(), verbose=False)
    assert [row["PQ"] for row in curve.rows] == [0.0, 0.0]
    assert not np.isnan(curve.rows[0]["SQ"])
