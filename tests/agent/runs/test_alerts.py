"""What a run's detectors do about it: a note and a mark with its evidence, a stop that is asked for, or nothing."""

from __future__ import annotations

import textwrap
from typing import Any

from jupyter_llmcloud.storage.journal import read_all
from tests.support.worlds import Outcome, Ranks

TRAINS = """
import random, time, torch, torch.distributed as dist
torch.manual_seed(0)
random_ = random.Random(rank)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
for step in range(STEPS):
    x = torch.randn(16, 8)
    optimizer.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean() + 0.5
    loss.backward()
    optimizer.step()
    run.log(loss=loss.item() * (FACTOR if step == 150 else 1), step=step)
kept = step
time.sleep(AFTERWARDS)
"""

IS_LATE = """
import time, torch, torch.distributed as dist
while True:
    time.sleep(0.2 if rank == 1 else 0)
    dist.all_reduce(torch.zeros(1))
"""


def trains(steps: int = 200, factor: float = 1.0, afterwards: float = 0.0) -> str:
    code = TRAINS.replace("STEPS", str(steps)).replace("FACTOR", str(factor))
    return textwrap.dedent(code).replace("AFTERWARDS", str(afterwards))


def alerts(outcome: Outcome) -> list[dict[str, Any]]:
    path = outcome.folder.marks
    return [mark for mark in read_all(path) if mark["mark"] == "alert"] if path.exists() else []


def notes(outcome: Outcome) -> list[str]:
    return [state.detail for state in outcome.states if state.state == "note"]


def test_an_ordinary_training_gives_no_alert(world: Ranks) -> None:
    outcome = world.ok(trains())
    assert not alerts(outcome) and not notes(outcome)


def test_a_loss_that_jumps_is_one_note_and_a_mark_with_its_evidence(world: Ranks) -> None:
    outcome = world.ok(trains(factor=1e6))
    [note] = notes(outcome)
    assert note.startswith("loss-spike: loss jumped to ") and note.endswith(" at step 150.")
    [mark] = alerts(outcome)
    assert (mark["detector"], mark["step"], mark["metric"]) == ("loss-spike", 150.0, "loss")
    assert "threshold 6, over the last 128 values" in mark["evidence"]


def test_a_loss_that_jumps_stops_the_run_where_that_is_asked_for_and_its_variables_are_kept(world: Ranks) -> None:
    outcome = world.run(trains(factor=1e6, afterwards=1000), spec={"watch": "loss-spike=stop"})
    assert outcome.state == "stopped"
    assert [mark["detector"] for mark in alerts(outcome)] == ["loss-spike"]
    [note] = [note for note in notes(outcome) if note.startswith("loss-spike: loss jumped to ")]
    assert note.endswith(" at step 150; the run is stopped (--watch loss-spike=stop).")
    assert [world.pull("kept", rank) >= 150 for rank in range(2)] == [True, True]


def test_a_detector_that_is_off_says_nothing(world: Ranks) -> None:
    outcome = world.ok(trains(factor=1e6), spec={"watch": "loss-spike=off"})
    assert not alerts(outcome) and not notes(outcome)


def test_the_rank_for_which_the_others_wait_is_named(world: Ranks) -> None:
    running = world.send(IS_LATE, hang_after_s=60.0)
    note = running.wait_for_state("note").detail
    outcome = running.stop().end()
    assert note.startswith("straggler: rank 1 is slow: the others wait for it ")
    [mark] = alerts(outcome)
    assert (mark["detector"], mark["ranks"]) == ("straggler", [1])
    assert "waits in shared collectives" in mark["evidence"]


SKIPS = """
import torch
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.AdamW(model.parameters(), 0.1)
for step in range(8):
    x = torch.full((2, 4), float(step + rank))
    if step in BAD:
        if SKIPPED:
            continue
        x[0, 0] = float("nan") if rank == 1 else 1
    optimizer.zero_grad()
    model(x).pow(2).mean().backward()
    optimizer.step()
weights = model.module.weight.tolist()
"""


def test_a_step_whose_gradients_are_not_finite_is_left_out_on_every_rank_where_that_is_asked_for(world: Ranks) -> None:
    code = SKIPS.replace("BAD", "(2, 5)")
    world.ok(code.replace("SKIPPED", "True"))
    without = world.pull("weights", 0)
    outcome = world.ok(code.replace("SKIPPED", "False"), spec={"watch": "not-finite=skip"})
    assert [world.pull("weights", rank) for rank in range(2)] == [without, without]
    assert [(mark["detector"], mark["step"]) for mark in alerts(outcome)] == [("not-finite", 2.0), ("not-finite", 5.0)]
    assert outcome.record.alerts == {"not-finite": 2}
    assert "the gradients of step 5 are not finite: it is left out" in outcome.text(0, "stderr")


SCALED = """
import torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 120)
for step in range(30):
    scaler.scale(model(torch.full((1, 2), 1e10)).sum()).backward()
    run.log(grad_norm=float("inf") if step < 3 else 1.0, step=step)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
"""


def test_a_scale_of_a_grad_scaler_that_is_too_large_is_no_alert(world: Ranks) -> None:
    for watch in ("not-finite=skip", "not-finite=stop"):
        outcome = world.ok(SCALED, spec={"watch": watch})
        assert alerts(outcome) == []
        assert set(outcome.record.not_finite) == {"grad_norm"}


def test_gradient_norms_that_stay_infinite_are_an_alert(world: Ranks) -> None:
    outcome = world.ok("for step in range(20):\n    run.log(grad_norm=float('inf'), step=step)")
    [mark] = alerts(outcome)
    assert (mark["detector"], mark["text"]) == ("not-finite", "grad_norm is infinite at step 0")


def test_a_model_that_gives_no_finite_gradient_any_more_fails_instead_of_being_skipped_for_ever(world: Ranks) -> None:
    code = SKIPS.replace("BAD", "range(100)").replace("SKIPPED", "False").replace("range(8)", "range(100)")
    outcome = world.run(code, spec={"watch": "not-finite=skip"})
    assert outcome.error["ename"] == "FloatingPointError"
    assert "the gradients of 21 steps in a row are not finite" in outcome.error["evalue"]
