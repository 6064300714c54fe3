"""%serve and %endpoints: from a trained model to a URL, and what there is to know about it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class

from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.core.options import Option, Syntax, integer, parse, split, take_verb
from jupyter_llmcloud.core.serving.endpoint.comparison import in_words
from jupyter_llmcloud.core.spec import SERVE, EndpointSpec, Interface
from jupyter_llmcloud.errors import Busy, ModelError, NotFound, ServerError, UsageError
from jupyter_llmcloud.magics.commands import rollouts
from jupyter_llmcloud.magics.commands.keys import KEYS, NewKey, run_verb
from jupyter_llmcloud.magics.commands.keys import create_key as create_key
from jupyter_llmcloud.magics.commands.keys import key_alerts as key_alerts
from jupyter_llmcloud.magics.commands.keys import key_usage as key_usage
from jupyter_llmcloud.magics.commands.keys import keys as keys
from jupyter_llmcloud.magics.commands.keys import revoke_key as revoke_key
from jupyter_llmcloud.magics.commands.keys import rotate_key as rotate_key
from jupyter_llmcloud.magics.commands.rollouts import add_adapter as add_adapter
from jupyter_llmcloud.magics.commands.rollouts import remove_adapter as remove_adapter
from jupyter_llmcloud.magics.commands.rollouts import revisions as revisions
from jupyter_llmcloud.magics.commands.rollouts import rollback as rollback
from jupyter_llmcloud.magics.commands.rollouts import scale as scale
from jupyter_llmcloud.magics.commands.rollouts import shadow as shadow
from jupyter_llmcloud.magics.commands.rollouts import update as update
from jupyter_llmcloud.magics.commands.serve_variable import (
    NamedVariable,
    find,
    is_run_or_folder,
    serve_variable,
    takes_place_of,
)
from jupyter_llmcloud.magics.commands.tables import PanelOf, Table, ago
from jupyter_llmcloud.magics.output.progress_line import ProgressLine
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.magics.serving.as_asked import say_what_stays
from jupyter_llmcloud.magics.serving.endpoint import Endpoint
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.run_handle import RunHandle
from jupyter_llmcloud.storage.remote import run_copy
from jupyter_llmcloud.storage.runs import RunStore

WAIT_S = 1
_LIMIT = Option(("--limit",), "At most this many lines of each replica.", metavar="N", parse=integer(1))
VERBS = {
    "list": Syntax("%endpoints list", (), "", "The endpoints of this server."),
    "show": Syntax("%endpoints show", (), "NAME", "What there is to know of an endpoint.", names="endpoints"),
    "stop": Syntax(
        "%endpoints stop", (), "NAME", "End an endpoint; one that has ended is forgotten.", names="endpoints"
    ),
    "logs": Syntax("%endpoints logs", (_LIMIT,), "NAME", "What its replicas printed.", names="endpoints"),
    **rollouts.VERBS,
    "keys": KEYS,
}


def serve(target: Any, *, progress: Callable[[str], None] | None = None, **options: Any) -> Endpoint:
    """Serve a run's model, a folder or an object, and wait until it answers; interrupted, it goes on starting.

    An endpoint that serves it already under that name is returned as it is. A variable is served as it is now: one that
    is served already is replaced.

    Args:
        target: a run (its name, its id or its handle), a folder, or the name of a variable of the ranks or of the
            notebook; or a function of inputs, an object with `predict(inputs)` or a model (`tokenizer=` its tokenizer),
            which go along by value and need a `name`.
        progress: told in a few words how far it is.
    """
    if isinstance(target, RunHandle):
        target = target.run_id
    elif not isinstance(target, str | Path):
        from jupyter_llmcloud.magics.commands.serve_code import serve_object

        return serve_object(target, options.pop("name", None), progress=progress, **options)
    target = str(target)
    EndpointSpec.make(options, Interface.NOTEBOOK)
    if (variable := _variable(target, options)) is not None:
        if isinstance(variable.value, RunHandle):
            return serve(variable.value, progress=progress, **options)
        return serve_variable(variable, _shell(), serve, progress=progress, **options)
    if options.pop("tokenizer", None) is not None:
        raise UsageError(f"--tokenizer is for a TARGET that is a variable, and {target} is a run or a folder.")
    server = session.current().server
    began, asked = time.monotonic(), options
    options = {**options, "cluster": options.get("cluster") or session.current().cluster}
    while True:
        try:
            record = _create(server, target, options)
            break
        except NotFound as error:
            if run_copy.is_fetched(RunStore(), target):
                continue
            if not target.isidentifier() or options.get("follow"):
                raise
            raise NotFound(f"{error} Nor a variable {target!r}, on the ranks or in this notebook.") from None
        except Busy as error:  # of a run that is followed, and has saved nothing yet
            if progress is not None:
                progress(f"waiting: {error} {time.monotonic() - began:.0f} s")
            time.sleep(WAIT_S)
    say_what_stays(record, asked)
    while record["state"] == "starting":
        if progress is not None:
            reason = f" ({shown(record['reason'])})" if record.get("reason") else ""
            progress(f"{record['name']} is starting: {time.monotonic() - began:.0f} s{reason}")
        record = server.endpoint(record["name"], wait_s=WAIT_S)
    if record["state"] != "ready":
        kind = ModelError if "model" in record["reason"] else ServerError
        raise kind(f"endpoint {record['name']!r} has {record['state']}: {record['reason'] or 'it was stopped.'}")
    return Endpoint(record["name"], server, record["kind"], record.get("inputs", ""))


def _variable(target: str, options: Mapping[str, Any]) -> NamedVariable | None:
    """The variable that a target names, where it names nothing else: a run, a folder, or an endpoint of another one."""
    shell = _shell()
    if options.get("follow") or not target.isidentifier() or (found := find(target, shell)) is None:
        return None
    if is_run_or_folder(target):
        if found.role:
            print(f"{target} is a variable {found.where}, too. What is served is the run or the folder of that name.")
        return None
    if isinstance(found.value, RunHandle):
        return found
    if not options.get("name") and not NAME_PATTERN.fullmatch(target):
        raise UsageError(f"an endpoint cannot be called {target!r}: say --name NAME, in letters of ASCII.")
    try:
        known = session.current().server.endpoint(options.get("name") or target)
    except NotFound:
        return found
    is_other = known["state"] in ("starting", "ready") and not takes_place_of(target, known)
    return None if is_other and not options.get("name") else found


def _shell() -> Any:
    from IPython.core.getipython import get_ipython
    from IPython.core.interactiveshell import InteractiveShell

    return get_ipython() or InteractiveShell.instance()


def _create(server: Any, target: str, options: dict[str, Any]) -> dict[str, Any]:
    folder = Path(os.path.expanduser(target))
    if options.get("base_model"):
        options = {**options, "base_model": str(Path(os.path.expanduser(options["base_model"])).absolute())}
    if not NAME_PATTERN.fullmatch(target):
        return dict(server.create_endpoint(str(folder.absolute()), reuse=True, **options))
    try:
        return dict(server.create_endpoint(target, reuse=True, **options))
    except NotFound:
        if not folder.is_dir():
            raise
        return dict(server.create_endpoint(str(folder.absolute()), reuse=True, **options))


def get(name: str) -> Endpoint:
    """The endpoint with this name; raises NotFound."""
    server = session.current().server
    record = server.endpoint(name)
    return Endpoint(record["name"], server, record["kind"], record.get("inputs", ""))


def list() -> list[dict[str, Any]]:  # type: ignore[valid-type]  # the name is the verb's
    """Records of the endpoints."""
    return session.current().server.endpoints()


def stop(name: str) -> None:
    """End an endpoint; one that has ended is forgotten."""
    session.current().server.stop_endpoint(name)


def logs(name: str, limit: int | None = None) -> str:
    """What its replicas printed."""
    return "\n".join(row["text"] for row in session.current().server.endpoint_logs(name, limit))


def table(name: str | None = None) -> Table:
    """The endpoints of this server, or one of them."""
    server = session.current().server
    rows = [
        (
            row["name"],
            row["kind"],
            row["state"],
            _num_replicas(row),
            _resources(row),
            memory(row["replicas"]),
            shown(row["target"]),
            _revision(row),
            ago(row["created"]),
            shown(row["reason"]),
        )
        for row in (server.endpoints() if name is None else [server.endpoint(name)])
    ]
    headings = ["name", "kind", "state", "replicas", "each", "memory", "serves", "revision", "started", "note"]
    listed = Table(headings, rows, "There is no endpoint yet: %serve RUN makes one.")
    return listed.shown_by(PanelOf("endpoint")) if name is None else listed


def details(name: str) -> Table:
    """What there is to know of an endpoint: a row for each fact, replica and revision."""
    row = session.current().server.endpoint(name)
    rates = row["rates"] or {}
    first = rates.get("first_token_s")
    load = f"{rates.get('requests_per_s', 0):.3g} requests/s, {rates.get('tokens_per_s', 0):.3g} tokens/s"
    facts = [
        ("state", row["state"] + (f": {shown(row['reason'])}" if row["reason"] else "")),
        ("kind", row["kind"]),
        ("serves", f"{shown(row['target'])} ({_revision(row)})"),
        ("URL", row["url"]),
        ("replicas", _num_replicas(row)),
        ("each", _resources(row)),
        ("load", load + (f", first token after {first:.3g} s" if first is not None else "")),
        ("adapters", ", ".join(f"{name}:{adapter}" for adapter in row["adapters"])),
        *((f"replica {one['id']}", _replica(one)) for one in row["replicas"]),
        *((f"{one['role']} {one['number']}", _compared(one)) for one in row["revisions"] if one["role"] != "retired"),
    ]
    return Table([name, ""], [fact for fact in facts if fact[1]], "")


def _replica(row: dict[str, Any]) -> str:
    told = [row["state"], row.get("engine") or "", memory([row]), f"{row['in_flight']} in flight"]
    return ", ".join(part for part in told if part)


def _compared(row: dict[str, Any]) -> str:
    told = f"{shown(row['target'])}, {row['num_requests']} requests, {row['num_errors']} failed"
    return f"{told}; {in_words(row['comparison'])}" if row.get("comparison") else told


def _num_replicas(row: dict[str, Any]) -> str:
    bounds = "" if row["max_replicas"] is None else f" ({row['min_replicas']}:{row['max_replicas']})"
    wanted = sum(revision["num_replicas"] for revision in row["revisions"] if revision["role"] != "retired")
    return f"{sum(replica['state'] == 'ready' for replica in row['replicas'])}/{wanted}{bounds}"


def _resources(row: dict[str, Any]) -> str:
    """What was asked for, for each replica."""
    cores, devices = row["cores"], row["devices"]
    told = [
        "" if cores is None else f"{cores} core{'s' * (cores != 1)}",
        "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**30:.3g} GiB",
        "" if row["cache_bytes"] is None else f"cache {row['cache_bytes'] / 2**30:.3g} GiB",
        "" if devices is None else f"{devices} GPU{'s' * (devices != 1)}",
    ]
    return ", ".join(part for part in told if part)


def _revision(row: dict[str, Any]) -> str:
    """What is served, and what is tried beside it."""
    others = [
        f"{item['role']} {item['number']}" + (f": {item['weight']} %" if item["weight"] else "")
        for item in row["revisions"]
        if item["role"] in ("canary", "shadow")
    ]
    step = "" if row["step"] is None else f" at step {row['step']}"
    return row["revision"] + step + (f" ({', '.join(others)})" if others else "")


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
        given = parse(VERBS[verb], words)
        own = getattr(self, f"_{verb}", None)
        return own(given) if own is not None else rollouts.run(verb, given)

    def _scale(self, given: Any) -> Table:
        name, replicas = given.arguments
        scale(name, replicas)
        return table(name)

    def _list(self, given: Any) -> Table:
        return table()

    def _show(self, given: Any) -> Table:
        return details(given.arguments[0])

    def _stop(self, given: Any) -> None:
        stop(given.arguments[0])

    def _logs(self, given: Any) -> None:
        sys.stdout.write(shown(logs(given.arguments[0], given.limit)) + "\n")

    def _keys(self, given: Any) -> Table | NewKey | None:
        return run_verb(given)
