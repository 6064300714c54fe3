"""`--watch loss-spike=rollback`: a run whose data are poisoned goes back, leaves the bad steps out, and ends well."""

from __future__ import annotations

from typing import Any

from jupyter_llmcloud.storage.journal import read_all
from jupyter_llmcloud.storage.resume import resume
from jupyter_llmcloud.storage.runs import RunStore
from tests.support.worlds import Outcome, Ranks

TRAINS = """
import time, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
generator = torch.Generator().manual_seed(rank)
rows = torch.utils.data.TensorDataset(torch.randn(16 * 110, 8, generator=generator))
for step, (x,) in enumerate(torch.utils.data.DataLoader(rows, batch_size=16)):
    if step in SKIPPED:
        continue
    x = x * FACTOR if step in BAD else x
    optimizer.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean() + 0.5
    loss.backward()
    optimizer.step()
    run.log(loss=loss.item(), step=step)
weights = {name: weight.tolist() for name, weight in model.state_dict().items()}
time.sleep(AFTERWARDS)
"""
BACK: dict[str, Any] = {"checkpoint_every": 20, "max_restarts": 1}


def trains(bad: str = "()", factor: str = "1", skipped: str = "()", afterwards: int = 0) -> str:
    code = TRAINS.replace("FACTOR", factor).replace("BAD", bad).replace("SKIPPED", skipped)
    return code.replace("AFTERWARDS", str(afterwards))


def marks(outcome: Outcome, kind: str) -> list[dict[str, Any]]:
    return [mark for mark in read_all(outcome.folder.marks) if mark["mark"] == kind]


def test_a_run_goes_back_to_before_bad_data_and_trains_on_as_if_it_had_left_them_out(world: Ranks) -> None:
    outcome = world.ok(trains("(85,)", "1e6"), spec={"watch": "loss-spike=rollback"}, **BACK)
    found, record = [world.pull("weights", rank) for rank in range(2)], outcome.record
    assert (record.num_rollbacks, record.num_restarts, record.left_out) == (1, 0, [[86, 87]])
    [alert] = marks(outcome, "alert")
    assert alert["detector"] == "loss-spike" and "; the run goes back to before step 86 " in alert["text"]
    [mark] = marks(outcome, "restart")
    assert "; resumed from step " in mark["text"] and mark["text"].endswith("; steps 86 to 87 are left out")
    assert mark["step"] in (20, 40, 60, 80)
    world.ok(trains(skipped="(85, 86)"))
    assert found == [world.pull("weights", rank) for rank in range(2)]
    again = resume(RunStore(outcome.folder.path.parent.parent), outcome.folder.run_id, {})
    assert again.request["left_out"] == [[86, 87]]


def test_a_loss_that_is_nan_is_gone_back_from_and_no_statistic_of_a_layer_keeps_it(world: Ranks) -> None:
    outcome = world.ok(trains("(30, 70)", "float('nan')"), spec={"watch": "not-finite=rollback"}, **BACK)
    first, second = outcome.record.left_out
    assert first == [31, 32] and second[0] in (21, 41, 61) and second[1] == 72
    assert (outcome.record.num_rollbacks, outcome.record.num_restarts) == (2, 0)
    assert "nan" not in str([world.pull("weights", rank) for rank in range(2)])


EARLIER = """
import torch
from accelerate import Accelerator
accelerator = Accelerator()
net, adam = accelerator.prepare(net := torch.nn.Linear(8, 1), torch.optim.Adam(net.parameters()))
"""


def test_what_a_run_goes_back_to_is_its_own_model_though_an_earlier_cell_has_prepared_another(world: Ranks) -> None:
    code = trains("(85,)", "1e6")
    lines = {
        "model = torch.nn.parallel.DistributedDataParallel(model)\n": "",
        "optimizer = torch.optim.AdamW(model.parameters(), 0.01)": "model, optimizer = accelerator.prepare(model, "
        "torch.optim.AdamW(model.parameters(), 0.01))",
    }
    for line, prepared in lines.items():
        assert line in code
        code = code.replace(line, prepared)
    world.ok(EARLIER)
    outcome = world.ok(code, spec={"watch": "loss-spike=rollback"}, **BACK)
    found = [world.pull("weights", rank) for rank in range(2)]
    assert outcome.record.left_out == [[86, 87]]
    world.ok(EARLIER)
    world.ok(code.replace("(85,)", "()").replace("step in ()", "step in (85, 86)", 1))
    assert found == [world.pull("weights", rank) for rank in range(2)]


def test_what_no_rollback_helps_against_stops_the_run(world: Ranks) -> None:
    code = trains("range(30, 200)", "float('nan')", afterwards=1000)
    outcome = world.run(code, spec={"watch": "not-finite=rollback"}, **BACK)
    assert outcome.state == "stopped" and outcome.record.num_rollbacks == 3
    assert any("it has gone back 3 times in a row, which did not help" in note for note in outcome.record.notes)
