"""A budget gives the threshold by which images cost it on average."""

import pytest
import torch

from segtrain import UserError, create_network, measure_cost
from segtrain.calibration import calibrate, read_budget
from tests.stopping import Stopping, Threshold

IMAGES = torch.randn(6, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def gmacs(network, setting, images=IMAGES):
    return measure_cost(network, setting=setting, images=images, latency=False).macs / 1e9


@pytest.mark.parametrize("setting", ["half", "falling"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8, 1.0])
def test_the_mean_cost_is_within_a_hundredth_of_the_budget(setting, share):
    network = Stopping()
    ends = [gmacs(network, network.settings[setting].with_threshold(end)) for end in (0.0, 1.0)]
    budget = min(ends) + share * abs(ends[1] - ends[0])
    found = calibrate(network, budget, IMAGES, setting)
    assert gmacs(network, found) == pytest.approx(budget, rel=0.01)
    assert found.name == f"budget_{budget:g}"
    assert found.above == network.settings[setting].above
    assert network.setting.name == "half"


def test_where_the_cost_goes_in_steps_the_nearest_is_taken():
    network, one = Stopping(), IMAGES[:1, :, :8, :16]  # two tokens
    none, both = (gmacs(network, Threshold("", end), one) for end in (0.0, 1.0))
    first = (none + both) / 2
    for share, expected in ((0.45, first), (0.3, first), (0.2, none), (0.8, both)):
        found = calibrate(network, none + share * (both - none), one)
        assert gmacs(network, found, one) == pytest.approx(expected)


def test_confidences_that_crowd_below_one_are_told_apart():
    network = Stopping()
    with torch.no_grad():
        network.embedding.bias[0] = 12
    budget = sum(gmacs(network, Threshold("", end)) for end in (0.0, 1.0)) / 2
    found = calibrate(network, budget, IMAGES)
    assert 0.9999 < found.threshold < 1
    assert gmacs(network, found) == pytest.approx(budget, rel=0.01)


def test_the_threshold_is_the_current_settings_or_else_the_first_published():
    network = Stopping()
    budget = gmacs(network, "half")
    network.setting = network.settings["falling"]
    assert not calibrate(network, budget, IMAGES).above
    network.setting = network.settings["full"]
    assert calibrate(network, budget, IMAGES).above


def test_a_budget_out_of_reach_says_what_is_within():
    message = (
        r"budget of 1e-06 GMACs is out of reach of Stopping: thresholds from 0 to 1 cost "
        r"0\.0\d+ to 0\.0\d+ GMACs on average over 6 images of 64x96"
    )
    with pytest.raises(UserError, match=message):
        calibrate(Stopping(), 1e-6, IMAGES)
    with pytest.raises(UserError, match="budget of 40 GMACs is out of reach"):
        calibrate(Stopping(), 40, IMAGES)


def test_a_network_without_a_threshold_is_refused():
    network = create_network("edaformer_nano", 4)
    with pytest.raises(UserError, match="no setting of EDAFormer has one: full, "):
        calibrate(network, 1, IMAGES)
    with pytest.raises(UserError, match="no setting of Stopping has one: full"):
        calibrate(Stopping(), 1, IMAGES, "full")


def test_a_budget_in_a_configuration():
    assert read_budget({"budget_gmacs": 40}) == 40.0
    for other in ("full", {"threshold": 0.5}, Threshold("half", 0.5)):
        assert read_budget(other) is None
    for value in (0, -1, "40", True, None, float("nan")):
        with pytest.raises(UserError, match="budget_gmacs is a positive number"):
            read_budget({"budget_gmacs": value})
    with pytest.raises(UserError, match="place of a setting's values, here threshold"):
        read_budget({"budget_gmacs": 40, "threshold": 0.5})
