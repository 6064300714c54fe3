"""A shadow's answers beside those of the revision that answers, by values."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jupyter_llmcloud.core.serving.endpoint.comparison import (
    Comparison,
    RevisionAnswer,
    has_one_answer,
    in_words,
    read_answer,
)

JSON, SSE = "application/json", "text/event-stream"


def completion(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    return json.dumps({"id": "cmpl-1", "created": 5, "model": "m", "choices": [choice], **more}).encode()


def stream(*texts: str, end: str = "[DONE]") -> bytes:
    events = [json.dumps({"id": "x", "choices": [{"index": 0, "delta": {"content": text}}]}) for text in texts]
    return "".join(f"data: {event}\n\n" for event in [*events, end]).encode()


def test_ids_times_and_names_are_no_difference_and_texts_are() -> None:
    first, again = read_answer(JSON, completion("a b")), read_answer(JSON, completion("a b", id="cmpl-2", created=9))
    assert first == again != read_answer(JSON, completion("a c"))


def test_how_a_stream_was_cut_into_pieces_is_no_difference() -> None:
    assert read_answer(SSE, stream("a", " b")) == read_answer(SSE, stream("a b")) != read_answer(SSE, stream("a", "b"))


def test_calls_of_tools_are_compared_too() -> None:
    def call(arguments: str) -> bytes:
        delta = {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": arguments}}]}
        return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\ndata: [DONE]\n\n".encode()

    assert read_answer(SSE, call('{"x": 1}')) != read_answer(SSE, call('{"x": 2}'))


def response(arguments: str = "{}", **more: Any) -> dict[str, Any]:
    call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": arguments}
    told = {"id": "resp_1", "created_at": 1, "completed_at": 2, "output": [{**call, **more.pop("item", {})}]}
    return {**told, **more}


def test_of_a_response_neither_its_times_nor_the_ids_of_its_calls_are_a_difference() -> None:
    first = response()
    again = response(completed_at=3, id="resp_2", item={"id": "fc_2", "call_id": "call_2"})
    for as_told in (lambda one: json.dumps(one).encode(), _streamed):
        kind = JSON if as_told is not _streamed else SSE
        assert read_answer(kind, as_told(first)) == read_answer(kind, as_told(again)) is not None
        assert read_answer(kind, as_told(first)) != read_answer(kind, as_told(response('{"a": 1}')))


def _streamed(told: dict[str, Any]) -> bytes:
    texts = [{"type": "response.output_text.delta", "delta": "Well."}, {"type": "response.completed", "response": told}]
    lines = (f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in texts)
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


def test_a_classifier_is_compared_by_its_label_and_numbers_to_four_digits() -> None:
    def labels(label: str, score: float) -> bytes:
        return json.dumps({"outputs": [{"label": label, "score": score, "scores": {}}]}).encode()

    assert read_answer(JSON, labels("good", 0.9)) == read_answer(JSON, labels("good", 0.8))
    assert read_answer(JSON, labels("good", 0.9)) != read_answer(JSON, labels("bad", 0.9))
    assert read_answer(JSON, b"[0.123456]") == read_answer(JSON, b"[0.123461]") != read_answer(JSON, b"[0.1239]")


@pytest.mark.parametrize("name", ["object", "id", "model", "usage", "logprobs"])
def test_what_a_model_of_the_users_own_puts_out_is_compared_whatever_it_is_called(name: str) -> None:
    """An answer such as {"object": "cat"} was taken for one that says nothing: 100 % of the answers were equal."""

    def outputs(value: str, **more: Any) -> bytes:
        return json.dumps({"model_name": "m", "id": "1", "outputs": [{name: value}], **more}).encode()

    cat = read_answer(JSON, outputs("cat"))
    assert cat == read_answer(JSON, outputs("cat", id="2")) != read_answer(JSON, outputs("dog"))


@pytest.mark.parametrize("body", [None, b"", b"{", b"[" * 100_000])
def test_what_cannot_be_read_is_not_known(body: bytes | None) -> None:
    assert read_answer(JSON, body) is None


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/completions", {"temperature": 0}, True),
        ("/v1/chat/completions", {"temperature": 0.0}, True),
        ("/v1/completions", {}, False),
        ("/v1/responses", {"temperature": 0, "previous_response_id": "resp_1"}, False),
        ("/v1/completions", {"temperature": False}, False),
        ("/v1/embeddings", {"temperature": 0}, False),
        ("/v2/models/m/infer", {"inputs": []}, True),
    ],
)
def test_only_greedy_requests_have_one_answer(path: str, body: Any, expected: bool) -> None:
    assert has_one_answer(path, json.dumps(body).encode()) is expected


def test_shares_and_ratios_count_what_both_have_answered() -> None:
    found = Comparison()
    assert in_words(found.told()) == "nothing compared yet" and found.told()["equal_share"] is None
    found.note(RevisionAnswer(2.0, False, "a"), RevisionAnswer(1.0, False, "a"), True)
    found.note(RevisionAnswer(2.0, False, "a"), RevisionAnswer(1.0, False, "b"), True)
    found.note(
        RevisionAnswer(2.0, False, "a"), RevisionAnswer(1.0, False, "b"), False
    )  # sampled: two answers say nothing
    found.note(RevisionAnswer(9.0, True), RevisionAnswer(1.0, False, "b"), True)
    told = found.told()
    assert (told["num_compared"], told["num_comparable"], told["equal_share"]) == (4, 2, 0.5)
    assert (told["latency_ratio"], told["error_share"], told["stable_error_share"]) == (2.0, 0.25, 0.0)
    assert in_words(told) == "50% of 2 greedy answers equal, 2.00 x the time, 25% errors (0% without it)"


def test_requests_that_were_not_copied_are_told() -> None:
    """A shadow that takes none looked like one that nobody had asked yet."""
    found = Comparison()
    assert in_words({**found.told(), "num_dropped": 30}) == "nothing compared yet, 30 not copied"
    found.note(RevisionAnswer(2.0, False, "a"), RevisionAnswer(1.0, False, "a"), True)
    assert in_words({**found.told(), "num_dropped": 2}).endswith("0% errors (0% without it), 2 not copied")
    assert "not copied" not in in_words({**found.told(), "num_dropped": 0})
