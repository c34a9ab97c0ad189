"""Training ECO-M2F's gate (2404.15244): how good each exit is for each image, then a linear layer.

Three steps. A trains a network that has ``exits``, drawing one for each training step. B, here
`ExitScoring`, scores all exits on the training images and keeps what the gate sees of each image
next to it: `ExitScores`. C, here `fit_gate`, trains the gate alone on that, for one trade between
quality and layers; another trade repeats C, which takes seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from segtrain.errors import UserError
from segtrain.inference import Inference
from segtrain.metrics import count_pairs, mean_iou
from segtrain.networks.exit_gate import ExitGate
from segtrain.networks.mask2former import Mask2Former
from segtrain.reduction.layers_run import LayersRun
from segtrain.training.module import SegmentationModule

_GATE = "decoder.pixels.gate."
#: Of the gate's weights, for inputs of unit variance; ten times more or less changes little.
WEIGHT_DECAY = 1e-3


@dataclasses.dataclass(frozen=True)
class ExitScores:
    """What a gate is trained on.

    Attributes:
        exits: numbers of layers, K of them.
        features: (N, d) float32, what the gate sees of each image.
        qualities: (N, K) float32, how good each exit is for each image, from 0 to 1.
        weights: a digest of the network's weights.
    """

    exits: tuple[int, ...]
    features: Tensor
    qualities: Tensor
    weights: str

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {"features": self.features, "qualities": self.qualities}
        tensors["exits"] = torch.tensor(self.exits)
        temporary = path.with_name(f".{path.name}.writing")
        save_file(tensors, temporary, metadata={"weights": self.weights})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, network: Mask2Former) -> ExitScores:
        """Read the file of `save`.

        Raises:
            UserError: it is another kind of file, or of another network or other weights.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                digest = (file.metadata() or {}).get("weights", "")
            exits = tuple(tensors["exits"].tolist())
            scores = cls(exits, tensors["features"], tensors["qualities"], digest)
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} holds no scores of exits, as task=gate writes them") from error
        if scores.exits != network.exits:
            raise UserError(
                f"{path} scores the exits {list(scores.exits)}, "
                f"the network has {list(network.exits or ())}"
            )
        if scores.weights != digest_weights(network):
            raise UserError(f"{path} scores other weights than these: make the scores again")
        return scores

    def targets(self, beta: float) -> Tensor:
        """(N,) int64: which exit is worth it, by argmax over k of q_k - beta * layers_k.

        Of equally good ones it is the first, which has the fewest layers.

        Args:
            beta: quality that a further layer is to bring, at least.
        """
        layers = torch.tensor(self.exits, dtype=torch.float64)
        return (self.qualities.double() - beta * layers).argmax(dim=1)


class ExitScoring(SegmentationModule):
    """Predicts, in the place of classes, how good the exits of a Mask2Former are for images.

    Attributes:
        scores: of all images that a ``trainer.predict`` has gone through, on all ranks alike.
    """

    network: Mask2Former
    scores: ExitScores | None = None

    def on_predict_start(self) -> None:
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> None:
        features, qualities = score_exits(
            self.network, self.inference, batch["image"], batch["mask"], self.confusion.ignore_index
        )
        rows = zip(features.float().cpu(), qualities.float().cpu(), strict=True)
        self._rows |= dict(zip(batch["index"].tolist(), rows, strict=True))

    def on_predict_end(self) -> None:
        """Bring together what the ranks have, in the order of the images.

        Raises:
            UserError: no image has a label.
        """
        rows = self._rows
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = {index: row for part in parts for index, row in part.items()}
        ordered = [rows[index] for index in sorted(rows)]
        # An image without labels says nothing.
        ordered = [row for row in ordered if row[1].isfinite().all()]
        if not ordered:
            raise UserError(
                "task=gate learns from the labels of training images, and there are none"
            )
        features, qualities = (torch.stack(parts) for parts in zip(*ordered, strict=True))
        assert self.network.exits is not None
        digest = digest_weights(self.network)
        self.scores = ExitScores(self.network.exits, features, qualities, digest)


def exit_settings(network: Mask2Former) -> list[LayersRun]:
    """The training setting with the encoder ending at each exit, ascending."""
    full: LayersRun = network.training_setting  # type: ignore[assignment]
    return [
        dataclasses.replace(full, name=f"exit_{layers}", encoder=(*full.encoder[:2], layers))
        for layers in network.exits or ()
    ]


@torch.inference_mode()
def score_exits(
    network: Mask2Former, inference: Inference, images: Tensor, mask: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """What the gate sees of images, and the quality of each exit for each of them.

    The published quality of an exit is the panoptic quality of the image. Here it is the mean IoU
    of the image over the classes that are labelled in it, NaN where none is.

    Args:
        network: with exits, in evaluation mode.
        inference: how it is applied to an image; to the whole of it.
        images: (B, 3, h, w), normalised.
        mask: (B, H, W) labels.
        ignore_index: label of the pixels that do not count.

    Returns:
        (B, d) features and (B, K) qualities. The backbone and each layer of the encoder run once,
        the decoder of the queries once for each exit.
    """
    pixels = network.decoder.pixels
    coarsest = pixels.input_projections[0]
    qualities = []
    with computed_once([network.encoder, *pixels.input_projections, *pixels.layers]) as results:
        for setting in exit_settings(network):
            with network.using(setting):
                prediction = inference(network, images, mask.shape[1:])
            qualities.append(image_qualities(prediction, mask, network.num_classes, ignore_index))
        assert pixels.gate is not None
        features = pixels.gate.describe(results[coarsest])
    return features, torch.stack(qualities, dim=1)


@contextmanager
def computed_once(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Let each module run once, and give what came of it whenever it is called again.

    The modules are those whose inputs are the same every time: of layers in a row, the first ones
    of whatever number runs.

    Yields:
        what each module that has run gave.
    """
    results: dict[nn.Module, Any] = {}
    former = {module: vars(module).get("forward") for module in modules}

    def remember(module: nn.Module) -> None:
        compute = module.forward

        def forward(*inputs: Any) -> Any:
            if module not in results:
                results[module] = compute(*inputs)
            return results[module]

        module.forward = forward

    for module in former:
        remember(module)
    try:
        yield results
    finally:
        for module, forward in former.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def image_qualities(
    prediction: Tensor, mask: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    """(B, H, W) classes and labels -> (B,) float64: mean IoU of each image, over its own labels."""
    matrices = [
        count_pairs(classes, labels, num_classes, ignore_index)
        for classes, labels in zip(prediction, mask, strict=True)
    ]
    return mean_iou(torch.stack(matrices), absent="unlabelled_nan")


def fit_gate(gate: ExitGate, features: Tensor, targets: Tensor) -> None:
    """Set the gate's weights to those of least cross-entropy, by L-BFGS over all images at once.

    What the authors' code trains with, a softmax over the images of a batch in the place of one
    over the exits, is a slip and not repeated.

    Args:
        gate: trained in place.
        features: (N, d), of `ExitGate.describe`.
        targets: (N,) int64, the index of each image's exit.
    """
    features = features.double()
    mean, deviation = features.mean(dim=0), features.std(dim=0, unbiased=False)
    # A feature that is the same in all images tells nothing.
    scale = torch.where(deviation > 1e-6, 1 / deviation, 0.0)
    inputs = (features - mean) * scale
    weight = inputs.new_zeros(gate.head.weight.shape, requires_grad=True)
    bias = inputs.new_zeros(gate.head.bias.shape, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight.T + bias
        value = F.cross_entropy(logits, targets) + WEIGHT_DECAY / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        weight = weight * scale  # of the features as they are
        gate.head.weight.copy_(weight)
        gate.head.bias.copy_(bias - weight @ mean)


@torch.no_grad()
def choose_exits(gate: ExitGate, features: Tensor) -> Tensor:
    """(N, d), of `ExitGate.describe` -> (N,) int64: the index of the exit that the gate chooses."""
    return gate.head(features.to(gate.head.weight)).argmax(dim=1).cpu()


def digest_weights(network: Mask2Former) -> str:
    """A digest of all weights but the gate's."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if not name.startswith(_GATE):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
