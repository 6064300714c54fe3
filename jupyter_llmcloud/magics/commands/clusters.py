"""%cluster: where ranks and replicas run."""

from __future__ import annotations

from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class

from jupyter_llmcloud.core.options import (
    Option,
    Syntax,
    integer,
    kind_and_options,
    parse,
    read_argument,
    split,
    take_verb,
)
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.commands.tables import PanelOf, Table, ago
from jupyter_llmcloud.magics.session import session

_NAME = Option(("--name",), "Name of the cluster.", metavar="NAME")
_WHICH = Option(("--name",), "Which cluster (default: the newest).", metavar="NAME", names="clusters")
VERBS = {
    "list": Syntax("%cluster list", (), "", "The clusters of this server."),
    "start": Syntax(
        "%cluster start",
        (Option(("--workers",), "Number of Dask workers.", metavar="N", parse=integer(1)), _NAME),
        "[KIND] [key=value...]",
        "Start a cluster: local (default), cuda, ssh, slurm, kubernetes, ... or module:Class.",
        names="kinds of clusters",
    ),
    "connect": Syntax("%cluster connect", (_NAME,), "ADDRESS", "Use a Dask cluster that somebody else has started."),
    "scale": Syntax("%cluster scale", (_WHICH,), "N", "Have N workers."),
    "adapt": Syntax("%cluster adapt", (_WHICH,), "MIN MAX", "Have between MIN and MAX workers, as the load asks."),
    "stop": Syntax("%cluster stop", (), "[NAME]", "End a cluster and all that runs on it.", names="clusters"),
}


def table() -> Table:
    """The clusters of this server."""
    rows = [
        (
            c["name"],
            c["kind"],
            c["state"] + (f": {c['reason']}" if c["reason"] else ""),
            c["num_workers"],
            c["num_slots"],
            c["address"],
            c["dashboard"],
            ago(c["created"]),
        )
        for c in session.current().server.clusters()
    ]
    return Table(
        ["name", "kind", "state", "workers", "slots", "address", "dashboard", "started"],
        rows,
        "There is no cluster yet: %cluster start, or the first %%distribute cell starts a local one.",
    ).shown_by(PanelOf("cluster"))


def start(
    kind: str = "local", *, workers: int | None = None, name: str | None = None, **options: Any
) -> dict[str, Any]:
    """Start a cluster; the next world starts on it. Returns its record."""
    return _started(kind, workers, name, options)


def _started(kind: str, workers: int | None, name: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """`options`: of the kind, whatever they are called; `name` is one of a KubeCluster."""
    record = session.current().server.start_cluster(kind=kind, workers=workers, name=name, options=options)
    session.current().cluster = record["name"]
    return record


def connect(address: str, name: str | None = None) -> dict[str, Any]:
    """Use a Dask cluster by its scheduler's address; the next world starts on it."""
    record = session.current().server.connect_cluster(address, name=name)
    session.current().cluster = record["name"]
    return record


def scale(workers: int, name: str | None = None) -> dict[str, Any]:
    """Have this many workers."""
    return session.current().server.scale_cluster(_which(name), workers)


def adapt(minimum: int, maximum: int, name: str | None = None) -> dict[str, Any]:
    """Have between `minimum` and `maximum` workers, as the load asks."""
    return session.current().server.adapt_cluster(_which(name), minimum, maximum)


def stop(name: str | None = None) -> None:
    """End a cluster (the session's, else the newest) and all that runs on it."""
    current = session.current()
    name = _which(name)
    current.server.stop_cluster(name)
    if current.cluster == name:
        current.cluster = None
    if current.world is not None and current.world.cluster == name:
        current.world.channel.close()
        current.world = None


def _which(name: str | None) -> str:
    if name or (name := session.current().cluster):
        return name
    known = session.current().server.clusters()
    if not known:
        raise UsageError("there is no cluster: %cluster start.")
    return str(max(known, key=lambda record: record["created"])["name"])


@magics_class
class ClusterMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    @line_magic
    def cluster(self, line: str) -> Any:
        """%cluster [list | start [KIND] | connect ADDRESS | scale N | stop [NAME]]: where ranks run."""
        words = split(line, "%cluster")
        verb = take_verb("%cluster", VERBS, words, "list")
        given = parse(VERBS[verb], words)
        return getattr(self, f"_{verb}")(given)

    def _list(self, given: Any) -> Table:
        return table()

    def _start(self, given: Any) -> Table:
        kind, options = kind_and_options(given.arguments, "%cluster start")
        _started(kind, given.workers, given.name, options)
        return table()

    def _connect(self, given: Any) -> Table:
        connect(given.arguments[0], given.name)
        return table()

    def _scale(self, given: Any) -> Table:
        workers = read_argument(VERBS["scale"], given.arguments[0], integer(0))
        there = scale(workers, given.name)["num_workers"]
        if there < workers:
            print(
                f"{there} of {workers} workers are there so far. The others are asked for: they come when the batch "
                "system has a place for them, and in the place of lost ones when Dask has given those up (2 minutes)."
            )
        return table()

    def _adapt(self, given: Any) -> Table:
        minimum, maximum = (read_argument(VERBS["adapt"], text, integer(0)) for text in given.arguments)
        adapt(minimum, maximum, given.name)
        return table()

    def _stop(self, given: Any) -> None:
        stop(given.arguments[0] if given.arguments else None)


def list() -> Any:
    """Records of the clusters."""
    return session.current().server.clusters()
