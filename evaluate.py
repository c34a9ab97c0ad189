"""Score weights on a validation set: every setting, one scale or several, in tables for papers.

python evaluate.py ckpt=runs/NAME
python evaluate.py ckpt=runs/NAME setting=full,bsm_hq scales=[0.5,0.75,1.0,1.25,1.5,1.75] flip=true
python evaluate.py weights=official.pth model=edaformer_tiny data=ade20k data.root=FOLDER
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import train
from command_line import NETWORK_OPTIONS, Arguments, find_weights, read_arguments, run_command
from run_folder import shared_identity
from segtrain.config import ComposedConfig
from segtrain.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

OPTIONS = {
    "ckpt": NETWORK_OPTIONS["ckpt"],
    "weights": NETWORK_OPTIONS["weights"],
    "policy_weights": "FILE: the policy of a CTS network, beside weights=",
    "setting": "one or several, as full,bsm_hq or [full, {budget_gmacs: 40}]; all if left out",
    "scales": "test-time augmentation: sides of the copies whose scores are averaged, as 0.5,1,1.5",
    "flip": "true: and the mirror image of each",
    "output": "FOLDER for the results; runs/evaluate-... if left out",
}
_USAGE = """\
Scores weights on the validation images under all settings, and writes evaluation.csv, .json (IoU of
each class) and .tex (a table for a paper).

usage: evaluate.py ckpt=runs/NAME [data=NAME data.root=FOLDER] [setting=...] [key=value ...]
       evaluate.py weights=FILE model=NAME data=NAME data.root=FOLDER [key=value ...]

A run is scored on its own data and in its own way: inference.mode=slide, trainer.devices=1,
data.limit_eval=100 and so on change that.
"""
#: What a training may have that an evaluation leaves out; arguments that come after these win.
_DEFAULTS = (
    "task=validate",
    "tracking.mode=disabled",
    "tracking.loggers=[]",
    "weights=null",
    "encoder_weights=null",
    "policy_weights=null",
    "resume=null",
)
#: Of results, as a table for people has them.
_TITLES = ("setting", "GMACs", "latency, ms", "mIoU", "change", "pixel acc.", "mean acc.")

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Run the command line; returns its status: 0, 2 for a user's slip, 130 if interrupted."""
    return run_command(evaluate, arguments)


def evaluate(arguments: list[str]) -> None:
    """Validate as train.py does, then write and print the results; of several processes, one."""
    given = read_arguments(arguments, _USAGE, OPTIONS)
    if given is None:
        return
    file, config = compose_evaluation(given)
    config["name"] = name_folder(config, given.values.get("output"))
    folder = Path("runs") / config["name"]
    step = check_classes(file, config) if config["ckpt"] else None
    train.run(ComposedConfig(config, given.overrides, {}, None))

    from lightning.pytorch.utilities import rank_zero_only
    from rich.console import Console

    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return
    source = given.values.get("ckpt") or given.values["weights"]
    results = collect_results(folder, config, {"source": source, "file": str(file), "step": step})
    write_results(folder, results)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(results_table(results))
    print(f"written to {folder}: evaluation.csv, evaluation.json, evaluation.tex")


def compose_evaluation(given: Arguments) -> tuple[Path, dict[str, Any]]:
    """The file with the weights, and the configuration of its validation.

    Raises:
        UserError: see `find_weights`.
    """
    own = given.values
    overrides = [*_DEFAULTS, *given.overrides]
    if "policy_weights" in own:
        overrides.append(f"policy_weights={json.dumps(own['policy_weights'])}")
    if "setting" in own:
        overrides.append(f"setting={_several(own['setting'])}")
    if "scales" in own:
        overrides.append(f"inference.scales={_several(own['scales'])}")
    if "flip" in own:
        overrides.append(f"inference.flip={json.dumps(own['flip'])}")
    file, config = find_weights(Arguments(own, overrides))
    config["ckpt" if "ckpt" in own else "weights"] = str(file)
    if "pretrained" in config["model"]:
        config["model"]["pretrained"] = False  # the file has all weights
    asked = [argument.removeprefix("--").lstrip("+") for argument in given.overrides]
    config["callbacks"] = _asked_callbacks(config["callbacks"], asked)
    return file, config


def _several(value: Any) -> str:
    """What takes one or several values, as train.py reads it: `full,bsm_hq` is a list, too."""
    if isinstance(value, str) and "," in value:
        return f"[{value}]"
    return json.dumps(value if isinstance(value, list | str | dict | None) else [value])


def _asked_callbacks(section: Mapping[str, Any], asked: Sequence[str]) -> dict[str, Any]:
    """The curve over all images, and what the command line names; no pictures and no report."""
    curve = dict(section.get("cost_curve") or {})
    for key, whole in (("limit_batches", None), ("every", 1)):
        if not any(argument.startswith(f"callbacks.cost_curve.{key}=") for argument in asked):
            curve[key] = whole
    keys = [argument.partition("=")[0].split(".") for argument in asked]
    named = {key[1] for key in keys if key[0] == "callbacks" and len(key) > 1}
    kept = section if ["callbacks"] in keys else {n: section[n] for n in section if n in named}
    return {**kept, "cost_curve": curve}


def name_folder(config: Mapping[str, Any], output: str | None) -> str:
    """The folder of the results: its name below runs/, or where else it is, from the root.

    Raises:
        UserError: there is something already.
    """
    if output is not None:
        folder = Path(output).expanduser().absolute()
        if folder.exists() and "LOCAL_RANK" not in os.environ:
            raise UserError(f"output={output} exists: results are written into a new folder")
        return str(folder)
    several = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1
    identity = shared_identity() if several else time.strftime("%Y%m%d-%H%M%S")
    if identity is None:
        raise UserError("output=FOLDER is needed where each process is started from outside")
    return f"evaluate-{config['model']['name']}-{config['data']['name']}-{identity}"


def check_classes(file: Path, config: Mapping[str, Any]) -> int | None:
    """Compare what a checkpoint and the data call classes; returns the checkpoint's step.

    Raises:
        UserError: they are not equally many.
    """
    from lightning.pytorch.utilities import rank_zero_warn

    from data import create_data_module
    from segtrain.checkpoints import read_checkpoint

    content = read_checkpoint(file, check=False)
    theirs = content.get("classes", {}).get("names")
    ours = create_data_module(**config["data"]).class_names
    title = f"data={config['data']['name']}"
    if theirs is not None and len(theirs) != len(ours):
        raise UserError(f"{file} tells {len(theirs)} classes apart, {title} has {len(ours)}")
    if theirs is not None and list(theirs) != list(ours):
        first = next(
            i for i, names in enumerate(zip(theirs, ours, strict=True)) if len({*names}) > 1
        )
        train.quiet_libraries()
        rank_zero_warn(
            f"class {first} is '{theirs[first]}' for {file} and '{ours[first]}' for {title}"
        )
    step: int | None = content.get("global_step")
    return step


def collect_results(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, Any]:
    """What a validation has left in its folder, and what it was made of.

    Args:
        folder: of the validation.
        config: composed.
        weights: their ``source`` as it was given, ``file``, and ``step`` (None if unknown).
    """
    from callbacks.confusion import CONFUSION, read_confusion
    from callbacks.jsonl import CURVE, read_rows

    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    confusion = read_confusion(folder / CONFUSION)
    accuracies = {} if confusion is None else mean_accuracies(confusion.settings, confusion.counts)
    rows = []
    for row in read_rows(folder / CURVE):
        del row["step"]  # of this process, which trains nothing
        rows.append(row | {"mean_accuracy": accuracies.get(row["setting"])})
    about = ("created", "command", "git_commit", "git_dirty", "versions", "devices")
    return {
        "weights": dict(weights),
        "model": config["model"],
        "data": config["data"],
        "inference": config["inference"],
        "precision": config["trainer"].get("precision"),
        "images": rows[0]["images"],
        "settings": rows,
        **{key: record[key] for key in about},
    }


def mean_accuracies(settings: Sequence[str], counts: Any) -> dict[str, float | None]:
    """By setting, the mean over classes of the share of their pixels that are predicted right.

    Args:
        settings: names of the S settings.
        counts: (S, K, K) pixels, rows are labels; classes without labels are left out.
    """
    means: dict[str, float | None] = {}
    for setting, matrix in zip(settings, counts, strict=True):
        labelled = matrix.sum(axis=1)
        right = matrix.diagonal()[labelled > 0] / labelled[labelled > 0]
        means[setting] = float(right.mean()) if len(right) else None
    return means


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write evaluation.json, evaluation.csv and evaluation.tex."""
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    costs = ("gmacs", "gmacs_std", "gmacs_worst", "latency_ms", "latency_low_ms",
             "latency_high_ms", "parameters", "peak_memory_mib", "device")  # fmt: skip
    kept = ("mIoU", "pixel_accuracy", "mean_accuracy", "images", "on_front")
    with (folder / "evaluation.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", *costs, *kept])
        for row in results["settings"]:
            cost = [row["cost"].get(key) for key in costs]
            writer.writerow([row["setting"], *cost, *(row[key] for key in kept)])
    (folder / "evaluation.tex").write_text(latex_table(results), encoding="utf-8")


def cells(results: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a table for people, under the titles of `_TITLES`; accuracies in per cent."""
    first = results["settings"][0]["mIoU"]
    table = []
    for row in results["settings"]:
        cost, change = row["cost"], None
        if row is not results["settings"][0] and None not in (row["mIoU"], first):
            change = 100 * (row["mIoU"] - first)
        spread = "" if cost["gmacs_std"] is None else f" ± {cost['gmacs_std']:.3f}"
        table.append(
            [
                row["setting"],
                f"{cost['gmacs']:.3f}{spread}",
                "" if cost["latency_ms"] is None else f"{cost['latency_ms']:.1f}",
                _percent(row["mIoU"]),
                "" if change is None else f"{change:+.2f}",
                _percent(row["pixel_accuracy"]),
                _percent(row["mean_accuracy"]),
            ]
        )
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def describe(results: Mapping[str, Any]) -> str:
    """What was scored, and how, in one line."""
    inference, weights = results["inference"], results["weights"]
    step = "" if weights["step"] is None else f" (step {weights['step']})"
    parts = [weights["file"] + step, f"{results['images']} images of {results['data']['name']}"]
    if inference["mode"] == "whole":
        parts.append("whole")
    else:
        window, stride = ("x".join(map(str, inference[key])) for key in ("window", "stride"))
        parts.append(f"windows of {window}, {stride} apart")
    if inference["scales"] != [1.0]:
        parts.append(f"scales {', '.join(f'{scale:g}' for scale in inference['scales'])}")
    return ", ".join([*parts, *(["flipped"] if inference["flip"] else [])])


def results_table(results: Mapping[str, Any]) -> Table:
    """What is printed."""
    from rich.table import Table

    table = Table(title=describe(results), title_justify="left")
    table.add_column(_TITLES[0])
    for title in _TITLES[1:]:
        table.add_column(title, justify="right")
    for row, texts in zip(results["settings"], cells(results), strict=True):
        table.add_row(texts[0] + (" *" if row["on_front"] else ""), *texts[1:])
    table.caption = f"* no other setting is both cheaper and better; {describe_cost(results)}"
    return table


def describe_cost(results: Mapping[str, Any]) -> str:
    """What the costs are of."""
    cost = results["settings"][0]["cost"]
    size = "x".join(map(str, cost["image_size"]))
    count = passes(results["inference"])
    which = "" if count == 1 else f", of one pass of {count}"
    return f"costs of one image of {size}{which}, on {cost['device']}"


def passes(inference: Mapping[str, Any]) -> int:
    """How many copies of an image are scored."""
    return len(inference["scales"]) * (1 + inference["flip"])


def latex_table(results: Mapping[str, Any]) -> str:
    """A table for LaTeX's booktabs, to be \\input."""
    comment = " ".join(f"{describe(results)}; {describe_cost(results)}".split())
    lines = [
        f"% {comment}",
        "% \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * (len(_TITLES) - 1)}}}",
        "\\toprule",
        " & ".join(map(escape_latex, _TITLES)) + " \\\\",
        "\\midrule",
        *(" & ".join(map(escape_latex, texts)) + " \\\\" for texts in cells(results)),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
}


def escape_latex(text: str) -> str:
    """A text as LaTeX prints it; a minus before a number is one."""
    if text[:1] in ("+", "-") and text[1:2].isdigit():
        return f"${text}$"
    return "".join(_LATEX.get(character, character) for character in text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
