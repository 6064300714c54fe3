"""Where the time of real ranks goes: what one is made to do shows under its name, and all of it adds up."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from jupyter_llmcloud.core.run.time_split import shares_of
from jupyter_llmcloud.training.diagnostics.time_split import BLOCKED, COMPUTE, DATA, MAX_POINTS, StepTimes, _thinned
from jupyter_llmcloud.widgets import static_view
from jupyter_llmcloud.widgets.recorded_view import recorded_view
from tests.support.worlds import Outcome, Ranks

TRAINING = """
import time, torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __init__(self, n, pause):
        self.n, self.pause = n, pause
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        time.sleep(self.pause)
        return torch.ones(8)

model = DistributedDataParallel(torch.nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

def train(pauses, n=40, own=0.0):
    for batch in DataLoader(Slow(n, pauses[rank]), batch_size=1):
        loss = model(batch).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(own)
"""


def shares(outcome: Outcome) -> dict[int, dict[str, float]]:
    return {rank: shares_of(parts) for rank, parts in outcome.record.times.items()}


@pytest.mark.parametrize("function", ["_pre_forward", "_backward"])
def test_a_rank_that_sleeps_in_an_exchange_of_ddp_is_told_as_waiting_while_it_does(function: str) -> None:
    times = StepTimes()
    times.begin(0, 2)
    seen: list[list[float]] = []

    def exchange() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (seen and seen[-1][BLOCKED] > 0.5):
            looker = threading.Thread(target=lambda: seen.append(times.take().spent))
            looker.start()
            looker.join(0.1)
            asked.wait(0.05)

    asked = threading.Event()
    getattr(times, function)(exchange)()
    assert seen[-1][BLOCKED] > 0.5 and seen[0][BLOCKED] == 0
    assert seen[-1][COMPUTE] < 0.2


def test_a_slow_loader_shows_as_data_and_the_other_rank_waits(world: Ranks) -> None:
    world.ok(TRAINING)
    began = time.monotonic()
    outcome = world.ok("train([0.0, 0.05], n=40)")
    took = time.monotonic() - began
    found = shares(outcome)
    assert found[1]["data"] > 0.8, found
    assert found[0]["waiting"] > 0.7, found
    assert found[1]["waiting"] < 0.1 and found[0]["data"] < 0.2, found
    for parts in outcome.record.times.values():
        assert sum(parts.values()) == pytest.approx(took, rel=0.05)


def test_a_rank_that_sleeps_makes_the_other_one_wait_at_a_barrier(world: Ranks) -> None:
    outcome = world.ok(
        """
        import time
        import torch.distributed as dist
        for _ in range(10):
            time.sleep(0.2 * rank)
            dist.barrier()
        """
    )
    found = shares(outcome)
    assert found[0]["waiting"] > 0.8, found
    assert found[1]["compute"] > 0.8 and found[1]["waiting"] < 0.05, found


def test_saving_shows_as_checkpoint(world: Ranks) -> None:
    outcome = world.ok(
        """
        import os, tempfile, time, torch
        class Slow(dict):
            def __reduce__(self):
                time.sleep(0.5)
                return dict, ()
        for _ in range(3):
            torch.save(Slow(), os.path.join(tempfile.gettempdir(), f"saved-{os.getpid()}"))
        os.remove(os.path.join(tempfile.gettempdir(), f"saved-{os.getpid()}"))
        """
    )
    assert all(parts["checkpoint"] > 0.8 for parts in shares(outcome).values()), shares(outcome)


def test_the_saved_form_and_who_follows_are_told_the_same(world: Ranks) -> None:
    outcome = world.ok("import time\ntime.sleep(1.2)")
    assert outcome.ended.seconds == outcome.record.times
    view = recorded_view(outcome.folder, outcome.record, outcome.state)
    assert "time of ranks 0-1: compute 100 %" in static_view.text(view)
    assert "time of ranks 0-1: compute 100 %" in static_view.html(view)


def test_a_short_cell_keeps_no_times(world: Ranks) -> None:
    assert world.ok("pass").record.seconds == {}


def test_what_is_entered_within_is_taken_out_of_what_is_around() -> None:
    times = StepTimes()
    times.begin(0, 1)
    with times.within(DATA):
        time.sleep(0.05)
    time.sleep(0.05)
    compute, blocked, data, checkpoint = times.take().spent
    assert data == pytest.approx(0.05, abs=0.03) and compute == pytest.approx(0.05, abs=0.03)
    assert blocked == checkpoint == 0.0


@pytest.mark.parametrize("per_step", [1, 7])
def test_ranks_that_tell_unequally_often_keep_points_in_common(per_step: int) -> None:
    points: list[Any] = [(step, number, 0.0) for step in range(500) for number in range(1, per_step + 1)]
    whole, half = _thinned(points), _thinned(points[: 60 * per_step])
    assert 0 < len(whole) <= MAX_POINTS and 0 < len(half) <= MAX_POINTS
    assert {point[:2] for point in whole} & {point[:2] for point in half}


def test_measuring_costs_a_step_little() -> None:
    """Two clocks where something begins and ends: a step of five milliseconds has a handful of those."""
    times = StepTimes()
    timed = times._blocks(lambda: None)
    began = time.process_time()
    for _ in range(10_000):
        timed()
    assert (time.process_time() - began) / 10_000 < 25e-6
