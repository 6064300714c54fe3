"""Scoped keys: their form, their digest, their scopes."""

from __future__ import annotations

import re
import secrets
import tracemalloc

import pytest

from jupyter_llmcloud.core.serving.keys import (
    check_scopes,
    looks_like_key,
    make_key,
    may_infer,
    may_read_models,
    parse_key,
)
from jupyter_llmcloud.errors import UsageError

ID, SECRET = bytes(range(5)), bytes(range(32))


def test_a_key_is_written_with_its_id_its_secret_and_a_checksum() -> None:
    key = make_key(ID, SECRET)
    assert re.fullmatch(r"sk-llmc-[0-9a-z]{8}-[0-9A-Za-z]{43}-[0-9a-f]{8}", key.text)
    assert parse_key(key.text) == key


def test_every_random_key_can_be_read_back() -> None:
    for _ in range(200):
        key = make_key(secrets.token_bytes(5), secrets.token_bytes(32))
        assert parse_key(key.text) == key
    assert parse_key(make_key(b"\xff" * 5, b"\xff" * 32).text) is not None
    assert parse_key(make_key(b"\0" * 5, b"\0" * 32).text) is not None


def test_a_mistyped_key_is_no_key() -> None:
    text = make_key(ID, SECRET).text
    for position in range(len("sk-llmc-"), len(text)):
        other = "x" if text[position] != "x" else "y"
        assert parse_key(text[:position] + other + text[position + 1 :]) is None


@pytest.mark.parametrize("text", ["", "sk-llmc-", "sk-llmc-a-b-c", "sk-" + "a" * 48, "Bearer x", "sk-llmc-\0-\0-\0"])
def test_other_text_is_no_key(text: str) -> None:
    assert parse_key(text) is None


def test_what_was_meant_to_be_a_key_is_told_from_a_jupyter_token() -> None:
    assert looks_like_key("sk-llmc-mistyped")
    assert not looks_like_key(secrets.token_hex(24))


def test_neither_repr_nor_digest_tells_the_secret() -> None:
    key = make_key(ID, SECRET)
    assert key.secret not in repr(key)
    assert len(key.digest) == 64 and key.secret not in key.digest
    assert key.matches(key.digest)
    assert not key.matches(make_key(ID, bytes(32)).digest)


def test_a_key_needs_all_its_random_bytes() -> None:
    with pytest.raises(ValueError, match="5 and 32 bytes"):
        make_key(ID, b"short")


@pytest.mark.parametrize(
    ("scopes", "endpoint", "allowed"),
    [
        (["infer:tiny"], "tiny", True),
        (["infer:tiny"], "tiny2", False),
        (["infer:tiny"], "Tiny", False),
        (["infer:*"], "anything.v2", True),
        (["infer:a*", "infer:b?"], "bc", True),
        (["infer:a*", "infer:b?"], "bcd", False),
        (["models:read"], "tiny", False),
        ([], "tiny", False),
        (["infer:*"], "../tiny", False),
        (["infer:*"], "", False),
    ],
)
def test_a_scope_allows_the_endpoints_that_its_glob_matches(scopes: list[str], endpoint: str, allowed: bool) -> None:
    assert may_infer(scopes, endpoint) is allowed


def test_listing_models_needs_its_own_scope() -> None:
    assert may_read_models(["models:read"])
    assert not may_read_models(["infer:*"])


def test_scopes_are_sorted_and_not_repeated() -> None:
    assert check_scopes(["models:read", "infer:a", "infer:a"]) == ["infer:a", "models:read"]


@pytest.mark.parametrize("scope", ["admin", "infer:", "infer:a/b", "infer:[a]", "INFER:a", "models:write", "infer:é"])
def test_a_scope_that_does_not_exist_is_refused_by_name(scope: str) -> None:
    with pytest.raises(UsageError, match=re.escape(repr(scope))):
        check_scopes([scope])


def test_a_key_without_a_scope_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one scope"):
        check_scopes([])


def test_names_that_no_endpoint_can_have_are_not_kept() -> None:
    """A key may ask for a model of any name: a thousand of a megabyte each were held."""
    tracemalloc.start()
    for number in range(50):
        assert not may_infer(["infer:*"], f"{number}" + "x" * (1 << 18))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1 << 20
