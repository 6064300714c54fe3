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
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Revision:
    """A version of the model behind an endpoint, and how it is served.

    Attributes:
        number: counts from 1 within the endpoint.
        model: the folder that is loaded.
        target: what the user named: a run or a folder.
        fingerprint: changes when the files of the folder do.
        dtype: type of the weights while serving.
        num_replicas: how many processes serve it.
        weight: its share of the requests, relative to the other revisions; 0 gets none.
        priority: of several revisions that need replicas, the one with the highest starts first.
        base_model: of an adapter, the folder of its base model.
        max_model_len: tokens of prompt and answer together; None: as many as the model was made for.
        max_concurrent: sequences that a replica generates at once.
        threads: CPU threads of a replica; None: its share of the host's cores.
        engine: what generates the tokens; auto: the fastest that answers as the model itself does.
    """

    number: int
    model: str
    target: str = ""
    fingerprint: str = ""
    dtype: str = "auto"
    num_replicas: int = 1
    weight: int = 100
    priority: int = 0
    base_model: str = ""
    max_model_len: int | None = None
    max_concurrent: int = 32
    threads: int | None = None
    engine: str = "auto"


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

    def back_off_s(self, num_failures: int) -> float:
        """The wait before the next start after so many failures in a row; the first one costs nothing."""
        return 0.0 if num_failures <= 1 else float(min(self.max_back_off_s, 0.5 * 2**num_failures))


# --- events: what was observed, or is wanted from now on ------------------------------------------------------------


@dataclass(frozen=True)
class Desired:
    """The revisions that shall be served from now on; none stops the endpoint."""

    revisions: tuple[Revision, ...] = ()


@dataclass(frozen=True)
class Resumed:
    """A server takes up the endpoint of an earlier one: what shall be served, and replicas that may live still.

    Attributes:
        replicas: the revision of each replica, by its number.
    """

    revisions: tuple[Revision, ...]
    replicas: dict[int, int]


@dataclass(frozen=True)
class Started:
    """The process of a replica runs; it loads its model."""

    replica: int


@dataclass(frozen=True)
class Probed:
    """What a replica said of itself: ready, loading, failed, silent (no answer in time) or unreachable."""

    replica: int
    health: str
    reason: str = ""


@dataclass(frozen=True)
class ProcessAlive:
    """The agent of a replica that does not answer yet says that its process lives."""

    replica: int


@dataclass(frozen=True)
class Lost:
    """A replica could not be started, or its process has gone. `lasting`: another one would end in the same way."""

    replica: int
    reason: str
    lasting: bool = False


@dataclass(frozen=True)
class Suspected:
    """A request could not reach a replica."""

    replica: int


@dataclass(frozen=True)
class Idle:
    """A draining replica has answered its last request."""

    replica: int


@dataclass(frozen=True)
class Stopped:
    """Nothing is left of a replica."""

    replica: int


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Desired | Resumed | Started | Probed | ProcessAlive | Lost | Suspected | Idle | Stopped | Tick


# --- instructions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartReplica:
    """Start a process for a revision: `Started` or `Lost` follows."""

    replica: int
    revision: Revision


@dataclass(frozen=True)
class Probe:
    """Ask a replica how it is: `Probed` follows."""

    replica: int


@dataclass(frozen=True)
class AskAgent:
    """Ask the agent of a starting replica whether the process lives: `ProcessAlive` or `Lost` follows."""

    replica: int


@dataclass(frozen=True)
class Drain:
    """Let a replica finish what it answers: `Idle` follows."""

    replica: int


@dataclass(frozen=True)
class StopReplica:
    """End a replica, whatever it does; requests it still answers are told the reason. `Stopped` follows."""

    replica: int
    reason: str


@dataclass(frozen=True)
class Route:
    """New requests go to these replicas: their weight by their number."""

    weights: dict[int, int]


@dataclass(frozen=True)
class MarkState:
    """The endpoint has another state, or another reason for it."""

    state: str
    reason: str = ""


Instruction = StartReplica | Probe | AskAgent | Drain | StopReplica | Route | MarkState


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
    """One endpoint. `was_ready`: it has answered requests before, if only for an earlier server."""

    timing: Timing = field(default_factory=Timing)
    was_ready: bool = False
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

    @property
    def is_over(self) -> bool:
        """Nothing is left, and nothing will come: the endpoint is stopped or given up."""
        return self.state in ("stopped", "failed") and not self.replicas

    @property
    def may_recover(self) -> bool:
        """Whether a request that finds no replica should wait: the endpoint has answered before, and will again."""
        return self.was_ready and self.state in ("starting", "ready")

    def states(self) -> dict[int, str]:
        """The state of each replica, by its number."""
        return {number: replica.state for number, replica in self.replicas.items()}

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Note what was observed, and say what to do about it."""
        self._observe(event, now)
        self._note_overdue(now)
        out = [*self._stop(now), *self._start(now), *self._probe(now), *self._route(), *self._mark()]
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

    def _note_ready(self, replica: ObservedReplica, now: float) -> None:
        replica.enter("ready", now)
        replica.probe_at = now + self.timing.probe_every_s
        replica.ready_at = now if replica.ready_at is None else replica.ready_at
        self.was_ready = True

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
        if replica.num_failures:
            due = replica.since + self.timing.back_off_s(replica.num_failures)
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
        surplus = living[: max(0, len(living) - self._wanted(revision))]
        if surplus and self._is_needed_meanwhile(revision):
            return
        for replica in surplus:
            replica.num_failures = 0  # it has no successor
            if self.revisions and replica.state == "ready":
                replica.enter("draining", now, self._why_retired(revision))
                yield Drain(replica.number)
            else:
                replica.enter("failed", now, self._why_retired(revision))

    def _is_needed_meanwhile(self, revision: int) -> bool:
        """A revision that is replaced serves on until one that is wanted can."""
        if any(item.number == revision and item.num_replicas > 0 for item in self.revisions):
            return False
        wanted = [item.number for item in self.revisions if item.num_replicas > 0]
        return bool(wanted) and bool(self._of(revision, "ready")) and not any(self._of(n, "ready") for n in wanted)

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
            leaving = [r for r in self._of(revision.number, "failed", "stopping") if r.num_failures]
            missing = self._wanted(revision.number) - len(occupied) - len(leaving)
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
        ready = [replica for replica in self.replicas.values() if replica.state == "ready"]
        weights = {replica.number: share.get(replica.revision, 0) for replica in ready}
        if not any(weights.values()):
            weights = {replica.number: 100 for replica in ready if self.revisions}
        weights = {number: weight for number, weight in weights.items() if weight > 0}
        if weights != self._weights:
            self._weights = weights
            yield Route(dict(weights))

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
            complete = num_serving >= sum(revision.num_replicas for revision in self.revisions)
            return "ready", given_up or ("" if complete else self._last_loss)
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
