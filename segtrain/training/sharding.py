"""FSDP2: parameters, gradients and optimiser states shared out over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FSDPModule,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer

from segtrain.networks import Network


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with the checkpoints of every other strategy.

    Within a node each device holds its share of each block; nodes hold the same shares, so that
    gradients alone travel between them. A checkpoint holds whole tensors under the same names and
    numbers as without sharding: it goes on under any strategy, on any number of processes.

    Args:
        sync_batchnorm: whether batch norms share their statistics; Lightning's own switch does not
            reach this strategy.
    """

    def __init__(self, sync_batchnorm: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.sync_batchnorm = sync_batchnorm

    def shard(self, network: Network) -> None:
        """Share out the network's blocks, and what is left of it as one more unit."""
        if self.sync_batchnorm:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        nodes, devices = self.device_mesh.shape
        mesh = self.device_mesh  # nodes x devices of a node
        if nodes == 1:
            mesh = mesh["tensor_parallel"]
        elif devices == 1:
            mesh = mesh["data_parallel"]
        for module in (*network.blocks, network):
            fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(network, "masks")

    def gather(self, network: Network) -> None:
        """Hold all parameters on every rank until ``release``.

        Ranks may then run the network a different number of times, as they do where a validation
        set does not divide evenly. Buffers become those of rank zero, which are the ones saved.
        """
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)
        # What is gathered is used again in training, where no inference tensor may be.
        with torch.inference_mode(False), torch.no_grad():
            for module in _sharded(network):
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()

    def release(self, network: Network) -> None:
        """Go back to the shares."""
        for module in _sharded(network):
            # The backward pass begins with what is left of the network: that is kept for it.
            module.set_reshard_after_forward(module is not network, recurse=False)
            module.reshard()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # the shards are there once the module is configured

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)

    # Lightning numbers parameters in the module's order. An optimiser numbers them group by group,
    # and would take a state by the one order for a state by the other without a word.

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state as ``optimizer.state_dict()`` has it without sharding; on rank zero."""
        assert self.lightning_module is not None
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        named = get_optimizer_state_dict(self.lightning_module, optimizer, options=options)
        state = cast("dict[str, Any]", named)
        if not self.is_global_zero:
            return {}
        names = [name for group in state["param_groups"] for name in group["params"]]
        numbers = {name: number for number, name in enumerate(names)}
        return {
            "state": {numbers[name]: value for name, value in state["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in group["params"]]}
                for group in state["param_groups"]
            ],
        }

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        module = self.lightning_module
        names = {parameter: name for name, parameter in module.named_parameters()}
        options = StateDictOptions(full_state_dict=True)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            groups = [
                {**group, "params": [names[parameter] for parameter in own["params"]]}
                for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
            ]
            by_number = {
                number: name
                for group, named in zip(saved["param_groups"], groups, strict=True)
                for number, name in zip(group["params"], named["params"], strict=True)
            }
            state = {by_number[number]: value for number, value in saved["state"].items()}
            named_state: dict[str, Any] = {"state": state, "param_groups": groups}
            set_optimizer_state_dict(module, optimizer, named_state, options=options)


def _sharded(network: Network) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]
