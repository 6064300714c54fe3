"""What a notebook asks an endpoint by the Open Inference Protocol: any JSON value, or arrays of NumPy by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.errors import ServerError, UsageError

_FIELDS = {"name", "datatype", "shape"}
HEADER_LENGTH = "Inference-Header-Content-Length"
_DATATYPES = {
    "bool": "BOOL",
    **{f"{kind}{bits}": f"{kind.upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}
_OF_DATATYPES = {datatype: name for name, datatype in _DATATYPES.items()}


def request(inputs: Any, parameters: Mapping[str, Any] | None) -> tuple[bytes, dict[str, str]]:
    """The body and the headers that ask for inputs. Raises UsageError for what cannot be sent."""
    more: dict[str, Any] = {"parameters": dict(parameters)} if parameters else {}
    arrays = _arrays(inputs)
    if arrays is None:
        more["parameters"] = {**more.get("parameters", {}), "literal_nan": True}
        try:
            body = json.dumps({"inputs": inputs, **more}, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"predict() takes a JSON value, an array of NumPy, or a dict of such by name, not this: {error}."
            ) from None
        return body, {"Content-Type": "application/json"}
    tensors, data = [], b""
    for name, array in arrays.items():
        row: dict[str, Any] = {"name": name, "shape": list(array.shape)}
        if array.dtype.kind in "OUS":
            tensors.append({**row, "datatype": "BYTES", "data": _texts(name, array)})
            continue
        if (datatype := _DATATYPES.get(array.dtype.name)) is None:
            raise UsageError(f"{name!r} is an array of {array.dtype}, which the protocol does not know.")
        packed = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        tensors.append({**row, "datatype": datatype, "parameters": {"binary_data_size": len(packed)}})
        data += packed
    more["parameters"] = {**more.get("parameters", {}), "binary_data_output": True}
    head = json.dumps({"inputs": tensors, **more}).encode()
    return head + data, {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def _arrays(inputs: Any) -> dict[str, Any] | None:
    """Arrays by name; None when the inputs are a JSON value."""
    named = inputs if isinstance(inputs, Mapping) else {"input": inputs}
    if not named or not all(hasattr(value, "dtype") and hasattr(value, "shape") for value in named.values()):
        return None
    import numpy as np

    return {str(name): np.asarray(value) for name, value in named.items()}


def _texts(name: str, array: Any) -> list[str]:
    texts = array.reshape(-1).tolist()
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name!r} is an array of objects that are no texts: it cannot be sent.")
    return texts


def answer(body: bytes, header_length: str | None) -> Any:
    """What an endpoint answered: a JSON value, the array that is called "output" alone, or arrays by name."""
    length = int(header_length) if header_length else len(body)
    told = json.loads(body[:length])["outputs"]
    if header_length is None and not _are_tensors(told):
        return told
    arrays, position = {}, length
    for row in told:
        size = row.get("parameters", {}).get("binary_data_size")
        data = None if size is None else body[position : position + size]
        position += size or 0
        arrays[row["name"]] = _array(row, data)
    return arrays["output"] if set(arrays) == {"output"} else arrays


def _are_tensors(told: Any) -> bool:
    # A model may well return an empty list.
    return (
        isinstance(told, list)
        and bool(told)
        and all(isinstance(row, dict) and {"name", "datatype", "shape"} <= set(row) for row in told)
    )


def _array(row: dict[str, Any], data: bytes | None) -> Any:
    import numpy as np

    if row["datatype"] == "BYTES":
        texts = row["data"] if data is None else _strings(data)
        array = np.empty(len(texts), dtype=object)
        array[:] = texts
        return array.reshape(row["shape"])
    dtype = np.dtype(_OF_DATATYPES[row["datatype"]])
    if data is None:
        return np.array(row["data"], dtype=dtype).reshape(row["shape"])
    return np.frombuffer(data, dtype=dtype.newbyteorder("<")).astype(dtype).reshape(row["shape"])


def _strings(data: bytes) -> list[str]:
    texts, position = [], 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "little")
        position += 4
        texts.append(data[position : position + length].decode("utf-8", "replace"))
        position += length
    return texts


def piece(event: Any) -> Any:
    """What an event of a stream brings; raises ServerError for the one that says why it broke off."""
    if isinstance(event, dict) and "error" in event:
        raise ServerError(f"the answer broke off: {event['error']}")
    told = event["outputs"]
    return answer(json.dumps(event).encode(), None) if _are_tensors(told) and told else told
