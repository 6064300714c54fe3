"""What a stream has cost, behind its last event: the client gets every other byte, and not one of this."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.serving.usage.stream_usage import UsageCut, usage_comment

EVENTS = b'data: {"text":"a: usage {}\\n\\n: usage "}\n\n: a comment of others\n\ndata: [DONE]\n\n'


def _copied(pieces: list[bytes]) -> tuple[bytes, UsageCut]:
    cut = UsageCut()
    passed = b"".join([*(cut.feed(piece) for piece in pieces), cut.rest()])
    return passed, cut


def test_the_comment_is_cut_off_wherever_the_pieces_end() -> None:
    """Pieces of every length, and two pieces cut at every byte."""
    whole = EVENTS + usage_comment(30, 500)
    by_length = [[whole[at : at + length] for at in range(0, len(whole), length)] for length in range(1, 40)]
    by_place = [[whole[:at], whole[at:]] for at in range(1, len(whole))]
    for pieces in [*by_length, *by_place]:
        passed, cut = _copied(pieces)
        assert passed == EVENTS, pieces
        assert cut.usage() == (30, 500), pieces


@pytest.mark.parametrize("stream", [b"", EVENTS, b"data: x\n\n: us", b"data: x\n", b": usage", b"a : usage {}\n\n"])
def test_a_stream_without_it_is_passed_on_whole(stream: bytes) -> None:
    """Also one that ends in the middle of something."""
    for length in (1, 3, 1000):
        passed, cut = _copied([stream[at : at + length] for at in range(0, len(stream), length)])
        assert passed == stream
        assert cut.usage() is None


def test_a_whole_event_is_never_held_back() -> None:
    """It would reach its reader only with the next one."""
    cut = UsageCut()
    assert cut.feed(b"data: 1\n\n") == b"data: 1\n\n"
    assert cut.feed(b"data: 2\n\ndata: 3\n\n") == b"data: 2\n\ndata: 3\n\n"


@pytest.mark.parametrize("told", [b": usage \n\n", b": usage {}\n\n", b': usage {"prompt_tokens":3', b": usage []\n\n"])
def test_a_comment_that_is_not_whole_tells_nothing(told: bytes) -> None:
    """And reaches no client either."""
    passed, cut = _copied([EVENTS + told])
    assert passed == EVENTS
    assert cut.usage() is None
