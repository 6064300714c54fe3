"""The live view of a run in its cell: a widget while it runs, static HTML and text once it has ended.

Nothing is imported or shown until there is something worth showing, so a short cell without metrics stays as
quiet as in an ordinary notebook. Where no widget can live (a terminal, a script) the view is text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import msgspec

from jupyter_llmcloud.core.metrics.columns import Columns, MetricColumns
from jupyter_llmcloud.core.names import name_ranks
from jupyter_llmcloud.protocol.http.series import tail_of
from jupyter_llmcloud.storage.runs import RunStore, Times, nonce
from jupyter_llmcloud.widgets import live_info, static_view
from jupyter_llmcloud.widgets.front_end import FrontEnd, find_front_end
from jupyter_llmcloud.widgets.panel_mime import panel
from jupyter_llmcloud.widgets.static_view import MAX_CHARTS
from jupyter_llmcloud.widgets.view_state import Hang, ViewState

if TYPE_CHECKING:
    from jupyter_llmcloud.widgets.run_monitor import RunMonitor

UPDATE_EVERY_S = 0.1
SHOW_AFTER_S = 1.0
_COST_SHARE = 10  # at most a tenth of the kernel's time goes into showing
_POINTS = 160  # what a chart of this size can show
_CHARTS_EVERY_S = 2.0
_COLUMNS = ("step", "time", "epoch", "mean", "low", "high", "n", "not_finite")  # of a `SeriesTail`


class LiveView:
    """Shows one run. Called from the kernel's main thread; `now` is `time.time()`."""

    def __init__(
        self,
        run_id: str,
        name: str,
        ranks: Iterable[int],
        stop: Callable[[], None],
        *,
        started: float | None = None,
        show_after_s: float = SHOW_AFTER_S,
        front_end: FrontEnd | None = None,
    ) -> None:
        self.state = ViewState(run_id, name, ranks={rank: ("starting", "") for rank in ranks})
        self.is_shown = False
        self._stop = stop
        self._started = time.time() if started is None else started
        self._show_after_s = show_after_s
        self._front_end = front_end or find_front_end()
        self._display_id = f"llmcloud-{nonce()}"
        self._widget: RunMonitor | None = None
        self._next = 0.0
        self._is_new = True
        self._series = _SeriesTrait(self.state)
        self._placed: dict[str, Any] | None = None

    def handle_metrics(self, rank: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Take in metric and progress records of a rank; shown at the next `refresh`."""
        self._is_new |= self.state.metrics.feed(rank, records)

    def handle_rank_state(self, rank: int, state: str, detail: str = "") -> None:
        """A rank is starting, running, done, failed, stopped or exited."""
        if self.state.state == "queued" and state == "running":  # its turn has come
            self.state.state, self._started = "running", time.time()
        self.state.set_rank(rank, state, detail)
        self._series.handle_ranks()
        self._is_new = True

    def handle_state(self, state: str) -> None:
        """The run itself changed its state, to "stopping" for instance."""
        self.state.state = state
        self._is_new = True

    def handle_report(self, record: Mapping[str, Any], *, is_printed: bool = False) -> None:
        """The ranks are late, or go on. With `is_printed` the text is below the view already, and saved there."""
        text, recovered = str(record.get("text", "")).strip(), bool(record.get("recovered"))
        hang = Hang(text, tuple(record.get("late") or ()), tuple(record.get("waiting") or ()))
        self.state.hang = None if recovered else hang
        if not is_printed:
            self.state.reports.append((text, recovered))
        self._is_new = True

    def handle_times(self, shares: Times, seconds: Times, price: float = 0.0) -> None:
        """Where the ranks spend their time: of the last seconds, and so far; what an hour of one costs."""
        self.state.shares, self.state.seconds = shares or self.state.shares, seconds or self.state.seconds
        self.state.price = price or self.state.price
        self._is_new = True

    def show_again(self) -> None:
        """Display the view once more, because the cell was cleared."""
        data = bundle(self.state) if not self.state.is_active else self._live_data()
        if self.is_placed and self._placed is not None:
            data = self._placed
        self._front_end.show(data, self._display_id, update=False)

    def place(self, phase: str) -> None:
        """The run has no ranks yet: say what is done meanwhile, where the view will be. Imports nothing for that."""
        words = f"{self.state.name} · {phase} …"
        data = {"text/plain": words, "text/html": f"<p>{escape(words)}</p>"}
        shown = data | panel("run", self.state.run_id, self.state.name)
        self._front_end.show(shown, self._display_id, update=self._placed is not None)
        self._placed = shown

    @property
    def is_placed(self) -> bool:
        """Whether it has a place, where nothing but its phase is shown."""
        return self._placed is not None and not self.is_shown

    def begin(self, ranks: Iterable[int], stop: Callable[[], None]) -> None:
        """The ranks of a view that was made before they were there; `stop` is what its button does."""
        self._stop = stop
        if self.is_placed:
            self._started = time.time()
        self.state.ranks = {rank: ("starting", "") for rank in ranks}
        self._series.handle_ranks()

    def withdraw(self) -> None:
        """Leave nothing behind, where nothing but a phase was shown."""
        if self.is_placed:
            self._front_end.show({"text/plain": "", "text/html": ""}, self._display_id, update=True)
            self._placed = None

    def show(self) -> None:
        """Display the view now, once. `refresh` does so when there is data or the run takes longer."""
        if self.is_shown:
            return
        update = self.is_placed
        self.is_shown = True
        if self._front_end.takes_widgets:
            self._widget = self._make_widget()
        self._front_end.show(self._live_data(), self._display_id, update=update)

    def _live_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {"text/plain": self._line(), "text/html": static_view.html(self.state)}
        if self._widget is None:
            return data
        return data | panel("run", self.state.run_id, self.state.name) | _widget_mime(self._widget)

    def refresh(self, now: float) -> None:
        """Bring the view up to date; cheap to call often: at most ten times a second does it do anything."""
        if now < self._next or not self._is_new:
            return
        self.state.elapsed_s = max(0.0, now - self._started)
        if not self.is_shown:
            if not (self.state.has_data or self.state.elapsed_s >= self._show_after_s):
                return
            self.show()
        began = time.perf_counter()
        self._is_new = False
        if self._widget is not None:
            self._send(self._widget, now)
        self._next = now + max(UPDATE_EVERY_S, _COST_SHARE * (time.perf_counter() - began))

    def next_deadline(self) -> float | None:
        """When `refresh` will have something to do, None when nothing has changed."""
        if not self._is_new:
            return None
        if not self.is_shown and not self.state.has_data:
            return self._started + self._show_after_s
        return self._next

    def finish(
        self, state: str, now: float, errors: Sequence[Mapping[str, Any]] = (), report: Sequence[str] = ()
    ) -> None:
        """The run has ended: put the static view in place of the widget; `report` says what became of the ranks.

        A run that was never shown and has nothing to draw leaves nothing behind.
        """
        self.state.end(state)
        self.state.log = self._log_scales()
        self.state.errors = errors
        self.state.report = report
        self.state.elapsed_s = max(0.0, now - self._started)
        if not self.is_shown and not self.state.metrics.series:
            self.withdraw()
            return
        self._front_end.show(bundle(self.state), self._display_id, update=self.is_shown or self.is_placed)
        self.is_shown = True
        self._close()

    def _log_scales(self) -> frozenset[str]:
        """The metrics whose switch is on. A busy kernel hears nothing of the widget; the run's folder has been told."""
        told = RunStore().folder(self.state.run_id).log_scales()
        if told is None:
            told = self._widget.log_scales if self._widget is not None else []
        return frozenset(told)

    def _line(self) -> str:
        return f"{self.state.name} · {self.state.state} on {name_ranks(self.state.ranks)}"

    def _make_widget(self) -> RunMonitor:
        from jupyter_llmcloud.widgets.run_monitor import RunMonitor

        folder = RunStore().folder(self.state.run_id)
        return RunMonitor(self._stop, folder, info=self._info(), series=self._series.build())

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = msgspec.to_builtins(live_info.live_info(self.state, self._started))
        return info

    def _send(self, widget: RunMonitor, now: float) -> None:
        if not widget.is_due(now):
            self._is_new = True
            return
        with widget.hold_sync():
            widget.info = self._info()
            if self._series.is_due(now):
                widget.series = self._series.build(now)
            else:
                self._is_new |= self._series.lags

    def _close(self) -> None:
        widget, self._widget = self._widget, None
        if widget is not None:
            widget.series = []  # front ends that store widget states must not store this one's data
            widget.info = {}
            widget.forget_code()
            widget.close()


def bundle(state: ViewState) -> dict[str, Any]:
    """The static view as a mime bundle, and by what a page with a server shows more."""
    forms = {"text/html": static_view.html(state), "text/plain": static_view.text(state)}
    return forms | panel("run", state.run_id, state.name)


class _SeriesTrait:
    """Decides when the charts are worth sending again: a new pixel, a new metric, or two seconds.

    What it makes each time costs as much as is new: a column that has not changed is not made again.

    Attributes:
        lags: whether the front end lacks values that were not worth it yet.
    """

    def __init__(self, state: ViewState) -> None:
        self.lags = False
        self._metrics = state.metrics
        self._columns = MetricColumns(state.metrics, _POINTS)
        self._version = 0
        self._shown: dict[str, dict[str, Any]] = {}  # of each metric: its `SeriesTail`, whole
        self._sent_at: float | None = None
        self._sent: dict[str, tuple[int, float]] = {}  # values and last step of each metric

    def handle_ranks(self) -> None:
        """Ranks have come or gone: what all have reached is another step."""
        for name in self._shown:
            self._columns.dirty(name, math.inf)

    def is_due(self, now: float) -> bool:
        """Is it time to send?"""
        self.lags = False
        if self._sent_at is None:
            self._sent_at = now
        for name, series in self._metrics.series.items():
            sent_values, sent_step = self._sent.get(name, (0, 0.0))
            ends = series.ends
            if series.num_values == sent_values and ends and ends[1] == sent_step:
                continue
            self.lags = True
            if not sent_values or now - self._sent_at >= _CHARTS_EVERY_S:
                return True
            if ends and ends[1] - sent_step >= (ends[1] - ends[0]) / _POINTS:
                return True
        return False

    def build(self, now: float | None = None) -> list[dict[str, Any]]:
        """The value of the trait; remembers what was sent."""
        self._sent_at = now
        self.lags = False
        for name, series in self._metrics.series.items():
            self._sent[name] = (series.num_values, series.ends[1] if series.ends else 0.0)
            if series.dirty_from < math.inf and (name in self._shown or len(self._shown) < MAX_CHARTS):
                self._shown.setdefault(name, {})
                self._columns.dirty(name, series.dirty_from)
                series.dirty_from = math.inf
        self._columns.update()
        for name, first, columns in self._columns.since(self._version):
            self._shown[name] = _joined(self._shown[name], first, columns, name)
        self._version = self._columns.version
        return list(self._shown.values())


def _joined(before: dict[str, Any], first: int, columns: Columns, name: str) -> dict[str, Any]:
    """The whole of a series whose columns from `first` on are other ones now; lists that were sent stay as they are."""
    points = columns.points[first:]
    new: dict[str, Any] = msgspec.to_builtins(
        tail_of(
            name,
            points,
            first=first,
            is_partial=columns.is_partial,
            ranks=columns.ranks,
            shown=live_info.rounded,
        )
    )
    kept = {key: [*before[key][:first], *new[key]] for key in _COLUMNS} if first else {}
    return new | kept | {"from": 0}


def _widget_mime(widget: RunMonitor) -> dict[str, Any]:
    found = widget._repr_mimebundle_()
    data = found[0] if isinstance(found, tuple) else found or {}
    return {key: value for key, value in data.items() if key.startswith("application/")}
