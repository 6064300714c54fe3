"""Sweeps: what is asked for, how far they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from jupyter_llmcloud.core.search.spec import SweepSpec
from jupyter_llmcloud.protocol.http.base import Body, Query, Response
from jupyter_llmcloud.protocol.http.options import Options, options_body

MAX_WAIT_S = 20


class SweepCell(Body, frozen=True):
    """Where a cell stands in its notebook, so that errors name its lines."""

    code: Annotated[str, Meta(description="Its body, without the line of the magic.")]
    filename: str = ""
    line_offset: Annotated[int, Meta(ge=0, description="Lines of the source above the body.")] = 0
    execution_count: Annotated[int, Meta(ge=0)] = 0
    folder: Annotated[str, Meta(description="Where its ranks work.")] = ""
    pushed: Annotated[
        dict[str, str], Meta(description="What is pushed, each as Python text; empty where it has none.")
    ] = {}


if TYPE_CHECKING:

    class StartSweep(Options, frozen=True):
        """A source with `trial.suggest_...`, with the options of a SweepSpec."""

        source: str | None = None
        cell: SweepCell | None = None
        pushed: str | None = None

else:
    StartSweep = options_body(
        "StartSweep",
        "A source with `trial.suggest_...`, and how it is searched.",
        SweepSpec,
        [
            (
                "source",
                Annotated[str | None, Meta(description="A program; of a sweep that goes on, if it has changed.")],
                None,
            ),
            ("cell", Annotated[SweepCell | None, Meta(description="Of a source that comes from a notebook.")], None),
            (
                "pushed",
                Annotated[str | None, Meta(description="Variables of every trial: cloudpickle's bytes in base64.")],
                None,
            ),
        ],
    )


class SweepQuery(Query, frozen=True):
    """How long to wait."""

    wait_s: Annotated[
        float,
        Meta(ge=0, le=MAX_WAIT_S, description="Answer when there is a change since `seen`, or after these seconds."),
    ] = 0
    seen: Annotated[int, Meta(description="`version` of the answer that is known.")] = -1


class SweepTrial(Response, frozen=True):
    """A trial: running, done, pruned, failed, unmeasured, lost or stopped."""

    number: int
    state: str
    value: float | None = None
    step: Annotated[int | None, Meta(description="Of the value.")] = None
    params: dict[str, Any] = {}
    run_id: str = ""
    reason: Annotated[str, Meta(description="Why it failed, or was lost.")] = ""
    began: float = 0.0
    ended: float | None = None
    num_attempts: Annotated[int, Meta(description="2 of a trial whose ranks were lost once.")] = 1
    generation: Annotated[int | None, Meta(description="Of a population.")] = None
    parent: Annotated[int | None, Meta(description="The trial from whose state it goes on.")] = None


class Sweep(Response, frozen=True):
    """A sweep."""

    name: str
    state: Annotated[str, Meta(description="running, finished, failed, stopped, or interrupted with its server.")]
    created: float
    ended: float | None = None
    cluster: str = ""
    owner: str = ""
    reason: str = ""
    note: Annotated[str, Meta(description="What it waits for.")] = ""
    spec: dict[str, Any] = {}
    version: Annotated[int, Meta(description="Counts its changes.")] = 0
    num_trials: int = 0
    best: SweepTrial | None = None
    importance: Annotated[dict[str, float], Meta(description="Of each parameter, once it has ended.")] = {}
    trials: list[SweepTrial] = []


class Sweeps(Response, frozen=True):
    """Sweeps, the newest first, without their trials."""

    sweeps: list[Sweep]


class SweepDeleted(Response, frozen=True):
    """It is gone; its runs stay."""

    name: str
