"""A rank that holds the others up is named in time, by real processes: with its line, and what the others wait in."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from jupyter_llmcloud.storage.journal import read_all
from tests.support.worlds import AgentProcess, Ranks, Running

AFTER_S = 2.0  # of a real world: ten seconds
IN_TIME_S = AFTER_S + 3.0
PREFACE = "import ctypes, time, torch, torch.distributed as dist\n"
Test = Callable[..., None]


@dataclass
class Sent:
    """The cell of a test, sent to a world of three ranks of its own.

    Attributes:
        rank: in whose log the report is; record: the report. Of a cell that hangs.
    """

    world: Ranks
    running: Running
    rank: int = -1
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Its execution count."""
        return int(self.running.run_id.removeprefix("run-"))


def sent_first(code: str, *, hangs: bool = True, ends: bool = False, **options: Any) -> Callable[[Test], Test]:
    """The cell of a test. Those of the whole module wait at the same time.

    Args:
        hangs: it must be reported in time; then it is stopped, which its ranks survive, unless it `ends` by itself.
    """

    def remember(test: Test) -> Test:
        test.cell = (code, hangs, ends or not hangs, options)  # type: ignore[attr-defined]
        return test

    return remember


@pytest.fixture(scope="module")
def all_sent(request: pytest.FixtureRequest, node_agent: AgentProcess) -> Iterator[dict[str, Sent]]:
    """What was sent first, by the names of the tests that were asked for."""
    tests = {item.name: item.function for item in request.session.items if item.path == request.path}
    cells = {name: test.cell for name, test in tests.items() if hasattr(test, "cell")}
    worlds = {name: Ranks(node_agent, 3) for name in cells}
    sent = {name: Sent(worlds[name], send(worlds[name], cell[0], **cell[-1])) for name, cell in cells.items()}
    hanging = [each for name, each in sent.items() if cells[name][1]]
    for each in hanging:
        each.rank, each.record = report_in_time(each.running)
    stopped = [each.running.stop() for name, each in sent.items() if not cells[name][2]]
    assert [running.end().state for running in stopped] == ["stopped"] * len(stopped)
    yield sent
    for world in worlds.values():
        world.end()


@pytest.fixture
def sent(all_sent: dict[str, Sent], request: pytest.FixtureRequest) -> Sent:
    """The cell of this test: reported and stopped, if it hangs."""
    return all_sent[request.node.name]


@pytest.fixture
def three(new_world: Callable[..., Ranks]) -> Ranks:
    return new_world(3)


def send(world: Ranks, code: str, **options: Any) -> Running:
    return world.send(PREFACE + code, hang_after_s=AFTER_S, **options)


def reports(running: Running) -> list[tuple[int, dict[str, Any]]]:
    """(rank, record) of every report that was heard."""
    return [row for row in running.outcome.logs if row[1]["kind"] == "report"]


def report_of(running: Running, number: int = 1, timeout_s: float = 20.0) -> tuple[int, dict[str, Any]]:
    """(rank, record) of the first, second, ... report in the logs of a run."""
    deadline = time.monotonic() + timeout_s
    while len(reports(running)) < number:
        assert not running._take(deadline, "a report comes"), "the cell ended without a report"
    return reports(running)[number - 1]


def report_in_time(running: Running) -> tuple[int, dict[str, Any]]:
    """The first report, which comes soon."""
    found = report_of(running)
    assert time.monotonic() - running.began < IN_TIME_S
    return found


def is_not_reported(sent: Sent) -> None:
    assert sent.running.end().state == "finished"
    assert [record["text"] for _, record in reports(sent.running)] == []


@sent_first("if rank == 1:\n    time.sleep(1000)\nfor _ in range(3):\n    dist.all_reduce(torch.ones(2))")
def test_a_rank_that_sleeps_while_the_others_reduce_is_named_with_its_line(sent: Sent) -> None:
    record = sent.record
    assert record["late"] == [1]
    assert record["waiting"] == [0, 2]
    assert f"rank 1 is late: at In [{sent.number}], line 4 (time.sleep(1000)) for" in record["text"]
    assert "ranks 0,2 wait in all_reduce #" in record["text"]
    assert f"at In [{sent.number}], line 6. Press Stop to interrupt, or wait." in record["text"]


@sent_first("if rank == 2:\n    time.sleep(1000)\ndist.barrier()")
def test_a_report_is_a_record_like_any_other_and_stays_in_the_saved_log_of_the_late_rank(sent: Sent) -> None:
    assert sent.rank == 2
    assert sent.record["seq"] >= 1
    assert (2, sent.record) in list(sent.running.outcome.folder.records("logs"))


@sent_first("import queue\nif rank == 0:\n    queue.Queue().get()\ndist.barrier()")
def test_a_late_rank_inside_a_library_is_shown_there(sent: Sent) -> None:
    assert sent.record["late"] == [0]
    assert f"In [{sent.number}], line 5 (threading.py:" in sent.record["text"]


@sent_first(
    "model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))\n"
    "for step in range(5):\n"
    "    if rank == 2 and step == 3:\n"
    "        time.sleep(1000)\n"
    "    model(torch.ones(2, 4)).sum().backward()\n"
)
def test_an_absent_peer_of_a_backward_pass_is_named(sent: Sent) -> None:
    assert sent.record["late"] == [2]
    assert "ranks 0-1 wait in the gradient all_reduce of backward #" in sent.record["text"]
    assert f"at In [{sent.number}], line 7" in sent.record["text"]


def test_a_stopped_process_is_reported_and_then_its_recovery(three: Ranks) -> None:
    lines = "for i in range(10**9):\n    dist.barrier()\n    time.sleep(0.001)\n    if i == 300: print('under way')"
    running = send(three, lines).wait_for("under way", times=3)
    pid = three.pids()[1]
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        _, record = report_of(running)
        assert time.monotonic() - began < IN_TIME_S
    finally:
        os.kill(pid, signal.SIGCONT)
    assert record["late"] == [1]
    assert "its process is stopped (SIGSTOP" in record["text"]
    assert record["waiting"] == [0, 2]
    assert "in barrier #" in record["text"]
    _, over = report_of(running, 2)
    assert over["recovered"]
    assert "rank 1 goes on after" in over["text"]
    assert running.stop().end().state == "stopped"


@sent_first("if rank != 1:\n    dist.all_reduce(torch.ones(2))")
def test_a_rank_that_skipped_a_collective_is_named(sent: Sent) -> None:
    assert sent.record["late"] == [1]
    assert "it has reached the end of the cell" in sent.record["text"]


@sent_first("if rank == 0:\n    dist.recv(torch.ones(2), 1)\nelse:\n    dist.barrier()")
def test_collectives_that_can_never_meet_are_reported_as_such(sent: Sent) -> None:
    assert sent.record["late"] == []
    assert "rank 0 waits in recv" in sent.record["text"]
    assert "ranks 1-2 wait in barrier #" in sent.record["text"]


@sent_first(
    "pair = dist.new_group([0, 1])\n"
    "if rank == 1:\n    time.sleep(1000)\n"
    "if rank == 0:\n    dist.all_reduce(torch.ones(2), group=pair)\n"
)
def test_a_collective_of_a_part_of_the_ranks_waits_for_its_members_only(sent: Sent) -> None:
    assert sent.record["late"] == [1]
    assert sent.record["waiting"] == [0]


@sent_first("if rank == 1:\n    ctypes.PyDLL(None).sleep(6)\ndist.barrier()", ends=True)
def test_native_code_that_keeps_the_interpreters_lock_is_found_with_its_line(sent: Sent) -> None:
    assert sent.record["late"] == [1]
    assert "its process sleeps in native code that does not release the GIL" in sent.record["text"]
    assert f"In [{sent.number}], line 4" in sent.record["text"]
    assert sent.running.end().state == "finished"


def test_native_code_that_computes_with_the_interpreters_lock_is_called_busy(three: Ranks) -> None:
    running = send(
        three,
        "if rank == 1:\n"
        "    began = time.monotonic()\n"
        "    sum(range(10_000_000))  # how fast this machine is now\n"
        f"    sum(range(int(10_000_000 * {IN_TIME_S} / (time.monotonic() - began))))\n"
        "dist.barrier()",
    )
    _, record = report_of(running)
    assert "busy in native code that does not release the GIL" in record["text"]
    assert running.end().state == "finished"


@sent_first("dist.barrier()", ranks=[0, 2])
def test_a_rank_left_out_by_the_cell_is_named(sent: Sent) -> None:
    assert sent.record["late"] == [1]
    assert "takes no part in this cell (--ranks)" in sent.record["text"]


@sent_first(
    "time.sleep(2.5)\n"  # all alike
    "dist.barrier()\n"
    "def evaluate():\n"
    "    until = time.monotonic() + 4\n"
    "    while time.monotonic() < until:\n"
    "        torch.randn(64, 64) @ torch.randn(64, 64)\n"
    "if rank == 0:\n    evaluate()\n"
    "dist.barrier()\n",
    hangs=False,
)
def test_what_all_ranks_do_and_what_one_visibly_does_is_no_hang(sent: Sent) -> None:
    is_not_reported(sent)


@sent_first("if rank == 0:\n    time.sleep(1000)\ndist.all_reduce(torch.ones(1))")
def test_after_a_stop_the_next_cell_is_watched_again(sent: Sent) -> None:
    again = send(sent.world, "if rank == 0:\n    time.sleep(1000)\ndist.all_reduce(torch.ones(1))")
    for record in (sent.record, report_in_time(again)[1]):
        assert record["late"] == [0]
        assert "wait in all_reduce #" in record["text"]
    assert again.stop().end().state == "stopped"


def test_a_killed_world_is_not_reported_as_a_hang(node_agent: AgentProcess) -> None:
    world = Ranks(node_agent, 2)
    with contextlib.closing(world.channel):
        running = send(world, "if rank == 0:\n    time.sleep(1000)\ndist.barrier()")
        os.kill(world.pids()[0], signal.SIGKILL)
        assert running.end().state == "failed"
        assert reports(running) == []
        world.end()


def test_ranks_of_another_agent_are_watched_and_looked_at_as_well(
    node_agent: AgentProcess, follower: AgentProcess
) -> None:
    world = Ranks(node_agent, 2, shares=[(node_agent, 1), (follower, 1)])
    try:
        running = send(world, "while True:\n    dist.barrier()\n    time.sleep(0.001)")
        running.wait_for_state("running")
        pid = world.pids()[1]
        os.kill(pid, signal.SIGSTOP)
        try:
            record = report_of(running)[1]
        finally:
            os.kill(pid, signal.SIGCONT)
        assert record["late"] == [1]
        assert "its process is stopped (SIGSTOP" in record["text"]
        assert running.stop().end().state == "stopped"
    finally:
        world.end()


MODEL = "model, x = torch.nn.Linear(512, 512), torch.randn(256, 512)\n"
EVALUATES = """def evaluate():
    for _ in range(70):
        model(x).sum().item()
        time.sleep(0.05)
if rank == 0: evaluate()
dist.barrier()"""
WITHOUT_GRADIENTS = """if rank == 0:
    with torch.no_grad():
        for _ in range(70):
            model(x).sum().item()
            time.sleep(0.05)
dist.barrier()"""
SAVES = """def save_checkpoint():
    for _ in range(70):
        torch.save(model.state_dict(), '/dev/null')
        time.sleep(0.05)
if rank == 0: save_checkpoint()
dist.barrier()"""


@sent_first(MODEL + EVALUATES, hangs=False)
def test_an_evaluation_known_by_its_name_is_no_hang_while_it_works(sent: Sent) -> None:
    is_not_reported(sent)


@sent_first(MODEL + WITHOUT_GRADIENTS, hangs=False)
def test_an_evaluation_without_gradients_is_no_hang_while_it_works(sent: Sent) -> None:
    is_not_reported(sent)


@sent_first(MODEL + SAVES, hangs=False)
def test_a_checkpoint_of_one_rank_is_no_hang_while_it_works(sent: Sent) -> None:
    is_not_reported(sent)


@sent_first("if rank:\n    time.sleep(1000)\ndist.all_reduce(torch.ones(1))", ends=True, spec={"watch": "hang=stop"})
def test_a_hang_that_stops_the_run_is_said_once(sent: Sent) -> None:
    assert sent.record["text"].endswith(". The run is stopped (--watch hang=stop).\n")
    outcome = sent.running.end()
    assert outcome.state == "stopped"
    assert not [row.detail for row in outcome.states if "late" in row.detail]
    [alert] = [mark["text"] for mark in read_all(outcome.folder.marks) if mark["mark"] == "alert"]
    assert alert.endswith("; the run is stopped (--watch hang=stop)") and "Press Stop" not in alert
