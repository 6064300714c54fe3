"""What a failed test leaves for whoever looks into it: its logs, copied before they are cleaned up. A plugin of pytest.

Everything that tests start writes below the folder of the session (see conftest): roots with runs, runtime folders,
folders of agents, logs of servers. What was written there since a test began is that test's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.schedule import group_of
from tests.support.session import FOLDER, is_worker

KEPT = leaks.OUTPUT / "failed"
MAX_FILE = 512 << 10  # of a longer file its end
MAX_FILES = 400
MAX_TESTS = 30
TEXTS = ("", ".log", ".txt", ".json", ".jsonl", ".yaml", ".out", ".err", ".py", ".ipynb", ".md")

_began = pytest.StashKey[dict[str, float]]()


def written_since(folder: Path, began: float) -> Iterator[Path]:
    """The files of text below a folder that were written after `began`, the newest first."""
    found: list[tuple[float, Path]] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        for path in (Path(parent, name) for name in names):
            with contextlib.suppress(OSError):
                status = path.lstat()
                if (
                    path.suffix in TEXTS
                    and "secret" not in path.name
                    and path.is_file()
                    and status.st_size
                    and status.st_mtime >= began
                ):
                    found.append((status.st_mtime, path))
    yield from (path for _, path in sorted(found, reverse=True)[:MAX_FILES])


def keep(test: str, folder: Path, began: float, kept: Path | None = None) -> Path:
    """Copy what a test has written to a folder of its own; returns that."""
    target = (kept or KEPT) / re.sub(r"[^\w.=-]+", "-", test.removeprefix("tests/")).strip("-")[:150]
    for path in written_since(folder, began):
        copy = target / path.relative_to(folder)
        with contextlib.suppress(OSError):  # gone meanwhile
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(_end_of(path))
    return target


def prune(kept: Path, at_most: int = MAX_TESTS) -> None:
    """Remove all but the newest."""
    folders = sorted(kept.iterdir(), key=lambda path: path.stat().st_mtime) if kept.is_dir() else []
    for folder in folders[:-at_most]:
        shutil.rmtree(folder, ignore_errors=True)


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_FILE))
        return file.read(MAX_FILE)


def pytest_sessionstart(session: pytest.Session) -> None:
    if not is_worker(session.config):
        prune(KEPT)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note when a test begins, or the first of those that share what their module has started."""
    item.session.stash.setdefault(_began, {}).setdefault(group_of(item), time.time() - 0.1)  # times of files are coarse


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    began = item.session.stash.get(_began, {}).get(group_of(item))
    if report.failed and began is not None:
        target = keep(item.nodeid, item.config.stash[FOLDER], began)
        if target.is_dir():
            report.sections.append(("logs of this test", str(target)))
