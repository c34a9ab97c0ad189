"""A few fixed validation images: image, label and the prediction at two settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.cost_curve import resolve_settings
from callbacks.tracking import wandb_errors_as_warnings, wandb_runs
from segtrain import UserError
from segtrain.inference import IMAGE_MEAN, IMAGE_STD
from segtrain.training import SegmentationModule

PANEL_WIDTH = 400
CAPTION_HEIGHT = 22
GAP = 4


class Pictures(Callback):
    """Writes ``predictions/<image name>.png``, and the same as mask overlays to W&B.

    The images are spread over the validation set (over the part that rank zero reads) and stay
    the same; each validation replaces the files of the one before.

    Args:
        run_folder: where ``predictions/`` is.
        count: number of images.
        settings: two settings of the network; None takes the training setting and the last one
            that the network publishes, its most reduced.
    """

    def __init__(
        self, run_folder: Path, count: int = 4, settings: Sequence[Any] | None = None
    ) -> None:
        if count < 1 or (settings is not None and len(settings) != 2):
            raise UserError("callbacks.pictures: 'count' is at least 1, 'settings' are two")
        self.folder = Path(run_folder) / "predictions"
        self.count = count
        self.chosen = settings
        self._shown: list[tuple[np.ndarray, dict[str, np.ndarray], str]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the settings.

        Raises:
            UserError: the network has no such setting.
        """
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._module = cast(SegmentationModule, pl_module)
        network = self._module.network
        chosen = self.chosen or (network.training_setting, list(network.settings.values())[-1])
        self._settings = resolve_settings(network, chosen, "callbacks.pictures.settings")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the images."""
        self._shown = []
        self._wanted: set[int] = set()
        if trainer.is_global_zero and not trainer.sanity_checking:
            loader: Any = trainer.val_dataloaders
            ranks = trainer.world_size
            # Rank r reads images r, r + ranks, r + 2 * ranks, ...
            read = -(-len(loader.dataset) // ranks)
            read = int(min(read, trainer.num_val_batches[0] * loader.batch_size))
            spread = np.linspace(0, read - 1, min(self.count, read)).round().astype(int)
            self._wanted = {int(index) * ranks for index in spread}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the chosen images of this batch."""
        for row, index in enumerate(batch["index"].tolist()):
            if index in self._wanted:
                one = {key: batch[key][row : row + 1] for key in ("image", "mask", "name")}
                self._show(trainer, one)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the pictures to W&B."""
        names = dict(enumerate(self._data.class_names)) | {255: "ignored"}
        for run in wandb_runs(trainer) if self._shown else []:
            import wandb

            with wandb_errors_as_warnings("pictures"):
                images = [
                    wandb.Image(
                        image,
                        caption=name,
                        masks={
                            title: {"mask_data": mask, "class_labels": names}
                            for title, mask in masks.items()
                        },
                    )
                    for image, masks, name in self._shown
                ]
                run.log({"predictions": images, "trainer/global_step": trainer.global_step})

    def _show(self, trainer: Trainer, one: Mapping[str, Any]) -> None:
        masks = {"label": one["mask"][0]}
        for setting in self._settings:
            with trainer.precision_plugin.val_step_context():
                masks[setting.name] = self._module.predict(one, setting)[0]
        height, width = masks["label"].shape
        size = (max(1, round(height * PANEL_WIDTH / width)), PANEL_WIDTH)
        image = _displayable(one["image"], size)
        small = {title: _shrink(mask, size) for title, mask in masks.items()}
        name = one["name"][0]
        self._shown.append((image, small, name))
        palette = np.zeros((256, 3), np.uint8)  # ignored pixels are black
        palette[: len(self._data.palette)] = self._data.palette
        panels = {f"step {trainer.global_step}": image}
        panels |= {title: palette[mask] for title, mask in small.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}.png"
        written, encoded = cv2.imencode(".png", _side_by_side(panels)[..., ::-1])
        assert written
        path.write_bytes(encoded.tobytes())


def _displayable(images: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(1, 3, h, w) normalised -> (H, W, 3) uint8 of the given size."""
    images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)[0]
    mean, deviation = (
        torch.tensor(v, device=images.device)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD)
    )
    pixels = (images * deviation + mean).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()


def _shrink(mask: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(H, W) classes -> uint8 classes of the given size."""
    return (
        F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0]
        .to(torch.uint8)
        .cpu()
        .numpy()
    )


def _side_by_side(panels: Mapping[str, np.ndarray]) -> np.ndarray:
    """Panels (H, W, 3) under their captions, next to each other."""
    columns = []
    for title, panel in panels.items():
        caption = np.full((CAPTION_HEIGHT, panel.shape[1], 3), 255, np.uint8)
        origin = (4, CAPTION_HEIGHT - 7)
        cv2.putText(
            caption, title, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA
        )
        columns += [
            np.vstack([caption, panel]),
            np.full((CAPTION_HEIGHT + len(panel), GAP, 3), 255, np.uint8),
        ]
    return np.hstack(columns[:-1])
