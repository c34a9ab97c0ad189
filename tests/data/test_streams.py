"""The training stream: the same samples for any number of workers, and after a restart."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import lightning
import pytest
import torch

import data
import data.dataset
from segtrain.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*(officially|many workers|default value)")


@pytest.fixture
def open_scenes(tmp_path_factory):
    """Five training scenes, so that epochs end within batches."""
    root = tmp_path_factory.getbasetemp() / "scenes"

    def open_scenes(**options) -> data.Scenes:
        scenes = data.Scenes(
            root,
            train_images=5,
            eval_images=3,
            image_size=(32, 64),
            crop_size=(24, 24),
            train_scale=(64, 32),
            **{"batch_size": 4, "workers": 0} | options,
        )
        scenes.prepare_data()
        return scenes

    return open_scenes


def take(data_module: data.SegmentationData, batches: int) -> list[dict]:
    return list(itertools.islice(data_module.train_dataloader(), batches))


def test_batches_are_as_promised(open_scenes):
    scenes = open_scenes(workers=1)
    (batch,) = take(scenes, 1)
    assert set(batch) == {"image", "mask", "name", "epoch", "index"}
    assert batch["image"].shape == (4, 24, 24, 3)
    assert batch["mask"].shape == (4, 24, 24)
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    assert batch["epoch"].dtype == batch["index"].dtype == torch.int64
    assert all(isinstance(name, str) for name in batch["name"])

    on_device = scenes.on_after_batch_transfer(batch, 0)
    image = on_device["image"]
    assert image.shape == (4, 3, 24, 24)
    assert image.is_contiguous(memory_format=torch.channels_last)
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    expected = (batch["image"].permute(0, 3, 1, 2) - mean) / std
    torch.testing.assert_close(image, expected)
    assert on_device["mask"].dtype == torch.int64
    assert batch["image"].dtype == torch.uint8  # the batch itself is left alone


def test_evaluation_batches_are_unpadded_and_whole(open_scenes):
    batches = list(open_scenes(eval_batch_size=2).val_dataloader())
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2]]
    assert set(batches[0]) == {"image", "mask", "name", "index"}
    assert batches[0]["image"].shape == (2, 32, 64, 3)
    assert batches[0]["mask"].shape == (2, 32, 64)


def test_workers_do_not_change_the_samples(open_scenes):
    expected = take(open_scenes(), 8)
    for workers in (1, 3):
        for batch, other in zip(take(open_scenes(workers=workers), 8), expected, strict=True):
            assert batch["name"] == other["name"]
            for key in ("image", "mask", "epoch", "index"):
                assert torch.equal(batch[key], other[key])


def test_batch_size_does_not_change_the_samples(open_scenes):
    by_four, by_one = take(open_scenes(), 5), take(open_scenes(batch_size=1), 20)
    expected = torch.cat([batch["image"] for batch in by_one])
    assert torch.equal(torch.cat([batch["image"] for batch in by_four]), expected)


def test_no_augmentation_comes_twice(open_scenes):
    """Neither in two workers nor in two epochs, for any image."""
    batches = take(open_scenes(workers=2), 15)
    images = torch.cat([batch["image"] for batch in batches]).flatten(1)
    epochs = torch.cat([batch["epoch"] for batch in batches])
    assert epochs.tolist() == [epoch for epoch in range(12) for _ in range(5)]
    assert len(torch.unique(images, dim=0)) == len(images)


def test_another_seed_is_another_augmentation(open_scenes):
    first, second = take(open_scenes(seed=0), 5), take(open_scenes(seed=1), 5)
    sample_of = [
        {int(i): image for b in batches for i, image in zip(b["index"], b["image"], strict=True)}
        for batches in (first, second)
    ]
    assert all(not torch.equal(sample_of[0][i], sample_of[1][i]) for i in range(5))


def test_class_counts_are_those_of_the_training_labels(open_scenes):
    scenes = open_scenes(photometric=False)
    masks = [data.dataset.load(scenes.find_split("train"), index)[2] for index in range(5)]
    expected = [sum(int((mask == k).sum()) for mask in masks) for k in range(19)]
    assert scenes.class_counts().tolist() == expected


def test_fewer_evaluation_images_than_ranks(open_scenes, monkeypatch):
    scenes = open_scenes()
    monkeypatch.setattr(scenes, "_rank_and_world_size", lambda: (1, 4))
    with pytest.raises(UserError, match="3 evaluation images cannot be shared by 4 processes"):
        scenes.val_dataloader()


def test_limits(open_scenes):
    scenes = open_scenes(limit_train=2, limit_eval=1)
    assert {int(i) for batch in take(scenes, 4) for i in batch["index"]} == {0, 1}
    assert len(list(scenes.val_dataloader())) == 1


class Recorder(lightning.LightningModule):
    """Keeps what it is trained on; its own steps change nothing of interest."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.samples: list[tuple[int, int]] = []
        self.pixels: list[float] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.samples += zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
        self.pixels += batch["image"].sum((1, 2, 3)).tolist()
        return self.weight.sum() * batch["image"].mean()

    def validation_step(self, batch: dict, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(scenes, steps, folder: Path, accumulate=1, checkpoint=None) -> tuple[Recorder, Path]:
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
    )
    trainer.fit(recorder, scenes, ckpt_path=checkpoint)
    path = folder / f"{steps}.ckpt"
    trainer.save_checkpoint(path)
    return recorder, path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_sees_exactly_the_samples_not_yet_seen(
    open_scenes, tmp_path, workers, accumulate
):
    """Epochs of 5 samples, batches of 4: every stop below is in the middle of an epoch."""
    whole, _ = fit(open_scenes(workers=workers), 7, tmp_path, accumulate)
    first, checkpoint = fit(open_scenes(workers=workers), 3, tmp_path, accumulate)
    second, checkpoint = fit(open_scenes(workers=workers), 4, tmp_path, accumulate, checkpoint)
    third, checkpoint = fit(open_scenes(workers=workers), 7, tmp_path, accumulate, checkpoint)
    assert [len(run.samples) for run in (first, second, third)] == [
        steps * 4 * accumulate for steps in (3, 1, 3)
    ]
    assert first.samples + second.samples + third.samples == whole.samples
    assert first.pixels + second.pixels + third.pixels == whole.pixels
    content = torch.load(checkpoint, weights_only=True)
    assert content["Scenes"] == {"samples_seen": 7 * 4 * accumulate}


def test_resume_with_another_batch_size_goes_on_behind_the_samples_seen(open_scenes, tmp_path):
    whole, _ = fit(open_scenes(batch_size=1), 18, tmp_path)
    first, checkpoint = fit(open_scenes(batch_size=4), 3, tmp_path)
    second, _ = fit(open_scenes(batch_size=2), 6, tmp_path, checkpoint=checkpoint)
    assert first.samples + second.samples == whole.samples


def test_resuming_and_validating_raise_no_warning_about_the_loader(open_scenes, tmp_path):
    _, checkpoint = fit(open_scenes(), 3, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(resum|dataloader is not|samples).*")
        fit(open_scenes(), 5, tmp_path, checkpoint=checkpoint)
