"""Who sees to a sweep holds its lock; those who only look at it are in nobody's way."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jupyter_llmcloud.errors import NameTaken
from jupyter_llmcloud.storage.search import sweeps
from jupyter_llmcloud.storage.search.sweeps import SweepFolder


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    folder = SweepFolder(tmp_path / "sweeps" / "tuned")
    with folder.driven():
        assert folder.is_driven
    return folder


def while_somebody_looks(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """`act` in another thread, at the moment in which somebody who looks at the sweep holds its lock."""
    flock, done = fcntl.flock, threading.Event()
    first = threading.get_ident()

    def act_and_say() -> None:
        act()
        done.set()

    def look_slowly(lock: int, how: int) -> None:
        flock(lock, how)
        if threading.get_ident() == first:
            threading.Thread(target=act_and_say).start()
            done.wait(0.02)

    monkeypatch.setattr(sweeps.fcntl, "flock", look_slowly)
    assert not folder.is_driven
    monkeypatch.setattr(sweeps.fcntl, "flock", flock)
    assert done.wait(20)


def test_two_who_look_at_once_both_see_that_nobody_drives_it(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them was told "running" of a sweep that was interrupted."""
    seen: list[bool] = []
    while_somebody_looks(folder, monkeypatch, lambda: seen.append(folder.is_driven))
    assert seen == [False]


def test_a_sweep_can_be_gone_on_with_while_a_page_looks_at_it(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--resume` was refused now and then: the sweep goes on already."""
    outcomes: list[str] = []

    def drive() -> None:
        try:
            with folder.driven():
                outcomes.append("driven")
        except NameTaken:
            outcomes.append("refused")

    while_somebody_looks(folder, monkeypatch, drive)
    assert outcomes == ["driven"]


def test_one_who_drives_it_is_alone_and_a_look_makes_no_folder(folder: SweepFolder, tmp_path: Path) -> None:
    with folder.driven(), pytest.raises(NameTaken, match="goes on already"), folder.driven():
        pass
    assert not folder.is_driven
    assert not SweepFolder(tmp_path / "sweeps" / "gone").is_driven
    assert not (tmp_path / "sweeps" / "gone").exists()
