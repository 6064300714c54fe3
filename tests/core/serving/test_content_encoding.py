"""Compressed bodies: told back as they were, or refused in words, whatever their bytes are."""

from __future__ import annotations

import gzip
import zlib

import pytest

from jupyter_llmcloud.core.serving.content_encoding import check_encoding, decoded
from jupyter_llmcloud.core.serving.openai_errors import ApiError

BODY = b'{"model": "tiny", "prompt": "hello"}'
WITHOUT_HEADER = zlib.compressobj(wbits=-zlib.MAX_WBITS)
GZIP = gzip.compress(BODY, mtime=0)  # without the time, which would name the tests otherwise in each process
RAW = WITHOUT_HEADER.compress(BODY) + WITHOUT_HEADER.flush()


@pytest.mark.parametrize(
    ("encoding", "sent"),
    [("", BODY), ("identity", BODY), ("gzip", GZIP), (" GZIP ", GZIP),
     ("deflate", zlib.compress(BODY)), ("deflate", RAW)],
)  # fmt: skip
def test_a_body_is_what_it_was_before(encoding: str, sent: bytes) -> None:
    check_encoding(encoding)
    assert decoded(sent, encoding, len(BODY)) == BODY


def test_a_body_of_several_members_is_all_of_them() -> None:
    """As those send it who compress in parts: what came behind the first member was dropped."""
    parts = gzip.compress(BODY[:9], mtime=0) + gzip.compress(b"", mtime=0) + gzip.compress(BODY[9:], mtime=0)
    assert decoded(parts, "gzip", len(BODY)) == BODY
    assert decoded(GZIP + bytes(512), "gzip", len(BODY)) == BODY  # zeros up to the end of a block, as gzip has it
    for sent, limit, status in ((parts, len(BODY) - 1, 413), (parts[:-9], 99, 400), (GZIP + b"{}", 99, 400)):
        with pytest.raises(ApiError) as refused:
            decoded(sent, "gzip", limit)
        assert refused.value.status == status


def test_a_body_of_ever_so_many_members_is_refused_quickly() -> None:
    with pytest.raises(ApiError) as refused:
        decoded(gzip.compress(b"", mtime=0) * 50_000, "gzip", 1 << 20)
    assert refused.value.status == 400 and "64" in refused.value.message


def test_a_small_body_that_holds_a_large_one_is_too_large() -> None:
    with pytest.raises(ApiError) as refused:
        decoded(gzip.compress(b" " * 50_000_000), "gzip", 1 << 20)
    assert refused.value.status == 413


@pytest.mark.parametrize("sent", [b"", b"{}", GZIP[:-9], b"\x1f\x8b" + b"\0" * 40])
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_what_is_not_what_it_says_it_is_is_refused(encoding: str, sent: bytes) -> None:
    with pytest.raises(ApiError, match="Content-Encoding") as refused:
        decoded(sent, encoding, 1 << 20)
    assert refused.value.status == 400


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "\N{SNOWMAN}"])
def test_another_encoding_is_refused_by_its_name(encoding: str) -> None:
    with pytest.raises(ApiError, match="gzip, deflate") as refused:
        check_encoding(encoding)
    assert refused.value.status == 415
