"""DoViT's weights, from files of its authors, OpenMMLab and timm."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segtrain import UserError, create_network, load_weights
from segtrain.networks.dovit import DoViT
from segtrain.weights import loading

REFERENCE = Path("tests/reference/plain_vit")
MICRO = {"embed_dim": 32, "depth": 6, "num_heads": 4, "patch_size": 8}


def micro(decoder="segmenter", classes=7, **arguments):
    values = {"image_size": (64, 64), "decisions": (1, 3), "channels": 24}
    values |= {"backbone": "vit_tiny_patch16_384", "backbone_arguments": MICRO}
    return DoViT(classes, decoder=decoder, **(values | arguments))


@pytest.mark.parametrize("decoder", ["setr", "segmenter"])
def test_the_authors_names(decoder):
    network = micro(decoder)
    report = load_weights(network, REFERENCE / f"dovit_{decoder}_micro.safetensors")
    assert report.origin == "DoViT's authors"
    assert set(report.matched) == set(network.state_dict())
    assert (report.missing, report.unexpected, report.reshaped) == ((), (), ())


# The file's network, the one it is given to, and what is said of the former.
@pytest.mark.parametrize(
    ("theirs", "ours", "call"),
    [
        (("segmenter_s", 7), ("segmenter_s", 19), '"dovit_segmenter_s", num_classes=7)'),
        (
            ("setr_l", 150, {"auxiliary_convolutions": 2}),
            ("setr_l", 150),
            '"dovit_setr_l", num_classes=150, auxiliary_convolutions=2)',
        ),
        (
            ("setr_b", 150, {"final_norm": False}),
            ("segmenter_b", 150),
            '"dovit_setr_b", num_classes=150, final_norm=False)',
        ),
    ],
)
def test_another_network_is_named(monkeypatch, theirs, ours, call):
    def create(size, classes, arguments=None):
        with torch.device("meta"):
            return create_network(f"dovit_{size}", classes, **(arguments or {}))

    # Real sizes, without their gigabytes.
    monkeypatch.setattr(loading, "read_weights", lambda path: create(*theirs).state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(create(*ours), "weights.pth")
    assert f"create the network with create_network({call}" in str(caught.value)


def test_another_dataset_and_size_begin_with_the_encoder():
    network = micro(classes=19, image_size=(128, 128))
    file = REFERENCE / "dovit_segmenter_micro.safetensors"
    with pytest.raises(UserError, match="DoViT"):
        load_weights(network, file)
    load_weights(network, file, backbone_only=True)
    assert network.encoder.vit.pos_embed.shape == (1, 1 + 16 * 16, 32)
    expected = load_file(file)["backbone.layers.3.attn.proj.weight"]
    assert torch.equal(network.encoder.vit.blocks[3].attn.proj.weight, expected)


@pytest.mark.parametrize("final_norm", [True, False])
def test_openmmlab_and_timm_files_fill_the_encoder(tmp_path, final_norm):
    authors = load_file(REFERENCE / "dovit_setr_micro.safetensors")
    trained = micro("setr")
    load_weights(trained, REFERENCE / "dovit_setr_micro.safetensors")
    openmmlab = {
        name.removeprefix("backbone.")
        .replace("attn.qkv.", "attn.attn.in_proj_")
        .replace("attn.proj.", "attn.attn.out_proj."): value
        for name, value in authors.items()
        if name.startswith("backbone.") and "auxiliary_head" not in name
    }
    timm = {**trained.encoder.vit.state_dict(), "head.weight": torch.zeros(10, 32)}
    for origin, weights in (("openmmlab", openmmlab), ("timm", timm)):
        save_file(
            {k: v.contiguous() for k, v in weights.items()}, tmp_path / f"{origin}.safetensors"
        )
        network = micro("setr", final_norm=final_norm)
        load_weights(network, tmp_path / f"{origin}.safetensors", backbone_only=True)
        for name, value in network.encoder.vit.state_dict().items():
            assert torch.equal(value, trained.encoder.vit.state_dict()[name]), (origin, name)
