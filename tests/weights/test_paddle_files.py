"""Paddle's files without Paddle: what they hold, and what runs nothing."""

import contextlib
import json
import pickle
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from segtrain import UserError
from segtrain.weights.readers import read_weights

REFERENCE = Path(__file__).parent.parent / "reference" / "rtformer"
PADDLE_2, PADDLE_3 = (
    REFERENCE / f"rtformer_micro_paddle{version}.pdparams" for version in ("2.6.2", "3.3.1")
)
ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "norm._mean": np.linspace(-1, 1, 7, dtype=np.float32),
}
STRUCTURED = {"StructuredToParameterName@@": {"conv.weight": "conv2d_0.w_0"}}


def same(read, expected):
    return read.keys() == expected.keys() and all(
        value.dtype == expected[key].dtype and torch.equal(value, expected[key])
        for key, value in read.items()
    )


def tensors(arrays):
    return {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}


def refusal(path):
    with pytest.raises(UserError) as error:
        read_weights(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"weights {path}: ")
    return message.removeprefix(f"weights {path}: ")


def write(content, folder, name="model.pdparams"):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("path", [PADDLE_2, PADDLE_3], ids=["numpy 1", "numpy 2"])
@pytest.mark.parametrize("name", ["model.pdparams", "model.pth"])
def test_reference_files(tmp_path, path, name):
    official = load_file(REFERENCE / "rtformer_micro.safetensors")
    read = read_weights(write(path.read_bytes(), tmp_path, name))
    assert same(read, official)
    shapes = json.loads((REFERENCE / "rtformer_micro.json").read_text())["keys"]
    assert {key: list(value.shape) for key, value in read.items()} == shapes


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("package", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_protocols(tmp_path, protocol, package):
    content = pickle.dumps(ARRAYS | STRUCTURED, protocol=protocol)
    if protocol < 4:  # later ones count the letters
        content = re.sub(rb"numpy\._?core\.multiarray", package, content)
        assert package in content
    assert same(read_weights(write(content, tmp_path)), tensors(ARRAYS))


def test_tensors_own_their_memory(tmp_path):
    shared = ARRAYS["norm._mean"]
    path = write(pickle.dumps({"one": shared, "other": shared}, protocol=4), tmp_path)
    read = read_weights(path)
    read["one"].add_(1)
    assert torch.equal(read["one"], torch.from_numpy(shared + 1))
    assert torch.equal(read["other"], torch.from_numpy(shared))


@pytest.mark.parametrize("code", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_number_types_and_byte_orders(tmp_path, code, byte_order):
    values = np.array([[0, 1, 1], [1, 0, 100]]).astype(code)
    stored = values.astype(np.dtype(code).newbyteorder(byte_order))
    path = write(pickle.dumps({"weight": stored}, protocol=4), tmp_path)
    assert same(read_weights(path), tensors({"weight": values}))


def test_column_major_empty_and_scalar_arrays(tmp_path):
    values = ARRAYS["conv.weight"]
    arrays = {
        "column major": np.asfortranarray(values),
        "strided": values[:, ::2],
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(3.5),
    }
    read = read_weights(write(pickle.dumps(arrays, protocol=4), tmp_path))
    assert same(read, tensors(arrays))
    assert all(value.is_contiguous() for value in read.values())


def test_bfloat16_is_what_paddle_writes_as_uint16(tmp_path):
    values = torch.tensor([1.5, -2.0, 3e38, 1e-30], dtype=torch.bfloat16)
    bits = values.view(torch.int16).numpy().view(np.uint16)
    path = write(pickle.dumps({"weight": bits}, protocol=4), tmp_path)
    assert same(read_weights(path), {"weight": values})


def test_pairs_of_a_name_and_an_array(tmp_path):
    pairs = {key: (f"{key}.w_0", value) for key, value in ARRAYS.items()}
    path = write(pickle.dumps(pairs | STRUCTURED, protocol=4), tmp_path)
    assert same(read_weights(path), tensors(ARRAYS))


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("rtformer_slim")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_zip_with_a_folder_with_the_file(tmp_path):
    files = {"rtformer_slim/model.pdparams": PADDLE_2.read_bytes(), "rtformer_slim/README": "x"}
    path = make_zip(tmp_path / "pretrained.zip", files)
    assert same(read_weights(path), load_file(REFERENCE / "rtformer_micro.safetensors"))
    whole = path.read_bytes()
    for share in (0.01, 0.3, 0.9, 0.999):
        message = refusal(write(whole[: int(len(whole) * share)], tmp_path, "cut.zip"))
        assert "cannot be read as a checkpoint" in message
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    assert "cannot be read as a checkpoint" in refusal(write(changed, tmp_path, "changed.zip"))


def test_other_zips(tmp_path):
    content = PADDLE_2.read_bytes()
    several = make_zip(tmp_path / "a.zip", {"s/1.pdparams": content, "s/2.pdparams": content})
    assert refusal(several) == "holds 2 .pdparams files: unpack the one to load"
    none = make_zip(tmp_path / "b.zip", {"model.pdiparams": content})
    assert "cannot be read as a checkpoint" in refusal(none)
    torch.save(tensors(ARRAYS), tmp_path / "model.pdparams")
    assert same(read_weights(tmp_path / "model.pdparams"), tensors(ARRAYS))
    torch.save(tensors(ARRAYS), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "old.pth"), tensors(ARRAYS))


# --------------------------------------------------------------------------- what is refused


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(letters):
    return b"X" + len(letters).to_bytes(4, "little") + letters.encode()


def harmful(case, canary):
    """A pickle that makes a file, and the name by which it does so."""
    touch, path = text(f"touch {canary}"), text(str(canary))
    if case == "GLOBAL":
        return b"\x80\x02cposix\nsystem\n" + touch + b"\x85R.", "posix.system"
    if case == "STACK_GLOBAL":
        names = text("posix") + text("system")
        return b"\x80\x04" + names + b"\x93" + touch + b"\x85R.", "posix.system"
    if case == "names from the memo":
        names = b"}" + text("posix") + b"q\x00" + text("system") + b"q\x01s0h\x00h\x01"
        return b"\x80\x04" + names + b"\x93" + touch + b"\x85R.", "posix.system"
    if case == "an attribute":
        names = text("pathlib") + text("os.mknod")
        return b"\x80\x04" + names + b"\x93" + path + b"\x85R.", "pathlib.os.mknod"
    if case == "INST":
        return b"\x80\x02(" + touch + b"iposix\nsystem\n.", "posix.system"
    if case == "OBJ":
        return b"\x80\x02(cposix\nsystem\n" + touch + b"o.", "posix.system"
    if case == "eval":
        code = text(f"__import__('os').mknod('{canary}')")
        return b"\x80\x02cbuiltins\neval\n" + code + b"\x85R.", "builtins.eval"
    if case == "numpy":
        return b"\x80\x02cnumpy\nsavetxt\n" + path + b"]\x86R.", "numpy.savetxt"
    raise ValueError(case)


@pytest.mark.parametrize(
    "case",
    [
        "GLOBAL",
        "STACK_GLOBAL",
        "names from the memo",
        "an attribute",
        "INST",
        "OBJ",
        "eval",
        "numpy",
    ],
)
def test_code_is_refused_by_name_and_not_run(tmp_path, case):
    canary = tmp_path / "canary"
    content, name = harmful(case, canary)
    for path in (
        write(content, tmp_path, "model.pdparams"),
        write(content, tmp_path, "model.pth"),
        make_zip(tmp_path / "model.zip", {"folder/model.pdparams": content}),
    ):
        assert refusal(path) == (
            f"holds code ({name}), which is refused and was not run; save the bare state dict to "
            "load it"
        )
    assert not canary.exists()
    pickle.loads(content)
    assert canary.exists()  # the file would have done it


def test_code_beside_arrays_and_inside_them(tmp_path):
    canary = tmp_path / "canary"
    code = Call(open, str(canary), "w")
    contents = [
        ARRAYS | {"other": code},
        STRUCTURED | {"other": {"deep": [code]}},
        {"objects": np.array([1, code], dtype=object)},
        {"called": Call(np.ndarray, code)},
    ]
    for content in contents:
        for protocol in (2, 3, 4):
            path = write(pickle.dumps(content, protocol=protocol), tmp_path)
            assert re.search(r"holds code \(_?io\.open\)", refusal(path))
    assert not canary.exists()


def state(*parts):
    """A dict with an array of these parts."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R" + pickle.dumps(parts, protocol=2)[2:-1]
    return b"\x80\x02}" + text("weight") + array + b"bs."


ODD = {
    "an array without content": b"\x80\x02}" + text("w") + b"cnumpy\nndarray\n)Rs.",
    "an array's class as a value": b"\x80\x02}" + text("w") + b"cnumpy\nndarray\nbs.",
    "a state of the class": b"\x80\x02cnumpy\nndarray\n}" + text("a") + text("b") + b"sb.",
    "a state of the encoder": b"\x80\x02c_codecs\nencode\n}" + text("a") + text("b") + b"sb.",
    "attributes of the encoder": (
        b"\x80\x02c_codecs\nencode\nN}" + text("__doc__") + text("b") + b"s\x86b."
    ),
    "attributes of the class": (
        b"\x80\x02cnumpy\nndarray\nN}" + text("__setstate__") + text("b") + b"s\x86b."
    ),
    "a type of a number": b"\x80\x02}" + text("w") + b"cnumpy\ndtype\nK\x07\x85Rs.",
    "an encoding that is none": (
        b"\x80\x02c_codecs\nencode\n" + text("a") + text("nothing") + b"\x86R."
    ),
    "an encoder of a number": b"\x80\x02c_codecs\nencode\nK\x07\x85R.",
    "too few parts": state(1, (2,)),
    "a type that is a text": state(1, (1,), "f4", False, "abcd"),
    "a type of text": state(1, (1,), "S4", False, "abcd"),
    "no state, but a list": state([]),
    "a name for an object": b"\x80\x02Pposix.system\n.",
    "a name on the stack": b"\x80\x02" + text("posix.system") + b"Q.",
    "a registered extension": b"\x80\x02\x82\x01.",
    "an array as a key": b"\x80\x02}]K\x01s.",
    "nothing": b"\x80\x02",
    "an end": b"\x80\x02.",
    "a protocol to come": b"\x80\x63}.",
}


@pytest.mark.parametrize("case", ODD)
def test_what_no_array_is_made_of(tmp_path, case):
    message = refusal(write(ODD[case], tmp_path))
    assert re.search("cannot be read as a checkpoint|holds no parameters", message)
    # And nothing of it stays.
    assert len(read_weights(PADDLE_2)) == 261


@pytest.mark.parametrize(
    "array",
    [
        np.array([1, "a", None], dtype=object),
        np.array(["a", "b"]),
        np.array([b"a"]),
        np.ones(3, dtype=np.complex64),
        np.ones(3, dtype=np.uint32),
        np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]),
        np.array(["2022-10-13"], dtype="datetime64[D]"),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_of_what_no_parameter_is(tmp_path, array):
    path = write(pickle.dumps(ARRAYS | {"other": array}, protocol=4), tmp_path)
    assert "cannot be read as a checkpoint" in refusal(path)


@pytest.mark.parametrize("shape", [(3,), (1,), (-2, -1), (2.0,), (10**12, 10**12), "ab", None])
def test_shapes_that_do_not_fit_the_content(tmp_path, shape):
    content = pickle.dumps({"weight": np.zeros(2, np.float32)}, protocol=2)
    old = b"K\x02\x85"
    assert content.count(old) == 1
    new = pickle.dumps(shape, protocol=2)[2:-1]
    assert "cannot be read" in refusal(write(content.replace(old, new), tmp_path))


def test_cut_files(tmp_path):
    content = PADDLE_3.read_bytes()
    for length in [*range(0, 300, 7), *range(300, len(content), 17_011), len(content) - 1]:
        assert f"({length} bytes): cut short" in refusal(write(content[:length], tmp_path))


def test_changed_bytes_raise_nothing_else(tmp_path):
    content = pickle.dumps(ARRAYS | STRUCTURED, protocol=4)
    draw = random.Random(0)
    for _ in range(300):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path = write(bytes(changed), tmp_path)
        with contextlib.suppress(UserError):  # a changed parameter is read as it is
            read_weights(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "list"),
        (ARRAYS["norm._mean"], "Array"),
        ({}, "nothing"),
        (STRUCTURED, "StructuredToParameterName@@"),
        ({3: ARRAYS["norm._mean"]}, "3"),
    ],
)
def test_pickles_without_parameters(tmp_path, content, found):
    message = refusal(write(pickle.dumps(content, protocol=4), tmp_path))
    assert message.startswith("holds no parameters, but: ")
    assert found in message
