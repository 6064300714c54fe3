"""Worlds, runs and the agent itself live and end as promised, whoever is connected."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from jupyter_llmcloud.agent.__main__ import environment
from jupyter_llmcloud.errors import (
    CapacityError,
    ConnectionLost,
    LLMCloudError,
    NameTaken,
    NotFound,
    ProtocolError,
    UsageError,
)
from jupyter_llmcloud.protocol.agent_messages import (
    Describe,
    RunEnded,
    ScaleCluster,
    StartWorld,
    StopRun,
    StopWorld,
    Submitted,
    Subscribe,
)
from jupyter_llmcloud.protocol.client import AgentChannel
from jupyter_llmcloud.protocol.frames import PROTOCOL_VERSION
from jupyter_llmcloud.protocol.rpc import Refused
from tests.support.worlds import NUM_SLOTS, AgentProcess, Ranks, alive, family, until

# --- memory ---


@pytest.mark.alone
def test_ranks_share_what_was_imported_and_nobody_holds_what_only_imports_ran(world: Ranks) -> None:
    world.ok("import torch\nassert torch.ones(64, 64).matmul(torch.ones(64, 64)).sum() == 64**3")
    rank = psutil.Process(world.pids()[0])
    zygote = rank.parent()
    assert zygote is not None
    assert 0 < _held(zygote.pid, "Rss", "r-xp") < _held(rank.pid, "Rss", "r-xp")
    assert _held(rank.pid, "Private_Dirty") < _held(rank.pid, "Rss") / 8


def test_what_an_agent_starts_gets_an_allocator_for_training_and_keeps_what_its_user_has_set(world: Ranks) -> None:
    given = environment(psutil.Process(world.pids()[0]).environ())
    assert (given["GLIBC_TUNABLES"], given["MALLOC_TRIM_THRESHOLD_"]) == ("glibc.malloc.hugetlb=1", str(1 << 30))
    own = environment({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2", "OMP_WAIT_POLICY": "ACTIVE", "HOME": "/h"})
    assert own["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"
    assert (own["OMP_WAIT_POLICY"], own["OMP_NUM_THREADS"], own["HOME"]) == ("ACTIVE", "1", "/h")
    assert environment({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"})["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=2"


def _held(pid: int, field: str, permissions: str = "") -> int:
    """KiB of memory that a process holds of a kind, in all its mappings or in those with such permissions."""
    total = 0
    is_wanted = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            is_wanted = not permissions or (rest[0] == permissions and rest[-1].startswith("/"))
        elif is_wanted and first == f"{field}:":
            total += int(rest[0])
    return total


# --- runs ---


def test_a_run_leaves_a_folder_that_tells_everything(world: Ranks) -> None:
    outcome = world.ok("print('seen')\nrun.log(loss=1.5)", name="told", spec={"ranks": "0-1"}, owner="me")
    folder = outcome.folder
    assert {path.name for path in folder.path.iterdir()} == {"run.json", "cell.py", "logs", "metrics"}
    assert folder.source() == "%%distribute\nprint('seen')\nrun.log(loss=1.5)"
    record = folder.read()
    assert (record.name, record.state, record.ranks, record.world_size) == ("told", "finished", [0, 1], 2)
    assert [row["state"] for row in record.history if "state" in row] == ["running", "finished"]
    assert record.ended is not None and record.created <= record.ended <= time.time()
    assert sorted((rank, row["text"]) for rank, row in folder.records("logs")) == [(0, "seen\n"), (1, "seen\n")]
    assert [row["values"] for _, row in folder.records("metrics")] == [{"loss": 1.5}] * 2
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.logs(0).stat().st_mode) == 0o600


def test_what_is_heard_is_what_is_on_disk(world: Ranks) -> None:
    outcome = world.ok("for i in range(300):\n    run.log(i=i)\n    print(i)")
    for kind, heard in (("logs", outcome.logs), ("metrics", outcome.metrics)):
        for rank in (0, 1):
            on_disk = [row for number, row in outcome.folder.records(kind) if number == rank]
            assert [row for number, row in heard if number == rank] == on_disk
            assert [row["seq"] for row in on_disk] == list(range(1, len(on_disk) + 1))
    assert outcome.values("i", 1) == [float(i) for i in range(300)]


def test_a_background_run_goes_on_while_nobody_is_connected(node_agent: AgentProcess) -> None:
    ranks = Ranks(node_agent)
    running = ranks.send("import time\nfor i in range(20):\n    run.log(i=i)\n    time.sleep(0.01)", background=True)
    assert isinstance(ranks.channel.receive(5), Submitted)
    ranks.channel.close()
    folder = running.outcome.folder
    until(lambda: (folder.path / "run.json").exists() and not folder.read().is_active, "the run has ended")
    assert folder.read().state == "finished"
    assert len(list(folder.records("metrics"))) == 40
    with contextlib.closing(node_agent.channel()) as other:
        other.request(StopWorld(world_id=ranks.world_id))


def test_a_foreground_run_goes_on_when_its_kernel_dies(node_agent: AgentProcess, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    ranks = Ranks(node_agent)
    running = ranks.send(f"import os, time\nprint('begun')\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.01)")
    running.wait_for("begun", times=2)
    ranks.channel.close()
    flag.touch()
    folder = running.outcome.folder
    until(lambda: not folder.read().is_active, "the run has ended")
    assert folder.read().state == "finished"
    with contextlib.closing(node_agent.channel()) as other:
        other.request(StopWorld(world_id=ranks.world_id))


def test_a_running_run_can_be_followed_from_elsewhere(world: Ranks, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    running = world.send(f"import os, time\nprint('begun')\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.01)")
    running.wait_for("begun", times=2)
    with contextlib.closing(world.agent.channel()) as other:
        other.request(Subscribe(run_id=running.run_id))
        flag.touch()
        while not isinstance(message := other.receive(20), RunEnded):
            assert message is not None
        assert (message.run_id, message.state) == (running.run_id, "finished")
    running.end()


def test_a_second_run_waits_and_says_for_what(world: Ranks, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    first = world.send(f"import os, time\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.01)\nwho = 'first'")
    other = world.beside()
    second = other.send("who += ' second'")
    assert first.run_id in second.wait_for_state("queued").detail
    flag.touch()
    assert (first.end().state, second.end().state) == ("finished", "finished")
    assert world.ok("who").results() == ["'first second'"] * 2
    other.channel.close()


def test_a_background_run_that_was_stopped_in_the_queue_has_an_end(world: Ranks) -> None:
    first = world.send("import time\nprint('in it')\ntime.sleep(100)").wait_for("in it", times=2)
    other = world.beside()
    second = other.send("never = 1", background=True)
    until(lambda: isinstance(other.channel.receive(5), Submitted), "it is accepted")
    assert second.outcome.folder.read().state == "queued"
    second.stop()
    until(lambda: second.outcome.folder.read().state == "stopped", "its end is recorded")
    first.stop().end()
    other.channel.close()


def test_stopping_a_run_that_has_ended_is_refused(world: Ranks) -> None:
    outcome = world.ok("1")
    with pytest.raises(NotFound, match="has ended"):
        world.channel.request(StopRun(run_id=outcome.ended.run_id))


# --- worlds ---


def test_two_worlds_on_one_agent_do_not_see_each_other(new_world: Callable[..., Ranks]) -> None:
    one, two = new_world(), new_world(3)
    one.ok("mine = 'one'")
    assert two.ok("'mine' in globals()").results() == ["False"] * 3
    code = "import torch, torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\nint(t)"
    first, second = one.send(code), two.send(code)
    assert (first.end().results(), second.end().results()) == (["2", "2"], ["3", "3", "3"])


def test_one_rank_is_a_world_too(new_world: Callable[..., Ranks]) -> None:
    code = "import torch, torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\n(int(t), world_size)"
    assert new_world(1).ok(code).results() == ["(1, 1)"]


def test_a_part_of_the_ranks_runs_a_cell_alone(new_world: Callable[..., Ranks]) -> None:
    world = new_world(4)
    outcome = world.ok("part = rank\nrank", ranks=[1, 3])
    assert outcome.results() == ["1", "3"]
    assert world.ok("'part' in globals()").results() == ["False", "True", "False", "True"]


def test_more_ranks_than_slots_are_refused_and_nothing_is_held(node_agent: AgentProcess) -> None:
    free = _free(node_agent)
    with pytest.raises(CapacityError, match=str(NUM_SLOTS + 1)):
        Ranks(node_agent, NUM_SLOTS + 1)
    assert _free(node_agent) == free


def test_a_world_gives_its_slots_back(node_agent: AgentProcess) -> None:
    free = _free(node_agent)
    ranks = Ranks(node_agent, 2)
    pids = ranks.pids()
    assert _free(node_agent) == free - 2
    ranks.end()
    assert _free(node_agent) == free
    until(lambda: not any(map(alive, pids)), "the ranks have ended", 5)


def test_the_name_of_a_world_is_taken_once(world: Ranks) -> None:
    with pytest.raises(NameTaken):
        world.channel.request(
            StartWorld(world_id=world.world_id, agents=[{"address": world.agent.address, "num_ranks": 1}])
        )
    world.ok("1")


def test_a_world_ended_under_a_running_cell_ends_the_run(node_agent: AgentProcess) -> None:
    ranks = Ranks(node_agent)
    running = ranks.send("import time\nprint('in it')\ntime.sleep(100)").wait_for("in it", times=2)
    ranks.beside().channel.request(StopWorld(world_id=ranks.world_id))
    assert running.end(10).state == "stopped"
    assert not running.outcome.folder.read().is_active
    ranks.channel.close()


def test_a_world_without_an_owner_ends_with_its_lease(node_agent: AgentProcess) -> None:
    ranks = Ranks(node_agent, 1, lease_s=0.5)
    [pid] = ranks.pids()
    ranks.channel.close()
    until(lambda: not alive(pid), "the lease ends the world", 8)


def test_a_world_whose_owner_lives_outlasts_its_lease(node_agent: AgentProcess) -> None:
    ranks, other = Ranks(node_agent, 1, lease_s=0.1), Ranks(node_agent, 1, lease_s=0.1)
    [pid] = other.pids()
    other.channel.close()
    until(lambda: not alive(pid), "a lease of a world that was made later has ended", 8)
    assert ranks.ok("rank").results() == ["0"]
    ranks.end()


# --- the agent ---


def test_the_agent_listens_for_its_user_only(node_agent: AgentProcess) -> None:
    mode = stat.S_IMODE(os.stat(node_agent.address).st_mode)
    assert mode & 0o077 == 0
    for pid in family(node_agent.process.pid):
        try:
            rows = psutil.Process(pid).net_connections("inet")
        except psutil.NoSuchProcess:  # has ended meanwhile
            continue
        for row in rows:
            assert row.laddr.ip.removeprefix("::ffff:") in ("127.0.0.1", "::1"), row


def test_the_agent_has_no_torch(node_agent: AgentProcess) -> None:
    maps = Path(f"/proc/{node_agent.process.pid}/maps").read_text()
    assert "libtorch" not in maps


def test_an_agent_without_worker_and_work_ends_with_its_lease(own_agent: Callable[..., AgentProcess]) -> None:
    agent = own_agent(env={"LLMCLOUD_LEASE_S": "0.5"})
    agent.let_go()
    assert agent.process.wait(10) == 0


def test_an_agent_that_works_outlasts_its_worker(own_agent: Callable[..., AgentProcess], tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    agent = own_agent(env={"LLMCLOUD_LEASE_S": "0.2"})
    ranks = Ranks(agent, 1, lease_s=0.2)
    running = ranks.send(f"import os, time\nprint('in it')\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.01)")
    running.wait_for("in it")
    agent.let_go()
    ranks.channel.close()
    with pytest.raises(Exception, match="timed out"):
        agent.process.wait(1.0)
    flag.touch()
    until(lambda: not running.outcome.folder.read().is_active, "the run has ended")
    assert running.outcome.folder.read().state == "finished"
    assert agent.process.wait(10) == 0


def test_an_agent_that_is_asked_to_end_leaves_nothing(own_agent: Callable[..., AgentProcess]) -> None:
    agent = own_agent()
    ranks = Ranks(agent)
    assert ranks.ok("rank").results() == ["0", "1"]
    everybody = family(agent.process.pid)
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(10) == 0
    until(lambda: not any(map(alive, everybody)), "all its processes have ended", 5)
    assert not (agent.folder / "agent.sock").exists()
    ranks.channel.close()


def test_garbage_on_the_socket_is_refused_and_hurts_nobody(world: Ranks) -> None:
    for garbage, words in (
        (b"GET / HTTP/1.1\r\n\r\n", "does not speak our protocol"),
        (b"\xff" * 64, "does not speak our protocol"),
        (b'\0\0\0\x0b\0\0\0\0{"type":1}', "does not speak our protocol.*an older version"),
        (struct.pack("!2sHII", b"LC", 99, 0, 0), "speaks version 99 of the protocol"),
        (struct.pack("!2sHII", b"LC", PROTOCOL_VERSION, 2, 0) + b"\xc1\xc1", "header cannot be read"),
    ):
        with contextlib.closing(AgentChannel(world.agent.address)) as channel:
            channel._sock.sendall(garbage + b"\0" * 64)
            with pytest.raises(ProtocolError, match=words):
                channel.receive(10)
            with pytest.raises(ConnectionLost):
                channel.receive(10)
    assert world.ok("rank").results() == ["0", "1"]


def test_a_request_of_a_later_version_is_refused_and_the_connection_goes_on(world: Ranks) -> None:
    header = msgspec.msgpack.encode({"type": "InventedLater", "number": 1})
    world.channel._sock.setblocking(True)
    world.channel._sock.sendall(struct.pack("!2sHII", b"LC", PROTOCOL_VERSION, len(header), 0) + header)
    world.channel._sock.setblocking(False)
    refused = world.channel.receive(10)
    assert isinstance(refused, Refused) and refused.code == "ProtocolError" and refused.reply_to == 1
    assert "asked 'InventedLater', which is not known here: the two ends run different versions" in refused.message
    assert world.ok("rank").results() == ["0", "1"]


def test_an_unknown_request_is_refused(world: Ranks) -> None:
    with pytest.raises(LLMCloudError, match="the node agent does not answer ScaleCluster"):
        world.channel.request(ScaleCluster(workers=2))


def test_a_precision_the_ranks_cannot_do_is_refused(world: Ranks) -> None:
    with pytest.raises(UsageError, match="bf16"):
        world.run("1", precision="fp16")


def test_the_agent_announces_where_it_is(node_agent: AgentProcess) -> None:
    told = json.loads((node_agent.folder / "agent.json").read_text())
    assert told["pid"] == node_agent.process.pid
    assert told["num_slots"] == NUM_SLOTS
    assert stat.S_IMODE(node_agent.folder.stat().st_mode) & 0o077 == 0


def _free(agent: AgentProcess) -> int:
    with contextlib.closing(agent.channel()) as channel:
        return int(channel.request(Describe()).free_slots)


def test_a_cell_that_waited_in_the_queue_of_a_world_that_ends_is_recorded_as_failed(
    new_world: Callable[..., Ranks],
) -> None:
    world = new_world()
    first = world.send("import time\nprint('in it')\ntime.sleep(100)").wait_for("in it", times=2)
    other = world.beside()
    second = other.send("never = 1")
    second.wait_for_state("queued")
    world.end()
    with pytest.raises(LLMCloudError):
        second.end()
    assert second.outcome.folder.read().state == "failed"
    assert first.outcome.folder.read().state != "running"
    other.channel.close()
