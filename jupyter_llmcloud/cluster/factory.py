"""KIND -> a Dask cluster object."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import dask

from jupyter_llmcloud.cluster.kinds.slurm import with_prologue
from jupyter_llmcloud.cluster.low_overhead import SYNC_S
from jupyter_llmcloud.core.options import did_you_mean
from jupyter_llmcloud.errors import UsageError

KINDS = {
    "local": "distributed:LocalCluster",
    "cuda": "dask_cuda:LocalCUDACluster",
    "ssh": "distributed:SSHCluster",
    "slurm": "dask_jobqueue:SLURMCluster",
    "pbs": "dask_jobqueue:PBSCluster",
    "lsf": "dask_jobqueue:LSFCluster",
    "sge": "dask_jobqueue:SGECluster",
    "htcondor": "dask_jobqueue:HTCondorCluster",
    "oar": "dask_jobqueue:OARCluster",
    "kubernetes": "dask_kubernetes.operator:KubeCluster",
}
_PACKAGES = {"dask_cuda": "dask-cuda", "dask_jobqueue": "dask-jobqueue", "dask_kubernetes": "dask-kubernetes"}
LOCAL_OPTIONS = (
    "dashboard_address",
    "host",
    "interface",
    "local_directory",
    "scheduler_port",
    "silence_logs",
)

LOCAL_DEFAULTS = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "silence_logs": 40}


def known_kinds() -> list[str]:
    """Built-in kinds and those of Dask's configuration."""
    return [*KINDS, *dask.config.get("llmcloud.clusters", {})]


def starts_here(kind: str, options: dict[str, Any]) -> bool:
    """Whether this is Dask's own local cluster with its workers at their usual places: its agents can start ahead."""
    slots = options.get("slots", 1)
    usual = not options.keys() - {"slots"} and isinstance(slots, int) and slots > 0
    return kind == "local" and usual and find_factory(kind) == (KINDS["local"], {})


def make_cluster(kind: str, workers: int | None, options: dict[str, Any], security: Any) -> Any:
    """Build the cluster object, asynchronous, not started yet. Raises UsageError for a kind or option that is none."""
    path, defaults = find_factory(kind)
    factory = load_factory(kind, path)
    options = {**defaults, **options}
    if path == KINDS["local"]:
        options = _local_options(options, workers, security)
    else:
        _check_options(kind, factory, options)
        if path == KINDS["ssh"] and not options.get("hosts"):
            raise UsageError(
                "%cluster start ssh: say on which hosts, that of the scheduler first: "
                """hosts='["head", "node1", "node2"]'."""
            )
        if path == KINDS["slurm"]:
            options = with_prologue(options)
        if workers is not None:
            options.setdefault("n_workers", workers)
    try:
        return factory(asynchronous=True, **options)
    except TypeError as error:
        raise UsageError(f"%cluster start {kind}: {error}") from None


def find_factory(kind: str) -> tuple[str, dict[str, Any]]:
    """module:Class of a kind, and the options that are set for it. Raises UsageError."""
    configured = dask.config.get("llmcloud.clusters", {}).get(kind)
    if configured is not None:
        return configured["factory"], dict(configured.get("options", {}))
    if kind == "labextension" and (known := dask.config.get("labextension.factory", None)):
        return f"{known['module']}:{known['class']}", dict(known.get("kwargs", {}))
    if kind in KINDS:
        return KINDS[kind], {}
    if ":" in kind:
        return kind, {}
    raise UsageError(
        f"%cluster start {kind!r}: no such kind. Choose one of {', '.join(known_kinds())}, or module:Class."
        f"{did_you_mean(kind, known_kinds())}"
    )


def load_factory(kind: str, path: str) -> Any:
    """The class, or function, that makes such a cluster. Raises UsageError where its package is missing."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(module.split(".")[0], error.name)
        raise UsageError(f"%cluster start {kind}: it needs the package {package}: pip install {package}.") from None
    except AttributeError:
        raise UsageError(f"%cluster start {kind}: {module} has no {name}.") from None


def _local_options(options: dict[str, Any], workers: int | None, security: Any) -> dict[str, Any]:
    for name in options:
        if name not in LOCAL_OPTIONS:
            allowed = ", ".join(["slots", *LOCAL_OPTIONS])
            raise UsageError(f"%cluster start local: there is no option {name}=. Allowed: {allowed}.")
    fixed = {
        "n_workers": workers or 1,
        "threads_per_worker": 1,
        "processes": True,
        "memory_limit": 0,
        "security": security,
        "protocol": "tls://" if security else "tcp://",
        "scheduler_sync_interval": SYNC_S,
    }
    return {**LOCAL_DEFAULTS, **options, **fixed}


def _check_options(kind: str, factory: Any, options: dict[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            raise UsageError(f"%cluster start {kind}: there is no option {name}=. Allowed: {', '.join(parameters)}.")
