"""A network of a run in one line: from folders, files and W&B, and what cannot be had."""

import functools
import shutil
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segtrain
from segtrain import UserError, from_run
from segtrain.inference import IMAGE_MEAN, IMAGE_STD
from tests.micro_run import CLASSES, write_checkpoint, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def trained(run):
    return from_run(run, device="cpu")


def picture(height=40, width=72, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_what_there_is_of_a_run(trained):
    assert trained.classes.names == tuple(CLASSES["names"])
    assert trained.classes.palette[2] == (255, 0, 0)
    assert trained.classes.ignore_index == 255
    assert trained.step == trained.network.step == 3
    assert not trained.network.training
    assert not any(parameter.requires_grad for parameter in trained.network.parameters())
    assert trained.network.setting.name == "full"
    assert trained.device == torch.device("cpu")


def test_label_maps_are_those_of_the_network(trained):
    image = picture()
    pixels = (torch.tensor(image).float() - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    scores = trained.network(pixels.permute(2, 0, 1)[None])
    scores = torch.nn.functional.interpolate(scores, (40, 72), mode="bilinear")
    classes = trained.predict(image)
    assert classes.shape == (40, 72)
    assert classes.dtype == np.int64
    assert len(np.unique(classes)) > 1
    assert (classes == scores[0].argmax(0).numpy()).mean() > 0.999


def test_several_images_and_all_kinds_of_arrays(trained):
    image = picture()
    classes = trained.predict(image)
    assert (trained.predict(np.stack([image, image])) == classes).all()
    assert (trained.predict(torch.tensor(image)) == classes).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (trained.predict(Image.fromarray(image)) == classes).all()
    mirrored = image[:, ::-1]
    assert (trained.predict(mirrored) == trained.predict(mirrored.copy())).all()


@pytest.mark.parametrize(
    ("image", "part"),
    [
        (np.zeros((8, 8), np.uint8), "(8, 8) of uint8"),
        (np.zeros((8, 8, 4), np.uint8), "(8, 8, 4) of uint8"),
        (np.zeros((8, 8, 3), np.float32), "(8, 8, 3) of float32"),
        (np.zeros((2, 8, 8, 1), np.uint8), "(2, 8, 8, 1) of uint8"),
        (np.zeros((0, 8, 3), np.uint8), "(0, 8, 3) of uint8"),
        (torch.zeros(3, 8, 8), "(3, 8, 8) of float32"),
        ("picture.jpg", "this is str"),
    ],
)
def test_other_arrays_are_refused_in_one_line(trained, image, part):
    with pytest.raises(UserError) as raised:
        trained.predict(image)
    assert "an image is (height, width, 3) of uint8" in str(raised.value)
    assert part in str(raised.value)


def test_colors_are_the_palette_and_black_of_none(trained):
    colored = trained.color(np.array([[0, 2, 255]]))
    assert colored.tolist() == [[[0, 0, 255], [255, 0, 0], [0, 0, 0]]]
    assert colored.dtype == np.uint8


@pytest.mark.parametrize(
    ("shape", "eval_scale", "size_divisor", "resizes"),
    [((50, 70), [96, 48], None, 1), ((50, 70), [96, 48], 32, 2), ((333, 500), None, 64, 1)],
)
def test_images_are_resized_as_the_data_modules_do(
    trained, shape, eval_scale, size_divisor, resizes
):
    from data.transforms import resize_for_evaluation

    image = picture(*shape)
    trained = segtrain.TrainedNetwork(
        trained.network, trained.classes, trained.inference, eval_scale, size_divisor
    )
    ours = trained.preprocess(torch.tensor(image)[None])[0].permute(1, 2, 0)
    ours = ours * torch.tensor(IMAGE_STD) + torch.tensor(IMAGE_MEAN)
    theirs = resize_for_evaluation(image, eval_scale, size_divisor)
    assert ours.shape == theirs.shape
    difference = np.abs(ours.numpy() - theirs)
    assert difference.max() < resizes + 0.01  # grey levels, of noise
    assert trained.predict(image).shape == shape


def test_which_checkpoint_and_setting(run):
    best, last = from_run(run), from_run(run, "last")
    assert first_weight(best) != first_weight(last)
    file = from_run(run / "checkpoints" / "last.ckpt")
    assert first_weight(file) == first_weight(last)
    reduced = from_run(str(run), setting="isr_2211_222")
    assert reduced.network.setting.name == "isr_2211_222"
    assert reduced.network.training_setting.name == "full"
    values = from_run(run, setting=reduced.network.setting.values)
    assert values.network.setting == reduced.network.setting


def first_weight(trained):
    return next(trained.network.parameters()).flatten()[0].item()


def test_without_a_best_it_is_the_last(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/checkpoints/best.ckpt").unlink()
    assert first_weight(from_run(tmp_path / "run")) == first_weight(from_run(run, "last"))


def test_mixed_precision_is_that_of_the_validations(tmp_path):
    config = torch.load(write_checkpoint(tmp_path / "a.ckpt"), weights_only=True)["config"]
    config["trainer"]["precision"] = "bf16-mixed"
    trained = from_run(write_checkpoint(tmp_path / "b.ckpt", config=config), device="cpu")
    seen = []
    hook = lambda module, args, scores: seen.append(scores.dtype)  # noqa: E731
    trained.network.register_forward_hook(hook)
    trained.predict(picture())
    assert seen == [torch.bfloat16]


def test_pretrained_weights_are_not_downloaded(tmp_path, monkeypatch):
    import timm

    def refuse(*arguments, **options):
        raise AssertionError("downloads")

    model = {"name": "setr_naive_s", "backbone": "vit_tiny_patch16_224", "image_size": [64, 64]}
    monkeypatch.setattr(timm.models._builder, "load_pretrained", refuse)
    with pytest.raises(UserError, match="downloads"):
        segtrain.create_network(**model, num_classes=4, pretrained=True)
    path = write_checkpoint(tmp_path / "a.ckpt", model=model)
    content = torch.load(path, weights_only=True)
    content["config"]["model"]["pretrained"] = True
    torch.save(content, path)
    assert from_run(path).predict(picture(64, 64)).shape == (64, 64)


def test_a_network_that_labels_whole_images_says_so(tmp_path):
    model = {"name": "rtformer_slim", "base_channels": 8, "head": "classification"}
    trained = from_run(write_checkpoint(tmp_path / "a.ckpt", model=model), device="cpu")
    assert trained.network(torch.zeros(1, 3, 64, 64)).shape == (1, 19, 1, 1)
    with pytest.raises(UserError, match="one class to a whole image"):
        trained.predict(picture())


class Harmful:
    def __reduce__(self):
        return eval, ("open('harm', 'w')",)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    """Change one byte of a weight."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (cut, "is no whole checkpoint (cut off"),
        (flip, "is no whole checkpoint (wrong checksum of "),
        (lambda path: path.write_bytes(b""), "is no whole checkpoint (empty)"),
        (lambda path: path.write_text("weights"), "is no whole checkpoint"),
        (lambda path: torch.save(Harmful(), path), "could run code: refused"),
        (lambda path: torch.save({"a": torch.zeros(1)}, path), "no configuration; weights of oth"),
        (lambda path: write_checkpoint(path, classes=None), "create_network and load_weights"),
        (lambda path: write_checkpoint(path, classes={"names": ["a"]}), "this version of segtrain"),
        (lambda path: write_checkpoint(path, config={"model": {}}), "no configuration"),
        (lambda path: write_checkpoint(path, state_dict={"a": torch.zeros(1)}), "weights "),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, monkeypatch, spoil, part):
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tmp_path / "a.ckpt")
    spoil(path)
    with pytest.raises(UserError) as raised:
        from_run(path)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nothing"], "nothing: there is no such file or folder"),
        (["."], "is no run's folder"),
        (["run", "step-1"], "has no checkpoint 'step-1', but: best, last"),
        (["run", "best", "isr_2211_22"], "did you mean 'isr_2211_222'"),
        (["run", "best", {"encodr": [1]}], "encodr"),
        (["run", "best", None, "gpu"], "device=gpu: "),
        (["wandb:me/mine"], "wandb:me/mine: write wandb:entity/project/RUN_ID[:alias]"),
        (["wandb:me/mine/abc"], "wandb:me/mine/abc: no account configured"),
    ],
)
def test_slips_are_one_line(run, monkeypatch, tmp_path, arguments, part):
    monkeypatch.chdir(run.parent)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError) as raised:
        from_run(*arguments)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


class Server:
    """Stands for wandb.Api, with one run of two versions; the real one needs an account."""

    versions = {"best": "v0", "latest": "v1", "step-3": "v1"}  # noqa: RUF012

    def __init__(self, folder, downloads, timeout=None):
        self.folder = folder
        self.downloads = downloads

    def artifact_exists(self, name, type):
        name, alias = name.split(":")
        return name == "me/mine/checkpoint-abc" and alias in self.versions

    def artifact_collection_exists(self, name, type):
        return name == "me/mine/checkpoint-abc"

    def artifact(self, name, type):
        version = self.versions[name.partition(":")[2]]
        kept = {"v0": "best", "v1": "last"}[version]

        def download(root, skip_cache):
            self.downloads.append(version)
            shutil.copy(self.folder / f"checkpoints/{kept}.ckpt", f"{root}/checkpoint.ckpt")

        entry = types.SimpleNamespace(download=download)
        return types.SimpleNamespace(
            version=version,
            manifest=types.SimpleNamespace(entries={"checkpoint.ckpt": 1, "curve.jsonl": 1}),
            get_entry=lambda name: entry,
        )


def test_what_wandb_keeps_is_downloaded_once(run, monkeypatch, tmp_path):
    downloads = []
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("wandb.Api", functools.partial(Server, run, downloads))
    best, last = from_run(run), from_run(run, "last")
    for _ in range(2):
        assert first_weight(from_run("wandb:me/mine/abc")) == first_weight(best)
        assert first_weight(from_run("wandb:me/mine/abc:step-3")) == first_weight(last)
        assert first_weight(from_run("wandb:me/mine/abc", "last")) == first_weight(last)
    assert downloads == ["v0", "v1"]
    kept = tmp_path / "hub/segtrain/me/mine/checkpoint-abc"
    assert sorted(path.name for path in kept.iterdir()) == ["v0", "v1"]
    with pytest.raises(UserError, match="me/mine has no checkpoint of a run other"):
        from_run("wandb:me/mine/other")
    with pytest.raises(UserError, match="that run has no checkpoint 'v7'"):
        from_run("wandb:me/mine/abc:v7")
    monkeypatch.setattr(Server, "versions", {"latest": "v1"})
    assert first_weight(from_run("wandb:me/mine/abc")) == first_weight(last)


def test_a_server_that_refuses_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("segtrain.wandb_checkpoints._TIMEOUT", 2)
    with pytest.raises(UserError, match="Weights & Biases says: "):
        from_run("wandb:me/mine/abc")
