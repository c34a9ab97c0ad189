"""Merging against the official tensors, and what holds for any tokens."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from segtrain import UserError
from segtrain.reduction.merging import (
    NO_MERGING,
    TokenMerging,
    match_bipartite,
    match_runs,
    match_windows,
)

REFERENCE = Path(__file__).parent.parent / "reference" / "segformerpp"
CASES = json.loads((REFERENCE / "segformerpp_unit.json").read_text())["cases"]
STORED = load_file(REFERENCE / "segformerpp_unit.safetensors")
NEIGHBOURS = sorted(name.split("/")[0] for name in STORED if name[0] == "n" and "/merged" in name)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_bipartite_matching_of_the_official_code(name):
    case = CASES[name]
    stored = {key: STORED[f"{name}/{key}"] for key in ("merged", "unmerged", "y", "y_unmerged")}
    kept, destinations, merged_sources, merged_into = (
        STORED[f"{name}/{key}"].long()
        for key in (
            "kept_src_positions",
            "dst_positions",
            "merged_src_positions",
            "merged_into_dst_position",
        )
    )
    grid = (case["h"], case["w"])
    tokens = STORED[f"x/{case['h']}x{case['w']}"]
    stride = (case["sy"], case["sx"])
    merge, unmerge = match_bipartite(tokens, grid, stride, case["r_requested"])

    # The official order of merged tokens is arbitrary; their positions are stored beside them.
    positions = torch.cat([kept, destinations.expand(2, -1)], dim=1)
    place = unmerge(torch.arange(case["tokens_after"]).expand(2, -1)[:, :, None].float())
    ours = place.long().gather(1, positions[:, :, None])  # where each official row is in ours
    merged = merge(tokens)
    assert merged.shape[1] == case["tokens_after"]
    close(merged.gather(1, ours.expand(-1, -1, merged.shape[2])), stored["merged"])
    close(unmerge(merged), stored["unmerged"])
    values = torch.empty_like(stored["y"]).scatter(1, ours.expand(-1, -1, 5), stored["y"])
    close(unmerge(values), stored["y_unmerged"])
    slots = place[..., 0]
    assert torch.equal(slots.gather(1, merged_sources), slots.gather(1, merged_into))


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbour_merging_of_the_official_code(name):
    mode, size, stride = name.split("_")
    grid = tuple(map(int, size.split("x")))
    tokens = STORED[f"x/{size}"]
    numbers = tuple(map(int, stride[1:].split("x")))
    pair = match_windows(grid, numbers) if mode == "n2d" else match_runs(len(tokens[0]), *numbers)
    close(pair[0](tokens), STORED[f"{name}/merged"])
    close(pair[1](pair[0](tokens)), STORED[f"{name}/unmerged"])


@st.composite
def matchings(draw):
    """Tokens (B, h*w, C) of a grid, a stride and how many to remove."""
    batch, height, width = (draw(st.integers(1, high)) for high in (3, 9, 9))
    stride = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    removed = draw(st.integers(0, height * width))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    tokens = torch.randn(batch, height * width, 4, generator=generator)
    return tokens, (height, width), stride, removed


def slots_of(pair, length, batch):
    """The slot of each token, (B, N), read off what a merged token's number is copied to."""
    _, unmerge = pair
    numbers = torch.arange(length, dtype=torch.float64).expand(batch, -1)
    return unmerge(numbers[:, :, None])[:, :, 0].long()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(matchings())
def test_every_token_is_in_one_slot_and_slots_hold_means(matching):
    tokens, (height, width), (vertical, horizontal), removed = matching
    batch, length, channels = tokens.shape
    destinations = (height // vertical) * (width // horizontal)
    removable = length - destinations if destinations else 0
    pair = match_bipartite(tokens, (height, width), (vertical, horizontal), removed)
    merged = pair[0](tokens)
    shortened = length - min(removed, removable)
    assert merged.shape == (batch, shortened, channels)
    slots = slots_of(pair, shortened, batch)
    for image in range(batch):
        assert sorted(set(slots[image].tolist())) == list(range(shortened))
        for slot in range(shortened):
            expected = tokens[image, slots[image] == slot].mean(0)
            torch.testing.assert_close(merged[image, slot], expected, rtol=0, atol=1e-5)
    corners = {
        (y, x)
        for y in range(height // vertical * vertical)
        for x in range(width // horizontal * horizontal)
        if y % vertical == 0 and x % horizontal == 0
    }
    own = [slots[0, y * width + x].item() for y, x in corners]
    assert len(set(own)) == len(corners)  # destinations never merge with each other


@settings(deadline=None, derandomize=True, max_examples=50)
@given(matchings())
def test_removing_nothing_changes_nothing(matching):
    tokens, grid, stride, _ = matching
    merge, unmerge = match_bipartite(tokens, grid, stride, 0)
    assert torch.equal(unmerge(merge(tokens)), tokens)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(matchings(), st.randoms(use_true_random=False))
def test_images_are_merged_by_themselves(matching, random):
    tokens, grid, stride, removed = matching
    order = random.sample(range(len(tokens)), len(tokens))
    merge, unmerge = match_bipartite(tokens, grid, stride, removed)
    merge_permuted, unmerge_permuted = match_bipartite(tokens[order], grid, stride, removed)
    result = unmerge(merge(tokens))[order]
    torch.testing.assert_close(unmerge_permuted(merge_permuted(tokens[order])), result)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(matchings())
def test_the_most_similar_sources_are_the_ones_that_merge(matching):
    tokens, grid, stride, removed = matching
    pair = match_bipartite(tokens, grid, stride, removed)
    if pair is NO_MERGING:
        return
    length = tokens.shape[1]
    is_corner = torch.zeros(grid, dtype=torch.bool)
    full = [size // step * step for size, step in zip(grid, stride, strict=True)]
    is_corner[: full[0] : stride[0], : full[1] : stride[1]] = True
    corners, sources = is_corner.flatten().nonzero()[:, 0], (~is_corner.flatten()).nonzero()[:, 0]
    shortened = pair[0](tokens).shape[1]
    slots = slots_of(pair, shortened, len(tokens))
    for image in range(len(tokens)):
        similarity = torch.cosine_similarity(
            tokens[image, sources, None].double(), tokens[image, None, corners].double(), dim=2
        )
        best, nearest = similarity.max(1)
        merged = (slots[image, sources, None] == slots[image, None, corners]).any(1)
        assert merged.sum() == length - shortened
        if not merged.all():
            assert best[merged].min() >= best[~merged].max() - 1e-6
        assert torch.equal(slots[image, sources[merged]], slots[image, corners[nearest[merged]]])


def test_gradients_flow_through_means_and_copies():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 12, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(3, 3, dtype=torch.float64, generator=generator)

    def through(pair):
        merge, unmerge = pair
        return lambda tokens: unmerge(merge(tokens).sin() @ weight)

    for pair in (
        match_bipartite(tokens, (3, 4), (2, 2), 7),
        match_windows((3, 4), (2, 2)),
        match_runs(12, 5),
    ):
        assert torch.autograd.gradcheck(through(pair), (tokens,))


def test_matching_is_the_same_in_training_and_without_gradients():
    tokens = torch.randn(1, 64, 8)
    with torch.inference_mode():
        expected = match_bipartite(tokens, (8, 8), (2, 2), 30)[0](tokens)
    learnt = tokens.clone().requires_grad_()
    merged = match_bipartite(learnt, (8, 8), (2, 2), 30)[0](learnt)
    assert torch.equal(merged, expected)
    merged.square().sum().backward()  # index sets made under inference_mode would fail here
    assert learnt.grad.abs().min() > 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="code generation needs a compiler")
def test_compiled_merging_gives_the_same_values_and_gradients():
    def through(tokens):
        merge, unmerge = match_bipartite(tokens, (16, 16), (4, 4), 180)
        merge_windows, unmerge_windows = match_windows((16, 16), (2, 2))
        return unmerge(merge(tokens).sin()) + unmerge_windows(merge_windows(tokens))

    tokens = torch.randn(2, 256, 32, requires_grad=True)
    results = []
    for function in (through, torch.compile(through, fullgraph=True)):
        output = function(tokens)
        (gradient,) = torch.autograd.grad(output.square().sum(), tokens)
        results.append((output, gradient))
    torch.testing.assert_close(results[1], results[0])


def test_bfloat16_tokens_are_compared_and_averaged_in_float32():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 256, 16, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        pair = match_bipartite(tokens, (16, 16), (4, 4), 200)
    exact = match_bipartite(tokens.float(), (16, 16), (4, 4), 200)
    assert torch.equal(slots_of(pair, 56, 2), slots_of(exact, 56, 2))
    merged = pair[0](tokens)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact[0](tokens.float()).bfloat16())


def test_tokens_of_zeros_are_similar_to_none():
    tokens = torch.zeros(1, 16, 4)
    tokens[0, 3] = 1
    merge, _ = match_bipartite(tokens, (4, 4), (2, 2), 5)
    assert merge(tokens).isfinite().all()


def test_a_grid_smaller_than_a_window():
    tokens = torch.randn(1, 12, 4)
    assert match_bipartite(tokens, (3, 4), (4, 4), 5) is NO_MERGING
    merge, unmerge = match_windows((3, 4), (5, 5))
    assert torch.allclose(unmerge(merge(tokens)), tokens.mean(1, keepdim=True).expand(1, 12, 4))
    merge, unmerge = match_runs(12, 20)
    assert torch.allclose(unmerge(merge(tokens)), tokens.mean(1, keepdim=True).expand(1, 12, 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "bsm_r2D", "ratio": 0.6, "stride": [2, 2]}, "no merging mode 'bsm_r2D': did you"),
        ({"mode": "bsm", "r": 0.6, "stride": [2, 2]}, "merging 'bsm' has no field 'r'"),
        ({"mode": "n2d", "ratio": 0.6, "stride": [2, 2]}, "merging 'n2d' has no field 'ratio'"),
        ({"mode": "bsm", "stride": [2, 2]}, "merging 'bsm' needs ratio"),
        ({"mode": "bsm"}, "merging 'bsm' needs ratio and stride"),
        ({"ratio": 0.6}, "merging needs a 'mode', one of bsm, n1d, n2d"),
        ("bsm", "merging needs a 'mode'"),
        ({"mode": "bsm", "ratio": 60, "stride": [2, 2]}, "'ratio' of merging is a number from 0"),
        ({"mode": "bsm", "ratio": "0.6", "stride": [2, 2]}, "'ratio' of merging is a number"),
        ({"mode": "n2d", "stride": [2, 0]}, "two whole numbers (down, across) above 0, not [2, 0]"),
        ({"mode": "n2d", "stride": [2, 2, 2]}, "two whole numbers"),
        ({"mode": "n1d", "stride": [2, 2]}, "a whole number above 0, not [2, 2]"),
        ({"mode": "n1d", "stride": 1.5}, "a whole number above 0, not [1.5]"),
    ],
)
def test_slips_in_plain_values(values, message):
    with pytest.raises(UserError) as error:
        TokenMerging.from_values(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_plain_values_come_back():
    for values in (
        {"mode": "bsm", "stride": [2, 4], "ratio": 0.6},
        {"mode": "n2d", "stride": [3, 2]},
        {"mode": "n1d", "stride": [3]},
    ):
        assert TokenMerging.from_values(values).values == values
    assert TokenMerging.from_values({"mode": "n2d", "stride": 2}).stride == (2, 2)
    assert TokenMerging.from_values({"mode": "n1d", "stride": 2}).stride == (2,)
