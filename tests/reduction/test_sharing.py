"""Token sharing against a transcription that goes patch by patch, and its settings."""

import pytest
import torch

from segtrain import UserError
from segtrain.reduction.sharing import TokenSharing, share_tokens


def share_by_patch(scores, count, grid):
    """(unshared, shared, sources) of one image's scores (h, w), as lists."""
    height, width = scores.shape
    best_first = sorted(range(height * width), key=lambda i: (-scores.flatten()[i].item(), i))
    shared = sorted(best_first[:count])

    def superpatch(row, column):
        return row // 2 * width + column // 2

    patches = [(row, column) for row in range(2 * height) for column in range(2 * width)]
    unshared = [patch for patch in patches if superpatch(*patch) not in shared]
    sources = [
        unshared.index(patch)
        if patch in unshared
        else len(unshared) + shared.index(superpatch(*patch))
        for patch in patches
        if patch[0] < grid[0] and patch[1] < grid[1]
    ]
    return [row * 2 * width + column for row, column in unshared], shared, sources


@pytest.mark.parametrize("count", [0, 1, 7, 12])
@pytest.mark.parametrize("grid", [(6, 8), (5, 8), (6, 7), (5, 7)])
def test_tokens_stand_in_the_order_of_the_transcription(count, grid):
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(3, 3, 4, generator=generator)
    sharing = share_tokens(scores, count, grid)
    for image, image_scores in enumerate(scores):
        unshared, shared, sources = share_by_patch(image_scores, count, grid)
        assert sharing.unshared[image].tolist() == unshared
        assert sharing.shared[image].tolist() == shared
        assert sharing.sources[image].tolist() == sources


def test_equal_scores_share_the_first_superpatches():
    sharing = share_tokens(torch.zeros(1, 4, 5), 6, (8, 10))
    assert sharing.shared.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_values_go_to_tokens_and_back():
    sharing = share_tokens(torch.tensor([[[0.0, 2.0]], [[1.0, 0.0]]]), 1, (2, 4))
    patches = torch.arange(8.0).view(1, 8, 1)
    tokens = sharing.select(patches, torch.tensor([[[-1.0], [-2.0]]]))
    assert tokens[..., 0].tolist() == [[0, 1, 4, 5, -2], [2, 3, 6, 7, -1]]
    restored = sharing.restore(tokens)[..., 0].tolist()
    assert restored == [[0, 1, -2, -2, 4, 5, -2, -2], [-1, -1, 2, 3, -1, -1, 6, 7]]


@pytest.mark.parametrize(
    ("saved", "superpatches", "count"),
    [
        (0.3, 256, 103),  # ADE20K at 512x512
        (0.3, 225, 90),  # Pascal Context at 480x480
        (0.4375, 576, 336),  # Cityscapes at 768x768
        (0, 256, 0),
        (0.75, 256, 256),
        (0.75, 1, 1),
        (0.01, 1, 1),
        (0.3, 5, 2),
    ],
)
def test_how_many_superpatches_share(saved, superpatches, count):
    assert TokenSharing.from_values({"saved": saved}).count(superpatches) == count


def test_settings_are_called_by_what_they_save():
    names = [TokenSharing.from_values({"saved": saved}).name for saved in (0, 0.3, 0.4375)]
    assert names == ["full", "shared_0.3", "shared_0.4375"]
    assert not TokenSharing.from_values({"saved": 0.3}).data_dependent


@pytest.mark.parametrize("saved", [-0.1, 0.76, float("nan"), "0.3", True, None])
def test_more_than_all_cannot_be_saved(saved):
    with pytest.raises(UserError, match="'saved' of a setting is"):
        TokenSharing.from_values({"saved": saved})
