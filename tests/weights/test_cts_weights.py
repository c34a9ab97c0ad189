"""Files for CTS: Segmenter's, its policy's, and timm's for the policy's encoder."""

import pytest
import timm
import torch

from segtrain import UserError, create_network, load_weights
from tests.networks.test_cts import MICRO


def create(name="cts_s", seed=0, **arguments):
    torch.manual_seed(seed)
    return create_network(name, num_classes=5, **(MICRO | arguments))


def save(weights, folder):
    path = folder / "weights.pth"
    torch.save(weights, path)
    return path


def authors_names(segmenter):
    """A Segmenter's weights as its authors' code names them."""
    ours = {
        "projection": "proj_dec",
        "norm": "decoder_norm",
        "score_norm": "mask_norm",
        "class_tokens": "cls_emb",
    }
    matrices = {"patch_projection.weight": "proj_patch", "class_projection.weight": "proj_classes"}
    weights = {}
    for name, value in segmenter.state_dict().items():
        part, _, rest = name.partition(".")
        first, _, parameter = rest.partition(".")
        if part == "encoder":
            weights[f"encoder.{parameter}"] = value
        elif rest in matrices:
            weights[f"decoder.{matrices[rest]}"] = value.T.contiguous()
        else:
            weights[f"decoder.{ours.get(first, first)}.{parameter}".rstrip(".")] = value
    return {"model": weights}


@pytest.mark.parametrize("names", ["ours", "the authors'"])
def test_a_segmenter_without_the_policy(names, tmp_path):
    segmenter, network = create("segmenter_s", seed=1), create()
    policy = {name: value.clone() for name, value in network.policy.state_dict().items()}
    weights = segmenter.state_dict() if names == "ours" else authors_names(segmenter)
    load_weights(network, save(weights, tmp_path))
    own = network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in segmenter.state_dict().items())
    assert all(torch.equal(own[f"policy.{name}"], value) for name, value in policy.items())


def test_the_policy_of_a_run_of_its_own(tmp_path):
    network = create()
    torch.manual_seed(1)
    policy = create_network("cts_policy", num_classes=2)
    load_weights(network.policy, save(policy.state_dict(), tmp_path))
    own = network.policy.state_dict()
    assert all(torch.equal(own[name], value) for name, value in policy.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.policy.parameters())
    with pytest.raises(UserError, match="not for SuperpatchPolicy"):
        load_weights(network.policy, save(network.encoder.state_dict(), tmp_path))


def test_an_encoder_alone(tmp_path):
    network, other = create(), create(seed=1)
    load_weights(network, save(other.state_dict(), tmp_path), backbone_only=True)
    assert torch.equal(network.encoder.vit.cls_token, other.encoder.vit.cls_token)
    assert not torch.equal(network.decoder.class_tokens, other.decoder.class_tokens)


def test_another_network_says_how_to_create_it(tmp_path):
    with torch.device("meta"):
        theirs = create_network("segmenter_b", num_classes=7)
        network = create_network("cts_s", num_classes=5)
    weights = {
        name: torch.empty(1).expand(value.shape) for name, value in theirs.state_dict().items()
    }
    with pytest.raises(UserError, match=r'create_network\("cts_b", num_classes=7'):
        load_weights(network, save(weights, tmp_path))


def test_timms_file_of_the_policys_encoder(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("efficientnet_lite0")
    policy = create_network("cts_policy", num_classes=2)
    report = load_weights(policy, save(theirs.state_dict(), tmp_path), backbone_only=True)
    assert report.origin == "timm's EfficientNet-Lite0"
    assert not report.unexpected
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        features = theirs.eval().blocks(theirs.bn1(theirs.conv_stem(images)))
        assert torch.equal(policy.eval().encoder(images)[-1], features)
