"""Files that must be read, and files that must not be, none of them running code."""

import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from segtrain import UserError
from segtrain.weights.readers import read_weights

WEIGHTS = {"layer.weight": torch.arange(6.0).view(2, 3)}


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
