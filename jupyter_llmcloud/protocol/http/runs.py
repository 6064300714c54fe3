"""Runs: as a list tells of them, as their records hold them, what they wrote, and what is asked of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from msgspec import UNSET, Meta, UnsetType

from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.protocol.http.base import Body, Query, Response
from jupyter_llmcloud.protocol.http.options import Options, options_body

Number = Annotated[float | None, Meta(description="Null stands for what JSON has no number for: NaN, infinity.")]
OfRank = Annotated[Annotated[int, Meta(ge=0, le=1_000_000)] | None, Meta(description="Of this rank only.")]

# --- what is asked ---

if TYPE_CHECKING:

    class RunOptions(Options, frozen=True):
        """The options of a RunSpec."""

else:
    RunOptions = options_body("RunOptions", "How a source text is executed on the ranks of a world.", RunSpec)


class ScriptFields(Body, frozen=True):
    """A program that is run as `python FILE ARGUMENTS` would, not as a cell."""

    file: Annotated[str, Meta(description="Its absolute path; empty for a text that comes from no file.")] = ""
    arguments: Annotated[list[str], Meta(description="What it finds in sys.argv[1:].")] = []
    folder: Annotated[str, Meta(description="Where it is run.")] = ""


class StartRun(Body, frozen=True):
    """A run to start, on ranks of its own."""

    source: Annotated[str, Meta(description="A Python program, or the text of a cell.")]
    spec: RunOptions = RunOptions()
    script: ScriptFields = ScriptFields()


class RunsQuery(Query, frozen=True):
    """Which runs."""

    state: Annotated[Literal["active"] | None, Meta(description="Only those that go on.")] = None
    limit: Annotated[int, Meta(ge=0, le=10_000, description="The newest so many.")] = 100
    trials: Annotated[Literal["none"] | None, Meta(description="Without those of sweeps, which GET sweeps lists.")] = (
        None
    )


class RecordsQuery(Query, frozen=True):
    """Which records."""

    rank: OfRank = None
    limit: Annotated[int, Meta(ge=0, le=100_000, description="The newest so many.")] = 1000


class LogQuery(Query, frozen=True):
    """Of which rank."""

    rank: OfRank = None


class LogScales(Body, frozen=True):
    """How a run is drawn."""

    log: Annotated[list[str], Meta(description="Metrics that are drawn in powers of ten.")] = []
    layout: Annotated[
        dict[str, Any] | UnsetType,
        Meta(description="Of its charts, pinned for all runs of this name; an empty one unpins it, left out it stays."),
    ] = UNSET


# --- what is answered ---


class NotFinite(TypedDict, total=False):
    """Values of a metric that were NaN or infinite."""

    count: int
    first: Annotated[float, Meta(description="The first step with one.")]
    since: Annotated[float | None, Meta(description="Since which step all were; null when they are finite again.")]
    value: Annotated[str, Meta(description="The last value, when it is one: nan, inf or -inf.")]


class HistoryEntry(TypedDict, total=False):
    """A change of state, or a note."""

    t: Annotated[float, Meta(description="Seconds since the epoch.")]
    state: str
    phase: Annotated[str, Meta(description="Before its ranks run it: finding a cluster, starting ranks, joining.")]
    why: str


class RunError(TypedDict, total=False):
    """How a rank failed."""

    rank: int
    ename: Annotated[str, Meta(description="Name of the exception's type.")]
    evalue: Annotated[str, Meta(description="Its message.")]
    traceback: Annotated[list[str], Meta(description="Lines with terminal colours, as IPython draws them.")]
    place: Annotated[str, Meta(description="The line of the notebook or script that failed.")]
    locals: Annotated[dict[str, str], Meta(description="Variables there, as short texts.")]
    collateral: Annotated[bool, Meta(description="Whether it failed only because another rank did.")]
    interrupted: Annotated[bool, Meta(description="Whether it ended because the run was stopped.")]
    step: Any


class RunHang(Response, frozen=True):
    """Ranks that do not go on."""

    t: Annotated[float, Meta(description="When it was noticed, in seconds since the epoch.")]
    text: Annotated[str, Meta(description="Who is late, where, and who waits for it in what.")]
    late: Annotated[list[int], Meta(description="Ranks that others wait for; empty in a deadlock.")] = []
    waiting: Annotated[list[int], Meta(description="Ranks that wait.")] = []


class RunDiagnosis(TypedDict, total=False):
    """Why a run has failed, as rules read it from what was left of it."""

    cause: Annotated[str, Meta(description="A short name: host-out-of-memory, hang, collective-mismatch, ...")]
    ranks: Annotated[list[int], Meta(description="The culprits, as far as they are known.")]
    sentence: Annotated[str, Meta(description="What has happened.")]
    action: Annotated[str, Meta(description="What to do next.")]


class Run(Response, frozen=True):
    """A run as a list tells of it. Times are seconds since the epoch."""

    run_id: str
    name: str
    state: Annotated[str, Meta(description="queued, running, stopping; finished, failed, stopped or lost.")]
    created: float
    ended: float | None
    world_size: Annotated[int, Meta(description="Ranks of its world; 0 while they are not chosen yet.")]
    ranks: Annotated[list[int], Meta(description="Those that execute it.")]
    cluster: str
    artifacts: Annotated[dict[str, str], Meta(description="What it saved: {model: path in its folder}.")]
    progress: Annotated[
        list[float | None] | None, Meta(description="[done, total] of its newest progress bar; null for none.")
    ] = None
    metrics: Annotated[dict[str, Number], Meta(description="The last value of each metric, of the first rank.")] = {}
    not_finite: dict[str, NotFinite] = {}
    world_id: Annotated[str, Meta(description="Of the world that executes it; empty while none does.")] = ""
    holder: Annotated[str, Meta(description="Who started it, in words: the end of a notebook's path, a process.")] = ""
    sweep: Annotated[str, Meta(description="Of which it is a trial; empty for none.")] = ""
    num_restarts: int = 0
    num_resizes: Annotated[int, Meta(description="How often it went on with another set of ranks.")] = 0
    phase: Annotated[
        str, Meta(description="While it is queued: finding a cluster, starting ranks, joining; else empty.")
    ] = ""
    hang: Annotated[RunHang | None, Meta(description="Why its ranks do not go on; null while they do.")] = None
    cost: Annotated[float | None, Meta(description="What it has cost so far; null where no price is known.")] = None


class Runs(Response, frozen=True):
    """Runs, the newest first."""

    runs: list[Run]


class RunDetail(Run, frozen=True):
    """Everything that the record of a run holds."""

    agent: Annotated[str, Meta(description="Socket of the node agent that leads it, on the server's host.")] = ""
    host: Annotated[str, Meta(description="Of that agent, when it is not the host of whoever started the run.")] = ""
    owner: str = ""
    spec: Annotated[dict[str, Any], Meta(description="The options that differ from their defaults.")] = {}
    script: Annotated[dict[str, Any], Meta(description="Which script was run, if it was one.")] = {}
    history: list[HistoryEntry] = []
    errors: list[RunError] = []
    num_rollbacks: Annotated[int, Meta(description="How often a detector had it go back to a checkpoint.")] = 0
    left_out: Annotated[
        list[list[int]],
        Meta(description="After a rollback: [first, last] of the optimizer steps that change no weight."),
    ] = []
    agents_left_out: Annotated[
        list[str],
        Meta(description="Agents (HOST:SOCKET) that get no rank of it any more: --watch straggler=scale."),
    ] = []
    alerts: Annotated[
        dict[str, int], Meta(description="How many of its detectors' alerts there were, by detector.")
    ] = {}
    diagnosis: Annotated[RunDiagnosis, Meta(description="Empty where it has not failed, or nothing tells why.")] = {}
    source: Annotated[str, Meta(description="As it was typed.")] = ""
    price: Annotated[float, Meta(description="Of an hour of a rank; 0 where nobody has said any.")] = 0.0
    seconds: Annotated[
        dict[str, dict[str, float]],
        Meta(description="Where each rank's time went: {rank: {compute, communication, data, waiting, checkpoint}}."),
    ] = {}
    versions: Annotated[dict[str, str], Meta(description="Of Python and of libraries, where it was executed.")] = {}
    topology: Annotated[
        dict[str, Any], Meta(description="hosts: the ranks of each; threads: of each rank; device: cpu or gpu.")
    ] = {}
    git: Annotated[
        dict[str, str], Meta(description="commit, branch and folder of the work tree in which its ranks work.")
    ] = {}
    pushed: Annotated[
        dict[str, str],
        Meta(description="Variables pushed since the cell before, each as Python text; empty where it has none."),
    ] = {}


class RunStarted(Response, frozen=True):
    """The run is on its way; it may wait for ranks."""

    run_id: str
    name: str
    state: str
    notes: Annotated[list[str], Meta(description="What there is to say, one sentence each.")]


class ExportQuery(Query, frozen=True):
    """Under which name."""

    file: Annotated[str, Meta(description="What the script is to be called, for its launch lines.")] = "train.py"


class RunScript(Response, frozen=True):
    """A run as a plain script, which gives the same losses without this package."""

    run_id: str
    text: str
    launches: Annotated[list[str], Meta(description="Commands that start it: torchrun, accelerate launch, sbatch.")]
    notes: Annotated[list[str], Meta(description="What there is to say, one sentence each.")]


class ComparisonQuery(Query, frozen=True):
    """Which runs."""

    runs: Annotated[str, Meta(description="Their ids or names, joined by commas.")] = ""
    tolerance: Annotated[float, Meta(ge=0, description="Relative, within which values of metrics are the same.")] = 0.0


class DifferentFact(Response, frozen=True):
    """An option, a version or a place that is not alike."""

    name: str
    values: Annotated[list[Any], Meta(description="In each run; null where it has none.")]


class ComparedMetric(Response, frozen=True):
    """A metric of the first rank of each run."""

    name: str
    last: Annotated[list[Number], Meta(description="The last value in each run; null where there is none.")]
    apart_from: Annotated[float | None, Meta(description="The first step that is not alike; null when all are.")]


class RunComparison(Response, frozen=True):
    """Runs, compared with the first of them."""

    runs: list[str]
    facts: list[DifferentFact]
    metrics: list[ComparedMetric]
    code: Annotated[list[str], Meta(description="For each run but the first, its difference; empty when the same.")]


class RunStopped(Response, frozen=True):
    """The state now: stopping while its ranks come to an end."""

    state: str


class CheckpointSaved(Response, frozen=True):
    """A checkpoint is complete."""

    run_id: str
    step: Annotated[int, Meta(description="Of which it is: optimizer steps finished.")]


class RunDeleted(Response, frozen=True):
    """The run is gone, with everything it left."""

    run_id: str


class RunView(Response, frozen=True):
    """A run as it looks now."""

    run_id: str
    name: str
    state: str
    html: Annotated[str, Meta(description="Its static form.")]


class LogScalesKept(Response, frozen=True):
    """The metrics that every later view of the run draws in powers of ten."""

    log: list[str]


class LogRecord(TypedDict, total=False):
    """What a rank wrote; display and result have more fields."""

    rank: int
    seq: Annotated[int, Meta(description="1, 2, ... of its rank.")]
    t: Annotated[float, Meta(description="Seconds since the epoch.")]
    kind: Annotated[str, Meta(description="stdout, stderr, display, result, clear_output or report.")]
    text: str
    warning: Annotated[bool, Meta(description="Whether Python's warnings wrote it.")]
    data: Annotated[dict[str, Any], Meta(description="Of display and result: by MIME type.")]
    metadata: dict[str, Any]


class LogRecords(Response, frozen=True):
    """What ranks wrote, in order of time."""

    records: list[LogRecord]


class MetricRecord(TypedDict, total=False):
    """What a rank measured: values at a step, or how far it is."""

    rank: int
    seq: Annotated[int, Meta(description="1, 2, ... of its rank.")]
    t: Annotated[float, Meta(description="Seconds since the epoch.")]
    step: Number
    values: dict[str, Number]
    not_finite: Annotated[dict[str, str], Meta(description="Which values are null, and for what: nan, inf, -inf.")]
    progress: Annotated[list[Number], Meta(description="[done, total].")]
    desc: Annotated[str, Meta(description="Of the progress bar.")]


class MetricRecords(Response, frozen=True):
    """What ranks measured, in order of time."""

    records: list[MetricRecord]
