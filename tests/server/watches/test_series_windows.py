"""Windows of a metric: exact where there are few values, else columns; by mean and by rank; what is read once is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.protocol.http.series import SeriesQuery
from jupyter_llmcloud.server.watches.series_windows import SeriesWindows
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore
from tests.support.server_parts import Server

pytest_plugins = ["tests.support.server_fixtures"]


def make_run(root: Path) -> RunFolder:
    folder = RunStore(root).folder("train-1")
    folder.create(RunRecord("train-1", "train", "finished", ranks=[0, 1], world_size=2), "")
    return folder


def log(folder: RunFolder, rank: int, rows: list[dict[str, Any]]) -> None:
    journal = JournalWriter(folder.metrics(rank))
    journal.append(rows)
    journal.close()


def ramp(first: int, last: int, plus: float = 0.0) -> list[dict[str, Any]]:
    return [
        {"step": step, "t": 1000.0 + step, "values": {"loss": step + plus, "epoch": step / 10}}
        for step in range(first, last)
    ]


async def ask(folder: RunFolder, **query: Any) -> Any:
    return (await SeriesWindows().window(folder, SeriesQuery(metric=query.pop("metric", "loss"), **query))).columns


async def test_few_values_are_exact(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    log(folder, 0, ramp(0, 1000))
    log(folder, 1, ramp(0, 1000, plus=2.0))
    mean = (await ask(folder, from_=100, to=109))["mean"]
    assert mean.is_exact and mean.step == [float(step) for step in range(100, 110)]
    assert mean.mean == [step + 1.0 for step in range(100, 110)] and mean.n == [2] * 10
    assert mean.low == [float(step) for step in range(100, 110)] and mean.high == [
        step + 2.0 for step in range(100, 110)
    ]
    assert mean.time == [1000.0 + step for step in range(100, 110)] and mean.epoch[5] == 10.5
    by_rank = await ask(folder, from_=100, to=109, by="rank")
    assert list(by_rank) == ["0", "1"] and by_rank["1"].mean == [step + 2.0 for step in range(100, 110)]


async def test_many_values_are_columns_that_hide_no_extreme(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    rows = ramp(0, 10_000)
    rows[5432]["values"]["loss"] = 1e9
    rows[77]["values"]["loss"] = -1e9
    log(folder, 0, rows)
    mean = (await ask(folder, points=100))["mean"]
    assert not mean.is_exact and len(mean.step) == 100 and mean.step == sorted(mean.step)
    assert max(value for value in mean.high if value is not None) == 1e9
    assert min(value for value in mean.low if value is not None) == -1e9
    assert mean.mean[50] is not None and mean.mean[99] == pytest.approx(9950, abs=60)


async def test_what_is_not_finite_is_a_gap_with_a_count(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    rows = ramp(0, 10)
    rows[3]["values"]["loss"], rows[4]["values"]["loss"] = math.nan, -math.inf
    log(folder, 0, rows)
    mean = (await ask(folder))["mean"]
    assert [value is None for value in mean.mean] == [step in (3, 4) for step in range(10)]
    assert mean.not_finite == [int(step in (3, 4)) for step in range(10)]
    thin = (await ask(folder, points=2))["mean"]
    assert thin.not_finite == [2, 0] and thin.mean == [pytest.approx(1.0), pytest.approx(7.0)]


async def test_a_run_led_back_to_a_checkpoint_says_its_steps_again(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    log(folder, 0, ramp(0, 20))
    log(folder, 0, ramp(10, 30, plus=0.5))
    mean = (await ask(folder))["mean"]
    assert mean.step == [float(step) for step in range(30)]
    assert mean.mean == [*map(float, range(10)), *(step + 0.5 for step in range(10, 30))]


async def test_what_is_logged_meanwhile_is_in_the_next_window(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    windows = SeriesWindows()
    log(folder, 0, ramp(0, 10))
    first = (await windows.window(folder, SeriesQuery(metric="loss"))).columns["mean"]
    with folder.metrics(0).open("ab") as file:
        file.write(b'{"seq":11,"t":1,"step":10,"val')  # a line that is being written
    assert (await windows.window(folder, SeriesQuery(metric="loss"))).columns["mean"] == first
    with folder.metrics(0).open("ab") as file:
        file.write(b'ues":{"loss":10.0}}\n')
    log(folder, 1, ramp(0, 3))
    again = (await windows.window(folder, SeriesQuery(metric="loss"))).columns["mean"]
    assert len(again.step) == 11 and again.n == [2, 2, 2] + [1] * 8


async def test_records_without_a_step_are_counted_also_where_other_metrics_lie_between(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    log(
        folder,
        0,
        [{"values": {"other": 1.0}}, {"values": {"loss": 2.0}}, {"progress": [1, 2]}, {"values": {"loss": 3.0}}],
    )
    assert (await ask(folder))["mean"].step == [2.0, 3.0]


async def test_metrics_that_are_looked_at_no_more_are_let_go(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    log(folder, 0, [{"step": step, "values": {f"m{n}": 1.0 for n in range(5)}} for step in range(100)])
    windows = SeriesWindows(max_values=250)
    for number in range(5):
        await windows.window(folder, SeriesQuery(metric=f"m{number}"))
    assert windows.num_values <= 250


async def test_the_route_answers_by_from_to_and_points(server: Server) -> None:
    folder = make_run(server.context.runs.path.parent)
    log(folder, 0, ramp(0, 100))
    answer = await server.ask("GET", "llmcloud/api/runs/train/series?metric=loss&from=10&to=19.5&points=50&by=rank")
    assert answer.status_code == 200, answer.text
    assert answer.json()["columns"]["0"]["mean"] == [float(step) for step in range(10, 20)]
    for query, status in (("metric=none", 404), ("metric=loss&points=1", 400), ("metric=loss&by=x", 400), ("", 400)):
        assert (await server.ask("GET", f"llmcloud/api/runs/train/series?{query}")).status_code == status, query


async def test_a_checkpoint_of_a_run_that_does_not_run_is_refused(server: Server) -> None:
    make_run(server.context.runs.path.parent)
    answer = await server.ask("POST", "llmcloud/api/runs/train/checkpoint", {})
    assert answer.status_code == 400 and "finished" in answer.json()["message"]
