"""A few fixed validation images: image, label and the prediction under every setting."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from callbacks.cost_curve import resolve_settings
from callbacks.tracking import wandb_errors_as_warnings, wandb_runs
from segtrain import UserError
from segtrain.inference import IMAGE_MEAN, IMAGE_STD
from segtrain.training import SegmentationModule

PREDICTIONS, INDEX = "predictions", "index.json"

#: Pictures are no longer than this on either side; label maps that are smaller stay as they are.
LONGEST_SIDE = 400
#: Of pixels that do not count.
IGNORED = 255


class Pictures(Callback):
    """Writes ``predictions/``: ``NAME.jpg`` is an image, ``NAME.png`` its label maps.

    The PNG holds classes with their colours: the label on top, below it the prediction under each
    setting, in the order that ``index.json`` tells. The images are spread over the validation set
    (over the part that rank zero reads) and stay the same; each validation replaces the files of
    the one before. W&B gets them as mask overlays, with the first and the last of the settings.

    Args:
        run_folder: where ``predictions/`` is.
        count: number of images.
        settings: settings of the network; None takes the training setting and all that the
            network publishes. Each takes a forward pass for each of the images.
    """

    def __init__(
        self, run_folder: Path, count: int = 8, settings: Sequence[Any] | None = None
    ) -> None:
        if count < 1 or settings == []:
            raise UserError("callbacks.pictures: 'count' and the number of 'settings' are >= 1")
        self.folder = Path(run_folder) / PREDICTIONS
        self.count = count
        self.chosen = settings
        self._start()

    def _start(self) -> None:
        self._wanted: set[int] = set()
        self._overlays: list[tuple[np.ndarray, dict[str, np.ndarray], str]] = []
        self._files: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the settings.

        Raises:
            UserError: the network has no such setting.
        """
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._module = cast(SegmentationModule, pl_module)
        network = self._module.network
        chosen = self.chosen or (network.training_setting, *network.settings.values())
        self._settings = resolve_settings(network, chosen, "callbacks.pictures.settings")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the images."""
        self._start()
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
        """Predict and write the chosen images of this batch."""
        for row, index in enumerate(batch["index"].tolist()):
            if index in self._wanted:
                one = {key: batch[key][row : row + 1] for key in ("image", "mask", "name")}
                self._show(trainer, one)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the index of the pictures, and send them to W&B."""
        if not self._files:
            return
        index = {
            "step": trainer.global_step,
            "settings": [setting.name for setting in self._settings],
            "classes": list(self._data.class_names),
            "palette": np.asarray(self._data.palette).tolist(),
            "images": [{"file": file, "name": name} for file, name in self._files.items()],
        }
        temporary = self.folder / f".{INDEX}.writing"
        temporary.write_text(json.dumps(index), encoding="utf-8")
        temporary.replace(self.folder / INDEX)
        self._log_overlays(trainer)

    def _log_overlays(self, trainer: Trainer) -> None:
        names = dict(enumerate(self._data.class_names)) | {IGNORED: "ignored"}
        for run in wandb_runs(trainer):
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
                    for image, masks, name in self._overlays
                ]
                run.log({"predictions": images, "trainer/global_step": trainer.global_step})
        self._overlays = []

    def _show(self, trainer: Trainer, one: Mapping[str, Any]) -> None:
        name, label = one["name"][0], one["mask"][0]
        label = label.masked_fill(label == self._module.confusion.ignore_index, IGNORED)
        size = _size_within(label.shape, LONGEST_SIDE)
        maps = {"label": _shrink(label, size)}
        for setting in self._settings:
            with trainer.precision_plugin.val_step_context():
                maps[setting.name] = _shrink(self._module.predict(one, setting)[0], size)
        image = _displayable(one["image"], size)
        if wandb_runs(trainer):
            kept = ("label", self._settings[0].name, self._settings[-1].name)
            self._overlays.append((image, {title: maps[title] for title in kept}, name))
        self._write(name, image, np.vstack(list(maps.values())))

    def _write(self, name: str, image: np.ndarray, maps: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
        self._files[file] = name
        written, encoded = cv2.imencode(
            ".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 88]
        )
        assert written
        (self.folder / f"{file}.jpg").write_bytes(encoded.tobytes())
        colors = np.zeros((256, 3), np.uint8)  # ignored pixels are black
        colors[: len(self._data.palette)] = self._data.palette
        picture = Image.fromarray(maps, mode="P")
        picture.putpalette(colors.tobytes())
        picture.save(self.folder / f"{file}.png")


def _size_within(size: Sequence[int], longest: int) -> tuple[int, int]:
    """(height, width) of the same shape with no side longer than that, never enlarged."""
    factor = min(1.0, longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


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
