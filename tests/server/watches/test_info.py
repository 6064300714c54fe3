"""What is said of a watched run: its phases, marks, ranks and what can be done, by values."""

from __future__ import annotations

from typing import Any

from jupyter_llmcloud.server.watches.info import phases_of, run_info
from jupyter_llmcloud.storage.runs import RunRecord
from jupyter_llmcloud.widgets.view_state import ViewState


def make(state: str = "running", **fields: Any) -> tuple[RunRecord, ViewState]:
    record = RunRecord("r-1", "r", state, created=100.0, ranks=[0, 1], world_size=2, **fields)
    view = ViewState("r-1", "r", state)
    for rank in record.ranks:
        view.set_rank(rank, *record.rank_state(rank))
    return record, view


def test_the_phases_follow_each_other_without_a_gap() -> None:
    history = [
        {"t": 1.0, "state": "queued", "phase": "finding a cluster"},
        {"t": 2.0, "why": "waits for free slots."},
        {"t": 3.0, "phase": "starting ranks"},
        {"t": 4.0, "phase": "joining"},
        {"t": 5.0, "state": "running"},
        {"t": 6.0, "state": "stopping"},
        {"t": 7.0, "state": "stopped"},
    ]
    phases = [(phase.name, phase.began, phase.ended) for phase in phases_of(history, 1.0, is_active=False)]
    assert phases == [
        ("finding a cluster", 1.0, 3.0),
        ("starting ranks", 3.0, 4.0),
        ("joining", 4.0, 5.0),
        ("running", 5.0, 7.0),
        ("ended", 7.0, None),
    ]


def test_a_run_that_waits_for_another_says_so_and_a_lost_one_has_ended() -> None:
    waiting = [{"t": 1.0, "state": "queued"}]
    assert [phase.name for phase in phases_of(waiting, 1.0, is_active=True)] == ["waiting"]
    lost = [{"t": 1.0, "state": "running"}]
    assert [phase.name for phase in phases_of(lost, 1.0, is_active=False)] == ["running", "ended"]
    assert phases_of([], 1.0, is_active=True) == []


def test_marks_are_told_in_order_of_time() -> None:
    record, view = make(not_finite={"loss": {"count": 3, "first": 7.0, "since": 7.0}})
    marks = [{"t": 300.0, "mark": "checkpoint", "step": 20, "text": "c"}, {"t": 200.0, "mark": "restart", "text": "r"}]
    marks.append({"t": 250.0, "mark": "something of a later version", "text": "x"})
    reports = [
        {"t": 150.0, "text": "rank 1 is late. Press Stop to end it."},
        {"t": 160.0, "recovered": True, "text": "on"},
    ]
    told = run_info(record, view, 400.0, marks=marks, reports=reports).marks
    assert [(mark.kind, mark.step, mark.text) for mark in told] == [
        ("alert", 7.0, "loss: 3 values were NaN or infinite, first at step 7"),
        ("hang", None, "rank 1 is late."),
        ("restart", None, "r"),
        ("checkpoint", 20, "c"),
    ]


def test_a_rank_is_told_with_its_process_while_the_run_goes_on() -> None:
    record, view = make()
    facts = {0: {"pid": 7, "host": "h", "memory_bytes": 5, "cpu": 1.5}}
    ranks = run_info(record, view, 101.0, ranks=facts).ranks
    assert (ranks[0].pid, ranks[0].memory_bytes, ranks[0].cpu, ranks[1].pid) == (7, 5, 1.5, 0)
    record, view = make("failed", errors=[{"rank": 1, "ename": "ValueError", "evalue": "no", "traceback": ["x"]}])
    ranks = run_info(record, view, 101.0, ranks=facts).ranks
    assert [(rank.state, rank.detail, rank.pid) for rank in ranks] == [("stopped", "", 0), ("failed", "ValueError", 0)]


def test_a_checkpoint_is_offered_only_where_the_run_saves_any() -> None:
    def actions(state: str, **fields: Any) -> tuple[bool, bool, bool]:
        found = run_info(*make(state, **fields), 101.0).actions
        return found.stop, found.checkpoint, found.serve

    assert actions("running") == (True, False, False)
    assert actions("running", spec={"checkpoint_every": 5}) == (True, True, False)
    assert actions("queued", spec={"checkpoint_every": 5}) == (True, False, False)
    assert actions("finished", artifacts={"model": "model"}) == (False, False, True)
