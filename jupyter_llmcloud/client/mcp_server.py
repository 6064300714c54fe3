"""`jupyter llmcloud mcp`: what the panels show and do, as tools of the Model Context Protocol over stdin and stdout.

Each call asks the server that runs then, so that one which was started again is found. The tools that change something
are there only when whoever starts this process says so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError
from jupyter_llmcloud.storage import log_text

if TYPE_CHECKING:
    from mcp.server import MCPServer

INSTRUCTIONS = """\
Training runs on the ranks of Dask clusters, started from notebooks or a terminal, and endpoints that serve their
models, of one Jupyter server. A run is named by its id or its name; of a name, the newest run is meant."""
MAX_LINES = 2000
MAX_POINTS = 2000
RECORDS_PER_LINE = 20  # a line may be written in pieces
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _server() -> closing[ServerClient]:
    return closing(discovery.find_running())


# --- tools that read ---


def list_runs(state: Literal["active", "any"] = "any", limit: int = 20) -> dict[str, Any]:
    """List runs, the newest first: name, state, progress, the last value of each metric. `active` ones go on."""
    with _server() as server:
        return {"runs": server.runs(state if state == "active" else None, limit)}


def show_run(run: str) -> dict[str, Any]:
    """Everything that the record of a run holds: source, options, history, the errors of its ranks, last values."""
    with _server() as server:
        told = server.run(run)
    for error in told["errors"]:
        error["traceback"] = [_plain(line) for line in error.get("traceback", [])]
    return told


def tail_log(run: str, rank: int | None = None, lines: int = 50) -> str:
    """The last lines that the ranks of a run wrote, each with its rank in brackets; of one rank if one is named."""
    lines = _within("lines", lines, MAX_LINES)
    with _server() as server:
        records = server.run_logs(run, rank, RECORDS_PER_LINE * lines)
    written = [_plain(line) for line in log_text.joined((record["rank"], record) for record in records)]
    return "\n".join(written[-lines:]) or "Nothing was written."


def metrics(run: str, names: list[str] | None = None, rank: int | None = None, points: int = 100) -> dict[str, Any]:
    """The newest values of a run's metrics as [step, rank, value], of all metrics or of those that are named.

    A value that JSON has no number for is "nan", "inf" or "-inf". `not_finite` counts those of the whole run.
    """
    points = _within("points", points, MAX_POINTS)
    with _server() as server:
        told, records = server.run(run), server.run_metrics(run, rank, points)
    series: dict[str, list[list[Any]]] = {}
    for record in records:
        for name, value in (record.get("values") or {}).items():
            if not names or name in names:
                shown = record.get("not_finite", {}).get(name, value)
                series.setdefault(name, []).append([record.get("step"), record["rank"], shown])
    if missing := [name for name in names or [] if name not in series]:
        there_are = ", ".join(sorted(told["metrics"])) or "none"
        raise NotFound(f"{run} has no metric {missing[0]!r} among its newest values. There are: {there_are}.")
    return {"run_id": told["run_id"], "not_finite": told["not_finite"], "series": series}


def stacks(name: str) -> str:
    """What every rank of a run is doing now and where in the code; also of a world, by its id or notebook."""
    with _server() as server:
        try:
            run = server.run(name)
        except NotFound:
            run = {"world_id": name, "state": "running"}
        if run["state"] not in ("running", "stopping"):
            raise UsageError(f"run {name!r} is {run['state']}: only ranks that execute something have stacks.")
        return "\n".join(server.world_stacks(run["world_id"])["lines"])


def clusters() -> dict[str, Any]:
    """The clusters with their workers and slots, and the worlds on them: who holds how many ranks, and for what."""
    with _server() as server:
        return {"clusters": server.clusters(), "worlds": server.worlds()}


def endpoints() -> dict[str, Any]:
    """The endpoints that serve models: state, replicas, limits, and the base URL for OpenAI clients."""
    with _server() as server:
        return {"endpoints": server.endpoints()}


# --- tools that change something ---


def stop_run(run: str) -> dict[str, Any]:
    """Stop a run after the step that all of its ranks are at; asked again, at once. Variables stay on the ranks."""
    with _server() as server:
        return server.stop_run(run)


def scale_cluster(name: str, workers: int) -> dict[str, Any]:
    """Change the number of a cluster's workers. What runs on a worker that goes is lost."""
    with _server() as server:
        return server.scale_cluster(name, workers)


def stop_endpoint(name: str) -> dict[str, Any]:
    """Stop an endpoint: its model is not served any more."""
    with _server() as server:
        return server.stop_endpoint(name)


READING: tuple[Callable[..., Any], ...] = (list_runs, show_run, tail_log, metrics, stacks, clusters, endpoints)
CHANGING: tuple[Callable[..., Any], ...] = (stop_run, scale_cluster, stop_endpoint)


def _within(name: str, value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise UsageError(f"{name} {value} is not possible: 1 to {most}.")
    return value


def _plain(line: str) -> str:
    """A line without colours, as it looked in the end."""
    return _CONTROL.sub("", line).rstrip("\r").rpartition("\r")[2]


def make_server(allow_changes: bool) -> MCPServer:
    """The tools; raises UsageError when the package `mcp` is not there."""
    try:
        from mcp.server import MCPServer
        from mcp.server.mcpserver.exceptions import ToolError
        from mcp_types import ToolAnnotations
    except ImportError as error:
        raise UsageError(
            f"jupyter llmcloud mcp needs the package mcp, version 2 or newer ({error}): "
            "pip install 'jupyter-llmcloud[mcp]'."
        ) from None

    def refusing(tool: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(tool)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return tool(*args, **kwargs)
            except LLMCloudError as error:
                raise ToolError(f"{type(error).__name__}: {error}") from None

        return call

    server = MCPServer("jupyter-llmcloud", instructions=INSTRUCTIONS, log_level="WARNING")
    for tool in READING:
        server.tool(annotations=ToolAnnotations(read_only_hint=True))(refusing(tool))
    for tool in CHANGING if allow_changes else ():
        server.tool(annotations=ToolAnnotations(read_only_hint=False, destructive_hint=True))(refusing(tool))
    return server


def serve(allow_changes: bool) -> None:
    """Answer on stdin and stdout until they are closed."""
    make_server(allow_changes).run("stdio")
