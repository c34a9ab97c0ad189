"""DToP against the official tensors, and what its exits promise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from segtrain import UserError, create_network, load_weights, measure_cost
from segtrain.reduction.early_exit import EarlyExit, stay
from segtrain.training import AttentionToMaskLoss
from segtrain.training.attention_to_mask import losses

REFERENCE = Path("tests/reference/plain_vit")
TENSORS = load_file(REFERENCE / "dtop_micro_io.safetensors")
CASES = json.loads((REFERENCE / "dtop_micro.json").read_text())["cases"]
MICRO = {
    "backbone": "vit_tiny_patch16_384",
    "backbone_arguments": {"embed_dim": 32, "depth": 6, "num_heads": 4},
    "image_size": (128, 128),
    "outputs": (1, 3, 5),
    "num_heads": 2,
}
PRUNE = {"thresholds": CASES["prune"]["thresh"][:2]}
# Each case with what stays at all of its exits.
SETTINGS = {"full": "full", "prune": PRUNE}


def micro(num_classes=4, **arguments):
    return create_network("dtop_b", num_classes, **(MICRO | arguments))


@pytest.fixture
def network():
    network = micro()
    load_weights(network, REFERENCE / "dtop_micro.safetensors")
    return network.eval()


@pytest.fixture
def images():
    """As many as a batch has, unlike in what stays of them."""
    images = TENSORS["input"].float()
    scales = torch.linspace(0.2, 3, 4)[:, None, None, None, None]
    return (scales * images).flatten(0, 1)


def train_without_dropout(network):
    """As in training, nothing being dropped."""
    network.eval()
    network.training = True
    return network


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_scores_of_the_official_code(network, case):
    with network.using(SETTINGS[case]):
        scores = network(TENSORS["input"])
    assert scores.shape == (2, 4, 8, 8)
    expected = TENSORS[f"{case}.stage2.pred"]
    torch.testing.assert_close(scores.flatten(2), expected, rtol=0, atol=1e-5)
    resized = nn.functional.interpolate(scores, (128, 128), mode="bilinear")
    expected = TENSORS[f"{case}.final_pred_s4"]
    torch.testing.assert_close(resized[..., ::4, ::4], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_exits_of_the_official_code(network, case):
    left = torch.zeros(2 * 64, dtype=torch.bool)
    with network.using(SETTINGS[case]):
        stages = list(train_without_dropout(network).stages(TENSORS["input"]))
    assert len(stages) == 3
    for number, stage in enumerate(stages):

        def expected(name, number=number):
            return TENSORS[f"{case}.stage{number}.{name}"]

        tokens = torch.zeros(2 * 64, 32)
        tokens[stage.tokens.positions] = stage.tokens.values
        torch.testing.assert_close(tokens.view(2, 64, 32), expected("tokens"), rtol=0, atol=1e-5)
        classes, masks = stage.prediction
        torch.testing.assert_close(classes, expected("pred_logits"), rtol=0, atol=1e-5)
        torch.testing.assert_close(masks.flatten(2), expected("canvas"), rtol=0, atol=1e-5)
        scores = classes.softmax(2)[:, :, :1] * masks.flatten(2).sigmoid()
        torch.testing.assert_close(scores, expected("pred"), rtol=0, atol=1e-5)
        if stage.stays is not None:
            left[stage.tokens.positions[~stage.stays]] = True
        assert torch.equal(left.view(2, 64), expected("pruned_after").bool())
        assert left.view(2, 64).sum(1).tolist() == CASES[case]["pruned_per_image"][number]


@pytest.mark.parametrize("case", CASES)
def test_losses_of_the_official_code(network, case):
    labels = TENSORS["gt"].long()
    criterion = AttentionToMaskLoss()
    with network.using(SETTINGS[case]):
        predictions = train_without_dropout(network)(TENSORS["input"])
    targets = criterion.targets(labels, 4)
    total = 0.0
    for prediction, name in zip(predictions, ("decode", "aux_1", "aux_0"), strict=True):
        expected = list(CASES[case]["losses"][name].values())
        found = [loss.item() for loss in losses(prediction, targets, (128, 128))]
        assert found == pytest.approx(expected, abs=1e-4)
        total += sum(expected)
    assert criterion(predictions, labels).item() == pytest.approx(total, abs=1e-4)


# GMACs as published for images of ADE20K, Pascal-Context and COCO-Stuff.
@pytest.mark.parametrize(
    ("name", "classes", "side", "gmacs", "millions"),
    [
        ("dtop_b", 150, 512, 109.9, 108.8),
        ("dtop_l", 150, 640, 617.0, 344.4),
        ("dtop_l", 59, 480, 315.4, 343.5),
        ("dtop_l", 171, 512, 366.9, 343.8),
    ],
)
def test_published_costs_without_exits(name, classes, side, gmacs, millions):
    with torch.device("meta"):
        network = create_network(name, classes, image_size=(side, side))
    cost = measure_cost(network, (side, side), latency=False)
    assert cost.macs / 1e9 == pytest.approx(gmacs, rel=0.005)
    assert round(cost.parameters / 1e6, 1) == millions


@torch.inference_mode()
def test_cost_is_that_of_the_tokens_left(network):
    """Blocks and heads cost what the tokens that reach them cost, and the image's only once."""
    images = torch.randn((1, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    width, half, classes, layers = 32, 16, 4, 3
    setting = {"thresholds": (0.45, 0.09)}
    with network.using(setting):
        tokens = [stage.tokens.lengths[0] for stage in network.stages(images)]
    expected = 64 * 3 * 16 * 16 * width
    for t in tokens:
        expected += 2 * (12 * t * width**2 + 2 * t**2 * width)
        queries = 4 * classes * half**2 + 2 * classes**2 * half
        expected += t * width * half + 2 * classes * half
        expected += layers * (
            queries
            + (2 * classes + 2 * t) * half**2
            + 2 * classes * t * half
            + 8 * classes * half**2
        )
    assert tokens[0] > tokens[1] > tokens[2]
    assert measure_cost(network, (128, 128), setting, latency=False).macs == expected


@pytest.mark.parametrize("thresholds", [(1.0,), tuple(PRUNE["thresholds"]), (1.0, 0.1), (0.0,)])
@torch.inference_mode()
def test_eight_images_give_what_each_gives_alone(network, images, thresholds):
    with network.using({"thresholds": thresholds}):
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
        lengths = [stage.tokens.lengths for stage in network.stages(images)]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    if 0 < min(thresholds) < 1:
        assert len(set(lengths[-1])) > 2


@torch.inference_mode()
def test_exits_at_which_nothing_leaves_are_not_computed(network):
    called = []
    for number, head in enumerate(network.decoder.heads):
        head.register_forward_hook(lambda *_, number=number: called.append(number))
    for thresholds, heads in (((1, 1), [2]), ((1, 0.5), [1, 2]), ((0.5, 1), [0, 2])):
        with network.using({"thresholds": thresholds}):
            network(TENSORS["input"])
        assert called == heads
        called.clear()


def test_who_stays():
    probabilities = torch.tensor(
        [[0.9, 0.1], [0.8, 0.1], [0.1, 0.7], [0.5, 0.1], [0.95, 0.2], [0.8, 0.0]]
    )
    images = torch.tensor([0, 0, 0, 0, 0, 1])
    cases = {
        # Unsure are 3 alone; 4 and 0 are the surest of class 0, 2 and 5 have no rivals.
        (0.6, 2): [True, False, True, True, True, True],
        (0.6, 1): [False, False, True, True, True, True],
        (0.6, 3): [True] * 6,
        (0.8, 1): [False, True, True, True, True, True],
        (1.0, 1): [True] * 6,
        (0.0, 1): [False, False, True, False, True, True],
    }
    for (threshold, kept), expected in cases.items():
        assert stay(probabilities, images, 2, threshold, kept).tolist() == expected
    # Of equals, those that come first.
    equal = torch.full((5, 2), 0.9)
    assert stay(equal, torch.zeros(5).long(), 1, 0.5, 2).tolist() == [True] * 2 + [False] * 3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kept", [1, 5])
def test_extremes(network, training, kept):
    """Every token sure, none, an image of one colour or of one token, and another size."""
    flat = torch.zeros(1, 3, 128, 128)
    batch = torch.cat([flat, TENSORS["input"]])
    labels = torch.randint(0, 4, (3, 128, 128))
    labels[0] = 255
    network.train(training)
    for threshold in (0.0, 1e-3, 0.5, 1.0):
        with network.using({"thresholds": (threshold,), "kept": kept}):
            stages = list(network.stages(batch))
            if threshold == 0:
                assert all(stage.tokens.lengths[0] <= 64 for stage in stages)
                assert max(stages[-1].tokens.lengths) <= 4 * kept
                assert min(stages[-1].tokens.lengths) >= 1
            network.zero_grad()
            if training:
                AttentionToMaskLoss()(network(batch), labels).backward()
                for name, parameter in network.named_parameters():
                    assert parameter.grad is not None, name
                    assert parameter.grad.isfinite().all(), name
            else:
                assert network(batch).isfinite().all()
                assert network(batch[:, :, :40, :100]).shape == (3, 4, 3, 7)
                assert network(batch[:, :, :5, :7]).isfinite().all()  # a single token


def test_gradients_reach_earlier_heads_through_what_has_left(network):
    """The last head's masks are, where tokens have left, those of the heads before it."""
    head = network.decoder.auxiliary_heads[0].attention.layers[-1].cross_attention.key.weight
    for setting, reached in (("full", False), (PRUNE, True)):
        with network.using(setting):
            last, *_ = train_without_dropout(network)(TENSORS["input"])
        gradient = torch.autograd.grad(last.masks.square().sum(), head, allow_unused=True)[0]
        assert (gradient is not None and bool(gradient.any())) is reached


def test_training_gives_the_same_with_unlike_images_as_evaluation(network):
    """In training images go one by one once tokens have left; nothing else differs."""
    with network.using(PRUNE):
        classes, masks = train_without_dropout(network)(TENSORS["input"])[0]
        expected = network.eval()(TENSORS["input"])
    scores = classes.softmax(2)[:, :, :1, None] * masks.sigmoid()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
@torch.inference_mode()
def test_rotations_stay_with_their_tokens(backbone):
    torch.manual_seed(0)
    network = micro(
        backbone=backbone,
        backbone_arguments={"embed_dim": 48, "depth": 6, "num_heads": 4, "patch_size": 16},
    ).eval()
    images = torch.randn(3, 3, 96, 80)
    threshold = network(images).median().item()
    with network.using({"thresholds": (threshold,)}):
        lengths = [stage.tokens.lengths for stage in network.stages(images)][-1]
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    assert max(lengths) < 30
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_autocast_changes_scores_by_rounding_alone(network):
    for setting, tolerance in (("full", 0.02), (PRUNE, 1)):
        with network.using(setting):
            exact = network(TENSORS["input"])
            with torch.autocast("cpu", torch.bfloat16):
                rounded = network(TENSORS["input"]).float()
        torch.testing.assert_close(rounded, exact, rtol=0, atol=tolerance)
        # Tokens near a threshold leave elsewhere.
        assert (rounded - exact).abs().mean() < 0.05


def test_settings(network):
    names = ["full", *(f"tau_{threshold}" for threshold in (0.99, 0.98, 0.95, 0.9, 0.85, 0.8))]
    assert list(network.settings) == names
    assert [setting.data_dependent for setting in network.settings.values()] == [False] + [True] * 6
    assert network.resolve_setting({"thresholds": [0.9]}) is network.settings["tau_0.9"]
    setting = network.resolve_setting({"thresholds": [0.9, 0.95], "kept": 3})
    assert setting.name == "tau_0.9_0.95_kept_3"
    assert setting.values == {"thresholds": [0.9, 0.95], "kept": 3}
    assert setting.threshold_range == (0, 1)
    moved = setting.with_threshold(0.25)
    assert moved == EarlyExit("tau_0.25_kept_3", (0.25,), 3)
    assert network.settings["full"].threshold_range is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"thresholds": [0.9, 0.9, 0.9]}, "'thresholds' of a setting is a list of 1 or 2 (exits"),
        ({"thresholds": 0.9}, "'thresholds' of a setting is a list of numbers from 0 to 1, not 0."),
        ({"thresholds": []}, "is a list of numbers from 0 to 1, not []"),
        ({"thresholds": [1.1]}, "is a list of numbers from 0 to 1, not [1.1]"),
        ({"thresholds": [True]}, "is a list of numbers from 0 to 1, not [True]"),
        ({"thresholds": [0.9], "kept": 0}, "'kept' of a setting is a whole number above 0, not 0"),
        ({"threshold": [0.9]}, "a setting has no field 'threshold': did you mean 'thresholds'?"),
        ("tau_0.91", "DToP has no setting 'tau_0.91': did you mean 'tau_0.9'?"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(network, setting, message):
    with pytest.raises(UserError) as caught, network.using(setting):
        pass
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": (3, 1, 5)}, "'outputs' are blocks from 0 to 5, ascending, not [3, 1, 5]"),
        ({"outputs": (1, 6)}, "'outputs' are blocks from 0 to 5, ascending, not [1, 6]"),
        ({"outputs": (1, 3)}, "'outputs' end with the last block, 5"),
        ({"num_heads": 3}, "num_heads=3 does not divide the decoder's 16 channels"),
    ],
)
def test_slips_in_arguments(arguments, message):
    with pytest.raises(UserError, match="^" + message.replace("[", r"\[")):
        micro(**arguments)
