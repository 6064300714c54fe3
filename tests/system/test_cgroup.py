"""What control groups leave to a process, read from files like the kernel's."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from jupyter_llmcloud.system.cgroup import memory_groups, memory_left
from jupyter_llmcloud.training.diagnostics import memory_left as of_rank

GIB = 1 << 30


def _proc(folder: Path, groups: str, mounts: str) -> Path:
    (folder / "self").mkdir()
    (folder / "self" / "cgroup").write_text(groups)
    (folder / "self" / "mountinfo").write_text(mounts)
    (folder / "meminfo").write_text(f"MemTotal: 1\nMemAvailable: {64 << 20} kB\n")
    return folder


def _group(folder: Path, version: int, limit: object, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    cache = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{cache} {cached}\n")


def _mounts(point: Path, version: int) -> str:
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    return f"30 20 0:9 / /proc rw - proc proc rw\n31 20 0:10 / {point} rw shared:3 - {kind}\n"


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_job_counts_though_a_group_below_it_has_none(tmp_path: Path, version: int) -> None:
    """As under Slurm: the job has a limit, its step none of its own."""
    point, job = tmp_path / "mnt", tmp_path / "mnt" / "slurm" / "job_7"
    groups = "0::/slurm/job_7/step_0\n" if version == 2 else "4:cpu:/\n3:memory:/slurm/job_7/step_0\n"
    proc = _proc(tmp_path, groups, _mounts(point, version))
    none = "max" if version == 2 else 0x7FFFFFFFFFFFF000
    _group(point, version, none, 9 * GIB)
    _group(job, version, 4 * GIB, 3 * GIB, cached=GIB)
    _group(job / "step_0", version, none, GIB)
    assert [folder for _, _, folder in memory_groups(proc=proc)] == [job / "step_0"]
    assert memory_left(proc) == of_rank.available(proc) == 2 * GIB
    _group(job / "step_0", version, GIB, 2 * GIB)
    assert memory_left(proc) == 0


def test_without_limits_what_the_host_has_counts(tmp_path: Path) -> None:
    proc = _proc(tmp_path, "0::/\n", _mounts(tmp_path / "mnt", 2))
    (tmp_path / "mnt").mkdir()  # the topmost group of a host has no such files
    assert memory_left(proc) is None and of_rank.available(proc) == 64 * GIB
    assert memory_groups(proc=tmp_path / "absent") == []


def test_what_ulimit_leaves_to_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(of_rank.resource, "getrlimit", lambda _: (-1, -1))
    assert of_rank.before_limits() == []
    monkeypatch.setattr(
        of_rank.resource, "getrlimit", lambda kind: (taken + 3 * GIB, -1) if kind == resource.RLIMIT_AS else (-1, -1)
    )
    [left] = of_rank.before_limits()
    assert abs(left - 3 * GIB) < GIB
