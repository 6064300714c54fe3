"""The passes of a worker of `--plan async-ps`, and batches on their way through a pipeline: by values, without ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.parallel.asynchronous.rows import SharedPasses
from jupyter_llmcloud.training.parallel.strategies.microbatches import Passage, Stage


class Loader:
    """Of one batch."""

    num_workers = 0
    end_of_dataloader = True


class Sampler:
    """That has given it."""

    num_drawn = 1

    def batches_of(self, worker: int) -> Any:
        raise AssertionError(worker)


def test_a_loader_that_is_made_for_each_epoch_has_a_number_of_its_own_wherever_its_memory_was() -> None:
    # The passes of all workers are told by these numbers, and each worker frees its loaders when it likes.
    ended: list[str] = []
    passes = SharedPasses(0, lambda key, phase: (ended.append(key) or [0], {}))
    places = set()
    for _ in range(50):
        loader = Loader()
        places.add(id(loader))
        list(passes.begin(loader, Sampler(), iter([1])))
        del loader
    assert len(places) < 50
    assert ended == [f"{number}.0" for number in range(50)]


def test_passes_of_one_loader_are_counted() -> None:
    ended: list[str] = []
    passes = SharedPasses(0, lambda key, phase: (ended.append(key) or [0], {}))
    one, other = Loader(), Loader()
    for loader in (one, other, one):
        list(passes.begin(loader, Sampler(), iter([1])))
    assert ended == ["0.0", "1.0", "0.1"]


@pytest.fixture
def group() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_batch_goes_back_through_a_pipeline_once_and_who_asks_again_is_told(group: Any) -> None:
    # Twice would change nothing the second time, without a word: what was kept of the batch has gone.
    run = Passage(Stage(), [((), {})], {}, [])
    weight = torch.ones(2, requires_grad=True)
    run._outputs, run._inputs = [(weight * 3).sum()], [None]
    run.backward(torch.tensor(1.0))
    assert weight.grad is not None and weight.grad.tolist() == [3, 3]
    with pytest.raises(UsageError, match="backward was called twice"):
        run.backward(torch.tensor(1.0))
