"""Batches of an elastic run: on any number of ranks those of the world that it began with, by values."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from jupyter_llmcloud.core.parallel.balance import Balance
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.data import loading
from jupyter_llmcloud.training.data.rank_batches import Group
from jupyter_llmcloud.training.integrations.trainer_plans import _make_compute_loss
from jupyter_llmcloud.training.parallel import balance
from jupyter_llmcloud.training.parallel.balance import BALANCE, DataRanks

ROWS = 42


@pytest.fixture(autouse=True)
def left_alone() -> Iterator[None]:
    Accelerator()  # whose state a loader asks for
    yield
    BALANCE.close()
    BALANCE.begin(False, DataRanks())


def loader(batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(ROWS)), batch_size=batch_size, **options)


def prepared(given: DataLoader[Any], **options: Any) -> Any:
    found = prepare_data_loader(given, put_on_device=False, **BALANCE.options_of(given, options))
    BALANCE.adopt(found)
    return found


def steps(num: int, reference: int, most: int = 8, **options: Any) -> tuple[list[list[int]], list[int]]:
    """The rows of each step over `num` ranks, one after the other, and how many steps each rank expects."""
    parts, lengths = [], []
    for rank in range(num):
        BALANCE.begin(False, DataRanks(rank, num, reference, 1, most))
        own = prepared(loader(), **options)
        lengths.append(len(own))
        parts.append([rows.tolist() for (rows,) in own])
    return [[row for part in step for row in part] for step in zip(*parts, strict=True)], lengths


def of_accelerate(num: int) -> list[list[int]]:
    shards = [BatchSamplerShard(loader().batch_sampler, num, rank) for rank in range(num)]
    return [[row for part in step for row in part] for step in zip(*shards, strict=True)]


@pytest.mark.parametrize("reference", [1, 2, 3])
@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_steps_have_the_rows_that_accelerate_gives_the_first_world_on_any_number_of_ranks(
    num: int, reference: int
) -> None:
    found, lengths = steps(num, reference, most=4)
    assert found == of_accelerate(reference)
    assert set(lengths) == {len(found)}


def test_batches_that_are_split_over_the_ranks_stay_as_well() -> None:
    for num in (1, 2, 3):
        found, lengths = steps(num, 2, most=3, split_batches=True)
        assert [len(step) for step in found] == [4] * 11
        assert set(lengths) == {11}


def test_a_shuffled_loader_has_one_kind_of_generator_for_one_rank_and_for_several() -> None:
    """By it the order is found again when the world is larger than it was."""
    for num in (1, 2):
        BALANCE.begin(False, DataRanks(0, num, 1, 1, 2))
        own = prepared(loader(shuffle=True))
        assert own.synchronized_generator is not None


def test_the_gradient_of_ranks_that_have_different_numbers_of_rows_is_that_of_the_batch() -> None:
    reached = torch.zeros(())
    for rank in range(3):
        BALANCE.begin(False, DataRanks(rank, 3, 2, 1, 3))  # 8 rows over 3 ranks
        model = torch.nn.Linear(1, 1, bias=False)
        BALANCE.add_model(model)
        own = iter(prepared(loader()))
        (rows,) = next(own)
        model(rows[:, None].float()).mean().backward()
        assert model.weight.grad is not None
        reached = reached + model.weight.grad[0, 0] / 3
    assert torch.isclose(reached, torch.arange(8.0).mean())


ITEMS = torch.tensor(8)
LOSSES = {
    "mean": lambda out: out.mean() * 3 / 3,
    "by the items of all": lambda out: out.sum() / ITEMS * 3,
    "in a compiled model": lambda out: _Compiled.apply(out.sum() / ITEMS * 3),
}


class _Compiled(torch.autograd.Function):
    """Shows nothing of what is before it."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@pytest.mark.parametrize("kind", list(LOSSES))
def test_a_loss_of_trainer_is_weighed_once_by_the_items_of_all_ranks_or_by_rows(kind: str) -> None:
    """It counts the items of all ranks wherever a model could take them; whether the loss is divided by them is seen."""
    reached = torch.zeros(())
    for rank in range(3):
        BALANCE.begin(False, DataRanks(rank, 3, 2, 1, 3))
        model = torch.nn.Linear(1, 1, bias=False)
        BALANCE.add_model(model)
        (rows,) = next(iter(prepared(loader())))
        BALANCE.count_items(ITEMS)
        loss = LOSSES[kind](model(rows[:, None].float()))
        BALANCE.note_loss((loss,))
        loss.backward()
        assert model.weight.grad is not None
        reached = reached + model.weight.grad[0, 0] / 3
    assert torch.isclose(reached, torch.arange(8.0).mean())


@pytest.mark.parametrize(
    ("num", "is_mean", "wanted"), [(1, True, 2.0), (2, True, 1.0), (1, False, 1.0), (2, False, 1.0)]
)
def test_a_mean_that_trainer_multiplies_by_the_ranks_is_multiplied_by_those_that_the_run_began_with(
    num: int, is_mean: bool, wanted: float
) -> None:
    """A sum over the items of all ranks is right as it is: it was multiplied since gradients are averaged."""
    BALANCE.begin(False, DataRanks(0, num, 2, 1, 2))
    each = torch.nn.Linear(1, 1)(torch.ones(4, 1))

    class Trainer:
        args = SimpleNamespace(average_tokens_across_devices=True)
        model_accepts_loss_kwargs = True
        compute_loss_func = None

    trainer = Trainer()

    def original(*_: Any, return_outputs: bool, num_items_in_batch: torch.Tensor) -> Any:
        graph = each if torch.is_grad_enabled() else each.detach()
        loss = (graph.mean() if is_mean else graph.sum() / num_items_in_batch) * num
        return (loss, "outputs") if return_outputs else loss

    compute_loss = _make_compute_loss(original)
    unscaled = each.mean() if is_mean else each.sum() / ITEMS
    assert torch.isclose(compute_loss(trainer, None, {}, num_items_in_batch=ITEMS), unscaled * num * wanted)
    loss, outputs = compute_loss(trainer, None, {}, True, ITEMS)
    assert torch.isclose(loss, unscaled * num * wanted)
    assert outputs == "outputs"
    with torch.no_grad():  # evaluations, also one right after a resume
        for evaluated in (trainer, Trainer()):
            assert torch.isclose(compute_loss(evaluated, None, {}, num_items_in_batch=ITEMS), unscaled * num * wanted)


def test_a_sum_of_trainer_that_is_divided_by_something_else_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    """As reduction="batchmean" of a distillation."""
    BALANCE.begin(False, DataRanks(0, 1, 2, 1, 2))
    model = torch.nn.Linear(1, 1, bias=False)
    for (rows,) in prepared(loader()):
        BALANCE.count_items(torch.tensor(9))
        BALANCE.note_loss((model(rows[:, None].float()).sum() / len(rows),))
        BALANCE.after_step()
    assert capfd.readouterr().err.count("--elastic: the loss is a sum over its rows, or one that is divided") == 1


def test_a_mean_over_unlike_numbers_of_targets_is_said_on_another_number_of_ranks(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for num, ignored, is_said in ((1, 3, True), (1, 0, False), (2, 3, False)):
        BALANCE.begin(False, DataRanks(0, num, 2, 1, 2))
        model = torch.nn.Linear(1, 2)
        BALANCE.add_model(model)
        for (rows,) in prepared(loader()):
            targets = torch.zeros(len(rows), dtype=torch.long)
            targets[:ignored] = -100
            BALANCE.note_loss((torch.nn.functional.cross_entropy(model(rows[:, None].float()), targets),))
            BALANCE.after_step()
        said = capfd.readouterr().err
        assert said.count("--elastic: the loss is a mean over targets of which rows have unlike numbers") == is_said


@pytest.mark.parametrize(("theirs", "is_said"), [(5, True), (3, False)])
def test_with_unlike_shares_a_mean_over_unlike_numbers_of_targets_is_said(
    theirs: int, is_said: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    counts = [torch.full((6,), 3), torch.full((2,), theirs)]  # targets of each row

    def gathered(own: list[float]) -> list[list[float]]:
        ours, num_steps = own[-1], 8
        other = 0.0
        for _ in range(num_steps):
            other = 0.9 * other + float(counts[1].sum()) / 2
        return [own, [*own[:-1], ours if not ours else other]]

    monkeypatch.setattr(balance, "_gathered", gathered)
    BALANCE.begin(True, DataRanks(0, 2))
    BALANCE._balance = Balance(2, [3.0, 1.0])
    model = torch.nn.Linear(1, 2)
    BALANCE.add_model(model)
    given = DataLoader(TensorDataset(torch.arange(100.0)), batch_size=4)
    for (rows,) in prepared(given, num_processes=2, process_index=0):
        assert len(rows) == 6
        targets = torch.zeros(len(rows), 8, dtype=torch.long)
        targets[:, 3:] = -100
        loss = torch.nn.functional.cross_entropy(model(rows[:, None]).repeat(1, 8).view(-1, 2), targets.view(-1))
        BALANCE.note_loss((loss,))
        loss.backward()
        BALANCE.after_step()
    said = capfd.readouterr().err
    assert said.count("--balance: the loss is a mean over targets of which rows have unlike numbers") == is_said


def test_every_rank_keeps_two_rows_where_a_layer_takes_their_variance() -> None:
    for layer, rows in ((torch.nn.BatchNorm1d(1), [6, 2]), (torch.nn.LayerNorm(1), [7, 1])):
        BALANCE.begin(True, DataRanks(0, 2))
        BALANCE._balance = Balance(2, [9.0, 1.0])
        model = torch.nn.Sequential(layer)
        BALANCE.add_model(model)
        assert BALANCE.begin_pass().draw(8) == rows
        BALANCE.begin(False, DataRanks())
        del model


def test_what_is_evaluated_between_a_batch_and_its_gradient_does_not_weigh_it() -> None:
    BALANCE.begin(False, DataRanks(0, 3, 2, 1, 3))
    model = torch.nn.Linear(1, 1, bias=False)
    BALANCE.add_model(model)
    own, held_out = prepared(loader()), prepared(loader(3))
    for (rows,) in own:
        model.eval()
        assert {len(part) for (part,) in held_out} == {2}  # a third of 6 rows
        model.train()
        model(rows[:, None].float()).mean().backward()
        break
    assert model.weight.grad is not None
    assert torch.isclose(model.weight.grad[0, 0], rows.float().mean() * len(rows) * 3 / 8)


def test_what_trainer_evaluates_is_cut_for_the_present_world() -> None:
    BALANCE.begin(False, DataRanks(0, 1, 2, 1, 2))
    own = prepared(loader())
    assert (len(own), own.total_batch_size) == (6, 8)
    with BALANCE.apart():
        assert (len(own), own.total_batch_size) == (11, 4)
        assert [len(rows) for (rows,) in own][:2] == [4, 4]
    assert [len(rows) for (rows,) in own][:2] == [8, 8]


def test_a_loader_of_an_elastic_cell_is_an_ordinary_one_in_later_cells() -> None:
    BALANCE.begin(False, DataRanks(0, 1, 2, 1, 2))
    own = prepared(loader())
    BALANCE.close()
    BALANCE.begin(False, DataRanks(1, 2))
    assert next(iter(own))[0].tolist() == [4, 5, 6, 7]


def test_a_batch_that_cannot_be_shared_by_the_largest_world_is_refused_before_training_starts() -> None:
    BALANCE.begin(False, DataRanks(0, 1, 1, 1, 8))
    with pytest.raises(UsageError, match=r"a batch of 4 rows .* leaves ranks without a row when there are 8"):
        prepared(loader())


def test_a_plan_that_does_not_weigh_needs_batches_that_every_number_of_ranks_divides() -> None:
    BALANCE.begin(False, DataRanks(0, 2, 2, 1, 3, must_be_even=True))
    with pytest.raises(UsageError, match=r"8 rows over all ranks cannot be cut evenly for 3 of them"):
        prepared(loader())
    BALANCE.begin(False, DataRanks(0, 2, 2, 1, 2, must_be_even=True))
    prepared(loader())


def test_loaded_data_keep_their_batch_as_well_and_are_weighed() -> None:
    steps = []
    for rank in range(3):
        BALANCE.begin(False, DataRanks(rank, 3, 2, 1, 3))
        model = torch.nn.Linear(1, 1, bias=False)
        BALANCE.add_model(model)
        own = loading.load(TensorDataset(torch.arange(float(ROWS))), 4, shuffle=False, rank=None, world_size=None)
        own.rows._group._given = (rank, None)
        own.rows._group.__class__ = _ThreeRanks
        gradients: list[torch.Tensor] = []
        for (rows,) in own:
            model.weight.grad = None
            model(rows[:, None]).mean().backward()
            assert model.weight.grad is not None
            gradients.append(model.weight.grad[0, 0].clone())
        steps.append(torch.stack(gradients))
    assert own.total_batch_size == 8
    wanted = [torch.arange(float(low), min(low + 8.0, ROWS)).mean() for low in range(0, 40, 8)]
    wanted[-1] = torch.arange(32.0, 42.0).mean()  # two rows are too few for a step of their own
    assert torch.allclose(torch.stack(steps).mean(0), torch.stack(wanted))


class _ThreeRanks(Group):
    @property
    def size(self) -> int:
        return 3


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(ROWS))


def test_a_loader_whose_batches_cannot_be_cut_says_so_before_training_starts(
    capfd: pytest.CaptureFixture[str],
) -> None:
    BALANCE.begin(False, DataRanks(0, 2, 2, 1, 2))
    for given in (DataLoader(Stream(), batch_size=4), DataLoader(Stream(), batch_size=4)):
        prepared(given)
    said = capfd.readouterr().err
    assert said.count("--elastic: the batches of this DataLoaderShard cannot be cut") == 1
    assert "the run begins anew" in said


def test_a_step_whose_rows_came_from_no_loader_says_that_its_batch_does_not_stay(
    capfd: pytest.CaptureFixture[str],
) -> None:
    BALANCE.begin(False, DataRanks(0, 2, 2, 1, 2))
    for _ in range(2):
        BALANCE.after_step()
    assert capfd.readouterr().err.count("came from no loader that accelerator.prepare() or lc.data.load()") == 1
    BALANCE.begin(False, DataRanks(0, 1, 2, 1, 2))  # alone, where nothing wraps the model
    for _ in prepared(loader()):
        BALANCE.after_step()
    assert capfd.readouterr().err == ""
