"""Files that must be read, and files that must not be, none of them running code."""

import json
import os
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from segtrain import UserError
from segtrain.weights.readers import read_config, read_weights

WEIGHTS = {"layer.weight": torch.arange(6.0).view(2, 3)}


ARRAYS = {
    "stem.conv1.weight": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "stem.conv1.norm.num_batches_tracked": np.array(7),
    "half": np.arange(5, dtype=np.float16),
    "column major": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
}


class Code:
    """Leaves a file behind when it is unpickled the careless way."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def save_torch(content, path):
    torch.save(content, path)


def save_torch_before_1_6(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle_2(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_pickle_5(content, path):
    path.write_bytes(pickle.dumps(content, protocol=5))


@pytest.mark.parametrize("write", [save_torch, save_torch_before_1_6, save_pickle_2, save_pickle_5])
def test_code_is_refused_by_name_and_not_run(tmp_path, write):
    path, marker = tmp_path / "weights.pth", tmp_path / "marker"
    write({"meta": Code(marker), "state_dict": WEIGHTS}, path)
    with pytest.raises(UserError, match=r"holds code \((posix|os|nt)\.system\)") as error:
        read_weights(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Code(marker)))
    assert marker.exists()  # the file would have done it


@pytest.fixture
def history_buffer(monkeypatch):
    """A class as OpenMMLab's files hold it; neither the package nor the class may be touched."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __setstate__(self, state):
            raise AssertionError("a file's object was built")

    HistoryBuffer.__module__ = module.__name__
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return HistoryBuffer


@pytest.mark.parametrize("write", [save_torch, save_torch_before_1_6])
def test_openmmlab_metadata_is_read_as_blanks(tmp_path, history_buffer, write):
    buffer = history_buffer()
    buffer.history = np.arange(3.0)
    path = tmp_path / "weights.pth"
    write(
        {
            "meta": {"mIoU": np.float64(0.4), "palette": np.zeros((2, 3), np.uint8)},
            "message_hub": {"loss": buffer},
            "state_dict": WEIGHTS,
        },
        path,
    )
    read = read_weights(path)
    assert read.keys() == WEIGHTS.keys()
    assert torch.equal(read["layer.weight"], WEIGHTS["layer.weight"])


def test_code_beside_openmmlab_metadata_is_refused(tmp_path, history_buffer):
    buffer = history_buffer()
    buffer.history = Code(tmp_path / "marker")
    torch.save({"message_hub": buffer, "state_dict": WEIGHTS}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"holds code"):
        read_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("write", [save_torch, save_torch_before_1_6, save_file])
def test_truncated_file(tmp_path, write, share):
    whole = tmp_path / "whole"
    write({"layer.weight": torch.rand(100, 100)}, whole)
    content = whole.read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"cut\.pth: cannot be read as a checkpoint") as error:
        read_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(64), b"x"])
def test_another_kind_of_file(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="another kind of file"):
        read_weights(path)


def test_missing_file_folder_and_file_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.pth: not there"):
        read_weights(tmp_path / "nothing.pth")
    with pytest.raises(UserError, match="a folder"):
        read_weights(tmp_path)
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    with pytest.raises(UserError, match="holds no parameters, but: epoch"):
        read_weights(tmp_path / "epoch.pth")


PARTS = {
    "model-1.safetensors": {"a.weight": torch.ones(2)},
    "model-2.safetensors": {"b.weight": torch.zeros(3), "b.bias": torch.ones(1)},
}


def write_index(folder, names=PARTS, index="model.safetensors.index.json"):
    keys = [list(tensors) for tensors in PARTS.values()]
    files = {key: name for name, part in zip(names, keys, strict=True) for key in part}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def one_line(read, path):
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folder_with_one_file_or_several(tmp_path):
    for name, tensors in PARTS.items():
        save_file(tensors, tmp_path / name)
    write_index(tmp_path)
    everything = {key: value for tensors in PARTS.values() for key, value in tensors.items()}
    read = read_weights(tmp_path)
    assert read.keys() == everything.keys()
    assert all(torch.equal(read[key], everything[key]) for key in read)
    # The single file goes first, as in transformers, and safetensors before pickles.
    torch.save(PARTS["model-1.safetensors"], tmp_path / "pytorch_model.bin")
    assert len(read_weights(tmp_path)) == 3
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert read_weights(tmp_path).keys() == WEIGHTS.keys()


def test_folder_with_pickles(tmp_path):
    for number, tensors in enumerate(PARTS.values()):
        torch.save(tensors, tmp_path / f"pytorch_model-{number}.bin")
    names = ["pytorch_model-0.bin", "pytorch_model-1.bin"]
    write_index(tmp_path, names, "pytorch_model.bin.index.json")
    assert len(read_weights(tmp_path)) == 3
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path).keys() == WEIGHTS.keys()


def test_code_in_a_folders_pickle_is_refused(tmp_path):
    marker = tmp_path / "marker"
    torch.save(WEIGHTS | {"other": Code(marker)}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin: holds code" in one_line(read_weights, tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside", "sub/model", "..", "", "a\\b", "a\nb/c"]
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(WEIGHTS, tmp_path / "outside.safetensors")
    save_file(WEIGHTS, folder / "model-1.safetensors")
    write_index(folder, ["model-1.safetensors", name])
    assert "names a file outside its folder" in one_line(read_weights, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "mod', "is not valid JSON: cut short or damaged"),
        ("\udcff", "is not valid JSON"),
        ("[" * 10**5, "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "model-9.safetensors: not there"),
    ],
)
def test_damaged_index(tmp_path, text, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert message in one_line(read_weights, tmp_path)


def test_folder_without_weights(tmp_path):
    assert one_line(read_weights, tmp_path) == (
        f"weights {tmp_path}: a folder without weights, has none of model.safetensors, "
        "model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json"
    )


def test_config_of_a_folder(tmp_path):
    message = one_line(read_config, tmp_path)
    assert "a folder without config.json" in message
    assert "one of model.safetensors, model.safetensors.index.json, pytorch_model.bin" in message
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "segformer", "depths": [2, 2')
    assert f"{path}: is not valid JSON: cut short or damaged" in one_line(read_config, tmp_path)
    path.write_text('["segformer"]')
    assert "holds no JSON object" in one_line(read_config, tmp_path)
    path.write_text('{"depths": [2, 2]}')
    assert "names no model_type" in one_line(read_config, tmp_path)
    path.write_text('{"model_type": "segformer", "depths": [2, 2]}')
    assert read_config(tmp_path) == {"model_type": "segformer", "depths": [2, 2]}


# --------------------------------------------------------------------------- detectron2's pickles


def detectron2_file(path, model=ARRAYS, protocol=2, **others):
    content = {"model": model, "__author__": "third_party", "matching_heuristics": True} | others
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("name", ["R-50.pkl", "model_final.pth"])
def test_detectron2_pickle_is_read_bit_for_bit(tmp_path, protocol, name):
    path = detectron2_file(tmp_path / name, protocol=protocol)
    tensors = {key: torch.from_numpy(value.copy()) for key, value in ARRAYS.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "same")
    read, expected = read_weights(path), read_weights(tmp_path / "same")
    assert read.keys() == expected.keys()
    for key, value in read.items():
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key])
        value.zero_()  # of its own memory


def test_detectron2_pickle_of_a_state_dict(tmp_path):
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert state._metadata  # an attribute, which pickles hold
    for key, value in state.items():
        state[key] = value.numpy()
    read = read_weights(detectron2_file(tmp_path / "R-50.pkl", state))
    assert {key: value.tolist() for key, value in read.items()} == {
        key: value.tolist() for key, value in state.items()
    }


def test_detectron2_training_checkpoint(tmp_path):
    content = {
        "model": WEIGHTS,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]},
        "scheduler": {"base_lrs": [1e-4], "last_epoch": 3, "_step_count": 4},
        "iteration": 3,
    }
    torch.save(content, tmp_path / "model_final.pth")
    read = read_weights(tmp_path / "model_final.pth")
    assert read.keys() == WEIGHTS.keys()
    assert torch.equal(read["layer.weight"], WEIGHTS["layer.weight"])


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_detectron2_pickle_is_refused_and_not_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    code = Code(marker)
    for number, content in enumerate(
        (
            {"model": ARRAYS | {"code": code}},
            {"model": code},
            {"model": ARRAYS, "__author__": code},
            {"model": {"weight": np.array([1, code], dtype=object)}},
        )
    ):
        path = detectron2_file(tmp_path / f"{number}.pkl", protocol=protocol, **content)
        assert "holds code (posix.system), which is refused" in one_line(read_weights, path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the file would have done it


def test_truncated_and_odd_detectron2_pickles(tmp_path):
    path = detectron2_file(tmp_path / "whole.pkl")
    content = path.read_bytes()
    cut = tmp_path / "cut.pkl"
    for length in range(0, len(content), 13):
        cut.write_bytes(content[:length])
        assert "cannot be read as a checkpoint" in one_line(read_weights, cut)
    itself = {}
    itself["model"] = itself
    for model, message in (
        ({}, "holds no parameters"),
        ([1, 2], "holds no parameters, but: model, __author__, matching_heuristics"),
        (itself, "holds no parameters"),
        ({"deep": {"model": ARRAYS}}, "holds no parameters, but: deep"),
        ({"weight": np.array(["a"])}, "cannot be read as a checkpoint"),
        ({"weight": np.zeros(2, dtype=np.complex64)}, "cannot be read as a checkpoint"),
    ):
        assert message in one_line(read_weights, detectron2_file(cut, model))


@pytest.mark.parametrize("key", ["items", "get", "__class__", "__setstate__", "keys"])
def test_attributes_of_a_state_dict_replace_nothing(tmp_path, key):
    state = OrderedDict(ARRAYS)
    state.__dict__[key[::-1]] = "odd"
    path = detectron2_file(tmp_path / "odd.pkl", state)
    path.write_bytes(path.read_bytes().replace(key[::-1].encode(), key.encode()))
    assert read_weights(path).keys() == ARRAYS.keys()
