"""Requests of the REST API: decoded by their structs, and refused by the name of the field and the value seen."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jupyter_llmcloud.core.spec import EndpointSpec, Interface, RunSpec
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.http import clusters, endpoints, keys, runs, worlds
from jupyter_llmcloud.protocol.http.decoding import decode_body, decode_query
from jupyter_llmcloud.protocol.http.openai.batches import CreateBatch
from jupyter_llmcloud.protocol.http.search.sweeps import SweepQuery
from jupyter_llmcloud.protocol.http.series import SeriesQuery


def refusal(kind: Any, body: Any) -> str:
    with pytest.raises(UsageError) as refused:
        decode_body(kind, body if isinstance(body, bytes) else json.dumps(body).encode())
    return str(refused.value)


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        (clusters.StartCluster, {"kind": 3}, "kind must be str, not 3."),
        (clusters.StartCluster, {"workers": True}, "workers must be int, not True."),
        (clusters.StartCluster, {"workers": 1.5}, "workers must be int, not 1.5."),
        (clusters.StartCluster, {"options": []}, "options must be dict, not []."),
        (clusters.ScaleCluster, {"workers": 20_000}, "workers 20000 is not possible: 0 to 10000."),
        (clusters.ScaleCluster, {"workers": 10**400}, f"workers 1{'0' * 79} is not possible: 0 to 10000."),
        (worlds.AskPlacement, {"num_ranks": 0}, "num_ranks 0 is not possible: at least 1."),
        (worlds.AskPlacement, {"ticket": "x" * 65}, "ticket has 65 characters: 64 at most."),
        (endpoints.StartEndpoint, {}, "target must be str, and is missing."),
        (keys.CreateKey, {"scopes": "infer:*"}, "scopes must be list, not 'infer:*'."),
        (keys.CreateKey, {"scopes": ["infer:*", 3]}, "scopes must be str, not 3."),
        (keys.CreateKey, {"expires_s": 0.5}, "expires_s 0.5 is not possible: 1 to 315360000."),
        (runs.StartRun, {"source": "1", "script": {"arguments": ["a", 1]}}, "script.arguments must be str, not 1."),
        (runs.StartRun, {"source": "1", "script": {"file": None}}, "script.file must be str, not None."),
        (
            runs.StartRun,
            {"source": "1", "script": {"argv": []}},
            "script.argv is not known here: file, arguments, folder are.",
        ),
        (runs.StartRun, {"source": "1", "sepc": {}}, "field 'sepc' is not known here: source, spec, script are."),
        (runs.LogScales, {"x` - at `$.log": 1}, "field 'x` - at `$.log' is not known here: log, layout are."),
        (
            runs.StartRun,
            {"source": "1", "script": {"x` - at `$.y": 1}},
            "script.x` - at `$.y is not known here: file, arguments, folder are.",
        ),
        (
            CreateBatch,
            {"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": "99d"},
            "completion_window '99d' is not possible: write it as in 24h or 30m.",
        ),
        (runs.LogScales, [], "the body must be a JSON object."),
        (runs.LogScales, b"{", "the body is not JSON: Input data was truncated."),
        (runs.LogScales, b'{"log": NaN}', "the body is not JSON: JSON is malformed: invalid character (byte 8)."),
        (
            runs.LogScales,
            b'{"log": ' + b"[" * 100_000,
            "the body is not JSON: maximum recursion depth exceeded while deserializing an object.",
        ),
    ],
)
def test_a_wrong_body_is_refused_by_field_and_value(kind: Any, body: Any, words: str) -> None:
    assert refusal(kind, body) == words


def test_an_unknown_option_is_refused_with_those_there_are() -> None:
    words = refusal(runs.StartRun, {"source": "1", "spec": {"pull": "x"}})
    known = ", ".join(option.name for option in RunSpec.options(Interface.REST))
    assert words == f"spec.pull is not known here: {known} are."


def test_what_is_null_or_left_out_has_its_default() -> None:
    assert decode_body(keys.CreateKey, b"") == keys.CreateKey()
    assert decode_body(keys.CreateKey, b'{"label": null, "expires_s": null}') == keys.CreateKey()
    given = decode_body(endpoints.StartEndpoint, b'{"target": "a", "name": null, "replicas": 2}').given()
    assert given == {"target": "a", "replicas": 2}


def test_options_reach_their_spec_as_they_were_sent_which_checks_them() -> None:
    asked = {"target": "a", "replicas": "two", "base_model": ["x"]}
    given = decode_body(endpoints.StartEndpoint, json.dumps(asked).encode()).given()
    assert given == asked
    del given["target"]
    with pytest.raises(UsageError, match="replicas 'two'"):
        EndpointSpec.make(given, Interface.REST)
    spec = decode_body(runs.StartRun, b'{"source": "1", "spec": {"save": ["a"], "timeout": "90s"}}').spec.given()
    assert RunSpec.make(spec, Interface.REST).timeout == 90


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"limit": "x"}, "limit='x' is not a number from 0 to 10000."),
        ({"limit": "10001"}, "limit='10001' is not a number from 0 to 10000."),
        ({"limit": "-1"}, "limit='-1' is not a number from 0 to 10000."),
        ({"limit": "1e2"}, "limit='1e2' is not a number from 0 to 10000."),
        ({"limit": "٣"}, "limit='٣' is not a number from 0 to 10000."),
        ({"limit": "9" * 30}, f"limit={'9' * 30!r} is not a number from 0 to 10000."),
        ({"state": "gone"}, "state='gone' is not possible: write active, or leave it out."),
    ],
)
def test_a_wrong_query_is_refused_by_name_and_value(query: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        decode_query(runs.RunsQuery, query)
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("kind", "query", "words"),
    [
        (SweepQuery, {"wait_s": "nan"}, "wait_s='nan' is not a number from 0 to 20."),
        (SweepQuery, {"seen": "x"}, "seen='x' is not a number."),
        (SeriesQuery, {"metric": "loss", "from": "nan"}, "from='nan' is not a number."),
    ],
    ids=["a-wait", "a-version", "a-step"],
)
def test_what_is_no_number_is_refused_where_there_are_no_bounds_too(
    kind: Any, query: dict[str, str], words: str
) -> None:
    """A chart from step NaN on was one of no values."""
    with pytest.raises(UsageError) as refused:
        decode_query(kind, query)
    assert str(refused.value) == words


def test_a_number_in_a_query_is_the_one_that_is_written() -> None:
    """The default, when it was said, was refused; of many digits the first ones were taken."""
    assert decode_query(SweepQuery, {"seen": "-1"}) == SweepQuery()
    assert decode_query(runs.RecordsQuery, {"rank": "0" * 30 + "5"}).rank == 5
    assert decode_query(runs.RecordsQuery, {"rank": "0" * 5000 + "5"}).rank == 5
    assert decode_query(SeriesQuery, {"metric": "loss", "to": "1." + "0" * 50 + "e5"}).to == 1e5
    assert decode_query(SeriesQuery, {"metric": "loss", "from": "-inf", "to": "2.5"}).to == 2.5


def test_in_a_query_what_is_empty_is_left_out_and_other_names_are_let_be() -> None:
    asked = {"limit": "", "state": "active", "token": "secret", "1700000000000": ""}
    assert decode_query(runs.RunsQuery, asked) == runs.RunsQuery(state="active")
    assert decode_query(runs.RecordsQuery, {"rank": "3", "limit": "7"}) == runs.RecordsQuery(rank=3, limit=7)
    assert decode_query(worlds.WorldsQuery, {"cluster": "null"}).cluster == "null"
