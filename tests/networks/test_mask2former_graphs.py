"""Mask2Former and PRO-SCALE compiled, exported, in bfloat16, and on devices not waited for."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from segtrain import UserError, create_network
from segtrain.networks import deformable_attention
from segtrain.training import SetCriterion
from tests.networks.graphs import assert_baked_into_export, assert_one_graph_each

SIZES = {
    "backbone_arguments": {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
    "num_queries": 10,
    "decoder_layers": 4,
    "width": 32,
    "num_heads": 4,
    "encoder_mlp_width": 64,
    "decoder_mlp_width": 64,
}
NAMES = {"mask2former_swin_t": (0, 0, 3), "proscale_swin_t": (1, 1, 2)}


def micro(name, **arguments):
    torch.manual_seed(0)
    return create_network(name, 7, **({"encoder_layers": NAMES[name]} | SIZES | arguments))


@pytest.fixture(params=NAMES)
def network(request):
    return micro(request.param).eval()


def images(*size, batch=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


# Layers of the encoder, and how many run; of two of the decoder one does.
SMALL = [
    ("mask2former_swin_t", (0, 0, 1), {"encoder": [0, 0, 0], "decoder": 1}),
    ("proscale_swin_t", (1, 1, 1), {"encoder": [1, 0, 1], "decoder": 1}),
]


@pytest.mark.parametrize(("name", "layers", "setting"), SMALL)
@torch.no_grad()
def test_one_graph_for_each_setting(name, layers, setting):
    network = micro(name, encoder_layers=layers, decoder_layers=2).eval()
    assert_one_graph_each(network, images(50, 81), ["full", setting])


@pytest.mark.parametrize(("name", "layers", "setting"), SMALL)
def test_export(name, layers, setting):
    network = micro(name, encoder_layers=layers, decoder_layers=2).eval()
    assert_baked_into_export(network, images(50, 81), setting)


@torch.no_grad()
def test_settings_change_no_parameter_and_what_is_not_run(network):
    state = {name: value.clone() for name, value in network.state_dict().items()}
    full = network(images(64, 64))
    run = []
    layers = [*network.decoder.pixels.layers, *network.decoder.queries.layers]
    for layer in layers:
        layer.register_forward_hook(lambda *_: run.append(1))
    for name, setting in network.settings.items():
        run.clear()
        with network.using(name):
            scores = network(images(64, 64))
        assert len(run) == sum(setting.encoder) + setting.decoder, name
        assert torch.equal(scores, full) is (name == "full"), name
    assert torch.equal(network(images(64, 64)), full)
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("layers_11", "layers_111"),
        ({"encoder": [1, 1], "decoder": 2}, r"at most \[1, 1, 2\]"),
        ({"encoder": [1, 2, 2], "decoder": 2}, r"at most \[1, 1, 2\].*not \[1, 2, 2\]"),
        ({"encoder": [1, 1, -1], "decoder": 2}, "counts the layers"),
        ({"encoder": [1, 1, 1], "decoder": 5}, "at most 4"),
        ({"encoder": [1, 1, 1], "decoder": 2, "gate": True}, "needs a gate"),
    ],
)
def test_settings_that_do_not_fit(setting, said):
    network = micro("proscale_swin_t")
    with pytest.raises(UserError, match=said), network.using(setting):
        pass
    assert network.setting.name == "full"


def test_bfloat16_comes_near_float32(network):
    batch = images(64, 96)
    scores = network(batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = network(batch).float()
    assert (rough - scores).abs().max() < 0.05 * scores.abs().max()
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        heads = network(images(64, 96, batch=2)).heads
    assert len(heads) == 5
    sum(part.float().square().mean() for head in heads for part in head).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


class Waits(TorchDispatchMode):
    """Collects the operators for which a GPU is waited for: what leaves it, and what comes to it.

    Attributes:
        found: their names.
    """

    DEPEND_ON_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [one for one in (*args, out) if isinstance(one, torch.Tensor)]
        # A scalar of the host is an argument of the kernel.
        devices = {one.device.type for one in tensors if one.dim() or one is out}
        copies = name in ("copy_", "_to_copy") and len(devices) > 1
        if copies or any(name.startswith(word) for word in self.DEPEND_ON_VALUES):
            self.found.append(name)
        return out


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_pass_waits_for_the_device(name, device, monkeypatch):
    # Tensors that claim to be on a GPU, as there need not be one; the backward pass needs one.
    monkeypatch.setattr(deformable_attention, "attend", deformable_attention.attend_by_sampling)
    network = micro(name).train()
    with FakeTensorMode():
        with torch.device(device):
            network._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            batch = torch.randn(2, 3, 64, 96)
        with Waits() as waits:
            heads = network(batch).heads
            assert heads[0].masks.device.type == device
            if device == "cpu":
                sum(part.square().mean() for head in heads for part in head).backward()
            assert waits.found == []
            batch.new_tensor([0.1, 0.2, 0.3])
        assert waits.found == (["_to_copy"] if device == "cuda" else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_a_gpu_waits_for_the_matching_alone(name):
    network = micro(name).cuda().train()
    criterion = SetCriterion(num_points=64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    batch = images(64, 96, batch=2).cuda()
    labels = torch.randint(7, (2, 64, 96), device="cuda")

    def step(mode):
        """One optimiser step, of which only the loss may wait; how often it did."""
        optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode(mode)
        predictions = network(batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            loss = criterion(predictions, labels)
        torch.cuda.set_sync_debug_mode(mode)
        loss.backward()
        optimizer.step()
        return sum("synchroniz" in str(warning.message) for warning in caught)

    try:
        step("default")  # libraries are loaded and kernels chosen
        assert step("error") == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
