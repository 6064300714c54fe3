"""What a sweep costs beside its trainings, and what stopping trials early gains at the same number of epochs.

The first row is a sweep of forty trainings of about two seconds on two ranks: its wall time from the cell to its end
over the seconds that the training loops themselves took. The second one trains a small net, here, with the samplers
and pruners of a sweep: the best loss that random search finds, with and without ASHA, for the same number of epochs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

from tests.bench.measured import Row
from tests.bench.shell import product

NUM_TRIALS = 40
MEMBERS, TURN = 10, 6  # of a population, and epochs of a turn: nine turns for each in the same budget
TRAINING_S = 2.0
MOST = 1.3  # times the pure training
SEEDS = range(12)
EPOCHS = 27
BUDGET = 20 * EPOCHS
CELL = """\
import time
import torch
from accelerate import Accelerator
accelerator = Accelerator()
lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
width = trial.suggest_categorical("width", [32, 64])
model = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
model, optimizer = accelerator.prepare(model, optimizer)
x = torch.randn(64, 16)
y = x.square().sum(1, keepdim=True)
began, step = time.perf_counter(), 0
while True:
    loss = (model(x) - y).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if step % 20 == 0:
        accelerator.log({"valid_loss": loss.item()}, step=step)
        left = torch.tensor(float(time.perf_counter() - began < SECONDS))
        if accelerator.reduce(left, "sum").item() < accelerator.num_processes:
            break
accelerator.log({"training_s": time.perf_counter() - began}, step=step)
"""


def measure(folder: Path) -> list[Row]:
    """Both rows, and the one that informs how good each search was."""
    return [_overhead(folder / "ours"), *_early_stopping()]


def _overhead(folder: Path) -> Row:
    line = f"%%sweep -n 2 --trials {NUM_TRIALS} --metric valid_loss --name bench --seed 1"
    with product(folder) as shell:
        shell.run("%load_ext jupyter_llmcloud")
        shell.run("%cluster start local --workers 1")
        shell.run(f"{line}\n{CELL.replace('SECONDS', str(TRAINING_S))}")
    root = folder / "root"
    record = json.loads(next(root.glob("**/sweeps/bench/sweep.json")).read_text())
    runs = next(root.glob("**/sweeps")).parent / "runs"
    trained = [_training_s(runs / trial["run_id"]) for trial in record["trials"]]
    what = f"{NUM_TRIALS} trials of {TRAINING_S:g} s on two ranks: wall time over that of the trainings alone"
    return Row(
        "sweep", what, "s", "the trainings", [record["ended"] - record["created"]], [math.fsum(trained)], goal=MOST
    )


def _training_s(run: Path) -> float:
    lines = (run / "metrics" / "rank-0000.jsonl").read_text().splitlines()
    values = [json.loads(line).get("values") or {} for line in lines]
    return max(row["training_s"] for row in values if "training_s" in row)


# --- early stopping ---


def _early_stopping() -> list[Row]:
    import torch

    torch.set_num_threads(1)
    found = {prune: [_search(prune, seed) for seed in SEEDS] for prune in ("none", "asha")}
    found["pbt"] = [_population(seed) for seed in SEEDS]
    best = {prune: [loss for loss, _ in rows] for prune, rows in found.items()}
    trials = {prune: [float(count) for _, count in rows] for prune, rows in found.items()}
    least = min(min(losses) for losses in best.values())
    regret = {prune: [mean(losses) - least] for prune, losses in best.items()}
    equal = f"{BUDGET} epochs, {len(SEEDS)} seeds"
    return [
        Row("sweep", f"regret of the best loss, ASHA beside random: {equal}", "", "random", regret["asha"],
            regret["none"], goal=1.0),
        Row("sweep", f"regret of the best loss, pbt beside random: {equal}", "", "random", regret["pbt"],
            regret["none"], goal=1.0),
        Row("sweep", f"trials tried: {equal}", "trials", "random", trials["asha"], trials["none"]),
    ]  # fmt: skip


def _search(prune: str, seed: int) -> tuple[float, int]:
    """The best last loss of those that were trained to their end, and how many were tried."""
    from jupyter_llmcloud.storage.search.study import make_pruner, make_sampler, optuna

    library = optuna()
    study = library.create_study(sampler=make_sampler("random", seed), pruner=make_pruner(prune))
    spent = 0
    while spent < BUDGET:
        trial = study.ask()
        net = _Net(trial, seed)
        loss = math.inf
        for epoch in range(1, EPOCHS + 1):
            loss = net.epoch()
            spent += 1
            trial.report(loss, epoch)
            if trial.should_prune() or spent >= BUDGET:
                break
        is_whole = epoch == EPOCHS and math.isfinite(loss)
        study.tell(trial, loss if is_whole else None, library.trial.TrialState.COMPLETE if is_whole else
                   library.trial.TrialState.PRUNED)  # fmt: skip
    return study.best_value, len(study.trials)


def _population(seed: int) -> tuple[float, int]:
    """The best loss at the end of any turn, and how many turns there were."""
    import copy
    import tempfile

    from jupyter_llmcloud.core.search.population import read_population
    from jupyter_llmcloud.storage.search.study import StudyPlan, SweepStudy, make_sampler, optuna
    from jupyter_llmcloud.storage.search.turns import KEPT, RESTORED, SAVED, TurnPlanner

    prune = f"pbt,population={MEMBERS}"
    population = read_population(prune)
    assert population is not None
    with tempfile.TemporaryDirectory() as folder:
        plan = StudyPlan(f"{folder}/journal", "bench", sampler="random", prune=prune, seed=seed)
        study = SweepStudy.create(plan)
        planner, states, best = TurnPlanner(study, population, Path(folder)), dict[str, Any](), math.inf
        study._study.sampler = make_sampler("random", seed)
        num_turns = BUDGET // TURN
        for number in range(num_turns):
            turn = planner.begin(number)
            trial = optuna().trial.Trial(study._study, study._id(number))
            net = _Net(trial, seed, copy.deepcopy(states.get(turn.restores)))
            for _ in range(TURN):
                loss = net.epoch()
            states[turn.saves] = net.state()
            for name, value in ((SAVED, True), (RESTORED, True), (KEPT, ["width"])):
                trial.set_user_attr(name, value)
            is_good = math.isfinite(loss)
            study.end(number, "done" if is_good else "failed", loss if is_good else None, TURN, {})
            best = min(best, loss if is_good else math.inf)
    return best, num_turns


class _Net:
    """A small regression whose loss depends on four values."""

    def __init__(self, ask: Any, seed: int, state: Any = None) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        self._x = torch.randn(256, 8, generator=generator)
        self._y = torch.sin(2 * self._x).sum(1, keepdim=True)
        width = ask.suggest_int("width", 4, 64, log=True)
        torch.manual_seed(seed * 1000 + ask.number)
        self._model = torch.nn.Sequential(
            torch.nn.Linear(8, width), torch.nn.Dropout(ask.suggest_float("dropout", 0.0, 0.5)), torch.nn.Tanh(),
            torch.nn.Linear(width, 1),
        )  # fmt: skip
        self._optimizer = torch.optim.SGD(
            self._model.parameters(),
            lr=ask.suggest_float("lr", 1e-4, 1.0, log=True),
            momentum=ask.suggest_float("momentum", 0.0, 0.99),
        )
        if state is not None:
            self._model.load_state_dict(state[0])
            for parameter, moments in zip(self._model.parameters(), state[1], strict=True):
                self._optimizer.state[parameter] = dict(moments)

    def state(self) -> Any:
        """The weights, and what the optimizer has of each."""
        return self._model.state_dict(), [self._optimizer.state[one] for one in self._model.parameters()]

    def epoch(self) -> float:
        """Train on the first half, by parts; the loss of the other half."""
        import torch

        self._model.train()
        for first in range(0, 128, 32):
            part = slice(first, first + 32)
            loss = (self._model(self._x[part]) - self._y[part]).square().mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        self._model.eval()
        with torch.no_grad():
            value = float((self._model(self._x[128:]) - self._y[128:]).square().mean())
        return min(value, 1e6) if math.isfinite(value) else 1e6
