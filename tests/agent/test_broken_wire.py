"""The wire between a kernel and its ranks breaks or goes dead while a cell runs: nothing is lost, in order, once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_llmcloud.errors import ConnectionLost
from jupyter_llmcloud.magics.session import world_client as worlds
from jupyter_llmcloud.magics.session.world_client import RunResult
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.protocol.client import AgentChannel
from jupyter_llmcloud.storage.runs import RunFolder, RunStore
from tests.support.proxies import Wire
from tests.support.worlds import AgentProcess, numbered_lines, until

NUM_LINES = 200
ALL = [*range(NUM_LINES)]
CELL = f"""
import time
for i in range({NUM_LINES}):
    print("line", i)
    run.log(loss=1.0 / (i + 1), step=i)
    time.sleep(0.01)
total = i
"""


class Notebook:
    """A kernel's handle of a world whose every byte goes through a wire."""

    def __init__(self, agent: AgentProcess, path: Path) -> None:
        self.agent = agent
        self.wire = Wire(agent.address, path)
        place = {"address": agent.address, "num_ranks": 2}
        placement = {"agents": [place], "cluster": "local", "num_ranks": 2}
        world = worlds.WorldClient.start(placement, "me")
        world.channel.close()
        self.world = worlds.WorldClient(AgentChannel(self.wire.address), world.world_id, "local", 2)
        self.world.describe()  # this connection owns it now

    def run(self, name: str, code: str, **options: object) -> RunResult:
        folder = RunStore().folder(name)
        cell = Execute(
            world_id=self.world.world_id, run_id=name, name=name, code=code, folder=str(folder.path), **options
        )
        return self.world.execute(cell, [0, 1])

    def end(self) -> None:
        self.wire.mend()
        self.world.stop()
        self.wire.close()


@pytest.fixture
def notebook(node_agent: AgentProcess, own_root: Path) -> Iterator[Notebook]:
    own_root.mkdir()
    notebook = Notebook(node_agent, own_root.parent / "wire")
    yield notebook
    notebook.end()


def lines_of(folder: RunFolder) -> int:
    return sum(record.get("text", "").count("line") for rank, record in folder.records("logs") if rank == 0)


def meanwhile(*steps: object) -> threading.Thread:
    """Do things one after the other in another thread, while the cell runs in this one."""
    thread = threading.Thread(target=lambda: [step() for step in steps], daemon=True)  # type: ignore[operator]
    thread.start()
    return thread


def after(name: str, number: int):
    """Waits until a run has written so many lines, whether they were shown or not."""
    return lambda: until(lambda: lines_of(RunStore().folder(name)) >= number, f"{number} lines are written", 60)


def test_a_wire_that_is_cut_again_and_again_loses_nothing_and_repeats_nothing(
    notebook: Notebook, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = [step for number in (20, 60, 100) for step in (after("cut", number), notebook.wire.cut)]
    thread = meanwhile(*cuts)
    result = notebook.run("cut", CELL, pull=["total"])
    thread.join(10)
    assert result.state == "finished"
    assert result.pulled == {"total": NUM_LINES - 1}
    assert numbered_lines(capsys.readouterr().out) == {0: ALL, 1: ALL}
    assert notebook.wire.num_connections >= 4
    steps = [record["step"] for rank, record in RunStore().folder("cut").records("metrics") if rank == 0]
    assert steps == [*range(NUM_LINES)]


def test_a_wire_that_is_dead_for_a_while_and_then_cut_shows_the_end_that_was_missed(
    notebook: Notebook, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = lambda: until(lambda: not RunStore().folder("dead").read().is_active, "it has ended", 60)  # noqa: E731
    thread = meanwhile(
        after("dead", 20), notebook.wire.hold, after("dead", 60), notebook.wire.refuse, ended, notebook.wire.mend
    )
    result = notebook.run("dead", CELL, pull=["total"])
    thread.join(10)
    assert (result.state, result.pulled) == ("finished", {"total": NUM_LINES - 1})
    assert numbered_lines(capsys.readouterr().out) == {0: ALL, 1: ALL}
    assert notebook.run("next", "1").state == "finished"


def test_stop_is_obeyed_over_a_wire_that_was_mended_and_answered_when_it_is_not(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    press = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    endless = CELL.replace("range(200)", "range(10**6)")
    thread = meanwhile(after("mended", 20), notebook.wire.refuse, press, notebook.wire.mend)
    with pytest.raises(KeyboardInterrupt):
        notebook.run("mended", endless)
    thread.join(10)
    assert RunStore().folder("mended").read().state == "stopped"

    pressed: list[float] = []
    thread = meanwhile(after("gone", 20), notebook.wire.refuse, lambda: pressed.append(time.monotonic()), press)
    with pytest.raises(ConnectionLost, match="%runs attach gone"):
        notebook.run("gone", endless)
    assert time.monotonic() - pressed[0] < 8
    thread.join(10)
    assert RunStore().folder("gone").read().state == "running"
    notebook.wire.mend()
    assert notebook.world.describe().run_id == "gone"
    notebook.world._stop_from_elsewhere("gone")
    until(lambda: RunStore().folder("gone").read().state == "stopped", "it has stopped", 8)


def test_a_wire_that_broke_between_two_cells_is_not_noticed(notebook: Notebook) -> None:
    notebook.run("first", "kept = rank + 1")
    for call in (lambda: notebook.run("second", "kept"), lambda: notebook.world.pull(["kept"], 1)):
        notebook.wire.cut()
        call()
    notebook.wire.cut()
    assert notebook.world.describe().world_size == 2
    notebook.world.push({"more": 5})
    assert notebook.run("third", "assert more == 5 and kept == rank + 1").state == "finished"
