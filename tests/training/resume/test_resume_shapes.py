"""The shapes in which people write training loops, each resumed after a rank was killed; what cannot be is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.storage.journal import read_all
from tests.support.resumed_cells import DATA_SET, MORE_CELLS, TRAINER_PARTS
from tests.support.resuming import cell, dies_before, notes, results, resumed, same
from tests.support.worlds import AgentProcess, Outcome, Ranks

RESUMABLE: dict[str, Any] = {"checkpoint_every": 4, "max_restarts": 3}
DIE = 29


@pytest.fixture(scope="module")
def fresh(node_agent: AgentProcess) -> Iterator[Ranks]:
    """A world in which nothing is killed."""
    ranks = Ranks(node_agent)
    yield ranks
    ranks.end()


def step_of(outcome: Outcome) -> int:
    """The step from which a run was resumed, once."""
    assert len(resumed(outcome)) == 1, notes(outcome)
    [note] = resumed(outcome)
    found = re.search(r"resumed from step (\d+)", note)
    assert found, notes(outcome)
    return int(found[1])


def saved_by(outcome: Outcome) -> dict[str, Any]:
    """The newest checkpoint of a run, as the option --resume hands it on."""
    newest, _ = CheckpointFolder(outcome.folder.path / "checkpoints").newest(resumable=True)
    assert newest is not None
    return {"folder": str(newest.path), "step": newest.step}


# Of shapes that differ in one respect from another one: make chaos tries them.
VARIANTS = {
    *("trainer folds", "trainer stream", "trainer and loop", "folds", "module", "class", "parts", "between steps"),
    *("nested flat shard", "flat shard of flat parameters", "decayed gradients", "kept gradients", "break", "skipped"),
    *("for next", "while in functions"),
}


LONG = {
    "compiled",
    "flat shard as it is trained",
    "fully_shard",
    "local sgd",
    "trainer own checkpoints",
    "unfollowed",
}  # as long as a notebook: make stories tries them


def sometimes(names: Iterable[str]) -> list[Any]:
    """As parameters of a test."""
    marks = dict.fromkeys(VARIANTS, pytest.mark.soak) | dict.fromkeys(LONG, pytest.mark.story)
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


@pytest.mark.parametrize("name", sometimes(MORE_CELLS))
def test_every_shape_of_a_loop_ends_as_if_undisturbed(world: Ranks, fresh: Ranks, name: str) -> None:
    fresh.ok(cell(MORE_CELLS[name]))
    wanted = results(fresh)
    assert step_of(world.ok(cell(MORE_CELLS[name], DIE), **RESUMABLE)) > 0
    for rank, result in enumerate(results(world)):
        assert same(wanted[rank], result), f"rank {rank}"


STREAM_BY_HAND = """
from torch.utils.data import IterableDataset

class Stream(IterableDataset):
    def __iter__(self):
        source = torch.Generator().manual_seed(5)
        for i in range(96):
            yield i, torch.randn(8, generator=source), torch.randn(1, generator=source)
""" + MORE_CELLS["while next"].replace(
    "DataLoader(data, batch_size=BATCH, shuffle=True)", "DataLoader(Stream(), batch_size=BATCH)"
)


def test_a_stream_without_a_length_that_is_drawn_from_by_hand_goes_on(world: Ranks, fresh: Ranks) -> None:
    fresh.ok(cell(STREAM_BY_HAND))
    wanted = results(fresh)
    assert step_of(world.ok(cell(STREAM_BY_HAND, DIE), **RESUMABLE)) > 0
    assert all(same(*pair) for pair in zip(wanted, results(world), strict=True))


# --- Trainers -------------------------------------------------------------------------------------------------------


@pytest.mark.story
def test_a_trainer_killed_twice_logs_every_step_once_more_only_after_its_checkpoint(world: Ranks, fresh: Ranks) -> None:
    fresh.ok(cell("trainer"))
    outcome = world.ok(dies_before(cell("trainer", 30), 17), **RESUMABLE)
    assert len(resumed(outcome)) == 2
    steps = [int(found) for found in re.findall(r"resumed from step (\d+)", " ".join(notes(outcome)))]
    assert len(steps) == 2
    assert all(same(*pair) for pair in zip(results(fresh), results(world), strict=True))
    # Two steps were made by the Trainer before; what was logged by a checkpoint is not logged again.
    logged = [r["step"] for r in read_all(outcome.folder.metrics(0)) if "loss" in r.get("values", ())]
    assert sorted(set(logged)) == list(range(5, 36, 5))
    for step in set(logged):
        assert logged.count(step) <= 1 + sum(step > saved - 2 for saved in steps)


@pytest.mark.story
def test_a_trainer_goes_on_in_another_world_with_the_same_whole_batch(
    world: Ranks, fresh: Ranks, new_world: Callable[..., Ranks]
) -> None:
    broken = world.run(cell("trainer", 30), checkpoint_every=4)
    assert broken.state == "failed"
    saved, four = saved_by(broken), new_world(4)
    fresh.ok(cell("trainer"))
    wanted = results(fresh)
    whole = [result["samples"] for result in wanted]
    four.ok(cell("trainer", batch=2), resume=saved)
    parts = [result["samples"] for result in results(four)]
    before = 2 * (saved["step"] - 2)  # batches of the second Trainer, two a step
    assert before > 20
    for turn in range(before, 72):
        used = sorted(i for samples in parts for i in samples[turn])
        assert used == sorted(i for samples in whole for i in samples[turn]), f"turn {turn}"
    assert [len(samples) for samples in parts] == [72] * 4
    # A checkpoint of the same world leads to the same end, by hand too.
    fresh.ok(cell("trainer"), resume=saved)
    assert all(same(*pair) for pair in zip(wanted, results(fresh), strict=True))
    for wrong, word in (
        (cell("trainer"), "batches of 8 samples"),
        (accumulating(cell("trainer", batch=2)), "2 batches"),
    ):
        outcome = four.run(wrong, resume=saved)
        assert outcome.error["ename"] == "ResumeMissed"
        assert word in outcome.error["evalue"]


def accumulating(code: str) -> str:
    """Another number of batches for one step."""
    return code.replace("gradient_accumulation_steps=2", "gradient_accumulation_steps=4")


@pytest.mark.parametrize("persistent", [pytest.param(False, marks=pytest.mark.soak), True])
def test_random_numbers_of_a_trainers_workers_go_on_or_it_is_said_that_they_do_not(
    world: Ranks, fresh: Ranks, persistent: bool
) -> None:
    code = (
        TRAINER_PARTS
        + f"""
trainer = make(Net(), 3, 3, eval_strategy="epoch", dataloader_num_workers=1, dataloader_persistent_workers={persistent})
trainer.train()
tell(trainer.model, samples, turn, [clean(logs) for logs in trainer.state.log_history])
"""
    )
    outcome = world.ok(cell(code, DIE), **RESUMABLE)
    assert step_of(outcome) > 12
    assert ("random numbers of their own" in outcome.text(0, "stderr")) == persistent
    if not persistent:
        fresh.ok(cell(code))
        assert all(same(*pair) for pair in zip(results(fresh), results(world), strict=True))


PERSISTENT = """
class Still(Dataset):
    def __init__(self): self.x, self.y = torch.randn(96, 8), torch.randn(96, 1)
    def __len__(self): return 96
    def __getitem__(self, i): return i, self.x[i], self.y[i]

model, data = net(), Still()
options = dict(num_workers=1, persistent_workers=True, generator=GENERATOR)
held_out = DataLoader(data, batch_size=48, shuffle=True, num_workers=1, persistent_workers=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
accelerator = Accelerator()
loader = DataLoader(data, batch_size=BATCH, shuffle=True, **options)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
samples, turn, held = [], 0, []
for epoch in range(4):
    for i, x, y in loader:
        loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        samples.append(i.tolist())
        turn += 1
        perhaps_die(turn)
    held.append([i.tolist() for i, _, _ in held_out])
tell(accelerator.unwrap_model(model), samples, held)
"""


@pytest.mark.parametrize("generator", ["None", "torch.Generator().manual_seed(3)"], ids=["global", "own"])
def test_workers_that_stay_are_started_anew_without_drawing_what_the_order_of_rows_is_drawn_from(
    world: Ranks, fresh: Ranks, generator: str
) -> None:
    code = PERSISTENT.replace("GENERATOR", generator)
    outcome = world.ok(cell(code, 21), **RESUMABLE)
    assert step_of(outcome) > 12, "in a later epoch than the first"
    fresh.ok(cell(code))
    assert all(same(*pair) for pair in zip(results(fresh), results(world), strict=True))


@pytest.mark.parametrize("evaluation", ["no", "epoch"])
def test_a_trainers_workers_that_stay_are_started_anew_without_drawing_what_the_order_of_rows_is_drawn_from(
    world: Ranks, fresh: Ranks, evaluation: str
) -> None:
    code = (
        TRAINER_PARTS
        + f"""
class Still(Dataset):
    def __init__(self): self.x, self.y = torch.randn(96, 8), torch.randn(96, 1)
    def __len__(self): return 96
    def __getitem__(self, i): return {{"x": self.x[i], "labels": self.y[i], "i": i}}

Rows = Still
trainer = make(Net(), 3, 4, eval_strategy="{evaluation}", dataloader_num_workers=1, dataloader_persistent_workers=True)
trainer.train()
tell(trainer.model, samples, turn, [clean(logs) for logs in trainer.state.log_history])
"""
    )
    outcome = world.ok(cell(code, 21), **RESUMABLE)
    assert step_of(outcome) > 12, "in a later epoch than the first"
    fresh.ok(cell(code))
    assert all(same(*pair) for pair in zip(results(fresh), results(world), strict=True))


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.story
def test_a_sharded_model_goes_on_on_another_number_of_ranks_when_it_can_be_cut_anew(
    world: Ranks, fresh: Ranks, new_world: Callable[..., Ranks]
) -> None:
    saved = {}
    for name in ("fully_shard", "flat shard"):
        broken = world.run(cell(MORE_CELLS[name], DIE), checkpoint_every=4)
        assert broken.state == "failed"
        saved[name] = saved_by(broken)
    fresh.ok(cell(MORE_CELLS["fully_shard"]))
    wanted, four = results(fresh)[0], new_world(4)
    four.ok(cell(MORE_CELLS["fully_shard"], batch=2), resume=saved["fully_shard"])
    for result in results(four):
        for name, value in wanted["weights"].items():
            assert (result["weights"][name] - value).abs().max() < 1e-4, name
    outcome = four.run(cell(MORE_CELLS["flat shard"], batch=2), resume=saved["flat shard"])
    assert outcome.error["ename"] == "ResumeMissed"
    assert "same number of ranks" in outcome.error["evalue"]


# --- what is refused ------------------------------------------------------------------------------------------------

SMALL = """
import os, signal, threading, types, torch
from torch.utils.data import DataLoader
torch.manual_seed(0)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader, turn = DataLoader(torch.randn(24, 2), batch_size=2), 0

def train(batch):
    global turn
    model(batch).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    turn += 1
    torch.distributed.barrier()
    for thread in threading.enumerate():
        if thread.name == "llmcloud-checkpoint":
            thread.join()  # so that none is left out
    if turn == 20 and rank == 1 and not (run.folder / "died").exists():
        (run.folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return model.weight.sum()

"""
REFUSED = {
    "a library's own loop": (
        "library = types.ModuleType('library')\n"
        "exec('def fit(loader, train):\\n    for batch in loader: train(batch)', vars(library))\n"
        "library.fit(loader, train)\nlibrary.fit(loader, train)\nturn",
        "in library, is not followed",
        "24",
    ),
    "a generator that a counted loop advances": (
        "import random\ndef noise():\n    numbers = random.Random(3)\n    while True: yield numbers.random()\n"
        "g = noise()\nfor step in range(24): train(torch.randn(2, 2) + next(g))\nturn",
        "'g' is or holds a generator that has been advanced",
        "24",
    ),
    "a data set that rounds hand on": (
        DATA_SET + "rows = Dataset([float(i) for i in range(24)], 'made')\n"
        "for epoch in range(2):\n    rows = rows.shuffle(epoch)\n"
        "    for x in DataLoader(rows, batch_size=2): train(x[:, None].expand(2, 2))\nturn",
        "'rows' is a data set that each round of a loop makes of the one before",
        "24",
    ),
    "a comprehension": (
        "epoch = 0\nwhile epoch < 2:\n    losses = [train(batch) for batch in loader]\n    epoch += 1\nlen(losses), turn",
        "is not followed",
        "(12, 24)",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_could_not_go_on_as_it_was_is_refused_aloud(world: Ranks, name: str) -> None:
    code, word, result = REFUSED[name]
    outcome = world.ok(SMALL + code, checkpoint_every=2, max_restarts=1)
    said = " ".join(notes(outcome))
    assert word in said
    assert "could not be written" in said
    assert outcome.results() == [result, result]


def test_steps_in_no_loop_that_is_followed_are_said_to_have_no_checkpoint(world: Ranks) -> None:
    code = SMALL + "batch = torch.randn(2, 2)\nlist(map(train, [batch] * 8))\nturn"
    outcome = world.ok(code, checkpoint_every=2)
    assert outcome.results() == ["8", "8"]
    assert outcome.text(0, "stderr").count("No checkpoint is saved: the steps are taken in no loop") == 1
    assert not list(outcome.folder.path.glob("checkpoints/step-*"))


def test_functions_come_back_from_ranks_although_their_loops_are_followed(world: Ranks) -> None:
    import jupyter_llmcloud.magics.session.world_client  # noqa: F401  (as in a notebook)

    world.ok(
        "def double(values):\n    total = 0\n    for value in values:\n        total += value\n    return 2 * total"
    )
    assert world.pull("double")([1, 2]) == 6
