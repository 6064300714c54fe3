"""`%endpoints` verbs that change what an endpoint serves while it answers: the same as the methods of `Endpoint`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.client.revision_wait import wait_for_revision, wait_for_shadow
from jupyter_llmcloud.core.names import check_name, parse_replicas
from jupyter_llmcloud.core.options import Option, Parsed, Syntax, integer, take_verb
from jupyter_llmcloud.core.serving.endpoint.comparison import in_words
from jupyter_llmcloud.core.serving.endpoint.rollout import parse_shares
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.output.progress_line import ProgressLine
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.magics.serving.endpoint import as_target
from jupyter_llmcloud.magics.session import session

if TYPE_CHECKING:
    from jupyter_llmcloud.client.rest import ServerClient

_CANARY = Option(
    ("--canary",), "Give it so many percent of the requests, beside what is served now.", metavar="PERCENT",
    parse=integer(1),
)  # fmt: skip
_ADAPTER = Option(
    ("--name",), "How the adapter is asked for (default: its folder's name).", metavar="NAME",
    parse=lambda text: check_name(text, "--name"),
)  # fmt: skip
VERBS = {
    "scale": Syntax(
        "%endpoints scale", (), "NAME K|MIN:MAX", "Have more or fewer replicas, or as many as the load needs.",
        names="endpoints",
    ),
    "update": Syntax(
        "%endpoints update", (_CANARY,), "NAME TARGET", "Serve another model under the same name, without an outage.",
        names="endpoints",
    ),
    "split": Syntax(
        "%endpoints split", (), "NAME SHARES", "Share requests out, in percent: stable:95,canary:5.", names="endpoints"
    ),
    "rollback": Syntax(
        "%endpoints rollback", (), "NAME", "Without the canary, or back to the revision before this one.",
        names="endpoints",
    ),
    "shadow": Syntax(
        "%endpoints shadow", (), "NAME [REVISION]",
        "Copy requests to a revision, a run or a folder, whose answers are compared; alone, end that.",
        names="endpoints",
    ),
    "revisions": Syntax("%endpoints revisions", (), "NAME", "What it serves and has served.", names="endpoints"),
    "adapters": Syntax(
        "%endpoints adapters", (_ADAPTER,), "NAME [add|remove] [PATH|ADAPTER]",
        "Adapters beside the model, asked for as the model NAME:ADAPTER.", names="endpoints",
    ),
}  # fmt: skip


def scale(name: str, replicas: int | str) -> dict[str, Any]:
    """Have so many replicas, or as many as the load needs between bounds ("1:4")."""
    return _server().scale_endpoint(name, parse_replicas(str(replicas)))


def update(
    name: str, target: str, canary: int | None = None, *, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Serve another run or folder under the same name, and wait until that answers; interrupted, it goes on by itself.

    Args:
        canary: to so many percent of the requests.
        progress: told in a few words how far it is.
    """
    server = _server()
    return wait_for_revision(server, server.update_endpoint(name, as_target(target), canary), progress)


def split(name: str, shares: str | dict[str, int]) -> dict[str, Any]:
    """Share the requests out over revisions, in percent: "stable:95,canary:5"."""
    return _server().split_endpoint(name, parse_shares(shares) if isinstance(shares, str) else shares)


def rollback(name: str) -> dict[str, Any]:
    """Without the canary; where there is none, back to the revision before this one."""
    return _server().roll_back_endpoint(name)


def shadow(name: str, revision: str | None = None, *, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Copy the requests to a revision, a run or a folder, and wait until that takes them; None ends that."""
    server = _server()
    record = server.shadow_endpoint(name, None if revision is None else as_target(revision))
    return wait_for_shadow(server, record, progress)


def add_adapter(name: str, path: str, adapter: str | None = None) -> dict[str, Any]:
    """Load an adapter of PEFT beside the model; it is asked for as the model `NAME:ADAPTER`."""
    return _server().add_adapter(name, as_target(path), adapter)


def remove_adapter(name: str, adapter: str) -> dict[str, Any]:
    """Take an adapter away."""
    return _server().remove_adapter(name, adapter)


def revisions(name: str) -> Table:
    """What an endpoint serves and has served, the newest first."""
    rows = [
        (
            row["number"], row["role"], f"{row['weight']} %" if row["weight"] else "", shown(row["target"]),
            row["step"], row["num_requests"], row["num_errors"], _noted(row),
        )
        for row in reversed(_server().endpoint(name)["revisions"])
    ]  # fmt: skip
    return Table(["revision", "role", "requests", "serves", "step", "answered", "failed", "note"], rows, "None.")


def _noted(row: dict[str, Any]) -> str:
    return in_words(row["comparison"]) if row.get("comparison") else shown(row["note"])


def adapter_table(name: str) -> Table:
    """The adapters of an endpoint."""
    rows = [(f"{name}:{adapter}",) for adapter in _server().endpoint(name)["adapters"]]
    return Table(["model"], rows, f"There is no adapter yet: %endpoints adapters {name} add PATH loads one.")


def run(verb: str, given: Parsed) -> Table:
    """Carry out a verb with what was typed; returns what there is afterwards."""
    name, *rest = given.arguments
    if verb == "adapters":
        return _run_adapters(name, rest, given.name)
    if verb == "update":
        update(name, rest[0], given.canary, progress=ProgressLine().tell)
    elif verb == "split":
        split(name, rest[0])
    elif verb == "rollback":
        rollback(name)
    elif verb == "shadow":
        shadow(name, rest[0] if rest else None, progress=ProgressLine().tell)
    return revisions(name)


def _run_adapters(name: str, words: list[str], adapter: str | None) -> Table:
    verb = take_verb("%endpoints adapters NAME", dict.fromkeys(("list", "add", "remove")), words, "list")
    if (verb == "list") == bool(words):
        wanted = (
            f"what does {words[0]!r} mean?" if words else "expected a PATH." if verb == "add" else "expected its name."
        )
        raise UsageError(f"%endpoints adapters {name} {verb}: {wanted}")
    if verb == "add":
        add_adapter(name, words[0], adapter)
    elif verb == "remove":
        remove_adapter(name, words[0])
    return adapter_table(name)


def _server() -> ServerClient:
    return session.current().server
