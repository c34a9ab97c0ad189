"""Exported networks: each is run and compared, says what it is of, and is refused with a reason."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import export
import segtrain.export
from segtrain import Network, UserError, create_network, list_networks
from segtrain.classes import Classes
from segtrain.export import (
    METADATA,
    OPSET,
    TOLERANCE,
    Deployed,
    adaptive_max_pool,
    export_network,
    stable_sort,
)
from segtrain.inference import IMAGE_MEAN, IMAGE_STD, Inference

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in segtrain.export.ONNX_PACKAGES),
    reason="needs the dependency group export",
)
CLASSES = Classes(
    ("sky", "road", "car", "tree", "wall"),
    ((0, 0, 255), (90, 90, 90), (255, 0, 0), (0, 255, 0), (9, 9, 9)),
)
SIZE = (64, 96)

VIT = {
    "backbone": "vit_tiny_patch16_384",
    "backbone_arguments": {"embed_dim": 32, "depth": 2, "num_heads": 4},
    "image_size": (64, 64),
}
MASKS = {
    "backbone_arguments": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
    "width": 32,
    "num_heads": 4,
    "num_queries": 5,
    "encoder_mlp_width": 32,
    "decoder_mlp_width": 32,
    "decoder_layers": 2,
}
#: Networks of the table in docs/export.md -> what makes them small.
MICRO = {
    "edaformer_tiny": {"widths": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "fuse_width": 24},
    "segformer_b0": {},
    "rtformer_slim": {},
    "setr_naive_s": VIT | {"channels": 24},
    "setr_pup_s": VIT | {"channels": 24},
    "setr_mla_s": VIT | {"channels": 24},
    "segmenter_s": VIT | {"decoder_heads": 4},
    "segvit_b": VIT | {"outputs": (0, 1), "num_heads": 4, "num_layers": 1},
    "segvit_shrunk_l": VIT | {"shrink_at": 1, "num_heads": 4, "num_layers": 1},
    "dtop_b": VIT | {"outputs": (0, 1), "num_heads": 4, "num_layers": 1},
    "dovit_setr_s": VIT | {"decisions": (0,), "channels": 24},
    "dovit_segmenter_s": VIT | {"decisions": (0,)},
    "cts_s": VIT | {"decoder_heads": 4},
    "cts_policy": {},
    "mask2former_swin_t": MASKS | {"encoder_layers": (0, 0, 3)},
    "proscale_swin_t": MASKS | {"encoder_layers": (2, 2, 2)},
}


def rows():
    """Those of the table: network, setting, whether each format has it, why not."""
    section = Path("docs/export.md").read_text("utf-8").partition("## Which networks")[2]
    for line in section.splitlines():
        if line.startswith("| `"):
            network, setting, onnx, torch_export, reason = line.strip("|").split("|")
            answers = {"onnx": onnx.strip(), "torch_export": torch_export.strip()}
            yield network.strip(" `"), setting.strip(" `"), answers, reason.strip()


TABLE = list(rows())


class Patches(Network):
    """Scores of patches of 8x8 pixels: a graph of one operator."""

    def __init__(self):
        super().__init__(len(CLASSES.names), 8)
        self.scores = nn.Conv2d(3, len(CLASSES.names), 8, stride=8)

    def forward(self, images):
        return self.scores(images)


def micro(name="edaformer_tiny", setting=None):
    """A small network that tells images apart."""
    torch.manual_seed(0)
    network = Patches() if name == "patches" else created(name)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    if setting is not None:
        network.setting = network.resolve_setting(setting_of(setting))
    return network


def created(name):
    return create_network(name, len(CLASSES.names), **MICRO[name]).eval()


def setting_of(text):
    """``keep=0.5`` as its values, any other by its name."""
    key, equals, value = text.partition("=")
    return {key: float(value)} if equals else text


def exported(path, name="patches", **arguments):
    return export_network(micro(name), path, SIZE, name=name, classes=CLASSES, **arguments)


def images(number, seed=7):
    return torch.randn(number, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def assert_exported(path, network, report, onnx):
    """A file that gives what the network gives, for images that it was not compared with."""
    assert report.difference <= TOLERANCE
    assert report.files == (path,)
    assert path.is_file()
    assert list(path.parent.iterdir()) == [path]
    batch = images(2)
    if onnx:
        found = session(path).run(None, {"images": batch.numpy()})[0]
    else:
        found = torch.export.load(path).module()(batch).detach().numpy()
    with torch.no_grad():
        expected = network(batch)
    assert found.shape == tuple(expected.shape)
    assert abs(found - expected.numpy()).max() <= TOLERANCE * expected.abs().max()


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_the_table_has_every_family_at_its_training_setting_and_a_reduced_one():
    families = {name.partition("_")[0] for name in list_networks()}
    assert {name.partition("_")[0] for name, *_ in TABLE} == families
    assert MICRO.keys() == {name for name, *_ in TABLE}
    for name in MICRO:
        with torch.device("meta"):
            network = created(name)
        settings = [setting for other, setting, *_ in TABLE if other == name]
        assert network.training_setting.name in settings
        assert len(settings) > 1 or len(network.settings) == 1


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_table(row, format, tmp_path):
    name, setting, answers, reason = row
    network, path = micro(name, setting), tmp_path / "network"
    if answers[format] == "no":
        with pytest.raises(UserError, match=re.escape(reason)):
            export_network(network, path, SIZE, format=format, batch=1)
        return
    if answers[format] != "yes":
        with pytest.raises(UserError, match="only be exported for a fixed number of images"):
            export_network(network, path, SIZE, format=format)
        batch = 2
    else:
        batch = "dynamic"
    report = export_network(network, path, SIZE, format=format, batch=batch)
    assert_exported(path, network, report, format == "onnx")


def test_what_is_exported_gives_the_same(tmp_path):
    network, path = micro("dtop_b"), tmp_path / "network.pt2"
    report = export_network(network, path, SIZE, format="torch_export")
    assert_exported(path, network, report, onnx=False)
    assert (report.setting, report.opset, report.batches) == ("full", None, (1, 3))
    assert report.input_shape == ("batch", 3, *SIZE)


@pytest.mark.parametrize("setting", ["tau_0.96", "algm_0.95", "tau_0.95"])
def test_settings_whose_cost_depends_on_the_image_are_refused(setting, tmp_path):
    name = {"tau_0.96": "dovit_setr_s", "algm_0.95": "segmenter_s", "tau_0.95": "dtop_b"}[setting]
    path = tmp_path / "network.pt2"
    with pytest.raises(UserError, match="depends on what the image shows") as refusal:
        exported(path, name, setting=setting, format="torch_export")
    assert "exported under: full" in str(refusal.value)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_pixels_are_normalised_and_scores_become_classes_as_in_validations():
    network = micro()
    pixels = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    normalised = (pixels - mean) / std
    torch.testing.assert_close(Deployed(network, "uint8", "scores")(pixels), network(normalised))
    classes = Deployed(network, "uint8", "classes")(pixels)
    expected = Inference()(network, normalised, SIZE)
    assert classes.dtype == torch.int64
    assert (classes != expected).float().mean() < 1e-3  # scores that are nearly the same


@needs_onnx
def test_a_file_from_pixels_to_classes_says_what_it_is(tmp_path):
    path, name, setting = tmp_path / "network.onnx", "edaformer_tiny", "isr_2211_222"
    report = exported(path, name, setting=setting, pixels="uint8", result="classes")
    assert report.opset == OPSET
    assert report.difference <= TOLERANCE
    assert report.input_shape == ("batch", 3, *SIZE)
    assert report.output_shape == ("batch", *SIZE)
    assert list(tmp_path.iterdir()) == [path]

    run = session(path)
    (given,), (gives,) = run.get_inputs(), run.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, *SIZE])
    assert (gives.name, gives.type, gives.shape[1:]) == ("classes", "tensor(int64)", [*SIZE])
    pixels = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    network = micro(name)
    with network.using(setting), torch.no_grad():
        expected = Deployed(network, "uint8", "classes")(pixels).numpy()
    assert (run.run(None, {"images": pixels.numpy()})[0] != expected).mean() <= TOLERANCE

    meta = run.get_modelmeta().custom_metadata_map
    assert (meta["network"], meta["setting"]) == (name, setting)
    assert json.loads(meta["setting_values"])["encoder"] == [16, 8, 2, 1]
    assert json.loads(meta["classes"]) == list(CLASSES.names)
    assert json.loads(meta["palette"]) == [list(color) for color in CLASSES.palette]
    assert json.loads(meta["mean"]) == list(IMAGE_MEAN)
    assert "uint8" in meta["input"]


def test_a_file_of_torch_says_the_same(tmp_path):
    path = tmp_path / "network.pt2"
    report = exported(path, format="torch_export", batch=2)
    assert report.input_shape == (2, 3, *SIZE)
    extra = {METADATA: ""}
    torch.export.load(path, extra_files=extra)
    meta = json.loads(extra[METADATA])
    assert (meta["network"], meta["setting"]) == ("patches", "full")
    assert json.loads(meta["image_size"]) == list(SIZE)
    assert "every 8 pixels" in meta["output"]
    assert json.loads(meta["ignore_index"]) == 255


def test_a_file_that_gives_something_else_is_not_left_behind(tmp_path, monkeypatch):
    load = torch.export.load

    class Wrong:
        def __init__(self, path):
            self.program = load(path)

        def module(self):
            return lambda images: self.program.module()(images) * 1.01

    monkeypatch.setattr(torch.export, "load", Wrong)
    with pytest.raises(UserError, match="other results once exported"):
        exported(tmp_path / "network.pt2", format="torch_export", batch=1)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path):
    path = tmp_path / "network.pt2"
    path.write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        exported(path, format="torch_export")
    assert path.read_text() == "precious"


def test_images_that_are_too_small(tmp_path):
    network, path = micro("segformer_b0"), tmp_path / "network.pt2"
    with pytest.raises(UserError, match=r"images of 16x16: SegFormer under 'full' takes .* 29"):
        export_network(network, path, (16, 16), format="torch_export")


@pytest.mark.parametrize("size", [(7, 30), (12, 24), (5, 5)])
def test_adaptive_max_pool(size):
    values = torch.randn(2, 3, *size)
    for cells in ((12, 12), (3, 5), (1, 2)):
        found, _ = adaptive_max_pool(values, cells)
        assert torch.equal(found, nn.functional.adaptive_max_pool2d(values, cells))


@needs_onnx
@pytest.mark.parametrize("descending", [False, True])
def test_a_stable_sort_is_stable_in_onnxruntime(descending, tmp_path):
    class Sorted(nn.Module):
        def forward(self, values):
            return stable_sort(values, dim=1, descending=descending)[1]

    values = torch.randint(0, 3, (4, 200), generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(Sorted().eval(), (values.byte(),), dynamo=True, opset_version=OPSET)
    program.save(tmp_path / "sort.onnx")
    found = session(tmp_path / "sort.onnx").run(None, {"values": values.byte().numpy()})[0]
    expected = values.argsort(dim=1, descending=descending, stable=True)
    assert (found == expected.numpy()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "size=HEIGHTxWIDTH is needed: such as size=512x1024"),
        (["size=512"], "size=HEIGHTxWIDTH is not 512: such as size=512x1024"),
        (["size=64x64", "format=onx"], "'format' cannot be 'onx': did you mean 'onnx'?"),
        (["size=64x64", "fromat=onnx"], "unknown argument 'fromat=onnx': did you mean 'format'?"),
        (["size=64x64", "pixels=uint"], "'pixels' cannot be 'uint': did you mean 'uint8'?"),
        (["size=64x64", "batch=some"], "'batch' is dynamic or a number of images, not 'some'"),
        (["size=64x64", "output=there.pt2", "format=torch_export"], "there.pt2 exists already"),
        (["size=64x64", "format=torch_export"], "give ckpt=runs/NAME"),
    ],
)
def test_slips_are_told_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.pt2").touch()
    assert export.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"segtrain: error: {message}")
    assert error.count("\n") == 1


def test_packages_that_are_missing_are_named(monkeypatch, capsys):
    monkeypatch.setattr(segtrain.export, "ONNX_PACKAGES", ("onnx_of_nobody",))
    assert export.main(["size=64x64", "ckpt=runs/none"]) == 2
    assert (
        "needs onnx_of_nobody, to be installed by: uv sync --group export"
        in capsys.readouterr().err
    )
