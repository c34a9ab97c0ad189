"""What a network costs at one setting and one image size."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from segtrain.errors import UserError, did_you_mean
from segtrain.networks import Network
from segtrain.reduction import Setting

aten = torch.ops.aten

#: Work of one call of an operator, from its arguments and its output.
Work = Callable[[tuple[Any, ...], Any], float]


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass in evaluation mode.

    Attributes:
        parameters: number of learnt values.
        macs: multiply-accumulates of the pass under ``convention``, their mean over several images.
        macs_std: standard deviation over the images; None unless the cost depends on the image and
            images were given.
        macs_worst: of the image that costs most; None as ``macs_std`` is.
        latency_ms: median over repetitions after a warm-up, the device synchronised around each.
            Images that were given take turns.
        latency_spread_ms: lower and upper quartile of the repetitions.
        peak_memory_mib: parameters, buffers, images and what the pass holds beside them at its
            peak, of the image that needs most. On CUDA as the allocator saw it; elsewhere the sum
            of the tensors alive, the scratch memory inside a single operator left out.
        image_size: (height, width) in pixels.
        batch_size: images of the pass.
        device: what the latency and the memory belong to.
        convention: a key of ``CONVENTIONS``.
    """

    parameters: int
    macs: int
    macs_std: float | None
    macs_worst: int | None
    latency_ms: float | None
    latency_spread_ms: tuple[float, float] | None
    peak_memory_mib: float
    image_size: tuple[int, int]
    batch_size: int
    device: str
    convention: str


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    images, weight, transposed = args[0], args[1], args[6]
    return (images if transposed else out).numel() * math.prod(weight.shape[1:])


def _convolution_and_bias(args: tuple[Any, ...], out: Tensor) -> int:
    return _convolution(args, out) + (0 if args[2] is None else out.numel())


def _product(args: tuple[Any, ...], out: Tensor) -> int:
    return out.numel() * args[0].shape[-1]


def _added_product(args: tuple[Any, ...], out: Tensor) -> int:
    return out.numel() * args[1].shape[-1]


def _einsum(args: tuple[Any, ...], out: Tensor) -> int:
    equation, operands = args[:2]
    if len(operands) == 1:
        return 0
    sides: dict[str | int, int] = {}
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    for term, operand in zip(terms, operands, strict=True):
        before, dots, after = term.partition("...")
        unnamed = range(len(before) + len(after) - operand.dim(), 0) if dots else ()
        for name, side in zip((*before, *unnamed, *after), operand.shape, strict=True):
            sides[name] = max(side, sides.get(name, 1))
    return math.prod(sides.values())


def _printed_einsum(args: tuple[Any, ...], out: Tensor) -> float:
    # fvcore reads what numpy prints, which are four digits.
    return float(f"{2 * _einsum(args, out):.3e}") // 2


def _attention(args: tuple[Any, ...], out: Tensor) -> int:
    query, key, value = args[:3]
    rows = out.numel() // value.shape[-1]
    return rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _traced_attention(args: tuple[Any, ...], out: Tensor) -> int:
    # Where keys are hidden, torch's MultiheadAttention multiplies them with queries by baddbmm,
    # which fvcore does not know.
    hidden = len(args) > 3 and args[3] is not None and args[3].dtype == torch.bool
    return out.numel() * args[1].shape[-2] if hidden else _attention(args, out)


def _packed_attention(args: tuple[Any, ...], out: Any) -> int:
    query, _, value, query_ends, key_ends = args[:5]
    pairs = int((query_ends.diff().long() * key_ends.diff()).sum())
    return pairs * query.shape[1] * (query.shape[2] + value.shape[2])


def _per_input(weight: float) -> Work:
    return lambda args, out: weight * args[0].numel()


def _per_output(weight: float) -> Work:
    return lambda args, out: weight * out.numel()


_MACS: dict[Any, Work] = {
    aten.convolution: _convolution,
    aten.linear: _product,
    aten.matmul: _product,
    aten.einsum: _einsum,
    aten.mm: _product,
    aten.bmm: _product,
    aten.addmm: _added_product,
    aten.baddbmm: _added_product,
    aten.scaled_dot_product_attention: _attention,
    # By its name: torch has it only once it is imported, which takes seconds.
    "torch_attn._varlen_attn": _packed_attention,
}

_MMCV: dict[Any, Work] = _MACS | {
    aten.convolution: _convolution_and_bias,
    aten.avg_pool2d: _per_input(1),
    aten.relu: _per_output(1),
    aten.relu_: _per_output(1),
}

#: What each published way of counting counts, by operator.
#:
#: - ``macs``: convolutions, linear layers and attention products; no biases.
#: - ``official``: as ``macs``, of the authors' formulation where ours gives the same scores with
#:   fewer operations. So are the others.
#: - ``mmcv``: the module counter of mmcv 1.3 plus attention products, the GFLOPs of EDAFormer's
#:   tables. The batch norm of those models is a SyncBN, which mmcv leaves out.
#: - ``mmcv_1.2``: the same of mmcv 1.2, which leaves layer norms out, too: SegFormer's tables.
#: - ``fvcore``: the default handlers of fvcore's FlopCountAnalysis, in evaluation mode. It does not
#:   see into the kernel in which the authors' deformable attention samples.
CONVENTIONS: Mapping[str, Mapping[Any, Work]] = {
    "macs": _MACS,
    "official": _MACS,
    "mmcv": _MMCV | {aten.layer_norm: _per_input(2)},
    "mmcv_1.2": _MMCV,
    "fvcore": _MACS
    | {
        aten.einsum: _printed_einsum,
        aten.scaled_dot_product_attention: _traced_attention,
        aten.batch_norm: lambda args, out: out.numel() * (1 if args[1] is None else 2),
        aten.layer_norm: lambda args, out: out.numel() * (4 if args[2] is None else 5),
        aten.group_norm: lambda args, out: out.numel() * (4 if args[2] is None else 5),
        aten.upsample_nearest2d: _per_output(1),
        aten.upsample_bilinear2d: _per_output(4),
        aten.grid_sampler: _per_output(0),
        aten.adaptive_avg_pool2d: _per_input(1),
    },
}
_COUNTED = {operator for work in CONVENTIONS.values() for operator in work}


class _Meter(TorchDispatchMode):
    """Counts the work of the operators that run under it, and the bytes of the tensors alive.

    To be used under ``inference_mode``: only there do composite operators (linear, matmul,
    einsum, attention) arrive whole. Those that no convention counts are taken apart, so that
    nothing stays hidden inside them, and the same ones under every convention.
    """

    def __init__(self, work: Mapping[Any, Work], resident: Iterable[Tensor]) -> None:
        super().__init__()
        self.work = work
        self.count = 0.0
        self.peak_bytes = 0
        storages = [tensor.untyped_storage() for tensor in resident]
        self._live = {storage._cdata: storage.nbytes() for storage in storages}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = func.overloadpacket if func.namespace == "aten" else str(func.overloadpacket)
        if operator not in _COUNTED:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if operator in self.work:
            self.count += self.work[operator](args, out)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        return out

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._live:
            self._live[address] = storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))
            weakref.finalize(storage, self._live.pop, address)


def measure_cost(
    network: Network,
    image_size: tuple[int, int] = (512, 512),
    setting: str | Setting | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    *,
    images: Tensor | None = None,
    convention: str = "macs",
    latency: bool = True,
    batch_size: int = 1,
) -> Cost:
    """Cost of one forward pass; the network's mode and setting are as before afterwards.

    Multiply-accumulates are counted on tensors without data, so that the count takes no
    arithmetic and no memory whatever the image size. A network whose cost depends on the image
    runs on ``images`` instead, one at a time, or on noise.

    Args:
        network: any network; its parameters say in which precision it runs.
        image_size: (height, width) in pixels.
        setting: the current one if None.
        device: where latency and memory are measured, a copy of the network being moved there if
            it is elsewhere; the network's own device if None.
        images: (N, 3, H, W), normalised, at least one; their size and a batch of one image take the
            place of ``image_size`` and ``batch_size``.
        convention: how operations are counted, a key of ``CONVENTIONS``.
        latency: False leaves the timed passes out.
        batch_size: images of the pass.

    Raises:
        UserError: no such convention or setting.
    """
    if convention not in CONVENTIONS:
        raise UserError(
            f"there is no MAC convention '{convention}': {did_you_mean(convention, CONVENTIONS)}"
        )
    parameter = next(network.parameters())
    device = parameter.device if device is None else torch.device(device)
    if device != parameter.device:
        network = copy.deepcopy(network).to(device)
    if images is not None:
        image_size, batch_size = (images.shape[2], images.shape[3]), 1

    setting = network.setting if setting is None else setting
    with network.using(setting), _evaluating(network), torch.inference_mode():
        alone = images is not None and network.data_dependent
        if images is None or not alone:
            generator = torch.Generator().manual_seed(0)
            images = torch.randn((batch_size, 3, *image_size), generator=generator)
        # Copied, for a part would hold the memory of all images.
        batches = [
            batch.to(device, parameter.dtype, memory_format=torch.channels_last, copy=True)
            for batch in images.split(1 if alone else batch_size)
        ]
        counts = [_count(network, batch, convention) for batch in batches]
        macs = [count for count, _ in counts]
        peak_bytes = max(count for _, count in counts)
        times = _time_ms(network, batches) if latency else None
        if device.type == "cuda":
            peak_bytes = _cuda_peak_bytes(network, batches[macs.index(max(macs))])
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if times else None
    return Cost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        macs=round(statistics.mean(macs)),
        macs_std=statistics.pstdev(macs) if alone else None,
        macs_worst=max(macs) if alone else None,
        latency_ms=quartiles[1] if quartiles else None,
        latency_spread_ms=(quartiles[0], quartiles[2]) if quartiles else None,
        peak_memory_mib=peak_bytes / 2**20,
        image_size=image_size,
        batch_size=batch_size,
        device=str(device),
        convention=convention,
    )


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _count(network: Network, images: Tensor, convention: str) -> tuple[int, int]:
    """Work of a pass, and the bytes of its tensors at the peak."""
    state = _state(network)
    if not network.data_dependent:
        state = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
        images = torch.empty_like(images, device="meta")
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide a whole layer in one operator
    network.as_published = convention != "macs"
    try:
        with _Meter(CONVENTIONS[convention], [images, *state.values()]) as meter:
            functional_call(network, state, (images,))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        network.as_published = False
    return round(meter.count), meter.peak_bytes


def _time_ms(network: nn.Module, batches: Sequence[Tensor]) -> list[float]:
    def repeat(seconds: float, at_least: int) -> list[float]:
        times: list[float] = []
        for images in itertools.cycle(batches):
            if len(times) >= max(at_least, len(batches)) and sum(times) >= seconds * 1e3:
                break
            start = time.perf_counter()
            network(images)
            if images.device.type != "cpu":
                torch.accelerator.synchronize(images.device)
            times.append((time.perf_counter() - start) * 1e3)
        return times

    repeat(seconds=0.3, at_least=2)  # kernels are chosen and clocks rise
    return repeat(seconds=1, at_least=5)


def _cuda_peak_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes of network and images, and what a pass adds; whatever else lives there left out."""
    network(images)  # what libraries allocate once for all passes is not this pass's
    torch.cuda.synchronize(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    network(images)
    torch.cuda.synchronize(images.device)
    added = torch.cuda.max_memory_allocated(images.device) - before
    return added + sum(tensor.nbytes for tensor in [images, *_state(network).values()])
