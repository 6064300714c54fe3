"""Finds the server of this kernel: the one the environment names, its parent, or a headless one of its own."""

from __future__ import annotations

import fcntl
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import psutil

from jupyter_llmcloud import config
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.errors import LLMCloudError, NotFound, ServerError
from jupyter_llmcloud.system.atomic_files import read_json
from jupyter_llmcloud.system.processes import is_process
from jupyter_llmcloud.system.spawn import log_tail, spawn

START_TIMEOUT_S = 60.0
POLL_S = 0.02


def find_or_start(for_world: bool = False) -> ServerClient:
    """The server; raises ServerError when the one that the environment names does not answer.

    One that is started `for_world` lets the agent of a local cluster come up beside itself.
    """
    if url := os.environ.get(config.ENV_SERVER_URL):
        return _checked(ServerClient(url, os.environ.get(config.ENV_SERVER_TOKEN, "")))
    return parent_server() or headless_server(for_world)


def _checked(client: ServerClient) -> ServerClient:
    try:
        client.status()
    except LLMCloudError as error:
        hint = f"{config.ENV_SERVER_URL} names it; it must be a Jupyter server with jupyter-llmcloud, and"
        raise ServerError(f"{error} {hint} {config.ENV_SERVER_TOKEN} must hold its token.") from None
    return client


def parent_server() -> ServerClient | None:
    """The Jupyter server that started this kernel, when it has our extension and lets us in."""
    pid = os.environ.get("JPY_PARENT_PID", "")
    client = _announced(config.jupyter_runtime_dir() / f"jpserver-{pid}.json") if pid.isdigit() else None
    return _answering(client) if client is not None else None


def _answering(client: ServerClient) -> ServerClient | None:
    try:
        client.status()
    except LLMCloudError:
        client.close()
        return None
    return client


def running_server() -> ServerClient | None:
    """The server that the environment names, else the newest of this user that answers."""
    if url := os.environ.get(config.ENV_SERVER_URL):
        return ServerClient(url, os.environ.get(config.ENV_SERVER_TOKEN, ""))
    for path in announcements():
        if (client := _announced(path)) is not None and _answering(client) is not None:
            return client
    return None


def find_running() -> ServerClient:
    """The same; raises NotFound when there is none."""
    if (server := running_server()) is not None:
        return server
    raise NotFound(
        "no Jupyter server with jupyter-llmcloud runs here: start one (jupyter lab, jupyter llmcloud serve PATH), "
        f"or name it in {config.ENV_SERVER_URL} and {config.ENV_SERVER_TOKEN}."
    )


def announcements() -> list[Path]:
    """Where servers of this user tell their URL, the newest first."""
    paths = [*config.jupyter_runtime_dir().glob("jpserver-*.json"), *config.runtime_dir().glob("headless-*.json")]
    return sorted(paths, key=_age, reverse=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _announced(path: Path) -> ServerClient | None:
    told = read_json(path)
    if told is None or not isinstance(told.get("url"), str):
        return None
    return ServerClient(told["url"], told.get("token") or os.environ.get("JUPYTERHUB_API_TOKEN", ""))


def has_ended(server: ServerClient) -> bool:
    """Whether it is the headless server of this process, and that has been killed."""
    told = read_json(_own_announcement())
    is_own = told is not None and told["url"].rstrip("/") == server.url.rstrip("/")
    return told is not None and is_own and not is_process(told["pid"], told["started"])


def _own_announcement() -> Path:
    process = psutil.Process()
    return config.runtime_dir() / f"headless-{process.pid}-{round(process.create_time() * 100)}.json"


def headless_server(for_world: bool = False) -> ServerClient:
    """The headless server of this process, started when there is none yet."""
    pid = os.getpid()
    started = psutil.Process(pid).create_time()
    path = _own_announcement()
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # threads of this kernel may ask at the same time
        told = read_json(path)
        known = _answering(ServerClient(told["url"], told["token"])) if told else None
        return known or _start(path, pid, started, ["--for-world"] if for_world else [])


def _start(path: Path, pid: int, started: float, options: list[str]) -> ServerClient:
    path.unlink(missing_ok=True)
    log_path = path.with_suffix(".log")
    command = [sys.executable, "-P", "-m", "jupyter_llmcloud.server.headless"]
    arguments = ["--owner-pid", str(pid), "--owner-started", repr(started), "--announce", str(path), *options]
    environment = {**os.environ, config.ENV_SERVER_TOKEN: secrets.token_urlsafe(32)}
    process = spawn([*command, *arguments], log_path, fresh_log=True, env=environment, cwd=config.runtime_dir())
    return _await(process, path, log_path)


def _await(process: subprocess.Popen[bytes], path: Path, log_path: Path) -> ServerClient:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if told := read_json(path):
            client = ServerClient(told["url"], told["token"])
            client.status()
            return client
        if process.poll() is not None:
            break
        time.sleep(POLL_S)
    else:
        process.terminate()
    end = log_tail(log_path)
    raise ServerError(f"the headless server of this kernel did not start. The end of {log_path}:\n{end}")
