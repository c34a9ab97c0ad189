"""A network for other programs: ONNX and torch.export files, run and compared before they are done.

The setting is baked in, and so is the size of the images.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

import segtrain
from segtrain.classes import Classes
from segtrain.errors import UserError, did_you_mean, first_line
from segtrain.inference import IMAGE_MEAN, IMAGE_STD
from segtrain.networks import Network
from segtrain.networks.blocks import Grid
from segtrain.reduction import Setting

Format = Literal["onnx", "torch_export"]
Pixels = Literal["normalised", "uint8"]
Result = Literal["scores", "classes"]

#: What files of a format end with.
SUFFIXES: Mapping[Format, str] = {"onnx": ".onnx", "torch_export": ".pt2"}
#: Of the operators in an ONNX file.
OPSET = 20
#: How far an exported network may be from the network itself: its scores, as a share of the largest
#: one; its classes, as a share of the pixels.
TOLERANCE = 1e-3
#: What holds the metadata in a file of torch.export, among its ``extra_files``.
METADATA = "segtrain.json"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: How many images a dynamic batch is traced with (one would be taken for a constant), and compared.
TRACED_BATCH, COMPARED_BATCHES = 2, (1, 3)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how close it is.

    Attributes:
        files: the network's, and the one that holds its weights where they are above 1.5 GiB.
        setting: that is baked in.
        input_shape, output_shape: "batch" where the number of images is free.
        opset: of ONNX; None in a file of torch.export.
        difference: between the file, run, and the network: of scores the largest one, as a share of
            the largest score; of classes the share of pixels.
        batches: how many images that was compared with.
    """

    files: tuple[Path, ...]
    setting: str
    input_shape: tuple[int | str, ...]
    output_shape: tuple[int | str, ...]
    opset: int | None
    difference: float
    batches: tuple[int, ...]


class Deployed(nn.Module):
    """A network with as much of the way from pixels to classes as is asked for.

    Args:
        network: images to scores.
        pixels: ``uint8`` takes images (B, 3, H, W) of red, green and blue from 0 to 255;
            ``normalised`` what the network takes.
        result: ``classes`` gives (B, H, W) int64, ``scores`` what the network gives.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, pixels: Pixels, result: Result) -> None:
        super().__init__()
        self.network, self.pixels, self.result = network, pixels, result
        if pixels == "uint8":
            self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None])
            self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[2:]
        if self.pixels == "uint8":
            images = (images.float() - self.mean) / self.std
        scores: Tensor = self.network(images)
        if self.result == "scores":
            return scores
        if scores.shape[2:] != size:
            scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
        return scores.argmax(dim=1)


@torch.no_grad()
def export_network(
    network: Network,
    path: str | Path,
    size: Grid = (512, 512),
    setting: str | Setting | Mapping[str, Any] | None = None,
    format: Format = "onnx",
    batch: int | Literal["dynamic"] = "dynamic",
    pixels: Pixels = "normalised",
    result: Result = "scores",
    name: str | None = None,
    classes: Classes | None = None,
) -> ExportReport:
    """Write a network's evaluation into a file that runs without segtrain.

    The file is run, by onnxruntime or by torch, and only kept if it gives what the network gives
    on random images. It also says what it is of: ``metadata``.

    Args:
        network: any network, on any device; it stays as it is.
        path: of the new file.
        size: (height, width) of the images.
        setting: what is baked in; the current one if None.
        format: ``onnx`` or ``torch_export``.
        batch: how many images there are at a time; ``dynamic`` leaves it free.
        pixels, result: see `Deployed`.
        name: of the network, for the metadata.
        classes: that it tells apart, for the metadata.

    Raises:
        UserError: the file exists already, the network cannot be exported under the setting or with
            a free batch, takes no images of that size, or gives something else once exported.
    """
    path = Path(path)
    check_choice("format", format, SUFFIXES)
    check_choice("pixels", pixels, get_args(Pixels))
    check_choice("result", result, get_args(Result))
    check_packages(format)
    check_place(path)
    network = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    if setting is not None:
        network.setting = network.resolve_setting(setting)
    called = f"{name or type(network).__name__} under '{network.setting.name}'"
    check_fixed(network, called)

    module = Deployed(network, pixels, result).eval()
    numbers = COMPARED_BATCHES if batch == "dynamic" else (batch,)
    images = [random_images(number, size, pixels) for number in numbers]
    try:
        expected = [module(batch) for batch in images]
    except ValueError as error:
        raise UserError(f"images of {size[0]}x{size[1]}: {first_line(error)}") from error

    free = batch == "dynamic"
    meta = metadata(network, size, pixels, result, name, classes)
    # Beside its place, so that a file is there whole or not at all.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as folder:
        written = Path(folder) / path.name
        with _quietly():
            traced = images[0] if not free else random_images(TRACED_BATCH, size, pixels)
            program = trace(module, traced, free, called)
            if format == "onnx":
                write_onnx(program, written, meta, result, called)
                run = run_onnx(written)
            else:
                torch.export.save(program, written, extra_files={METADATA: json.dumps(meta)})
                run = torch.export.load(written).module()
            difference = compare(run, images, expected, called)
        files = [path.parent / file.name for file in sorted(Path(folder).iterdir())]
        for file in files:
            (Path(folder) / file.name).replace(file)
    number: int | str = "batch" if free else batch
    return ExportReport(
        files=tuple(files),
        setting=network.setting.name,
        input_shape=(number, *images[0].shape[1:]),
        output_shape=(number, *expected[0].shape[1:]),
        opset=OPSET if format == "onnx" else None,
        difference=difference,
        batches=numbers,
    )


def check_choice(name: str, value: object, choices: Sequence[str] | Mapping[Any, Any]) -> None:
    """Raise UserError if a value is none of those to choose from."""
    if value not in choices:
        raise UserError(f"'{name}' cannot be '{value}': {did_you_mean(str(value), choices)}")


def check_packages(format: Format) -> None:
    """Raise UserError if a format needs a package that is not installed."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise UserError(
            f"format=onnx needs {', '.join(missing)}, to be installed by: uv sync --group export "
            f"(or pip install {' '.join(missing)}); format=torch_export needs nothing"
        )


def check_place(path: Path) -> None:
    """Raise UserError if no new file can be there."""
    if path.exists():
        raise UserError(f"{path} exists already: remove it, or name another by output=FILE")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}")


def check_fixed(network: Network, called: str) -> None:
    """Raise UserError if how much is computed depends on what the image shows."""
    if network.data_dependent:
        fixed = [name for name, other in network.settings.items() if not other.data_dependent]
        raise UserError(
            f"{called} cannot be exported: how many tokens or layers are left depends on what the "
            "image shows, and a file computes the same for all images. Settings that it can be "
            f"exported under: {', '.join(fixed) or 'none'}"
        )


def metadata(
    network: Network,
    size: Grid,
    pixels: Pixels,
    result: Result,
    name: str | None,
    classes: Classes | None,
) -> dict[str, str]:
    """What a program needs to know to use the file, each value as JSON if it is no text."""
    values: dict[str, Any] = {
        "segtrain_version": segtrain.__version__,
        "network": name or type(network).__name__,
        "setting": network.setting.name,
        "setting_values": network.setting.values,
        "input": "images: (batch, 3, height, width), red, green, blue, "
        + ("uint8" if pixels == "uint8" else "float32, (pixel from 0 to 255 - mean) / std"),
        "image_size": list(size),
        "mean": list(IMAGE_MEAN),
        "std": list(IMAGE_STD),
        "output": "classes: (batch, height, width), int64"
        if result == "classes"
        else f"scores: (batch, classes, height, width), float32, of every {network.stride} pixels",
    }
    if classes is not None:
        described = classes.values
        values["classes"] = described["names"]
        values["palette"] = described["palette"]
        values["ignore_index"] = described["ignore_index"]
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in values.items()}


def random_images(number: int, size: Grid, pixels: Pixels) -> Tensor:
    """(number, 3, H, W), the same each time."""
    generator = torch.Generator().manual_seed(number)
    shape = (number, 3, *size)
    if pixels == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


def trace(module: nn.Module, images: Tensor, free: bool, called: str) -> ExportedProgram:
    """The graph of a module.

    Args:
        images: that it is traced with.
        free: whether their number is left free.
        called: of the network, for messages.

    Raises:
        UserError: it cannot be traced, or not with a free number of images.
    """
    shapes = {"images": {0: torch.export.Dim("batch")} if free else {}}
    try:
        # Strictly, which takes the length of a tensor for a size; else it were a constant.
        return torch.export.export(module, (images,), dynamic_shapes=shapes, strict=True)
    except Exception as error:  # of many kinds
        if "specialized it to be a constant" in str(error):
            raise UserError(
                f"{called} can only be exported for a fixed number of images: give batch=1, or as "
                "many as there are at a time"
            ) from error
        raise UserError(f"torch cannot export {called}: {first_line(error)}") from error


def write_onnx(
    program: ExportedProgram, path: Path, meta: dict[str, str], result: Result, called: str
) -> None:
    """Write a graph as ONNX; weights above 1.5 GiB go into a file of their own beside it.

    Raises:
        UserError: ONNX cannot express it.
    """
    if any(node.target in DECOMPOSITIONS for node in program.graph.nodes):
        program = program.run_decompositions(DECOMPOSITIONS)
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=[result],
            verbose=False,
        )
    except Exception as error:  # of many kinds
        unknown = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
        reason = f"it has no {unknown[1]}" if unknown else first_line(error)
        raise UserError(
            f"ONNX cannot express {called}: {reason}; format=torch_export may"
        ) from error
    assert exported is not None
    exported.model.metadata_props.update(meta)
    exported.save(path)


def adaptive_max_pool(images: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``adaptive_max_pool2d`` cell by cell, without the indices, which are zeros.

    Cell i of o is [floor(i * n / o), ceil((i + 1) * n / o)) of n positions.
    """
    for dim, count in zip((2, 3), output_size, strict=True):
        length = images.shape[dim]
        cells = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
        highest = [images.narrow(dim, start, end - start).amax(dim) for start, end in cells]
        images = torch.stack(highest, dim)
    return images, torch.zeros_like(images, dtype=torch.int64)


def stable_sort(
    values: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """``sort``, stable, as it is to stand in an ONNX file: its TopK puts the first of equals first.

    Torch's own does not promise that.
    """
    if values.dtype in (torch.bool, torch.uint8):
        values = values.int()  # onnxruntime sorts no others
    return values.topk(values.shape[dim], dim=dim, largest=descending)


def stable_argsort(values: Tensor, **order: Any) -> Tensor:
    """``argsort`` by `stable_sort`."""
    return stable_sort(values, **order)[1]


#: What ONNX has no operator for, and its like by those that it has.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.adaptive_max_pool2d.default: adaptive_max_pool,
    torch.ops.aten.sort.stable: stable_sort,
    torch.ops.aten.argsort.stable: stable_argsort,
}


def run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """What an ONNX file computes, on the CPU.

    Raises:
        UserError: onnxruntime cannot run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds
        raise UserError(
            f"onnxruntime cannot run what was exported, nothing is written: {first_line(error)}"
        ) from error
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def compare(
    run: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    expected: Sequence[Tensor],
    called: str,
) -> float:
    """The largest difference over batches of images, see `ExportReport`.

    Raises:
        UserError: it is above the tolerance.
    """
    differences = []
    for batch, scores in zip(images, expected, strict=True):
        found = run(batch)
        if found.shape != scores.shape:
            raise UserError(
                f"{called} gives {tuple(scores.shape)}, the exported file {tuple(found.shape)}"
            )
        if scores.dtype == torch.int64:
            differences.append((found != scores).float().mean().item())
        else:
            differences.append(((found - scores).abs().max() / scores.abs().max()).item())
    difference = max(differences)
    if not all(difference <= TOLERANCE for difference in differences):
        raise UserError(
            f"{called} gives other results once exported, by {difference:.1e} on random images "
            f"where {TOLERANCE:g} is allowed: nothing is written"
        )
    return difference


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporters narrate, warn of themselves, and log errors that are raised anyway."""
    former = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)
