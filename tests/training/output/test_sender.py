"""How text is cut into the records that leave a rank."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jupyter_llmcloud.agent.ranks.local_rank import _metric_record
from jupyter_llmcloud.protocol.frames import decode, encode
from jupyter_llmcloud.protocol.rank_messages import CellEnded, LogRecords
from jupyter_llmcloud.training.output import sender as module
from jupyter_llmcloud.training.output.sender import MAX_WAITING, OutputSender
from jupyter_llmcloud.training.run import Run
from jupyter_llmcloud.training.shell.tracebacks import text_of


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


class Template(str):
    """A text of a class of its own, such as markupsafe's."""


class Written:
    """What a rank leaves in its ring, as the agent takes it."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.run = Run(OutputSender(SimpleNamespace(sendall=lambda _: None), self), 0, 1, NO_CHECKPOINTS)  # type: ignore[arg-type]

    def write(self, record: bytes) -> None:
        self.records.append(_metric_record(record))


NO_CHECKPOINTS: Any = SimpleNamespace(follows=False)


@pytest.mark.parametrize(
    ("step", "told"),
    [(np.int64(7), 7), (torch.tensor(7), 7), (np.float32(0.5), 0.5), (7, 7), (0.5, 0.5), (None, None), (10**30, 1e30)],
    ids=["numpy", "torch", "half", "int", "float", "none", "huge"],
)
def test_a_step_is_told_whatever_number_it_is(step: Any, told: Any) -> None:
    written = Written()
    written.run.log({"loss": 0.5}, step=step)
    assert [(record["step"], record["values"]) for record in written.records] == [(told, {"loss": 0.5})]


def test_metrics_are_told_by_names_whatever_the_keys_are_and_what_no_float_holds_is_left_out() -> None:
    written = Written()
    written.run.log({0: 0.5, ("a", 1): 0.25, None: 1.0})
    written.run.log({"many": 10**400, "loss": 0.5})
    assert [record["values"] for record in written.records] == [
        {"0": 0.5, "('a', 1)": 0.25, "None": 1.0},
        {"loss": 0.5},
    ]


@pytest.mark.parametrize("number", [np.int64, np.float32, torch.tensor], ids=["int64", "float32", "tensor"])
def test_a_bar_goes_on_in_steps_of_whatever_numbers(number: Any) -> None:
    written = Written()
    written.run.progress(number(3), number(12), "epoch")
    assert [record["progress"] for record in written.records] == [[3.0, 12.0]]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": np.int64(3), "b": np.float32(0.5)}, {"a": 3, "b": 0.5}),
        ([np.arange(3), {4}], [[0, 1, 2], [4]]),
        ({"at": Path("folder/file")}, {"at": "folder/file"}),
        (Template("<b>bold</b>"), "<b>bold</b>"),
        ({None: 1, True: [np.int64(2)], "n": 2**70}, {"null": 1, "true": [2], "n": 2.0**70}),
        ({"of": MappingProxyType({"a": 1})}, {"of": {"a": 1}}),
        ({None: b"abc"}, {"null": "YWJj"}),
    ],
    ids=["numbers", "arrays", "paths", "text", "keys of JSON", "views", "bytes"],
)
def test_a_display_of_what_json_does_not_know_arrives_as_in_a_notebook(value: Any, shown: Any) -> None:
    sent: list[Any] = []
    sender = OutputSender(SimpleNamespace(sendall=lambda data: sent.append(decode(data))), None)  # type: ignore[arg-type]
    sender.record({"kind": "display", "data": {"application/json": value}, "metadata": {}})
    sender.send(LogRecords(records=[]))
    assert sent[0].records[0]["data"] == {"application/json": shown}


def test_a_display_that_cannot_be_told_is_an_error_where_it_is_made_and_nothing_else_is_lost(sent: Sent) -> None:
    with pytest.raises(TypeError, match="object"):
        sent.sender.record({"kind": "display", "data": {"application/json": {"a": object()}}, "metadata": {}})
    assert sent.by("after\n") == ["after\n"]


def test_an_error_whose_text_is_of_a_class_of_its_own_can_be_told() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            return Template("odd")

    told: Any = decode(encode(CellEnded(run_id="run", error={"evalue": text_of(Odd())})))
    assert told.error["evalue"] == "odd"
