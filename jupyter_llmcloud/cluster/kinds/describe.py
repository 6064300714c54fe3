"""What kinds of clusters there are, and which options a form asks for.

Options come from the signature and the docstring of the Dask class, their defaults also from Dask's configuration. An
administrator declares kinds under `llmcloud.clusters` there, and with `form` which options are asked for:

    llmcloud:
      clusters:
        big:
          factory: dask_jobqueue:SLURMCluster
          options: {account: lab}
          title: The big machine
          form:
            queue: {choices: [gpu, cpu], help: Which part of it.}
            memory: {default: 64 GB}
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import dask

from jupyter_llmcloud.cluster.factory import LOCAL_DEFAULTS, LOCAL_OPTIONS, find_factory, known_kinds, load_factory
from jupyter_llmcloud.errors import UsageError

# Set for every cluster, asked for elsewhere in the form, or objects that no form can hold.
_HIDDEN = {
    "asynchronous", "n_workers", "n", "loop", "security", "name", "shutdown_on_close", "scheduler_cls", "worker_class",
    "job_cls", "silence_logs", "protocol", "threads_per_worker", "processes", "memory_limit", "self", "host",
}  # fmt: skip
_NUMPYDOC = re.compile(r"^(?P<names>[A-Za-z_][\w, ]*?)\s*:\s*(?P<type>.*)$")
_ROLE = re.compile(r":[a-z]+:`~?([^`]*)`")
_TYPES = {
    "list": {"list", "tuple", "sequence"},
    "object": {"dict", "mapping"},
    "boolean": {"bool", "boolean"},
    "integer": {"int", "integer"},
    "number": {"float", "number"},
}
_SLOTS = {
    "name": "slots",
    "type": "integer",
    "default": 1,
    "help": "Ranks that a worker holds, on a machine without GPUs.",
    "choices": [],
}


def describe_kinds() -> list[dict[str, Any]]:
    """Each kind with title, whether it can be started here, and its options; imports what those need."""
    declared = dask.config.get("llmcloud.clusters", {})
    return [_described(kind, declared.get(kind, {})) for kind in known_kinds()]


def _described(kind: str, declared: Mapping[str, Any]) -> dict[str, Any]:
    row = {"kind": kind, "title": str(declared.get("title", kind)), "help": "", "problem": "", "options": []}
    try:
        path, given = find_factory(kind)
        factory = load_factory(kind, path)
    except (UsageError, ImportError, KeyError, ValueError) as error:
        return {**row, "problem": str(error)}
    row["help"] = _first_sentence(factory)
    if "form" in declared:
        options = [_declared_option(name, dict(known or {}), given) for name, known in declared["form"].items()]
    elif path.endswith(":LocalCluster"):
        known = {option["name"]: option for option in _options(factory, {**LOCAL_DEFAULTS, **given})}
        shown = [known[name] for name in LOCAL_OPTIONS if name in known and name not in _HIDDEN]
        options = [_SLOTS, *shown]
    else:
        options = _options(factory, given)
    return {**row, "options": options}


def _declared_option(name: str, known: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    default = known.get("default", given.get(name))
    choices = list(known.get("choices", []))
    told = str(known.get("type", "choice" if choices else _type_of(default, "")))
    return {"name": name, "type": told, "default": default, "help": str(known.get("help", "")), "choices": choices}


def _options(factory: Any, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the signatures of the class and of those it hands its options on to."""
    defaults = {**_configured(factory), **given}
    found: dict[str, dict[str, Any]] = {}
    told = _documented(factory)
    for name, parameter in _parameters(factory).items():
        if name in _HIDDEN or name.startswith("_"):
            continue
        default = defaults.get(name, parameter.default)
        default = None if default is parameter.empty else default
        if not isinstance(default, str | int | float | bool | None):
            default = None
        kind, text = told.get(name, ("", ""))
        found[name] = {"name": name, "type": _type_of(default, kind), "default": default, "help": text, "choices": []}
    return list(found.values())


def _parameters(factory: Any) -> dict[str, inspect.Parameter]:
    """Without those that only collect others; a class that collects them is asked with its bases."""
    found: dict[str, inspect.Parameter] = {}
    for part in inspect.getmro(factory) if inspect.isclass(factory) else (factory,):
        if part.__module__.split(".")[0] not in factory.__module__ and part is not factory:
            break  # the machinery of Dask below it
        try:
            parameters = inspect.signature(part).parameters
        except (ValueError, TypeError):
            continue
        own = [p for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        found = {**{p.name: p for p in own}, **found}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def _configured(factory: Any) -> dict[str, Any]:
    """Defaults of dask-jobqueue's classes, which live in Dask's configuration by the name of the class."""
    name = getattr(factory, "config_name", None)
    return dict(dask.config.get(f"jobqueue.{name}", None) or {}) if isinstance(name, str) else {}


def _documented(factory: Any) -> dict[str, tuple[str, str]]:
    """name -> (type, text) of the section Parameters of a numpydoc docstring."""
    lines = (inspect.getdoc(factory) or "").splitlines()
    start = next((at + 2 for at, line in enumerate(lines) if line.strip() == "Parameters"), len(lines))
    found: dict[str, tuple[str, str]] = {}
    names: list[str] = []
    for at in range(start, len(lines)):
        line = lines[at]
        if line and not line[0].isspace():
            if at + 1 < len(lines) and set(lines[at + 1].strip()) == {"-"}:
                break  # the next section
            head = _NUMPYDOC.match(line)
            names = [name.strip() for name in (head["names"] if head else line).split(",")]
            found.update({name: (head["type"] if head else "", "") for name in names})
        else:
            for name in names:
                kind, text = found[name]
                found[name] = (kind, f"{text} {line.strip()}".strip())
    return {name: (kind, _sentence(text)) for name, (kind, text) in found.items()}


def _type_of(default: Any, told: str) -> str:
    """integer, number, boolean, list, object or text."""
    if isinstance(default, bool):
        return "boolean"
    if isinstance(default, int):
        return "integer"
    if isinstance(default, float):
        return "number"
    words = set(re.findall(r"[a-z]+", told.lower()))
    is_text = words & {"str", "string"} and not words & {"list", "dict"}
    if default is None and not is_text:
        return next((name for name, meant in _TYPES.items() if words & meant), "text")
    return "text"


def _sentence(text: str) -> str:
    """The first sentence, short enough for a form."""
    first = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    first = _ROLE.sub(r"\1", first).replace("``", "").strip()
    return first if len(first) <= 200 else first[:199] + "…"


def _first_sentence(factory: Any) -> str:
    return _sentence(" ".join((inspect.getdoc(factory) or "").partition("\n\n")[0].split()))
