"""Panoptic and instance segmentation as the official code gives them."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from segtrain.mask_inference import (
    Segment,
    confident_queries,
    instance_inference,
    panoptic_inference,
    resize_masks,
)

REFERENCE = Path(__file__).parent / "reference/mask2former_proscale"
VOID = 255


@pytest.fixture(scope="module")
def reference():
    predictions = load_file(REFERENCE / "proscale_micro_io.safetensors")
    results = load_file(REFERENCE / "proscale_micro_post.safetensors")
    post = json.loads((REFERENCE / "micro.json").read_text())["post"]
    return predictions["base/pred_logits"], predictions["base/pred_masks"], results, post


def bilinear(masks, size):
    return F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("image", [0, 1])
@torch.inference_mode()
def test_panoptic_segments_are_the_official_ones(reference, image):
    logits, masks, results, post = reference
    classes, final = logits[image], resize_masks(masks[image], 4, (64, 96), (64, 96))
    thresholds = post["object_mask_threshold"], post["overlap_threshold"]
    panoptic = panoptic_inference(classes, final, post["thing_ids"], *thresholds)
    assert torch.equal(panoptic.map, results[f"panoptic{image}.seg"].long())
    expected = [Segment(s["id"], s["category_id"], s["isthing"]) for s in post["panoptic"][image]]
    assert panoptic.segments == expected

    kept = confident_queries(classes, post["object_mask_threshold"])
    assert 0 < kept.sum() < len(kept)
    of_kept = panoptic_inference(classes[kept], final[kept], post["thing_ids"], *thresholds)
    assert torch.equal(of_kept.map, panoptic.map)
    assert of_kept.segments == panoptic.segments


@pytest.mark.parametrize("image", [0, 1])
@torch.inference_mode()
def test_instances_are_the_official_ones(reference, image):
    logits, masks, results, post = reference
    final = resize_masks(masks[image], 4, (64, 96), (64, 96))
    found = instance_inference(logits[image], final, post["topk"], post["thing_ids"])
    assert len(found.scores) == post["instances_kept"][image]
    order = found.scores.argsort()
    scores, categories, areas = (
        results[f"instance{image}.{what}"] for what in ("scores", "classes", "mask_area")
    )
    expected = scores.argsort()
    torch.testing.assert_close(found.scores[order], scores[expected], atol=1e-6, rtol=0)
    assert torch.equal(found.categories[order], categories[expected])
    assert torch.equal(found.masks.sum(dim=(1, 2))[order], areas[expected].long())


@torch.inference_mode()
def test_instances_of_all_classes(reference):
    logits, masks, _, _ = reference
    everything = instance_inference(logits[0], masks[0], count=1000)
    assert everything.masks.shape == (10 * 19, 16, 24)
    best = instance_inference(logits[0], masks[0], count=1)
    assert best.categories == logits[0].softmax(dim=1)[:, :-1].flatten().argmax() % 19


@pytest.mark.parametrize("size", [(50, 75), (64, 91), (130, 200)])
@torch.inference_mode()
def test_masks_are_resized_as_in_three_steps(size):
    """Of an image of 50x75, padded to 64x96."""
    masks = torch.randn(7, 16, 24)
    expected = bilinear(bilinear(masks, (64, 96))[:, :50, :75], size)
    torch.testing.assert_close(resize_masks(masks, 4, (50, 75), size), expected, atol=1e-5, rtol=0)
    assert resize_masks(masks[:0], 4, (50, 75), size).shape == (0, *size)


def squares(*corners):
    """Mask logits of squares of 4x4 in 8x8."""
    masks = torch.full((len(corners), 8, 8), -5.0)
    for mask, (top, left) in zip(masks, corners, strict=True):
        mask[top : top + 4, left : left + 4] = 5.0
    return masks


def test_stuff_of_a_class_is_one_segment_and_covered_queries_are_dropped():
    masks = squares((0, 0), (0, 4), (4, 0), (4, 0), (4, 4))
    kinds = torch.tensor([1, 1, 0, 0, 3])  # stuff twice, a thing twice in one place, no object
    classes = F.one_hot(kinds, 4) * torch.tensor([20.0, 20.0, 20.0, 10.0, 20.0])[:, None]
    panoptic = panoptic_inference(classes, masks, things=[0])
    assert panoptic.segments == [Segment(1, 1, False), Segment(2, 0, True)]
    expected = torch.zeros(8, 8, dtype=torch.int64)
    expected[:4] = 1
    expected[4:, :4] = 2
    assert torch.equal(panoptic.map, expected)
    both = panoptic.categories_and_ids(VOID)
    assert torch.equal(both[..., 1], expected)
    assert both[0, 0].tolist() == [1, 1]
    assert both[7, 0].tolist() == [0, 2]
    assert both[7, 7].tolist() == [VOID, 0]


def test_no_confident_query_leaves_all_void():
    panoptic = panoptic_inference(torch.zeros(3, 5), torch.zeros(3, 8, 8), things=[0])
    assert panoptic.segments == []
    assert panoptic.map.sum() == 0
    assert (panoptic.categories_and_ids(VOID)[..., 0] == VOID).all()
