"""A rank that holds the others up is named in time, by real processes: with its line, and what the others wait in."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import pytest

from jupyter_llmcloud.core.messages import Journaled
from tests.worlds import AgentProcess, Ranks, Running

AFTER_S = 2.0  # of a real world: ten seconds
IN_TIME_S = AFTER_S + 3.0
PREFACE = "import ctypes, time, torch, torch.distributed as dist\n"


@pytest.fixture
def three(new_world) -> Ranks:
    return new_world(3)


def send(world: Ranks, code: str, **options: Any) -> Running:
    return world.send(PREFACE + code, hang_after_s=AFTER_S, **options)


def cell_of(running: Running) -> int:
    """The execution count of its cell."""
    return int(running.run_id.removeprefix("run-"))


def report_of(running: Running, number: int = 1, timeout_s: float = 20.0) -> tuple[int, dict[str, Any]]:
    """(rank, record) of the first, second, ... report in the logs of a run."""
    deadline = time.monotonic() + timeout_s

    def reports() -> list[tuple[int, dict[str, Any]]]:
        return [row for row in running.outcome.logs if row[1]["kind"] == "report"]

    while len(reports()) < number:
        assert not running._take(deadline, "a report comes"), "the cell ended without a report"
    return reports()[number - 1]


def reported(running: Running) -> dict[str, Any]:
    """The first report; the run is stopped afterwards, and the ranks survive it."""
    _, record = report_of(running)
    seconds = time.monotonic() - running.began
    outcome = running.stop().end()
    assert outcome.state == "stopped", outcome
    assert seconds < IN_TIME_S
    return record


def test_a_rank_that_sleeps_while_the_others_reduce_is_named_with_its_line(three: Ranks) -> None:
    running = send(three, "if rank == 1:\n    time.sleep(1000)\nfor _ in range(3):\n    dist.all_reduce(torch.ones(2))")
    record = reported(running)
    assert record["late"] == [1]
    assert record["waiting"] == [0, 2]
    assert f"rank 1 is late: at In [{cell_of(running)}], line 4 (time.sleep(1000)) for" in record["text"]
    assert "ranks 0,2 wait in all_reduce #" in record["text"]
    assert f"at In [{cell_of(running)}], line 6. Press Stop to interrupt, or wait." in record["text"]


def test_the_report_stays_in_the_saved_log_of_the_late_rank(three: Ranks) -> None:
    running = send(three, "if rank == 2:\n    time.sleep(1000)\ndist.barrier()")
    rank, record = report_of(running)
    outcome = running.stop().end()
    assert rank == 2
    assert (2, record) in list(outcome.folder.records("logs"))


def test_a_late_rank_inside_a_library_is_shown_there(three: Ranks) -> None:
    running = send(three, "import queue\nif rank == 0:\n    queue.Queue().get()\ndist.barrier()")
    record = reported(running)
    assert record["late"] == [0]
    assert f"In [{cell_of(running)}], line 5 (threading.py:" in record["text"]


def test_an_absent_peer_of_a_backward_pass_is_named(three: Ranks) -> None:
    running = send(
        three,
        "model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))\n"
        "for step in range(5):\n"
        "    if rank == 2 and step == 3:\n"
        "        time.sleep(1000)\n"
        "    model(torch.ones(2, 4)).sum().backward()\n",
    )
    record = reported(running)
    assert record["late"] == [2]
    assert "ranks 0-1 wait in the gradient all_reduce of backward #" in record["text"]
    assert f"at In [{cell_of(running)}], line 7" in record["text"]


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


def test_a_rank_that_skipped_a_collective_is_named(three: Ranks) -> None:
    record = reported(send(three, "if rank != 1:\n    dist.all_reduce(torch.ones(2))"))
    assert record["late"] == [1]
    assert "it has reached the end of the cell" in record["text"]


def test_collectives_that_can_never_meet_are_reported_as_such(three: Ranks) -> None:
    running = send(three, "if rank == 0:\n    dist.recv(torch.ones(2), 1)\nelse:\n    dist.barrier()")
    record = reported(running)
    assert record["late"] == []
    assert "rank 0 waits in recv" in record["text"]
    assert "ranks 1-2 wait in barrier #" in record["text"]


def test_a_collective_of_a_part_of_the_ranks_waits_for_its_members_only(three: Ranks) -> None:
    running = send(
        three,
        "pair = dist.new_group([0, 1])\n"
        "if rank == 1:\n    time.sleep(1000)\n"
        "if rank == 0:\n    dist.all_reduce(torch.ones(2), group=pair)\n",
    )
    record = reported(running)
    assert record["late"] == [1]
    assert record["waiting"] == [0]


def test_native_code_that_keeps_the_interpreters_lock_is_found_with_its_line(three: Ranks) -> None:
    running = send(three, "if rank == 1:\n    ctypes.PyDLL(None).sleep(6)\ndist.barrier()")
    _, record = report_of(running)
    assert time.monotonic() - running.began < IN_TIME_S
    assert record["late"] == [1]
    assert "its process sleeps in native code that does not release the GIL" in record["text"]
    assert f"In [{cell_of(running)}], line 4" in record["text"]
    assert running.end().state == "finished"


def test_native_code_that_computes_with_the_interpreters_lock_is_called_busy(three: Ranks) -> None:
    running = send(
        three,
        "if rank == 1:\n"
        "    began = time.monotonic()\n"
        "    sum(range(10_000_000))  # how fast this machine is now\n"
        "    sum(range(int(10_000_000 * 8 / (time.monotonic() - began))))\n"
        "dist.barrier()",
    )
    _, record = report_of(running)
    assert "busy in native code that does not release the GIL" in record["text"]
    assert running.end().state == "finished"


def test_a_rank_left_out_by_the_cell_is_named(three: Ranks) -> None:
    record = reported(send(three, "dist.barrier()", ranks=[0, 2]))
    assert record["late"] == [1]
    assert "takes no part in this cell (--ranks)" in record["text"]


def test_what_all_ranks_do_and_what_one_visibly_does_is_no_hang(three: Ranks) -> None:
    outcome = send(
        three,
        "time.sleep(2.5)\n"  # all alike
        "dist.barrier()\n"
        "def evaluate():\n"
        "    until = time.monotonic() + 4\n"
        "    while time.monotonic() < until:\n"
        "        torch.randn(64, 64) @ torch.randn(64, 64)\n"
        "if rank == 0:\n    evaluate()\n"
        "dist.barrier()\n",
    ).end()
    assert outcome.state == "finished"
    assert [record for _, record in outcome.logs if record["kind"] == "report"] == []


def test_after_a_stop_the_next_cell_is_watched_again(three: Ranks) -> None:
    for _ in range(2):
        record = reported(send(three, "if rank == 0:\n    time.sleep(1000)\ndist.all_reduce(torch.ones(1))"))
        assert record["late"] == [0]
        assert "wait in all_reduce #" in record["text"]


def test_a_killed_world_is_not_reported_as_a_hang(node_agent) -> None:
    world = Ranks(node_agent, 2)
    with contextlib.closing(world.channel):
        running = send(world, "if rank == 0:\n    time.sleep(1000)\ndist.barrier()")
        os.kill(world.pids()[0], signal.SIGKILL)
        outcome = running.end()
        assert outcome.state == "failed"
        assert [record for _, record in outcome.logs if record["kind"] == "report"] == []
        world.end()


def test_a_report_is_a_record_of_the_journal_like_any_other(three: Ranks) -> None:
    running = send(three, "if rank == 1:\n    time.sleep(1000)\ndist.barrier()")
    heard: list[Journaled] = []
    while not heard:
        message = three.channel.receive(20)
        if isinstance(message, Journaled) and message.records[0]["kind"] == "report":
            heard.append(message)
    assert heard[0].rank == 1
    assert heard[0].records[0]["seq"] >= 1
    running.stop().end()


def test_ranks_of_another_agent_are_watched_and_looked_at_as_well(node_agent) -> None:
    other = AgentProcess()
    world = Ranks(node_agent, 2, shares=[(node_agent, 1), (other, 1)])
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
        other.end()


@pytest.mark.parametrize(
    "alone",
    [
        "def evaluate():\n    for _ in range(70):\n        model(x).sum().item()\n        time.sleep(0.05)\n"
        "if rank == 0: evaluate()\n",
        "if rank == 0:\n    with torch.no_grad():\n        for _ in range(70):\n            model(x).sum().item()\n"
        "            time.sleep(0.05)\n",
        "def save_checkpoint():\n    for _ in range(70):\n        torch.save(model.state_dict(), '/dev/null')\n"
        "        time.sleep(0.05)\nif rank == 0: save_checkpoint()\n",
    ],
    ids=["evaluation by its name", "evaluation without gradients", "checkpoint"],
)
def test_what_one_rank_does_alone_is_no_hang_while_it_works(three: Ranks, alone: str) -> None:
    setup = "model, x = torch.nn.Linear(512, 512), torch.randn(256, 512)\n"
    outcome = send(three, setup + alone + "dist.barrier()").end()
    assert outcome.state == "finished"
    assert [record["text"] for _, record in outcome.logs if record["kind"] == "report"] == []
