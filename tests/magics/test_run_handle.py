"""The handle of a run, by values: a folder on disk, a server that answers what it is told to."""

from __future__ import annotations

import math
import shutil
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.client.follow_run import TerminalRun
from jupyter_llmcloud.errors import LLMCloudError, NotFound, RankError, UsageError, WorldError
from jupyter_llmcloud.magics.commands import runs
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.session import run_handle
from jupyter_llmcloud.magics.session.run_handle import RunHandle
from jupyter_llmcloud.storage import log_text
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore


class Server:
    """Knows the state of every run."""

    def __init__(self, state: str) -> None:
        self.state = state

    def ask(self, method: str, path: str, timeout_s: float) -> dict[str, Any]:
        return {"state": self.state}

    def runs_and_sweeps(self, limit: int) -> list[dict[str, Any]]:
        metrics = {"loss": 0.5, "nan": None, "up": None}
        found = {"nan": {"since": 60, "value": "nan"}, "up": {"since": 1200, "value": "inf"}}
        row = {"run_id": "r-1", "name": "r", "state": "running", "created": time.time(), "ended": None}
        return [{**row, "world_size": 2, "metrics": metrics, "not_finite": found, "artifacts": {}}]

    def run(self, name: str) -> dict[str, Any]:
        return {"run_id": "r-1", "state": self.state}


class Session:
    def __init__(self, state: str) -> None:
        self.server = Server(state)


@pytest.fixture
def folder(own_root: Path) -> RunFolder:
    """A run of two ranks that goes on, as far as its folder tells."""
    folder = RunStore().folder("r-1")
    record = RunRecord("r-1", "r", "running", created=time.time() - 60, ranks=[0, 1], world_size=2, agent="/gone")
    folder.create(record, "")
    return folder


def write(folder: RunFolder, rank: int, *records: dict[str, Any]) -> None:
    writer = JournalWriter(folder.logs(rank))
    writer.append(list(records))
    writer.close()


def out(text: str, t: float, kind: str = "stdout") -> dict[str, Any]:
    return {"kind": kind, "text": text, "t": t}


def test_a_run_whose_agent_is_gone_has_ended(folder: RunFolder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_handle, "ALIVE_S", 0.0)
    write(folder, 0, out("its last words\n", 1.0))
    handle = RunHandle("r-1", lambda: Server("lost"))
    with pytest.raises(WorldError, match="r-1 was lost"):
        handle.result(5)
    assert (handle.done(), handle.state) == (True, "lost")
    handle.attach()
    shown = capsys.readouterr().out
    assert "[0] its last words\n" in shown
    assert "its agent has gone" in shown


class EndsMeanwhile(Server):
    """The run ends while Stop is on its way; `error` is what is answered then."""

    def __init__(self, folder: RunFolder, error: LLMCloudError, state: str) -> None:
        super().__init__("running")
        self.folder, self.error, self.end = folder, error, state

    def stop_run(self, run_id: str) -> str:
        record = self.folder.read()
        record.state = self.end
        self.folder.write(record)
        raise self.error


@pytest.mark.parametrize("error", [NotFound("run 'r-1' has ended."), UsageError("run 'r-1' is not active.")])
def test_a_run_that_ends_while_stop_is_on_its_way_was_not_cancelled(folder: RunFolder, error: LLMCloudError) -> None:
    handle = RunHandle("r-1", lambda: EndsMeanwhile(folder, error, "finished"))
    assert (handle.cancel(), handle.cancel(), handle.state) == (False, False, "finished")
    assert handle.result(1).state == "finished"


def test_a_stop_that_is_refused_while_the_run_goes_on_says_why(folder: RunFolder) -> None:
    handle = RunHandle(
        "r-1", lambda: EndsMeanwhile(folder, UsageError("interrupt the kernel that starts them"), "running")
    )
    with pytest.raises(UsageError, match="interrupt the kernel"):
        handle.cancel()


def test_a_run_that_goes_on_is_not_done(folder: RunFolder, monkeypatch) -> None:
    monkeypatch.setattr(run_handle, "ALIVE_S", 0.0)
    handle = RunHandle("r-1", lambda: Server("running"))
    assert not handle.done()
    with pytest.raises(TimeoutError):
        handle.result(0.1)


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ("finished", None, ""),
        ("stopped", CancelledError, "was stopped"),
        ("failed", RankError, "rank 1: ValueError: too much"),
    ],
)
def test_a_handle_is_a_future(folder: RunFolder, state: str, error: type[Exception] | None, words: str) -> None:
    handle = RunHandle("r-1", lambda: Server("running"))
    assert (handle.running(), handle.cancelled()) == (True, False)
    record = folder.read()
    record.state, record.ended = state, record.created + 7
    record.errors = [{"rank": 1, "ename": "ValueError", "evalue": "too much", "traceback": []}] * (state == "failed")
    folder.write(record)
    assert (handle.done(), handle.running(), handle.cancelled()) == (True, False, state == "stopped")
    if error is None:
        assert handle.exception() is None
        assert repr(handle.result()) == "<Run r-1: finished after 7.0 s, 2 of 2 ranks>"
        return
    assert isinstance(handle.exception(), error) and words in str(handle.exception())
    with pytest.raises(error, match=words):
        handle.result()


def test_output_that_is_shown_afterwards_is_folded_by_the_times_it_was_written_at(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_handle, "ALIVE_S", 0.0)
    lines = [f"step {n}\n" for n in range(2_000)]
    for rank in (0, 1):
        write(folder, rank, *(out(line, n * 0.5 + rank * 0.01) for n, line in enumerate(lines)))
    RunHandle("r-1", lambda: Server("lost")).attach()
    shown = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert shown == [f"[0-1] {line.strip()}" for line in lines]


def test_the_text_of_the_log_is_complete_and_in_order_of_time(folder: RunFolder) -> None:
    write(folder, 0, out("a", 1.0), out("b\nerr", 2.0), out("or\nunended", 5.0))
    write(
        folder,
        1,
        out("c\n", 1.5),
        {"kind": "result", "data": {"text/plain": "7\n8"}, "t": 3.0},
        out("w\n", 4.0, "stderr"),
    )
    expected = ["[1] c", "[0] ab", "[1] 7", "[1] 8", "[1] w", "[0] error", "[0] unended"]
    assert log_text.write(folder).read_text().splitlines() == expected
    handle = RunHandle("r-1", lambda: Server("running"))
    assert handle.logs().splitlines() == expected
    assert handle.logs(rank=1, tail=2).splitlines() == ["[1] 8", "[1] w"]


def test_the_text_of_the_log_is_written_again_when_there_is_more(folder: RunFolder) -> None:
    write(folder, 0, out("a\n", 1.0))
    log_text.write(folder)
    write(folder, 0, out("b\n", 2.0))
    assert log_text.write(folder).read_text() == "[0] a\n[0] b\n"


def test_a_metric_that_is_not_finite_is_listed(monkeypatch) -> None:
    monkeypatch.setattr(runs.session, "current", lambda: Session("running"))
    assert "loss 0.5, nan NaN since step 60, up infinite since step 1,200" in repr(runs.table())


LATE = "rank 1 is late: at In [3], line 4 for 5 s; rank 0 waits in barrier #3. Press Stop to interrupt, or wait."


def test_a_run_is_shown_with_its_metrics_chart_warnings_and_hang_reports(folder: RunFolder, monkeypatch) -> None:
    monkeypatch.setattr(runs.session, "current", lambda: Session("stopped"))
    record = folder.read()
    record.state, record.ended = "stopped", record.created + 7
    folder.write(record)
    for rank in (0, 1):
        metrics = JournalWriter(folder.metrics(rank))
        metrics.append([{"step": n, "values": {"loss": 2.0 + rank if n < 8 else math.nan}} for n in range(10)])
        metrics.append([{"step": n, "values": {"lr": 0.5**n}} for n in range(10)] if rank == 0 else [])
        metrics.close()
        write(folder, rank, out('said "kind":"report"\n', 1.0), {**out("Mind <the> gap\n", 2.0), "warning": True})
    write(folder, 1, {"kind": "report", "text": LATE + "\n", "late": [1], "waiting": [0], "t": 3.0})
    shown = runs.show("r")
    for text in (repr(shown), shown._repr_html_()):
        for words in (
            "stopped after 7.0 s",
            "loss is NaN since step 8",
            "rank 1 is late: at In [3], line 4",
            "barrier #3",
        ):
            assert words in text
        assert "Press Stop" not in text and "said" not in text
    assert "ranks 0-1: Mind <the> gap" in repr(shown) and "ranks 0-1: Mind &lt;the&gt; gap" in shown._repr_html_()
    assert "0.001953" in repr(shown) and "rank 0: NaN · rank 1: NaN" not in repr(shown)
    assert shown._repr_html_().count("<img") == 2


def test_text_is_at_the_left_of_a_table_and_numbers_at_the_right() -> None:
    table = Table(["name", "ranks"], [["a", 2], ["long", 16]], "")
    assert repr(table) == "name  ranks\na         2\nlong     16"
    assert '<td align="left" style="text-align:left">a</td>' in table._repr_html_()
    assert '<td align="right" style="text-align:right">16</td>' in table._repr_html_()


class Growing(RunHandle):
    """A run that gets a third rank after the first look at it."""

    num_looks = 0

    def _has_ended(self, record: RunRecord) -> bool:
        self.num_looks += 1
        if self.num_looks == 2:
            write(self.folder, 2, out("of the third rank\n", 2.0))
            grown = RunRecord("r-1", "r", "finished", record.created, time.time(), [0, 1, 2], 3)
            self.folder.write(grown)
        return super()._has_ended(record)


def test_what_ranks_write_that_an_elastic_run_gets_later_is_shown(folder: RunFolder, capsys) -> None:
    write(folder, 0, out("of the first rank\n", 1.0))
    Growing("r-1", lambda: Server("running")).follow_logs()  # type: ignore[arg-type,return-value]
    told = capsys.readouterr().out
    assert "of the first rank" in told and "[2] of the third rank" in told


def test_a_terminal_shows_them_too(folder: RunFolder, capsys) -> None:
    write(folder, 0, out("of the first rank\n", 1.0))

    class Growing(TerminalRun):
        num_looks = 0

        def _has_ended(self, record: RunRecord) -> bool:
            self.num_looks += 1
            if self.num_looks == 2:
                write(folder, 2, out("of the third rank\n", 2.0))
                folder.write(RunRecord("r-1", "r", "finished", record.created, time.time(), [0, 1, 2], 3))
            return not record.is_active

    Growing(Server("running"), folder).follow()  # type: ignore[arg-type]
    assert "[2] of the third rank" in capsys.readouterr().out


def test_a_run_that_was_deleted_is_waited_for_no_longer(folder: RunFolder, monkeypatch) -> None:
    monkeypatch.setattr(run_handle, "GONE_S", 0.1)
    handle = RunHandle("r-1", lambda: Server("running"))
    assert handle.state == "running"
    shutil.rmtree(folder.path)
    with pytest.raises(NotFound, match="r-1 was deleted"):
        handle.result(5)
    assert (handle.done(), handle.state, handle.cancel()) == (True, "deleted", False)
    assert RunHandle("r-2", lambda: Server("running")).state == "queued"  # whose record is not there yet


def test_what_is_logged_as_rank_or_time_takes_no_column_of_ours(folder: RunFolder) -> None:
    writer = JournalWriter(folder.metrics(1))
    writer.append([{"t": 5.0, "step": 3, "values": {"rank": 8.0, "t": 0.5, "step": 30.0, "loss": 1.0}}])
    writer.append([{"t": 6.0, "step": None, "values": {"step": 31.0, "loss": 0.5}}])
    writer.close()
    frame = RunHandle("r-1", lambda: Server("running")).metrics()
    assert (list(frame["rank"]), list(frame["t"]), list(frame["step"])) == ([1, 1], [5.0, 6.0], [3, 31])
    first = frame.iloc[0]
    assert (first["rank (logged)"], first["t (logged)"], first["step (logged)"]) == (8.0, 0.5, 30.0)


def test_a_terminal_whose_reader_has_gone_says_that_the_run_goes_on(folder: RunFolder, monkeypatch, capsys) -> None:
    class Broken:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None: ...

    write(folder, 0, out("a line\n", 1.0))
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", Broken())
        with pytest.raises(BrokenPipeError):
            TerminalRun(Server("running"), folder).follow()
    assert "The run goes on: jupyter llmcloud runs attach r-1" in capsys.readouterr().err
