"""%serve and %endpoints: from a trained model to a URL, and what there is to know about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class

from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.core.options import Option, Syntax, integer, parse, split, take_verb
from jupyter_llmcloud.core.spec import SERVE, EndpointSpec, Interface
from jupyter_llmcloud.errors import ModelError, NotFound, ServerError
from jupyter_llmcloud.magics.commands.keys import KEYS, NewKey, run_verb
from jupyter_llmcloud.magics.commands.keys import create_key as create_key
from jupyter_llmcloud.magics.commands.keys import key_alerts as key_alerts
from jupyter_llmcloud.magics.commands.keys import key_usage as key_usage
from jupyter_llmcloud.magics.commands.keys import keys as keys
from jupyter_llmcloud.magics.commands.keys import revoke_key as revoke_key
from jupyter_llmcloud.magics.commands.keys import rotate_key as rotate_key
from jupyter_llmcloud.magics.commands.tables import PanelOf, Table, ago
from jupyter_llmcloud.magics.output.endpoint import Endpoint
from jupyter_llmcloud.magics.output.progress_line import ProgressLine
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.magics.session import session

WAIT_S = 1
_LIMIT = Option(("--limit",), "At most this many lines of each replica.", metavar="N", parse=integer(1))
VERBS = {
    "list": Syntax("%endpoints list", (), "", "The endpoints of this server."),
    "stop": Syntax(
        "%endpoints stop", (), "NAME", "End an endpoint; one that has ended is forgotten.", names="endpoints"
    ),
    "logs": Syntax("%endpoints logs", (_LIMIT,), "NAME", "What its replicas printed.", names="endpoints"),
    "keys": KEYS,
}


def serve(target: Any, *, progress: Callable[[str], None] | None = None, **options: Any) -> Endpoint:
    """Serve a run's model, a folder or an object, and wait until it answers; interrupted, it goes on starting.

    Args:
        target: a run, or a folder; or a function of inputs, an object with `predict(inputs)` or a `torch.nn.Module`,
            which go along by value and need a `name`.
        progress: told in a few words how far it is.
    """
    if not isinstance(target, str | Path):
        from jupyter_llmcloud.magics.commands.serve_code import serve_object

        return serve_object(target, options.pop("name", None), progress=progress, **options)
    target = str(target)
    EndpointSpec.make(options, Interface.NOTEBOOK)
    server = session.current().server
    record = _create(server, target, {**options, "cluster": options.get("cluster") or session.current().cluster})
    began = time.monotonic()
    while record["state"] == "starting":
        if progress is not None:
            reason = f" ({shown(record['reason'])})" if record.get("reason") else ""
            progress(f"{record['name']} is starting: {time.monotonic() - began:.0f} s{reason}")
        record = server.endpoint(record["name"], wait_s=WAIT_S)
    if record["state"] != "ready":
        kind = ModelError if "model" in record["reason"] else ServerError
        raise kind(f"endpoint {record['name']!r} has {record['state']}: {record['reason'] or 'it was stopped.'}")
    return Endpoint(record["name"], server, record["kind"])


def _create(server: Any, target: str, options: dict[str, Any]) -> dict[str, Any]:
    folder = Path(target).expanduser()
    if options.get("base_model"):
        options = {**options, "base_model": str(Path(options["base_model"]).expanduser().absolute())}
    if not NAME_PATTERN.fullmatch(target):
        return dict(server.create_endpoint(str(folder.absolute()), **options))
    try:
        return dict(server.create_endpoint(target, **options))
    except NotFound:
        if not folder.is_dir():
            raise
        return dict(server.create_endpoint(str(folder.absolute()), **options))


def get(name: str) -> Endpoint:
    """The endpoint with this name; raises NotFound."""
    server = session.current().server
    record = server.endpoint(name)
    return Endpoint(record["name"], server, record["kind"])


def list() -> list[dict[str, Any]]:  # type: ignore[valid-type]  # the name is the verb's
    """Records of the endpoints."""
    return session.current().server.endpoints()


def stop(name: str) -> None:
    """End an endpoint; one that has ended is forgotten."""
    session.current().server.stop_endpoint(name)


def logs(name: str, limit: int | None = None) -> str:
    """What its replicas printed."""
    return "\n".join(row["text"] for row in session.current().server.endpoint_logs(name, limit))


def table() -> Table:
    """The endpoints of this server."""
    rows = [
        (
            row["name"],
            row["kind"],
            row["state"],
            f"{sum(replica['state'] == 'ready' for replica in row['replicas'])}/{row['num_replicas']}",
            memory(row["replicas"]),
            shown(row["target"]),
            row["revision"],
            ago(row["created"]),
            shown(row["reason"]),
        )
        for row in session.current().server.endpoints()
    ]
    headings = ["name", "kind", "state", "replicas", "memory", "serves", "revision", "started", "note"]
    return Table(headings, rows, "There is no endpoint yet: %serve RUN makes one.").shown_by(PanelOf("endpoint"))


def memory(replicas: Any) -> str:
    """What each replica of an endpoint takes, as far as it is known."""
    known = [replica["memory"]["process_bytes"] for replica in replicas if replica.get("memory")]
    return " + ".join(f"{num_bytes / 2**30:.1f} GiB" for num_bytes in known)


@magics_class
class EndpointMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    @line_magic
    def serve(self, line: str) -> Endpoint:
        """%serve TARGET: serve a run's model or a folder; `ep = %serve NAME` keeps the endpoint."""
        parsed = parse(SERVE, split(line, "%serve"))
        line_of_progress = ProgressLine()
        try:
            endpoint = serve(parsed.arguments[0], progress=line_of_progress.tell, **parsed.given)
        except KeyboardInterrupt:
            line_of_progress.tell("Not waiting any longer; the endpoint goes on starting: %endpoints shows it.")
            raise
        endpoint.show(line_of_progress.handle)
        return endpoint

    @line_magic
    def endpoints(self, line: str) -> Any:
        """%endpoints [list | stop NAME | logs NAME | keys ...]: what is served, and with which keys."""
        words = split(line, "%endpoints")
        verb = take_verb("%endpoints", VERBS, words, "list")
        return getattr(self, f"_{verb}")(parse(VERBS[verb], words))

    def _list(self, given: Any) -> Table:
        return table()

    def _stop(self, given: Any) -> None:
        stop(given.arguments[0])

    def _logs(self, given: Any) -> None:
        sys.stdout.write(shown(logs(given.arguments[0], given.limit)) + "\n")

    def _keys(self, given: Any) -> Table | NewKey | None:
        return run_verb(given)
