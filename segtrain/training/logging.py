"""The one way to log numbers, so that all of them share one time axis."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Send scalars to every logger at the current count of optimiser steps.

    Lightning's own ``self.log`` stamps what is logged at the end of a validation with another
    step than what callbacks log there. Loggers act on rank zero alone.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
