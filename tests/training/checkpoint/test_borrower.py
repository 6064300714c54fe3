"""Large tensors that only an optimizer's step changes are borrowed, and found changed whatever has written into them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from jupyter_llmcloud.training.checkpoint.borrower import Borrower
from jupyter_llmcloud.training.checkpoint.serialization import NotPlain
from jupyter_llmcloud.training.checkpoint.stateful_objects import find, whole_memory_of
from jupyter_llmcloud.training.object_graph import memory


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.BatchNorm1d(100))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(8, 100)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def borrow(model: torch.nn.Module, optimizer: torch.optim.Optimizer, alone: bool = True) -> Borrower:
    borrower = Borrower()
    borrower.begin(
        whole_memory_of(find({"variable model": model, "variable optimizer": optimizer}, [optimizer], {}, alone))
    )
    return borrower


def test_what_only_a_step_changes_is_borrowed_and_the_rest_is_copied() -> None:
    model, optimizer = trained()
    borrower = borrow(model, optimizer)
    weight, state = model[0].weight, optimizer.state[model[0].weight]["exp_avg"]
    for tensor in (weight, state):
        assert borrower.copy_later("large", tensor).data_ptr() == tensor.data_ptr()
    for tensor in (model[0].bias, model[1].running_mean, torch.zeros(100, 100)):
        assert borrower.copy(str(id(tensor)), tensor).data_ptr() != tensor.data_ptr()
    assert borrower.num_bytes == 2 * weight.nbytes
    with torch.no_grad():
        model(torch.randn(8, 100))  # running statistics move
    assert borrower.is_untouched()


WRITES: dict[str, Callable[[torch.nn.Module, torch.optim.Optimizer], object]] = {
    "a step": step,
    "in place": lambda model, _: model[0].weight.detach().mul_(0.5),
    "by way of data": lambda model, _: model[0].weight.data.mul_(0.5),
    "no number": lambda model, _: model[0].weight.data.fill_(float("nan")),
}


@pytest.mark.parametrize("how", WRITES)
def test_whatever_writes_into_what_is_borrowed_is_noticed(how: str) -> None:
    model, optimizer = trained()
    borrower = borrow(model, optimizer)
    borrower.copy("weight", model[0].weight)
    assert borrower.is_untouched()
    WRITES[how](model, optimizer)
    assert not borrower.is_untouched()


def test_what_each_rank_trains_by_itself_is_not_borrowed_for_others() -> None:
    with pytest.raises(NotPlain, match="not alike on all ranks"):
        borrow(*trained(), alone=False)


def test_another_state_is_taken_without_the_one_before() -> None:
    model, optimizer = trained()
    borrower = borrow(model, optimizer)
    borrower.copy("weight", model[0].weight)
    step(model, optimizer)
    borrower.begin({memory.start_of(model[0].weight)})
    assert borrower.is_untouched() and not borrower.num_bytes
