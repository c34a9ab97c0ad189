"""The reductions of plain vision transformers, against their rules written out in loops."""

import math

import pytest
import torch
from torch import nn

from segtrain import UserError, create_network, measure_cost
from segtrain.networks.plain_vit import PlainNetwork, PlainViT
from segtrain.reduction.plain import ALGM, Expedit, PlainReduction, published_settings
from segtrain.reduction.plain.algm import match_above_mean, match_windows_above
from segtrain.reduction.plain.alternate import Alternation
from segtrain.reduction.plain.expedit import cluster
from segtrain.reduction.plain.merged import MergedTokens
from segtrain.training.recomputation import recompute_blocks

DEPTH = 6
SETTINGS = [
    {"algm": 0.7},
    {"algm": {"tau": 0.9, "proportional": False, "global_block": 3}},
    {"tome": 0.1},
    {"tome": {"removed": [3, 0, 7, 1, 0, 90], "proportional": False}},
    {"expedit": 0.5},
    {"expedit": {"grid": 0.7, "cluster_after": 1, "reconstruct_after": 4, "nearest": 3}},
]


class Micro(PlainNetwork):
    """Tokens after two blocks, side by side, each brought back to the patches."""

    def __init__(self, **arguments):
        sizes = {"embed_dim": 32, "depth": DEPTH, "num_heads": 4, "patch_size": 8}
        encoder = PlainViT("vit_tiny_patch16_384", (64, 64), backbone_arguments=sizes, **arguments)
        super().__init__(5, 8, published_settings(encoder))
        self.encoder = encoder

    def score(self, images):
        levels, _ = self.levels(images, [3, DEPTH - 1])
        return torch.cat([level.restore(level.tokens) for level in levels], dim=2)


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def network():
    network = Micro().eval()
    for parameter in network.parameters():  # so that tokens differ, and attention has a say
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    return network


def smooth_images(number, height=48, width=72):
    """Images with even areas, so that some tokens resemble each other."""
    coarse = torch.randn(number, 3, 3, 4, generator=torch.Generator().manual_seed(1))
    images = nn.functional.interpolate(coarse, (height, width), mode="nearest")
    return images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))


def cosine(first, second):
    return torch.dot(first, second).item() / (first.norm() * second.norm()).item()


def windows_in_loops(tokens, grid, tau):
    """Groups of token numbers, the merged windows first (ALGM, local)."""
    height, width = grid
    windows = []
    for y in range(0, height - 1, 2):
        for x in range(0, width - 1, 2):
            window = [y * width + x, y * width + x + 1, (y + 1) * width + x]
            window.append((y + 1) * width + x + 1)
            pairs = [cosine(tokens[i], tokens[j]) for i in window for j in window if i < j]
            if sum(pairs) / 6 >= tau:
                windows.append(window)
    merged = {i for window in windows for i in window}
    return windows + [[i] for i in range(len(tokens)) if i not in merged]


def bipartite_in_loops(metric, num_prefix, choose):
    """Groups of token numbers: the sources that stay, then destinations with what they take in."""
    sources = [i for i in range(len(metric)) if (i + num_prefix) % 2 == 0]
    destinations = [i for i in range(len(metric)) if (i + num_prefix) % 2 == 1]
    if not sources or not destinations:
        return [[i] for i in range(len(metric))]
    best = {}
    for i in sources:
        best[i] = max((cosine(metric[i], metric[j]), j) for j in destinations)
    removed = choose([best[i][0] for i in sources])
    merging = sorted(sources, key=lambda i: -best[i][0])[:removed]
    groups = [[i] for i in sources if i not in merging]
    return groups + [[j, *(i for i in merging if best[i][1] == j)] for j in destinations]


def groups_of(slots, length):
    return [sorted((slots == slot).nonzero()[:, 0].tolist()) for slot in range(length)]


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (2, 2), (3, 2)])
@pytest.mark.parametrize("tau", [0.2, 0.5])
def test_local_merging_by_its_rule(grid, tau):
    torch.manual_seed(sum(grid))
    tokens = torch.randn(grid[0] * grid[1], 6) + 0.9
    expected = windows_in_loops(tokens, grid, tau)
    match = match_windows_above(tokens[None], grid, tau)
    if match is None:
        assert all(len(group) == 1 for group in expected)
    else:
        assert groups_of(match[0][0], match[1]) == [sorted(group) for group in expected]


@pytest.mark.parametrize("num_prefix", [0, 1, 4, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 24, 25])
def test_bipartite_merging_by_its_rule(num_prefix, length):
    torch.manual_seed(length)
    tokens = torch.randn(length, 6)
    for removed in (1, 5, 12, 100):
        expected = bipartite_in_loops(tokens, num_prefix, lambda best, n=removed: n)
        match = Alternation(tokens[None], num_prefix).merge(removed)
        found = [[i] for i in range(length)] if match is None else groups_of(match[0][0], match[1])
        assert sorted(found) == sorted(sorted(group) for group in expected)
        if match is not None:
            assert found == [sorted(group) for group in expected]

    def above_mean(best):
        spread = torch.tensor(best).std().item() if len(best) > 1 else 0
        return sum(b >= sum(best) / len(best) + spread / 5 for b in best)

    expected = bipartite_in_loops(tokens, num_prefix, above_mean)
    match = match_above_mean(tokens[None], num_prefix, 5)
    if length > 3:  # the only source, or equal ones, are at their mean by rounding alone
        assert groups_of(match[0][0], match[1]) == [sorted(group) for group in expected]


class Loops:
    """An encoder's pass over one image under a merging, with every patch in a list."""

    def __init__(self, encoder, images):
        self.encoder = encoder
        tokens, self.grid, _ = encoder.embed(images)
        self.prefix, self.tokens = tokens[0].tensor_split([encoder.num_prefix])
        self.groups = [[i] for i in range(len(self.tokens))]

    def attend(self, block, proportional):
        module = self.encoder.vit.blocks[block]
        tokens = torch.cat([self.prefix, self.tokens])
        heads = module.attn.num_heads
        query, key, value = (
            part.unflatten(1, (heads, -1)).transpose(0, 1)
            for part in module.attn.qkv(module.norm1(tokens)).chunk(3, dim=1)
        )
        logits = query @ key.mT / math.sqrt(query.shape[2])
        if proportional:
            sizes = [1] * len(self.prefix) + [len(group) for group in self.groups]
            logits = logits + torch.tensor(sizes).log()
        attended = (logits.softmax(2) @ value).transpose(0, 1).flatten(1)
        self._split(tokens + module.attn.proj(attended))
        return key.mean(0)[len(self.prefix) :]

    def merge(self, groups):
        """``groups`` of the present tokens become one each."""
        means, merged = [], []
        for group in groups:
            weights = [len(self.groups[i]) for i in group]
            total = sum(w * self.tokens[i] for w, i in zip(weights, group, strict=True))
            means.append(total / sum(weights))
            merged.append([patch for i in group for patch in self.groups[i]])
        self.tokens, self.groups = torch.stack(means), merged

    def mix(self, block):
        module = self.encoder.vit.blocks[block]
        tokens = torch.cat([self.prefix, self.tokens])
        self._split(tokens + module.mlp(module.norm2(tokens)))

    def level(self, norm):
        tokens = norm(self.tokens)
        restored = torch.empty(sum(map(len, self.groups)), tokens.shape[1])
        for token, group in zip(tokens, self.groups, strict=True):
            restored[group] = token
        return restored

    def _split(self, tokens):
        self.prefix, self.tokens = tokens.tensor_split([len(self.prefix)])


@pytest.mark.parametrize(
    "values", [values for values in SETTINGS if "expedit" not in values], ids=str
)
@torch.inference_mode()
def test_a_pass_with_merging_is_the_one_in_loops(network, values):
    images = smooth_images(1)
    setting = network.resolve_setting(values)
    loops, norm = Loops(network.encoder, images), network.encoder.vit.norm
    levels, lengths = [], []
    for block in range(DEPTH):
        keys = loops.attend(block, setting.kind.proportional)
        if setting.tome is not None:
            removed = values["tome"]
            if isinstance(removed, dict):
                removed = removed["removed"][block]
            else:
                removed = int(removed * len(keys))
            if removed:  # otherwise the order stays, too
                loops.merge(bipartite_in_loops(keys, 1, lambda best, n=removed: n))
        elif block == 0:
            loops.merge(windows_in_loops(loops.tokens, loops.grid, setting.algm.tau))
        elif block + 1 == (setting.algm.global_block or 5):

            def above_mean(best, number=block + 1):
                scores = torch.tensor(best)
                return int((scores >= scores.mean() + scores.std() / number).sum())

            loops.merge(bipartite_in_loops(loops.tokens, 1, above_mean))
        loops.mix(block)
        lengths.append(len(loops.tokens))
        if block in (3, DEPTH - 1):
            levels.append(loops.level(norm if block == DEPTH - 1 else nn.Identity()))
    assert lengths[-1] < lengths[0] or lengths[0] < 54  # something merges at all
    with network.using(setting):
        found = network(images)[0]
        tokens, _ = network.levels(images, [3, DEPTH - 1])
    assert [level.tokens.shape[1] for level in tokens] == [lengths[3], lengths[-1]]
    torch.testing.assert_close(found, torch.cat(levels, dim=1), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_clustering_by_its_rule():
    patches = torch.randn(48, 6)
    expedit = Expedit(0.5, nearest=4, temperature=0.3, iterations=3)
    found = cluster(patches[None], (6, 8), expedit)
    height, width = 3, 4
    cells = nn.functional.adaptive_avg_pool2d(patches.T.reshape(1, 6, 6, 8), (3, 4))
    means = cells.flatten(2)[0].T.clone()
    for _ in range(3):
        weights = torch.zeros(48, height * width)
        for y in range(6):
            for x in range(8):
                reach = {
                    row * width + column: -0.3
                    * (patches[y * 8 + x] - means[row * width + column]).square().sum()
                    for row in range(height)
                    for column in range(width)
                    if abs(row - y // 2) <= 2 and abs(column - x // 2) <= 2  # 5x5
                }
                total = sum(logit.exp() for logit in reach.values())
                for centre, logit in reach.items():
                    weights[y * 8 + x, centre] = logit.exp() / total
        means = weights.T @ patches / weights.sum(0)[:, None]
    torch.testing.assert_close(found.centres[0], means, rtol=0, atol=1e-5)

    values = torch.randn(1, height * width, 2)
    for patch, restored in zip(patches, found.restore(values)[0], strict=True):
        distances = (patch - means).square().sum(1)
        nearest = distances.argsort()[:4]
        weights = (-0.3 * distances[nearest]).exp()
        expected = (weights[:, None] * values[0, nearest]).sum(0) / weights.sum()
        torch.testing.assert_close(restored, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_expedit_runs_its_middle_blocks_on_centres(network):
    images = smooth_images(1)
    encoder = network.encoder
    tokens, grid, _ = encoder.embed(images)
    before = encoder.run([0], tokens)
    with network.using({"expedit": SETTINGS[-1]["expedit"]}) as setting:
        found = network(images)
    clusters = cluster(before[:, 1:], grid, setting.expedit)
    assert clusters.centres.shape[1] == round(0.7 * 6) * round(0.7 * 9)
    middle = encoder.run([1, 2, 3], torch.cat([before[:, :1], clusters.centres], dim=1))
    whole = torch.cat([middle[:, :1], clusters.restore(middle[:, 1:])], dim=1)
    last = encoder.vit.norm(encoder.run([4, 5], whole))
    expected = torch.cat([whole, last], dim=2)[:, 1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_merged_tokens_stand_for_every_patch_once():
    patches = torch.randn(2, 20, 3)
    merged = MergedTokens(torch.cat([torch.randn(2, 1, 3), patches], dim=1), 1)
    for removed in (4, 6, 3):
        merged = merged.merge(*Alternation(merged.patches, 1).merge(removed))
    assert merged.patches.shape[1] == 7
    torch.testing.assert_close(merged.sizes.sum(1), torch.full((2,), 20.0))
    restored = merged.level(merged.tokens).restore(merged.patches)
    for image in range(2):
        for slot in range(7):
            inside = merged.slots[image] == slot
            assert inside.sum() == merged.sizes[image, slot]
            mean = patches[image, inside].mean(0)
            torch.testing.assert_close(merged.patches[image, slot], mean, rtol=0, atol=1e-5)
            assert (restored[image, inside] == merged.patches[image, slot]).all()


@torch.inference_mode()
def test_full_is_the_plain_run(network):
    images = torch.randn(2, 3, 48, 72)
    tokens, _, _ = network.encoder.embed(images)
    early = network.encoder.run(range(4), tokens)
    last = network.encoder.vit.norm(network.encoder.run(range(4, DEPTH), early))
    assert torch.equal(network(images), torch.cat([early, last], dim=2)[:, 1:])
    for values in (
        {"algm": {"tau": 1.1, "global_block": 0}},
        {"algm": {"tau": 0, "local_block": 0, "global_block": 0}},
        {"tome": 0},
        {"tome": {"removed": 0}},
    ):
        with network.using(values):
            assert torch.equal(network(images), torch.cat([early, last], dim=2)[:, 1:]), values


@pytest.mark.parametrize("values", SETTINGS, ids=str)
@torch.inference_mode()
def test_eight_images_give_what_each_gives_alone(network, values):
    images = smooth_images(8)
    with network.using(values):
        alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(network(images), alone, rtol=0, atol=1e-5)
        numbers = {network.levels(i[None], [DEPTH - 1])[0][0].tokens.shape[1] for i in images}
    assert (len(numbers) > 1) == network.resolve_setting(values).data_dependent


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("segmenter_ti", {"decoder_heads": 4}),
        ("segmenter_ti", {"decoder": "linear"}),
        ("setr_naive_s", {}),
        ("segvit_b", {"outputs": (1, 3, 5), "num_heads": 4}),
    ],
    ids=str,
)
@torch.inference_mode()
def test_networks_under_every_published_setting(name, arguments):
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": DEPTH, "num_heads": 4, "patch_size": 8}
    network = create_network(
        name, 7, image_size=(64, 64), backbone_arguments=sizes, **arguments
    ).eval()
    images = smooth_images(8, 50, 66)
    full = network(images)
    for setting in network.settings:
        with network.using(setting):
            scores = network(images)
            alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
        assert scores.shape == full.shape
        assert torch.equal(scores, full) == (setting == "full")


def test_images_of_a_training_batch_lose_what_the_most_varied_can_spare(network):
    images = smooth_images(3)
    images[1] = torch.randn(3, 48, 72)
    values = {"algm": {"tau": 0.7, "global_block": 0}}
    with network.using(values), torch.inference_mode():
        lengths = [network.levels(i[None], [0])[0][0].tokens.shape[1] for i in images]
        together, _ = network.levels(images, [0])
    assert min(lengths) < max(lengths) == together[0].tokens.shape[1]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_gradients_reach_every_parameter(values):
    torch.manual_seed(0)
    network = Micro(drop_path=0.1).train()
    with network.using(values):
        for images in (smooth_images(2), torch.ones(2, 3, 48, 72)):
            network.zero_grad()
            network(images).sin().square().mean().backward()
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_recomputed_blocks_merge_as_they_did(values):
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = Micro().train()
        if recomputed:
            recompute_blocks(network)
        with network.using(values):
            network(smooth_images(2)).sin().square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("prefix", [True, False])
@torch.inference_mode()
def test_extremes(prefix):
    network = Micro(prefix=prefix).eval()
    one_colour = torch.full((1, 3, 64, 64), 0.7)
    for values in (*SETTINGS, {"algm": -1.1}, {"tome": 0.5}, {"expedit": 0.01}):
        with network.using(values):
            for height, width in ((64, 64), (8, 8), (8, 40), (40, 8), (9, 17), (16, 16)):
                images = one_colour[..., :height, :width]
                scores = network(images)
                patches = -(-height // 8) * -(-width // 8)
                assert scores.shape == (1, patches, 64)
                assert scores.isfinite().all()
    with network.using({"algm": -1.1}):
        level = network.levels(torch.randn(1, 3, 64, 72), [0])[0][0]
        assert level.tokens.shape[1] == 8 * 9 - 3 * 4 * 4  # a last column is in no window
    with network.using({"tome": 0.5}):
        level = network.levels(torch.randn(1, 3, 32, 16), [DEPTH - 1])[0][0]
        assert level.tokens.shape[1] == 1
    with network.using({"expedit": 0.01}):
        assert network(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("values", [{"tome": 0.1}, {"algm": 0.8}, {"expedit": 0.5}], ids=str)
@torch.inference_mode()
def test_autocast_changes_values_by_rounding_alone(network, values):
    images = smooth_images(2)
    with network.using(values):
        exact = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(images)
    assert rounded.isfinite().all()
    cosines = torch.cosine_similarity(exact, rounded.float(), dim=2)
    assert cosines.mean() > 0.95  # a few choices between near equals go the other way


@pytest.mark.parametrize("prefix", ["vit_tiny_patch16_384", "vit_small_patch14_reg4_dinov2"])
def test_what_stands_before_the_patches_merges_with_nothing(prefix):
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 4, "patch_size": 8}
    encoder = PlainViT(prefix, (64, 64), backbone_arguments=sizes)
    tokens, _, _ = encoder.embed(torch.randn(1, 3, 64, 64))
    merged = MergedTokens(tokens, encoder.num_prefix)
    merged = merged.merge(*Alternation(merged.patches, encoder.num_prefix).merge(30))
    assert torch.equal(merged.tokens[:, : encoder.num_prefix], tokens[:, : encoder.num_prefix])
    assert merged.patches.shape[1] == 34


def gmacs_of_segmenter_s(tokens):
    """Closed formula at 512x512 with 150 classes; tokens of each block's attention and MLP."""
    patches, width, classes = 1024, 384, 150
    macs = 3 * 16 * 16 * patches * width
    for in_attention, in_mlp in tokens:
        n, m = in_attention + 1, in_mlp + 1
        macs += 4 * n * width**2 + 2 * n**2 * width + 8 * m * width**2
    n = tokens[-1][1]
    t = n + classes
    macs += 2 * n * width**2 + 2 * (12 * t * width**2 + 2 * t**2 * width) + classes * width**2
    return (macs + n * classes * width) / 1e9


@pytest.mark.parametrize(
    ("first", "fifth", "gmacs"), [(0, 0, 38.40), (0.3, 0.2, 21.5), (0, 0.3, 29.2), (0.2, 0.1, 27.2)]
)
def test_macs_of_segmenter_with_merged_tokens(first, fifth, gmacs):
    ratios = [first, 0, 0, 0, fifth, *[0] * 7]
    early = 1024 - int(first * 1024)
    late = early - int(fifth * early)
    tokens = [(1024, early), *[(early, early)] * 3, (early, late), *[(late, late)] * 7]
    network = create_network("segmenter_s", 150)
    values = {"tome": {"ratio": ratios, "proportional": False}}
    found = measure_cost(network, (512, 512), values, latency=False).macs / 1e9
    compared = [number // 2 * (number - number // 2) for number in (1024, early)]
    matching = 64e-9 * sum(compared[i] for i, ratio in enumerate((first, fifth)) if ratio)
    assert found == pytest.approx(gmacs_of_segmenter_s(tokens) + matching, rel=1e-9)
    assert found - matching == pytest.approx(gmacs, rel=3e-3)


@pytest.mark.parametrize(("grid", "gmacs"), [(0.75, 30.6), (0.625, 26.1), (0.5, 22.8)])
def test_macs_of_segmenter_with_clustered_tokens(grid, gmacs):
    """The derived costs hold 13 products of patches and centres, of which 11 are ours."""
    number = round(32 * grid) ** 2
    product = 1024 * number * 384 / 1e9
    network = create_network("segmenter_s", 150)
    found = measure_cost(network, (512, 512), {"expedit": grid}, latency=False).macs / 1e9
    fewer = (1024 - number) * 12 * 384**2 + 2 * (1025**2 - (number + 1) ** 2) * 384
    expected = gmacs_of_segmenter_s([(1024, 1024)] * 12) - 8 * fewer / 1e9 + 11 * product
    assert found == pytest.approx(expected, rel=1e-9)
    assert found + 2 * product == pytest.approx(gmacs, abs=0.051)


def test_log_sizes_cost_eight_channels_of_each_head():
    network = create_network("segmenter_s", 150)
    values = {"ratio": [0.25, *[0] * 11]}
    costs = [
        measure_cost(network, (512, 512), {"tome": values | chosen}, latency=False).macs
        for chosen in ({}, {"proportional": False})
    ]
    assert costs[0] - costs[1] == 11 * 2 * (768 + 1) ** 2 * 6 * 8


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "full"),
        ({"algm": 0.88}, "algm_0.88"),
        ({"algm": {"tau": 0.9, "proportional": False}}, "algm_0.9_proportional_False"),
        ({"tome": 0.1}, "tome_0.1"),
        ({"tome": {"removed": 13}}, "tome_13_tokens"),
        (
            {"tome": {"removed": [1, 2], "proportional": False}},
            "tome_1_2_tokens_proportional_False",
        ),
        ({"expedit": 0.5}, "expedit_0.5"),
        ({"expedit": {"grid": 0.5, "nearest": 4}}, "expedit_0.5_nearest_4"),
        ({"name": "mine", "expedit": 0.5}, "mine"),
        ({"algm": None, "tome": 0.1}, "tome_0.1"),
    ],
)
def test_settings_by_plain_values(values, name):
    setting = PlainReduction.from_values(values)
    assert setting.name == name
    assert PlainReduction.from_values(setting.values).values == setting.values
    assert setting.data_dependent == ("algm" in setting.values)


def test_published_settings(network):
    assert next(iter(network.settings)) == "full"
    assert all(setting.name == name for name, setting in network.settings.items())
    assert network.resolve_setting({"algm": 0.88}) is network.settings["algm_0.88"]
    assert network.settings["algm_0.88"].threshold_range == (-1, 1)
    assert network.settings["algm_0.88"].with_threshold(0.5).name == "algm_0.5"
    assert network.settings["tome_0.1"].threshold_range is None
    for depth, blocks in ((4, {0, 3}), (12, {0, 4}), (24, {0, 6})):
        assert ALGM(0.9).blocks(depth) == blocks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algn": 0.9}, "a setting has no field 'algn': did you mean 'algm'?"),
        ({"algm": {"tua": 0.9}}, "'algm' of a setting has no 'tua': did you mean 'tau'?"),
        ({"algm": {}}, "'algm' of a setting needs 'tau'"),
        ({"algm": "0.9"}, "'tau' of 'algm' is a number, not '0.9'"),
        ({"algm": float("nan")}, "'tau' of 'algm' is a number, not nan"),
        ({"algm": True}, "'tau' of 'algm' is a number, not True"),
        ({"algm": {"tau": 0.9, "global_block": 1}}, "comes behind 'local_block', 1; not 1"),
        ({"algm": {"tau": 0.9, "global_block": 7}}, "merges in block 7, the encoder has 6"),
        ({"algm": {"tau": 0.9, "local_block": -1}}, "'local_block' of 'algm' is a whole number"),
        ({"algm": {"tau": 0.9, "proportional": 1}}, "'proportional' of 'algm' is true or false"),
        ({"algm": 0.9, "tome": 0.1}, "a setting has one of algm, tome, expedit, not 2"),
        ({"tome": {}}, "'tome' of a setting has either 'ratio' or 'removed'"),
        ({"tome": {"ratio": 0.1, "removed": 3}}, "has either 'ratio' or 'removed'"),
        ({"tome": 0.6}, "'ratio' of 'tome' is a number from 0 to 0.5"),
        ({"tome": {"removed": 1.5}}, "'removed' of 'tome' is a whole number from 0"),
        ({"tome": {"ratio": [0.1, 0.1]}}, "'ratio' of 'tome' lists 2 blocks, the encoder has 6"),
        ({"tome": {"ratio": 0.1, "proportional": None}}, "'proportional' of 'tome' is true or"),
        ({"expedit": 0}, "'grid' of 'expedit' is above 0 and at most 1, not 0"),
        ({"expedit": [16, 16]}, "'grid' of 'expedit' is above 0 and at most 1"),
        ({"expedit": {"grid": 0.5, "nearest": 0}}, "'nearest' of 'expedit' is a whole number"),
        ({"expedit": {"grid": 0.5, "temperature": 0}}, "'temperature' of 'expedit' is a number"),
        (
            {"expedit": {"grid": 0.5, "cluster_after": 4, "reconstruct_after": 4}},
            "clusters after block 4 and reconstructs after block 4",
        ),
        ({"expedit": {"grid": 0.5, "reconstruct_after": 7}}, "reconstructs after block 7"),
    ],
    ids=str,
)
def test_a_setting_that_does_not_fit_is_refused(network, values, message):
    with pytest.raises(UserError) as caught, network.using(values):
        pass
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_rotations_are_refused(values):
    sizes = {"embed_dim": 32, "depth": DEPTH, "num_heads": 4}
    encoder = PlainViT("vit_small_patch16_dinov3", (64, 64), backbone_arguments=sizes)
    assert [setting.name for setting in published_settings(encoder)] == ["full"]
    with pytest.raises(UserError, match="does not fit this backbone, whose positions are rot"):
        PlainReduction.from_values(values).check(encoder)


@pytest.mark.slow
@torch.inference_mode()
def test_static_settings_compile_to_one_graph_each(network):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    images = smooth_images(2)
    for values in ({}, {"tome": {"ratio": [0.2, 0, 0, 0.1, 0, 0]}}, {"expedit": 0.5}) * 2:
        with network.using(values):
            torch.testing.assert_close(compiled(images), network(images))
    assert len(graphs) == 3
