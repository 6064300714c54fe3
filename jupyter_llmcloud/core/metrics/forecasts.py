"""What is said of a loss beside its newest value: where it will be when the progress bar has come to its end."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jupyter_llmcloud.core.metrics.final_loss import Curve, foretell
from jupyter_llmcloud.core.metrics.progress import Bar, Progress
from jupyter_llmcloud.core.metrics.series import Series
from jupyter_llmcloud.core.output.numerals import format_number

EVERY = 0.02  # of the bar: a forecast is made again when it has moved by so much
_LOSS = re.compile(r"(^|[/_.\s])loss$", re.IGNORECASE)
_RATE = re.compile(r"(^|[/_.\s])(lr|learning_rate)$", re.IGNORECASE)


class Forecasts:
    """Of the losses of one run."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[float, str]] = {}  # by metric: at which fraction, and what was said

    def text(self, name: str, series: Mapping[str, Series], progress: Progress) -> str:
        """`about 1.83 (1.79 to 1.88) in the end`; "" where nothing can be said of it."""
        bar = next((bar for bar in progress.shown() if bar.total), None)
        rate = next((one for other, one in series.items() if _RATE.search(other)), None)
        if not _LOSS.search(name) or bar is None or not bar.fraction or bar.fraction >= 1 or rate is None:
            return ""
        at, said = self._made.get(name, (-1.0, ""))
        if not at <= bar.fraction < at + EVERY:
            final_step = _final_step(series[name], bar)
            said = "" if final_step is None else _said(_curve(series[name]), final_step, _curve(rate))
            self._made[name] = bar.fraction, said
        return said


def _final_step(series: Series, bar: Bar) -> float | None:
    """The step at which a bar is full, by how far both have come since they began; None where that cannot be told.

    Steps may go on from those of an earlier run, with a bar of its own or the same. That of a later epoch began after
    the series did.
    """
    if bar.is_repeated or bar.total is None or bar.done <= bar.began_at or series.ends is None:
        return None
    first, last = series.ends
    return last + (bar.total - bar.done) * (last - first) / (bar.done - bar.began_at)


def _curve(series: Series) -> Curve:
    return [(point.step, point.mean) for point in series.points() if point.mean is not None]


def _said(losses: Curve, final_step: float, rates: Curve) -> str:
    found = foretell(losses, final_step, rates)
    if found is None:
        return ""
    low, middle, high = (format_number(value, 3) for value in (found.low, found.middle, found.high))
    return f"about {middle} ({low} to {high}) in the end"
