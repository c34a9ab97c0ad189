"""SegFormer and SegFormer++ against the official tensors, and what its settings promise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segtrain import UserError, create_network, load_weights
from segtrain.networks.segformer import SegFormer
from segtrain.reduction import StagedReduction
from tests.networks.graphs import assert_baked_into_export, assert_one_graph_each

REFERENCE = Path("tests/reference/segformerpp")
FACTS = json.loads((REFERENCE / "segformerpp_micro.json").read_text())
TENSORS = load_file(REFERENCE / "segformerpp_micro_io.safetensors")
LOGITS = sorted(name.removeprefix("logits/") for name in TENSORS if name.startswith("logits/"))
HUGGING_FACE = Path("tests/reference/segformer_hf")

BSM_HQ = [{"kv": {"mode": "bsm", "ratio": 0.6, "stride": [2, 2]}}] * 2 + [
    {"q": {"mode": "bsm", "ratio": 0.8, "stride": [4, 4]}}
] * 2


def plain_values(official):
    """A setting's plain values from the official package's dictionaries, one for each stage."""
    stages = []
    for stage in official:
        merging = {}
        for tokens in ("q", "kv"):
            mode = stage.get(f"{tokens}_mode")
            if mode == "bsm":
                stride = [stage[f"{tokens}_sy"], stage[f"{tokens}_sx"]]
                merging[tokens] = {"mode": mode, "ratio": stage[f"{tokens}_r"], "stride": stride}
            elif mode:
                merging[tokens] = {"mode": mode, "stride": stage[f"{tokens}_s"]}
        stages.append(merging)
    return {"stages": stages}


def official_setting(mode):
    """What a mode of the reference files is here."""
    preset = FACTS["presets"][mode]
    return plain_values(preset) if isinstance(preset, list) else mode


def images_of(name):
    return TENSORS[f"input/{name}"].float() / 32


def micro(**arguments):
    sizes = {"widths": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
    return SegFormer(19, **(sizes | {"head_width": 32} | arguments))


@pytest.fixture(scope="module")
def network():
    network = micro()
    load_weights(network, REFERENCE / "segformerpp_micro.safetensors")
    return network.eval()


@pytest.mark.parametrize("name", LOGITS)
@torch.inference_mode()
def test_logits_of_the_official_code(network, name):
    images, mode = name.split("/")
    with network.using(official_setting(mode)):
        scores = network(images_of(images))
        network.as_published = True
        published = network(images_of(images))
        network.as_published = False
    torch.testing.assert_close(scores, TENSORS[f"logits/{name}"], rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, published, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FACTS["modes"])
@torch.inference_mode()
def test_stage_features_of_the_official_code(network, name):
    images, mode = name.split("/")
    images = images_of(images)
    setting = network.resolve_setting(official_setting(mode))
    if setting.downsample:
        images = images[:, :, ::2, ::2]
    features = network.encoder(images, list(zip(setting.stages, setting.isr, strict=True)))
    for stored, found in zip(FACTS["modes"][name]["stages"], features, strict=True):
        assert list(found.shape) == stored["shape"]
        assert found.mean().item() == pytest.approx(stored["mean"], abs=1e-5)
        assert found.std().item() == pytest.approx(stored["std"], abs=1e-5)
        values = found.flatten()
        assert values[:4].tolist() == pytest.approx(stored["first4"], abs=1e-4)
        assert values[-4:].tolist() == pytest.approx(stored["last4"], abs=1e-4)


@pytest.mark.parametrize("name", ["bsm_hq", "bsm_fast", "n2d_2x2"])
def test_published_settings_are_the_official_presets(network, name):
    assert network.resolve_setting(plain_values(FACTS["presets"][name])).name == name


@pytest.mark.parametrize(
    ("ln_eps", "stored"),
    [(1e-5, "logits_eps1e-5"), (1e-6, "logits_eps1e-6"), ("mixed", "logits_nvlabs_mixed_eps")],
)
@torch.inference_mode()
def test_logits_of_the_authors_head_under_each_epsilon(ln_eps, stored):
    tensors = load_file(HUGGING_FACE / "segformer_hf_micro_io.safetensors")
    sizes = {"widths": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "head_width": 24}
    network = micro(head="nvlabs", ln_eps=ln_eps, **sizes).eval()
    load_weights(network, HUGGING_FACE / "segformer_hf_micro.safetensors")
    images = tensors["input"].float() / 32
    expected = tensors[stored]
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-5)
    network.as_published = True
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-5)


# With 19 classes: all, and the encoder alone.
@pytest.mark.parametrize(
    ("name", "total", "encoder"),
    [
        ("segformer_b0", 3_720_051, 3_319_392),
        ("segformer_b1", 13_683_155, 13_151_424),
        ("segformer_b2", 24_728_019, 24_196_288),
        ("segformer_b3", 44_603_859, 44_072_128),
        ("segformer_b4", 61_374_419, 60_842_688),
        ("segformer_b5", 81_974_739, 81_443_008),
    ],
)
def test_parameter_counts(name, total, encoder):
    with torch.device("meta"):
        network = create_network(name, num_classes=19)
    assert sum(p.numel() for p in network.parameters()) == total
    assert sum(p.numel() for p in network.encoder.parameters()) == encoder


@pytest.mark.parametrize(
    ("name", "millions"),
    [("b0", 3.75), ("b1", 13.72), ("b2", 27.46), ("b3", 47.34), ("b4", 64.11), ("b5", 84.71)],
)
def test_parameter_counts_with_the_authors_head(name, millions):
    with torch.device("meta"):
        network = create_network(f"segformer_{name}", num_classes=150, head="nvlabs")
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


def test_drop_path_rises_linearly():
    network = create_network("segformer_b0", num_classes=3)
    rates = [b.drop_path.drop_prob for stage in network.encoder.stages for b in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])


@torch.inference_mode()
def test_pooling_goes_before_merging(network):
    images = images_of("c_2x3x128x160")
    seen = []
    hooks = [
        stage.blocks[0].attention.key_value.register_forward_hook(
            lambda module, args, output: seen.append(output.shape[1])
        )
        for stage in network.encoder.stages
    ]
    # Grids of 4 x 5 keys in every stage; 2 x 2 of them after pooling by 2.
    for setting in ("full", {"isr": [2, 1, 1, 4]}, {"merge": "bsm_hq", "isr": [2, 1, 1, 1]}):
        with network.using(setting):
            network(images)
    for hook in hooks:
        hook.remove()
    full, pooled, both = seen[:4], seen[4:8], seen[8:]
    assert full == [20, 20, 20, 20]
    assert pooled == [4, 20, 20, 1]
    assert both == [4 - int(4 * 0.6), 20 - int(20 * 0.6), 20, 20]


@torch.inference_mode()
def test_grids_too_small_for_a_stride_are_not_merged(network):
    images = images_of("b_2x3x96x160")[:, :, :64, :90]  # stage 4 has 2 x 3 tokens
    with network.using({"stages": [{}, {}, {}, BSM_HQ[3]]}):
        merged = network(images)
    assert torch.equal(merged, network(images))


@torch.inference_mode()
def test_images_of_any_size(network):
    for height, width in ((29, 29), (33, 100), (130, 97)):
        images = torch.randn(2, 3, height, width)
        for name in network.settings:
            if name != "downsample":
                with network.using(name):
                    scores = network(images)
                assert scores.shape == (2, 19, -(-height // 4), -(-width // 4))
    with network.using("downsample"):
        assert network(torch.randn(1, 3, 61, 97)).shape == (1, 19, 8, 12)


@pytest.mark.parametrize(("setting", "side"), [("full", 29), ("bsm_hq", 29), ("downsample", 58)])
def test_images_too_small_for_the_spatial_reduction(network, setting, side):
    with network.using(setting):
        network(torch.randn(1, 3, side, side + 3))
        with pytest.raises(UserError, match=f"'{setting}' takes images of at least {side} x"):
            network(torch.randn(1, 3, side + 3, side - 1))


@torch.inference_mode()
def test_one_image_and_a_batch_give_the_same(network):
    images = images_of("c_2x3x128x160")
    for name in network.settings:
        with network.using(name):
            together = network(images.flip(0)).flip(0)
            alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_training_under_a_setting():
    network = create_network("segformer_b0", num_classes=3, training_setting="bsm_hq")
    assert next(iter(network.settings)) == "bsm_hq"
    assert network.training_setting is network.setting
    assert set(network.settings) == set(create_network("segformer_b0", 3).settings)
    own = {"stages": [{"q": {"mode": "n2d", "stride": 2}}, {}, {}, {}]}
    network = create_network("segformer_b0", num_classes=3, training_setting=own)
    assert next(iter(network.settings)) == network.setting.name == "q1_n2d_2x2"
    with pytest.raises(UserError, match="did you mean 'bsm_hq'"):
        create_network("segformer_b0", num_classes=3, training_setting="bsm_hg")


@pytest.mark.parametrize("setting", ["bsm_hq", "bsm_fast", "n2d_2x2", "downsample"])
def test_every_parameter_learns_under_every_setting(setting):
    network = micro(drop_path=0.0, dropout=0.0)
    with network.using(setting):
        network(images_of("c_2x3x128x160")).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("setting", ["full", "bsm_hq"])
def test_gradients_of_a_tiny_network_in_double_precision(setting):
    torch.manual_seed(0)
    network = SegFormer(
        2, widths=(4, 4, 4, 4), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), head_width=4
    ).double()
    for parameter in network.parameters():  # the published initialisation is nearly constant
        torch.nn.init.normal_(parameter, std=0.5)
    network.eval()  # no dropout
    images = torch.randn(1, 3, 130, 128, dtype=torch.float64, requires_grad=True)

    def score(weight):
        state = dict(network.named_parameters()) | {chosen: weight}
        return torch.func.functional_call(network, state, (images.detach(),))[0, :, ::8, ::8]

    chosen = "encoder.stages.0.blocks.0.attention.query.weight"
    with network.using(setting):
        for chosen in (
            "encoder.stages.0.embedding.norm.weight",
            "encoder.stages.0.blocks.0.attention.key_value.weight",
            "encoder.stages.2.blocks.0.attention.query.weight",
            "encoder.stages.2.blocks.0.norm1.bias",
        ):
            weight = network.get_parameter(chosen)
            assert torch.autograd.gradcheck(score, (weight,), eps=1e-7, fast_mode=True)


@torch.inference_mode()
def test_autocast_changes_scores_by_rounding_alone(network):
    images = images_of("c_2x3x128x160")
    for name in network.settings:
        with network.using(name):
            exact = network(images)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = network(images).float()
        agreement = (exact.argmax(1) == rounded.argmax(1)).float().mean().item()
        assert agreement > 0.9, name


@torch.inference_mode()
def test_a_setting_changes_no_state_and_compiles_to_one_graph_each(network):
    assert_one_graph_each(network, images_of("a_1x3x128x128"), network.settings)


@pytest.mark.parametrize("setting", ["full", "bsm_hq", "n2d_2x2", "downsample"])
def test_a_setting_is_baked_into_an_export(network, setting):
    assert_baked_into_export(network, images_of("c_2x3x128x160"), setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bsm_hg", "has no setting 'bsm_hg': did you mean 'bsm_hq'?"),
        ({"stages": BSM_HQ[:3]}, "'stages' of a setting is a list of 4, not of 3"),
        ({"stages": "bsm_hq"}, "'stages' of a setting is a list of 4, not 'bsm_hq'"),
        ({"stages": [*BSM_HQ[:3], "bsm"]}, "a stage of a setting has the keys 'q' and 'kv'"),
        ({"stages": [*BSM_HQ[:3], {"k": {}}]}, "a stage has no 'k': "),
        ({"stages": [{"kv": {"mode": "neighbor_2D"}}, {}, {}, {}]}, "mode 'neighbor_2D'"),
        ({"merging": "bsm_hq"}, "a setting has no field 'merging'"),
        ({"merge": "bsm_h"}, "no published merging is called 'bsm_h': did you mean 'bsm_hq'?"),
        ({"merge": "bsm_hq", "stages": BSM_HQ}, "'stages' or 'merge'"),
        ({"isr": [2, 2, 1]}, "'isr' of a setting is 4 positive whole numbers"),
        ({"isr": [2, 2, 1, 0]}, "'isr' of a setting is 4 positive whole numbers"),
        ({"isr": 2}, "'isr' of a setting is 4 positive whole numbers"),
        ({"downsample": 2}, "'downsample' of a setting is true or false, not 2"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(network, setting, message):
    with pytest.raises(UserError) as caught, network.using(setting):
        pass
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_by_plain_values(network):
    assert network.resolve_setting({"stages": BSM_HQ}) is network.settings["bsm_hq"]
    assert network.resolve_setting({"isr": [2, 2, 1, 1]}) is network.settings["isr_2211"]
    assert network.resolve_setting({}) is network.settings["full"]
    named = {
        "isr_2111_bsm_hq": {"merge": "bsm_hq", "isr": [2, 1, 1, 1]},
        "isr_16.8.1.1_downsample": {"isr": [16, 8, 1, 1], "downsample": True},
        "kv12_bsm_2x4_0.6_q4_n1d_3": {
            "stages": [
                {"kv": {"mode": "bsm", "ratio": 0.6, "stride": [2, 4]}},
                {"kv": {"mode": "bsm", "ratio": 0.6, "stride": [2, 4]}, "q": None},
                {},
                {"q": {"mode": "n1d", "stride": 3}},
            ]
        },
    }
    for name, values in named.items():
        setting = network.resolve_setting(values)
        assert setting.name == name
        again = StagedReduction.from_values(json.loads(json.dumps(setting.values)))
        assert again == setting


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "nvlab"}, "there is no head 'nvlab': did you mean 'nvlabs'?"),
        ({"ln_eps": "mixt"}, "'ln_eps' is a number above 0 or 'mixed', not 'mixt'"),
        ({"ln_eps": 0.0}, "'ln_eps' is a number above 0"),
        ({"heads": (1, 2, 5, 8)}, "has no argument 'heads': did you mean 'head'?"),
    ],
)
def test_slips_in_arguments(arguments, message):
    with pytest.raises(UserError) as caught:
        create_network("segformer_b2", num_classes=150, **arguments)
    assert message in str(caught.value)
