"""What a rank saves of its own comes back from its files, and ranks that hold the same write the same bytes."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from jupyter_llmcloud.training.checkpoint import state_files
from jupyter_llmcloud.training.checkpoint.serialization import encode


def model_state(state: dict[str, Any], trained: list[str]) -> dict[str, Any]:
    return {"kind": "module", "state": state, "parameters": trained, "trainable": trained, "fixed_size": ""}


def trained() -> dict[str, Any]:
    """The states of a small model and of its optimizer, made anew each time."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()

    def copy(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone()

    names = [name for name, _ in model.named_parameters()]
    of_optimizer = {"kind": "optimizer", "state": encode(optimizer.state_dict(), copy), "loose": []}
    schedule = {"kind": "other", "state": {"last_epoch": 3}}
    return {"m": model_state(encode(model.state_dict(), copy), names), "o": of_optimizer, "s": schedule}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.to_dense(), other.to_dense())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_states_come_back_and_ranks_that_hold_the_same_write_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for rank in range(2):
        left, names = state_files.write({"objects": trained()}, tmp_path / f"rank-{rank:04d}.pt")
        assert names == [f"rank-{rank:04d}.model-1.safetensors", f"rank-{rank:04d}.optimizer-1.state"]
        written.append([(tmp_path / name).read_bytes() for name in names])
        assert not any(isinstance(value, torch.Tensor) for value in left["objects"]["m"]["state"].values())
        assert same(state_files.put_back(left, tmp_path)["objects"], trained())
    assert written[0] == written[1]


def test_tensors_that_no_such_file_takes_stay_beside_it(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    state = {
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.ones(2, dtype=torch.complex128),
        "empty": torch.zeros(0, 3),
        "strided": torch.arange(6.0).reshape(2, 3).t(),
        "view": whole[:4],
        "overlapping": whole[2:8],
        "whole": whole,
        "tied": whole,
        "_extra_state": {"calls": 3},
    }
    left, _ = state_files.write({"objects": {"m": model_state(state, ["whole"])}}, tmp_path / "rank-0000.pt")
    assert {"sparse", "complex", "_extra_state"} == left["objects"]["m"]["state"].keys()
    assert same(state_files.put_back(left, tmp_path)["objects"]["m"]["state"], state)


def test_a_full_disk_is_an_error_of_the_operating_system(tmp_path: Path) -> None:
    states = {"o": {"kind": "optimizer", "state": {"state": {0: torch.randn(100_000)}}, "loose": []}}
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            state_files.write({"objects": states}, tmp_path / "rank-0000.pt")
        except OSError as error:
            os._exit(7 if error.errno == errno.EFBIG else 8)
        except BaseException:
            os._exit(9)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize("differs", ["model", "optimizer"])
def test_a_rank_that_differs_in_a_bit_writes_another_file(tmp_path: Path, differs: str) -> None:
    objects = trained()
    state = objects["m"]["state"] if differs == "model" else objects["o"]["state"]["state"][0]
    value = state["0.weight" if differs == "model" else "exp_avg"]
    value.view(-1)[0] = torch.nextafter(value.view(-1)[0], torch.tensor(9.0))
    (_, first), (_, other) = [
        state_files.write({"objects": held}, tmp_path / f"rank-{rank:04d}.pt")
        for rank, held in enumerate((trained(), objects))
    ]
    pairs = [
        (tmp_path / one).read_bytes() == (tmp_path / two).read_bytes() for one, two in zip(first, other, strict=True)
    ]
    assert pairs == [differs != "model", differs != "optimizer"]
