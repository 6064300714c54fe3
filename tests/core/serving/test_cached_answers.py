"""Which answers may be given again."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jupyter_llmcloud.core.serving.cached_answers import cache_key
from jupyter_llmcloud.core.serving.endpoint.revision import Revision


def key(actor: str = "key:a", revision: str = "r1", route: str = "completions", **body: Any) -> str | None:
    return cache_key(actor, "tiny", revision, route, json.dumps({"model": "tiny", **body}).encode())


def test_an_answer_is_kept_when_the_same_request_would_get_it_again() -> None:
    assert key(prompt="a", temperature=0) and key(prompt="a", seed=0) and key(route="embeddings", input="a")
    assert key(prompt="a") is None and key(prompt="a", temperature=0.5) is None and key(prompt="a", seed=True) is None


def test_the_key_holds_all_that_the_answer_depends_on_and_who_asks() -> None:
    same = key(prompt="a", temperature=0)
    assert same == key(temperature=0, prompt="a", user="me", seed=None)
    others = [
        key(prompt="b", temperature=0),
        key(prompt="a", temperature=0, max_tokens=3),
        key(prompt="a", temperature=0, stream=True),
        key(prompt="a", temperature=0, route="chat/completions"),
        key("key:b", prompt="a", temperature=0),
        key(revision="r2", prompt="a", temperature=0),
    ]
    assert len({same, *others}) == 7


def test_a_response_is_given_again_only_when_it_is_not_stored_and_word_for_word_the_same() -> None:
    """Its id names what a replica keeps; and it repeats what was asked, also what has no effect."""
    assert key(route="responses", input="a", temperature=0) is None
    assert key(route="responses", input="a", temperature=0, store=True) is None
    kept = key(route="responses", input="a", temperature=0, store=False)
    assert kept and kept == key(route="responses", store=False, temperature=0, input="a")
    assert kept != key(route="responses", input="a", temperature=0, store=False, metadata={"case": "2"})
    assert kept != key(route="responses", input="a", temperature=0, store=False, user="me")


def test_what_is_computed_in_another_way_is_answered_by_something_else() -> None:
    served = Revision(1, "/model", fingerprint="abc", dtype="float32")
    others = [{"dtype": "bfloat16"}, {"engine": "generate"}, {"devices": 0}, {"max_model_len": 64}]
    assert len({dataclasses.replace(served, **other).answers_by for other in [{}, *others]}) == 5
    assert dataclasses.replace(served, num_replicas=2, number=3).answers_by == served.answers_by


def test_what_is_no_request_has_no_place() -> None:
    for body in (b"{", b"[]", b"[" * 100_000, b"\xff"):
        assert cache_key("a", "e", "r", "completions", body) is None
