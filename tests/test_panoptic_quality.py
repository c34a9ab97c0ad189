"""Panoptic quality against its definition, and against torchmetrics' own counting."""

import pytest
import torch
import torchmetrics.detection

from segtrain.panoptic_quality import PanopticQuality

VOID = 255
THINGS, NUM_CLASSES = [1, 2, 4], 7


def segments_of(pixels, things, num_classes):
    """(class, id or 0) -> set of pixels; void, and crowds as (-1 - class), among them."""
    segments = {}
    for place, (category, identity) in enumerate(pixels.flatten(0, 1).tolist()):
        if not 0 <= category < num_classes:
            key = (None, identity)
        else:
            key = (category, identity if category in things else 0)
        segments.setdefault(key, set()).add(place)
    return segments


def plain_quality(images, things, num_classes):
    """Panoptic quality as panopticapi defines it, word for word: {class: (PQ, SQ, RQ)}."""
    counts = [[0.0, 0, 0, 0] for _ in range(num_classes)]
    for prediction, truth in images:
        predicted, true = (segments_of(p, things, num_classes) for p in (prediction, truth))
        void = true.get((None, 0), set())
        matched = set()
        for key, pixels in predicted.items():
            for other, others in true.items():
                if key[0] is None or key[0] != other[0]:
                    continue
                common = len(pixels & others)
                overlap = common / (len(pixels) + len(others) - common - len(pixels & void))
                if overlap > 0.5:
                    counts[key[0]][0] += overlap
                    counts[key[0]][1] += 1
                    matched |= {("predicted", key), ("true", other)}
        for key in true:
            if key[0] is not None and ("true", key) not in matched:
                counts[key[0]][3] += 1
        for key, pixels in predicted.items():
            if key[0] is not None and ("predicted", key) not in matched:
                forgiven = void | true.get((None, key[0] + 1), set())
                if len(pixels & forgiven) / len(pixels) <= 0.5:
                    counts[key[0]][2] += 1
    return {
        category: (
            overlap / (found + wrong / 2 + missed / 2),
            overlap / found if found else 0.0,
            found / (found + wrong / 2 + missed / 2),
        )
        for category, (overlap, found, wrong, missed) in enumerate(counts)
        if found + wrong + missed
    }


def random_maps(seed, void, crowd=True):
    """A truth of blocks and a prediction that differs from it in places."""
    generator = torch.Generator().manual_seed(seed)

    def blocks(high):
        return torch.randint(high, (6, 6), generator=generator)

    truth = torch.stack([blocks(7), blocks(3)], dim=-1).repeat_interleave(3, 0)
    truth = truth.repeat_interleave(3, 1)
    truth[truth[..., 0] == 6] = torch.tensor([VOID, 0])
    if crowd:
        truth[6:12, 6:12] = torch.tensor([VOID, 1 + int(blocks(6)[0, 0])])
    prediction = truth.roll(1, dims=0).clone()
    prediction[..., 1] = prediction[..., 1] % 3
    prediction[prediction[..., 0] == VOID] = torch.tensor([4, 1])
    prediction[6:9, 6:9] = torch.tensor([2, 2])
    if void:
        prediction[:8, :7] = torch.tensor([-1, 0])
    return prediction, truth


@pytest.mark.parametrize("void", [False, True])
def test_panoptic_quality_is_the_standard_one(void):
    images = [random_maps(seed, void) for seed in range(8)]
    quality = PanopticQuality(THINGS, NUM_CLASSES)
    for i in range(0, len(images), 2):
        quality.update(*(torch.stack(pair) for pair in zip(*images[i : i + 2], strict=True)))
    computed = quality.compute()
    expected = plain_quality(images, THINGS, NUM_CLASSES)
    assert 0 < len(expected) < NUM_CLASSES  # class 6 is absent
    for category, values in enumerate(computed):
        if category in expected:
            assert values.tolist() == pytest.approx(expected[category], abs=1e-6)
        else:
            assert values.isnan().all()


def test_torchmetrics_counts_alike_but_for_predicted_void_and_crowds():
    stuff = sorted(set(range(NUM_CLASSES)) - set(THINGS))
    differ = []
    for void, crowd in ((False, False), (True, False)):
        images = [random_maps(seed, void, crowd) for seed in range(8)]
        theirs = torchmetrics.detection.PanopticQuality(
            THINGS, stuff, allow_unknown_preds_category=True, return_sq_and_rq=True
        )
        ours = PanopticQuality(THINGS, NUM_CLASSES)
        for prediction, truth in images:
            theirs.update(prediction[None], truth[None])
            ours.update(prediction[None], truth[None])
        differ.append((theirs.compute() - ours.compute().nanmean(dim=0))[0].item())
    assert differ[0] == pytest.approx(0, abs=1e-6)
    assert differ[1] > 0.01  # theirs forgives what is left void
