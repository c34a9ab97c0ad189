"""Accuracy against cost, for all settings of one set of weights, at every validation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from callbacks.jsonl import CURVE, append_rows, read_rows
from callbacks.tracking import wandb_errors_as_warnings, wandb_runs
from segtrain import Cost, Network, UserError, measure_cost
from segtrain.metrics import (
    ConfusionMatrix,
    intersection_over_union,
    mean_iou,
    pixel_accuracy,
)
from segtrain.reduction import Setting
from segtrain.training import FullySharded, SegmentationModule, log_metrics

CHART_ROWS = 10_000  # W&B keeps the first ones of a longer table, and drops the newest


class CostCurve(Callback):
    """Scores every validation batch under each setting of the network; reads no data of its own.

    The module has scored the batch at its own setting, the training setting of a run that trains;
    this callback reuses that prediction and adds one forward pass for each other setting. A
    validation ends in one row per setting, in ``curve.jsonl``, in ``rows`` and in every tracker.

    Args:
        run_folder: where ``curve.jsonl`` is written.
        settings: names of the network's settings, or plain values of others; None takes all that
            the network publishes. The module's own setting is always among them, first.
        every: score each n-th validation; the last one of a training is always scored.
        limit_batches: score this many batches of each rank; None scores all.
        latency: whether to time the network, too, next to counting.

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
    ) -> None:
        if every < 1 or (limit_batches is not None and limit_batches < 1):
            raise UserError("callbacks.cost_curve: 'every' and 'limit_batches' are at least 1")
        self.run_folder = Path(run_folder)
        self.chosen = settings
        self.every = every
        self.limit_batches = limit_batches
        self.latency = latency
        self.rows: list[dict[str, Any]] = []
        self._validations = 0
        self._scoring = False
        self._costs: dict[tuple[str, tuple[int, int], str], Cost] = {}

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were; the rows are in ``curve.jsonl``."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting validations."""
        self._validations = state_dict["validations"]

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
        # Costs are measured on rank zero alone, where nothing could be gathered from the others.
        sharded = isinstance(trainer.strategy, FullySharded) and trainer.is_global_zero
        self._measured = copy.deepcopy(network).cpu() if sharded else network
        self._confusion = ConfusionMatrix(
            network.num_classes, len(self._settings), self._module.confusion.ignore_index
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the rows of a run that goes on."""
        if trainer.is_global_zero:
            self.rows = read_rows(self.run_folder / CURVE)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting from zero."""
        if not trainer.sanity_checking:
            self._validations += 1
        self._scoring = (
            trainer.sanity_checking
            or trainer.state.fn is not TrainerFn.FITTING
            or self._validations % self.every == 0
            or trainer.global_step == trainer.max_steps
        )
        self._images = 0
        self._confusion.reset()
        self._confusion.to(pl_module.device)

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
        if not self._scoring or (
            self.limit_batches is not None and batch_idx >= self.limit_batches
        ):
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
        append_rows(self.run_folder / CURVE, rows)
        log_metrics(trainer, _scalars(rows))
        self._log_charts(trainer)

    def _new_rows(self, trainer: Trainer, matrix: Tensor, images: int) -> list[dict[str, Any]]:
        names = self._data.class_names
        accuracy = mean_iou(matrix).tolist()
        pixels = pixel_accuracy(matrix).tolist()
        classes = intersection_over_union(matrix).tolist()
        costs = [self._cost(trainer, setting) for setting in self._settings]
        on_front = find_front([cost["macs"] for cost in costs], accuracy)
        return [
            {
                "step": trainer.global_step,
                "setting": setting.name,
                "values": setting.values,
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

    def _cost(self, trainer: Trainer, setting: Setting) -> dict[str, Any]:
        """The cost of a setting as plain values; measured once for an image size and device."""
        size, device = tuple(self._data.image_size_for_cost), self._module.device
        key = (setting.name, size, str(device))
        if key not in self._costs:
            with trainer.precision_plugin.val_step_context():
                self._costs[key] = measure_cost(
                    self._measured, size, setting, device, latency=self.latency
                )
        cost = self._costs[key]
        low, high = cost.latency_spread_ms or (None, None)
        return {
            "parameters": cost.parameters,
            "macs": cost.macs,
            "gmacs": cost.macs / 1e9,
            "latency_ms": cost.latency_ms,
            "latency_low_ms": low,
            "latency_high_ms": high,
            "peak_memory_mib": cost.peak_memory_mib,
            "image_size": list(size),
            "device": cost.device,
            "convention": cost.convention,
        }

    def _log_charts(self, trainer: Trainer) -> None:
        for run in wandb_runs(trainer):
            with wandb_errors_as_warnings("the curve"):
                charts = _charts(self.rows[-CHART_ROWS:])
                run.log({**charts, "trainer/global_step": trainer.global_step})


def resolve_settings(
    network: Network, chosen: Iterable[str | Setting | Mapping[str, Any]], key: str
) -> list[Setting]:
    """The settings that a configuration chooses, each once, in its order.

    Raises:
        UserError: the network has no such setting; the message begins with the configuration's key.
    """
    try:
        resolved = [network.resolve_setting(setting) for setting in chosen]
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
        if row["cost"]["latency_ms"] is not None:
            scalars[f"cost/latency_ms/{row['setting']}"] = row["cost"]["latency_ms"]
    return scalars


def _charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What W&B draws of the curve."""
    import wandb

    kept = ("step", "setting", "mIoU", "pixel_accuracy", "on_front")
    costs = ("gmacs", "latency_ms", "parameters", "peak_memory_mib")
    cells = [[row[k] for k in kept] + [row["cost"][c] for c in costs] for row in rows]
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
