"""The notebook's side under impatient hands: early, late and repeated Stops, threads, large values, odd settings."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.client import stop_signal
from jupyter_llmcloud.client.stop_signal import StopSignal, said_when_stopped
from jupyter_llmcloud.core.options import parse
from jupyter_llmcloud.core.spec import DISTRIBUTE
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError
from jupyter_llmcloud.magics.session import environment_check
from jupyter_llmcloud.magics.session.cell import Cell, CellSyntaxError, check_syntax
from jupyter_llmcloud.magics.session.session import Session
from jupyter_llmcloud.magics.session.world_client import WorldClient, pickled
from jupyter_llmcloud.protocol import connection as agent_connection
from jupyter_llmcloud.protocol.agent_messages import Describe, Execute, Pulled, Push, StartWorld, StopWorld
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.rank_messages import LogRecords
from jupyter_llmcloud.storage.runs import RunFolder, RunStore
from tests.magics.test_cell import SHELL
from tests.support.worlds import AgentProcess, Ranks, until


def test_what_only_the_compiler_refuses_is_drawn_with_its_line() -> None:
    cell = Cell("x = 1\n  \nreturn x", "%%distribute\nx = 1\n  \nreturn x", 1, "cell.py", 7)
    with pytest.raises(CellSyntaxError) as caught:
        check_syntax(SHELL, cell)
    assert caught.value.drawing[:2] == ["  Cell In[7], line 4", "    return x"]


def test_a_large_answer_does_not_cut_off_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_connection, "MAX_BUFFERED", 1 << 20)

    async def closed_after(*messages: Any) -> bool:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        connection = Connection(reader, writer, "a notebook")
        for message in messages:
            connection.send(message)
            await asyncio.sleep(0)
        closed = connection.closed
        writer.transport.abort()
        theirs.close()
        return closed

    answer, note = Pulled(payload=bytes(8 << 20)), LogRecords(records=[{"text": "x" * (1 << 19)}])
    assert not asyncio.run(closed_after(answer, note, answer))
    assert asyncio.run(closed_after(answer, *[note] * 5))


def test_help_is_pointed_to_and_a_sentence_ends_once() -> None:
    with pytest.raises(UsageError, match=r"no option --help. %%distribute\? shows"):
        parse(DISTRIBUTE, ["--help"])
    with pytest.raises(UsageError, match=r"'soon' is not a duration.*2h\.$"):
        parse(DISTRIBUTE, ["--timeout", "soon"])


@pytest.fixture
def handle(node_agent: AgentProcess) -> Iterator[WorldClient]:
    """A world as a kernel holds it."""
    place = {"address": node_agent.address, "num_ranks": 2}
    world = WorldClient.start({"agents": [place], "cluster": "local", "num_ranks": 2}, "me")
    yield world
    world.stop()


def interrupted_by(monkeypatch: pytest.MonkeyPatch, world: WorldClient, method: str, after: int) -> None:
    """The next Stop comes in the middle of a message."""
    real, calls = world.channel._sock, 0

    class Sock:
        def __getattr__(self, name: str) -> Any:
            nonlocal calls
            if name == method:
                calls += 1
                if calls == after + 1:
                    raise KeyboardInterrupt
            return getattr(real, name)

    monkeypatch.setattr(world.channel, "_sock", Sock())


def test_a_stop_in_the_middle_of_a_push_or_pull_spoils_nothing(
    handle: WorldClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle.push({"small": 1, "large": bytes(20 << 20)})
    for method, ask in {
        "send": lambda: handle.push({"large": bytes(30 << 20), "never": 1}),
        "recv": lambda: handle.pull(["large"]),
    }.items():
        interrupted_by(monkeypatch, handle, method, after=1)
        with pytest.raises(KeyboardInterrupt):
            ask()
        assert handle.pull(["small"]) == {"small": 1}
    assert handle.missing(["never"]) == ["never"]
    assert len(handle.pull(["large"], 1)["large"]) == 20 << 20


def background(world: WorldClient, run_id: str, until_there: Path) -> None:
    code = f"import os, time\nwhile not os.path.exists({str(until_there)!r}): time.sleep(0.02)\nx = 'of the run'"
    cell = Execute(
        world_id=world.world_id, run_id=run_id, name=run_id, code=code, background=True, folder=_folder(run_id)
    )
    world.submit(cell)
    until(lambda: world.beside().run_id == run_id, "the run has begun")


def test_a_push_or_pull_during_a_run_says_what_it_waits_for_and_is_done_after_it(
    handle: WorldClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = tmp_path / "flag"
    background(handle, "long-1", flag)
    with ThreadPoolExecutor(3) as threads:
        waiting = [
            threads.submit(handle.push, {"x": "pushed"}),
            threads.submit(handle.pull, ["rank"]),
            threads.submit(handle.missing, ["nothing"]),
        ]
        shown = ""

        def has_said_all() -> bool:
            nonlocal shown
            shown += capsys.readouterr().out
            return shown.count("waits until the run long-1 has ended") == 3

        until(has_said_all, "all say what they wait for")
        assert not any(one.done() for one in waiting)
        assert "%push waits" in shown and "%pull waits" in shown and "%runs stop long-1" in shown
        flag.touch()
        assert [one.result(20) for one in waiting] == [None, {"rank": 0}, ["nothing"]]
    assert handle.pull(["x"]) == {"x": "pushed"}
    handle.push({"x": 2})
    assert "waits" not in capsys.readouterr().out


def test_a_push_that_was_given_up_is_not_done_later(handle: WorldClient, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    background(handle, "long-2", flag)
    channel = handle.channel
    channel.send(Push(world_id=handle.world_id, payload=pickled({"x": "given up"})))
    channel.close()
    handle._reopen_if_closed()
    flag.touch()
    assert handle.pull(["x"]) == {"x": "of the run"}


def test_threads_of_a_notebook_do_not_take_each_others_answers(handle: WorldClient) -> None:
    handle.push({"shared": 1})

    def ask(number: int) -> list[Any]:
        handle.push({f"own{number}": number})
        return [handle.pull([f"own{number}"])[f"own{number}"] for _ in range(20)]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4), timeout=30)) == [[number] * 20 for number in range(4)]
    assert handle.pull(["shared"]) == {"shared": 1}


def test_ranks_whose_notebook_has_gone_before_they_were_ready_are_ended(node_agent: AgentProcess) -> None:
    def holding() -> tuple[int, int]:
        with contextlib.closing(node_agent.channel()) as channel:
            about = channel.request(Describe())
            return len(about.worlds), about.free_slots

    before = holding()
    channel = node_agent.channel()
    share = {"address": node_agent.address, "num_ranks": 2}
    channel.send(StartWorld(world_id="abandoned", agents=[share], owner="me", lease_s=900))
    until(lambda: holding() != before, "the ranks are being started")
    channel.close()
    until(lambda: holding() == before, "they have been ended")


def test_a_stop_that_comes_early_is_told_in_one_line() -> None:
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        said_when_stopped("something"),
        said_when_stopped("nothing was run"),
    ):
        raise KeyboardInterrupt
    assert caught.value._render_traceback_() == ["KeyboardInterrupt: nothing was run"]  # type: ignore[attr-defined]


def test_presses_right_after_a_stop_mean_the_same_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = signal.getsignal(signal.SIGINT)
    before = signal.default_int_handler  # a process in the background of a shell ignores the signal
    signal.signal(signal.SIGINT, before)
    try:
        for _ in range(2):
            with StopSignal() as stop:
                signal.raise_signal(signal.SIGINT)
            assert stop.presses == 1
            signal.raise_signal(signal.SIGINT)  # swallowed
        with pytest.raises(KeyboardInterrupt), said_when_stopped("again"):
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(stop_signal.time, "monotonic", lambda: math.inf)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
        with StopSignal():
            pass
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, outside)


def test_who_waits_for_ranks_of_a_world_that_is_stopped_is_told(new_world: Callable[..., Ranks]) -> None:
    world = new_world()
    first, second = world.pids()
    os.kill(second, signal.SIGSTOP)  # it cannot join its new peer
    os.kill(first, signal.SIGKILL)
    until(lambda: world.describe()["ranks"][0]["state"] == "lost", "rank 0 is seen to be lost")
    with ThreadPoolExecutor(1) as thread, contextlib.closing(world.agent.channel()) as other:
        waiting = thread.submit(world.beside().pull, "x")
        cell = Execute(
            world_id=world.world_id,
            run_id="queued-1",
            name="queued",
            code="1",
            background=True,
            folder=_folder("queued-1"),
        )
        other.request(cell)
        other.request(StopWorld(world_id=world.world_id))
        with pytest.raises(LLMCloudError, match=r"the world .*stopped"):
            waiting.result(10)
        until(lambda: _has_ended(cell.folder), "the run in the background has ended", 10)


def _has_ended(folder: str) -> bool:
    with contextlib.suppress(NotFound):
        return not RunFolder(Path(folder)).read().is_active
    return False


def _folder(run_id: str) -> str:
    return str(RunStore().folder(run_id).path)


def test_settings_that_cannot_be_used_are_refused_in_one_line(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment_check.check()
    assert own_root.is_dir()
    file, open_to_all = own_root / "file", own_root / "open"
    file.write_text("")
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    for variable, value, words in [
        ("LLMCLOUD_ROOT", str(file), rf"{file} cannot be used \(File exists\).*Set LLMCLOUD_ROOT"),
        ("LLMCLOUD_ROOT", "/proc/none", "/proc/none cannot be used.*Set LLMCLOUD_ROOT"),
        ("LLMCLOUD_RUNTIME_DIR", "/proc/none", "/proc/none cannot be used.*Set LLMCLOUD_RUNTIME_DIR"),
        ("LLMCLOUD_RUNTIME_DIR", str(open_to_all), "closed to others.*LLMCLOUD_RUNTIME_DIR"),
        ("LLMCLOUD_RUNTIME_DIR", str(own_root / ("r" * 80)), "too long.*LLMCLOUD_RUNTIME_DIR"),
        ("LLMCLOUD_LEASE_S", "soon", "LLMCLOUD_LEASE_S='soon'"),
        ("LLMCLOUD_LEAVE_S", "later", "LLMCLOUD_LEAVE_S='later'"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(UsageError, match=words):
            patch.setenv(variable, value)
            Session().attach_world()


def test_a_root_that_can_only_be_read_is_told_as_that(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="Permission denied"):
        environment_check.check()
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(UsageError, match="Read-only file system"):
        environment_check.check()
