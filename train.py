"""Compose one run from configs/, then fit, validate or resume it.

python train.py                                    # the embedded data, minutes on a CPU
python train.py experiment=edaformer_tiny_ade20k data.root=FOLDER trainer.devices=8
python train.py resume=runs/NAME                    # or FILE.ckpt, or wandb:entity/project/RUN_ID
python train.py --help
"""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import CONFIGS, run_command
from run_folder import ResumedRun, check_resumed, choose_folder, find_run, taken
from segtrain.config import (
    ComposedConfig,
    compose,
    help_text,
    list_changes,
    to_yaml,
)
from segtrain.errors import Stopped, UserError, check_arguments, first_line

if TYPE_CHECKING:
    from lightning import Trainer
    from torch import nn

    from data import SegmentationData
    from segtrain.networks import Network
    from segtrain.training import SegmentationModule


def main(arguments: list[str]) -> int:
    """Run the command line.

    Returns:
        Its status: 0; 2 for a user's slip; 3 for a loss that is not finite; 130 if interrupted;
        128 + N if stopped by the signal N, 138 (SIGUSR1) or 143 (SIGTERM). Of several processes,
        the first one tells.
    """
    return run_command(compose_and_run, arguments)


def compose_and_run(arguments: list[str]) -> None:
    """Do what the arguments ask for."""
    with find_run(arguments) as resumed:
        composed = compose(arguments, CONFIGS, resumed.folder if resumed else None)
        if composed.show == "help":
            print(help_text(composed, CONFIGS))
        elif composed.show == "cfg":
            print(to_yaml(composed.values), end="")
        else:
            run(composed, resumed)


def run(composed: ComposedConfig, resumed: ResumedRun | None = None) -> None:
    """Fit, validate or gate what the configuration describes."""
    config = composed.values
    if resumed is not None:
        check_resumed(composed, resumed)
    check_files(config)
    folder = choose_folder(config, resumed)

    import torch
    from lightning import seed_everything

    from callbacks.checkpoint_files import find_whole_checkpoint, step_of
    from data import create_data_module
    from segtrain.training import NonFiniteLoss

    quiet_libraries()
    checkpoint = None
    if resumed is not None:
        from callbacks.resume import find_checkpoint, say

        named = {"name": None, "resume": None}
        changes = list_changes((composed.resumed or {}) | named, config | named)
        if changes:
            say(changes)
        steps = config["schedule"]["steps"]
        checkpoint = find_checkpoint(resumed.folder, resumed.checkpoint, steps, folder)

    data_module = create_data_module(**config["data"])
    scores_given = config["task"] == "gate" and config["gate"]["data"] is not None
    only_val = config["task"] == "validate" or scores_given
    data_module.check(["val"] if only_val else ["train", "val"])
    torch.set_float32_matmul_precision(config["matmul_precision"])
    seed_everything(config["seed"], workers=True, verbose=False)
    module = build_module(config, data_module, load=checkpoint is None)
    trainer = build_trainer(config, folder, resumed)
    try:
        if config["task"] == "gate":
            from gate import train_gate

            train_gate(trainer, module, data_module, config, folder)
        elif config["task"] == "validate":
            trainer.validate(module, data_module, verbose=False)
        else:
            if resumed is not None and checkpoint is not None:
                checkpoint = folder / checkpoint.relative_to(resumed.folder)
            trainer.fit(module, data_module, ckpt_path=checkpoint, weights_only=True)
            say_if_stopped(trainer, folder)
    except NonFiniteLoss as error:
        good = find_whole_checkpoint(folder / "checkpoints")
        last_good = f"{good} is of step {step_of(good)}" if good else "there is no checkpoint yet"
        raise stopped(trainer, f"{error}; {last_good}", status=3) from error
    except SystemExit:
        if trainer.interrupted:  # Lightning leaves so after Ctrl-C
            raise KeyboardInterrupt(f"resume={folder} goes on with it") from None
        raise


def say_if_stopped(trainer: Trainer, folder: Path) -> None:
    """Raise Stopped if a signal has ended the training."""
    from callbacks import StopOnSignal

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopOnSignal) and callback.stopped_by is not None:
            by = f"{signal.Signals(callback.stopped_by).name} at step {trainer.global_step}"
            line = f"stopped by {by}; resume={folder} goes on with it"
            raise stopped(trainer, line, status=128 + callback.stopped_by)


def stopped(trainer: Trainer, line: str, status: int) -> Stopped:
    """How this process ends.

    A rank other than zero says nothing and ends with 0: a launcher that sees another status kills
    rank zero, which may still be sending what it has tracked.
    """
    return Stopped(line, status) if trainer.is_global_zero else Stopped("", 0)


def check_files(config: dict[str, Any]) -> None:
    """Raise UserError for what the run would miss only after minutes of preparation."""
    for key in ("ckpt", "weights", "encoder_weights", "policy_weights"):
        # A run that goes on has its weights in its checkpoint.
        if config[key] is not None and config["resume"] is None and not Path(config[key]).exists():
            raise UserError(f"{key}={config[key]}: there is no such file")
    if config["task"] != "fit" and config["ckpt"] is None and config["weights"] is None:
        raise UserError(
            f"task={config['task']} needs the weights to score: ckpt=FILE or weights=FILE"
        )
    if config["task"] == "gate":
        check_gate(config)
    if config["setting"] is not None and config["task"] != "validate":
        raise UserError(
            "setting= goes with task=validate; weights are trained under model.training_setting"
        )
    schedule = config["schedule"]
    if schedule["steps"] % min(schedule["validate_every"], schedule["steps"]):
        raise UserError(
            f"schedule.steps={schedule['steps']} is not a multiple of "
            f"schedule.validate_every={schedule['validate_every']}: the last steps would never be "
            "scored"
        )


def check_gate(config: dict[str, Any]) -> None:
    """Raise UserError for what task=gate cannot work with."""
    file, beta = config["gate"]["data"], config["gate"]["beta"]
    if file is not None and not Path(file).exists():
        raise UserError(f"gate.data={file}: there is no such file")
    if beta < 0:
        raise UserError(f"gate.beta is a quality that a layer costs, at least 0, not {beta:g}")
    if config["inference"]["mode"] != "whole":
        raise UserError("task=gate scores exits of whole images: inference.mode=whole")
    if config["trainer"]["strategy"] == "fsdp2":
        raise UserError("task=gate does not go with trainer.strategy=fsdp2: use ddp")


def check_strategy(trainer: Trainer, config: dict[str, Any]) -> None:
    """Raise UserError if DDP would wait for gradients of layers that a step leaves out."""
    from lightning.pytorch.strategies import DDPStrategy

    leaves_out = config["model"].get("exits") is not None and config["task"] == "fit"
    waits = isinstance(trainer.strategy, DDPStrategy) and trainer.world_size > 1
    if leaves_out and waits and config["trainer"]["strategy"] in ("auto", "ddp"):
        raise UserError(
            "training with model.exits leaves out some layers in every step, which several "
            "processes take with trainer.strategy=ddp_find_unused_parameters_true"
        )


def asked_settings(config: dict[str, Any]) -> list[Any]:
    """What ``setting=`` asks for, in its order; nothing without it."""
    setting = config["setting"]
    if setting is None:
        return []
    return setting if isinstance(setting, list) else [setting]


def quiet_libraries() -> None:
    """Keep advice that no user of segtrain can act on off the screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    # Of depthwise kernels, whose channels last or first are the same memory.
    warnings.filterwarnings("ignore", "(?s).*Grad strides do not match bucket view strides")
    # Nothing is written into what a network gives.
    warnings.filterwarnings("ignore", "(?s)FSDP2-wrapped module .* returned a view tensor")
    warnings.showwarning = lambda message, *_: print(
        f"segtrain: warning: {message}", file=sys.stderr
    )


def build_module(
    config: dict[str, Any], data_module: SegmentationData, load: bool = True
) -> SegmentationModule:
    """The network and all that trains it.

    Args:
        config: composed.
        data_module: what it trains on.
        load: whether to load the weights that the configuration names.
    """
    from callbacks.cost_curve import resolve_settings
    from segtrain import create_network
    from segtrain.calibration import read_budget
    from segtrain.inference import Inference
    from segtrain.networks.cts_policy import SuperpatchPolicy
    from segtrain.training import (
        PolynomialSchedule,
        SegmentationModule,
        create_optimizer,
    )

    network = create_network(**config["model"], num_classes=data_module.num_classes)
    if network.classifies_images != data_module.classifies_images:
        whole, parts = "one class for each image", "a class for each pixel"
        has, wants = (parts, whole) if network.classifies_images else (whole, parts)
        raise UserError(
            f"model={config['model']['name']} gives {wants} and {data_module.title} has {has}: "
            "model.head=classification goes with data=imagenet"
        )
    if isinstance(network, SuperpatchPolicy) and data_module.superpatches is None:
        raise UserError("model=cts_policy learns from superpatches: add data.superpatches=all")
    module_type = SegmentationModule
    if config["task"] == "gate":
        from gate import check_exits
        from segtrain.training.exit_gate import ExitScoring

        check_exits(network, config["model"]["name"])
        module_type = ExitScoring
    if load:
        load_named_weights(network, config)
    settings = resolve_settings(network, asked_settings(config), "setting")
    if config["callbacks"].get("cost_curve") is None and any(
        read_budget(setting) is not None for setting in asked_settings(config)
    ):
        raise UserError("setting={budget_gmacs: ...} needs callbacks.cost_curve, which meets it")
    schedule = {k: config["schedule"][k] for k in inspect.signature(PolynomialSchedule).parameters}
    return module_type(
        network,
        build_criterion(config, network, data_module),
        create_optimizer(**config["optimizer"]),
        PolynomialSchedule(**schedule),
        Inference(**config["inference"], size_divisor=data_module.size_divisor),
        log_every=config["schedule"]["log_every"],
        compile=config["compile"],
        nonfinite=config["nonfinite"],
        activation_checkpointing=config["activation_checkpointing"],
        setting=settings[0] if settings else None,
        ignore_index=data_module.ignore_index,
        classes=data_module.classes,
        config=config,
    )


def load_named_weights(network: Network, config: dict[str, Any]) -> None:
    """Load the files that the configuration names, and warn where a policy is left at random."""
    import torch
    from lightning.pytorch.utilities import rank_zero_warn

    from segtrain import load_weights
    from segtrain.networks.cts import CTS

    policy = network.policy if isinstance(network, CTS) else None
    random = torch.empty(0) if policy is None else policy.decoder.weight.clone()
    for key in ("encoder_weights", "weights", "ckpt", "policy_weights"):
        if config[key] is None:
            continue
        part = policy if key == "policy_weights" else network
        if part is None:
            raise UserError(f"{key}={config[key]}: {config['model']['name']} has no policy")
        report = load_weights(part, config[key], backbone_only=key == "encoder_weights")
        for note in report.notes:
            rank_zero_warn(note)
    if policy is not None and torch.equal(policy.decoder.weight, random):
        rank_zero_warn(
            f"the policy of {config['model']['name']} is random, and so is which tokens are shared:"
            " policy_weights=FILE takes one that was trained with model=cts_policy"
        )


def build_criterion(
    config: dict[str, Any], network: Network, data_module: SegmentationData
) -> nn.Module:
    """The loss that a network is trained with."""
    import torch

    from segtrain.training import (
        AttentionToMaskLoss,
        CrossEntropy,
        SetCriterion,
        balanced_weights,
    )

    criterion = dict(config["criterion"])
    class_weights = criterion["class_weights"]
    own = {"attention_to_mask": AttentionToMaskLoss, "mask_classification": SetCriterion}
    if network.criterion in own:
        for key in ("class_weights", "hard_examples", "label_smoothing"):
            if criterion[key] not in (None, 0, "balanced"):
                raise UserError(
                    f"criterion.{key} is of the cross-entropy, and {config['model']['name']} has "
                    "a loss of its own: leave it out"
                )
        return own[network.criterion](ignore_index=data_module.ignore_index)
    if config["task"] == "validate":
        criterion["class_weights"] = None  # nothing is trained, and training labels may be absent
    elif class_weights == "balanced":
        criterion["class_weights"] = balanced_weights(torch.from_numpy(data_module.class_counts()))
    elif class_weights is not None and len(class_weights) != network.num_classes:
        raise UserError(
            f"criterion.class_weights has {len(class_weights)} factors, "
            f"the data {network.num_classes} classes"
        )
    return CrossEntropy(**criterion, ignore_index=data_module.ignore_index)


def build_trainer(
    config: dict[str, Any], folder: Path, resumed: ResumedRun | None = None
) -> Trainer:
    """Lightning's Trainer with the run's loggers and callbacks; counts optimiser steps only."""
    from lightning import Trainer
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from lightning.pytorch.utilities import rank_zero_only

    from callbacks import check_tracking, create_callbacks, create_loggers, write_run_record
    from segtrain.training import FullySharded

    check_arguments("trainer", config["trainer"], inspect.signature(Trainer).parameters)
    check_tracking(config["tracking"])
    schedule = config["schedule"]
    validate_every = min(schedule["validate_every"], schedule["steps"])
    section = dict(config["callbacks"])
    if section.get("cost_curve") is not None and asked_settings(config):
        section["cost_curve"] = section["cost_curve"] | {"settings": asked_settings(config)}
    callbacks = create_callbacks(section, folder)
    options = dict(config["trainer"])
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning would write a checkpoint and requeue the job in the middle of a step.
        options["plugins"] = [SLURMEnvironment(auto_requeue=False)]
    if options.get("strategy") == "fsdp2":
        options["strategy"] = FullySharded(options.pop("sync_batchnorm", False))
    try:
        trainer = Trainer(
            max_steps=schedule["steps"],
            max_epochs=-1,
            # Lightning counts batches here.
            val_check_interval=validate_every * config["trainer"]["accumulate_grad_batches"],
            check_val_every_n_epoch=None,
            num_sanity_val_steps=1 if config["resume"] is None else 0,
            # The data modules share samples out themselves, and pad nothing.
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
            logger=False,
            callbacks=callbacks,
            **options,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {first_line(error)}") from error
    on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
    if config["trainer"]["sync_batchnorm"] and trainer.world_size > 1 and on_cpu:
        raise UserError(
            "trainer.sync_batchnorm=true works on GPUs alone, and this run has several processes "
            "on CPUs: set it to false"
        )
    check_strategy(trainer, config)

    record = None
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        try:
            if resumed is not None and resumed.brought:
                resumed.folder.rename(folder)
            folder.mkdir(parents=True, exist_ok=resumed is not None)
        except FileExistsError:
            raise taken(folder) from None
        # A run that is killed here keeps the configuration that it had.
        temporary = folder / ".config.yaml.writing"
        temporary.write_text(to_yaml(config | {"resume": None}), encoding="utf-8")
        temporary.replace(folder / "config.yaml")
        record = write_run_record(folder, folder.name, sys.argv)
    # Last, because Weights & Biases starts a run here.
    trainer.loggers = create_loggers(config["tracking"], folder, record, config)
    return trainer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
