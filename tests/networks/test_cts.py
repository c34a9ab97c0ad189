"""CTS against Segmenter, and against a transcription of the paper that goes token by token."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segtrain import UserError, create_network, measure_cost
from segtrain.inference import IMAGE_MEAN, IMAGE_STD
from tests.reduction.test_sharing import share_by_patch

MICRO = {
    "backbone": "vit_tiny_patch16_384",
    "backbone_arguments": {"embed_dim": 32, "depth": 3, "num_heads": 4},
    "decoder_heads": 4,
    "image_size": (128, 128),
}


def create(name="cts_s", **arguments):
    """A micro network in evaluation mode, none of whose parameters are ones or zeros."""
    torch.manual_seed(0)
    network = create_network(name, num_classes=5, **(MICRO | arguments))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.fixture(scope="module")
def network():
    return create()


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [(128, 128), (100, 71), (7, 9)])
def test_without_sharing_it_is_segmenter(network, size):
    segmenter = create("segmenter_s")
    own = network.state_dict()
    segmenter.load_state_dict({name: own[name] for name in segmenter.state_dict()})
    with torch.inference_mode(), network.using("full"):
        assert torch.equal(network(images(2, 3, *size)), segmenter(images(2, 3, *size)))


def transcribe(network, image, count):
    """Scores (K, ceil(H/16), ceil(W/16)) of an image (3, H, W), each token made by itself."""
    vit, decoder = network.encoder.vit, network.decoder
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    height, width = image.shape[1:]
    image = (image * std + mean - 127.5) / 127.5
    image = F.pad(image, (0, -width % 32, 0, -height % 32))
    rows, columns = image.shape[1] // 32, image.shape[2] // 32

    features = image[None]
    for module in network.policy.encoder.children():
        features = module(features)
    several, one = network.policy.decoder(features)[0].softmax(dim=0)
    assert several.shape == (rows, columns)
    grid = -(-height // 16), -(-width // 16)
    unshared, shared, sources = share_by_patch(one, count, grid)

    positions = vit.pos_embed[0, 1:].T.reshape(1, -1, 8, 8)
    positions = F.interpolate(positions, (2 * rows, 2 * columns), mode="bilinear")[0]
    tokens = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
    for index in unshared:
        y, x = divmod(index, 2 * columns)
        patch = image[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
        tokens.append(vit.patch_embed.proj(patch[None])[0, :, 0, 0] + positions[:, y, x])
    for index in shared:
        y, x = divmod(index, columns)
        patch = image[:, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32]
        patch = F.interpolate(patch[None], scale_factor=0.5, mode="bilinear")
        position = positions[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(dim=(1, 2))
        tokens.append(vit.patch_embed.proj(patch)[0, :, 0, 0] + position)
    tokens = torch.stack(tokens)[None]
    for block in vit.blocks:
        tokens = block(tokens)
    scores = decoder(vit.norm(tokens)[:, 1:])[0]
    return torch.stack([scores[source] for source in sources], dim=1).unflatten(1, grid)


@pytest.mark.parametrize(
    ("size", "setting", "count"),
    [
        ((128, 128), "shared_0.3", 7),
        ((128, 128), "shared_0.75", 16),
        ((96, 160), "shared_0.15", 3),  # other positions
        ((90, 130), "shared_0.6", 12),  # padding, in its last column a whole patch of it
    ],
)
def test_scores_are_those_of_the_transcription(network, size, setting, count):
    batch = images(2, 3, *size)
    with torch.inference_mode(), network.using(setting):
        scores = network(batch)
        for image, found in zip(batch, scores, strict=True):
            close(found, transcribe(network, image, count), atol=2e-5)


def test_sharing_loses_nothing_of_superpatches_of_one_colour():
    """Where no token sees another and positions change with the superpatch alone."""
    network = create()
    with torch.no_grad():
        for block in (*network.encoder.vit.blocks, *network.decoder.blocks):
            nn.init.zeros_(block.attn.proj.weight)
        coarse = network.encoder.vit.pos_embed[0, 1:17].T.reshape(1, 32, 4, 4)
        fine = F.interpolate(coarse, scale_factor=2, mode="nearest")
        network.encoder.vit.pos_embed[0, 1:] = fine[0].flatten(1).T
    batch = F.interpolate(images(2, 3, 4, 4), scale_factor=32, mode="nearest")
    with torch.inference_mode():
        with network.using("full"):
            expected = network(batch)
        for setting in network.settings:
            with network.using(setting):
                close(network(batch), expected)


def test_every_image_has_as_many_tokens(network):
    lengths = []
    block = network.encoder.vit.blocks[0]
    hook = block.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    with torch.inference_mode():
        for setting in network.settings:
            with network.using(setting):
                network(images(3, 3, 128, 128))
    hook.remove()
    saved = [7, 0, 4, 10, 13, 16]  # superpatches of 16
    assert list(network.settings) == [
        *("shared_0.3", "full", "shared_0.15", "shared_0.4375", "shared_0.6", "shared_0.75")
    ]
    assert lengths == [65 - 3 * count for count in saved]
    assert not network.data_dependent


@pytest.mark.parametrize("setting", ["shared_0.3", "shared_0.6"])
def test_eight_images_score_as_each_alone(network, setting):
    batch = images(8, 3, 96, 128)
    with torch.inference_mode(), network.using(setting):
        alone = torch.cat([network(image[None]) for image in batch])
        close(network(batch), alone)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 33), (32, 64), (15, 200)])
def test_images_of_any_size_have_scores(network, size):
    with torch.inference_mode():
        for setting in network.settings:
            with network.using(setting):
                scores = network(images(2, 3, *size))
                assert scores.shape == (2, 5, -(-size[0] // 16), -(-size[1] // 16))
                assert scores.isfinite().all()


def test_the_policy_is_frozen_also_in_training():
    network = create_network("cts_s", num_classes=5, **MICRO).train()
    before = copy.deepcopy(network.policy.state_dict())
    network(images(2, 3, 128, 100)).square().mean().backward()
    for name, parameter in network.named_parameters():
        if name.startswith("policy."):
            assert parameter.grad is None
            assert not parameter.requires_grad
        else:
            assert parameter.grad.isfinite().all(), name
    assert network.encoder.vit.pos_embed.grad.abs().sum() > 0
    for name, value in network.policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_policy_learns_from_one_score_for_each_superpatch():
    policy = create_network("cts_policy", num_classes=2).train()
    scores = policy(images(2, 3, 70, 100))
    assert scores.shape == (2, 2, 3, 4)
    scores.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())
    assert sum(parameter.numel() for parameter in policy.parameters()) == 2_959_490


def test_synchronised_batch_norms_leave_the_policy_what_it_is(network):
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    with torch.inference_mode():
        close(synchronised(images(1, 3, 64, 64)), network(images(1, 3, 64, 64)))


@pytest.mark.parametrize(
    ("name", "side", "classes", "setting", "gmacs"),
    [
        ("cts_s", 512, 150, "full", 38.40),
        ("cts_s", 512, 150, "shared_0.3", 24.62),
        ("cts_b", 512, 150, "shared_0.3", 86.2),
        ("cts_s", 768, 19, "full", 115.8),
        ("cts_s", 768, 19, "shared_0.4375", 51.1),
    ],
)
def test_costs_beside_the_policy(name, side, classes, setting, gmacs):
    with torch.device("meta"):
        network = create_network(name, classes, image_size=(side, side))
    cost, of_policy = (
        measure_cost(part, (side, side), chosen, latency=False).macs
        for part, chosen in ((network, setting), (network.policy, None))
    )
    if setting == "full":
        of_policy = 0
    assert (cost - of_policy) / 1e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize("backbone", ["vit_small_patch16_dinov3", "vit_small_patch14_dinov2"])
def test_other_encoders_are_refused(backbone):
    with torch.device("meta"), pytest.raises(UserError, match="16x16 pixels"):
        create_network("cts_s", num_classes=5, backbone=backbone)


def test_backbones_without_a_position_of_the_class_token():
    network = create(backbone="deit3_small_patch16_224")
    with torch.inference_mode():
        assert network(images(1, 3, 64, 100)).shape == (1, 5, 4, 7)
