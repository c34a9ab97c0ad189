import pytest
import torch

from segtrain import UserError, create_network, list_networks


def test_networks_are_listed_by_pattern():
    assert list_networks("eda*") == ["edaformer_base", "edaformer_nano", "edaformer_tiny"]


def test_every_network_is_built_by_name():
    for name in list_networks():
        with torch.device("meta"):
            network = create_network(name, num_classes=7)
        assert network.num_classes == 7
        assert network.setting is network.training_setting


def test_an_unknown_name_is_answered_with_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'edaformer_tiny'"):
        create_network("edaformer_tinny", num_classes=7)


def test_an_unknown_argument_is_answered_with_a_suggestion():
    with pytest.raises(UserError, match="no argument 'drop_pth': did you mean 'drop_path'"):
        create_network("edaformer_tiny", num_classes=7, drop_pth=0.1)
