"""Named tensors of the Open Inference Protocol: NumPy arrays here, JSON or bytes on the way.

https://github.com/kserve/open-inference-protocol (inference_rest.md) and its binary tensor data extension.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

BYTES = "BYTES"
_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
DATATYPES = (*_NUMPY, "BF16", BYTES)
_OF_NUMPY = {np.dtype(kind): name for name, kind in _NUMPY.items()}
_MAX_DIMENSIONS = 16
Array = NDArray[Any]


class InvalidInput(ValueError):
    """A request that a model cannot answer; the text says what is wrong with it."""


@dataclass(frozen=True)
class Tensor:
    """A tensor with its name.

    Attributes:
        data: strings of datatype BYTES are `bytes` in an array of objects, and BF16 is float32.
    """

    name: str
    datatype: str
    data: Array
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @classmethod
    def of(cls, name: str, value: Any) -> Tensor:
        """A tensor of what a model returned: an array, or what NumPy makes one of. Raises TypeError, ValueError."""
        if hasattr(value, "detach") and hasattr(value, "cpu"):  # of torch
            value = value.detach().cpu()
            value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
        array = np.asarray(value)
        if array.dtype.kind in "US":
            array = array.astype(object)
        if array.dtype == object:
            return cls(name, BYTES, _as_bytes(name, array))
        if array.dtype not in _OF_NUMPY:
            array = array.astype(array.dtype.newbyteorder("="))
        if (datatype := _OF_NUMPY.get(array.dtype)) is None:
            raise TypeError(f"{name!r} is an array of {array.dtype}, which no datatype of the protocol stands for")
        return cls(name, datatype, array)


def _as_bytes(name: str, array: Array) -> Array:
    out = np.empty(array.shape, dtype=object)
    for index, item in enumerate(array.flat):
        if isinstance(item, str):
            out.flat[index] = item.encode("utf-8", "surrogatepass")
        elif isinstance(item, bytes):
            out.flat[index] = item
        else:
            raise TypeError(f"{name!r} holds a {type(item).__name__}, which no datatype of the protocol stands for")
    return out


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """A shape as a request gives it. Raises InvalidInput."""
    fine = isinstance(shape, list) and all(isinstance(size, int) and not isinstance(size, bool) for size in shape)
    if not fine or len(shape) > _MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise InvalidInput(
            f"inputs[{name!r}].shape must be a list of at most {_MAX_DIMENSIONS} sizes of 0 or more, not {shape!r:.80}"
        )
    return tuple(shape)


def check_datatype(name: str, datatype: Any) -> str:
    """A datatype as a request gives it. Raises InvalidInput."""
    if datatype not in DATATYPES:
        raise InvalidInput(f"inputs[{name!r}].datatype {datatype!r:.40} is not one of {', '.join(DATATYPES)}")
    return str(datatype)


# --- JSON ---


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> Array:
    """An array of `data`, which is nested as `shape` says, or flat in row-major order. Raises InvalidInput."""
    flat = _flattened(name, data, shape)
    if (wanted := math.prod(shape)) != len(flat):
        raise InvalidInput(f"inputs[{name!r}] has {len(flat)} values, and shape {list(shape)} is of {wanted}")
    _check_values(name, datatype, flat)
    if datatype == BYTES:
        array = np.empty(len(flat), dtype=object)
        for index, item in enumerate(flat):
            array[index] = item.encode("utf-8", "surrogatepass")
        return array.reshape(shape)
    try:
        with np.errstate(over="raise"):  # what is too large would become infinite
            return np.array(flat, dtype=_NUMPY.get(datatype, np.float32)).reshape(shape)
    except (OverflowError, FloatingPointError):
        raise InvalidInput(f"inputs[{name!r}] has a value that {datatype} cannot hold") from None


def _flattened(name: str, data: Any, shape: tuple[int, ...]) -> list[Any]:
    if not isinstance(data, list):
        if shape == () and data is not None:
            return [data]
        raise InvalidInput(f"inputs[{name!r}].data must be a list, not {type(data).__name__}")
    if not any(isinstance(item, list) for item in data):
        return data
    level: list[Any] = [data]
    for size in shape:
        for item in level:
            if not isinstance(item, list) or len(item) != size:
                raise InvalidInput(f"inputs[{name!r}].data is not nested as its shape {list(shape)} says")
        level = [item for inner in level for item in inner]
    return level


def _check_values(name: str, datatype: str, flat: list[Any]) -> None:
    if datatype == BYTES:
        wanted: tuple[type, ...] = (str,)
    elif datatype == "BOOL":
        wanted = (bool,)
    elif datatype.startswith(("INT", "UINT")):
        wanted = (int,)
    else:
        wanted = (int, float)
    for item in flat:
        if not isinstance(item, wanted) or (isinstance(item, bool) and bool not in wanted):
            words = {"str": "a string", "bool": "true or false", "int": "a whole number"}
            named = words.get(wanted[0].__name__, "a number") if len(wanted) == 1 else "a number"
            raise InvalidInput(f"inputs[{name!r}].data: each value of datatype {datatype} is {named}, not {item!r:.80}")
    if wanted == (int,):
        limits = np.iinfo(_NUMPY[datatype])
        for item in flat:
            if not limits.min <= item <= limits.max:
                raise InvalidInput(f"inputs[{name!r}] has the value {item}, which {datatype} cannot hold")


def to_json(tensor: Tensor) -> list[Any]:
    """Its values, flat in row-major order. JSON has no NaN and no infinity: they are null.

    Raises InvalidInput for bytes that are no UTF-8: they can be had as binary data only.
    """
    if tensor.datatype != BYTES:
        return tensor.data.reshape(-1).tolist()
    try:
        return [item.decode() for item in tensor.data.flat]
    except UnicodeDecodeError:
        raise InvalidInput(
            f"output {tensor.name!r} holds bytes that are no UTF-8 text: ask for it as binary data"
        ) from None


# --- bytes ---


def from_binary(name: str, datatype: str, shape: tuple[int, ...], data: bytes | memoryview) -> Array:
    """An array of little-endian values in row-major order; each of BYTES has its length in 4 bytes before it."""
    count = math.prod(shape)
    if datatype == BYTES:
        return _strings(name, count, memoryview(data)).reshape(shape)
    size = 2 if datatype == "BF16" else np.dtype(_NUMPY[datatype]).itemsize
    if len(data) != count * size:
        raise InvalidInput(
            f"inputs[{name!r}] has {len(data)} bytes of binary data, and shape {list(shape)} of {datatype} is of "
            f"{count * size}"
        )
    if datatype == "BF16":
        upper = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
        return upper.view(np.float32).reshape(shape)
    read = np.frombuffer(data, dtype=np.dtype(_NUMPY[datatype]).newbyteorder("<"))
    if datatype == "BOOL":
        read = np.frombuffer(data, dtype=np.uint8) != 0
    return read.astype(_NUMPY[datatype], copy=True).reshape(shape)


def _strings(name: str, count: int, data: memoryview) -> Array:
    if count * 4 > len(data):
        raise InvalidInput(f"inputs[{name!r}] has {len(data)} bytes of binary data, too few for {count} strings")
    array = np.empty(count, dtype=object)
    position = 0
    for index in range(count):
        if position + 4 > len(data):
            raise InvalidInput(f"inputs[{name!r}]: its binary data ends within string {index} of {count}")
        (length,) = struct.unpack_from("<I", data, position)
        position += 4
        if position + length > len(data):
            raise InvalidInput(f"inputs[{name!r}]: its binary data ends within string {index} of {count}")
        array[index] = bytes(data[position : position + length])
        position += length
    if position != len(data):
        raise InvalidInput(f"inputs[{name!r}] has {len(data) - position} bytes of binary data too many")
    return array


def to_binary(tensor: Tensor) -> bytes:
    """Its values as `from_binary` reads them."""
    if tensor.datatype != BYTES:
        data = np.ascontiguousarray(tensor.data)
        return data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes()
    return b"".join(struct.pack("<I", len(item)) + item for item in tensor.data.flat)
