"""What the shared blocks promise beside their values."""

import pytest
import torch
from torch import nn

from segtrain.networks.blocks import grid_from_tokens, tokens_from_grid


@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_tokens_and_grids_are_views_whose_channels_come_last(batch):
    tokens = torch.randn(batch, 12, 8)
    grid = grid_from_tokens(tokens, (3, 4))
    assert torch.equal(grid[:, :, 1, 2], tokens[:, 1 * 4 + 2])
    assert grid.data_ptr() == tokens_from_grid(grid).data_ptr() == tokens.data_ptr()
    assert torch.equal(tokens_from_grid(grid), tokens)
    assert grid.stride() == (96, 1, 32, 8)
    convolved = nn.Conv2d(8, 8, 3, padding=1, groups=8)(grid)
    assert convolved.stride() == (96, 1, 32, 8)  # so nothing was copied into another layout
