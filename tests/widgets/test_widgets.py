"""The view of a run by values: numbers, static HTML and text, and what the live view sends when."""

from __future__ import annotations

import base64
import html
import math
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from jupyter_llmcloud.core.metrics.series import Point
from jupyter_llmcloud.core.output.numerals import format_duration, format_number, format_tick, sparkline, ticks
from jupyter_llmcloud.core.run.end_report import own_errors
from jupyter_llmcloud.storage.runs import RunStore
from jupyter_llmcloud.widgets import chart, live_info, live_view, static_view
from jupyter_llmcloud.widgets.front_end import is_watched
from jupyter_llmcloud.widgets.live_view import LiveView
from jupyter_llmcloud.widgets.panel_mime import PANEL_MIME
from jupyter_llmcloud.widgets.view_state import Chip, ViewState, chips

HOSTILE = "<script>alert(1)</script>\"'&"
WIDGET = "application/vnd.jupyter.widget-view+json"


def records(first: int, count: int, **values: float) -> list[dict[str, Any]]:
    return [{"seq": n, "t": float(n), "step": n, "values": values} for n in range(first, first + count)]


def ended(num_metrics: int, num_steps: int = 2_000, name: str = "metric") -> ViewState:
    state = ViewState("demo-1", "demo", "finished", 72.4, {0: ("done", ""), 1: ("done", "")})
    for rank in (0, 1):
        for step in range(num_steps):
            values = {f"{name}_{n}": math.sin(step / 90 + n) + rank * 0.1 + n for n in range(num_metrics)}
            state.metrics.feed(rank, [{"seq": step + 1, "t": 0.0, "step": step, "values": values}])
    return state


def images(text: str) -> list[str]:
    """The SVG sources inside HTML."""
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    return [base64.b64decode(image).decode() for image in found]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.3412345, "2.341"),
        (0, "0"),
        (12800, "12,800"),
        (128.0, "128"),
        (3.1e-5, "3.1e-5"),
        (0.0003, "0.0003"),
        (1.5e9, "1.5e9"),
        (-0.5, "-0.5"),
        (99.999, "100"),
        (math.nan, "not finite"),
        (None, "not finite"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (47.2, "47 s"), (59.9, "1 min"), (72.4, "1 min 12 s"), (7500, "2 h 5 min"), (90000, "1 d 1 h")],
)
def test_durations_have_at_most_two_units(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.7, 5.3), (0, 3e-4), (-1e9, 2e9), (2.0, 2.0)])
def test_ticks_are_few_round_and_inside(low, high):
    values = ticks(low, high)
    assert 1 <= len(values) <= 6
    assert all(low - 1e-9 * abs(low) <= value <= high + 1e-9 * abs(high) for value in values)


def test_a_sparkline_falls_with_its_values_and_shows_gaps():
    assert sparkline([4.0, 3.0, None, 1.0, 0.0]) == "█▇ ▃▁"
    assert sparkline([]) == sparkline([None]) == ""
    assert len(sparkline([float(n) for n in range(1_000)])) == 24


def test_a_chart_is_well_formed_and_has_a_line_a_band_and_the_last_value():
    points = [Point(n, 5.0 - n, 4.5 - n, 5.5 - n) for n in range(5)]
    source = chart.svg("loss", points, points[-1])
    ElementTree.fromstring(source)
    assert source.count("fill-opacity") == 1
    assert 'stroke-width="3.4"' in source
    assert ">1</text>" in source


@pytest.mark.parametrize(
    "points",
    [
        [],
        [Point(1, 2.0, 2.0, 2.0)],
        [Point(1, None, None, None), Point(2, None, None, None)],
        [Point(1, 0.0, 0.0, 0.0), Point(2, None, None, None), Point(3, 0.0, 0.0, 0.0)],
        [Point(1, 1.7e308, 1.7e308, 1.7e308), Point(2, 1e-300, 1e-300, 1e-300)],
    ],
    ids=["none", "one", "only gaps", "constant with a gap", "huge"],
)
def test_a_chart_of_odd_values_is_still_a_chart(points):
    source = chart.svg("loss", points, points[-1] if points else None)
    ElementTree.fromstring(source)
    assert "nan" not in source and "inf" not in source


def test_the_static_view_tells_the_whole_run():
    state = ended(3)
    text = static_view.html(state)
    assert len(images(text)) == 3
    for word in ("demo", "finished in 1 min 12 s", "ranks 0-1", "metric_2", "lowest", "highest"):
        assert word in text


def test_the_static_view_needs_no_script_and_no_style_sheet_and_nothing_from_outside():
    text = static_view.html(ended(3))
    for source in [text, *images(text)]:
        assert not re.search(r"<(script|style|link|svg:script|foreignObject|iframe)", source)
        assert not re.search(r"\son\w+=", source)
    assert "<svg" not in text
    assert "http" not in text


@pytest.mark.parametrize("num_metrics", [20, 100])
def test_the_static_view_stays_below_60_kb(num_metrics):
    state = ended(num_metrics, 1_500, name="a/rather/long-name of a metric")
    assert len(static_view.html(state).encode()) < 60_000
    assert len(static_view.text(state).encode()) < 6_000


def test_metrics_beyond_the_table_are_pointed_to():
    assert "… more metrics: %runs show demo-1" in static_view.html(ended(60, 3))
    assert "… more metrics: %runs show demo-1" in static_view.text(ended(60, 3))


def test_everything_given_by_a_user_is_escaped():
    state = ended(1, 3, name=HOSTILE)
    state.name = state.run_id = HOSTILE
    state.ranks = {0: ("failed", HOSTILE), 1: ("done", "")}
    state.errors = [{"rank": 0, "ename": HOSTILE, "evalue": HOSTILE}]
    text = static_view.html(state)
    assert "<script" not in text
    assert html.escape(HOSTILE) in text
    for source in images(text):
        assert "<script" not in source
        ElementTree.fromstring(source)
    for attribute in re.findall(r'alt="([^"]*)"', text):
        assert "<" not in attribute


def test_a_failed_run_names_the_rank_and_its_error():
    state = ended(1, 3)
    state.state = "failed"
    state.ranks = {0: ("stopped", ""), 1: ("failed", "ValueError")}
    state.errors = [{"rank": 1, "ename": "ValueError", "evalue": "no such shard\nmore"}]
    for text in (static_view.html(state), static_view.text(state)):
        assert "failed after 1 min 12 s" in text
        assert "rank 1: ValueError: no such shard" in text
        assert "more" not in text
    assert "rank 0: stopped · rank 1: failed (ValueError)" in static_view.html(state)


def test_late_ranks_and_what_became_of_them_are_told():
    state = ended(1)
    state.reports = [("rank 1 is late at <b>", False), ("rank 1 goes on", True)] + [("again", False)] * 20
    text = static_view.html(state)
    assert "⚠ rank 1 is late at &lt;b&gt;" in text and "✓ rank 1 goes on" in text
    assert text.count("again") < 8 and "more reports" in text
    state.state, state.report = "stopped", ["--timeout: 1 s have passed.", "ranks 0-1: stopped, <variables> kept"]
    shown = static_view.html(state)
    assert "--timeout: 1 s have passed · ranks 0-1: stopped, &lt;variables&gt; kept" in shown


def test_only_errors_of_their_own_are_shown_when_a_run_fails():
    echo = {"rank": 0, "ename": "RuntimeError", "evalue": "Connection closed by peer", "collateral": True}
    released = {"rank": 2, "ename": "KeyboardInterrupt", "evalue": ""}
    own = {"rank": 1, "ename": "ValueError", "evalue": "no"}
    assert own_errors([own, echo, released]) == [own]
    assert own_errors([released]) == [released]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00025, "0.00025"), (12_500, "12,500"), (1_250_000, "1.25e6"), (-0.0125, "-0.0125"), (-123_456.0, "-1.23e5")],
)
def test_numbers_beside_an_axis_fit(value, text):
    assert format_tick(value) == text


def test_a_run_without_metrics_is_one_line():
    state = ViewState("r", "quiet", "finished", 3.2, {0: ("done", ""), 1: ("done", "")})
    assert static_view.text(state) == static_view.summary(state) == "✓ quiet · finished in 3.2 s · ranks 0-1"


def test_a_run_that_goes_on_says_beside_its_bar_what_it_costs():
    state = ViewState("r", "dear", "running", 50.0, {0: ("running", ""), 1: ("running", "")})
    state.metrics.feed(0, [{"seq": n, "t": float(n), "progress": [n, 100], "desc": "epoch 1"} for n in range(1, 51)])
    assert live_info.bars(state)[0].desc == "epoch 1"
    state.price, state.seconds = 36.0, {0: {"compute": 40.0, "waiting": 10.0}, 1: {"compute": 50.0}}
    assert live_info.bars(state)[0].desc.startswith("epoch 1 · cost 1.00 so far, about 2.00 in the end (1.")
    state.end("finished")
    assert live_info.bars(state)[0].desc == "epoch 1"


def test_values_that_were_not_finite_are_said():
    state = ViewState("r", "bad", "finished", 1.0, {0: ("done", "")})
    state.metrics.feed(0, [*records(1, 3, loss=1.0), *records(4, 2, loss=math.nan)])
    for text in (static_view.html(state), static_view.text(state)):
        assert "2 not finite, first at step 4" in text


def test_many_ranks_share_a_chip_for_each_state():
    ranks = {rank: ("running", "") for rank in range(64)} | {7: ("failed", "OOM")}
    assert chips(ranks) == [Chip("ranks 0-6,8-63", "running"), Chip("rank 7", "failed", "OOM")]
    assert chips({0: ("running", ""), 1: ("done", "")}) == [Chip("rank 0", "running"), Chip("rank 1", "done")]


# --- the live view -----------------------------------------------------------------------------------------------


class FakeFrontEnd:
    """Remembers what was shown."""

    def __init__(self, takes_widgets: bool = True) -> None:
        self.takes_widgets = takes_widgets
        self.shown: list[tuple[dict[str, Any], str, bool]] = []

    def show(self, data, display_id, update):
        self.shown.append((dict(data), display_id, update))


@pytest.fixture
def front_end() -> FakeFrontEnd:
    return FakeFrontEnd()


@pytest.fixture
def view(front_end: FakeFrontEnd) -> LiveView:
    return LiveView("run-1", "demo", [0, 1], lambda: None, started=100.0, front_end=front_end)


def updates(view: LiveView) -> list[str]:
    """The traits the widget sends from now on."""
    seen: list[str] = []
    view._widget.observe(lambda change: seen.append(change["name"]))
    return seen


def test_a_view_that_was_cleared_is_shown_again_as_it_is(view, front_end):
    view.handle_metrics(0, records(1, 3, loss=2.0))
    view.show()
    view.show_again()
    view.finish("finished", 105.0)
    view.show_again()
    first, again, _, last = [data for data, _, _ in front_end.shown]
    assert again[WIDGET] == first[WIDGET]
    assert WIDGET not in last and "finished in 5.0 s" in last["text/plain"]
    assert len({display_id for _, display_id, _ in front_end.shown}) == 1


def test_a_late_rank_is_in_the_widget_until_it_goes_on(view):
    view.show()
    view.handle_report({"text": "rank 1 is late.\n"})
    view.refresh(101.0)
    assert view._widget.info["notice"] == "rank 1 is late."
    view.handle_report({"text": "rank 1 goes on.\n", "recovered": True})
    view.refresh(102.0)
    assert view._widget.info["notice"] == ""


def test_a_short_run_without_metrics_leaves_nothing_behind(view, front_end):
    view.handle_rank_state(0, "running")
    view.refresh(100.1)
    view.finish("finished", 100.5)
    assert front_end.shown == []


def test_the_first_metric_brings_the_view_up_and_the_end_replaces_it(view, front_end):
    view.handle_metrics(0, records(1, 3, loss=2.0))
    view.refresh(100.1)
    view.finish("finished", 105.0)
    (live, first_id, first_update), (static, last_id, last_update) = front_end.shown
    assert WIDGET in live and "text/plain" in live
    assert set(static) == {"text/html", "text/plain", PANEL_MIME}
    assert live[PANEL_MIME] == static[PANEL_MIME] == {"kind": "run", "id": "run-1", "name": "demo", "version": 1}
    assert (first_id, first_update, last_update) == (last_id, False, True)
    assert "finished in 5.0 s" in static["text/plain"]


def test_a_long_run_without_metrics_is_shown_after_a_second(view, front_end):
    view.refresh(100.5)
    assert (front_end.shown, view.next_deadline()) == ([], 101.0)
    view.refresh(101.0)
    assert len(front_end.shown) == 1


def test_a_run_that_ends_before_its_view_was_up_shows_its_metrics_once(view, front_end):
    view.handle_metrics(0, records(1, 3, loss=2.0))
    view.finish("finished", 100.1)
    ((data, _, update),) = front_end.shown
    assert (set(data), update) == ({"text/html", "text/plain", PANEL_MIME}, False)


def test_updates_are_sent_at_most_ten_times_a_second_however_fast_records_come(view):
    view.show()
    seen = updates(view)
    for number in range(10_000):
        now = 100.0 + number / 1_000
        view.handle_metrics(0, records(number + 1, 1, loss=number / 7))
        view.refresh(now)
    assert 10 < seen.count("info") <= 101


def test_charts_are_sent_only_when_they_have_changed_by_what_can_be_seen(view):
    for number in range(10_000):
        view.handle_metrics(0, records(number + 1, 1, loss=1.0 + number % 7))
    view.refresh(101.0)
    seen = updates(view)
    view.handle_metrics(0, records(10_001, 1, loss=9.0))
    view.refresh(101.5)
    assert "info" in seen and "series" not in seen
    assert view.next_deadline() is not None
    view.refresh(103.6)
    assert "series" in seen
    assert view.next_deadline() is None


def test_nothing_is_sent_when_nothing_has_changed(view):
    view.handle_metrics(0, records(1, 3, loss=2.0))
    view.refresh(101.0)
    seen = updates(view)
    view.refresh(102.0)
    assert (seen, view.next_deadline()) == ([], None)


def test_the_traits_hold_only_what_json_can_carry(view):
    import json

    for value in (1.0, math.nan, math.inf, -1.7e308):
        view.handle_metrics(0, records(1 + view.state.metrics.num_records, 1, loss=value))
    view.show()
    traits = {name: getattr(view._widget, name) for name in ("info", "series")}
    json.dumps(traits, allow_nan=False)


def test_charts_have_a_bounded_size(view):
    for number in range(5_000):
        view.handle_metrics(0, records(number + 1, 1, **{f"m{n}": math.sin(number / 50) for n in range(40)}))
    view.show()
    assert len(view._widget.series) == 20
    assert max(len(columns["step"]) for columns in view._widget.series) <= 160


@pytest.mark.parametrize("seed", range(4))
def test_the_charts_of_many_messages_are_those_of_one(seed, view, front_end):
    chance = random.Random(seed)
    at, told, now = [0, 0], [], 100.0
    for _ in range(300):
        rank = chance.randrange(2)
        at[rank] = max(0, at[rank] + (1 if chance.random() < 0.98 else -20))
        names = [f"m{n}" for n in range(25) if chance.random() < 0.3 or n == rank]
        values = {name: math.nan if chance.random() < 0.1 else chance.random() for name in names}
        told.append((rank, {"seq": len(told) + 1, "t": now, "step": at[rank], "values": values}))
        view.handle_metrics(rank, [told[-1][1]])
        now += chance.random()
        view.refresh(now)
    view.handle_rank_state(0, "done")
    view.refresh(now + 100.0)
    at_once = LiveView("run-2", "demo", [0, 1], lambda: None, started=100.0, front_end=front_end)
    for rank, record in told:
        at_once.handle_metrics(rank, [record])
    at_once.handle_rank_state(0, "done")
    at_once.show()
    assert view._widget.series == at_once._widget.series
    assert len(view._widget.series) == 20


def test_a_message_costs_as_much_as_is_new_in_it(view, monkeypatch):
    made: list[int] = []
    tail_of = live_view.tail_of
    monkeypatch.setattr(
        live_view, "tail_of", lambda name, points, **rest: made.append(len(points)) or tail_of(name, points, **rest)
    )
    view.handle_metrics(0, records(1, 60, **{f"m{n}": 1.0 for n in range(10)}))
    view.refresh(101.0)
    made.clear()
    view.handle_metrics(0, records(61, 2, m3=2.0))
    view.refresh(111.0)
    assert made == [2]
    assert view._widget.series[3]["step"] == list(range(1, 63))


def test_a_message_of_the_widget_calls_stop(front_end):
    asked: list[bool] = []
    view = LiveView("run-1", "demo", [0], lambda: asked.append(True), front_end=front_end)
    view.show()
    widget = view._widget
    widget._handle_custom_msg({"type": "stop"}, [])
    widget._handle_custom_msg({"type": "other"}, [])
    widget._handle_custom_msg("stop", [])
    assert asked == [True]


def test_nothing_is_sent_to_a_page_that_follows_the_run_at_its_server(view):
    view.handle_metrics(0, records(1, 3, loss=2.0))
    view.refresh(100.0)
    sent = updates(view)
    view._widget.watching = True
    sent.clear()
    view.handle_metrics(0, records(4, 9, loss=1.0))
    view.refresh(200.0)
    assert sent == []
    view._widget.watching = False  # it cannot any more
    view.refresh(300.0)
    assert "info" in sent and "series" in sent


def test_while_another_page_watches_traits_are_sent_now_and_then(view, own_root):
    """A kernel that executes a cell hears nothing of its pages; the server says that one of them watches."""
    folder = RunStore().folder("run-1")
    folder.path.mkdir(parents=True)
    assert not folder.is_watched
    folder.note_watched()
    assert folder.is_watched
    view.handle_metrics(0, records(1, 3, loss=2.0))
    view.refresh(100.0)
    sent = updates(view)
    for tenth in range(200):
        view.handle_metrics(0, records(4 + tenth, 5 + tenth, loss=1.0))
        view.refresh(101.0 + tenth / 10)
    assert 1 <= sent.count("info") <= 3


def test_the_widget_is_closed_at_the_end_and_keeps_no_data(view):
    view.handle_metrics(0, records(1, 3, loss=2.0))
    view.show()
    widget = view._widget
    view.finish("finished", 105.0)
    assert widget.comm is None
    assert (widget.series, widget.info) == ([], {})


def test_the_widget_tells_that_it_leaves_metrics_out(view):
    assert live_info.live_info(view.state, 0.0).num_left_out == 0
    view.handle_metrics(0, records(1, 3, **{f"m{number}": 1.0 for number in range(static_view.MAX_CHARTS + 3)}))
    assert live_info.live_info(view.state, 0.0).num_left_out == 3


def test_a_terminal_gets_text(capsys):
    view = LiveView("run-1", "demo", [0, 1], lambda: None, started=100.0)
    view.handle_metrics(0, records(1, 3, loss=2.0))
    view.refresh(100.1)
    view.finish("finished", 105.0)
    told = capsys.readouterr().out
    assert told.startswith("demo · running on ranks 0-1\n✓ demo · finished in 5.0 s · ranks 0-1\n  loss  ")


def test_a_script_without_a_notebook_never_imports_the_widget():
    code = """
import sys
from jupyter_llmcloud.widgets.front_end import is_watched
from jupyter_llmcloud.widgets.live_view import LiveView
view = LiveView("run-1", "demo", [0], lambda: None, started=0.0)
view.show()
view.finish("finished", 1.0)
assert not {"anywidget", "ipywidgets", "torch"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "finished in 1.0 s" in done.stdout


def test_a_notebook_run_without_a_browser_holds_the_static_view():
    source = """
from jupyter_llmcloud.widgets.front_end import is_watched
from jupyter_llmcloud.widgets.live_view import LiveView
view = LiveView("run-1", "demo", [0], lambda: None, started=0.0)
view.handle_metrics(0, [{"seq": n, "t": 0.0, "step": n, "values": {"loss": 1.0 / n}} for n in range(1, 9)])
view.refresh(1.0)
view.finish("finished", 2.0)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert set(output.data) == {"text/html", "text/plain", PANEL_MIME}
    assert len(images(output.data["text/html"])) == 1
    assert len(str(notebook.metadata.get("widgets", ""))) < 60_000


@pytest.mark.parametrize(
    ("content", "watched"), [({"allow_stdin": True}, True), ({"allow_stdin": False}, False), ({}, True)]
)
def test_nobody_watches_a_notebook_that_is_executed_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], watched: bool
) -> None:
    shell = SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda channel: {"content": content}))
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    assert is_watched() is watched


def test_a_terminal_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    assert is_watched()
