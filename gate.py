"""Train the gate of a Mask2Former with exits (ECO-M2F, 2404.15244): the steps of task=gate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor

from callbacks.checkpoint_files import LAST
from segtrain import Network, UserError, measure_cost
from segtrain.networks.mask2former import Mask2Former
from segtrain.training.exit_gate import (
    ExitScores,
    ExitScoring,
    choose_exits,
    exit_settings,
    fit_gate,
)

if TYPE_CHECKING:
    from data import SegmentationData
    from segtrain.training import SegmentationModule

SCORES = "gate.safetensors"  # in the run's folder


class ScoringProgress(Callback):
    """Says every minute how many batches of images are scored."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._told = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line."""
        if trainer.is_global_zero and time.monotonic() - self._told > 60:
            self._told = time.monotonic()
            count = trainer.num_predict_batches[0]
            print(f"scored {batch_idx + 1} of {count} batches of training images", flush=True)


def check_exits(network: Network, name: str) -> None:
    """Raise UserError unless the network has exits that a gate chooses from."""
    if not isinstance(network, Mask2Former) or network.exits is None:
        raise UserError(
            f"task=gate trains the gate of a Mask2Former with exits, and model={name} has none: "
            "model.exits=[2,3,4,5,6], as in training"
        )


def train_gate(
    trainer: Trainer,
    module: SegmentationModule,
    data_module: SegmentationData,
    config: dict[str, Any],
    folder: Path,
) -> None:
    """Score the exits on the training images, unless they are given, fit the gate, validate.

    New scores are written into the run's folder, and the network with its gate as a checkpoint.

    Args:
        trainer: of the run.
        module: an `ExitScoring`, whose network has the weights that are to be gated.
        data_module: whose training images are scored.
        config: composed.
        folder: of the run.
    """
    assert isinstance(module, ExitScoring)
    network, section = module.network, config["gate"]
    if section["data"] is None:
        trainer.callbacks.append(ScoringProgress())  # type: ignore[attr-defined]
        trainer.predict(module, data_module, return_predictions=False)
        assert module.scores is not None
        scores = module.scores
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            scores.save(folder / SCORES)
    else:
        scores = ExitScores.load(Path(section["data"]), network)
    targets = scores.targets(section["beta"])
    gate = network.decoder.pixels.gate
    assert gate is not None
    fit_gate(gate, scores.features, targets)  # on all ranks alike
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        costs = exit_costs(network, data_module.image_size_for_cost)
        chosen = choose_exits(gate, scores.features)
        Console().print(exits_table(scores, section["beta"], targets, chosen, costs))
    trainer.validate(module, data_module, verbose=False)
    trainer.save_checkpoint(folder / "checkpoints" / LAST, weights_only=True)


def exit_costs(network: Mask2Former, image_size: tuple[int, int]) -> Tensor:
    """(K,) GMACs of each exit on a nominal image."""
    macs = [
        measure_cost(network, image_size, setting, latency=False).macs
        for setting in exit_settings(network)
    ]
    return torch.tensor(macs, dtype=torch.float64) / 1e9


def exits_table(
    scores: ExitScores, beta: float, targets: Tensor, chosen: Tensor, costs: Tensor
) -> Table:
    """How many images end at each exit, and what quality and cost that gives on average.

    Args:
        scores: of N images.
        beta: by which the targets are chosen.
        targets, chosen: (N,) the best exit of each image, and the gate's.
        costs: (K,) GMACs.
    """
    table = Table(
        title=f"exits of {len(targets)} training images at beta={beta:g}", title_justify="left"
    )
    table.add_column("layers")
    for column in ("GMACs", "quality", "images", "by the gate"):
        table.add_column(column, justify="right")
    counts = [choices.bincount(minlength=len(costs)).tolist() for choices in (targets, chosen)]
    qualities = scores.qualities.double()
    for layers, cost, quality, best, gated in zip(
        scores.exits, costs.tolist(), qualities.mean(dim=0).tolist(), *counts, strict=True
    ):
        table.add_row(str(layers), f"{cost:.4g}", f"{100 * quality:.2f}", str(best), str(gated))
    table.add_section()
    for name, choices in (("best", targets), ("gate", chosen)):
        quality = qualities.gather(1, choices[:, None]).mean().item()
        table.add_row(name, f"{costs[choices].mean().item():.4g}", f"{100 * quality:.2f}")
    table.caption = "quality: mean IoU of an image, in per cent"
    return table
