"""Panoptic quality of a network that predicts masks, for all its settings, at every validation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.cost_curve import resolve_settings
from callbacks.jsonl import PANOPTIC, append_rows
from callbacks.scoring import ValidationScoring
from segtrain import UserError
from segtrain.mask_inference import confident_queries, panoptic_inference, resize_masks
from segtrain.panoptic_quality import PanopticQuality
from segtrain.reduction import Setting
from segtrain.training import SegmentationModule, log_metrics


class PanopticCurve(ValidationScoring):
    """Scores the segments of every validation batch under each setting of the network.

    It needs the panoptic ground truth in evaluation batches (``data.panoptic=true``) and one
    forward pass for each setting, as images are scored whole whatever ``inference`` says. A
    validation ends in one row per setting, in ``panoptic.jsonl`` and in ``rows``, and in scalars
    ``val/PQ/<setting>``, with SQ, RQ, PQ_things and PQ_stuff beside it.

    Args:
        run_folder: where ``panoptic.jsonl`` is written.
        settings: names of the network's settings, or plain values of others; None takes the
            module's own and all that the network publishes.
        every: score each n-th validation; the last one of a training is always scored.
        limit_batches: score this many batches of each rank; None scores all.
        object_threshold: least probability of a query's class.
        overlap_threshold: least share of its mask that a query has to win.

    Attributes:
        rows: one per (validation, setting), oldest first, as in ``panoptic.jsonl``.
    """

    def __init__(
        self,
        run_folder: Path,
        settings: Sequence[Any] | None = None,
        every: int = 1,
        limit_batches: int | None = None,
        object_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
    ) -> None:
        if min(every, 1 if limit_batches is None else limit_batches) < 1:
            raise UserError("callbacks.panoptic: 'every' and 'limit_batches' are at least 1")
        super().__init__(Path(run_folder) / PANOPTIC, every, limit_batches)
        self.chosen = settings
        self.object_threshold = object_threshold
        self.overlap_threshold = overlap_threshold

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the settings.

        Raises:
            UserError: the network has no such setting or no masks, or the data no segments.
        """
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._module = cast(SegmentationModule, pl_module)
        network = self._module.network
        if network.mask_stride is None:
            raise UserError(
                f"callbacks.panoptic: {type(network).__name__} scores pixels and has no masks to"
                " make segments of; use a network that has (mask2former_*, proscale_*), or leave"
                " the callback out"
            )
        things: Collection[int] | None = getattr(self._data, "things", None)
        if things is None:
            raise UserError(
                "callbacks.panoptic needs panoptic ground truth: set data.panoptic=true (ade20k and"
                " cityscapes have it)"
            )
        self._things = frozenset(things)
        chosen = self.chosen or (self._module.setting, *network.settings.values())
        self._settings = resolve_settings(network, chosen, "callbacks.panoptic.settings")
        self._qualities = [PanopticQuality(things, network.num_classes) for _ in self._settings]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting from zero."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._images = 0
        for quality in self._qualities:
            quality.reset()
            quality.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the segments of the batch under every setting."""
        if not self.is_scored(batch_idx):
            return
        self._images += len(batch["segments"])
        for setting, quality in zip(self._settings, self._qualities, strict=True):
            quality.update(self._predict(trainer, batch, setting), batch["segments"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum over ranks once; on rank zero write and log the rows of this validation."""
        if not self._scoring or trainer.sanity_checking:
            return
        qualities = [quality.compute().cpu() for quality in self._qualities]
        counted = torch.tensor(self._images, device=pl_module.device)
        images = int(trainer.strategy.reduce(counted, reduce_op="sum"))
        if not trainer.is_global_zero:
            return
        rows = [
            self._new_row(trainer, setting, quality, images)
            for setting, quality in zip(self._settings, qualities, strict=True)
        ]
        self.rows += rows
        append_rows(self.file, rows)
        names = ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff")
        log_metrics(trainer, {f"val/{n}/{row['setting']}": row[n] for row in rows for n in names})

    @torch.inference_mode()
    def _predict(self, trainer: Trainer, batch: Mapping[str, Any], setting: Setting) -> Tensor:
        """(B, H, W, 2) classes, -1 for void, and segments at the size of the labels."""
        images, size = batch["image"], batch["mask"].shape[1:]
        module = self._module
        assert module.mask_stride is not None
        with trainer.precision_plugin.val_step_context(), module.network.using(setting):
            prediction = module.masks(images)
        segments = []
        for classes, masks in zip(*prediction, strict=True):
            # Masks of the others are not looked at, and would be large at the size of the labels.
            kept = confident_queries(classes, self.object_threshold)
            final = resize_masks(masks[kept], module.mask_stride, images.shape[2:], size)
            panoptic = panoptic_inference(
                classes[kept], final, self._things, self.object_threshold, self.overlap_threshold
            )
            segments.append(panoptic.categories_and_ids(void=-1))
        return torch.stack(segments)

    def _new_row(
        self, trainer: Trainer, setting: Setting, quality: Tensor, images: int
    ) -> dict[str, Any]:
        """A row, of the qualities (K, 3) of the classes."""
        names = self._data.class_names
        is_thing = torch.tensor([category in self._things for category in range(len(names))])
        panoptic, segmentation, recognition = quality.nanmean(dim=0).tolist()
        return {
            "step": trainer.global_step,
            "setting": setting.name,
            "values": setting.values,
            "training_setting": setting == self._module.network.training_setting,
            "PQ": panoptic,
            "SQ": segmentation,
            "RQ": recognition,
            "PQ_things": quality[is_thing, 0].nanmean().item(),
            "PQ_stuff": quality[~is_thing, 0].nanmean().item(),
            "classes": dict(zip(names, quality[:, 0].tolist(), strict=True)),
            "images": images,
        }
