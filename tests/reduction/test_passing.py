"""The rule by which tokens stop, on tensors that one can follow."""

import pytest
import torch

from segtrain import UserError
from segtrain.reduction.passing import (
    aggregate,
    budget,
    confidences,
    exact_lengths,
    keep_least_confident,
    mean_lengths,
    pass_on,
    select,
    stable_order,
)
from segtrain.reduction.token_passing import TokenPassing, published_settings

ACTIVE = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()


def test_confidence_is_the_mean_over_a_patch_of_the_highest_probability():
    scores = torch.randn(2, 3, 8, 12, requires_grad=True)
    highest = scores.softmax(1).max(1).values
    expected = [highest[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] for y in (0, 1) for x in (0, 1, 2)]
    confidence = confidences(scores, (2, 3))
    torch.testing.assert_close(
        confidence, torch.stack([patch.mean((1, 2)) for patch in expected], 1)
    )
    assert not confidence.requires_grad
    assert torch.equal(confidences(scores, (8, 12)), highest.flatten(1))


def test_a_patch_stops_above_the_threshold_and_for_good():
    confidence = torch.tensor([[0.5, 0.9, 0.7], [0.8, 0.1, 0.2]])
    active = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    assert pass_on(active, confidence, 0.7).tolist() == [[True, False, False], [False, True, True]]
    assert not pass_on(active, confidence, 0.0).any()
    assert torch.equal(pass_on(active, torch.ones(2, 3), 1.0), active)


def test_a_patch_stops_that_has_become_hardly_surer():
    before, now = torch.tensor([[0.3, 0.3, 0.3]]), torch.tensor([[0.2, 0.35, 0.5]])
    active = torch.ones(1, 3).bool()
    assert pass_on(active, now, 0.9, before, 0.1).tolist() == [[False, False, True]]
    assert pass_on(active, now, 0.9, before, -1.0).all()
    assert pass_on(active, now, 0.9, None, 0.1).all()


def test_order_and_lengths():
    assert stable_order(ACTIVE).tolist() == [[0, 2, 3, 1, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert exact_lengths(ACTIVE) == [3, 5]
    assert mean_lengths(ACTIVE) == [4, 4]
    assert mean_lengths(torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()) == [2, 2]  # rounded down
    long = torch.rand(1, 5000) > 0.5
    expected = torch.cat([long[0].nonzero(), (~long[0]).nonzero()])[:, 0]
    assert torch.equal(stable_order(long)[0], expected)


def test_tokens_are_taken_and_put_back():
    tokens = torch.randn(2, 6, 3)
    exact = select(ACTIVE, exact_lengths(ACTIVE))
    assert exact.indices.tolist() == [0, 2, 3, 6, 7, 8, 9, 10]
    packed = exact.take(tokens)
    assert torch.equal(packed, torch.cat([tokens[0, [0, 2, 3]], tokens[1, :5]])[None])
    assert torch.equal(exact.resting, ~ACTIVE)
    assert torch.equal(exact.put(tokens, packed), tokens)
    changed = exact.put(tokens, packed + 1)
    assert torch.equal(changed, torch.where(ACTIVE[..., None], tokens + 1, tokens))

    mean = select(ACTIVE, mean_lengths(ACTIVE))
    taken = mean.take(tokens)  # the first is filled up with a stopped token, the second cut
    assert torch.equal(taken, torch.stack([tokens[0, [0, 2, 3, 1]], tokens[1, :4]]))
    assert mean.resting.tolist() == [[0, 0, 0, 0, 1, 1]] * 2
    assert torch.equal(mean.put(tokens, taken), tokens)
    assert mean.core is None
    assert exact.core.lengths == [3, 5]


def test_rotations_go_with_their_tokens():
    rotations = torch.randn(6, 4)
    exact = select(ACTIVE, exact_lengths(ACTIVE))
    expected = torch.cat([rotations[[0, 2, 3]], rotations[:5]])
    assert torch.equal(exact.take_rotations(rotations), expected)
    mean = select(ACTIVE, mean_lengths(ACTIVE)).take_rotations(rotations)
    assert torch.equal(mean, torch.stack([rotations[[0, 2, 3, 1]], rotations[:4]])[:, None])
    assert exact.take_rotations(None) is None


def test_many_resting_tokens_draw_the_first_one():
    tokens = torch.randn(2, 6, 3, requires_grad=True)
    resting = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]).bool()
    drawn = aggregate(tokens, resting, 0.2)
    expected = (tokens[0, 4:].mean(0) + tokens[0, 0]) / 2
    torch.testing.assert_close(drawn[0, 0], expected)
    assert torch.equal(drawn[:, 1:], tokens[:, 1:])
    assert torch.equal(drawn[1], tokens[1])  # a sixth is not more than a fifth
    assert torch.equal(aggregate(tokens, torch.zeros_like(resting), 0.0), tokens)
    aggregate(tokens, resting & False, 0.0).sum().backward()
    assert tokens.grad.isfinite().all()


def test_budgets():
    assert budget(1024, 0.6) == 640  # of 614.4
    assert budget(1024, 0.5) == 512
    assert budget(320, 0.6) == 192  # 0.6 * 320 is above 192 in floating point
    assert budget(40, 0.3) == 40
    assert budget(1024, 0.0) == 0
    assert budget(1000, 1.0) == 1000
    confidence = torch.tensor([[0.3, 0.1, 0.2, 0.2, 0.2]])
    active = torch.tensor([[1, 0, 1, 1, 1]]).bool()
    kept = keep_least_confident(active, confidence, 2)
    assert kept.tolist() == [[False, False, True, True, False]]
    assert not keep_least_confident(active, confidence, 0).any()


def test_settings():
    names = [setting.name for setting in published_settings()]
    assert names[:3] == ["tau_0.96", "full", "tau_0.995"]
    assert len(names) == len(set(names)) == 9
    full = TokenPassing.from_values({})
    assert (full.name, full.stops, full.data_dependent) == ("full", False, False)
    assert full.threshold_range is None
    each = TokenPassing.from_values({"threshold": [0.96, 0.955, 0.95]})
    assert each.name == "tau_0.96_0.955_0.95"
    assert each.values == {"threshold": [0.96, 0.955, 0.95], "keep": None}
    assert each.stops
    assert each.data_dependent
    assert each.threshold_range == (0.0, 1.0)
    assert each.with_threshold(0.7) == TokenPassing("tau_0.7", threshold=0.7)
    kept = TokenPassing.from_values({"keep": [0.6, 0.4, 0.3]})
    assert (kept.name, kept.stops, kept.data_dependent) == ("keep_0.6_0.4_0.3", True, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 1.1}, "'threshold' of a setting is a number from 0 to 1, or a list"),
        ({"threshold": True}, "not True"),
        ({"threshold": []}, "not []"),
        ({"threshold": "0.96"}, "not '0.96'"),
        ({"keep": [0.5, float("nan")]}, "'keep' of a setting is a number from 0 to 1"),
        ({"threshold": 0.9, "keep": 0.5}, "a setting has 'threshold' or 'keep', not both"),
        ({"tau": 0.9}, "a setting has no field 'tau'"),
    ],
)
def test_values_that_no_setting_has(values, message):
    with pytest.raises(UserError) as caught:
        TokenPassing.from_values(values)
    assert message in str(caught.value)
