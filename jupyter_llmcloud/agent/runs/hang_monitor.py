"""Carries out the rule of core.hang for a run: hears its ranks, looks at silent ones, writes what is to be told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.detect.hang_detector import Ended, HangDetector, Heard, Looked, Moment
from jupyter_llmcloud.core.detect.run_detectors import is_off, stops
from jupyter_llmcloud.core.run.hang import ADVICE, STOPS, GroupState, HangReport, Sample
from jupyter_llmcloud.core.run.stacks import parse_dump, place
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.protocol.rank_messages import Heartbeat, RankProbed

if TYPE_CHECKING:
    from jupyter_llmcloud.agent.ranks.local_rank import RankLink

CHECK_S = 1.0
LATE_CHECK_S = 2.0  # the agent itself was held up: what ranks have said meanwhile is not read yet


class HangMonitor:
    """Watches the ranks of one run for hangs.

    Args:
        cell: what is executed; `ranks` is complete.
        tell: called with (rank, record) for the log of that rank.
        is_quiet: whether nobody wants to hear of late ranks, since the run is being ended.
    """

    def __init__(
        self,
        cell: Execute,
        links: Mapping[int, RankLink],
        tell: Callable[[int, dict[str, Any]], None],
        is_quiet: Callable[[], bool],
    ) -> None:
        self._run_id = cell.run_id
        self._links = links
        self._everyone = tuple(range(len(links)))
        self._tell = tell
        self._is_quiet = is_quiet
        self._cells = {cell.filename: cell.execution_count}
        began = asyncio.get_running_loop().time()
        self._detector = HangDetector(tuple(cell.ranks), len(links), began, cell.hang_after_s)
        self._is_off = is_off(cell.spec.get("watch"), "hang")
        self._stops = stops(cell.spec.get("watch"), "hang")
        self._dumped: set[int] = set()  # silent ranks that were asked for their stacks
        self._every_s = min(CHECK_S, cell.hang_after_s / 5)
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """The cell has been sent."""
        self._again(asyncio.get_running_loop().time())

    def close(self) -> None:
        """The run is over."""
        if self._timer is not None:
            self._timer.cancel()

    def heard(self, rank: int, heartbeat: Heartbeat) -> None:
        """A rank has published."""
        if heartbeat.run_id != self._run_id:
            return
        sample = Sample(
            phase=heartbeat.phase,
            op=heartbeat.op,
            groups=self._groups(heartbeat.groups),
            step=heartbeat.step,
            place=heartbeat.place,
            doing=heartbeat.doing,
            still_s=heartbeat.still_s,
            working=heartbeat.working,
        )
        self._dumped.discard(rank)
        self._detector.feed(Heard(rank, sample, asyncio.get_running_loop().time()))

    def looked(self, rank: int, look: RankProbed) -> None:
        """The process of a silent rank was looked at."""
        self._detector.feed(Looked(rank, look.state, look.cpu_s, self._notebook_line(look.dump)))

    def _notebook_line(self, dump: str) -> str:
        main = next(iter(parse_dump(dump, self._cells)), [])
        own = tuple(place(number, file, "") for file, number in self._cells.items())
        return next((line.partition(" in ")[0] for line in reversed(main) if line.startswith(own)), "")

    def ended(self, rank: int, groups: Mapping[str, list[Any]]) -> None:
        """A rank has finished the cell with these collectives."""
        self._detector.feed(Ended(rank, self._groups(groups)))

    def _again(self, now: float) -> None:
        due = now + self._every_s
        self._timer = asyncio.get_running_loop().call_at(due, self._check, due)

    def _check(self, due: float) -> None:
        now = asyncio.get_running_loop().time()
        self._again(now)
        if self._is_off or now - due > min(LATE_CHECK_S, 2 * self._every_s) or self._is_quiet():
            return
        self._detector.feed(Moment(now))
        for rank in self._detector.silent():
            self._links[rank].look(dump=rank not in self._dumped)
            self._dumped.add(rank)
        self._detector.check()
        if (report := self._detector.report) is not None:
            self._tell(self._place_of(report), _record(report, self._stops))

    def _groups(self, rows: Mapping[str, list[Any]]) -> dict[str, GroupState]:
        return {
            name: GroupState(tuple(ranks) or self._everyone, begun, finished)
            for name, (ranks, begun, finished) in rows.items()
        }

    @staticmethod
    def _place_of(report: HangReport) -> int:
        return (report.late or report.waiting)[0]


def _record(report: HangReport, stops: bool) -> dict[str, Any]:
    text = ADVICE.sub(STOPS, report.text) if stops else report.text
    return {
        "kind": "report",
        "text": text + "\n",
        "late": list(report.late),
        "waiting": list(report.waiting),
        "recovered": report.recovered,
        "lasts_s": report.lasts_s,
        "limit_s": report.limit_s,
    }
