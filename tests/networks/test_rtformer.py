"""RTFormer against the official tensors, and what its settings promise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from segtrain import UserError, create_network, load_weights, measure_cost
from segtrain.networks.batch_norm import BatchNorm
from segtrain.networks.gpu_friendly_attention import CrossResolutionAttention, normalise_doubly
from tests.networks.graphs import assert_baked_into_export, assert_one_graph_each

REFERENCE = Path("tests/reference/rtformer")
TENSORS = load_file(REFERENCE / "rtformer_micro_io.safetensors")
# The official names of the maps that are stored of image a.
FEATURES = {
    "stem": "encoder.stem",
    "x1": "encoder.stage1",
    "x2": "encoder.stage2",
    "x3": "encoder.stage3",
    "x3_": "encoder.high",
    "x4_": ("encoder.block4", 0),
    "x4": ("encoder.block4", 1),
    "x5_": ("encoder.block5", 0),
    "x5": ("encoder.block5", 1),
    "x6_low": "decoder.context",
}


def micro(**arguments):
    config = json.loads((REFERENCE / "rtformer_micro.json").read_text())["config"]
    sizes = {
        "base_channels": config["base_channels"],
        "context_channels": config["spp_channels"],
        "num_heads": config["num_heads"],
        "head_channels": config["head_channels"],
        "cross_size": config["cross_size"],
        "injection": config["use_injection"],
        "drop_path": 0.0,
    }
    return create_network("rtformer_slim", config["num_classes"], **(sizes | arguments))


def images_of(name):
    return TENSORS[f"{name}.input"].float()


@pytest.fixture(scope="module")
def network():
    network = micro()
    load_weights(network, REFERENCE / "rtformer_micro.safetensors")
    return network.eval()


@pytest.mark.parametrize("name", ["a", "b", "c"])
@torch.inference_mode()
def test_scores_of_the_official_code(network, name):
    scores = network(images_of(name))
    torch.testing.assert_close(scores, TENSORS[f"{name}.logits_low"], rtol=0, atol=1e-4)
    size = images_of(name).shape[2:]
    resized = nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False)
    assert (resized.argmax(1) == TENSORS[f"{name}.argmax"]).float().mean() > 0.9999
    if name == "c":
        torch.testing.assert_close(resized, TENSORS["c.logits"], rtol=0, atol=1e-4)
    else:
        strided = resized[:, :, 1::3, 2::3]
        torch.testing.assert_close(strided, TENSORS[f"{name}.logits_strided"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "tolerance"), [("a", 1e-6), ("b", 1e-6), ("c", 1e-5)])
@torch.inference_mode()
def test_scores_in_double_precision(name, tolerance):
    network = micro().eval()
    load_weights(network, REFERENCE / "rtformer_micro.safetensors")
    scores = network.double()(images_of(name).double())
    expected = TENSORS[f"{name}.logits_low_f64"]
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)


@torch.inference_mode()
def test_maps_in_between(network):
    found = {}
    hooks = []
    for name, place in FEATURES.items():
        module, index = place if isinstance(place, tuple) else (place, None)

        def keep(module, inputs, output, name=name, index=index):
            found[name] = output if index is None else output[index]

        hooks.append(network.get_submodule(module).register_forward_hook(keep))
    early, *_ = network.encoder(images_of("a"), 6)
    network(images_of("a"))
    for hook in hooks:
        hook.remove()
    for name, features in found.items():
        expected = TENSORS[f"a.feat.{name}"]
        tolerance = 1e-5 * expected.abs().max().item() + 1e-5
        torch.testing.assert_close(features, expected, rtol=0, atol=tolerance, msg=name)
    auxiliary = network.decoder.auxiliary_head(early)
    torch.testing.assert_close(auxiliary, TENSORS["a.aux_logits_low"], rtol=0, atol=1e-4)


SLIM_ADE20K = {"cross_size": 8, "injection": (True, False)}


# With the auxiliary head, and without; GMACs at 512x512 and at 1024x2048 (19 classes).
@pytest.mark.parametrize(
    ("size", "classes", "arguments", "parameters", "gmacs"),
    [
        ("slim", 19, {}, (5_403_398, 5_365_043), (None, 37.79)),
        ("slim", 150, {}, None, (4.80, None)),
        ("slim", 150, SLIM_ADE20K, (5_059_788, 5_012_918), (4.56, None)),
        ("slim", 19, SLIM_ADE20K, None, (None, 35.91)),
        ("base", 19, {}, (17_916_390, 17_765_971), (None, 138.89)),
        ("base", 150, {}, (17_966_956, 17_799_638), (17.53, None)),
        ("base", 19, {"injection": (True, True)}, None, (None, 143.72)),
        ("base", 150, {"injection": (True, True)}, None, (18.14, None)),
    ],
)
def test_parameters_and_macs_of_the_official_configurations(
    size, classes, arguments, parameters, gmacs
):
    counts = []
    for auxiliary_head in (True, False):
        network = create_network(
            f"rtformer_{size}", classes, auxiliary_head=auxiliary_head, **arguments
        )
        counts.append(sum(p.numel() for p in network.parameters()))
    if parameters is not None:
        assert tuple(counts) == parameters
    for image_size, expected in zip(((512, 512), (1024, 2048)), gmacs, strict=True):
        if expected is not None:
            cost = measure_cost(network, image_size, latency=False)
            assert round(cost.macs / 1e9, 2) == expected


@pytest.mark.parametrize(
    ("size", "values", "gmacs"),
    [
        ("slim", {"cross_size": 8}, 37.12),
        ("slim", {"cross_size": 4}, 36.71),
        ("slim", {"cross_size": 1}, 36.58),
        ("slim", {"scale": 0.5}, 9.46),
        ("base", {"cross_size": 8}, 137.53),
        ("base", {"cross_size": 4}, 136.71),
        # A counter that takes the product of a single key for none has 136.44.
        ("base", {"cross_size": 1}, 136.45),
        ("base", {"scale": 0.5}, 34.75),
    ],
)
def test_macs_of_the_settings(size, values, gmacs):
    network = create_network(f"rtformer_{size}", 19)
    cost = measure_cost(network, (1024, 2048), values, latency=False)
    assert round(cost.macs / 1e9, 2) == gmacs


@torch.inference_mode()
def test_cross_size_as_a_setting_is_the_constructor_argument(network):
    other = micro(cross_size=4).eval()
    other.load_state_dict(network.state_dict())
    with network.using("cross_4"):
        assert torch.equal(network(images_of("b")), other(images_of("b")))
    assert (network(images_of("b")) - other(images_of("b"))).abs().max() > 0.1


@torch.inference_mode()
def test_a_scale_scores_the_resized_image(network):
    images = images_of("c")  # 75 x 101
    smaller = nn.functional.interpolate(images, (38, 51), mode="bilinear")
    with network.using("scale_0.5"):
        scores = network(images)
    torch.testing.assert_close(scores, network(smaller))


@torch.inference_mode()
def test_images_of_any_size(network):
    for height, width in ((1, 1), (7, 40), (33, 100), (75, 101)):
        images = torch.randn(2, 3, height, width)
        assert network(images).shape == (2, 19, -(-height // 8), -(-width // 8))
        for name in network.settings:
            with network.using(name):
                assert network(images).isfinite().all()


@torch.inference_mode()
def test_one_image_and_a_batch_give_the_same(network):
    images = images_of("b")
    for name in network.settings:
        with network.using(name):
            together = network(images.flip(0)).flip(0)
            alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_what_training_gives(network):
    images = images_of("b")
    training = micro().train()
    scores, auxiliary = training(images)
    assert scores.shape == auxiliary.shape == (2, 19, 12, 20)
    assert micro(auxiliary_head=False).train()(images).shape == scores.shape
    classifier = micro(head="classification")
    for mode in (True, False):
        assert classifier.train(mode)(images).shape == (2, 19, 1, 1)
    segmenting = {n for n in training.state_dict() if n.startswith("encoder.")}
    assert {n for n in classifier.state_dict() if n.startswith("encoder.")} == segmenting


@pytest.mark.parametrize("attention", ["gfa", "external", "self", "linformer"])
@pytest.mark.parametrize("head", ["segmentation", "classification"])
def test_every_parameter_learns(attention, head):
    torch.manual_seed(0)
    network = micro(attention=attention, head=head, injection=(True, True)).train()
    outputs = network(torch.randn(2, 3, 64, 96))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(scores.square().mean() for scores in outputs).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A constant of one token cancels in the softmax over positions.
        assert parameter.grad.any() or name.endswith("low_attention.norm.bias"), name


def test_kinds_of_attention_in_the_low_branch():
    features = torch.randn(2, 16, 9, 10)
    for kind, parameters in (
        # Norm, keys, values; projections before and behind in all but the first.
        ("gfa", 32 + 32 * 16 + 32 * 32),
        ("external", 32 + 16 * 32 + 2 * 8 * 8 + 32 * 32),
        ("self", 32 + 3 * 16 * 32 + 32 * 32),
        ("linformer", 32 + 3 * 16 * 32 + 32 * 32),
    ):
        network = micro(attention=kind, external_ratio=0.25)
        attention = network.encoder.block4.low_attention
        assert sum(p.numel() for p in attention.parameters()) == parameters, kind
        assert attention(features).shape == (2, 32, 5, 5)
        assert network.encoder.block5.low_attention(torch.randn(2, 32, 5, 5)).shape[2:] == (5, 5)


@torch.inference_mode()
def test_linformer_attends_to_all_of_a_small_map_and_to_means_of_a_large_one():
    torch.manual_seed(0)
    linformer = micro(attention="linformer").eval()
    attention = micro(attention="self").eval()
    attention.load_state_dict(linformer.state_dict())
    for side, equal in ((512, True), (544, False)):  # 16 and 17 positions at 1/32
        images = torch.randn(1, 3, side, side)
        assert torch.allclose(linformer(images), attention(images), atol=1e-5) is equal


def test_weights_of_doubly_normalised_attention():
    weights = normalise_doubly(torch.randn(2, 4, 8, 30), tokens=2)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 4, 30), rtol=0, atol=1e-3)
    logits = torch.randn(2, 4, 8, 30, dtype=torch.bfloat16)
    exact = normalise_doubly(logits.double(), tokens=2)
    rounded = normalise_doubly(logits, tokens=2)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=1e-6)


def test_cross_resolution_attention_by_its_equation():
    torch.manual_seed(0)
    attention = CrossResolutionAttention(6, 10).double().eval()
    high, low = torch.randn(2, 6, 9, 7).double(), torch.randn(2, 10, 4, 5).double()
    grid = nn.functional.adaptive_max_pool2d(attention.low_norm(low), 3)
    keys, values = attention.key_value(grid).flatten(2).split(6, dim=1)  # (B, 6, 9)
    logits = torch.einsum("bct,bchw->bthw", keys, attention.norm(high)) * 9**-0.5
    expected = torch.einsum("bthw,bct->bchw", logits.softmax(1), values)
    torch.testing.assert_close(attention(high, low, 3), expected)


def test_training_on_a_single_image():
    """Where a pool leaves one value for a channel, its norm acts as in evaluation."""
    torch.manual_seed(0)
    network = micro().train()
    norm = network.decoder.context.branches[4][0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    scores, auxiliary = network(torch.randn(1, 3, 64, 96))
    (scores.square().mean() + auxiliary.square().mean()).backward()
    after = network.state_dict()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert norm.weight.grad.any()
    for name in ("running_mean", "running_var"):
        pooled = f"decoder.context.branches.4.0.{name}"
        assert torch.equal(after[pooled], before[pooled])
        assert not torch.equal(after[f"encoder.stem.1.{name}"], before[f"encoder.stem.1.{name}"])


def test_batch_norm_keeps_the_variance_of_the_batch():
    norm = BatchNorm(3).train()
    features = torch.randn(2, 3, 1, 2)
    variance = features.var(dim=(0, 2, 3), unbiased=False)
    norm(features)
    torch.testing.assert_close(norm.running_var, 0.1 + 0.9 * variance)
    torch.testing.assert_close(norm.running_mean, 0.9 * features.mean(dim=(0, 2, 3)))


def test_initial_weights():
    torch.manual_seed(0)
    network = create_network("rtformer_base", 19)
    for name, parameter in network.named_parameters():
        if name.endswith(("low_attention.key", "low_attention.value")):
            assert parameter.std().item() == pytest.approx(1e-3, rel=0.05), name
        elif name.endswith("key_value.weight"):
            assert parameter.std().item() == pytest.approx(0.0176, rel=0.02), name
            assert parameter.abs().max() <= 0.04, name
        elif parameter.ndim == 4 and parameter.numel() > 10_000:
            fan_in = parameter[0].numel()
            assert parameter.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05), name
        elif parameter.ndim == 1:
            assert (parameter == float(name.endswith("weight"))).all(), name


@torch.inference_mode()
def test_autocast_changes_scores_by_rounding_alone():
    network = micro().eval()  # the stored weights magnify what they are given
    images = images_of("b")
    for name in network.settings:
        with network.using(name):
            exact = network(images)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = network(images).float()
        agreement = (exact.argmax(1) == rounded.argmax(1)).float().mean().item()
        assert agreement > 0.9, name


@torch.inference_mode()
def test_a_setting_changes_no_state_and_compiles_to_one_graph_each(network):
    assert_one_graph_each(network, images_of("c"), network.settings)


@pytest.mark.parametrize("setting", ["full", "cross_4", "scale_0.75"])
def test_a_setting_is_baked_into_an_export(network, setting):
    assert_baked_into_export(network, images_of("b"), setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scale_0.55", "has no setting 'scale_0.55'"),
        ({"scale": 0}, "'scale' of a setting is above 0 and at most 4, not 0"),
        ({"scale": "half"}, "'scale' of a setting is a number, not 'half'"),
        ({"scale": True}, "'scale' of a setting is a number, not True"),
        ({"scale": float("nan")}, "'scale' of a setting is above 0 and at most 4, not nan"),
        ({"cross_size": 0}, "'cross_size' of a setting is a whole number above 0"),
        ({"cross_size": -2}, "'cross_size' of a setting is a whole number above 0"),
        ({"cross_size": 2.0}, "'cross_size' of a setting is a whole number above 0"),
        ({"cros_size": 2}, "a setting has no field 'cros_size'"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(network, setting, message):
    with pytest.raises(UserError) as caught, network.using(setting):
        pass
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_by_plain_values(network):
    assert network.resolve_setting({}) is network.settings["full"]
    assert network.resolve_setting({"scale": 0.5}) is network.settings["scale_0.5"]
    both = network.resolve_setting({"scale": 0.5, "cross_size": 2})
    assert both.name == "scale_0.5_cross_2"
    assert both.values == {"scale": 0.5, "cross_size": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "gfo"}, "there is no attention 'gfo': did you mean 'gfa'?"),
        ({"head": "segmentaton"}, "there is no head 'segmentaton': did you mean 'segmentation'?"),
        ({"injection": (True,)}, "'injection' is 2 values, for either block, not 1"),
        ({"num_heads": 7}, "num_heads=7 does not divide the low branch's 256 channels"),
        ({"cross_sizes": 8}, "has no argument 'cross_sizes': did you mean 'cross_size'?"),
        ({"cross_size": 0}, "'cross_size' is a whole number above 0, not 0"),
    ],
)
def test_slips_in_arguments(arguments, message):
    with pytest.raises(UserError) as caught:
        create_network("rtformer_slim", num_classes=19, **arguments)
    assert message in str(caught.value)
