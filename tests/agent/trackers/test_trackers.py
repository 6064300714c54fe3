"""`--track`: what a run logs is sent to a tracker by a process of its own, which can hold up and break nothing."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.agent.runs.run_feed import RunFeed
from jupyter_llmcloud.agent.trackers import process
from jupyter_llmcloud.agent.trackers.journal_follower import JournalFollower, Measured
from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

WITHIN_S = 60.0

# Stands for the package trackio: writes down what it is told. BROKEN and SLOW are set by a test.
TRACKIO = """
import json, os, time
class Run:
    def __init__(self, **about):
        self.file = open(os.environ["TOLD"], "a", buffering=1)
        self.say("init", about)
    def say(self, what, about):
        self.file.write(json.dumps([what, about]) + "\\n")
    def log(self, values, step):
        if os.environ.get("BREAKS_AT") == str(step):
            raise OSError("the server is on fire")
        self.say("log", [step, values])
    def finish(self):
        self.say("finish", {})
def init(**about):
    if os.environ.get("HANGS"):
        time.sleep(1000)
    return Run(**about)
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """What the tracker was told so far."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}{os.pathsep}{os.environ['PYTHONPATH']}")
    path = tmp_path / "told"
    path.touch()
    monkeypatch.setenv("TOLD", str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.02)


async def ended(feed: RunFeed) -> None:
    """Its run has ended, and then the processes of its trackers."""
    feed.close()
    assert feed._trackers is not None
    async with asyncio.timeout(WITHIN_S):
        await asyncio.gather(*feed._trackers.tasks)


def feed_of(folder: Path, **spec: Any) -> RunFeed:
    record = RunRecord("mine-1", "mine", ranks=[0, 1], world_size=2, spec={"track": ["trackio"], **spec})
    feed = RunFeed(record, RunFolder(folder / "mine-1"), "")
    feed.begin(at_once=True)
    feed.begin_attempt(0, [0, 1])
    return feed


def logged(*losses: float, first: int = 0) -> list[dict[str, Any]]:
    return [{"values": {"loss": loss}, "step": step} for step, loss in enumerate(losses, first)]


def test_a_tracker_has_one_run_with_what_the_first_rank_logged(tmp_path: Path, told: Callable[[], list[Any]]) -> None:
    async def trains() -> None:
        feed = feed_of(tmp_path)
        feed.journal("metrics", 0, logged(3.0, 2.0))
        feed.journal("metrics", 1, [{"values": {"loss": 9.0, "of rank 1": 1}, "step": 0}])
        await until(lambda: len(told()) == 4)
        feed.journal("metrics", 0, logged(1.0, first=2))
        feed.change("finished")
        feed.write_record()
        await ended(feed)

    asyncio.run(trains())
    [first, *logs, _] = told()
    assert first[0] == "init" and first[1]["name"] == "mine-1" and first[1]["config"]["world_size"] == 2
    assert [about for _, about in logs] == [
        [0, {"loss": 3.0}],
        [1, {"loss": 2.0}],
        [0, {"of rank 1": 1.0}],
        [2, {"loss": 1.0}],
    ]


def test_who_leads_the_run_next_goes_on_where_the_tracker_was(tmp_path: Path, told: Callable[[], list[Any]]) -> None:
    async def leads(*losses: float, first: int, how_many: int) -> None:
        feed = feed_of(tmp_path)
        feed.journal("metrics", 0, logged(*losses, first=first))
        await until(lambda: len([what for what, _ in told() if what == "log"]) == how_many)
        feed.cut_off()
        await ended(feed)

    asyncio.run(leads(3.0, 2.0, first=0, how_many=2))
    asyncio.run(leads(1.0, first=2, how_many=3))
    assert [about for what, about in told() if what == "log"] == [
        [0, {"loss": 3.0}],
        [1, {"loss": 2.0}],
        [2, {"loss": 1.0}],
    ]


@pytest.mark.parametrize("variable", [{"BREAKS_AT": "0"}, {"HANGS": "1"}])
def test_a_tracker_that_breaks_or_hangs_leaves_the_run_alone(
    tmp_path: Path, told: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch, variable: dict[str, str]
) -> None:
    monkeypatch.setattr(process, "FINISH_S", 0.5)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)

    async def trains() -> RunFeed:
        feed = feed_of(tmp_path)
        feed.journal("metrics", 0, logged(*[1.0] * 100))
        if "BREAKS_AT" in variable:
            await until(lambda: feed.record.notes)
        feed.change("finished")
        await ended(feed)
        return feed

    notes = asyncio.run(trains()).record.notes
    if "BREAKS_AT" in variable:
        assert notes == ["--track trackio: OSError: the server is on fire. The run goes on without it."]
    else:  # which is known when the run has ended
        [note] = notes
        assert note.startswith("--track trackio: it has not taken all that was logged: see tracking/trackio.log")
        assert RunFolder(tmp_path / "mine-1").read().notes == notes


def test_a_package_that_is_missing_is_named_with_what_to_do(tmp_path: Path) -> None:
    async def trains() -> list[str]:
        feed = feed_of(tmp_path, track=["mlflow"])
        await ended(feed)
        return feed.record.notes

    [note] = asyncio.run(trains())
    assert note.startswith(
        "--track mlflow: the package mlflow is not installed where the run is executed: pip install mlflow"
    )


def test_a_tracker_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"no tracker 'tensorbord'\. Known: tensorboard, wandb, mlflow, trackio"):
        RunSpec.make({"track": "tensorbord"})
    assert RunSpec.make({"track": "wandb,tensorboard,wandb"}).track == ["wandb", "tensorboard"]


def test_what_has_no_step_is_counted_also_by_who_goes_on(tmp_path: Path) -> None:
    folder, place = RunFolder(tmp_path / "run"), tmp_path / "place.json"
    journal = JournalWriter(folder.metrics(0))
    follower = JournalFollower(folder, place)
    journal.append(
        [{"t": 5.0, "step": None, "values": {"a": 1}}, {"t": 6.0, "step": None, "values": {"a": None, "b": "x"}}]
    )
    first, second = follower.read()
    assert first == Measured(1, 5.0, {"a": 1.0})
    assert second.step == 2 and math.isnan(second.values["a"]) and "b" not in second.values
    follower.save()
    journal.append([{"t": 7.0, "step": None, "values": {"a": 3}}])
    assert JournalFollower(folder, place).read() == [Measured(3, 7.0, {"a": 3.0})]
