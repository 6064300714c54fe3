"""Tensors and requests of the Open Inference Protocol, in JSON and as bytes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jupyter_llmcloud.inference.open_inference.messages import parse, reply
from jupyter_llmcloud.inference.open_inference.tensors import (
    DATATYPES,
    InvalidInput,
    Tensor,
    from_binary,
    from_json,
    to_binary,
    to_json,
)

DTYPES = [np.bool_, np.uint8, np.int16, np.uint32, np.int64, np.uint64, np.float32, np.float64]


def request(**tensor: Any) -> bytes:
    return json.dumps({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2], **tensor}]}).encode()


@settings(max_examples=60)
@given(st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=3, max_side=4))))
def test_what_is_told_is_read_as_the_same_tensor(array: Any) -> None:
    tensor = Tensor.of("x", array)
    assert tensor.datatype in DATATYPES
    back = from_binary("x", tensor.datatype, tensor.shape, to_binary(tensor))
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype
    if np.isfinite(array.astype(float)).all():
        flat = json.loads(json.dumps(to_json(tensor)))
        np.testing.assert_array_equal(from_json("x", tensor.datatype, tensor.shape, flat), array)


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_texts_come_back_in_json_and_as_bytes(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    tensor = Tensor.of("x", np.array(texts, dtype=object))
    assert to_json(tensor) == texts
    assert [item.decode() for item in from_binary("x", "BYTES", tensor.shape, to_binary(tensor))] == texts


def test_data_may_be_nested_or_flat() -> None:
    nested = from_json("x", "INT64", (2, 3), [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(nested, from_json("x", "INT64", (2, 3), [1, 2, 3, 4, 5, 6]))
    assert nested.shape == (2, 3)


def test_bf16_comes_as_bytes() -> None:
    values = np.array([1.0, -2.5, 0.15625], dtype=np.float32)
    upper = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    np.testing.assert_array_equal(from_binary("x", "BF16", (3,), upper), values)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({"datatype": "FP8"}, "datatype 'FP8' is not one of"),
        ({"shape": [3]}, "has 2 values, and shape [3] is of 3"),
        ({"shape": [-1]}, "sizes of 0 or more"),
        ({"shape": [True]}, "sizes of 0 or more"),
        ({"shape": [2, 2], "data": [[1, 2], [3]]}, "not nested as its shape"),
        ({"data": [1, "two"]}, "is a number, not 'two'"),
        ({"datatype": "INT32", "data": [1, 2.5]}, "is a whole number, not 2.5"),
        ({"datatype": "UINT8", "data": [1, 300]}, "has the value 300, which UINT8 cannot hold"),
        ({"datatype": "INT64", "data": [1, 1 << 70]}, "cannot hold"),
        ({"datatype": "FP16", "data": [1, 70000.0]}, "has a value that FP16 cannot hold"),
        ({"datatype": "FP32", "data": [1, 1e39]}, "has a value that FP32 cannot hold"),
        ({"datatype": "BOOL", "data": [1, 0]}, "is true or false, not 1"),
        ({"datatype": "BYTES", "data": ["a", 2]}, "is a string, not 2"),
        ({"datatype": "FP32", "data": [1, None]}, "is a number, not None"),
        ({"data": "12"}, "must be a list"),
        ({"parameters": {"binary_data_size": 8}, "data": None}, "more than was sent"),
    ],
)
def test_a_tensor_that_is_none_is_refused_by_its_name(tensor: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match="inputs\\['x'\\]") as error:
        parse(request(**tensor))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b"\xff", b'{"inputs": 1, "id": 5}', b'{"inputs": 1, "parameters": []}',
     b'{"inputs": 1, "outputs": {}}', b'{"inputs": [{"name": "x", "datatype": "FP32"}]}', b"[" * 10_000],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse(body)


def test_bytes_behind_the_json_belong_to_the_inputs_in_their_order() -> None:
    first, second = Tensor.of("a", np.arange(3, dtype=np.int32)), Tensor.of("b", np.array(["x", "yz"], dtype=object))
    tensors = [
        {"name": t.name, "shape": list(t.shape), "datatype": t.datatype,
         "parameters": {"binary_data_size": len(to_binary(t))}}
        for t in (first, second)
    ]  # fmt: skip
    head = json.dumps({"id": "7", "inputs": tensors}).encode()
    body = head + to_binary(first) + to_binary(second)
    asked = parse(body, str(len(head)))
    assert asked.id == "7"
    np.testing.assert_array_equal(asked.tensors["a"].data, [0, 1, 2])
    assert list(asked.tensors["b"].data) == [b"x", b"yz"]
    for wrong in (str(len(head) - 1), str(len(body) + 1), "-1", "x"):
        with pytest.raises(InvalidInput):
            parse(body, wrong)
    with pytest.raises(InvalidInput, match="belong to no input"):
        parse(body + b"more", str(len(head)))


def test_outputs_are_told_as_they_were_asked_for() -> None:
    outputs = {"p": Tensor.of("p", np.ones((2, 2), np.float32)), "q": Tensor.of("q", np.array([7]))}
    asked = parse(b'{"inputs": 1, "outputs": [{"name": "q"}, {"name": "p", "parameters": {"binary_data": true}}]}')
    answer = reply(asked, "m", "1", outputs)
    told = json.loads(answer.body[: answer.header_length])
    assert [row["name"] for row in told["outputs"]] == ["q", "p"]
    assert told["outputs"][0]["data"] == [7]
    assert answer.body[answer.header_length :] == np.ones(4, "<f4").tobytes()
    with pytest.raises(InvalidInput, match="no output 'r'"):
        reply(parse(b'{"inputs": 1, "outputs": [{"name": "r"}]}'), "m", "1", outputs)


def test_any_other_json_value_is_an_input_as_it_is() -> None:
    for value in ("a", 1, None, ["a", "b"], [[1, 2]], {"text": "a"}, [{"name": "x"}], []):
        asked = parse(json.dumps({"inputs": value}).encode())
        assert asked.is_json and asked.value == value
