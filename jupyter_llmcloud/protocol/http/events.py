"""The websocket `/llmcloud/api/events`: what a client asks for, and what it is told.

Each message is one JSON text frame with its name under "type". A client that knows a topic up to a cursor asks for what
came after it; where the server does not remember that far, or is another one by now (`epoch`), a snapshot comes first.
Numbers that JSON has no words for (NaN, infinity) are null, and counted beside.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.http.base import Query, Response
from jupyter_llmcloud.protocol.http.clusters import Cluster
from jupyter_llmcloud.protocol.http.endpoints import Endpoint
from jupyter_llmcloud.protocol.http.keys import Key
from jupyter_llmcloud.protocol.http.runs import Run
from jupyter_llmcloud.protocol.http.worlds import Split, World

Topic = Literal["clusters", "worlds", "runs", "endpoints", "keys"]
TOPICS: tuple[Topic, ...] = ("clusters", "worlds", "runs", "endpoints", "keys")
ID_FIELDS: dict[Topic, str] = {
    "clusters": "name",
    "worlds": "world_id",
    "runs": "run_id",
    "endpoints": "name",
    "keys": "id",
}
MAX_POINTS = 2000  # of one metric, in one watch
HEARTBEAT_S = 20.0


class Event(msgspec.Struct, kw_only=True, frozen=True, tag_field="type"):
    """Base of all messages, either way."""


# --- from the client ------------------------------------------------------------------------------------------------


class SubscribeTopics(Event, kw_only=True, frozen=True, tag="subscribe"):
    """Tell me of these topics from now on.

    Attributes:
        topics: those to follow.
        epoch: that of the `hello` under which `cursor` was seen; empty when none was.
        cursor: of the newest event seen in any of these topics; 0 for none.
    """

    topics: list[Topic]
    epoch: str = ""
    cursor: int = 0


class UnsubscribeTopics(Event, kw_only=True, frozen=True, tag="unsubscribe"):
    """Tell me no more of these topics."""

    topics: list[Topic]


class WatchRun(Event, kw_only=True, frozen=True, tag="watch"):
    """Follow one run whole, from its first step on: what it is doing, its series, its output.

    Attributes:
        run_id: the id of the run.
        points: columns at most of each series (2 to MAX_POINTS).
    """

    run_id: str
    points: int = 500


class UnwatchRun(Event, kw_only=True, frozen=True, tag="unwatch"):
    """Follow that run no more."""

    run_id: str


class Ack(Event, kw_only=True, frozen=True, tag="ack"):
    """Everything up to this cursor has been dealt with: more may come."""

    cursor: int


ClientMessage = SubscribeTopics | UnsubscribeTopics | WatchRun | UnwatchRun | Ack

# --- parts of what the server says ----------------------------------------------------------------------------------


class RankInfo(msgspec.Struct, kw_only=True, frozen=True):
    """A rank of a run. Bytes; `utilization` is that of its device, 0 to 1; None where it is not known.

    Attributes:
        state: starting, queued, running, done, failed, stopped, exited or lost.
        detail: what it does or why it ended, in a few words.
        cpu: processor use of its process in cores (1.5: one and a half), None when it is not known.
        last_seen: seconds since the epoch when its process was looked at last.
        split: where its time goes: of the last ten seconds, of a run that has ended all of it. None when unknown.
        total_split: where all of its time has gone so far.
    """

    rank: int
    state: str
    detail: str = ""
    host: str = ""
    device: str = ""
    pid: int = 0
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    utilization: float | None = None
    cpu: float | None = None
    split: Split | None = None
    total_split: Split | None = None
    last_seen: float | None = None


class Phase(msgspec.Struct, kw_only=True, frozen=True):
    """A stretch of a run's life: "finding a cluster", "starting ranks", "joining", "running" or "ended".

    `ended` is None for the present one. Seconds since the epoch.
    """

    name: str
    began: float
    ended: float | None = None


class ProgressBar(msgspec.Struct, kw_only=True, frozen=True):
    """A progress bar as the slowest rank has it.

    Attributes:
        fraction: 0 to 1; None when the total is unknown.
        rate: units per second.
        eta: seconds left at the time of the message.
        eta_range: the same, between which it lies in four of five cases; None before enough steps were seen.
        waits: what stands in place of the time left while the run does not go on.
    """

    desc: str
    done: float
    total: float | None = None
    fraction: float | None = None
    rate: float | None = None
    eta: float | None = None
    eta_range: tuple[float, float] | None = None
    waits: str = ""


class LatestValue(msgspec.Struct, kw_only=True, frozen=True):
    """The newest value of a metric that all ranks have reached.

    Attributes:
        value: the mean over the ranks; None when it is not finite.
        text: the value as it is shown.
        note: what is to be said beside it, such as the mean of how many ranks.
        ranks: each rank's value, as it is shown.
        alarm: since when it is NaN or infinite; empty when it is not.
    """

    step: float
    value: float | None = None
    text: str = ""
    note: str = ""
    ranks: str = ""
    alarm: str = ""


class Mark(msgspec.Struct, kw_only=True, frozen=True):
    """Something that happened at a point of the run; `step` is None where only the time is known."""

    t: float
    kind: Literal["checkpoint", "restart", "resize", "alert", "hang"]
    text: str
    step: float | None = None


class RunActions(msgspec.Struct, kw_only=True, frozen=True):
    """What can be done with a run now."""

    stop: bool = False
    checkpoint: bool = False
    serve: bool = False


class RankError(msgspec.Struct, kw_only=True, frozen=True):
    """Why a rank failed: the name of the exception, its message, and the traceback as text."""

    rank: int
    ename: str = ""
    evalue: str = ""
    traceback: str = ""


class RunInfo(msgspec.Struct, kw_only=True, frozen=True):
    """What a run is doing now, all of it but its series and its output.

    Attributes:
        elapsed_s: from its creation to its end, or to the time of the message.
        phase: the present one of `phases`.
        notice: what hinders it now, in one line; empty when nothing does.
        hang: why its ranks do not go on, and which; empty while they do.
        latest: the newest value of each metric.
        marks: what to draw on a chart, in order of time.
        notes: what was noted on the way.
        errors: of the ranks that failed by themselves, the culprit first.
        log_scales: metrics that are drawn in powers of ten.
        layout: of the charts, as it was pinned for runs of this name; None when it was not.
        artifacts: what it has left, {name: path}.
        num_left_out: values of metrics beyond those that are kept.
    """

    run_id: str
    name: str
    state: str
    created: float
    ended: float | None = None
    elapsed_s: float = 0.0
    phase: str = ""
    phases: list[Phase] = []
    world_size: int = 0
    world_id: str = ""
    cluster: str = ""
    ranks: list[RankInfo] = []
    progress: list[ProgressBar] = []
    notice: str = ""
    hang: str = ""
    latest: dict[str, LatestValue] = {}
    marks: list[Mark] = []
    notes: list[str] = []
    errors: list[RankError] = []
    log_scales: list[str] = []
    layout: dict[str, Any] | None = None
    artifacts: dict[str, str] = {}
    num_left_out: int = 0
    actions: RunActions = RunActions()


class SeriesTail(msgspec.Struct, kw_only=True, frozen=True, rename={"from_": "from"}):
    """The columns of a metric from one index on: the client drops what it has from there, and appends these.

    Each column covers some steps, over all ranks: `mean` is None where it is a gap, because a rank had nothing but NaN
    or infinity there.

    Attributes:
        name: of the metric.
        from_: "from" in JSON: index of the first column that is sent; 0 replaces all.
        step: in the middle of each column.
        time: of the column's last value, seconds since the epoch.
        epoch: the last value of the metric `epoch` until then; None where there was none.
        mean, low, high: over its values, of all ranks.
        n: ranks that have a value there.
        not_finite: how many values were NaN or infinite.
        is_partial: whether ranks are behind, so that more may come for steps that are not here.
        ranks: those that log it.
        unit: of its values; empty when it is not known.
    """

    name: str
    from_: int
    step: list[float]
    time: list[float]
    epoch: list[float | None]
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]
    n: list[int]
    not_finite: list[int]
    is_partial: bool = False
    ranks: list[int] = []
    unit: str = ""


class OutputRecord(msgspec.Struct, kw_only=True, frozen=True):
    """Something a rank wrote.

    Attributes:
        stream: stdout or stderr; empty for what is no text of a stream.
        kind: stdout, stderr, display, result, clear_output or report.
        text: as written; of something displayed, its text form.
        html: of something displayed, its HTML, not sanitized; empty when it has none.
        image: of something displayed, a PNG in base64; empty when it has none.
        is_warning: whether Python's warnings wrote it.
    """

    rank: int
    seq: int
    t: float
    kind: str
    text: str = ""
    stream: str = ""
    html: str = ""
    image: str = ""
    is_warning: bool = False


# --- from the server ------------------------------------------------------------------------------------------------


class Hello(Event, kw_only=True, frozen=True, tag="hello"):
    """The first message of a connection; `epoch` names this life of the server, within which cursors mean something.

    `now` is the time of the server in seconds since the epoch, for ages of what it tells.
    """

    epoch: str
    version: str
    heartbeat_s: float
    now: float = 0.0


ITEMS: dict[Topic, type[msgspec.Struct]] = {
    "clusters": Cluster,
    "worlds": World,
    "runs": Run,
    "endpoints": Endpoint,
    "keys": Key,
}
# As it is kept and sent: encoded once, compared and passed on as bytes.
Item = Annotated[
    msgspec.Raw,
    Meta(
        description="Of the type that belongs to the topic.",
        extra_json_schema={"anyOf": [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in ITEMS.values()]},
    ),
]


class Snapshot(Event, kw_only=True, frozen=True, tag="snapshot"):
    """All items of a topic; what a client had before is replaced."""

    topic: Topic
    cursor: int
    items: list[Item]


class Changed(Event, kw_only=True, frozen=True, tag="changed"):
    """An item is new, or different."""

    topic: Topic
    cursor: int
    item: Item


class Removed(Event, kw_only=True, frozen=True, tag="removed"):
    """An item is no more; `id` is the value of its id field."""

    topic: Topic
    cursor: int
    id: str


class Problem(Event, kw_only=True, frozen=True, tag="problem"):
    """A topic cannot be read now; its items are those of before. The next snapshot or change of it ends that."""

    topic: Topic
    message: str


class Synced(Event, kw_only=True, frozen=True, tag="synced"):
    """The answer to `subscribe` where a topic goes on from the client's cursor without a snapshot, and that a problem
    is over."""

    topic: Topic
    cursor: int


class Alive(Event, kw_only=True, frozen=True, tag="alive"):
    """Nothing has happened for `heartbeat_s` seconds. A client that hears nothing for longer is not connected."""


class RunInfoChanged(Event, kw_only=True, frozen=True, tag="run_info"):
    """What a watched run is doing now."""

    run_id: str
    cursor: int
    info: RunInfo


class RunSeries(Event, kw_only=True, frozen=True, tag="run_series"):
    """What is new in the series of a watched run."""

    run_id: str
    cursor: int
    series: list[SeriesTail]


class RunOutput(Event, kw_only=True, frozen=True, tag="run_output"):
    """What the ranks of a watched run have written; `skipped` records before these are not sent (see the log)."""

    run_id: str
    cursor: int
    records: list[OutputRecord]
    skipped: int = 0


class RunGone(Event, kw_only=True, frozen=True, tag="run_gone"):
    """There is no such run, or no more; it is not watched any longer."""

    run_id: str


class MessageRefused(Event, kw_only=True, frozen=True, tag="refused"):
    """A message of the client was not understood, or cannot be done; the connection stays.

    Attributes:
        run_id: of the run that is not watched; empty where it was something else.
    """

    message: str
    run_id: str = ""


ServerMessage = (
    Hello
    | Alive
    | Snapshot
    | Changed
    | Removed
    | Problem
    | Synced
    | RunInfoChanged
    | RunSeries
    | RunOutput
    | RunGone
    | MessageRefused
)


# --- without a websocket --------------------------------------------------------------------------------------------

# `GET /llmcloud/api/events/poll`: the same messages, asked for again and again. A client that has lost an answer on the
# way asks again with the number of the one that it has: what came after it is told once more.
MAX_WAIT_S = 20.0

# Encoded once, for all clients.
Told = Annotated[msgspec.Raw, Meta(extra_json_schema={"$ref": "#/components/schemas/ServerMessage"})]


class PollQuery(Query, frozen=True):
    """What a client says, and how long it waits for something to be told."""

    session: Annotated[str, Meta(description="As answered before; empty to begin.")] = ""
    received: Annotated[
        int, Meta(ge=0, description="`number` of the newest answer that has arrived; 0 before the first.")
    ] = 0
    messages: Annotated[str, Meta(description="What the client says: a JSON list of ClientMessage.")] = ""
    wait_s: Annotated[
        float, Meta(ge=0, le=MAX_WAIT_S, description="The answer may take so long while there is nothing to tell.")
    ] = 10.0

    def said(self) -> list[msgspec.Raw]:
        """Each of the messages as JSON. Raises UsageError."""
        try:
            return _decode_list(self.messages or "[]")
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise UsageError(f"messages={self.messages!r:.80} is no JSON list: {error}.") from None


class Polled(Response, frozen=True):
    """What the client is told.

    Attributes:
        session: names the connection; it ends when it is not asked for half a minute.
        number: of this answer.
        messages: what there is to tell, in order; empty when nothing happened.
    """

    session: str
    number: int
    messages: list[Told]


_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode = msgspec.json.Decoder(ClientMessage).decode
_encode = msgspec.json.Encoder().encode


def read(text: str | bytes) -> ClientMessage:
    """A client's message; raises msgspec.ValidationError or msgspec.DecodeError."""
    return _decode(text)


def write(message: ServerMessage | ClientMessage) -> bytes:
    """As JSON; NaN and infinity become null."""
    return _encode(message)
