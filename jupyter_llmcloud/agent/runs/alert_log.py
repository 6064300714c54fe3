"""The detectors of a run on its leading agent: they see what ranks say, and what they find is told or stops it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from jupyter_llmcloud.core.detect.detector import Alert
from jupyter_llmcloud.core.detect.hang_detector import as_alert
from jupyter_llmcloud.core.detect.rollback import MAX_IN_A_ROW, Rollback, RollbackRule
from jupyter_llmcloud.core.detect.run_detectors import MAX_ALERTS, ROLLBACK, SCALE, RunDetectors
from jupyter_llmcloud.core.run.hang import HangReport
from jupyter_llmcloud.core.run.time_split import Split

DISK_EVERY_S = 10.0


class TellAlert(Protocol):
    """Writes an alert down."""

    def __call__(self, alert: Alert, *, is_shown: bool) -> None:
        """`is_shown`: those who follow the run are told in words, too; a value that is not finite they see anyway."""


@dataclass(frozen=True)
class AlertActions:
    """What an alert can have done with a run.

    `stop` is that of the Stop button, `roll_back` has it go back; `leave_out` has it go on without the host of a rank,
    for a reason in words, and returns why that is not done, "" when it is.
    """

    stop: Callable[[], None] = lambda: None
    roll_back: Callable[[Rollback], None] = lambda _: None
    leave_out: Callable[[int, str], str] = lambda *_: "it cannot be"


class AlertLog:
    """Of one run.

    Args:
        chosen: the policies of `--watch`; "" for the defaults.
        folder: of the run, whose disk is looked at.
        left_out: the steps that a rollback has left out before.
    """

    def __init__(
        self, chosen: str, folder: Path, tell: TellAlert, actions: AlertActions, left_out: Iterable[Sequence[int]] = ()
    ) -> None:
        self._watch = RunDetectors(chosen)
        self._folder = folder
        self._tell = tell
        self._actions = actions
        self._rollbacks = RollbackRule(left_out)
        self._is_going_back = False
        self._looked = 0.0  # when, at the disk
        self._stopped = False
        self._said: set[tuple[str, float]] = set()  # by ranks: detector and step

    def begin_attempt(self) -> None:
        """The cell is sent to the ranks."""
        self._is_going_back = False
        self._watch.begin_attempt()

    def left(self, rank: int) -> None:
        """A rank has gone, and the others go on without it."""
        self._watch.let_go(rank)

    @property
    def good_step(self) -> int | None:
        """Optimizer steps after which nothing was wrong, of a run that may be rolled back to there."""
        return self._watch.good_step

    def metrics(self, rank: int, records: Iterable[Mapping[str, Any]]) -> None:
        """A rank has logged."""
        if not self._is_going_back:
            self._found(self._watch.metrics(rank, records, self._rollbacks.last))

    def shares(self, shares: Mapping[int, Split]) -> None:
        """How the ranks have spent their last seconds."""
        now = asyncio.get_running_loop().time()
        self._found(self._watch.shares(now, shares))
        if now - self._looked >= DISK_EVERY_S:
            self._looked = now
            try:
                usage = shutil.disk_usage(self._folder)
            except OSError:
                return  # a short run has no folder yet
            self._found(self._watch.disk(now, usage.total - usage.free, usage.total))

    def memory(self, rank: int, host: tuple[int, int], device: tuple[int, int]) -> None:
        """Bytes of a rank, and of what it can still have: of its host and of its GPU."""
        now = asyncio.get_running_loop().time()
        self._found(self._watch.memory(now, rank, *host))
        self._found(self._watch.memory(now, rank, *device, on=" on its GPU"))

    def not_finite(self, metric: str, text: str, step: float) -> None:
        """The first value of a metric that was NaN or infinite; a run that may go back for one looks at each itself."""
        if self._watch.policy("not-finite") == ROLLBACK:
            return
        alert = Alert("not-finite", text, f"every value of {metric}", 1, 1, step=step, metric=metric)
        self._found([alert] if self._watch.policy("not-finite") != "off" else [], is_shown=False)

    def hang(self, report: Mapping[str, Any]) -> None:
        """Ranks are late, or wait for each other; the cell shows it already, with what is done about it."""
        alert = as_alert(
            HangReport(
                str(report["text"]),
                tuple(report["late"]),
                tuple(report["waiting"]),
                lasts_s=float(report.get("lasts_s", 0.0)),
                limit_s=float(report.get("limit_s", 0.0)),
            )
        )
        self._found([alert], is_shown=False, is_done_shown=True)

    def said(self, record: Mapping[str, Any]) -> None:
        """A rank has found something itself, and said so in the cell; all ranks say the same."""
        if (key := (str(record["detector"]), float(record["step"]))) not in self._said and len(self._said) < MAX_ALERTS:
            self._said.add(key)
            window = "the gradients of the step"
            self._tell(Alert(key[0], str(record["text"]), window, 1, 1, step=key[1]), is_shown=False)

    def _found(self, alerts: Iterable[Alert], *, is_shown: bool = True, is_done_shown: bool = False) -> None:
        for alert in alerts:
            rollback = self._rollback_of(alert)
            stops, asked = self._consequence(alert, rollback)
            if self._watch.policy(alert.detector) == SCALE:
                asked = self._left_out(alert)
            self._tell(replace(alert, text=alert.text + asked), is_shown=is_shown or bool(asked and not is_done_shown))
            if rollback is not None:
                self._is_going_back = True
                self._actions.roll_back(rollback)
            if stops and not self._stopped:
                self._stopped = True
                asyncio.get_running_loop().call_soon(self._actions.stop)  # when what was told is written

    def _rollback_of(self, alert: Alert) -> Rollback | None:
        if self._watch.policy(alert.detector) != ROLLBACK or alert.between is None or self._is_going_back:
            return None
        return self._rollbacks.decide(alert.text, *alert.between)

    def _left_out(self, alert: Alert) -> str:
        """Have the run go on without the host of the rank that an alert names; what is done, in words."""
        refused = self._actions.leave_out(alert.ranks[0], f"rank {alert.ranks[0]} is slow, its host is left out")
        if refused:
            return f"; its host is not left out: {refused}"
        return f"; the run goes on without its host (--watch {alert.detector}={SCALE})"

    def _consequence(self, alert: Alert, rollback: Rollback | None) -> tuple[bool, str]:
        """Whether the run is stopped, and what is done, in words."""
        policy = self._watch.policy(alert.detector)
        why = f"--watch {alert.detector}={policy}"
        if policy == "stop":
            return True, f"; the run is stopped ({why})"
        if policy != ROLLBACK or self._is_going_back:
            return False, ""
        if rollback is None:
            return True, f"; the run is stopped: it has gone back {MAX_IN_A_ROW} times in a row, which did not help"
        return False, f"; the run goes back to before step {rollback.before + 1} ({why})"
