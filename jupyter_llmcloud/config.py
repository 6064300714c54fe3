"""Where things live, and the few settings that an environment may change. Imports nothing heavy."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

ENV_ROOT = "LLMCLOUD_ROOT"
ENV_RUNTIME = "LLMCLOUD_RUNTIME_DIR"
ENV_SERVER_URL = "LLMCLOUD_SERVER_URL"
ENV_SERVER_TOKEN = "LLMCLOUD_SERVER_TOKEN"
ENV_CACHE_URL = "LLMCLOUD_CACHE_URL"
ENV_LEASE_S = "LLMCLOUD_LEASE_S"
ENV_LEAVE_S = "LLMCLOUD_LEAVE_S"
ENV_PREEMPTION_NOTICE = "LLMCLOUD_PREEMPTION_NOTICE"
ENV_PRICE = "LLMCLOUD_PRICE_PER_HOUR"
LEAVE_S = 20.0  # batch systems send SIGKILL 30 s after SIGTERM, as a rule


def _jupyter_dir(variable: str, *default: str) -> str:
    """The folder jupyter_core would name, found without importing it."""
    if value := os.environ.get(variable):
        return value
    if sys.platform == "darwin":
        return os.path.join(os.path.expanduser("~"), "Library", "Jupyter", *default[1:])
    return os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), *default)


_as_path = lru_cache(maxsize=16)(Path)  # every cell asks where its run is kept, and mostly that is where it was


def jupyter_runtime_dir() -> Path:
    """Where Jupyter servers announce themselves (`jpserver-<pid>.json`)."""
    return Path(_jupyter_dir("JUPYTER_RUNTIME_DIR", "jupyter", "runtime"))


def root() -> Path:
    """`<root>` of design: runs, server state. `LLMCLOUD_ROOT`, else `llmcloud/` in Jupyter's data folder.

    Of a URL it is the local part: see `root_url`.
    """
    if url := root_url():
        name = re.sub(r"[^\w.-]+", "_", url)[-40:]
        name = f"{name}-{sha256(url.encode()).hexdigest()[:8]}"
        return _as_path(os.path.join(_jupyter_dir("JUPYTER_DATA_DIR", "jupyter"), "llmcloud-at", name))
    if value := os.environ.get(ENV_ROOT, "").removeprefix("file://"):
        return _as_path(os.path.abspath(os.path.expanduser(value)))
    return _as_path(os.path.join(_jupyter_dir("JUPYTER_DATA_DIR", "jupyter"), "llmcloud"))


def root_url() -> str:
    """Where runs are copied to and fetched from, when `LLMCLOUD_ROOT` is a URL; "" when it is a folder."""
    value = os.environ.get(ENV_ROOT, "").rstrip("/")
    return value if "://" in value and not value.startswith("file://") else ""


def runtime_dir() -> Path:
    """Sockets, pids and keys of living processes, 0700. Short, since a unix socket path holds 107 bytes."""
    if value := os.environ.get(ENV_RUNTIME):
        path = Path(value)
    else:
        base = os.environ.get("XDG_RUNTIME_DIR")
        path = Path(base) / "llmcloud" if base else Path(tempfile.gettempdir()) / f"llmcloud-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = path.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise PermissionError(
            f"{path} must belong to you and be closed to others (0700). "
            f"Remove it, or set {ENV_RUNTIME} to a folder of your own."
        )
    return path


def lease_s(default: float) -> float:
    """Seconds that something without an owner is kept. `LLMCLOUD_LEASE_S` overrides every default."""
    return _seconds(ENV_LEASE_S, default)


def leave_s() -> float:
    """Seconds that a node agent which is told to end by SIGTERM waits for checkpoints: `LLMCLOUD_LEAVE_S`, else 20."""
    return _seconds(ENV_LEAVE_S, LEAVE_S)


def preemption_notice() -> str:
    """Where a node agent looks for a notice that its host is taken away: a file, a URL or a command; "" for nowhere.

    `LLMCLOUD_PREEMPTION_NOTICE`, in the environment of the Dask workers.
    """
    return os.environ.get(ENV_PREEMPTION_NOTICE, "")


def price_per_hour() -> str:
    """What a rank costs an hour, as it is written: `LLMCLOUD_PRICE_PER_HOUR`, in the environment of the node agents."""
    return os.environ.get(ENV_PRICE, "")


def _seconds(variable: str, default: float) -> float:
    value = os.environ.get(variable)
    if value is None:
        return default
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{variable}={value!r} is not a number of seconds") from None
