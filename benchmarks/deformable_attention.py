"""Deformable attention against the formulation of its ports; Mask2Former against Hugging Face's.

python -m benchmarks.deformable_attention                   # the attention alone, then networks
python -m benchmarks.deformable_attention --attention       # the attention alone: minutes less
python -m benchmarks.deformable_attention --networks mask2former_swin_t --sizes 512

The formulation that ports of the CUDA kernel share samples every level, stacks all samples, and
sums them by their weights; Hugging Face's is measured, with tokens of the encoder's three levels.
Times are medians over rounds in which all take turns, shown as ratios: 2 is twice as fast.
"""

import argparse

import torch

from benchmarks.merging import in_turns
from segtrain import create_network
from segtrain.networks.deformable_attention import (
    attend_by_gathering,
    attend_by_sampling,
    reference_points,
)

HEADS, WIDTH, POINTS = 8, 32, 4
STRIDES = (32, 16, 8)


def encoder_inputs(size, device):
    """Values, grids, locations and weights of an encoder's layer, about three pixels away."""
    generator = torch.Generator().manual_seed(0)
    grids = [(size[0] // stride, size[1] // stride) for stride in STRIDES]
    references = torch.cat([reference_points(grid, torch.device("cpu")) for grid in grids])
    tokens, levels = len(references), len(grids)
    values = torch.randn(1, tokens, HEADS, WIDTH, generator=generator)
    offsets = 3 * torch.randn(1, tokens, HEADS, levels, POINTS, 2, generator=generator)
    sides = torch.tensor([grid[::-1] for grid in grids])[:, None]
    locations = references[:, None, None, None] + offsets / sides
    weights = torch.randn(1, tokens, HEADS, levels * POINTS, generator=generator).softmax(dim=3)
    weights = weights.unflatten(3, (levels, POINTS))
    return values.to(device), grids, locations.to(device), weights.to(device)


def measure_attention(size, device, rounds):
    """All ways of one layer's attention, forward, and forward and backward."""
    from transformers.models.mask2former.modeling_mask2former import (
        multi_scale_deformable_attention as stacked,
    )

    values, grids, locations, weights = encoder_inputs(size, device)
    ways = {"stacking (Hugging Face)": stacked, "sampling": attend_by_sampling}
    ways["gathering"] = attend_by_gathering
    leaves = [tensor.clone().requires_grad_() for tensor in (values, locations, weights)]

    @torch.inference_mode()
    def forward(way):
        return way(values, grids, locations, weights)

    def both(way):
        way(leaves[0], grids, leaves[1], leaves[2]).sum().backward()
        for leaf in leaves:
            leaf.grad = None

    for way in ways.values():
        torch.testing.assert_close(forward(way), forward(stacked), rtol=1e-3, atol=1e-4)
    calls = [lambda run=run, way=way: run(way) for run in (forward, both) for way in ways.values()]
    times = in_turns(calls, device, rounds)
    inference, training = times[: len(ways)], times[len(ways) :]
    print(f"one layer at {size[0]}x{size[1]}, {len(values[0])} tokens, {device}, fp32")
    for index, name in enumerate(ways):
        print(
            f"  {name:24} forward x{inference[0] / inference[index]:.2f}   "
            f"and backward x{training[0] / training[index]:.2f}"
        )


def hugging_face(classes):
    """Their Mask2Former over Swin-T, with weights by chance."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=classes, num_queries=100)
    return Mask2FormerForUniversalSegmentation(config)


@torch.inference_mode()
def measure_network(name, side, device, precision, rounds, classes=150):
    """All settings of a network; of Swin-T's Mask2Former Hugging Face's, too."""
    images = torch.randn(1, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    network = create_network(name, classes).to(device).eval()

    def run(model, setting=None):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            if setting is None:
                return model(images)
            with model.using(setting):
                return model.masks(images)

    settings = list(network.settings)
    calls = [lambda setting=setting: run(network, setting) for setting in settings]
    if name == "mask2former_swin_t":
        theirs = hugging_face(classes).to(device).eval()
        calls.append(lambda: run(theirs))
    times = in_turns(calls, device, rounds)
    threads = f", {torch.get_num_threads()} thread(s)" if device == "cpu" else ""
    print(f"masks of {name}, 1x3x{side}x{side}, {device}, {precision}{threads}")
    for setting, taken in zip(settings, times, strict=False):
        print(f"  {setting:12} x{times[0] / taken:.2f}")
    if len(times) > len(settings):
        print(f"  full: Hugging Face's takes {times[-1] / times[0]:.2f} times ours")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["mask2former_swin_t", "proscale_swin_t"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", action="store_true", help="measure the attention alone")
    arguments = parser.parse_args()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for size in ((512, 512), (1024, 2048)):
            measure_attention(size, device, arguments.rounds)
    if arguments.attention:
        return
    for device in devices:
        for precision in ("fp32", "bf16") if device == "cuda" else ("fp32",):
            for name in arguments.networks:
                for side in arguments.sizes:
                    measure_network(name, side, device, precision, arguments.rounds)


if __name__ == "__main__":
    main()
