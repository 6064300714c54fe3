"""What the record and the marks of a run tell beside its metrics: that it hangs, alerts, resizes, a plain Stop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from jupyter_llmcloud.protocol.agent_messages import ResizeWorld
from jupyter_llmcloud.server.api.runs import as_run
from jupyter_llmcloud.storage.journal import read_all
from jupyter_llmcloud.storage.runs import RunRecord
from tests.support.worlds import Ranks, Running, until

HANGS = "import time, torch.distributed as dist\nif rank == 1:\n    time.sleep(WAITS)\ndist.barrier()\nprint('on')\n"


def marks(running: Running, kind: str) -> list[dict[str, Any]]:
    path = running.outcome.folder.marks
    return [mark for mark in read_all(path) if mark["mark"] == kind] if path.exists() else []


def test_a_run_that_hangs_says_so_and_why_until_it_goes_on(world: Ranks) -> None:
    running = world.send(HANGS.replace("WAITS", "9") + "import time\ntime.sleep(3)\n", hang_after_s=1.0)
    folder = running.outcome.folder
    record: RunRecord = until(lambda: folder.exists and (read := folder.read()).hang and read, "the hang is recorded")
    assert record.state == "running" and record.hang["late"] == [1] and record.hang["waiting"] == [0]
    told = as_run(record, "running", {})
    assert told.hang is not None and told.hang.text.startswith("rank 1 is late: at In [")
    assert "Press Stop" not in told.hang.text
    assert as_run(record, "lost", {}).hang is None
    running.wait_for("on", 2)
    until(lambda: not folder.read().hang, "the record says that it goes on")
    assert folder.read().state == "running"
    assert running.end().record.hang == {}


def test_a_run_that_is_stopped_while_it_hangs_hangs_no_more(world: Ranks) -> None:
    running = world.send(HANGS.replace("WAITS", "1000"), hang_after_s=1.0)
    folder = running.outcome.folder
    until(lambda: folder.exists and folder.read().hang, "the hang is recorded")
    ended = running.stop().end()
    assert ended.state == "stopped" and ended.record.hang == {}


@pytest.mark.parametrize(
    "code",
    [
        "import time\nprint('go', flush=True)\ntime.sleep(1000)",
        "import torch.distributed as dist, time\nprint('go', flush=True)\nif rank:\n    time.sleep(1000)\ndist.barrier()",
    ],
    ids=["asleep", "in a collective"],
)
def test_after_a_plain_stop_no_rank_has_failed(world: Ranks, code: str) -> None:
    record = world.send(code).wait_for("go", 2).stop().end().record
    assert record.state == "stopped"
    assert {rank: record.rank_state(rank)[0] for rank in record.ranks} == {0: "stopped", 1: "stopped"}


def test_of_a_failed_run_only_the_ranks_that_failed_by_themselves_have(world: Ranks) -> None:
    record = world.run("import torch.distributed as dist\nif rank:\n    raise ValueError('no')\ndist.barrier()").record
    assert {rank: record.rank_state(rank) for rank in record.ranks} == {0: ("stopped", ""), 1: ("failed", "ValueError")}


def test_the_first_value_that_is_not_finite_is_an_alert_at_its_step(world: Ranks) -> None:
    running = world.send(
        "for step in range(6):\n    run.log(loss=float('nan') if step > 3 else 1.0, step=step)\nimport time\ntime.sleep(0.5)"
    )
    running.end()
    [mark] = marks(running, "alert")
    assert (mark["step"], mark["metric"], mark["text"]) == (4.0, "loss", "loss is NaN at step 4")


def test_the_first_run_after_a_resize_is_marked_by_it(world: Ranks) -> None:
    def resize(num_ranks: int) -> None:
        world.channel.request(ResizeWorld(world_id=world.world_id, num_ranks=num_ranks), 60)

    before, _ = (running := world.send("print(1)")), running.end()
    resize(3)
    after, _ = (running := world.send("print(2)")), running.end()
    again, _ = (running := world.send("print(3)")), running.end()
    resize(2)
    assert not marks(before, "resize") and not marks(again, "resize")
    assert [mark["text"] for mark in marks(after, "resize")] == ["the world was resized from 2 to 3 ranks"]


def test_a_background_run_is_there_as_soon_as_it_was_taken_on_and_can_be_stopped_before_it_begins(
    new_world: Callable[..., Ranks],
) -> None:
    ranks = new_world(2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks.pids()[1], signal.SIGKILL)  # so that the next cell has to wait for another rank
    running = ranks.send("import time\ntime.sleep(1000)", background=True)
    ranks.channel.receive(20)
    assert running.outcome.folder.read().is_active
    running.stop()
    until(lambda: not running.outcome.folder.read().is_active, "it has ended")
    assert running.outcome.record.state == "stopped"
