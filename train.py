"""Compose one run from configs/, then fit, validate or resume it.

python train.py                                    # the embedded data, minutes on a CPU
python train.py experiment=edaformer_tiny_ade20k data.root=FOLDER trainer.devices=8
python train.py resume=runs/NAME
python train.py --help
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segtrain.config import ComposedConfig, compose, help_text, to_yaml
from segtrain.config.files import read_file
from segtrain.errors import UserError, check_arguments

if TYPE_CHECKING:
    from lightning import Trainer

    from data import SegmentationData
    from segtrain.training import SegmentationModule

CONFIGS = Path(__file__).parent / "configs"
#: Tells the processes that the first one starts which name it chose for the run.
RUN_NAME = "SEGTRAIN_RUN_NAME"


def main(arguments: list[str]) -> int:
    """Run the command line; returns its status: 0, 2 for a user's slip, 130 if interrupted."""
    try:
        composed = compose(arguments, CONFIGS)
        if composed.show == "help":
            print(help_text(composed, CONFIGS))
        elif composed.show == "cfg":
            print(to_yaml(composed.values), end="")
        else:
            run(composed)
    except UserError as error:
        if os.environ.get("SEGTRAIN_DEBUG"):
            raise
        print(f"segtrain: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"segtrain: interrupted; {interrupt}".rstrip("; "), file=sys.stderr)
        return 130
    return 0


def run(composed: ComposedConfig) -> None:
    """Fit or validate what the configuration describes."""
    config = composed.values
    check_files(config)
    folder = choose_folder(config)

    import torch
    from lightning import seed_everything

    from data import create_data_module

    quiet_libraries()

    data_module = create_data_module(**config["data"])
    data_module.check(["val"] if config["task"] == "validate" else ["train", "val"])
    torch.set_float32_matmul_precision(config["matmul_precision"])
    seed_everything(config["seed"], workers=True, verbose=False)
    module = build_module(config, data_module)
    trainer = build_trainer(config, folder)
    try:
        if config["task"] == "validate":
            trainer.validate(module, data_module, verbose=False)
        else:
            last = folder / "checkpoints" / "last.ckpt"
            resumed = last if config["resume"] is not None and last.exists() else None
            trainer.fit(module, data_module, ckpt_path=resumed, weights_only=True)
    except SystemExit:
        if trainer.interrupted:  # Lightning leaves so after Ctrl-C
            raise KeyboardInterrupt(f"resume={folder} goes on with it") from None
        raise


def check_files(config: dict[str, Any]) -> None:
    """Raise UserError for what the run would miss only after minutes of preparation."""
    for key in ("ckpt", "weights", "encoder_weights"):
        if config[key] is not None and not Path(config[key]).exists():
            raise UserError(f"{key}={config[key]}: there is no such file")
    if config["task"] == "validate" and config["ckpt"] is None and config["weights"] is None:
        raise UserError("task=validate needs the weights to score: ckpt=FILE or weights=FILE")
    schedule = config["schedule"]
    if schedule["steps"] % min(schedule["validate_every"], schedule["steps"]):
        raise UserError(
            f"schedule.steps={schedule['steps']} is not a multiple of "
            f"schedule.validate_every={schedule['validate_every']}: the last steps would never be "
            "scored"
        )


def choose_folder(config: dict[str, Any]) -> Path:
    """The run's folder, the same on all ranks; it is made once nothing can be refused any more.

    Raises:
        UserError: a run of that name exists, its name would differ between processes, or the
            stopped run that should go on had another network or other data.
    """
    if config["resume"] is not None:
        folder = Path(config["resume"])
        saved = read_file(folder / "config.yaml")
        for key in ("model", "data"):
            if config[key]["name"] != saved[key]["name"]:
                raise UserError(
                    f"resume={folder}: that run has {key}={saved[key]['name']}; "
                    f"start a new one for {key}={config[key]['name']}"
                )
        return folder
    if "LOCAL_RANK" in os.environ and RUN_NAME in os.environ:
        return Path("runs") / os.environ[RUN_NAME]
    environment = os.environ
    processes = int(environment.get("WORLD_SIZE") or environment.get("SLURM_NTASKS") or 1)
    rank = int(environment.get("RANK") or environment.get("SLURM_PROCID") or 0)
    if config["name"] is None and processes > 1:
        raise UserError("name=NAME is needed where each process is started from outside")
    default = f"{config['model']['name']}-{config['data']['name']}-{time.strftime('%Y%m%d-%H%M%S')}"
    environment[RUN_NAME] = config["name"] or default
    folder = Path("runs") / environment[RUN_NAME]
    if rank == 0 and folder.exists():
        raise taken(folder)
    return folder


def taken(folder: Path) -> UserError:
    """The error of a run whose folder is there already."""
    return UserError(f"{folder} exists: resume={folder} goes on with it, name= gives another")


def quiet_libraries() -> None:
    """Keep advice that no user of segtrain can act on off the screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.showwarning = lambda message, *_: print(
        f"segtrain: warning: {message}", file=sys.stderr
    )


def build_module(config: dict[str, Any], data_module: SegmentationData) -> SegmentationModule:
    """The network with its weights, and all that trains it."""
    import torch
    from lightning.pytorch.utilities import rank_zero_warn

    from segtrain import create_network, load_weights
    from segtrain.inference import Inference
    from segtrain.training import (
        AdamW,
        CrossEntropy,
        PolynomialSchedule,
        SegmentationModule,
        balanced_weights,
    )

    network = create_network(**config["model"], num_classes=data_module.num_classes)
    if config["encoder_weights"] is not None:
        load_weights(network, config["encoder_weights"], backbone_only=True)
    for key in ("weights", "ckpt"):
        if config[key] is not None:
            for note in load_weights(network, config[key]).notes:
                rank_zero_warn(note)
    criterion = dict(config["criterion"])
    class_weights = criterion["class_weights"]
    if config["task"] == "validate":
        criterion["class_weights"] = None  # nothing is trained, and training labels may be absent
    elif class_weights == "balanced":
        criterion["class_weights"] = balanced_weights(torch.from_numpy(data_module.class_counts()))
    elif class_weights is not None and len(class_weights) != network.num_classes:
        raise UserError(
            f"criterion.class_weights has {len(class_weights)} factors, "
            f"the data {network.num_classes} classes"
        )
    schedule = {k: config["schedule"][k] for k in inspect.signature(PolynomialSchedule).parameters}
    return SegmentationModule(
        network,
        CrossEntropy(**criterion),
        AdamW(**config["optimizer"]),
        PolynomialSchedule(**schedule),
        Inference(**config["inference"]),
        log_every=config["schedule"]["log_every"],
        compile=config["compile"],
        config=config,
    )


def build_trainer(config: dict[str, Any], folder: Path) -> Trainer:
    """Lightning's Trainer with the run's loggers and callbacks; counts optimiser steps only."""
    from lightning import Trainer
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities import rank_zero_only

    from callbacks import create_callbacks, create_loggers, write_run_record

    check_arguments("trainer", config["trainer"], inspect.signature(Trainer).parameters)
    schedule = config["schedule"]
    validate_every = min(schedule["validate_every"], schedule["steps"])
    callbacks = create_callbacks(config["callbacks"], folder)
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
            **config["trainer"],
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {str(error).strip().splitlines()[0]}") from error

    wandb_id = None
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        try:
            folder.mkdir(parents=True, exist_ok=config["resume"] is not None)
        except FileExistsError:
            raise taken(folder) from None
        (folder / "config.yaml").write_text(to_yaml(config | {"resume": None}), encoding="utf-8")
        wandb_id = write_run_record(folder, folder.name, sys.argv)["wandb_id"]
    # Last, because Weights & Biases starts a run here.
    trainer.loggers = create_loggers(config["tracking"], folder, folder.name, wandb_id, config)
    return trainer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
