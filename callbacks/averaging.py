"""An exponential moving average of the weights, which is what validations score."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from segtrain.errors import UserError
from segtrain.training import FullySharded


class ExponentialMovingAverage(WeightAveraging):
    """Follows every optimiser step; validations, the curve and pictures see the average.

    Checkpoints hold both: the average as ``state_dict``, which is what ``ckpt=``, ``weights=`` and
    ``load_weights`` take, and the weights that training goes on from as ``current_model_state``.

    Args:
        decay: share of the average that each step keeps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise UserError(f"callbacks.ema.decay lies between 0 and 1, not at {decay}")
        # All parameters in one operation; Lightning's EMAWeightAveraging takes them one by one.
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the weights.

        Raises:
            UserError: the strategy shards them.
        """
        if isinstance(trainer.strategy, FullySharded):
            raise UserError("callbacks.ema does not go with trainer.strategy=fsdp2: use ddp")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the weights: a checkpoint written after this holds both, as all others do."""
