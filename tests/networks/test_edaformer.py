"""EDAFormer against the tensors that the authors' code produced, and what its settings promise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segtrain import UserError, create_network, load_weights
from segtrain.inference import Inference
from segtrain.networks.edaformer import EDAFormer, InferenceSpatialReduction
from segtrain.training import CrossEntropy
from tests.networks.graphs import assert_baked_into_export, assert_one_graph_each

REFERENCE = Path("tests/reference/edaformer")
MICRO = json.loads((REFERENCE / "edaformer_micro.json").read_text())


@pytest.fixture(scope="module")
def tensors():
    return load_file(REFERENCE / "edaformer_micro_io.safetensors")


@pytest.fixture(scope="module")
def network():
    network = EDAFormer(19, widths=(16, 32, 48, 64), depths=(1, 2, 2, 1), fuse_width=24)
    load_weights(network, REFERENCE / "edaformer_micro.safetensors")
    return network.eval()


@pytest.mark.parametrize("output", MICRO["outputs"], ids=lambda output: output["key"])
@torch.inference_mode()
def test_logits_at_every_stored_setting(network, tensors, output):
    pools = output["dec_pool"]
    decoder = [pools[f"{name}"] for name in ("attn4x (1/32)", "attn3x (1/16)", "attn2 (1/8)")]
    with network.using({"encoder": output["enc_pool"], "decoder": decoder}):
        scores = network(tensors[output["input"]])
    torch.testing.assert_close(scores, tensors[output["key"]], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_intermediate_maps(network, tensors):
    captured = {}

    def capture(name):
        return lambda module, args, output: captured.update({name: output})

    first, decoder = network.encoder.stages[0], network.decoder
    modules = {
        "act_B_patch_embed1": first.embedding,
        "act_B_block1.0.attn": first.blocks[0].attention,
        "act_B_block1.0.mlp": first.blocks[0].mlp,
        "act_B_attn444": decoder.levels[0][2],
        "act_B_attn33": decoder.levels[1][1],
        "act_B_attn2": decoder.levels[2][0],
        "act_B_linear_fuse": decoder.fuse_norm,
    }
    modules |= {f"feat_B_c{i + 1}": stage for i, stage in enumerate(network.encoder.stages)}
    hooks = [m.register_forward_hook(capture(name)) for name, m in modules.items()]
    network(tensors["input_B"])
    for hook in hooks:
        hook.remove()
    captured["act_B_patch_embed1"] = captured["act_B_patch_embed1"][0]
    captured["act_B_linear_fuse"] = captured["act_B_linear_fuse"].relu()
    assert captured.keys() == {name for name in tensors if name.startswith(("act_", "feat_"))}
    for name, value in captured.items():
        value = value[: len(tensors[name])]
        torch.testing.assert_close(value, tensors[name], rtol=0, atol=1e-4, msg=name)


@torch.inference_mode()
def test_loss_in_both_reductions(network, tensors):
    scores, mask = network(tensors["input_B"]), tensors["label_B"].long().view(2, 96, 160)
    stored = MICRO["loss_on_B_label_B"]
    assert CrossEntropy("all")(scores, mask).item() == pytest.approx(stored["official_loss"], 1e-5)
    valid = CrossEntropy("valid")(scores, mask).item()
    assert valid == pytest.approx(stored["mean_over_valid_only"], 1e-5)


@torch.inference_mode()
def test_sliding_window_scores(network, tensors):
    inference = Inference("slide", window=(64, 64), stride=(48, 48))
    stripes = inference.score_stripes(network, tensors["input_B"][:1], (96, 160))
    scores = torch.cat(list(stripes), dim=2)[:, :, ::4, ::4]
    stored = tensors["slide_B0_crop64_stride48_sub4"]
    torch.testing.assert_close(scores, stored, rtol=0, atol=1e-4)


def test_layer_norm_epsilons(network):
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            in_block = name.startswith("encoder") and "embedding" not in name
            assert module.eps == (1e-6 if in_block else 1e-5), name


def test_drop_path_rises_linearly():
    network = create_network("edaformer_tiny", num_classes=3)
    blocks = [block for stage in network.encoder.stages for block in stage.blocks]
    rates = [block.drop_path.drop_prob for block in blocks]
    assert rates == pytest.approx([0.2 * i / 15 for i in range(16)])
    decoder = [block.drop_path.drop_prob for level in network.decoder.levels for block in level]
    assert decoder == [0.1] * 6


def test_published_settings_are_pools_in_the_papers_order():
    settings = create_network("edaformer_base", num_classes=3).settings
    pools = {name: (s.encoder, s.decoder) for name, s in settings.items()}
    assert next(iter(pools)) == "full"
    assert pools["full"] == ((8, 4, 2, 1), (1, 2, 4))
    assert pools["isr_1111_222"] == ((8, 4, 2, 1), (2, 4, 8))
    assert pools["isr_2211_222"] == ((16, 8, 2, 1), (2, 4, 8))
    assert pools["isr_2222_222"] == ((16, 8, 4, 2), (2, 4, 8))


def test_using_restores_the_setting_after_an_error(network):
    def fail():
        with network.using("isr_2222_222") as setting:
            assert network.setting is setting
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert network.setting is network.training_setting


def test_plain_values_of_a_published_setting_are_that_setting(network):
    resolved = network.resolve_setting({"encoder": [16, 8, 2, 1], "decoder": [2, 4, 8]})
    assert resolved is network.settings["isr_2211_222"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("isr_2211_22", "has no setting 'isr_2211_22': did you mean 'isr_2211_222'?"),
        ({"encoder": [16, 8, 2, 1]}, "decoder is missing"),
        ({"encoder": [16, 8, 2, 1], "decodr": [2, 4, 8]}, "no field 'decodr'"),
        ({"encoder": [16, 8, 2, 0], "decoder": [2, 4, 8]}, "positive whole numbers"),
        ({"encoder": 8, "decoder": [2, 4, 8]}, "positive whole numbers"),
        ({"encoder": [16, 8, 2], "decoder": [2, 4, 8]}, "has 3 encoder and 3 decoder pools"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(network, setting, message):
    with pytest.raises(UserError) as caught, network.using(setting):
        pass
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@torch.inference_mode()
def test_pools_beyond_the_grid_are_clamped(network):
    images = torch.randn(1, 3, 32, 64)
    with network.using({"encoder": [16, 8, 4, 2], "decoder": [2, 4, 8]}):
        whole_grids = network(images)
    with network.using(InferenceSpatialReduction("huge", (99, 99, 99, 99), (99, 99, 99))):
        torch.testing.assert_close(network(images), whole_grids)
    with network.using({"encoder": [8, 4, 2, 1], "decoder": [1, 2, 4]}):
        assert not torch.allclose(network(images), whole_grids)


@torch.inference_mode()
def test_a_setting_changes_no_state_and_compiles_to_one_graph_each(network):
    assert_one_graph_each(network, torch.randn(1, 3, 64, 64), network.settings)


def test_a_setting_is_baked_into_an_export(network):
    assert_baked_into_export(network, torch.randn(1, 3, 64, 64), "isr_2211_222")
