"""What every rank is doing now, and what a rank leaves behind when it fails: stacks, local variables, evidence."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_llmcloud.core.run.exits import describe_exit, oom_evidence
from jupyter_llmcloud.core.run.stacks import fold_stacks, parse_dump
from jupyter_llmcloud.protocol.agent_messages import DumpStacks
from tests.support.worlds import Ranks, Running, until

# --- folding, by values ---


def test_equal_stacks_are_said_once() -> None:
    same = {"main": ["In [4], line 15: dist.barrier()"], "threads": {}, "op": "barrier #7"}
    other = {"main": ["In [4], line 12: time.sleep(9)"], "threads": {}, "op": ""}
    assert fold_stacks({0: same, 1: other, 2: same, 3: same}, {}) == [
        "ranks 0,2-3: in barrier #7",
        "  In [4], line 15: dist.barrier()",
        "rank 1: running",
        "  In [4], line 12: time.sleep(9)",
    ]


def test_a_rank_between_cells_is_idle_and_a_lost_one_gone() -> None:
    rows = {0: {"main": [], "threads": {}, "op": ""}, 1: {"state": ""}}
    assert fold_stacks(rows, {}) == ["rank 0: idle", "rank 1: its process has gone"]


def test_other_threads_are_shown_below_the_main_one() -> None:
    row = {"main": ["In [1], line 2"], "threads": {"loader": ["queue.py:180 in get"]}, "op": ""}
    assert fold_stacks({0: row}, {})[2:] == ["  thread loader:", "    queue.py:180 in get"]


DUMP = """\
Thread 0x00007f (most recent call first):
  File "/x/site-packages/jupyter_llmcloud/training/diagnostics/watchdog.py", line 90 in _watch
  File "/usr/lib/python3.11/threading.py", line 1045 in _bootstrap_inner

Thread 0x00007e (most recent call first):
  File "/usr/lib/python3.11/queue.py", line 180 in get
  File "/usr/lib/python3.11/threading.py", line 1045 in _bootstrap_inner

Current thread 0x00007d (most recent call first):
  File "/tmp/cell-4.py", line 3 in inner
  File "/tmp/cell-4.py", line 12 in <module>
  File "/x/site-packages/IPython/core/interactiveshell.py", line 3700 in run_code
  File "/x/site-packages/jupyter_llmcloud/training/rank.py", line 250 in _execute
"""


def test_a_dump_made_by_a_signal_reads_like_the_others() -> None:
    assert parse_dump(DUMP, {"/tmp/cell-4.py": 4}) == [
        ["In [4], line 12", "In [4], line 3 in inner"],
        ["threading.py:1045 in _bootstrap_inner", "queue.py:180 in get"],
    ]


# --- real ranks ---


def stacks(world: Ranks) -> str:
    """As `%world stacks` gets them: over a connection of its own, while a cell runs."""
    with contextlib.closing(world.agent.channel()) as channel:
        stacks = channel.request(DumpStacks(world_id=world.world_id), 10)
    return "\n".join(fold_stacks(stacks.ranks, stacks.cells))


def cell_of(running: Running) -> int:
    return int(running.run_id.removeprefix("run-"))


@pytest.fixture
def three(new_world) -> Ranks:
    return new_world(3)


def test_stacks_show_who_waits_where_while_a_cell_runs(three: Ranks) -> None:
    running = three.send(
        """
        import time
        import torch.distributed as dist
        def sleepy():
            time.sleep(1000)
        print("begun")
        sleepy() if rank == 1 else dist.barrier()
        """
    ).wait_for("begun", times=3)
    number = cell_of(running)
    text = until(lambda: "in barrier #" in (seen := stacks(three)) and "time.sleep" in seen and seen, "they show it")
    first, second = text.split("rank 1: ")
    assert first.startswith("ranks 0,2: in barrier #")
    assert f"In [{number}], line 7: sleepy() if rank == 1 else dist.barrier()" in first
    assert "distributed_c10d.py" in first and "interactiveshell" not in text
    assert second.splitlines() == [
        "running",
        f"  In [{number}], line 7: sleepy() if rank == 1 else dist.barrier()",
        f"  In [{number}], line 5 in sleepy: time.sleep(1000)",
    ]
    assert running.stop().end().state == "stopped"


def test_idle_ranks_have_no_stack(three: Ranks) -> None:
    three.ok("pass")
    assert stacks(three) == "ranks 0-2: idle"


def test_the_users_own_threads_are_shown(three: Ranks) -> None:
    running = three.send(
        """
        import threading
        go_on = threading.Event()
        threading.Thread(target=go_on.wait, name="mine", daemon=True).start()
        print("begun")
        go_on.wait(60)
        """
    ).wait_for("begun", times=3)
    text = stacks(three)
    running.stop().end()
    three.ok("go_on.set()")
    assert "thread mine:" in text and "llmcloud" not in text


def test_a_rank_whose_lock_is_held_by_native_code_is_dumped_by_a_signal(three: Ranks) -> None:
    running = three.send("import ctypes\nprint('begun')\nctypes.PyDLL(None).sleep(6) if rank == 1 else None")
    running.wait_for("begun", times=2)  # rank 1 cannot say anything
    text = until(lambda: "native" in (seen := stacks(three)) and seen, "rank 1 does not answer", 5)
    assert "rank 1: its process sleeps in native code that does not release the GIL" in text
    assert f"In [{cell_of(running)}], line 4" in text
    outcome = running.end()
    assert outcome.state == "finished"
    assert outcome.seconds > 5.5  # the signal has not cut the native sleep short


def test_a_stopped_rank_is_described_by_its_state(three: Ranks) -> None:
    pid = three.pids()[2]
    os.kill(pid, signal.SIGSTOP)
    # Until one thread of it has taken the signal, on a busy machine a while later, the others go on and answer.
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it is stopped")
    try:
        text = stacks(three)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "ranks 0-1: idle" in text
    assert "rank 2: its process is stopped (SIGSTOP" in text
    assert "ranks 0-2: idle" in until(lambda: "ranks 0-2" in (seen := stacks(three)) and seen, "it answers again")


# --- local variables of the failing line ---


def test_a_failure_carries_the_local_variables_of_its_notebook_line(three: Ranks) -> None:
    outcome = three.run(
        """
        import torch
        def divide(batch, by):
            weights = torch.full((2, 3), 0.5)
            return [item / by for item in batch]
        model = torch.nn.Linear(4, 4)
        divide(list(range(100)), 0)
        """
    )
    error = outcome.error
    assert error["place"].endswith("line 5 in <listcomp>") or error["place"].endswith("line 5 in divide")
    outcome = three.run("x = {'lr': 0.1}\nsteps = 7\nraise ValueError(f'{x} {steps}')")
    assert outcome.error["locals"]["x"] == "dict of 1: lr=0.1"
    assert outcome.error["locals"]["steps"] == "7"
    assert "rank" not in outcome.error["locals"] and "torch" not in outcome.error["locals"]


def test_tensors_and_models_are_described_not_printed(three: Ranks) -> None:
    outcome = three.run(
        """
        import torch
        weights, model = torch.full((2, 3), 0.5), torch.nn.Linear(4, 4)
        weights @ model
        """,
        ranks=[1],
    )
    variables = outcome.error["locals"]
    assert variables["weights"] == "Tensor(2, 3) float32 on cpu, mean 0.5"
    assert variables["model"] == "Linear with 20 parameters"


def test_secrets_are_masked_wherever_they_are(three: Ranks) -> None:
    outcome = three.run(
        """
        class Settings:
            def __init__(self): self.hf_token, self.size = "canary-1", 3
            def __repr__(self): return self.hf_token
        def ask(api_key, password):
            settings, nested = Settings(), {"inner": {"secret": "canary-2", "n": 1}}
            url, header, token_ids = "https://me:canary-3@host/x", "Bearer canary-4", [1, 2]
            raise RuntimeError("no")
        ask("canary-5", "canary-6")
        """
    )
    variables = outcome.error["locals"]
    assert "canary" not in str(variables)
    assert variables["api_key"] == variables["password"] == "***"
    assert variables["settings"] == "Settings(hf_token=***, size=3)"
    assert variables["nested"] == "dict of 1: inner=dict of 2: secret=***, n=1"
    assert variables["token_ids"] == "list of 2: 1, 2"


def test_local_variables_are_bounded(three: Ranks) -> None:
    outcome = three.run("exec('\\n'.join(f'v{i} = {i}' for i in range(200)))\nlong = 'x' * 10**6\nlong.no_such")
    variables = outcome.error["locals"]
    assert len(variables) == 30
    assert len(variables["long"]) <= 240
    assert len(str(outcome.ended.errors)) < 50_000


# --- a rank that ran out of memory ---


def test_the_killers_traces_name_the_cause() -> None:
    evidence = oom_evidence(0, 1, "", 1288490188)
    assert evidence == (
        "The kernel's out-of-memory killer ended it: oom_kill of its memory cgroup went from 0 to 1, "
        "its memory was last seen at 1.20 GiB."
    )
    name, words = describe_exit(-9, evidence)
    assert name == "RankOutOfMemory"
    assert "SIGKILL (9)" in words and "smaller batch" in words


def test_without_traces_nobody_is_accused() -> None:
    assert oom_evidence(3, 3, "", 10**9) == ""
    assert describe_exit(-9)[0] == "RankKilled"


@pytest.fixture
def small_cgroup() -> Any:
    """A memory cgroup of 64 MiB more than a rank holds; only where this process may make one."""
    version1, version2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    parent = version1 if version1.is_dir() else version2
    folder = parent / f"llmcloud-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this machine does not let us make a memory cgroup")
    try:
        limit = folder / ("memory.limit_in_bytes" if parent == version1 else "memory.max")
        try:
            limit.write_text(str(64 << 20))
        except OSError:
            pytest.skip("the memory controller cannot be used here")
        yield folder
    finally:
        until(lambda: not (folder / "cgroup.procs").read_text().split(), "the cgroup is empty")
        folder.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_is_reported_as_that(node_agent, small_cgroup: Path) -> None:
    world = Ranks(node_agent, 2)
    try:
        (small_cgroup / "cgroup.procs").write_text(str(world.pids()[1]))
        outcome = world.run(
            """
            import time
            if rank == 1:
                hoard = []
                while True:
                    hoard.append(bytearray(b"x" * (4 << 20)))
                    time.sleep(0.05)
            """
        )
        assert outcome.state == "failed"
        assert outcome.error["rank"] == 1
        assert outcome.error["ename"] == "RankOutOfMemory"
        assert re.search(r"last seen at \d\.\d\d GiB", outcome.error["evalue"])
        assert "smaller batch" in outcome.error["evalue"]
    finally:
        world.end()
