"""Sees a sweep through: finds ranks, runs trials on them, tells the study, by the rules in core.search."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.names import run_id
from jupyter_llmcloud.core.search.population import read_population
from jupyter_llmcloud.core.search.rules import (
    CloseGang,
    Event,
    Exhausted,
    GangReady,
    GangRefused,
    Kind,
    OpenGang,
    StartTrial,
    StopTrial,
    SweepOver,
    SweepRules,
    SweepStopAsked,
    TimeOver,
    TrialEnded,
)
from jupyter_llmcloud.core.search.spec import SweepSpec
from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError, UsageError, WorldError
from jupyter_llmcloud.protocol.agent_messages import Execute, RunEnded
from jupyter_llmcloud.protocol.frames import replace as with_fields
from jupyter_llmcloud.protocol.run_request import execute
from jupyter_llmcloud.server.sweeps.gang import ClusterDoors, Gang, GangPlan
from jupyter_llmcloud.server.sweeps.trial_watch import TrialWatch
from jupyter_llmcloud.storage.runs import RunStore, nonce
from jupyter_llmcloud.storage.search.sweeps import ENDED, SweepFolder, SweepRecord, TrialRow, run_name
from jupyter_llmcloud.storage.search.turns import TurnPlanner

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.storage.search.study import SweepStudy

REPORTED = "reported value"  # as in training.search.trials
LOSSES = ("RankLost", "RankKilled", "RankOutOfMemory", "RankExited", "WorldError")  # of ranks, not of a cell
GANG_RETRY_S = 1.0
WRITE_AGAIN_S = 1.0  # a record that a full disk has not taken


@dataclass(frozen=True)
class SweepWork:
    """What the trials of a sweep are made of.

    Attributes:
        code: {"source", "code", "filename", "line_offset", "execution_count", "folder",
            "pushed"}.
        pushed: variables as cloudpickle's bytes.
    """

    spec: SweepSpec
    code: Mapping[str, Any]
    pushed: bytes

    def run_spec(self, name: str) -> RunSpec:
        """Of the run of a trial."""
        kept = {"precision", "plan", "save", "seed", "nproc"}
        given = {key: value for key, value in self.spec.as_dict().items() if key in kept}
        return RunSpec(name=name, fresh=True, **given)


class SweepBoard:
    """The record of a sweep: changed by whoever drives it, waited for by those who look."""

    def __init__(self, folder: SweepFolder, record: SweepRecord) -> None:
        self.folder = folder
        self.record = record
        self.version = 1
        self._changed = asyncio.Event()
        self._due: asyncio.TimerHandle | None = None  # to write what could not be written

    def change(self, **values: Any) -> None:
        """Have other values in the record, from now on."""
        for name, value in values.items():
            setattr(self.record, name, value)
        self.version += 1
        if self._due is not None:
            self._due.cancel()
        self._write()
        self._changed.set()
        self._changed = asyncio.Event()

    def _write(self) -> None:
        """Write the record; what a full disk does not take, once there is room again."""
        self._due = None
        try:
            self.folder.write(self.record)
        except OSError:
            if self.folder.path.is_dir():
                self._due = asyncio.get_running_loop().call_later(WRITE_AGAIN_S, self._write)

    async def wait(self, seen: int, wait_s: float) -> None:
        """Return when the record is not of the version `seen` any more, or after a while."""
        if self.version == seen:
            try:
                await asyncio.wait_for(self._changed.wait(), wait_s)
            except TimeoutError:
                pass


class SweepDriver:
    """One sweep, as long as it goes on.

    Args:
        board: its record.
        work: what each trial executes.
        study: used in one thread of its own.
        doors: to ranks.
    """

    def __init__(self, board: SweepBoard, work: SweepWork, study: SweepStudy, doors: ClusterDoors, log: Logger) -> None:
        self.board = board
        self._work = work
        self._study = study
        self._doors = doors
        self._log = log
        self._thread = ThreadPoolExecutor(1, f"sweep-{board.record.name}")
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._gangs: dict[int, Gang] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._on_gang: dict[int, int] = {}  # gangs by trial
        self._stopped: set[int] = set()  # trials that were stopped with the sweep, or when their time was over
        self._broken = ""  # why it cannot go on, though its trials could

    @property
    def name(self) -> str:
        """Of the sweep."""
        return self.board.record.name

    @property
    def _turns(self) -> TurnPlanner | None:
        """Of a population."""
        population, folder = read_population(self._work.spec.prune), self.board.folder
        return TurnPlanner(self._study, population, folder.path) if population is not None else None

    @property
    def _metric(self) -> str:
        return self._work.spec.metric or REPORTED

    def stop(self) -> None:
        """Stop it: what is done is kept."""
        self._events.put_nowait(SweepStopAsked())

    async def run(self) -> None:
        """See it through."""
        timer = None
        if self._work.spec.timeout:
            timer = asyncio.get_running_loop().call_later(self._work.spec.timeout, self._events.put_nowait, TimeOver())
        try:
            end = await self._follow_rules(await self._rules())
            importance = await self._ask(self._study.importance)
            state, reason = ("failed", self._broken) if self._broken else (end.state, end.reason)
            await self._close()
            self.board.change(state=state, reason=reason, ended=time.time(), note="", importance=importance)
        except LLMCloudError as error:
            await self._close()
            self.board.change(state="failed", reason=str(error), ended=time.time(), note="")
        finally:
            if timer is not None:
                timer.cancel()
            await self._close()

    async def _rules(self) -> SweepRules:
        rows = self.board.record.trials
        states = await self._ask(self._study.states)
        going_on = [number for number, state in states.items() if state == "RUNNING"]
        if self._study.is_exhausted and not going_on:
            self._events.put_nowait(Exhausted())
        ended = [row for row in rows if row.state in ENDED and row.state != "stopped" and row.number not in going_on]
        return SweepRules(
            num_trials=self._work.spec.trials,
            parallel=self._work.spec.parallel,
            num_ended=len(ended),
            num_measured=sum(row.state in ("done", "pruned") for row in ended),
            first_number=len(states),
            unfinished=going_on,
            generation=turns.population.size if (turns := self._turns) is not None else 0,
        )

    async def _follow_rules(self, rules: SweepRules) -> SweepOver:
        instructions = rules.begin()
        while True:
            for instruction in instructions:
                match instruction:
                    case OpenGang(gang):
                        self._do(f"gang {gang}", self._open(gang))
                    case CloseGang(gang):
                        self._close_gang(gang)
                    case StartTrial():
                        self._do(f"trial {instruction.number}", self._run(instruction))
                    case StopTrial(number):
                        self._do(f"stop {number} {nonce()}", self._stop(number))
                    case SweepOver():
                        return instruction
            instructions = rules.handle(await self._events.get())

    def _do(self, name: str, work: Any) -> None:
        task = self._tasks[name] = asyncio.ensure_future(work)

        def ended(task: asyncio.Task[None]) -> None:
            if self._tasks.get(name) is task:
                del self._tasks[name]
            if not task.cancelled() and (error := task.exception()) is not None:
                self._break(error)

        task.add_done_callback(ended)

    def _break(self, error: BaseException) -> None:
        if not isinstance(error, LLMCloudError):
            self._log.error("the sweep %s has failed", self.name, exc_info=error)
        self._broken = self._broken or f"{error}" or type(error).__name__
        self._events.put_nowait(SweepStopAsked())

    async def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call something of the study in its thread."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._study.explained, function, *arguments
        )

    # --- gangs ---

    async def _open(self, gang: int) -> None:
        spec = self._work.spec
        plan = GangPlan(
            spec.nproc, spec.cluster, spec.priority, f"sweep:{self.name}", str(self._work.code.get("folder") or "")
        )
        if not self._gangs:
            self._note("finding a cluster and starting ranks")
        try:
            self._gangs[gang] = found = await Gang.open(self._doors, plan, nonce(), self._waits)
        except (ConnectionLost, WorldError):  # a worker that was lost a moment ago
            await asyncio.sleep(GANG_RETRY_S)
            self._do(f"gang {gang}", self._open(gang))
        except LLMCloudError as error:
            self._events.put_nowait(GangRefused(gang, str(error)))
        else:
            if self.board.record.cluster != found.cluster:
                self.board.change(cluster=found.cluster)
            self._events.put_nowait(GangReady(gang))

    def _waits(self, text: str) -> None:
        """A gang waits, or does not any more. While others run trials, it is only told how many do."""
        if text and self._gangs:
            wanted = {f"gang {gang}" for gang in self._gangs} | {
                name for name in self._tasks if name.startswith("gang ")
            }
            text = f"{len(self._gangs)} of {len(wanted)} gangs run trials; the rest waits for free slots."
        self._note(text)

    def _note(self, text: str) -> None:
        if text != self.board.record.note:
            self.board.change(note=text)

    def _close_gang(self, gang: int) -> None:
        if (opening := self._tasks.get(f"gang {gang}")) is not None:
            opening.cancel()
            self._note("")
        if (found := self._gangs.pop(gang, None)) is not None:
            self._do(f"close {gang}", found.close())

    async def _close(self) -> None:
        for gang in list(self._gangs):
            self._close_gang(gang)
        for name, task in list(self._tasks.items()):
            if not name.startswith("close"):
                task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._thread.shutdown(wait=False)

    # --- trials ---

    async def _run(self, start: StartTrial) -> None:
        gang, number = self._gangs[start.gang], start.number
        self._on_gang[number] = start.gang
        watch = TrialWatch(self._metric, lambda values: self._ask(self._study.report, number, values), gang.stop)
        row = self._begin(start, gang)
        not_begun: LLMCloudError | None = None
        try:
            turn = await self._begin_in_study(row)
        except LLMCloudError as error:
            turn, not_begun = {}, error
        try:
            if not_begun is not None:
                raise not_begun
            kind, reason = await self._ended_on(gang, start, row, turn, watch)
        except (ConnectionLost, WorldError) as error:
            kind, reason = "lost", str(error)
        except LLMCloudError as error:  # one that its study does not take is none that was tried
            kind, reason = "failed" if not_begun is None else "stopped", str(error)
        except Exception as error:  # that nobody has foreseen: the trial has ended all the same
            self._break(error)
            kind, reason = "stopped", f"{type(error).__name__}: {error}"
        self._on_gang.pop(number, None)
        try:
            is_last = not self._is_to_do(number, kind) and (kind != "lost" or start.attempt > 0)
            await self._end(row, kind, reason, watch, is_last)
        except Exception as error:  # of the study or a disk, without which nothing can go on
            self._break(not_begun or error)
        if self._study.is_exhausted:
            self._events.put_nowait(Exhausted())
        self._events.put_nowait(TrialEnded(number, kind, reason))

    async def _ended_on(
        self, gang: Gang, start: StartTrial, row: TrialRow, turn: dict[str, Any], watch: TrialWatch
    ) -> tuple[Kind, str]:
        """Have the ranks run a trial; returns how it has ended. One that Stop has met before is not run."""
        if start.number in self._stopped:
            return "stopped", "stopped."
        ended = await gang.run(self._cell(start, gang, row.run_id, turn), watch.on_values)
        await watch.settled()
        return await self._judge(start.number, ended, watch)

    def _begin(self, start: StartTrial, gang: Gang) -> TrialRow:
        now = time.time()
        made = run_id(run_name(self.name, start.number), now, nonce())
        row = TrialRow(start.number, run_id=made, began=now, num_attempts=start.attempt + 1)
        rows = [known for known in self.board.record.trials if known.number != start.number]
        self.board.change(trials=sorted([*rows, row], key=lambda row: row.number))
        return row

    async def _begin_in_study(self, row: TrialRow) -> dict[str, Any]:
        """What a trial of a population is told of its turn; {} of any other sweep."""
        turns = self._turns
        if turns is None:
            await self._ask(self._study.begin, row.number)
            return {}
        turn = await self._ask(turns.begin, row.number)
        row.generation, row.parent = turn.generation, turn.parent
        self.board.change()
        return dict(turn.as_dict())

    def _cell(self, start: StartTrial, gang: Gang, made: str, turn: dict[str, Any]) -> Execute:
        name, code = run_name(self.name, start.number), self._work.code
        cell = execute(
            self._work.run_spec(name),
            world_id=gang.world_id,
            run_id=made,
            name=name,
            code=code["code"],
            source=code["source"],
            filename=code["filename"],
            line_offset=code["line_offset"],
            execution_count=code["execution_count"],
            ranks=list(range(gang.num_ranks)),
            folder=str(RunStore().folder(made).path),
            agent=gang.address,
            cluster=gang.cluster,
            owner=f"sweep:{self.name}",
            asked=time.time(),
            pushed=code.get("pushed", {}),
            trial={"number": start.number, "attempt": start.attempt, "plan": asdict(self._study.plan), "turn": turn},
        )
        return with_fields(cell, payload=self._work.pushed)

    async def _judge(self, number: int, ended: RunEnded, watch: TrialWatch) -> tuple[Kind, str]:
        """How a trial has ended."""
        error = ended.errors[0] if ended.errors else {}
        place = f" ({error['place']})" if error.get("place") else ""
        words = f"{error.get('ename', '')}: {error.get('evalue', '')}{place}"
        if ended.state == "lost" or (ended.state == "failed" and error.get("ename") in LOSSES):
            return "lost", words if error else "its ranks were lost."
        is_stopped = ended.state == "stopped"  # what was to be pruned may have reached its end before
        if (is_stopped and watch.is_pruned) or await self._ask(self._study.has_pruned_itself, number):
            return "pruned", ""
        if is_stopped:
            return "stopped", "stopped."
        if ended.state == "failed":
            return "failed", words
        kind, reason = self._measured(watch)
        if kind != "done" or (turns := self._turns) is None:
            return kind, reason
        missing = await self._ask(turns.why_incomplete, number)
        if missing:  # the other turns would be as wrong
            self._break(UsageError(missing))
        return ("failed", missing) if missing else (kind, reason)

    def _measured(self, watch: TrialWatch) -> tuple[Kind, str]:
        seen = watch.seen
        if seen.value is None:
            return "unmeasured", self._no_metric(list(seen.names))
        if not math.isfinite(seen.value):
            return "failed", f"{self._metric} was {seen.value} in the end."
        return "done", ""

    def _no_metric(self, names: list[str]) -> str:
        logged = f"it logged {', '.join(names)}" if names else "it logged nothing"
        if self._work.spec.metric is None:
            words = "the cell has told no result: call trial.report(value, step), or name a metric (--metric NAME)"
            return f"{words}; {logged}."
        return f"the metric {self._metric!r} never came: {logged}."

    async def _end(self, row: TrialRow, kind: Kind, reason: str, watch: TrialWatch, is_last: bool) -> None:
        seen = watch.seen
        row.state, row.reason, row.ended = kind, reason, time.time()
        row.value = seen.value if seen.value is not None and math.isfinite(seen.value) else None
        row.step = seen.step
        try:
            row.params = await self._ask(self._study.params, row.number)
            if is_last:
                about = {"run": row.run_id, **({"reason": reason} if reason else {})}
                await self._ask(self._study.end, row.number, kind, row.value, row.step, about)
        finally:
            self.board.change()

    def _is_to_do(self, number: int, kind: Kind) -> bool:
        """Whether it stays under way in the study: a combination that was cut short is tried when the sweep goes on.

        So is the turn of a population's member. Other samplers propose something new then, and Optuna would take this
        combination for tried.
        """
        is_done_later = self._work.spec.sampler == "grid" or self._turns is not None
        return kind == "stopped" and number in self._stopped and is_done_later

    async def _stop(self, number: int) -> None:
        self._stopped.add(number)
        gang = self._gangs.get(self._on_gang.get(number, -1))
        if gang is not None:
            await gang.stop()
