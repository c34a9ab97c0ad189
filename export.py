"""Write a trained network into a file for other programs: ONNX, or torch.export.

python export.py ckpt=runs/NAME setting=isr_2211_222 format=onnx size=512x512
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_args

from command_line import NETWORK_OPTIONS, open_network, read_arguments, run_command
from segtrain.errors import UserError, did_you_mean

FORMATS = ("onnx", "torch_export")
OPTIONS = {name: meaning for name, meaning in NETWORK_OPTIONS.items() if name != "device"} | {
    "format": "onnx (the default), or torch_export for torch without segtrain",
    "size": "HEIGHTxWIDTH of the images, such as 512x1024; it is baked in, as the setting is",
    "batch": "dynamic (the default), or how many images there are at a time",
    "pixels": "normalised (the default), as the network takes images; uint8 normalises inside",
    "result": "scores (the default), at the network's stride; classes at the image's size",
    "output": "the file, NETWORK_SETTING_SIZE.onnx or .pt2 if left out; there must be none yet",
}
_USAGE = """\
Writes a network with one setting into a file, runs it there, and keeps it if it gives the same.

usage: export.py ckpt=runs/NAME size=HEIGHTxWIDTH [setting=NAME] [format=onnx|torch_export] ...
"""


def main(arguments: list[str]) -> int:
    """Run the command line; returns its status: 0, 2 for a user's slip."""
    return run_command(run, arguments)


def run(arguments: list[str]) -> None:
    """Check everything, then export and say what was written."""
    given = read_arguments(arguments, _USAGE, OPTIONS)
    if given is None:
        return
    size = read_size(given.values.get("size"))
    format = given.values.get("format", FORMATS[0])
    if format not in FORMATS:
        raise UserError(f"'format' cannot be '{format}': {did_you_mean(str(format), FORMATS)}")
    batch = given.values.get("batch", "dynamic")
    if batch != "dynamic" and (type(batch) is not int or batch < 1):
        raise UserError(f"'batch' is dynamic or a number of images, not {batch!r}")

    from segtrain.export import (
        SUFFIXES,
        Pixels,
        Result,
        check_choice,
        check_packages,
        check_place,
        export_network,
    )

    for key, choices in {"pixels": get_args(Pixels), "result": get_args(Result)}.items():
        check_choice(key, given.values.get(key, choices[0]), choices)
    check_packages(format)
    if "output" in given.values:
        check_place(Path(str(given.values["output"])))
    given.values["device"] = "cpu"
    trained = open_network(given)
    network = trained.network
    name = trained.config["model"]["name"] if trained.config else type(network).__name__
    shape = "x".join(map(str, size))
    default = f"{name}_{file_name(network.setting.name)}_{shape}{SUFFIXES[format]}"
    optional: dict[str, Any] = {
        key: given.values[key] for key in ("pixels", "result") if key in given.values
    }
    report = export_network(
        network,
        Path(str(given.values.get("output", default))),
        size=size,
        format=format,
        batch=batch,
        name=name,
        classes=trained.classes,
        **optional,
    )
    result = optional.get("result", "scores")
    shapes = (", ".join(map(str, shape)) for shape in (report.input_shape, report.output_shape))
    print(f"{name} under '{report.setting}': images ({next(shapes)}) -> {result} ({next(shapes)})")
    for file in report.files:
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
    runner = f"opset {report.opset}, run by onnxruntime" if report.opset else "run by torch"
    print(
        f"{runner} on {' and '.join(map(str, report.batches))} random images: {result} differ by "
        f"{report.difference:.1e}"
    )


def read_size(value: object) -> tuple[int, int]:
    """(height, width) of HEIGHTxWIDTH.

    Raises:
        UserError: it is something else.
    """
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(value))
    if sides is None:
        given = "is needed" if value is None else f"is not {value}"
        raise UserError(f"size=HEIGHTxWIDTH {given}: such as size=512x1024")
    return int(sides[1]), int(sides[2])


def file_name(setting: str) -> str:
    """A setting's name without what file names had better not have."""
    return re.sub(r"[^\w.-]+", "_", setting).strip("_")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
