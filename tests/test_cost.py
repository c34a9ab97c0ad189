"""Counts against the published tables and torch's own counter; what measurements promise."""

import copy
import statistics

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segtrain import UserError, create_network, measure_cost
from segtrain.networks import Network
from tests.stopping import WIDTH, Stopping

ADE20K, CITYSCAPES = ((512, 512), 150), ((1024, 2048), 19)
SETTINGS = {
    "full": "full",
    "decoder": "isr_1111_222",
    "chosen": "isr_2211_222",
    "all": "isr_2222_222",
    # A row of table 4b that is printed as [4, 8, 12]; its number is that of the multiplier 4.
    "decoder x4": {"encoder": [8, 4, 2, 1], "decoder": [4, 8, 16]},
}
# GFLOPs of EDAFormer's tables 1, 3 and 4b, which are multiply-accumulates.
PUBLISHED = [
    ("tiny", ADE20K, "full", 5.6),
    ("tiny", ADE20K, "decoder", 5.3),
    ("tiny", ADE20K, "chosen", 4.7),
    ("tiny", ADE20K, "all", 4.1),
    ("base", ADE20K, "full", 32.0),
    ("base", ADE20K, "decoder", 31.3),
    ("base", ADE20K, "chosen", 29.4),
    ("base", ADE20K, "all", 26.6),
    ("tiny", CITYSCAPES, "full", 151.7),
    ("tiny", CITYSCAPES, "decoder", 133.6),
    ("tiny", CITYSCAPES, "chosen", 94.9),
    ("tiny", CITYSCAPES, "all", 59.1),
    ("tiny", CITYSCAPES, "decoder x4", 129.1),
    ("base", CITYSCAPES, "full", 605.9),
    ("base", CITYSCAPES, "decoder", 569.0),
    ("base", CITYSCAPES, "chosen", 452.9),
    ("base", CITYSCAPES, "all", 298.1),
]
# Half of torch's FlopCounterMode, and fvcore's count, both of the authors' code.
COUNTED = {
    ("macs", "tiny", ADE20K): [5.593, 5.271, 4.665, 4.055],
    ("macs", "base", ADE20K): [31.820, 31.087, 29.263, 26.470],
    ("macs", "tiny", CITYSCAPES): [151.297, 133.221, 94.551, 58.665],
    ("macs", "base", CITYSCAPES): [604.524, 567.656, 451.598, 296.777],
    ("fvcore", "tiny", ADE20K): [5.648, 5.326, 4.720, 4.110],
    ("fvcore", "base", ADE20K): [31.984, 31.249, 29.426, 26.632],
}


@pytest.fixture(scope="module")
def networks():
    return {
        (size, classes): create_network(f"edaformer_{size}", classes)
        for size in ("tiny", "base")
        for classes in (150, 19)
    }


def giga(network, image_size, setting, convention):
    cost = measure_cost(network, image_size, setting, latency=False, convention=convention)
    return cost.macs / 1e9


@pytest.mark.parametrize(("size", "data", "setting", "published"), PUBLISHED)
def test_published_tables_to_the_printed_digit(networks, size, data, setting, published):
    image_size, classes = data
    count = giga(networks[size, classes], image_size, SETTINGS[setting], "mmcv")
    assert round(count, 1) == published


def test_published_row_whose_pools_leave_a_remainder(networks):
    # Printed as [3, 6, 9] in table 4b. The authors price keys as h/r * w/r without rounding, while
    # 32x64, 64x128 and 128x256 tokens under these pools have 10 * 21 keys.
    setting = {"encoder": [8, 4, 2, 1], "decoder": [3, 6, 12]}
    count = giga(networks["tiny", 19], CITYSCAPES[0], setting, "mmcv")
    keys = 32 / 3 * 64 / 3 - 10 * 21
    blocks = 3 * 32 * 64 * 256 + 2 * 64 * 128 * 128 + 128 * 256 * 64
    assert round(count + 2 * keys * blocks / 1e9, 1) == 130.3


@pytest.mark.parametrize(("convention", "size", "data"), COUNTED)
def test_counts_of_the_authors_code(networks, convention, size, data):
    image_size, classes = data
    network = networks[size, classes]
    counts = [giga(network, image_size, name, convention) for name in list(network.settings)[:4]]
    assert counts == pytest.approx(COUNTED[convention, size, data], abs=6e-4)
    assert counts == sorted(counts, reverse=True)


# GFLOPs of SegFormer's table 1, which are multiply-accumulates: at 512x512 (B5: 640x640), and at
# 1024x2048, where the authors counted a head for 150 classes, too.
SEGFORMER = {
    "segformer_b0": (8.4, 125.5),
    "segformer_b1": (15.9, 243.7),
    "segformer_b2": (62.4, 717.1),
    "segformer_b3": (79.0, 962.9),
    "segformer_b4": (95.7, 1240.6),
    "segformer_b5": (183.3, 1460.4),
}


@pytest.mark.parametrize("name", SEGFORMER)
def test_published_table_of_segformer_to_the_printed_digit(name):
    with torch.device("meta"):
        network = create_network(name, 150, head="nvlabs")
    small = 640 if name == "segformer_b5" else 512
    counts = [giga(network, size, "full", "mmcv_1.2") for size in ((small, small), (1024, 2048))]
    assert tuple(round(count, 1) for count in counts) == SEGFORMER[name]


# Half of torch's FlopCounterMode of the official SegFormer++, 19 classes:
# full, bsm_hq, bsm_fast, n2d_2x2, downsample.
SEGFORMERPP = {
    ("segformer_b0", (512, 512)): (7.8, 7.1, 6.8, 6.8, 1.8),
    ("segformer_b0", (1024, 2048)): (121.0, 78.4, 61.2, 69.2, 17.8),
    ("segformer_b2", (640, 640)): (42.7, 34.6, 32.1, 32.5, 8.9),
    ("segformer_b2", (1024, 1024)): (147.2, 102.7, 87.1, 92.7, 25.1),
    ("segformer_b5", (640, 640)): (125.0, 97.7, 92.2, 94.7, 26.6),
    ("segformer_b5", (1024, 1024)): (418.8, 284.1, 253.8, 267.2, 74.3),
    ("segformer_b5", (1024, 2048)): (1161.9, 679.3, 565.5, 615.5, 168.9),
}


@pytest.mark.parametrize(("name", "size"), SEGFORMERPP)
def test_merged_tokens_cost_what_the_official_code_costs(name, size):
    with torch.device("meta"):
        network = create_network(name, 19)
    settings = ("full", "bsm_hq", "bsm_fast", "n2d_2x2", "downsample")
    counts = [giga(network, size, setting, "official") for setting in settings]
    assert tuple(round(count, 1) for count in counts) == SEGFORMERPP[name, size]


@pytest.mark.parametrize("head", ["mmseg", "nvlabs"])
def test_what_fusing_before_the_resize_saves(head):
    with torch.device("meta"):
        network = create_network("segformer_b5", 19, head=head)
    size, pixels, width = (1024, 1024), 256 * 256, network.head_width
    saved = giga(network, size, "full", "official") - giga(network, size, "full", "macs")
    instead = sum(pixels // 4**level for level in range(4)) * width**2  # at their own resolutions
    if head == "nvlabs":  # one matrix for a level's two, which is made for each pass, with its bias
        instead = (sum(network.widths) + 4) * width**2
    assert saved == pytest.approx((4 * pixels * width**2 - instead) / 1e9, rel=1e-6)


class Wrapped(Network):
    data_dependent = False

    """A few layers as a network: whatever is called, of an image (B, 3, H, W)."""

    def __init__(self, layers, call):
        super().__init__(num_classes=1, stride=1)
        self.layers = layers
        self.call = call

    def forward(self, images):
        return self.call(self.layers, images)


def tokens(images):
    """(B, 48, 16)."""
    return images.flatten(1).unflatten(1, (48, -1))


CONV = nn.Conv2d(3, 12, 3, stride=2, padding=1)
WRAPPED = {
    "convolution": (CONV, lambda conv, x: conv(x)),
    "grouped": (nn.Conv2d(3, 6, 5, groups=3, padding="same"), lambda conv, x: conv(x)),
    "transposed": (nn.ConvTranspose2d(3, 7, 4, stride=2), lambda conv, x: conv(x)),
    "linear": (nn.Linear(16, 5, bias=False), lambda linear, x: linear(tokens(x))),
    "attention": (
        nn.MultiheadAttention(16, 4, batch_first=True),
        lambda attention, x: attention(tokens(x), tokens(x)[:, :20], tokens(x)[:, :20])[0],
    ),
    "attention weights": (
        nn.MultiheadAttention(16, 4, batch_first=True),
        lambda attention, x: attention(*[tokens(x)] * 3, need_weights=True)[0],
    ),
    "encoder layer": (
        nn.TransformerEncoderLayer(16, 4, 24, batch_first=True),
        lambda layer, x: layer(tokens(x)),
    ),
    "einsum": (CONV, lambda _, x: torch.einsum("bchw,bdhw->bcd", x, x)),
    "matmul": (CONV, lambda _, x: tokens(x) @ tokens(x)[0].T),
    "baddbmm": (CONV, lambda _, x: torch.baddbmm(x[0], x[0], x[0].mT)),
    "products of different widths": (
        CONV,
        lambda _, x: nn.functional.scaled_dot_product_attention(
            x, x[:, :, :9], torch.cat([x, x], -1)[:, :, :9]
        ),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_macs_are_half_of_torchs_flops_also_inside_composites(name):
    network = Wrapped(*WRAPPED[name])
    with FlopCounterMode(display=False) as counter:
        network(torch.rand(2, 3, 16, 16))
    assert counter.get_total_flops() > 0
    for network.data_dependent in (False, True):  # without data, and with
        cost = measure_cost(network, (16, 16), batch_size=2, latency=False)
        assert 2 * cost.macs == counter.get_total_flops()


def test_attention_over_images_one_after_the_other_counts_each_with_itself():
    from torch.nn.attention import varlen

    @varlen._varlen_attn.register_kernel("cpu")  # torch has one on GPUs alone
    def attend(query, *args):
        return query.clone(), query.new_empty(0), query.new_empty(0)

    def call(_, images):
        tokens = images.new_zeros(20, 4, 8)  # 4 heads
        ends = torch.tensor([0, 3, 20], dtype=torch.int32)
        return torch.ops.torch_attn._varlen_attn(tokens, tokens, tokens, ends, ends, 17, 17)[0]

    network = Wrapped(CONV, call)
    network.data_dependent = True
    cost = measure_cost(network, (16, 16), latency=False)
    assert cost.macs == (3**2 + 17**2) * 4 * (8 + 8)


def test_a_network_whose_cost_depends_on_the_image_runs_on_one():
    class Brightest(Wrapped):
        data_dependent = True

    def call(conv, images):
        return conv(images[:, :, : 8 if images.mean() > 10 else 16])

    cost = measure_cost(Brightest(CONV, call), (16, 16), latency=False)
    assert cost.macs == 8 * 8 * 12 * 3 * 3 * 3
    again = measure_cost(Wrapped(CONV, lambda conv, x: conv(x)), (16, 16), latency=False)
    assert (cost.macs, cost.peak_memory_mib) == (again.macs, pytest.approx(again.peak_memory_mib))


def test_images_are_counted_one_at_a_time_where_the_cost_depends_on_them():
    network = Stopping()
    images = torch.randn(5, 3, 32, 48)
    left = [int((network.certainty(image[None]) <= 0.5).sum()) for image in images]
    patches = 4 * 6
    macs = [patches * WIDTH * (3 * 64 + 4) + tokens * WIDTH**2 for tokens in left]
    assert len(set(macs)) > 1
    cost = measure_cost(network, (8, 8), images=images, batch_size=3)
    assert cost.macs == round(statistics.mean(macs))
    assert cost.macs_std == pytest.approx(statistics.pstdev(macs))
    assert cost.macs_worst == max(macs)
    assert (cost.image_size, cost.batch_size) == ((32, 48), 1)
    low, high = cost.latency_spread_ms
    assert 0 < low <= cost.latency_ms <= high
    alone = [measure_cost(network, images=image[None], latency=False) for image in images]
    assert [each.macs for each in alone] == macs
    peak = max(each.peak_memory_mib for each in alone)
    assert cost.peak_memory_mib == pytest.approx(peak)


def test_images_give_their_size_alone_where_the_cost_does_not_depend_on_them():
    network = Stopping()
    cost = measure_cost(network, setting="full", images=torch.randn(5, 3, 32, 48), latency=False)
    assert cost == measure_cost(network, (32, 48), "full", latency=False)
    assert (cost.macs_std, cost.macs_worst) == (None, None)


def test_peak_memory_is_what_lives_at_once():
    def chain(conv, images):
        for _ in range(5):
            images = conv(images)
        return images

    network = Wrapped(nn.Conv2d(3, 3, 1, bias=False), chain)
    cost = measure_cost(network, (64, 32), latency=False)
    image = 3 * 64 * 32 * 4
    assert cost.peak_memory_mib * 2**20 == 3 * image + 9 * 4  # the image, and one map to the next


def test_latency_and_the_rest_are_there():
    network = create_network("edaformer_nano", 19)
    cost = measure_cost(network, (64, 96), "isr_2211_222")
    low, high = cost.latency_spread_ms
    assert 0 < low <= cost.latency_ms <= high
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    assert cost.peak_memory_mib * 2**20 > 4 * (cost.parameters + 3 * 64 * 96)
    assert (cost.image_size, cost.batch_size) == ((64, 96), 1)
    assert (cost.device, cost.convention) == ("cpu", "macs")


def test_the_network_is_left_as_it_was():
    network = create_network("edaformer_nano", 19).train()
    network.encoder.eval()  # frozen by its user
    modes = [module.training for module in network.modules()]
    state = copy.deepcopy(network.state_dict())
    setting, generator = network.setting, torch.get_rng_state()
    measure_cost(network, (64, 64), "isr_2222_222")
    assert [module.training for module in network.modules()] == modes
    assert network.setting is setting
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_slips():
    network = create_network("edaformer_nano", 19)
    with pytest.raises(UserError, match="'mac': did you mean 'macs'"):
        measure_cost(network, (64, 64), convention="mac")
    with pytest.raises(UserError, match="isr_2211_222"):
        measure_cost(network, (64, 64), "isr_2211_22")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_memory_leaves_out_what_else_lives_there():
    network = create_network("edaformer_nano", 19)
    first = measure_cost(network, (256, 256), device="cuda")
    ballast = torch.zeros(2**26, device="cuda")
    second = measure_cost(network, (256, 256), device="cuda")
    assert ballast.is_cuda
    assert first.device == "cuda"
    assert second.peak_memory_mib == pytest.approx(first.peak_memory_mib, rel=0.05)
