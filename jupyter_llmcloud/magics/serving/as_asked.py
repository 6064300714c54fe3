"""Whether an endpoint that is there already is as it was asked for now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.core.spec import EndpointSpec, Interface

_TOLD_AS = {"memory": "memory_bytes", "kv_cache": "cache_bytes"}
_COMPARED = (
    "dtype", "engine", "max_model_len", "max_concurrent", "threads", "cores", "memory", "kv_cache", "devices",
    "priority", "keep_requests", "keep_previous",
)  # fmt: skip


def say_what_stays(record: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Say which options the endpoint of this record does not have as they are asked for, if any: it stays as it is."""
    asked = {name: value for name, value in options.items() if value is not None and name != "tokenizer"}
    spec = EndpointSpec.make(asked, Interface.NOTEBOOK)
    if different := _not_as_asked(record, {name: getattr(spec, name) for name in asked}):
        print(
            f"{record['name']} was served already, and stays as it is: {different}. %endpoints scale changes the "
            f"replicas; for the rest, %endpoints stop {record['name']} comes first."
        )


def _not_as_asked(record: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Options that an endpoint which answers already does not have as they were asked for: none of a new one."""
    low, high = record["min_replicas"], record["max_replicas"]
    now = {name: record[_TOLD_AS.get(name, name)] for name in _COMPARED}
    now["replicas"] = record["num_replicas"] if high is None else f"{low}:{high}"
    differing = [name for name in asked if name in now and asked[name] != now[name]]
    return ", ".join(
        f"--{name.replace('_', '-')} is {'not set' if now[name] in (None, False) else now[name]}" for name in differing
    )
