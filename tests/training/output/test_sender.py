"""How text is cut into the records that leave a rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.protocol.frames import decode
from jupyter_llmcloud.training.output import sender as module
from jupyter_llmcloud.training.output.sender import MAX_WAITING, OutputSender


class Sent:
    """A sender whose own thread sleeps, and what it has sent."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.sender = OutputSender(SimpleNamespace(sendall=self._take), None)  # type: ignore[arg-type]

    def _take(self, data: bytes) -> None:
        message: Any = decode(data)
        self._texts += [record["text"] for record in message.records]

    def by(self, *texts: str) -> list[str]:
        """What its thread sends when it comes after these were written."""
        for text in texts:
            self.sender.text("stdout", text)
        self.sender.flush(may_wait=True)
        sent, self._texts = self._texts, []
        return sent


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    monkeypatch.setattr(module, "BATCH_S", 1000.0)
    return Sent()


def test_a_line_and_its_end_leave_together(sent: Sent) -> None:
    assert sent.by("printed") == []
    assert sent.by("\n") == ["printed\n"]
    assert sent.by("a\n", "b") == []
    assert sent.by("\n") == ["a\nb\n"]


def test_a_line_without_an_end_waits_once_only(sent: Sent) -> None:
    assert sent.by("50 %") == []
    assert sent.by(", 60 %") == ["50 %, 60 %"]
    assert sent.by("?") == []
    assert sent.by() == ["?"]


def test_a_line_that_waits_keeps_its_place(sent: Sent) -> None:
    assert sent.by("out") == []
    sent.sender.text("stderr", "err\n")
    assert sent.by() == ["out", "err\n"]


def test_what_is_long_does_not_wait(sent: Sent) -> None:
    long = "x" * (MAX_WAITING + 1)
    assert sent.by(long) == [long]
