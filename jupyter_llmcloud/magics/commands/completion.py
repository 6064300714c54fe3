"""What Tab offers in a line of ours: verbs, options and their values, and the names of what there is.

It is asked while somebody types, so nothing is started for it, and who does not answer at once is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jupyter_llmcloud.core.data import step_names
from jupyter_llmcloud.core.options import Syntax, complete
from jupyter_llmcloud.core.serving.models import engine_names
from jupyter_llmcloud.core.serving.models.variable_role import MODEL, role_of
from jupyter_llmcloud.core.spec import CLUSTER_KINDS
from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.storage.runs import RunRecord, RunStore

PATIENCE_S = 1.0
MAX_RUNS = 50  # the newest


def complete_line(
    line: str,
    verbs: Mapping[str, Mapping[str, Syntax]],
    single: Mapping[str, Syntax],
    variables: Mapping[str, Any],
) -> list[str]:
    """What can complete the last word of a line that begins with one of our magics.

    Args:
        verbs: of the magics that have some.
        single: the syntax of those that have none.
        variables: of the notebook.
    """
    words = line.lstrip().split(" ")
    if len(words) < 2:
        return []
    name, rest = words[0], words[1:]
    known = CompletionNames(variables)
    if name in single:
        return complete(single[name], " ".join(rest), known)
    of_magic = verbs.get(name, {})
    if len(rest) == 1:
        return [verb for verb in of_magic if verb.startswith(rest[0])]
    return complete(of_magic[rest[0]], " ".join(rest[1:]), known) if rest[0] in of_magic else []


class CompletionNames:
    """The names there are, by kinds of things as options and arguments call them."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._by_kind: dict[str, Callable[[], Sequence[str]]] = {
            "kinds of clusters": _kinds,
            "cleaning steps": lambda: list(step_names.NAMES),
            "engines": lambda: engine_names.NAMES,
            "clusters": lambda: [str(record["name"]) for record in _ask("clusters")],
            "worlds": lambda: [str(row["world_id"]) for row in _ask("worlds")],
            "runs": lambda: _runs(lambda record: True),
            "active runs": lambda: _runs(lambda record: record.is_active),
            "what can be served": lambda: [*_with_a_model(), *_served_here(variables), *_models_on_ranks()],
            "what can be explained": lambda: list(dict.fromkeys([*_endpoints(), *_with_a_model()])),
            "sweeps": lambda: [str(row["name"]) for row in _ask("sweeps")],
            "endpoints": _endpoints,
            "keys": lambda: [str(row["id"]) for row in _ask("keys") if row["state"] == "valid"],
            "variables": lambda: sorted(name for name in variables if not name.startswith("_")),
            "variables of ranks": _on_ranks,
        }

    def __call__(self, kind: str) -> Sequence[str]:
        """Of one kind; nothing when it cannot be had."""
        try:
            return self._by_kind[kind]() if kind in self._by_kind else ()
        except (LLMCloudError, OSError):
            return ()


def _endpoints() -> list[str]:
    return [str(row["name"]) for row in _ask("endpoints")]


def _kinds() -> list[str]:
    configured = sys.modules["dask"].config.get("llmcloud.clusters", {}) if "dask" in sys.modules else {}
    return [*CLUSTER_KINDS, *configured]


def _ask(what: str) -> list[dict[str, Any]]:
    server = session.current().known_server
    return list(server.ask("GET", what, timeout_s=PATIENCE_S)[what]) if server is not None else []


def _runs(fits: Callable[[RunRecord], bool]) -> list[str]:
    """Names, the newest first, then ids: a name stands for the newest run that has it."""
    records = [record for record in RunStore().list()[:MAX_RUNS] if fits(record)]
    return [*dict.fromkeys(record.name for record in records), *(record.run_id for record in records)]


def _with_a_model() -> list[str]:
    return _runs(lambda record: "model" in record.artifacts)


def _served_here(variables: Mapping[str, Any]) -> list[str]:
    return sorted(name for name, value in variables.items() if name[:1] != "_" and role_of(value) == MODEL)


def _models_on_ranks() -> list[str]:
    world = session.current().world
    return sorted(row["name"] for row in world.variables() if row["role"] == MODEL) if world is not None else []


def _on_ranks() -> list[str]:
    world = session.current().world
    return sorted(world.own_names(PATIENCE_S)) if world is not None else []
