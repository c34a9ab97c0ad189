"""SegFormer under all its settings, against a plain transcription and Hugging Face's SegFormer.

python -m benchmarks.merging                                # the matching alone, then B2 and B5
python -m benchmarks.merging --matching                     # the matching alone: minutes less
python -m benchmarks.merging --networks segformer_b2 --sizes 512

The transcription is the same network with the same weights: attention maps are materialised,
matching sorts and gathers element by element, and the head resizes before it fuses. Times are
medians over rounds in which all take turns; memory is what the pass holds at its peak.
"""

import argparse
import copy
import os
import statistics
import time

import torch

from benchmarks.plain_segformer import match_by_sorting, transcribe
from segtrain import create_network, measure_cost
from segtrain.reduction import StagedReduction
from segtrain.reduction.merging import match_bipartite

#: Blocks, tokens along a side and channels of each stage of B5 at 1024x1024: queries, then keys.
B5_STAGES = ((3, 256, 32, 64), (6, 128, 32, 128), (40, 64, 32, 320), (3, 32, 32, 512))


def seconds(call, device):
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def in_turns(calls, device, rounds):
    """Median milliseconds of each call; all run once in a round, after one that is not counted."""
    times = [[seconds(call, device) for call in calls] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) * 1e3 for column in zip(*times, strict=True)]


def measure_matching(device, rounds):
    """Match, merge and unmerge of all blocks of B5 under bsm_hq at 1024x1024."""
    if device == "cpu":
        torch.set_num_threads(1)
    print(f"match + merge + unmerge, segformer_b5 under bsm_hq at 1024x1024, {device}, fp32")
    totals = [0.0, 0.0]
    stages = StagedReduction.from_values({"merge": "bsm_hq"}).stages
    for number, ((blocks, queries, keys, width), stage) in enumerate(
        zip(B5_STAGES, stages, strict=True), start=1
    ):
        merging, side = (stage.q, queries) if stage.q else (stage.kv, keys)
        removed = int(side * side * merging.ratio)
        tokens = torch.randn(1, side * side, width, device=device)

        @torch.inference_mode()
        def run(match, tokens=tokens, side=side, stride=merging.stride, removed=removed):
            merge, unmerge = match(tokens, (side, side), stride, removed)
            return unmerge(merge(tokens))

        torch.testing.assert_close(run(match_bipartite), run(match_by_sorting))
        calls = [lambda run=run: run(match_bipartite), lambda run=run: run(match_by_sorting)]
        ours, plain = in_turns(calls, device, rounds)
        print(f"  stage {number}: {blocks:2} blocks, {side:2}x{side:2} tokens, x{plain / ours:.2f}")
        totals[0] += blocks * ours
        totals[1] += blocks * plain
    ours, plain = totals
    print(
        f"  all blocks: x{plain / ours:.2f} (takes {ours / plain:.2f} of the transcription's time)"
    )
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def measure_network(name, size, device, precision, rounds):
    """All settings of a network, ours and transcribed; and Hugging Face's."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    images = torch.randn(1, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    ours = create_network(name, num_classes=19).to(device).eval()
    plain = transcribe(copy.deepcopy(ours))
    with_their_head = create_network(name, 19, head="nvlabs", ln_eps=1e-5).to(device).eval()
    config = SegformerConfig(
        hidden_sizes=list(ours.widths),
        depths=list(ours.depths),
        num_attention_heads=list(ours.num_heads),
        decoder_hidden_size=with_their_head.head_width,
        num_labels=19,
    )
    hugging_face = SegformerForSemanticSegmentation(config).to(device).eval()

    def run(network, setting=None):
        enabled = precision == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=enabled), torch.inference_mode():
            if setting is None:
                return network(images)
            with network.using(setting):
                return network(images)

    settings = list(ours.settings)
    calls = [
        lambda network=network, setting=setting: run(network, setting)
        for setting in settings
        for network in (ours, plain)
    ]
    calls += [lambda: run(with_their_head, "full"), lambda: run(hugging_face)]
    times = in_turns(calls, device, rounds)

    threads = f", {torch.get_num_threads()} thread(s)" if device == "cpu" else ""
    print(f"{name}, 1x3x{size}x{size}, {device}, {precision}{threads}")
    print("              GMACs      MiB  speed-up   transcription: GMACs      MiB  times ours")
    full = times[0]
    for index, setting in enumerate(settings):
        fast, slow = times[2 * index : 2 * index + 2]
        a, b = (
            measure_cost(network, (size, size), setting, convention=convention, latency=False)
            for network, convention in ((ours, "macs"), (plain, "official"))
        )
        speed_up = f"{full / fast:.2f}"
        print(
            f"  {setting:10} {a.macs / 1e9:7.1f} {a.peak_memory_mib:8.0f} {speed_up:>9}"
            f"                 {b.macs / 1e9:7.1f} {b.peak_memory_mib:8.0f} {slow / fast:11.2f}"
        )
    if device != "cpu":
        shown = ", ".join(f"{s} {times[2 * i]:.1f}" for i, s in enumerate(settings))
        print(f"  milliseconds: {shown}")
    mine, theirs = times[-2:]
    print(f"  head nvlabs, full: Hugging Face's takes {theirs / mine:.2f} times ours")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["segformer_b2", "segformer_b5"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matching", action="store_true", help="measure the matching alone")
    arguments = parser.parse_args()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        measure_matching(device, rounds=20)
    if arguments.matching:
        return
    for device in devices:
        for precision in ("fp32", "bf16") if device == "cuda" else ("fp32",):
            for name in arguments.networks:
                for size in arguments.sizes:
                    measure_network(name, size, device, precision, arguments.rounds)


if __name__ == "__main__":
    main()
