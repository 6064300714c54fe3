"""What a checkpoint looks at and how it puts things back, decided by values."""

from __future__ import annotations

import collections
import copy
import os
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.training.checkpoint import rng, sharded_tensors
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.serialization import NotPlain, encode, put_back
from jupyter_llmcloud.training.resume import object_state
from jupyter_llmcloud.training.resume.change_detection import Marks, mark
from jupyter_llmcloud.training.resume.user_code import is_own_file


class Meter:
    def __init__(self) -> None:
        self.total, self.history, self.bar = 0.0, [1.0], object()


def as_it_is(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def frame(**variables: Any) -> FrameType:
    return cast(FrameType, SimpleNamespace(f_locals=variables))


VALUES = [
    (1, 2),
    ([1, 2], [1, 2, 3]),
    ({"a": [1]}, {"a": [2]}),
    (torch.zeros(10_000), torch.ones(10_000)),
    (collections.deque([1]), collections.deque([2])),
    (torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)),
]


@pytest.mark.parametrize(("one", "other"), VALUES, ids=[type(one).__name__ for one, _ in VALUES])
def test_a_mark_differs_when_the_value_does_and_only_then(one: Any, other: Any) -> None:
    assert mark(one) == mark(copy.deepcopy(one))
    assert mark(one) != mark(other)


def test_a_parameter_in_a_list_is_the_optimizers_business() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    before = mark([weight])
    weight.data += 1
    assert mark([weight]) == before


def test_only_attributes_that_have_changed_are_taken_and_containers_are_filled_in_place() -> None:
    meter, first = Meter(), Marks()
    object_state.add_marks(first, [], set(), {"0 meter": meter}, {})
    meter.total = 3.0
    meter.history.append(2.0)
    meter.bar = object()  # made anew: nothing of it is kept
    taken = object_state.take_attributes({"0 meter": meter}, first, as_it_is)
    assert taken == {"0 meter": {"total": 3.0, "history": [1.0, 2.0]}}
    fresh = Meter()
    alias = fresh.history
    object_state.put_attributes(taken, {"0 meter": fresh})
    assert (fresh.total, alias) == (3.0, [1.0, 2.0])
    with pytest.raises(ResumeMissed, match="no such object"):
        object_state.put_attributes(taken, {})


def test_a_list_that_has_grown_by_what_cannot_be_saved_is_refused_by_name() -> None:
    models: list[Any] = []
    first = Marks()
    object_state.add_marks(first, [frame(models=models)], set(), {}, {})
    models.append(torch.nn.Linear(1, 1))
    with pytest.raises(NotPlain, match="'models' has changed since the training began"):
        object_state.take_large([frame(models=models)], set(), {}, first, as_it_is, 100)


def test_large_tensors_are_taken_when_they_are_kept_and_left_out_when_they_are_made_anew() -> None:
    seen, first = torch.zeros(10_000), Marks()
    object_state.add_marks(first, [frame(seen=seen, batch=torch.zeros(10_000))], set(), {}, {})
    seen += 1
    now = [frame(seen=seen, batch=torch.ones(10_000))]
    assert set(object_state.take_large(now, set(), {}, first, as_it_is, 100)) == {"0 seen"}


def test_a_dict_of_another_kind_inside_a_dict_stays_of_its_kind() -> None:
    present = {"train": collections.defaultdict(list, a=[0])}
    anew, value = put_back({"train": {"a": [1], "b": [2]}}, present, set())
    assert (anew, value) == (False, {"train": {"a": [1], "b": [2]}})
    present["train"]["c"].append(3)


def test_shards_of_any_size_are_put_together_and_others_are_refused_with_what_to_do() -> None:
    def shard(local: torch.Tensor, *cuts: str) -> dict[str, Any]:
        return {"__llmcloud_shard__": list(cuts), "mesh": [3], "shape": [5, 2], "local": local}

    whole = torch.arange(10.0).reshape(5, 2)
    parts = [{"w": shard(part, "Shard(dim=0)"), "step": 3} for part in (*whole.split(3), whole[5:])]
    merged = sharded_tensors.merge(parts)
    assert torch.equal(merged["w"]["local"], whole)
    assert merged["step"] == 3
    with pytest.raises(ResumeMissed, match="resume it on 3"):
        sharded_tensors.merge([shard(whole, "Replicate()", "Shard(dim=0)")] * 3)


def test_random_numbers_go_on_from_a_snapshot_that_was_written_and_read(tmp_path: Path) -> None:
    import random

    import numpy as np

    snapshot = rng.loadable([rng.snapshot()])
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    torch.save(snapshot, tmp_path / "file")
    rng.restore(torch.load(tmp_path / "file", weights_only=True)[0])
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_own_files_are_those_of_no_installation(tmp_path: Path) -> None:
    assert is_own_file(str(tmp_path / "lab.py"))
    assert not any(map(is_own_file, (os.__file__, torch.__file__, sharded_tensors.__file__, "<stdin>")))


def test_two_checkpoints_of_one_step_are_written_apart(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.aside(4, 0, 1) != folder.aside(4, 0, 2)


def test_sharded_variables_are_no_plain_values() -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> None: ...

    with pytest.raises(NotPlain, match="sharded"):
        encode(torch.zeros(2).as_subclass(Sharded), as_it_is)
