"""Accuracy against cost, for all settings of one set of weights, at every validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.confusion import CONFUSION, Confusion, write_confusion
from callbacks.jsonl import CURVE, append_rows
from callbacks.scoring import ValidationScoring
from callbacks.setting_costs import SettingCosts
from callbacks.tracking import wandb_errors_as_warnings, wandb_runs
from segtrain import Network, UserError
from segtrain.calibration import placeholder, read_budget
from segtrain.metrics import (
    ConfusionMatrix,
    intersection_over_union,
    mean_iou,
    pixel_accuracy,
)
from segtrain.reduction import Setting
from segtrain.training import SegmentationModule, log_metrics

CHART_ROWS = 10_000  # W&B keeps the first ones of a longer table, and drops the newest


class CostCurve(ValidationScoring):
    """Scores every validation batch under each setting of the network.

    It reads no data of its own, but for the few images that a cost may depend on. The module has
    scored the batch at its own setting, the training setting of a run that trains; this callback
    reuses that prediction and adds one forward pass for each other setting. A validation ends in
    one row per setting, in ``curve.jsonl``, in ``rows`` and in every tracker; the counts of which
    class is taken for which are kept of the newest one alone, in ``confusion.npz``.

    Args:
        run_folder: where ``curve.jsonl`` and ``confusion.npz`` are written.
        settings: names of the network's settings, plain values of others, or
            ``{"budget_gmacs": 40}``: before every validation, a threshold is chosen by which images
            cost that on average. None takes all settings that the network publishes. The module's
            own setting is always among them, first.
        every: score each n-th validation; the last one of a training is always scored.
        limit_batches: score this many batches of each rank; None scores all.
        latency: whether to time the network, too, next to counting.
        cost_images: where the cost depends on the image, this many validation images are counted,
            spread over all of them.

    Attributes:
        rows: one per (validation, setting), oldest first, as in ``curve.jsonl``.
    """

    def __init__(
        self,
        run_folder: Path,
        settings: Sequence[str | Mapping[str, Any]] | None = None,
        every: int = 1,
        limit_batches: int | None = None,
        latency: bool = True,
        cost_images: int = 16,
    ) -> None:
        if min(every, cost_images, 1 if limit_batches is None else limit_batches) < 1:
            raise UserError(
                "callbacks.cost_curve: 'every', 'limit_batches' and 'cost_images' are at least 1"
            )
        self.run_folder = Path(run_folder)
        super().__init__(self.run_folder / CURVE, every, limit_batches)
        self.chosen = settings
        self.latency = latency
        self.cost_images = cost_images

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the settings.

        Raises:
            UserError: the network has no such setting.
        """
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._module = cast(SegmentationModule, pl_module)
        network = self._module.network
        chosen = network.settings.values() if self.chosen is None else self.chosen
        self._settings = resolve_settings(
            network, [self._module.setting, *chosen], "callbacks.cost_curve.settings"
        )
        budgets = [budget for budget in map(read_budget, chosen) if budget is not None]
        self._costs = SettingCosts(trainer, budgets, self.latency, self.cost_images)
        self._confusion = ConfusionMatrix(
            network.num_classes, len(self._settings), self._module.confusion.ignore_index
        )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose thresholds for budgets, measure costs, and start counting from zero.

        Raises:
            UserError: a budget is out of reach, and no training would be lost.
        """
        super().on_validation_epoch_start(trainer, pl_module)
        self._images = 0
        self._confusion.reset()
        self._confusion.to(pl_module.device)
        if self._scoring:
            self._settings = self._costs.meet_budgets(trainer, self._settings)
            self._module.setting = self._settings[0]
            if trainer.is_global_zero and not trainer.sanity_checking:
                self._costs.measure(trainer, self._settings)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch under every setting."""
        if not self.is_scored(batch_idx):
            return
        self._images += len(batch["mask"])
        self._confusion.update(outputs["prediction"], batch["mask"], 0)
        for index, setting in enumerate(self._settings[1:], start=1):
            with trainer.precision_plugin.val_step_context():
                prediction = self._module.predict(batch, setting)
            self._confusion.update(prediction, batch["mask"], index)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum over ranks once; on rank zero write and log the rows of this validation."""
        if not self._scoring:
            return
        matrix = self._confusion.compute().cpu()
        counted = torch.tensor(self._images, device=pl_module.device)
        images = int(trainer.strategy.reduce(counted, reduce_op="sum"))
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        rows = self._new_rows(trainer, matrix, images)
        self.rows += rows
        append_rows(self.file, rows)
        names = [setting.name for setting in self._settings]
        confusion = Confusion(trainer.global_step, names, self._data.class_names, matrix.numpy())
        write_confusion(self.run_folder / CONFUSION, confusion)
        log_metrics(trainer, _scalars(rows))
        self._log_charts(trainer)

    def _new_rows(self, trainer: Trainer, matrix: Tensor, images: int) -> list[dict[str, Any]]:
        names = self._data.class_names
        accuracy = mean_iou(matrix).tolist()
        pixels = pixel_accuracy(matrix).tolist()
        classes = intersection_over_union(matrix).tolist()
        costs = [self._costs.row(setting) for setting in self._settings]
        on_front = find_front([cost["macs"] for cost in costs], accuracy)
        return [
            {
                "step": trainer.global_step,
                "setting": setting.name,
                "values": setting.values,
                "threshold": self._costs.thresholds.get(setting.name),
                "training_setting": setting == self._module.network.training_setting,
                "mIoU": accuracy[index],
                "pixel_accuracy": pixels[index],
                "IoU": dict(zip(names, classes[index], strict=True)),
                "images": images,
                "on_front": on_front[index],
                "cost": costs[index],
            }
            for index, setting in enumerate(self._settings)
        ]

    def _log_charts(self, trainer: Trainer) -> None:
        for run in wandb_runs(trainer):
            with wandb_errors_as_warnings("the curve"):
                charts = _charts(self.rows[-CHART_ROWS:])
                run.log({**charts, "trainer/global_step": trainer.global_step})


def resolve_settings(
    network: Network, chosen: Iterable[str | Setting | Mapping[str, Any]], key: str
) -> list[Setting]:
    """The settings that a configuration chooses, each once, in its order.

    For a budget it is one whose threshold is still to be found.

    Raises:
        UserError: the network has no such setting; the message begins with the configuration's key.
    """
    resolved = []
    try:
        for setting in chosen:
            budget = read_budget(setting)
            resolved.append(
                network.resolve_setting(setting) if budget is None else placeholder(network, budget)
            )
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return list({setting.name: setting for setting in resolved}.values())


def find_front(costs: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Which points no other point beats: none is at most as costly and at least as accurate,
    and better in one of the two. A point whose accuracy is NaN is never on the front.
    """
    points = list(zip(costs, accuracies, strict=True))
    return [
        accuracy == accuracy
        and not any(
            other_cost <= cost
            and other_accuracy >= accuracy
            and (other_cost < cost or other_accuracy > accuracy)
            for other_cost, other_accuracy in points
        )
        for cost, accuracy in points
    ]


def _scalars(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    scalars = {}
    for row in rows:
        scalars[f"val/mIoU/{row['setting']}"] = row["mIoU"]
        scalars[f"cost/gmacs/{row['setting']}"] = row["cost"]["gmacs"]
        if row["threshold"] is not None:
            scalars[f"cost/threshold/{row['setting']}"] = row["threshold"]
        if row["cost"]["latency_ms"] is not None:
            scalars[f"cost/latency_ms/{row['setting']}"] = row["cost"]["latency_ms"]
    return scalars


def _charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What W&B draws of the curve."""
    import wandb

    kept = ("step", "setting", "mIoU", "pixel_accuracy", "on_front")
    costs = (
        "gmacs", "gmacs_std", "gmacs_worst", "latency_ms", "parameters", "peak_memory_mib",
    )  # fmt: skip
    # A run that goes on may have rows from before costs had a spread.
    cells = [[row[k] for k in kept] + [row["cost"].get(c) for c in costs] for row in rows]
    charts: dict[str, Any] = {"curve/table": wandb.Table(columns=[*kept, *costs], data=cells)}
    for cost, title in (("gmacs", "GMACs"), ("latency_ms", "latency in ms")):
        if rows[-1]["cost"][cost] is not None:
            lines = _lines(rows, cost)
            charts[f"curve/mIoU_vs_{cost.removesuffix('_ms')}"] = wandb.plot.line_series(
                xs=[[x for x, _ in line] for line in lines.values()],
                ys=[[y for _, y in line] for line in lines.values()],
                keys=[f"step {step}" for step in lines],
                title=f"mIoU against {title}, one line per validation",
                xname=title,
            )
    return charts


def _lines(rows: Sequence[Mapping[str, Any]], cost: str) -> dict[int, list[tuple[float, float]]]:
    """The curve of each validation: step -> (cost, mIoU) by rising cost."""
    lines: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if row["cost"][cost] is not None:
            lines.setdefault(row["step"], []).append((row["cost"][cost], row["mIoU"]))
    return {step: sorted(line) for step, line in lines.items()}
