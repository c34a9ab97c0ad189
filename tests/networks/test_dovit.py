"""DoViT against the official tensors, and what its settings promise."""

import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import nn

from segtrain import UserError, create_network, load_weights, measure_cost
from segtrain.calibration import calibrate
from segtrain.networks.blocks import grid_from_tokens, tokens_from_grid
from segtrain.networks.dovit import DoViT
from segtrain.reduction.passing import stable_order
from segtrain.training.recomputation import recompute_blocks

REFERENCE = Path("tests/reference/plain_vit")
DECODERS = ("setr", "segmenter")
TENSORS = {name: load_file(REFERENCE / f"dovit_{name}_micro_io.safetensors") for name in DECODERS}
CASES = {
    name: json.loads((REFERENCE / f"dovit_{name}_micro.json").read_text())["cases"]
    for name in DECODERS
}
# The remaining case keeps the authors' unstable sort, which moves the class token away.
NAMES = ("b1_full", "b1_t", "b2_t", "b1_nonsquare", "b1_agg_off")
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-4)

MICRO = {"embed_dim": 32, "depth": 6, "num_heads": 4}


def micro(decoder="setr", **arguments):
    values = {
        "backbone": "vit_tiny_patch16_384",
        "image_size": (64, 64),
        "decisions": (1, 3),
        "channels": 24,
        "backbone_arguments": MICRO | {"patch_size": 8},
    }
    torch.manual_seed(0)
    return DoViT(7, decoder=decoder, **(values | arguments))


@pytest.fixture(params=DECODERS)
def decoder(request):
    return request.param


@pytest.fixture
def network(decoder):
    network = micro(decoder)
    load_weights(network, REFERENCE / f"dovit_{decoder}_micro.safetensors")
    return network.eval()


def in_training(network):
    """In training mode, without what makes scores those of a batch or of chance."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | DropPath):
            module.eval()
    network.step = network.ramp_steps
    return network


def images_of(decoder, name="b2_t"):
    return TENSORS[decoder][f"{name}.input"]


def eight_images():
    """Of all kinds: noise, smooth ones, and one of one colour."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(7, 3, 4, 4, generator=generator)
    images = F.interpolate(coarse, size=(64, 64), mode="bilinear") * torch.linspace(0.1, 3, 7).view(
        7, 1, 1, 1
    )
    images[0] += torch.randn(3, 64, 64, generator=generator)
    return torch.cat([images, torch.full((1, 3, 64, 64), 0.7)])


@pytest.mark.parametrize("case", NAMES)
@torch.inference_mode()
def test_decisions_and_scores_of_the_official_code(network, decoder, case):
    tensors, values = TENSORS[decoder], CASES[decoder][case]
    images = images_of(decoder, case)
    network.aggregation_rate = values["agg_rate"]
    single = len(images) == 1
    # Of one image they are the same.
    for rule in ("mean", "exact") if single else ("mean",):
        network.batch_rule = rule
        with network.using({"threshold": values["exit_conf"]}):
            scores, encoding = network(images), network.encode(images)
        close(scores, tensors[f"{case}.decode_logits"])
        for k, decision in enumerate(encoding.decisions):
            active = tensors[f"{case}.keep_mask{k}"].flatten(1).bool()
            assert torch.equal(decision.active, active)
            assert active.sum(1).tolist() == values["kept_per_image"][k]
            assert set(decision.selection.lengths) == {values["keep_nodes"][k + 1]}
            order = stable_order(F.pad(decision.active, (1, 0), value=True))
            assert torch.equal(order, tensors[f"{case}.order{k}"].long())


@pytest.mark.parametrize("case", NAMES)
@torch.inference_mode()
def test_maps_and_auxiliary_scores_of_the_official_code(network, decoder, case):
    tensors, values = TENSORS[decoder], CASES[decoder][case]
    network.aggregation_rate = values["agg_rate"]
    maps, blocks = [], {}
    for head in network.decoder.auxiliary_heads:
        head.register_forward_hook(lambda module, inputs, output: maps.append(inputs[0]))
    for index in (1, 3):
        block = network.encoder.vit.blocks[index]
        block.register_forward_hook(
            lambda module, inputs, output, index=index: blocks.update({index: output})
        )
    with network.using({"threshold": values["exit_conf"]}):
        encoding = in_training(network).encode(images_of(decoder, case))
    for k, decision in enumerate(encoding.decisions):
        close(decision.confidence, tensors[f"{case}.conf{k}"].flatten(1))
        close(encoding.auxiliary_scores[k], tensors[f"{case}.aux_logits{k}"])
        before = F.pad(tokens_from_grid(maps[k]), (0, 0, 1, 0))
        behind = decision.selection.put(before, blocks[network.decisions[k]])
        close(grid_from_tokens(behind[:, 1:], encoding.grid), tensors[f"{case}.out{k}"])
    close(network.encoder.maps(encoding.tokens, encoding.grid), tensors[f"{case}.out2"])


@torch.inference_mode()
def test_training_scores_all_heads(network, decoder):
    case = CASES[decoder]["b2_t"]
    with network.using({"threshold": case["exit_conf"]}):
        scores, *auxiliary = in_training(network)(images_of(decoder))
    close(scores, TENSORS[decoder]["b2_t.decode_logits"])
    for k, expected in enumerate(auxiliary):
        close(expected, TENSORS[decoder][f"b2_t.aux_logits{k}"])


@pytest.mark.parametrize("threshold", [0.0, 0.5, [0.75, 0.6], [0.9, 0.4], 1.0])
@torch.inference_mode()
def test_a_batch_gives_what_its_images_give(network, threshold):
    images = eight_images()
    with network.using({"threshold": threshold}):
        together, encoding = network(images), network.encode(images)
        alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    if threshold not in (0.0, 1.0):
        assert not all(decision.selection.rectangular for decision in encoding.decisions)


@torch.inference_mode()
def test_extreme_thresholds(network):
    images = eight_images()
    whole = network.encode(images)
    with network.using("full"):
        scores = network(images)
        assert network.encode(images).decisions == []
    with network.using({"threshold": 1}):
        close(network(images), scores)
    with network.using({"threshold": 0}):
        encoding = network.encode(images)
        assert network(images).isfinite().all()
    assert whole.tokens.shape == encoding.tokens.shape
    for decision in encoding.decisions:
        assert not decision.active.any()
        assert decision.selection.lengths == (1,) * 8  # the class token alone


@torch.inference_mode()
def test_an_image_that_stops_wholly_beside_one_that_does_not(network, decoder):
    images = eight_images()
    with network.using({"threshold": 1}):
        first = network.encode(images).decisions[0].confidence
    least = first.min(1).values  # of each image
    order = [least.argmin().item(), least.argmax().item()]
    with network.using({"threshold": least.max().item() - 1e-4}):
        decision = network.encode(images[order]).decisions[0]
        together = network(images[order])
        alone = torch.cat([network(image[None]) for image in images[order]])
    assert decision.selection.lengths[1] == 1
    assert decision.selection.lengths[0] > 1
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_stopped_patches_stay_stopped_and_as_they_are(decoder):
    network = micro(decoder, final_norm=False).eval()
    spread(network)
    images, maps = eight_images(), []
    for block in network.encoder.vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with network.using({"threshold": middle(network, images)}):
        maps.clear()
        encoding = network.encode(images)
    first, second = encoding.decisions
    assert (first.active | ~second.active).all()
    assert second.active.sum() < first.active.sum() < first.active.numel()
    stopped = ~first.active
    at_first = maps[0][:, 1:]  # before block 1
    assert torch.equal(encoding.tokens[:, 1:][stopped], at_first[stopped])
    changed = (encoding.tokens[:, 1:] - at_first).abs().amax(2) > 1e-3
    assert torch.equal(changed, first.active)


def spread(network):
    """Make the auxiliary heads of fresh weights sure of some patches."""
    for head in network.decoder.auxiliary_heads:
        head.classifier.weight.data.mul_(100)


def middle(network, images):
    """A threshold for each decision by which half of the patches that are active stop."""
    thresholds = [1.0] * len(network.decisions)
    for k in range(len(thresholds)):
        with network.using({"threshold": thresholds}):
            decisions = network.encode(images).decisions
        active = decisions[k].active
        values = decisions[k].confidence[active].sort().values
        half = len(values) // 2
        thresholds[k] = values[half - 1 : half + 1].mean().item()
    return thresholds


BACKBONES = {
    # Rotations, and register tokens.
    "vit_small_patch16_dinov3": MICRO,
    # Rotations and positions, gated MLPs.
    "eva02_tiny_patch14_224": MICRO,
    "vit_small_patch14_reg4_dinov2": MICRO,
    "deit3_small_patch16_224": MICRO,
}


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.inference_mode()
def test_other_backbones(backbone, decoder):
    network = micro(decoder, backbone=backbone, backbone_arguments=BACKBONES[backbone]).eval()
    spread(network)
    images = F.interpolate(eight_images(), size=(112, 80))
    with network.using({"threshold": middle(network, images)}):
        decisions = network.encode(images).decisions
        assert all(not decision.selection.rectangular for decision in decisions)
        prefix = network.encoder.num_prefix
        assert not any(decision.selection.resting[:, :prefix].any() for decision in decisions)
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
        # The rule of training, which on one image is that of evaluation.
        network.batch_rule = "mean"
        torch.testing.assert_close(network(images[:1]), alone[:1], rtol=0, atol=1e-5)
        assert network(images).isfinite().all()


@pytest.mark.parametrize("setting", ["full", {"threshold": 0}, {"threshold": 1}, {"keep": 0.5}])
def test_gradients_are_finite(decoder, setting):
    network = in_training(micro(decoder))
    images = eight_images()[5:]
    with network.using(setting):
        outputs = network(images)
    assert [scores.shape for scores in outputs] == [outputs[0].shape] * 3
    sum(scores.square().mean() for scores in outputs).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_half_of_the_patches_stopped_in_training(decoder):
    network = micro(decoder)
    spread(network)
    images = eight_images()
    network.batch_rule = "mean"
    with torch.no_grad():
        thresholds = middle(network.eval(), images)
    in_training(network)
    with network.using({"threshold": thresholds}):
        outputs = network(images)
        assert len(network.encode(images).decisions[1].selection.resting.unique()) == 2
    sum(scores.square().mean() for scores in outputs).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or "score_norm" in name, name


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_384", "vit_small_patch16_dinov3"])
def test_recomputed_blocks_give_the_same_gradients(backbone):
    gradients = []
    for recomputed in (False, True):
        network = micro("segmenter", backbone=backbone, backbone_arguments=MICRO)
        spread(network)
        if recomputed:
            recompute_blocks(network)
        with in_training(network).using({"threshold": 0.6}):
            outputs = network(eight_images())
        sum(scores.square().mean() for scores in outputs).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*gradients)


def test_where_gradients_go(decoder):
    for detached in (False, True):
        network = in_training(micro(decoder, detach_auxiliaries=detached))
        scores, *auxiliary = network(eight_images())
        heads = list(network.decoder.auxiliary_heads.parameters())
        embedding = network.encoder.vit.patch_embed.proj.weight
        to_heads = torch.autograd.grad(scores.sum(), heads, allow_unused=True, retain_graph=True)
        assert to_heads == (None,) * len(heads)
        to_encoder = torch.autograd.grad(
            sum(auxiliary).square().sum(), embedding, allow_unused=True
        )
        assert (to_encoder[0] is None) == detached


def test_thresholds_fall_over_the_first_steps_of_training(decoder):
    network = micro(decoder, ramp_steps=100)
    with network.using({"threshold": [0.9, 0.8]}):
        network.train()
        for step, expected in ((0, (1.0, 1.0)), (50, (0.95, 0.9)), (100, (0.9, 0.8))):
            network.step = step  # as the training module says, after a resume too
            assert [network.threshold(k) for k in (0, 1)] == pytest.approx(expected)
        network.step = 1000
        assert network.threshold(0) == pytest.approx(0.9)
        network.step = 0
        assert network.eval().threshold(0) == 0.9


@torch.inference_mode()
def test_a_criterion_of_differences(network):
    images = eight_images()
    with network.using({"threshold": 1}):
        first, second = network.encode(images).decisions
        assert first.active.all()
        assert second.active.all()
        network.difference = 0.0
        first_again, second_again = network.encode(images).decisions
    assert first_again.active.all()
    rises = second.confidence - first.confidence
    assert torch.equal(second_again.active, rises >= 0)
    assert 0 < second_again.active.sum() < rises.numel()


@torch.inference_mode()
def test_a_budget_keeps_the_least_confident_patches(decoder):
    network = micro(decoder, image_size=(128, 128)).eval()
    spread(network)
    images = F.interpolate(eight_images(), size=(128, 128))
    with network.using({"keep": [0.6, 0.3]}):
        first, second = network.encode(images).decisions
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    assert first.selection.lengths == (1 + 192,) * 8  # 0.6 * 256 is 153.6
    assert second.selection.lengths == (1 + 128,) * 8
    for image in range(8):
        confidence, active = first.confidence[image], first.active[image]
        assert confidence[active].max() <= confidence[~active].min()
    assert (first.active | ~second.active).all()
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    with network.using({"keep": 0.3}):  # of 64 patches it keeps all
        assert network.encode(images[:, :, :64, :64]).decisions[1].active.all()
    with network.using({"keep": [0.3, 0.9]}):
        assert network.encode(images).decisions[1].selection.lengths == (129,) * 8


@torch.inference_mode()
def test_images_of_any_size(network):
    for height, width in ((1, 1), (8, 50), (33, 70)):
        images = torch.randn(2, 3, height, width)
        factor = 4 if network.upsamples else 1
        size = tuple(-(-side * factor // 8) for side in (height, width))
        for setting in ("full", "tau_0.9", {"threshold": 0.6}, {"keep": 0.5}):
            with network.using(setting):
                assert network(images).shape == (2, 7, *size)
                assert network(images).isfinite().all()


@torch.inference_mode()
def test_autocast_changes_scores_by_rounding_alone(network):
    images = eight_images()
    for setting in ("full", {"keep": 0.5}, {"threshold": 0.0}, {"threshold": 0.7}):
        with network.using(setting):
            exact = network(images)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = network(images).float()
        assert (exact.argmax(1) == rounded.argmax(1)).float().mean().item() > 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_packed_in_half_precision(decoder):
    """The kernel for images of different lengths gives what plain attention gives for each."""
    network = micro(decoder).eval()
    spread(network)
    network, images = network.cuda(), eight_images().cuda()
    with network.using({"threshold": middle(network, images)}), torch.autocast("cuda"):
        assert not network.encode(images).decisions[0].selection.rectangular
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    assert (together.argmax(1) == alone.argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_384", "vit_small_patch16_dinov3"])
@torch.inference_mode()
def test_packed_images_give_what_each_gives_in_turn(monkeypatch, backbone):
    """What a GPU does with images of different lengths, and what a CPU does."""
    network = micro("segmenter", backbone=backbone).eval()
    spread(network)
    images = eight_images()
    with network.using({"threshold": middle(network, images)}):
        assert not network.encode(images).decisions[0].selection.rectangular
        in_turn = network(images)
        monkeypatch.setattr(
            network,
            "_run_packed",
            lambda blocks, tokens, rotations, selection: network.encoder.run(
                blocks, tokens, rotations, selection.core
            ),
        )
        torch.testing.assert_close(network(images), in_turn, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_compiled_and_exported_it_gives_the_same():
    shallow = MICRO | {"depth": 2, "patch_size": 8}
    network = micro("segmenter", decisions=(1,), backbone_arguments=shallow).eval()
    spread(network)
    images = eight_images()[:3]
    torch._dynamo.reset()
    whole = torch.compile(network, backend="eager", fullgraph=True)
    with network.using({"keep": 0.5}):
        torch.testing.assert_close(whole(images), network(images))
        with torch.no_grad():
            exported = torch.export.export(network, (images,)).module()
        torch.testing.assert_close(exported(images), network(images))
    torch._dynamo.reset()
    pieces = torch.compile(network, backend="eager")
    with network.using({"threshold": middle(network, images)}):
        assert not network.encode(images).decisions[0].selection.rectangular
        torch.testing.assert_close(pieces(images), network(images))
    torch._dynamo.reset()


def block_macs(tokens, width):
    return 12 * tokens * width**2 + 2 * tokens**2 * width


@pytest.mark.parametrize("convention", ["macs", "official"])
@torch.inference_mode()
def test_cost_by_its_formula(network, convention):
    """Blocks, each of the tokens that run; heads; patch embedding and decoder."""
    width, depth, channels, classes, patches = 32, 6, 24, 7, 64
    with network.using("full"):
        full = measure_cost(network, (64, 64), latency=False, convention=convention).macs
    rest = full - depth * block_macs(patches + 1, width)
    for setting in ({"threshold": 1.0}, {"threshold": [0.8, 0.55]}, {"threshold": 0}):
        with network.using(setting):
            cost = measure_cost(network, (64, 64), latency=False, convention=convention)
            # The image that a cost that depends on it is measured on.
            noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
            decisions = network.encode(noise).decisions
        running = [decision.selection.lengths[0] for decision in decisions]
        blocks = block_macs(patches + 1, width)
        blocks += 2 * block_macs(running[0], width) + 3 * block_macs(running[1], width)
        if convention == "official":
            scale = 4 if network.upsamples else 1
            heads = 2 * patches * channels * (width + scale**2 * classes)
        else:  # ours classifies before it upsamples, and tokens that are active only
            scored = [patches, patches]
            if not network.upsamples and running[0] <= patches:
                scored[1] = running[0]
            elif not network.upsamples:
                scored[1] = patches + 1
            heads = sum(scored) * channels * (width + classes)
        assert cost.macs == rest + blocks + heads


@torch.inference_mode()
def test_a_threshold_for_a_budget(network):
    images = eight_images()
    costs = {}
    for name, setting in (("least", {"threshold": 0}), ("most", {"threshold": 1})):
        costs[name] = measure_cost(network, setting=setting, images=images, latency=False).macs
    assert costs["least"] < costs["most"]
    budget = (costs["least"] + costs["most"]) / 2 / 1e9
    setting = calibrate(network, budget, images)
    cost = measure_cost(network, setting=setting, images=images, latency=False)
    assert cost.macs / 1e9 == pytest.approx(budget, rel=0.02)
    assert cost.macs_std > 0
    assert 0 < setting.threshold < 1


# Total, auxiliary and decoder parameters in millions; GMACs of the encoder of one image.
@pytest.mark.parametrize(
    ("name", "classes", "side", "millions", "gmacs"),
    [
        ("setr_s", 19, 768, (22.89, 0.313, 0.10), 98.6),
        ("setr_s", 150, 512, (22.54, 0.414, 0.14), 31.7),
        ("setr_b", 19, 768, (88.23, 0.611, 0.20), 295.1),
        ("setr_b", 150, 512, (87.38, 0.712, 0.24), 107.0),
        ("setr_l", 19, 768, (306.54, 0.809, 0.27), 959.0),
        ("setr_l", 150, 512, (305.56, 1.108, 0.30), 362.0),
        ("segmenter_s", 19, 768, (26.79, 0.311, 4.00), 98.6),
        ("segmenter_s", 150, 512, (26.45, 0.412, 4.05), 31.7),
        ("segmenter_b", 19, 768, (103.99, 0.606, 15.96), 295.1),
        ("segmenter_b", 150, 512, (103.20, 0.707, 16.06), 107.0),
        ("segmenter_l", 19, 768, (334.62, 0.803, 28.36), 959.0),
        ("segmenter_l", 150, 512, (333.55, 0.904, 28.50), 362.0),
    ],
)
def test_parameters_and_cost_of_the_encoder(name, classes, side, millions, gmacs):
    convolutions = {"auxiliary_convolutions": 2} if (name, classes) == ("setr_l", 150) else {}
    with torch.device("meta"):
        network = create_network(f"dovit_{name}", classes, image_size=(side, side), **convolutions)
    parts = (network, network.decoder.auxiliary_heads, network.decoder.head)
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    assert (round(counts[0], 2), round(counts[1], 3), round(counts[2], 2)) == millions
    encoder = network.encoder
    patches = (side // 16) ** 2
    total = encoder.depth * block_macs(patches + 1, encoder.width) + patches * 768 * encoder.width
    assert round(total / 1e9, 1) == pytest.approx(gmacs, abs=0.11)  # L: 958.96
    assert network.decisions == ((6, 12, 18) if name.endswith("l") else (2, 5, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder": "segmentor"}, "there is no decoder 'segmentor': did you mean 'segmenter'?"),
        ({"batch_rule": "exat"}, "there is no batch rule 'exat': did you mean 'exact'?"),
        ({"ramp_steps": 0}, "'ramp_steps' is a whole number above 0, not 0"),
        ({"decisions": (5, 2)}, "'decisions' are blocks from 0 to 11 in ascending order, not"),
        ({"decisions": (2, 12)}, "'decisions' are blocks from 0 to 11 in ascending order, not"),
        ({"decisions": ()}, "'decisions' are blocks from 0 to 11"),
        (
            {"backbone": "vit_base_patch16_siglip_224"},
            "'vit_base_patch16_siglip_224' has no class token, to which DoViT aggregates",
        ),
    ],
)
def test_slips_in_arguments(arguments, message):
    with pytest.raises(UserError) as caught, torch.device("meta"):
        create_network("dovit_setr_s", 7, **arguments)
    assert message in str(caught.value)


def test_a_setting_has_a_value_for_each_decision(network):
    message = "'threshold' of a setting is one number or 2, one for each decision, not 3"
    with pytest.raises(UserError, match=message), network.using({"threshold": [0.9, 0.8, 0.7]}):
        pass
