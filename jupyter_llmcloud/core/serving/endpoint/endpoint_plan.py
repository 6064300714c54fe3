"""Reconciles an endpoint: the replicas that are wanted beside those there are; events in, instructions out.

    Endpoint     a name and a state: starting, ready, failed, stopped
      Revision   a version of the model behind it: how many replicas serve it, and which share of the requests it gets
        Replica  one process that serves a revision

`EndpointPlan.handle` first notes what was observed, then compares with what is desired and says what to do. Nothing
depends on the order of events: what an instruction leads to is an event again (`Started`, `Probed`, `Stopped`), and a
replica for which an instruction is under way gets no second one. `wake_at` is when a `Tick` is due.

    starting -> ready -> silent ... failed -> stopping -> (gone)       a probe decides; three silent ones are a loss
                  \\-> suspect -> ready                                a request could not reach it: probed at once
                  \\-> draining -> stopping -> (gone)                  not wanted any more: its requests may end first

A revision that takes the place of another one has all its replicas before the last one of the other goes; or the
replicas of the other load its weights, one after the other, where only the weights differ (`Revision.in_place_of`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jupyter_llmcloud.core.serving.endpoint.plan_messages import (
    AskAgent,
    Desired,
    Drain,
    Event,
    Idle,
    Instruction,
    Lost,
    MarkState,
    NoRoom,
    Probe,
    Probed,
    ProcessAlive,
    Reloaded,
    ReloadReplica,
    Resumed,
    RevisionFailed,
    Route,
    Started,
    StartReplica,
    Stopped,
    StopReplica,
    Suspected,
    Withdraw,
)
from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.core.tick import Tick


@dataclass(frozen=True)
class Timing:
    """Seconds, and how often something may fail.

    A replica that freezes is given up three silent probes later: after at least 11.1 s, and at most 13.1 s with the
    wait for the first of them, so that the streams it held end within 15 s.
    """

    probe_every_s: float = 2.0
    probe_timeout_s: float = 3.7
    max_silent_probes: int = 3
    loading_probe_s: float = 0.1
    loading_timeout_s: float = 900.0
    drain_s: float = 30.0
    stable_s: float = 10.0
    max_failed_starts: int = 8
    max_back_off_s: float = 30.0
    room_again_s: float = 2.0

    def back_off_s(self, num_failures: int) -> float:
        """The wait before the next start after so many failures in a row; the first one costs nothing."""
        return 0.0 if num_failures <= 1 else float(min(self.max_back_off_s, 0.5 * 2**num_failures))


# --- what is known --------------------------------------------------------------------------------------------------


@dataclass
class ObservedReplica:
    """A replica as it was last observed.

    Attributes:
        state: starting, ready, suspect, silent, draining, failed or stopping.
        since: when it came into that state.
        reason: why it failed or is stopped.
        num_failures: of the replicas before it in its place, in a row; num_failed_starts: those never ready among them.
        health: what the last probe found.
        busy: an instruction for it is under way.
        probe_at: when it is asked next.
        ready_at: when it was ready first.
        no_room: it was never started, since there was no room for it: another one is tried later.
        reloading: it loads the weights of another revision.
    """

    number: int
    revision: int
    state: str
    since: float
    reason: str = ""
    num_failures: int = 0
    num_failed_starts: int = 0
    num_silent: int = 0
    health: str = ""
    busy: bool = False
    probe_at: float = 0.0
    ready_at: float | None = None
    no_room: bool = False
    reloading: bool = False

    @property
    def has_successor(self) -> bool:
        """Whether its place is filled again."""
        return self.num_failures > 0 or self.no_room

    def enter(self, state: str, now: float, reason: str = "") -> None:
        """Come into another state."""
        if state != self.state:
            self.state, self.since = state, now
        self.reason = reason


@dataclass(frozen=True)
class _Vacancy:
    """The place of a replica that was lost, which is filled again at `due`."""

    revision: int
    due: float
    num_failures: int
    num_failed_starts: int


_PROBED = ("starting", "ready", "suspect", "silent")
_SERVING = ("ready", "suspect", "silent")


@dataclass
class EndpointPlan:
    """One endpoint."""

    timing: Timing = field(default_factory=Timing)
    state: str = "starting"
    reason: str = ""
    revisions: tuple[Revision, ...] = ()
    replicas: dict[int, ObservedReplica] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # revisions that are given up, and why
    wake_at: float | None = None
    _vacancies: list[_Vacancy] = field(default_factory=list)
    _weights: dict[int, int] = field(default_factory=dict)
    _last_loss: str = ""
    _num_started: int = 0
    _keeps_weights: set[int] = field(default_factory=set)  # revisions whose weights a replica has refused to take
    _withdrawn: set[int] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Nothing is left, and nothing will come: the endpoint is stopped or given up."""
        return self.state in ("stopped", "failed") and not self.replicas

    @property
    def may_recover(self) -> bool:
        """Whether a request that finds no replica should wait: one is on its way, also for the first time."""
        return self.state in ("starting", "ready")

    @property
    def starting_since(self) -> float | None:
        """Since when the replica that was started first, of those that start now, does."""
        return min((r.since for r in self.replicas.values() if r.state == "starting"), default=None)

    def started_at(self, replica: int) -> float | None:
        """When a replica was started, as long as it is not ready."""
        known = self.replicas.get(replica)
        return known.since if known is not None and known.state == "starting" else None

    def states(self) -> dict[int, str]:
        """The state of each replica, by its number."""
        return {number: replica.state for number, replica in self.replicas.items()}

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Note what was observed, and say what to do about it."""
        self._observe(event, now)
        self._note_overdue(now)
        changes = [*self._stop(now), *self._start(now), *self._reload(), *self._withdraw()]
        out = [*changes, *self._probe(now), *self._route(), *self._mark()]
        self.wake_at = min(self._due(), default=None)
        return out

    # --- what was observed ---

    def _observe(self, event: Event, now: float) -> None:
        match event:
            case Desired():
                self._desire(event.revisions)
                return
            case Resumed():
                self._desire(event.revisions)
                for number, revision in event.replicas.items():
                    self._num_started = max(self._num_started, number)
                    self._add(ObservedReplica(number, revision, "starting", now, probe_at=now))
                return
            case RevisionFailed():
                if any(item.number == event.revision for item in self.revisions):
                    self.failed[event.revision] = event.reason
                return
            case Tick():
                return
        if (replica := self.replicas.get(event.replica)) is None:
            return
        match event:
            case Started() | ProcessAlive():
                replica.busy, replica.health, replica.probe_at = False, "", now + self.timing.loading_probe_s
            case Probed():
                replica.busy = False
                self._note_health(replica, event, now)
            case Lost():
                replica.busy = False
                self._lose(replica, event.reason, now, event.lasting)
            case NoRoom() if replica.state == "starting":
                replica.busy, replica.no_room = False, True
                replica.enter("failed", now, event.reason)
                self._last_loss = event.reason
            case Reloaded():
                self._note_reloaded(replica, event)
            case Suspected() if replica.state == "ready":
                replica.enter("suspect", now)
                replica.probe_at = now
            case Idle() if replica.state == "draining":
                replica.enter("failed", now, replica.reason)
            case Stopped():
                self._note_gone(replica)

    def _desire(self, revisions: tuple[Revision, ...]) -> None:
        self.revisions = revisions
        numbers = {revision.number for revision in revisions}
        self.failed = {number: why for number, why in self.failed.items() if number in numbers}
        self._withdrawn &= numbers
        self._keeps_weights &= numbers
        self._last_loss = ""

    def _add(self, replica: ObservedReplica) -> ObservedReplica:
        self.replicas[replica.number] = replica
        return replica

    def _note_health(self, replica: ObservedReplica, event: Probed, now: float) -> None:
        if replica.state not in _PROBED:
            return
        replica.health = event.health
        replica.num_silent = replica.num_silent + 1 if event.health == "silent" else 0
        if event.health == "ready":
            self._note_ready(replica, now)
        elif replica.state == "starting":
            self._note_not_ready_yet(replica, event, now)
        elif event.health != "silent":
            self._lose(replica, event.reason or f"it says that it is {event.health}", now)
        elif replica.num_silent >= self.timing.max_silent_probes:
            self._lose(replica, f"{event.reason or 'no answer'}, {replica.num_silent} times in a row", now)
        else:
            replica.enter("silent", now)
            replica.probe_at = now

    def _note_reloaded(self, replica: ObservedReplica, event: Reloaded) -> None:
        replica.reloading = False
        if event.refused:
            self._keeps_weights.add(event.revision)
        else:
            replica.revision = event.revision

    def _note_ready(self, replica: ObservedReplica, now: float) -> None:
        replica.enter("ready", now)
        replica.probe_at = now + self.timing.probe_every_s
        replica.ready_at = now if replica.ready_at is None else replica.ready_at

    def _note_not_ready_yet(self, replica: ObservedReplica, event: Probed, now: float) -> None:
        replica.probe_at = now + self.timing.loading_probe_s
        if event.health == "failed":
            why = f"the model could not be loaded: {(event.reason or 'its log tells more').rstrip('.')}."
            self._lose(replica, why, now, lasting=True)
        elif event.health == "unreachable":
            replica.probe_at = now  # its agent is asked, before the next probe

    def _lose(self, replica: ObservedReplica, reason: str, now: float, lasting: bool = False) -> None:
        """A replica is lost. A fault that would come again gives the revision up, unless others of it still serve."""
        if replica.state in ("draining", "failed", "stopping"):
            replica.enter("failed" if replica.state == "draining" else replica.state, now, replica.reason or reason)
            return
        stood = replica.ready_at is not None and now - replica.ready_at >= self.timing.stable_s
        replica.num_failures = 1 if stood else replica.num_failures + 1
        replica.num_failed_starts = replica.num_failed_starts + 1 if replica.ready_at is None else 0
        replica.enter("failed", now, reason)
        self._last_loss = reason
        if any(other.revision == replica.revision and other.state in _SERVING for other in self.replicas.values()):
            return
        if lasting:
            self.failed[replica.revision] = reason
        elif replica.num_failed_starts >= self.timing.max_failed_starts:
            self.failed[replica.revision] = f"{replica.num_failed_starts} starts failed, the last one: {reason}"

    def _note_gone(self, replica: ObservedReplica) -> None:
        """Its place is free: a lost replica that is still wanted has a successor, later and later as failures go on."""
        del self.replicas[replica.number]
        if replica.has_successor:
            wait = self.timing.room_again_s if replica.no_room else self.timing.back_off_s(replica.num_failures)
            due = replica.since + wait
            self._vacancies.append(_Vacancy(replica.revision, due, replica.num_failures, replica.num_failed_starts))

    def _note_overdue(self, now: float) -> None:
        for replica in self.replicas.values():
            if replica.state == "starting" and now >= replica.since + self.timing.loading_timeout_s:
                self._lose(replica, f"it was not ready within {self.timing.loading_timeout_s:.0f} s", now)
            elif replica.state == "draining" and now >= replica.since + self.timing.drain_s:
                replica.enter("failed", now, replica.reason)

    # --- what to do ---

    def _of(self, revision: int, *states: str) -> list[ObservedReplica]:
        return [item for item in self.replicas.values() if item.revision == revision and item.state in states]

    def _wanted(self, revision: int) -> int:
        if revision in self.failed:
            return 0
        if any(item.number == revision and item.role == "previous" for item in self.revisions):
            return len(self._of(revision, "starting", *_SERVING))  # those that it has left: it gets no others
        return next((item.num_replicas for item in self.revisions if item.number == revision), 0)

    def _stop(self, now: float) -> Iterator[Instruction]:
        for revision in sorted({replica.revision for replica in self.replicas.values()}):
            yield from self._retire(revision, now)
        for replica in self.replicas.values():
            if replica.state == "failed":
                replica.state = "stopping"
                yield StopReplica(replica.number, replica.reason)

    def _retire(self, revision: int, now: float) -> Iterator[Instruction]:
        """Let go of the replicas of a revision that are too many: those that are not ready first, then the newest."""
        living = self._of(revision, "starting", *_SERVING)
        living.sort(key=lambda replica: (replica.state == "starting", replica.number), reverse=True)
        kept = max(
            self._wanted(revision), min(self._num_needed_meanwhile(revision), len(self._of(revision, *_SERVING)))
        )
        for replica in living[: max(0, len(living) - kept)]:
            replica.num_failures, replica.no_room = 0, False  # it has no successor
            if self.revisions and replica.state == "ready":
                replica.enter("draining", now, self._why_retired(revision))
                yield Drain(replica.number)
            else:
                replica.enter("failed", now, self._why_retired(revision))

    def _num_needed_meanwhile(self, revision: int) -> int:
        """A revision that is replaced serves on with as many replicas as those that are wanted lack still."""
        if any(item.number == revision for item in self.revisions):
            return 0
        answering = [item for item in self.revisions if item.role not in ("shadow", "previous")]
        return sum(max(0, item.num_replicas - len(self._of(item.number, "ready"))) for item in answering)

    def _to_reload(self, revision: Revision) -> list[ObservedReplica]:
        """The replicas that load the weights of a revision, in place of others of their own."""
        is_possible = revision.in_place_of and revision.number not in self._keeps_weights
        if not is_possible or revision.number in self.failed:
            return []
        missing = revision.num_replicas - len(self._of(revision.number, "starting", *_SERVING))
        return self._of(revision.in_place_of, *_SERVING)[: max(0, missing)]

    def _reload(self) -> Iterator[Instruction]:
        """One after the other, so that the others answer meanwhile."""
        if any(replica.reloading for replica in self.replicas.values()):
            return
        for revision in self.revisions:
            ready = [replica for replica in self._to_reload(revision) if replica.state == "ready"]
            if ready and not any(item.number == revision.in_place_of for item in self.revisions):
                ready[0].reloading = True
                yield ReloadReplica(ready[0].number, revision)
                return

    def _withdraw(self) -> Iterator[Instruction]:
        """A revision that has failed goes, where another one serves."""
        for number in sorted(self.failed):
            others = {replica.revision for replica in self.replicas.values() if replica.state in _SERVING}
            shadows = {item.number for item in self.revisions if item.role == "shadow"}
            if number not in self._withdrawn and others - {number} - shadows:
                self._withdrawn.add(number)
                yield Withdraw(number, self.failed[number])

    def _why_retired(self, revision: int) -> str:
        if not self.revisions:
            return "the endpoint was stopped"
        if revision in self.failed:
            return self.failed[revision]
        if any(item.number == revision for item in self.revisions):
            return "the endpoint was given fewer replicas"
        return f"revision {revision} was replaced by revision {max(item.number for item in self.revisions)}"

    def _start(self, now: float) -> Iterator[Instruction]:
        self._vacancies = [vacancy for vacancy in self._vacancies if self._wanted(vacancy.revision)]
        for revision in sorted(self.revisions, key=lambda item: -item.priority):
            occupied = self._of(revision.number, "starting", *_SERVING)
            leaving = [r for r in self._of(revision.number, "failed", "stopping") if r.has_successor]
            missing = self._wanted(revision.number) - len(occupied) - len(leaving) - len(self._to_reload(revision))
            for vacancy in self._vacancies_of(revision.number, missing):
                if vacancy is None or now >= vacancy.due:
                    yield self._begin(revision, vacancy, now)

    def _vacancies_of(self, revision: int, missing: int) -> list[_Vacancy | None]:
        """The places to fill; None is one that nobody had before. Places that are not wanted any more are forgotten."""
        mine = sorted((v for v in self._vacancies if v.revision == revision), key=lambda vacancy: vacancy.due)
        kept = mine[: max(0, missing)]
        self._vacancies = [v for v in self._vacancies if v.revision != revision] + kept
        return [*kept, *[None] * (missing - len(kept))]

    def _begin(self, revision: Revision, vacancy: _Vacancy | None, now: float) -> Instruction:
        self._num_started += 1
        replica = self._add(ObservedReplica(self._num_started, revision.number, "starting", now, busy=True))
        if vacancy is not None:
            self._vacancies.remove(vacancy)
            replica.num_failures, replica.num_failed_starts = vacancy.num_failures, vacancy.num_failed_starts
        return StartReplica(replica.number, revision)

    def _probe(self, now: float) -> Iterator[Instruction]:
        for replica in self.replicas.values():
            if replica.state not in _PROBED or replica.busy or now < replica.probe_at:
                continue
            replica.busy = True
            if replica.state == "starting" and replica.health == "unreachable":
                yield AskAgent(replica.number)
            else:
                yield Probe(replica.number)

    def _route(self) -> Iterator[Instruction]:
        """Requests follow the weights; when those that have one have no ready replica, whichever revision has."""
        share = {revision.number: revision.weight for revision in self.revisions}
        aside = {revision.number for revision in self.revisions if revision.role == "shadow"}
        if not any(revision.num_replicas for revision in self.revisions if revision.weight):  # it waits to be woken
            aside |= {revision.number for revision in self.revisions if revision.role == "previous"}
        ready = [r for r in self.replicas.values() if r.state == "ready" and r.revision not in aside]
        weights = {replica.number: share.get(self.group_of(replica.number), 0) for replica in ready}
        if not any(weights.values()):
            weights = {replica.number: 100 for replica in ready if self.revisions}
        weights = {number: weight for number, weight in weights.items() if weight > 0}
        if weights != self._weights:
            self._weights = weights
            yield Route(dict(weights))

    def group_of(self, replica: int) -> int:
        """The revision whose requests a replica gets: its own, or the one that takes its place."""
        own = self.replicas[replica].revision
        if not self.revisions or any(item.number == own for item in self.revisions):
            return own
        return max(self.revisions, key=lambda item: (item.role == "stable", item.weight, item.number)).number

    def _mark(self) -> Iterator[Instruction]:
        state, reason = self._judge()
        if (state, reason) != (self.state, self.reason):
            self.state, self.reason = state, reason
            yield MarkState(state, reason)

    def _judge(self) -> tuple[str, str]:
        if not self.revisions:
            return "stopped", ""
        given_up = "; ".join(self.failed[number] for number in sorted(self.failed))
        num_serving = sum(replica.state in _SERVING for replica in self.replicas.values())
        if num_serving:
            complete = num_serving >= sum(self._wanted(revision.number) for revision in self.revisions)
            return "ready", given_up or ("" if complete else self._last_loss)
        if not any(revision.num_replicas for revision in self.revisions):
            return "ready", "no replica runs: the next request starts one"
        if all(revision.number in self.failed for revision in self.revisions if revision.num_replicas):
            return "failed", given_up
        return "starting", given_up or self._last_loss

    def _due(self) -> Iterator[float]:
        for replica in self.replicas.values():
            if replica.state in _PROBED and not replica.busy:
                yield replica.probe_at
            if replica.state == "starting":
                yield replica.since + self.timing.loading_timeout_s
            if replica.state == "draining":
                yield replica.since + self.timing.drain_s
        yield from (vacancy.due for vacancy in self._vacancies)
