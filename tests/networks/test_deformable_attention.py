"""Deformable attention, both ways of computing it, against its definition."""

import pytest
import torch

from segtrain.networks.deformable_attention import (
    DeformableAttention,
    attend,
    attend_by_gathering,
    attend_by_sampling,
    reference_points,
)

GRIDS = [(1, 1), (1, 5), (4, 3)]
both_ways = pytest.mark.parametrize("way", [attend_by_sampling, attend_by_gathering])


def hat(places, length):
    """(..., length): the share that a place in [0, 1] has in each pixel of an axis."""
    pixels = torch.arange(length, dtype=places.dtype)
    return (1 - (places[..., None] * length - 0.5 - pixels).abs()).clamp(min=0)


def by_definition(values, grids, locations, weights):
    attended = 0
    levels = values.split([height * width for height, width in grids], dim=1)
    for index, (level, (height, width)) in enumerate(zip(levels, grids, strict=True)):
        maps = level.unflatten(1, (height, width))
        columns = hat(locations[:, :, :, index, :, 0], width)
        rows = hat(locations[:, :, :, index, :, 1], height)
        shares = weights[:, :, :, index]
        attended = attended + torch.einsum(
            "bnhp,bnhpi,bnhpj,bijhc->bnhc", shares, rows, columns, maps
        )
    return attended.flatten(2)


def inputs(grids=GRIDS, batch=2, queries=7, dtype=torch.float32):
    """Values, locations (one in four outside the maps) and weights."""
    torch.manual_seed(0)
    tokens = sum(height * width for height, width in grids)
    values = torch.randn(batch, tokens, 3, 4, dtype=dtype)
    locations = torch.rand(batch, queries, 3, len(grids), 2, 2, dtype=dtype) * 1.4 - 0.2
    weights = torch.rand(batch, queries, 3, len(grids), 2, dtype=dtype)
    return values, locations, weights


@both_ways
def test_the_definition(way):
    values, locations, weights = inputs()
    expected = by_definition(values, GRIDS, locations, weights)
    torch.testing.assert_close(way(values, GRIDS, locations, weights), expected)


@both_ways
def test_gradients(way):
    arguments = [tensor.requires_grad_() for tensor in inputs(dtype=torch.float64, queries=2)]

    def attended(values, locations, weights):
        return way(values, GRIDS, locations, weights)

    assert torch.autograd.gradcheck(attended, arguments)


@both_ways
def test_the_centre_of_a_pixel_gives_its_value_and_outside_is_zero(way):
    grids = [(3, 256), (64, 1)]
    tokens = sum(height * width for height, width in grids)
    values = torch.randn(1, tokens, 2, 4)
    first, second = (reference_points(grid, values.device) for grid in grids)
    nowhere = torch.tensor([[-1.0, 0.5], [0.5, 3.0], [1.5, -7.0], [-1e30, 1e30]])
    count = len(first)
    locations = torch.full((1, count + 4, 2, 2, 1, 2), 9.0)
    locations[0, :count, :, 0, 0] = first[:, None]
    locations[0, :64, :, 1, 0] = second[:, None]
    locations[0, count:, :, 0, 0] = nowhere[:, None]
    attended = way(values, grids, locations, torch.ones(1, count + 4, 2, 2, 1))[0]
    expected = values[0, :count].flatten(1)
    expected[:64] += values[0, count:].flatten(1)
    torch.testing.assert_close(attended[:count], expected, rtol=0, atol=1e-4)
    assert not attended[count:].any()


@both_ways
def test_what_is_not_finite_stays_so_and_harms_nothing_else(way):
    values, locations, weights = inputs()
    expected = way(values, GRIDS, locations, weights)
    weights[0, 3, 0] = torch.nan
    attended = way(values, GRIDS, locations, weights)
    assert attended[0, 3, :4].isnan().all()
    attended[0, 3, :4] = expected[0, 3, :4]
    torch.testing.assert_close(attended, expected)
    locations[1, 2] = torch.nan  # as of a diverged network
    torch.testing.assert_close(way(values, GRIDS, locations, weights)[0, :3], expected[0, :3])


def test_compiled_it_samples():
    values, locations, weights = inputs()
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.code))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    scored = compiled(values, GRIDS, locations, weights)
    torch.testing.assert_close(scored, attend(values, GRIDS, locations, weights))
    assert "grid_sample" in graphs[0]
    assert "embedding_bag" not in graphs[0]


@pytest.fixture
def stepping():
    """One head that looks one pixel to the right, at a map of every second pixel 1, 256 wide."""
    attention = DeformableAttention(4, 1, 1, 1)
    for layer in (attention.value_projection, attention.output_projection):
        layer.weight.data.copy_(torch.eye(4))
    attention.sampling_offsets.bias.data.copy_(torch.tensor([1.0, 0.0]))
    tokens = (torch.arange(256) % 2).float()[None, :, None].expand(1, -1, 4)
    return attention, tokens, reference_points((1, 256), tokens.device)


@pytest.mark.parametrize("way", [attend_by_sampling, attend_by_gathering])
@torch.no_grad()
def test_coordinates_keep_their_precision_under_autocast(way, stepping, monkeypatch):
    attention, tokens, references = stepping
    seen = []

    def watched(values, grids, locations, weights):
        seen.append((values, locations, weights))
        return way(values, grids, locations, weights)

    monkeypatch.setattr("segtrain.networks.deformable_attention.attend", watched)
    with torch.autocast("cpu", torch.bfloat16):
        attended = attention(tokens, tokens, references, [(1, 256)])
    expected = 1 - tokens
    expected[:, -1] = 0
    assert attended.dtype == torch.bfloat16
    torch.testing.assert_close(attended.float(), expected, rtol=0, atol=1e-2)
    values, locations, weights = seen[0]
    assert (values.dtype, locations.dtype) == (torch.bfloat16, torch.float32)
    rounded = way(values, [(1, 256)], locations.bfloat16().float(), weights)
    assert (rounded - expected).abs().max() > 0.4


def test_first_every_head_looks_its_own_way():
    attention = DeformableAttention(8, 4, 2, 3)
    offsets = attention.sampling_offsets.bias.detach().unflatten(0, (4, 2, 3, 2))
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for level in range(2):
        for point in range(3):
            torch.testing.assert_close(offsets[:, level, point], directions * (point + 1))
    for name in ("sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias"):
        assert not attention.get_parameter(name).any(), name


def test_reference_points_are_centres_row_by_row():
    points = reference_points((2, 4), torch.device("cpu"))
    assert points.shape == (8, 2)
    assert points[0].tolist() == [0.125, 0.25]
    assert points[5].tolist() == [0.375, 0.75]
