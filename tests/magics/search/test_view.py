"""A sweep in a cell: as text, as a table, as pictures; everything from outside is escaped."""

from __future__ import annotations

from typing import Any

from jupyter_llmcloud.magics.search.pictures import ParameterAxis, parallel_coordinates, rate_curve
from jupyter_llmcloud.magics.search.view import html_of, params_text, text_of


def trial(number: int, state: str, value: float | None, **params: Any) -> dict[str, Any]:
    times = {"began": 10.0, "ended": None if state == "running" else 12.0}
    return {
        "number": number, "state": state, "value": value, "params": params, "step": 3, "run_id": f"t-{number}",
        "reason": "ValueError: <odd>" if state == "failed" else "", "num_attempts": 1, **times,
    }  # fmt: skip


def told(**changed: Any) -> dict[str, Any]:
    trials = [
        trial(0, "done", 0.5, lr=1e-4, kind="<b>"),
        trial(1, "pruned", 0.1, lr=1e-1, kind="a"),
        trial(2, "done", 0.25, lr=1e-2, kind="a"),
        trial(3, "failed", None),
        trial(4, "running", None),
    ]
    sweep = {
        "name": "tuned", "state": "running", "created": 5.0, "ended": 15.0, "note": "", "reason": "",
        "spec": {"metric": "loss", "trials": 8}, "version": 3, "best": trials[2], "importance": {}, "trials": trials,
    }  # fmt: skip
    return {**sweep, **changed}


def test_the_best_stand_first_and_what_failed_says_why() -> None:
    lines = text_of(told()).splitlines()
    assert lines[0] == "tuned: running · 5 of 8 trials (2 done, 1 failed, 1 pruned, 1 running) · 10 s"
    assert lines[1] == "best: loss 0.25 in trial 2 (lr 0.01, kind a)"
    assert lines[2] == "1 trial failed (3): ValueError: <odd>"
    assert [line.split()[0] for line in lines[5:]] == ["4", "2", "0", "1", "3"]
    assert "ValueError: <odd>" in lines[-1]


def test_what_went_wrong_first_is_said_once_though_the_failed_trials_had_values() -> None:
    trials = [*told()["trials"], {**trial(5, "failed", None, lr=0.1), "reason": "y" * 200}]
    lines = text_of(told(trials=trials[::-1])).splitlines()
    assert lines[2] == "2 trials failed, the first (3): ValueError: <odd>"
    assert not any("trials failed, the first" in line for line in text_of(told(state="failed")).splitlines())


def test_a_cell_that_asks_for_no_value_is_told_so() -> None:
    alike = [trial(0, "done", 1.0), trial(1, "done", 1.0)]
    lines = text_of(told(trials=alike, best=alike[0])).splitlines()
    assert lines[1] == "best: loss 1 in trial 0"
    assert lines[2].startswith("the cell asks for no value, so its trials are alike: trial.suggest_float(...)")


def test_a_trial_that_was_stopped_is_not_one_of_so_many() -> None:
    trials = [*told()["trials"], trial(5, "stopped", None)]
    line = text_of(told(trials=trials)).splitlines()[0]
    assert "5 of 8 trials (2 done, 1 failed, 1 pruned, 1 running, 1 stopped)" in line


def test_a_choice_of_none_is_a_value() -> None:
    assert params_text({"kind": None, "lr": 0.00123456}) == "kind None, lr 0.001235"


def test_more_is_better_when_it_is_said() -> None:
    spec = {"metric": "loss", "trials": 8, "direction": "maximize"}
    rows = text_of(told(spec=spec, best=None)).splitlines()[4:]
    assert [row.split()[0] for row in rows] == ["4", "0", "2", "1", "3"]


def test_pictures_come_in_the_end_and_nothing_in_them_is_markup() -> None:
    assert "<svg" not in html_of(told())
    drawn = html_of(told(state="finished", importance={"lr": 0.75, "<i>": 0.25}))
    assert drawn.count("<svg") == 2 and "Parallel coordinates of 3 trials" in drawn
    assert "<b>" not in drawn and "<i>" not in drawn and "<odd>" not in drawn and "&lt;b&gt;" in drawn


def test_the_orange_line_is_that_of_the_best_trial_that_is_done() -> None:
    drawn = parallel_coordinates(told()["trials"][:3], "loss", maximize=False)
    orange = next(line for line in drawn.split("<polyline") if "#d9480f" in line)
    assert "trial 2: 0.25" in orange


def test_an_axis_shows_wide_numbers_by_their_powers_and_words_by_their_names() -> None:
    wide = ParameterAxis("lr", [1e-5, 1e-3, 1e-1])
    assert [round(wide.place(value), 3) for value in (1e-5, 1e-3, 1e-1)] == [0.0, 0.5, 1.0]
    assert ParameterAxis("n", [1, 3]).place(2) == 0.5 and ParameterAxis("n", [2, 2]).place(2) == 0.5
    words = ParameterAxis("kind", ["a", None, True])
    assert [text for _, text in words.ticks()] == ["None", "True", "a"] and words.place(None) == 0.0


def test_a_rate_is_marked_on_its_curve() -> None:
    drawn = rate_curve([(1e-4, 3.0), (1e-3, 2.0), (1e-2, 1.0), (1.0, float("nan"))], 1e-3)
    assert "0.001" in drawn and drawn.count("<polyline") == 1 and "nan" not in drawn
    assert rate_curve([(1e-4, float("nan"))], None) == ""
