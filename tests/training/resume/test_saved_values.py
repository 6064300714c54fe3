"""What a checkpoint looks at and how it puts things back, decided by values."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.training.checkpoint import rng, sharded_tensors
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.serialization import NotPlain, encode
from jupyter_llmcloud.training.resume.user_code import is_own_file, is_own_module, own_modules


def as_it_is(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


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


def test_a_folder_that_packages_were_installed_into_is_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, beside = tmp_path / "target", tmp_path / "beside"
    (target / "useful-1.0.dist-info").mkdir(parents=True)
    beside.mkdir()
    monkeypatch.setattr("sys.path", [*sys.path, str(target), str(beside)])
    assert not is_own_file(str(target / "useful" / "core.py"))
    assert is_own_file(str(beside / "lab.py"))


def test_two_checkpoints_of_one_step_are_written_apart(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.staging(4, 0, 1) != folder.staging(4, 0, 2)


def test_sharded_variables_are_no_plain_values() -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> None: ...

    with pytest.raises(NotPlain, match="sharded"):
        encode(torch.zeros(2).as_subclass(Sharded), as_it_is)


def test_no_module_of_an_installation_is_the_users_own_whatever_it_names_as_its_file(tmp_path: Path) -> None:
    import torch.distributed.nn  # noqa: F401 - torch 2.6 writes a module to a temporary folder here

    installed = [name for name in sys.modules if name.partition(".")[0] in ("torch", "_remote_module_non_scriptable")]
    assert [name for name in installed if is_own_module(name)] == []
    assert is_own_file(str(tmp_path / "helper.py"))


def test_modules_of_the_user_are_found_as_soon_as_they_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    known = [name for name, _ in own_modules()]
    for name in ("own_first", "own_second"):
        (tmp_path / f"{name}.py").write_text("value = 1\n")
        module = importlib.import_module(name)
        assert (name, module) in own_modules()
        del sys.modules[name]
        assert [name for name, _ in own_modules()] == known
