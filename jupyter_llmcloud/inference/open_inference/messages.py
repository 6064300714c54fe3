"""A request for an inference and its reply: JSON, with tensors beside it as bytes where that is asked for.

Beside the protocol's list of tensors, `inputs` may be any other JSON value, which the model gets as it is; what it
returns is then told as JSON too: `{"inputs": ["I liked it"]}` -> `{"outputs": [{"label": "good", "score": 0.9}]}`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence, Set, ValuesView
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from jupyter_llmcloud.core.data.rows import rows_of
from jupyter_llmcloud.core.names import type_in_words
from jupyter_llmcloud.inference.open_inference.tensors import (
    InvalidInput,
    Tensor,
    check_datatype,
    check_shape,
    from_binary,
    from_json,
    to_binary,
    to_json,
)

LITERAL_NAN = "literal_nan"  # a parameter of requests
_UNKNOWN = object()
_TENSOR_FIELDS = {"name", "shape", "datatype", "data", "parameters"}


@dataclass(frozen=True)
class InferRequest:
    """What is asked.

    Attributes:
        tensors: the inputs by name; None: `value` has them.
        value: any JSON value, in place of tensors.
        wanted: the outputs that are asked for, by name, and whether as binary data; empty: all.
        binary: whether outputs that are not named are told as binary data.
        literal_nan: whether whoever asks reads NaN and Infinity in a JSON value, as Python does; else they are null.
    """

    id: str = ""
    tensors: dict[str, Tensor] | None = None
    value: Any = None
    parameters: dict[str, Any] = field(default_factory=dict)
    wanted: dict[str, bool] = field(default_factory=dict)
    binary: bool = False
    literal_nan: bool = False

    @property
    def is_json(self) -> bool:
        """Whether the inputs are a JSON value, and the outputs shall be one."""
        return self.tensors is None


def parse(body: bytes, header_length: str | None = None) -> InferRequest:
    """The request in `body`; raises InvalidInput.

    Args:
        body: JSON, and the binary data of its tensors behind it.
        header_length: the header `Inference-Header-Content-Length`: how long the JSON is; None: all of it.
    """
    length = _header_length(header_length, len(body))
    try:
        read = msgspec.json.decode(body[:length])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the request is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise InvalidInput(f"the request must be a JSON object, not {type(read).__name__}")
    if "inputs" not in read:
        raise InvalidInput('the request has no "inputs"')
    request_id = read.get("id", "")
    if not isinstance(request_id, str):
        raise InvalidInput(f'"id" must be a string, not {request_id!r:.40}')
    parameters = _parameters(read, "the request")
    wanted, binary = _wanted(read.get("outputs")), parameters.get("binary_data_output") is True
    tensors = _tensors(read["inputs"], memoryview(body)[length:])
    if tensors is None and length != len(body):
        raise InvalidInput("binary data goes with tensors only")
    value = read["inputs"] if tensors is None else None
    return InferRequest(request_id, tensors, value, parameters, wanted, binary, parameters.get(LITERAL_NAN) is True)


def _header_length(text: str | None, limit: int) -> int:
    if text is None:
        return limit
    if not (text.isascii() and text.isdigit()) or int(text) > limit:
        raise InvalidInput(f"Inference-Header-Content-Length {text!r:.40} is not the length of a part of the body")
    return int(text)


def _parameters(read: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = read.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidInput(f'{where}: "parameters" must be an object, not {type(parameters).__name__}')
    return parameters


def _is_tensor(item: Any) -> bool:
    return isinstance(item, dict) and {"name", "shape", "datatype"} <= set(item) <= _TENSOR_FIELDS


def _tensors(inputs: Any, binary: memoryview) -> dict[str, Tensor] | None:
    """The tensors of `inputs`; None when it is another JSON value."""
    if not (isinstance(inputs, list) and inputs and any(_is_tensor(item) for item in inputs)):
        if isinstance(inputs, list) and any(isinstance(item, dict) and "datatype" in item for item in inputs):
            raise InvalidInput(f"each of inputs has {', '.join(sorted(_TENSOR_FIELDS))}, not {inputs[0]!r:.120}")
        return None
    tensors: dict[str, Tensor] = {}
    position = 0
    for item in inputs:
        if not _is_tensor(item) or not isinstance(item["name"], str):
            raise InvalidInput(f"each of inputs needs name (a string), shape, datatype and data, not {item!r:.120}")
        if (name := item["name"]) in tensors:
            raise InvalidInput(f"there are two inputs with the name {name!r}")
        parameters = _parameters(item, f"inputs[{name!r}]")
        shape, datatype = check_shape(name, item["shape"]), check_datatype(name, item["datatype"])
        if "binary_data_size" in parameters:
            size = parameters.pop("binary_data_size")
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(binary) - position:
                raise InvalidInput(f"inputs[{name!r}].parameters.binary_data_size {size!r:.40} is more than was sent")
            if "data" in item:
                raise InvalidInput(f"inputs[{name!r}] has both data and binary data")
            array = from_binary(name, datatype, shape, binary[position : position + size])
            position += size
        elif "data" in item:
            array = from_json(name, datatype, shape, item["data"])
        else:
            raise InvalidInput(f"inputs[{name!r}] has neither data nor parameters.binary_data_size")
        tensors[name] = Tensor(name, datatype, array, parameters)
    if position != len(binary):
        raise InvalidInput(f"{len(binary) - position} bytes of binary data belong to no input")
    return tensors


def _wanted(outputs: Any) -> dict[str, bool]:
    if outputs is None:
        return {}
    if not isinstance(outputs, list):
        raise InvalidInput(f'"outputs" must be a list, not {type(outputs).__name__}')
    wanted: dict[str, bool] = {}
    for item in outputs:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise InvalidInput(f"each of outputs is an object with a name, not {item!r:.80}")
        parameters = _parameters(item, f"outputs[{item['name']!r}]")
        if "classification" in parameters:
            raise InvalidInput("outputs: the classification extension is not offered; ask for labels and scores")
        wanted[item["name"]] = parameters.get("binary_data") is True
    return wanted


@dataclass(frozen=True)
class InferenceReply:
    """A reply, ready to be sent. `header_length` is None when it is JSON alone."""

    body: bytes
    header_length: int | None = None


def reply(asked: InferRequest, model: str, version: str, outputs: Mapping[str, Tensor]) -> InferenceReply:
    """The tensors that a model gave, as they were asked for. Raises InvalidInput for one that it does not have."""
    if unknown := [name for name in asked.wanted if name not in outputs]:
        raise InvalidInput(f"there is no output {unknown[0]!r:.60}. There is: {', '.join(outputs)}")
    told, binary = [], b""
    for name in asked.wanted or outputs:
        tensor = outputs[name]
        row = {"name": name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if asked.wanted.get(name, asked.binary):
            data = to_binary(tensor)
            told.append({**row, "parameters": {"binary_data_size": len(data)}})
            binary += data
        else:
            told.append({**row, "data": to_json(tensor)})
    body = _encode({"model_name": model, "model_version": version, **_id(asked), "outputs": told})
    is_binary = any("parameters" in row for row in told)
    return InferenceReply(body + binary, len(body) if is_binary else None)


def json_reply(asked: InferRequest, model: str, version: str, value: Any) -> InferenceReply:
    """Any value that a model gave, as JSON. Raises TypeError for what JSON cannot carry."""
    told = {"model_name": model, "model_version": version, **_id(asked), "outputs": value}
    body = _encode(told)
    if not asked.literal_nan or b"null" not in body:
        return InferenceReply(body)
    plainly = msgspec.to_builtins(told, enc_hook=plain, str_keys=True)
    return InferenceReply(json.dumps(plainly, ensure_ascii=False, separators=(",", ":")).encode())


def _id(asked: InferRequest) -> dict[str, str]:
    return {"id": asked.id} if asked.id else {}


def _encode(value: Any) -> bytes:
    return msgspec.json.encode(value, enc_hook=plain)


def plain(value: Any) -> Any:
    """What stands in JSON for a value of NumPy, pandas or torch, or for a collection or an heir of Python's own types.

    Raises TypeError for any other.
    """
    if isinstance(value, np.generic):
        return _plain_scalar(value)
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a tensor of torch
        value = value.detach().cpu().numpy()
    for known in (_rows_or_values, _plain_time, _as_builtin):
        if (found := known(value)) is not _UNKNOWN:
            return found
    if isinstance(value, Iterator):
        raise TypeError(f"{type_in_words(value)} is no JSON value: return a list, or yield from stream(inputs)")
    raise TypeError(f"{type_in_words(value)} is no JSON value, no array, no table and no number of NumPy")


def _plain_scalar(value: np.generic) -> Any:
    if isinstance(value, np.floating):
        return float(value)  # the item of a long double is one again
    if isinstance(value, np.complexfloating):
        raise TypeError("a complex number is no JSON value")
    return value.item()


def _rows_or_values(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if (rows := rows_of(value)) is not None:
        return rows
    for method in ("tolist", "to_list"):  # columns of pandas; of polars
        if callable(found := getattr(value, method, None)):
            return found()
    return _UNKNOWN


def _plain_time(value: Any) -> Any:
    """Of times by pandas: what is missing is null, others are written as those of Python are."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return datetime.timedelta(value.days, value.seconds, value.microseconds)
    return _UNKNOWN


def _as_builtin(value: Any) -> Any:
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence | Set | ValuesView) else _UNKNOWN
