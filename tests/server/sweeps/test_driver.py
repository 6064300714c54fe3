"""A sweep is seen through with ranks that are played: what its study and its record hold, what is stopped, what goes on."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.core.search.rules import SweepStopAsked, TimeOver
from jupyter_llmcloud.core.search.spec import SweepSpec
from jupyter_llmcloud.errors import ConnectionLost, UsageError
from jupyter_llmcloud.protocol.agent_messages import Execute, RunEnded
from jupyter_llmcloud.server.sweeps import driver as drivers
from jupyter_llmcloud.server.sweeps.driver import SweepBoard, SweepDriver, SweepWork
from jupyter_llmcloud.server.sweeps.gang import ClusterDoors
from jupyter_llmcloud.server.sweeps.trial_watch import TrialWatch
from jupyter_llmcloud.storage.search.study import StudyPlan, SweepStudy, make_sampler, open_storage, optuna
from jupyter_llmcloud.storage.search.sweeps import SweepRecord, SweepStore
from jupyter_llmcloud.storage.search.turns import RESTORED, SAVED

pytest.importorskip("optuna")
from optuna.storages.journal import JournalFileBackend

CODE = {"source": "1", "code": "1", "filename": "<c>", "line_offset": 0, "execution_count": 1, "folder": ""}
PUSHED = {"width": "4"}
Logged = list[dict[str, float]]
Plays = Callable[["PlayedGang", int, Any], Any]


class PlayedGang:
    """In place of ranks: `play` says what a trial logs, and how it ends."""

    cluster, address, world_id, num_ranks = "c", "/nowhere", "w", 2

    def __init__(self, plan: StudyPlan, play: Plays) -> None:
        self._plan = plan
        self._play = play
        self.is_stopped = asyncio.Event()
        self.cells: list[Execute] = []
        self.on_values: Callable[[int, int | None, dict[str, float]], None] = lambda *_: None

    async def run(self, cell: Execute, on_values: Callable[[int, int | None, dict[str, float]], None]) -> RunEnded:
        self.cells.append(cell)
        self.is_stopped.clear()
        self.on_values = on_values
        number = cell.trial["number"]
        state = await self._play(self, number, await asyncio.to_thread(self._trial, number))
        return RunEnded(run_id=cell.run_id, **(state if isinstance(state, dict) else {"state": state}))

    def _trial(self, number: int) -> Any:
        from jupyter_llmcloud.storage.search.study import open_storage

        storage, plan = open_storage(self._plan.storage), self._plan
        sampler = make_sampler(plan.sampler, plan.seed and plan.seed + number)
        study = optuna().load_study(study_name=plan.name, storage=storage, sampler=sampler)
        ident = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(plan.name), number)
        return optuna().trial.Trial(study, ident)

    async def stop(self) -> None:
        self.is_stopped.set()

    async def close(self) -> None:
        pass


class PlayedSweep:
    """A driver whose gangs are played."""

    def __init__(self, root: Path, play: Plays, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.spec = SweepSpec.make({"metric": "loss", "trials": 6, "seed": 1, **options})
        self.folder = SweepStore(root).folder("tuned")
        self.folder.path.mkdir(parents=True, exist_ok=True)
        names = ("direction", "sampler", "prune", "seed")
        self.plan = StudyPlan(
            str(self.folder.journal), "tuned", metric="loss", **{name: getattr(self.spec, name) for name in names}
        )
        self.gangs: list[PlayedGang] = []

        async def open_gang(*_: Any) -> PlayedGang:
            self.gangs.append(PlayedGang(self.plan, play))
            return self.gangs[-1]

        monkeypatch.setattr(drivers.Gang, "open", open_gang)

    def driver(self, record: SweepRecord | None = None, resumes: bool = False) -> SweepDriver:
        known = record or SweepRecord("tuned", spec=self.spec.as_dict())
        study = (SweepStudy.reopen if resumes else SweepStudy.create)(self.plan)
        doors = ClusterDoors(None, None)  # type: ignore[arg-type]
        log = logging.getLogger("test")
        return SweepDriver(
            SweepBoard(self.folder, known),
            SweepWork(self.spec, {**CODE, "pushed": PUSHED}, b"pickled"),
            study,
            doors,
            log,
        )


async def parabola(gang: PlayedGang, number: int, trial: Any) -> str:
    """Loss of an x that is far from 0.3, falling to it in ten steps."""
    x = await asyncio.to_thread(trial.suggest_float, "x", 0.0, 1.0)
    for step in range(10):
        gang.on_values(0, step, {"loss": (x - 0.3) ** 2 + 1 / (step + 1), "lr": 0.1})
        await asyncio.sleep(0)
    return "finished"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path


async def test_what_trials_log_is_in_the_study_and_the_best_in_the_record(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = PlayedSweep(root, parabola, monkeypatch, trials=8, parallel=2)
    await sweep.driver().run()
    record = sweep.folder.read()
    assert (record.state, [row.state for row in record.trials]) == ("finished", ["done"] * 8)
    best = record.best()
    assert best is not None and best.value == min(row.value or 9 for row in record.trials)
    study = optuna().load_study(study_name="tuned", storage=_storage(sweep))
    assert study.best_trial.number == best.number and study.best_value == best.value
    assert study.best_trial.user_attrs["llmcloud:run"] == best.run_id and study.best_params == best.params
    assert record.importance == {"x": 1.0} and len(sweep.gangs) == 2
    cells = [cell for gang in sweep.gangs for cell in gang.cells]
    assert len(cells) == 8 and all((cell.payload, cell.pushed) == (b"pickled", PUSHED) for cell in cells)


def _storage(sweep: PlayedSweep) -> Any:
    from jupyter_llmcloud.storage.search.study import open_storage

    return open_storage(sweep.plan.storage)


async def test_a_trial_that_falls_behind_is_stopped_and_pruned(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(gang: PlayedGang, number: int, trial: Any) -> str:
        await asyncio.to_thread(trial.suggest_float, "x", 0.0, 1.0)
        for step in range(1, 30):
            gang.on_values(0, step, {"loss": number + 1.0})
            await asyncio.sleep(0.01 if number else 0)
            if gang.is_stopped.is_set():
                return "stopped"
        return "finished"

    sweep = PlayedSweep(root, play, monkeypatch, prune="asha,min=2,reduction=2")
    await sweep.driver().run()
    record = sweep.folder.read()
    pruned = [row for row in record.trials if row.state == "pruned"]
    assert record.state == "finished" and pruned and all((row.step or 0) < 29 for row in pruned)
    assert optuna().load_study(study_name="tuned", storage=_storage(sweep)).trials[5].state.name == "PRUNED"


async def test_a_trial_whose_ranks_are_lost_is_run_again_with_the_same_values(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[float]] = {}

    async def play(gang: PlayedGang, number: int, trial: Any) -> Any:
        x = await asyncio.to_thread(trial.suggest_float, "x", 0.0, 1.0)
        seen.setdefault(number, []).append(x)
        if number == 1 and len(seen[1]) == 1:
            raise ConnectionLost("the node agent of its ranks has gone.")
        if number == 2 and len(seen[2]) == 1:
            return {"state": "failed", "errors": [{"ename": "RankKilled", "evalue": "SIGKILL"}]}
        gang.on_values(0, 0, {"loss": x})
        return "finished"

    sweep = PlayedSweep(root, play, monkeypatch, trials=4)
    await sweep.driver().run()
    record = sweep.folder.read()
    assert [row.state for row in record.trials] == ["done"] * 4
    assert [row.num_attempts for row in record.trials] == [1, 2, 2, 1]
    assert [len(values) for values in seen.values()] == [1, 2, 2, 1] and all(len({*v}) == 1 for v in seen.values())


async def test_stop_keeps_what_is_done_and_the_rest_is_gone_on_with(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = asyncio.Event()

    async def play(gang: PlayedGang, number: int, trial: Any) -> str:
        x = await asyncio.to_thread(trial.suggest_float, "x", 0.0, 1.0)
        if number == 2 and not waits.is_set():
            waits.set()
            await gang.is_stopped.wait()
            return "stopped"
        gang.on_values(0, 0, {"loss": x})
        return "finished"

    sweep = PlayedSweep(root, play, monkeypatch, trials=5)
    driver = sweep.driver()
    going = asyncio.ensure_future(driver.run())
    await waits.wait()
    driver.stop()
    await asyncio.wait_for(going, 20)
    record = sweep.folder.read()
    assert (record.state, [row.state for row in record.trials]) == ("stopped", ["done", "done", "stopped"])
    record.state = "running"
    await sweep.driver(record, resumes=True).run()
    record = sweep.folder.read()
    assert record.state == "finished"
    assert [row.state for row in record.trials] == ["done", "done", "stopped", "done", "done", "done"]


async def test_what_was_under_way_when_its_server_was_killed_is_done_first(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = asyncio.Event()
    values: dict[int, list[float]] = {}

    async def play(gang: PlayedGang, number: int, trial: Any) -> str:
        x = await asyncio.to_thread(trial.suggest_float, "x", 0.0, 1.0)
        values.setdefault(number, []).append(x)
        if number == 1 and not killed.is_set():
            killed.set()
            await asyncio.get_running_loop().create_future()
        gang.on_values(0, 0, {"loss": x})
        return "finished"

    sweep = PlayedSweep(root, play, monkeypatch, trials=3)
    going = asyncio.ensure_future(sweep.driver().run())
    await killed.wait()
    going.cancel()
    await asyncio.wait([going])
    record = sweep.folder.read()
    assert record.state == "running" and sweep.folder.true_state(record) == "interrupted"
    record.trials = [row for row in record.trials if row.state != "running"]
    await sweep.driver(record, resumes=True).run()
    record = sweep.folder.read()
    assert [row.state for row in record.trials] == ["done"] * 3
    assert len(values[1]) == 2 and len({*values[1]}) == 1


@pytest.mark.parametrize(
    ("logged", "metric", "words"),
    [
        ([{"los": 1.0, "lr": 0.1}], "loss", "the metric 'loss' never came: it logged los, lr."),
        ([], "loss", "the metric 'loss' never came: it logged nothing."),
        ([{"los": 1.0}], None, "call trial.report(value, step), or name a metric (--metric NAME); it logged los."),
    ],
)
async def test_a_metric_that_never_comes_ends_the_sweep_and_names_those_that_came(
    root: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged, metric: str | None, words: str
) -> None:
    async def play(gang: PlayedGang, number: int, trial: Any) -> str:
        for values in logged:
            gang.on_values(0, 0, values)
        return "finished"

    sweep = PlayedSweep(root, play, monkeypatch, metric=metric)
    await sweep.driver().run()
    record = sweep.folder.read()
    assert record.state == "failed" and words in record.reason and len(record.trials) == 1


async def test_trials_that_only_fail_end_it_with_the_first_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(gang: PlayedGang, number: int, trial: Any) -> Any:
        return {"state": "failed", "errors": [{"ename": "ZeroDivisionError", "evalue": f"trial {number}"}]}

    sweep = PlayedSweep(root, play, monkeypatch, trials=40)
    await sweep.driver().run()
    record = sweep.folder.read()
    assert record.reason == "the first 3 trials have failed. The first error: ZeroDivisionError: trial 0"
    assert len(record.trials) == 3


async def test_a_gang_that_waits_while_others_run_is_told_of_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = PlayedSweep(root, parabola, monkeypatch, trials=4, parallel=2)
    play_gang: Any = drivers.Gang.open
    opened, notes = asyncio.Event(), list[str]()

    async def open_gang(doors: Any, plan: Any, ticket: str, note: Callable[[str], None]) -> PlayedGang:
        note("waits for free slots. Others have them.")
        while opened.is_set():  # the second one never has any
            note("waits for free slots. Others have them.")
            await asyncio.sleep(0)
        opened.set()
        note("")
        found: PlayedGang = await play_gang()
        return found

    monkeypatch.setattr(drivers.Gang, "open", open_gang)
    driver = sweep.driver()
    change = driver.board.change

    def noted(**values: Any) -> None:
        notes.extend([values["note"]] if values.get("note") else [])
        change(**values)

    monkeypatch.setattr(driver.board, "change", noted)
    await driver.run()
    record = sweep.folder.read()
    assert [row.state for row in record.trials] == ["done"] * 4 and record.note == ""
    assert notes[-1] == "1 of 2 gangs run trials; the rest waits for free slots."
    assert notes.count(notes[-1]) == 1 and "waits for free slots. Others have them." in notes


async def test_every_combination_is_tried_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(gang: PlayedGang, number: int, trial: Any) -> str:
        width = await asyncio.to_thread(trial.suggest_categorical, "width", [8, 16, 32])
        depth = await asyncio.to_thread(trial.suggest_int, "depth", 1, 2)
        gang.on_values(0, 0, {"loss": float(width * depth)})
        return "finished"

    sweep = PlayedSweep(root, play, monkeypatch, trials=40, sampler="grid")
    await sweep.driver().run()
    record = sweep.folder.read()
    assert record.reason == "every combination has been tried." and len(record.trials) == 6
    assert len({tuple(sorted(row.params.items())) for row in record.trials}) == 6


async def test_a_combination_that_was_cut_short_by_stop_is_tried_when_the_sweep_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = asyncio.Event()

    async def play(gang: PlayedGang, number: int, trial: Any) -> str:
        width = await asyncio.to_thread(trial.suggest_categorical, "width", [8, 16, 32, 64])
        if number == 2 and not waits.is_set():
            waits.set()
            await gang.is_stopped.wait()
            return "stopped"
        gang.on_values(0, 0, {"loss": float(width)})
        return "finished"

    sweep = PlayedSweep(root, play, monkeypatch, trials=40, sampler="grid")
    driver = sweep.driver()
    going = asyncio.ensure_future(driver.run())
    await waits.wait()
    driver.stop()
    await asyncio.wait_for(going, 20)
    assert [row.state for row in sweep.folder.read().trials] == ["done", "done", "stopped"]
    for _ in range(2):  # the second time there is nothing left
        await sweep.driver(sweep.folder.read(), resumes=True).run()
        record = sweep.folder.read()
        assert record.reason == "every combination has been tried." and record.state == "finished"
        assert [row.state for row in record.trials] == ["done"] * 4
        assert {row.params["width"] for row in record.trials} == {8, 16, 32, 64}


async def test_a_population_goes_on_from_its_best_members_also_after_a_stop(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = asyncio.Event()
    heights: dict[str, float] = {}  # in place of states, by folder

    async def play(gang: PlayedGang, number: int, trial: Any) -> str:
        turn = gang.cells[-1].trial["turn"]
        x = await asyncio.to_thread(trial.suggest_float, "x", 0.0, 1.0)
        if number == 5 and not waits.is_set():
            waits.set()
            await gang.is_stopped.wait()
            return "stopped"
        heights[turn["saves"]] = heights.get(turn["restores"], 0.0) + x  # each turn climbs by its own x
        for name in (SAVED, *([RESTORED] if turn["restores"] else [])):
            await asyncio.to_thread(trial.set_user_attr, name, True)
        gang.on_values(0, 0, {"loss": heights[turn["saves"]]})
        return "finished"

    sweep = PlayedSweep(root, play, monkeypatch, trials=12, parallel=2, prune="pbt,population=4", direction="maximize")
    driver = sweep.driver()
    going = asyncio.ensure_future(driver.run())
    await waits.wait()
    driver.stop()
    await asyncio.wait_for(going, 20)
    stopped = sweep.folder.read().row(5)
    assert stopped is not None and (stopped.state, stopped.generation) == ("stopped", 1)
    await sweep.driver(sweep.folder.read(), resumes=True).run()
    record = sweep.folder.read()
    assert [row.state for row in record.trials] == ["done"] * 12 and record.state == "finished"
    assert [row.generation for row in record.trials] == [0] * 4 + [1] * 4 + [2] * 4
    rows, again = record.trials, record.row(5)
    assert again is not None and again.parent == stopped.parent
    for first in (4, 8):
        values = {row.number: row.value or 0 for row in rows[first - 4 : first]}
        worst, best = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        for row in rows[first : first + 4]:
            assert row.parent == (best if row.number - 4 == worst else row.number - 4)
            assert row.value == pytest.approx(values[row.parent] + row.params["x"])
    best_row = record.best()
    assert best_row is not None and best_row.generation == 2


async def test_a_population_whose_cell_leaves_no_state_ends_with_what_is_missing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = PlayedSweep(root, parabola, monkeypatch, trials=12, prune="pbt,population=4")
    await sweep.driver().run()
    record = sweep.folder.read()
    assert record.state == "failed" and "trial 0 has left no state" in record.reason and len(record.trials) == 1


def test_a_study_of_another_kind_is_refused_by_name(root: Path) -> None:
    place = str(root / "study.journal")
    mine = StudyPlan(place, "tuned", metric="loss")
    SweepStudy.create(mine)
    for plan, words in [
        (StudyPlan(place, "tuned", metric="accuracy"), "is to minimize loss, not to minimize accuracy"),
        (StudyPlan(place, "tuned", metric="loss", direction="maximize"), "not to maximize loss"),
    ]:
        with pytest.raises(UsageError, match=words):
            SweepStudy.reopen(plan)
    storage = optuna().storages.JournalStorage(optuna().storages.journal.JournalFileBackend(place))
    optuna().create_study(study_name="theirs", storage=storage)
    with pytest.raises(UsageError, match="is of another program"):
        SweepStudy.reopen(StudyPlan(place, "theirs", metric="loss"))


def test_a_storage_that_is_locked_or_of_no_use_says_so_without_its_password(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    from jupyter_llmcloud.storage.search import study

    with pytest.raises(UsageError, match=r"there is no folder .*/no"):
        study.open_storage(str(root / "no" / "study.journal"))
    with pytest.raises(UsageError, match="choose sqlite://"):
        study.open_storage("ftp://host/study")
    monkeypatch.setattr(study, "LOCKED_AFTER_S", 0.1)
    place = f"sqlite:///{root / 'study.db'}"
    SweepStudy.create(StudyPlan(place, "tuned", metric="loss"))
    with sqlite3.connect(root / "study.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UsageError, match="is locked by another process"):
            SweepStudy.create(StudyPlan(place, "second", metric="loss"))
    assert study.without_password("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


async def test_a_disk_that_fills_up_ends_the_sweep_with_a_word_and_it_goes_on_when_there_is_room(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: list[bool] = []
    sweep = PlayedSweep(root, parabola, monkeypatch)
    write, append = type(sweep.folder).write, JournalFileBackend.append_logs

    def refused(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_record(folder: Any, record: SweepRecord) -> None:
        refused() if full else write(folder, record)

    def append_logs(backend: Any, logs: list[dict[str, Any]]) -> None:
        if full:
            with sweep.folder.journal.open("ab") as file:
                file.write(b'{"op_co')
            refused()
        append(backend, logs)

    async def fills_up(gang: PlayedGang, number: int, trial: Any) -> str:
        state = await parabola(gang, number, trial)
        full.extend([True] * (number == 2))
        return state

    monkeypatch.setattr(type(sweep.folder), "write", write_record)
    monkeypatch.setattr(JournalFileBackend, "append_logs", append_logs)
    monkeypatch.setattr(drivers, "WRITE_AGAIN_S", 0.01)
    filled = PlayedSweep(root, fills_up, monkeypatch)
    filled.folder.journal.unlink(missing_ok=True)
    driver = filled.driver()
    await asyncio.wait_for(driver.run(), 30)
    assert driver.board.record.state == "failed" and "No space left" in driver.board.record.reason
    full.clear()
    async with asyncio.timeout(10):
        while (record := filled.folder.read()).state != "failed":
            await asyncio.sleep(0.01)
    again = PlayedSweep(root, parabola, monkeypatch)
    resumed = again.driver(record, resumes=True)
    await asyncio.wait_for(resumed.run(), 30)
    assert (resumed.board.record.state, len(resumed.board.record.trials)) == ("finished", 6)
    assert [trial.state.name for trial in again_study(again).trials] == ["COMPLETE"] * 6


async def test_a_trial_that_could_not_begin_is_none_that_has_failed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: list[bool] = []
    append, end = JournalFileBackend.append_logs, SweepStudy.end

    def append_logs(backend: Any, logs: list[dict[str, Any]]) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(backend, logs)

    def fills_up_after(study: SweepStudy, number: int, *more: Any) -> None:
        end(study, number, *more)
        full.extend([True] * (number == 2))

    monkeypatch.setattr(JournalFileBackend, "append_logs", append_logs)
    monkeypatch.setattr(SweepStudy, "end", fills_up_after)
    sweep = PlayedSweep(root, parabola, monkeypatch)
    driver = sweep.driver()
    await asyncio.wait_for(driver.run(), 30)
    record = driver.board.record
    assert record.state == "failed" and "No space left" in record.reason
    assert [row.state for row in record.trials] == ["done"] * 3 + ["stopped"]
    full.clear()
    monkeypatch.setattr(SweepStudy, "end", end)
    resumed = PlayedSweep(root, parabola, monkeypatch).driver(record, resumes=True)
    await asyncio.wait_for(resumed.run(), 30)
    assert [row.state for row in resumed.board.record.trials] == ["done"] * 6


def again_study(sweep: PlayedSweep) -> Any:
    return optuna().load_study(study_name="tuned", storage=open_storage(str(sweep.folder.journal)))


@pytest.mark.parametrize("how", ["stop", "timeout"])
async def test_a_stop_while_a_trial_is_being_told_to_its_study_ends_that_trial(
    root: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its cell is on no rank yet that could be stopped: it must not be run for hours then."""
    ran: list[int] = []
    begin = SweepStudy.begin

    def slowly(study: SweepStudy, number: int, *rest: Any) -> None:
        if number == 1:
            loop.call_soon_threadsafe(driver._events.put_nowait, SweepStopAsked() if how == "stop" else TimeOver())
            time.sleep(0.3)
        begin(study, number, *rest)

    async def play(gang: PlayedGang, number: int, trial: Any) -> str:
        ran.append(number)
        gang.on_values(0, 0, {"loss": 1.0})
        return "finished"

    monkeypatch.setattr(SweepStudy, "begin", slowly)
    loop, driver = asyncio.get_running_loop(), PlayedSweep(root, play, monkeypatch, trials=2).driver()
    await asyncio.wait_for(driver.run(), 20)
    record = driver.board.record
    assert ran == [0] and [row.state for row in record.trials] == ["done", "stopped"]
    assert record.state == ("stopped" if how == "stop" else "finished")


@pytest.mark.parametrize("step", ["epoch-1", math.nan, math.inf, 2.5], ids=["text", "nan", "infinite", "half"])
async def test_a_step_that_is_no_whole_number_does_not_end_the_connection_to_the_ranks(step: Any) -> None:
    watch = TrialWatch("loss", lambda _: asyncio.sleep(0, False), lambda: asyncio.sleep(0))
    watch.on_values(0, step, {"loss": 3.0})
    watch.on_values(0, step, {"loss": 2.0})
    await watch.settled()
    assert (watch.seen.value, watch.seen.step) == (2.0, 2 if step == 2.5 else 1)


async def test_an_exception_that_nobody_has_foreseen_ends_the_sweep_with_its_words(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(gang: PlayedGang, number: int, trial: Any) -> str:
        raise RuntimeError("no such thing")

    driver = PlayedSweep(root, play, monkeypatch).driver()
    await asyncio.wait_for(driver.run(), 10)
    assert (driver.board.record.state, driver.board.record.reason) == ("failed", "no such thing")
