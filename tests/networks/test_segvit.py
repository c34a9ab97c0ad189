"""SegViT against the official tensors, and its shrunk version against its definition."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from segtrain import UserError, create_network, load_weights, measure_cost
from segtrain.inference import Inference
from segtrain.networks.blocks import grid_from_tokens
from segtrain.networks.shrinking import ShrinkingBlock
from tests.networks.graphs import assert_one_graph_each

REFERENCE = Path("tests/reference/plain_vit")
TENSORS = load_file(REFERENCE / "segvit_atm_micro_io.safetensors")
BACKBONE = {
    "backbone": "vit_tiny_patch16_384",
    "backbone_arguments": {"embed_dim": 32, "depth": 6, "num_heads": 4},
    "image_size": (128, 128),
    "num_heads": 4,
    "num_layers": 2,
    "normalisation": "imagenet",
}


def micro(**arguments):
    return create_network("segvit_b", 7, **(BACKBONE | {"outputs": (1, 3, 5)} | arguments))


def shrunk_micro(**arguments):
    return create_network("segvit_shrunk_l", 7, **(BACKBONE | {"shrink_at": 2} | arguments))


@pytest.fixture
def network():
    network = micro()
    load_weights(network, REFERENCE / "segvit_atm_micro.safetensors")
    return network.eval()


@torch.inference_mode()
def test_scores_of_the_official_code(network):
    scores = network(TENSORS["input"])
    assert scores.shape == (2, 7, 128, 128)
    torch.testing.assert_close(scores[..., ::4, ::4], TENSORS["pred"], rtol=0, atol=1e-4)
    # Stored in half precision.
    torch.testing.assert_close(scores[0], TENSORS["pred_full_b0"].float(), rtol=0, atol=2e-3)


@torch.inference_mode()
def test_features_of_the_official_code(network):
    levels, grid = network.levels(TENSORS["input"], (1, 3, 5))
    for number, level in enumerate(levels):
        features = grid_from_tokens(level.restore(level.tokens), grid)
        torch.testing.assert_close(features, TENSORS[f"feat{number}"], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_what_training_gives_is_the_official_codes(network):
    network.training = True  # without dropout inside
    main, shallower, deepest = network(TENSORS["input"])
    for prediction, name in ((shallower, "train.aux1"), (deepest, "train.aux0")):
        for part, tensor in zip(prediction, ("pred_logits", "pred_masks"), strict=True):
            torch.testing.assert_close(part, TENSORS[f"{name}.{tensor}"], rtol=0, atol=1e-4)
    torch.testing.assert_close(main.classes, TENSORS["train.pred_logits"], rtol=0, atol=1e-4)
    masks = nn.functional.interpolate(main.masks, (128, 128), mode="bilinear")[..., ::4, ::4]
    torch.testing.assert_close(masks, TENSORS["train.pred_masks_s4"], rtol=0, atol=1e-4)


# GMACs as published for images of ADE20K, Pascal-Context and COCO-Stuff.
@pytest.mark.parametrize(
    ("name", "classes", "side", "gmacs", "millions"),
    [
        ("segvit_b", 150, 512, 120.9, 108.7),
        ("segvit_l", 150, 640, 637.9, 344.3),
        ("segvit_l", 171, 512, 383.9, 343.7),
        ("segvit_l", 60, 480, 321.6, 343.5),
        ("segvit_shrunk_l", 150, 640, 373.5, 344.6),
        ("segvit_shrunk_l", 171, 512, 224.8, 343.7),
        ("segvit_shrunk_l", 60, 480, 186.9, 343.4),
    ],
)
def test_published_costs(name, classes, side, gmacs, millions):
    with torch.device("meta"):
        network = create_network(name, classes, image_size=(side, side))
    cost = measure_cost(network, (side, side), latency=False)
    assert cost.macs / 1e9 == pytest.approx(gmacs, rel=0.005)
    assert round(cost.parameters / 1e6, 1) == millions


@torch.inference_mode()
def test_shrinking_gives_what_the_kept_tokens_of_the_whole_block_are():
    network = shrunk_micro().eval()
    shrinking = network.encoder.vit.blocks[2]
    assert isinstance(shrinking, ShrinkingBlock)
    whole = micro().eval().encoder.vit.blocks[2]
    whole.load_state_dict(shrinking.state_dict())
    tokens, kept = torch.randn(2, 20, 32), torch.tensor([0, 2, 10, 12, 13])
    torch.testing.assert_close(shrinking(tokens, kept), whole(tokens)[:, kept])


@torch.inference_mode()
def test_every_second_row_and_column_goes_on():
    network = shrunk_micro().eval()
    calls = []
    network.encoder.vit.blocks[2].register_forward_hook(lambda *call: calls.append(call[1:]))
    assert network(torch.randn(1, 3, 48, 80)).shape == (1, 7, 48, 80)
    ((_, kept), after) = calls[0]
    assert kept.tolist() == [0, 2, 4, 10, 12, 14]  # of a grid of 3 x 5
    assert after.shape == (1, 6, 32)


@torch.inference_mode()
def test_tokens_may_be_merged(network):
    images = torch.cat([TENSORS["input"], 0.1 * TENSORS["input"]])
    full = network(images)
    assert len(network.settings) > 5
    for name in network.settings:
        with network.using(name):
            scores = network(images)
            alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5, msg=name)
        assert torch.equal(scores, full) is (name == "full"), name
        assert (scores.argmax(1) == full.argmax(1)).float().mean() > 0.5, name


def test_training_with_merged_tokens(network):
    with network.train().using({"algm": 0.5}):
        predictions = network(TENSORS["input"])
    assert [prediction.masks.shape for prediction in predictions] == [(2, 7, 8, 8)] * 3


@pytest.mark.parametrize("create", [micro, shrunk_micro])
@torch.inference_mode()
def test_images_of_any_size_and_number(create):
    torch.manual_seed(0)
    network = create().eval()
    for height, width in ((1, 1), (33, 100), (128, 144)):
        images = torch.randn(2, 3, height, width)
        scores = network(images)
        assert scores.shape == (2, 7, height, width)
        alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
    slide = Inference("slide", (64, 64), (43, 43))
    assert slide(network, torch.randn(1, 3, 100, 80), (50, 40)).shape == (1, 50, 40)


@pytest.mark.parametrize("create", [micro, shrunk_micro])
@torch.inference_mode()
def test_it_compiles_to_one_graph(create):
    assert_one_graph_each(create().eval(), TENSORS["input"], ["full"])


@pytest.mark.parametrize(("create", "heads"), [(micro, 3), (shrunk_micro, 2)])
def test_every_parameter_learns(create, heads):
    torch.manual_seed(0)
    network = create(drop_path=0.0).train()
    predictions = network(torch.randn(2, 3, 128, 96))
    assert [prediction.masks.shape for prediction in predictions] == [(2, 7, 8, 6)] * heads
    assert [prediction.classes.shape for prediction in predictions] == [(2, 7, 8)] * heads
    parts = [part.square().mean() for prediction in predictions for part in prediction]
    torch.stack(parts).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # No class token goes through the blocks.
        assert parameter.grad.any() or name == "encoder.vit.cls_token", name


@pytest.mark.parametrize(
    ("create", "arguments", "message"),
    [
        (micro, {"outputs": (5, 7, 11)}, "'outputs' are blocks from 0 to 5, ascending, not [5, 7"),
        (micro, {"outputs": ()}, "'outputs' are blocks from 0 to 5, ascending, not []"),
        (micro, {"num_heads": 5}, "num_heads=5 does not divide the decoder's 16 channels"),
        (shrunk_micro, {"shrink_at": 6}, "'shrink_at' is one of the blocks 1 to 5, not 6"),
        (
            shrunk_micro,
            {
                "backbone": "vit_small_patch16_dinov3",
                "backbone_arguments": {"embed_dim": 32, "depth": 6, "num_heads": 4},
            },
            "'vit_small_patch16_dinov3' cannot shrink: its attention is no plain one",
        ),
    ],
)
def test_slips_in_arguments(create, arguments, message):
    with pytest.raises(UserError) as caught:
        create(**arguments)
    assert message in str(caught.value)
