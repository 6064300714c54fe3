"""Stop always works: wherever the ranks are the cell ends, and they keep their variables unless it is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from tests.support.worlds import AgentProcess, Outcome, Ranks, alive, until

pytestmark = pytest.mark.alone

COOPERATIVE_S = 2.0
WORST_S = 8.0
HEAD = """
import time, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
kept = rank
"""
PLACES = {
    "a pure Python loop": "print('in it')\nwhile True: pass",
    "sleep": "print('in it')\ntime.sleep(100)",
    "all_reduce without its peer": (
        "print('in it')\nif rank == 0: dist.all_reduce(torch.ones(1))\nelse: time.sleep(100)"
    ),
    "barrier without its peer": "print('in it')\nif rank == 0: dist.barrier()\nwhile True: pass",
    "recv": "print('in it')\nif rank == 0: dist.recv(torch.ones(1), src=1)\nelse: time.sleep(100)",
    "a group of some ranks": (
        "group = dist.new_group([0, 1])\nprint('in it')\n"
        "if rank == 0: dist.all_reduce(torch.ones(1), group=group)\nelse: time.sleep(100)"
    ),
    "a shell command": "print('in it')\n!sleep 100",
    "a flood of output": "print('in it')\nwhile True: print('x' * 5000)",
    "input waiting on a child": "import subprocess\nprint('in it')\nsubprocess.run(['sleep', '100'])",
    "an await": "import asyncio\nprint('in it')\nawait asyncio.sleep(100)",
    "a thread's result": (
        "from concurrent.futures import ThreadPoolExecutor\nprint('in it')\n"
        "done = __import__('threading').Event()\n"
        "with ThreadPoolExecutor() as pool:\n"
        "    try: pool.submit(done.wait, 100).result()\n"
        "    finally: done.set()"
    ),
    "a backward pass": (
        "model = DistributedDataParallel(torch.nn.Linear(4, 1))\nprint('in it')\n"
        "if rank == 0: model(torch.ones(1, 4)).sum().backward()\nelse: time.sleep(100)"
    ),
}


def next_cell_works(world: Ranks) -> None:
    assert world.ok("kept").results() == ["0", "1"]
    code = "import torch, torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\nint(t)"
    assert world.ok(code).results() == ["2", "2"]


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_stop_ends_the_cell_and_keeps_the_variables(world: Ranks, place: str) -> None:
    pids = world.pids()
    outcome = world.send(HEAD + place).wait_for("in it", times=2).stop().end()
    assert outcome.state == "stopped", outcome.report
    assert outcome.seconds < COOPERATIVE_S
    assert "lost" not in outcome.report
    next_cell_works(world)
    assert world.pids() == pids


def test_stop_in_a_loader_with_workers(world: Ranks) -> None:
    running = world.send(
        HEAD
        + """
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 10_000
    def __getitem__(self, index):
        time.sleep(0.01)
        return index

print("in it")
for batch in DataLoader(Slow(), batch_size=4, num_workers=2):
    pass
"""
    )
    outcome = running.wait_for("in it", times=2).stop().end()
    assert outcome.state == "stopped"
    assert outcome.seconds < COOPERATIVE_S
    next_cell_works(world)


TRAINING = """
import torch
from torch.nn.parallel import DistributedDataParallel
kept = rank
model = DistributedDataParallel(torch.nn.Linear(64, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
steps = 0
while True:
    optimizer.zero_grad()
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    steps += 1
    if steps == 5: print("in it")
"""


def test_stop_in_training_ends_all_ranks_after_the_same_step(world: Ranks) -> None:
    generation = world.describe()["generation"]
    outcome = world.send(TRAINING).wait_for("in it", times=2).stop().end()
    assert outcome.state == "stopped"
    assert outcome.seconds < COOPERATIVE_S
    # The counter is a line behind the step that raised, alike on both ranks, and the weights are the same.
    counts = world.ok("(steps, float(model.module.weight.detach().double().sum()))").results()
    assert counts[0] == counts[1]
    next_cell_works(world)
    assert world.describe()["generation"] == generation


BIG = (
    TRAINING.replace("Linear(64, 64)", "Linear(64, 30_000)")
    .replace("while True:", "for step in run.steps(10**6):")
    .replace("steps == 5", "steps == 2")
)
BLOCKED = """if rank == 0 and steps == 2:
        import os
        torch.save(model.state_dict(), os.fdopen(os.pipe()[1], "wb"))"""
CHECKPOINTS = {
    "torch.save": BIG + "    torch.save(model.state_dict(), f'{run.folder}-{rank}.pt')",
    "a disk that does not answer": BIG + f"    {BLOCKED}",
    "run.checkpoint": BIG + "    run.checkpoint()",
    "--checkpoint-every": BIG,
}


@pytest.mark.parametrize("save", CHECKPOINTS)
def test_stop_during_a_checkpoint_keeps_the_variables_and_what_was_saved_before(world: Ranks, save: str) -> None:
    pids = world.pids()
    every = {"checkpoint_every": 1} if save == "--checkpoint-every" else {}
    running = world.send(CHECKPOINTS[save], **every).wait_for("in it", times=2)
    kept = CheckpointFolder(running.outcome.folder.path / "checkpoints") if save[:5] in ("run.c", "--che") else None
    if kept is not None:
        until(lambda: kept.newest()[0], "one is complete, the next is being written")
    outcome = running.stop().end()
    assert outcome.state == "stopped", outcome.report
    assert outcome.seconds < COOPERATIVE_S
    assert "lost" not in outcome.report
    next_cell_works(world)
    assert world.pids() == pids
    if kept is not None:
        newest, skipped = kept.newest()
        assert newest is not None
        assert skipped == []


def test_stop_between_two_optimizers_of_a_step_lets_the_second_step_too(world: Ranks) -> None:
    outcome = world.send(
        """
        import time, torch
        kept = rank
        num = {"critic": 0, "generator": 0}
        def stepping(name):
            weight = torch.nn.Parameter(torch.zeros(1))
            optimizer = torch.optim.SGD([weight], lr=1.0)
            optimizer.register_step_post_hook(lambda *_: num.update({name: num[name] + 1}))
            def step():
                weight.grad = torch.ones(1)
                optimizer.step()
            return step
        critic, generator = stepping("critic"), stepping("generator")
        while True:
            time.sleep(0.02)  # here the Stop comes, as a rule: the next step is the critic's
            critic()
            generator()
            if num["critic"] == 5: print("in it")
        """
    )
    outcome = outcome.wait_for("in it", times=2).stop().end()
    assert outcome.state == "stopped"
    first, second = world.ok("num").results()
    assert first == second
    counts = world.pull("num")
    assert counts["critic"] == counts["generator"], counts


def test_training_goes_on_with_the_same_model_after_a_stop(world: Ranks) -> None:
    world.send(TRAINING).wait_for("in it", times=2).stop().end()
    world.ok("for _ in range(3):\n    model(torch.ones(2, 64)).sum().backward()\n    optimizer.step()")


def test_training_goes_on_with_the_same_model_after_its_group_was_renewed(new_world: Callable[..., Ranks]) -> None:
    world = new_world()
    world.ok(TRAINING.partition("while True")[0])
    generation = world.describe()["generation"]
    world.send("import time\nprint('in it')\ntime.sleep(100)").wait_for("in it", times=2).stop().end()
    world.ok(
        "for _ in range(3):\n    optimizer.zero_grad()\n    model(torch.ones(2, 64) * rank).sum().backward()\n"
        "    optimizer.step()"
    )
    assert world.describe()["generation"] == generation + 1
    sums = world.ok("float(model.module.weight.detach().double().sum())").results()
    assert sums[0] == sums[1]


def test_stop_while_ranks_take_steps_on_their_own_stops_them_at_one_step(world: Ranks) -> None:
    running = world.send(
        """
        import time, torch
        kept = rank
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        steps = 0
        while True:
            weight.grad = torch.ones(1)
            optimizer.step()
            steps += 1
            time.sleep(0.002 * (1 + 2 * rank))
            if steps == 20: print("in it")
        """
    )
    outcome = running.wait_for("in it", times=2).stop().end()
    assert outcome.state == "stopped"
    first, second = world.ok("float(weight)").results()
    assert first == second
    next_cell_works(world)


Deaf = dict[str, tuple[Ranks, Outcome]]
DEAF = {
    "swallows it": """
        import time
        print("in it")
        while True:
            try:
                time.sleep(0.05)
            except KeyboardInterrupt:
                pass
        """,
    "in C on rank 1": """
        import ctypes, time
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        print("in it")
        if rank == 1:
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        time.sleep(100)
        """,
}


@pytest.fixture(scope="module")
def deaf(node_agent: AgentProcess) -> Iterator[Deaf]:
    """Worlds whose cells did not heed the interrupt, each stopped by one press; at the same time, since that is slow."""
    worlds = {name: Ranks(node_agent) for name in DEAF}
    for world in worlds.values():
        world.ok("kept = rank")
    running = [world.send(DEAF[name]).wait_for("in it", times=2) for name, world in worlds.items()]
    for cell in running:
        cell.stop()
    yield {name: (cell.ranks, cell.end()) for name, cell in zip(worlds, running, strict=True)}
    for world in worlds.values():
        world.end()


def test_a_loop_that_swallows_the_interrupt_ends_all_the_same_and_keeps_its_variables(deaf: Deaf) -> None:
    world, outcome = deaf["swallows it"]
    assert outcome.state == "stopped"
    assert outcome.seconds < WORST_S
    assert outcome.report == "ranks 0-1: stopped, variables kept"
    assert world.ok("'kept' in globals()").results() == ["True", "True"]


def test_pressing_again_ends_sooner(new_world: Callable[..., Ranks]) -> None:
    world = new_world()
    running = world.send("import ctypes, os\nos.write(1, b'in it\\n')\nctypes.PyDLL(None).sleep(1000)")
    outcome = running.wait_for("in it", times=2).stop(presses=4).end()
    assert outcome.state == "stopped"
    assert outcome.seconds < COOPERATIVE_S
    assert world.ok("1").results() == ["1", "1"]


def test_stop_of_a_cell_in_c_code_that_ignores_signals_kills_only_that_rank(
    deaf: Deaf,
) -> None:
    world, outcome = deaf["in C on rank 1"]
    assert outcome.state == "stopped"
    assert outcome.seconds < WORST_S
    assert outcome.report.splitlines() == [
        "rank 0: stopped, variables kept",
        "rank 1: lost, since it did not end when it was asked to: the next cell runs on a new process without its variables",
    ]
    assert world.ok("'kept' in globals()").results() == ["True", "False"]


def test_stop_of_some_ranks_leaves_the_others_alone(world: Ranks) -> None:
    world.ok("kept = rank")
    outcome = world.send(HEAD + "print('in it')\ntime.sleep(100)", ranks=[1]).wait_for("in it").stop().end()
    assert outcome.report == "rank 1: stopped, variables kept"
    next_cell_works(world)


def test_a_cell_can_ask_whether_it_should_stop(world: Ranks) -> None:
    running = world.send(
        """
        import time
        kept = rank
        print("in it")
        try:
            while not run.should_stop: time.sleep(0.01)
        except KeyboardInterrupt:
            pass
        asked = run.should_stop
        """
    )
    assert running.wait_for("in it", times=2).stop().end().state == "stopped"
    assert world.ok("(asked, run.should_stop)").results() == ["(True, False)"] * 2


def test_a_timeout_stops_the_run_and_says_so(world: Ranks) -> None:
    outcome = world.run(HEAD + "time.sleep(100)", timeout_s=0.3)
    assert outcome.state == "stopped"
    assert outcome.seconds < 0.3 + COOPERATIVE_S
    assert any("--timeout" in row.get("why", "") for row in outcome.record.history)
    next_cell_works(world)


def test_stop_again_and_again_never_breaks_the_world(new_world: Callable[..., Ranks]) -> None:
    world = new_world()
    world.ok("kept = rank")
    pids = world.pids()
    for _ in range(8):
        running = world.send("print('in it')\nwhile True: print('y' * 20_000)")
        outcome = running.wait_for("in it", times=2).stop().end()
        assert outcome.state == "stopped"
        assert outcome.seconds < COOPERATIVE_S
    next_cell_works(world)
    assert world.pids() == pids


def test_a_queued_run_can_be_stopped_before_it_begins(world: Ranks) -> None:
    first = world.send(HEAD + "print('in it')\ntime.sleep(100)").wait_for("in it", times=2)
    other = world.beside()
    second = other.send("never = True")
    assert first.run_id in second.wait_for_state("queued").detail
    ended = second.stop().end()
    assert (ended.state, "had not begun" in ended.report) == ("stopped", True)
    assert first.stop().end().state == "stopped"
    assert world.ok("'never' in globals()").results() == ["False", "False"]
    other.channel.close()


def test_what_a_stopped_cell_has_started_ends_with_it(world: Ranks) -> None:
    """Not the ranks themselves, but what they held: subprocesses, shells, a pool's workers."""
    running = world.send(
        """
        import os, subprocess, time
        kept = rank
        print("in it", flush=True)
        if rank == 0:
            subprocess.run("echo child $$; sleep 1000", shell=True)
        else:
            !echo child $$; sleep 1000
        """
    )
    running.wait_for("child", times=2)
    children = [int(line.split()[1]) for line in running.outcome.text().splitlines() if line.startswith("child")]
    outcome = running.stop().end()
    assert outcome.state == "stopped"
    assert len(children) == 2
    until(lambda: not any(map(alive, children)), "the children have ended", COOPERATIVE_S)
    next_cell_works(world)


def test_a_stopped_loader_with_workers_lets_go_of_them(world: Ranks) -> None:
    running = world.send(
        """
        import gc, time, torch
        kept = rank
        class Slow(torch.utils.data.Dataset):
            def __len__(self): return 10_000
            def __getitem__(self, index):
                time.sleep(0.01)
                return index
        print("in it")
        for batch in torch.utils.data.DataLoader(Slow(), batch_size=4, num_workers=2): pass
        """
    )
    running.wait_for("in it", times=2).stop().end()
    outcome = world.ok("import multiprocessing\ngc.collect()\nmultiprocessing.active_children()")
    assert outcome.results() == ["[]", "[]"]
    assert outcome.seconds < COOPERATIVE_S
