"""Parameters from pickles of numpy's arrays, which run nothing but what makes arrays.

Paddle's ``.pdparams`` files are such pickles, and detectron2's ``.pkl`` files.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Beside u2, the number types that torch has, as numpy's pickles name them.
_NUMBERS = re.compile("f[248]|i[1248]|u1|b1")


class _Array:
    """Stands for an array: keeps what the file says of it, so that no method of numpy's runs."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.type, self.column_major, self.content = state

    def tensor(self) -> Tensor:
        """The array in memory of its own, in this machine's byte order, row-major."""
        # Paddle writes bfloat16, which numpy lacks, as the uint16 of the same bits.
        bfloat16 = self.type.code == "u2"
        if not (bfloat16 or _NUMBERS.fullmatch(self.type.code)):
            raise pickle.UnpicklingError("an array of what no parameter is")
        own = np.dtype(self.type.code)
        if len(self.content) != math.prod(self.shape) * own.itemsize:
            raise pickle.UnpicklingError("an array that is not as large as its shape")
        order: Any = "F" if self.column_major else "C"
        stored = own.newbyteorder(self.type.byte_order)
        array = np.ndarray(self.shape, stored, self.content, order=order)
        tensor = torch.from_numpy(array.astype(own, order="C"))
        return tensor.view(torch.bfloat16) if bfloat16 else tensor


class _Type:
    """Stands for an array's number type, in the same way."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = state[1]


class _OrderedDict(dict[Any, Any]):
    """Stands for a state dict, without the attributes that torch gives it."""

    def __setstate__(self, state: object) -> None:
        pass


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): str.encode,  # bytes, as pickles before protocol 3 have them
    ("collections", "OrderedDict"): _OrderedDict,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _STAND_INS[module, name]


def unpickle_arrays(content: bytes) -> Any:
    """What a pickle holds, which is run by an unpickler that knows nothing but arrays.

    Arrays become tensors, also those in pairs (name, array), where they are the values of a dict,
    or of the dict that detectron2 keeps in it under ``model``.

    Raises:
        UnpicklingError: anything is not as it should be. If the pickle names anything that is no
            array's, the message is ``GLOBAL`` and the name.
    """
    try:
        unpickled = _ArrayUnpickler(io.BytesIO(content)).load()
        if isinstance(unpickled, dict):
            arrays = _with_tensors(unpickled)
            if isinstance(arrays.get("model"), dict):
                arrays["model"] = _with_tensors(arrays["model"])
            return arrays
        return unpickled
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle may do anything to the objects it has built
        raise pickle.UnpicklingError("not a pickle of arrays") from error


def _with_tensors(content: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: _with_tensor(value) for key, value in content.items()}


def _with_tensor(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2:
        _, value = value
    return value.tensor() if isinstance(value, _Array) else value
