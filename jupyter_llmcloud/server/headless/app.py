"""The server of `headless` and of `jupyter llmcloud serve`: how it is made, and when it ends."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import psutil
from jupyter_server.serverapp import ServerApp
from tornado.httpserver import HTTPServer
from traitlets.config import Config

from jupyter_llmcloud import config
from jupyter_llmcloud.cluster.agent_launcher import end_agents
from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.server.cluster_access import HEADLESS_LEASE_S, Identity
from jupyter_llmcloud.server.context import ServerContext
from jupyter_llmcloud.server.extension import LLMCloudExtension
from jupyter_llmcloud.server.headless.listener import ANY_ADDRESS, LOOPBACK, Listener
from jupyter_llmcloud.server.routes import SETTING
from jupyter_llmcloud.system.atomic_files import write_json
from jupyter_llmcloud.system.processes import is_process

POLL_S = 1.0
UNKNOWN_TRIES = 60  # looks at the runs that fail, one after the other, until none is taken to go on
IDLE_S = 300.0  # of a connection on which nothing is asked


class HeadlessServerApp(ServerApp):
    """A Jupyter server without kernels, files, terminals, other extensions, and without the user's configuration."""

    default_services: Any = ("auth", "security", "shutdown")
    listener: Listener

    def load_config_file(self, *_: Any, **__: Any) -> None:
        """The user's configuration is for the user's server: it could open this one to others."""

    def write_server_info_file(self) -> None:
        """It is announced in its own file, not among the servers that a browser may be sent to."""

    def init_signal(self) -> None:
        """Ctrl-C and SIGTERM end it with all that it started, and ask nothing."""
        signal.signal(signal.SIGINT, self._signal_stop)
        signal.signal(signal.SIGTERM, self._signal_stop)

    def write_browser_open_files(self) -> None:
        """Nobody opens it in a browser."""


def make_app(
    identity: Identity, token: str, listener: Listener = LOOPBACK, log_level: str = "INFO"
) -> HeadlessServerApp:
    """The server, bound and ready to start. Raises UsageError for a port that is taken, or a certificate of no use."""
    tls = listener.tls()
    sockets = listener.sockets()
    root_dir = tempfile.mkdtemp(prefix="empty-", dir=config.runtime_dir())
    settings = Config()
    settings.ServerApp = Config(
        ip=listener.ip, port=listener.port, open_browser=False, root_dir=root_dir, allow_root=True, answer_yes=True,
        terminals_enabled=False, allow_unauthenticated_access=False, cookie_secret=secrets.token_bytes(32),
        jpserver_extensions={LLMCloudExtension.__module__: True}, log_level=log_level,
        allow_remote_access=not listener.is_local,
    )  # fmt: skip
    settings.IdentityProvider.token = token
    LLMCloudExtension.identity = identity
    app: HeadlessServerApp = HeadlessServerApp.instance(config=settings)
    app.listener = listener
    app.initialize(argv=[], find_extensions=False, new_httpserver=False)
    app.port = sockets[0].getsockname()[1]
    app._http_server = HTTPServer(
        app.web_app, max_body_size=app.max_body_size, ssl_options=tls, idle_connection_timeout=IDLE_S
    )
    app._http_server.add_sockets(sockets)
    return app


def context_of(app: ServerApp) -> ServerContext:
    """What the handlers of `app` share."""
    context: ServerContext = app.web_app.settings[SETTING]
    return context


def base_url(app: HeadlessServerApp) -> str:
    """Where `app` answers, for this machine."""
    listener = app.listener
    return f"{'https' if listener.certfile else 'http'}://{listener.host}:{app.port}{app.base_url}"


def public_url(app: HeadlessServerApp) -> str:
    """Where `app` answers, for others as well when they reach it."""
    if app.listener.ip not in ANY_ADDRESS:
        return base_url(app)
    scheme = "https" if app.listener.certfile else "http"
    return f"{scheme}://{socket.getfqdn()}:{app.port}{app.base_url}"


def announce(path: Path, app: HeadlessServerApp, token: str) -> None:
    """Tell the owner where we are; 0600, whole or not at all."""
    me = psutil.Process()
    told = {"url": base_url(app), "token": token, "pid": me.pid, "started": me.create_time()}
    write_json(path, told, durable=False)  # of a process, which no loss of power outlives


async def owner_gone(pid: int, started: float) -> None:
    """Returns when this very process has ended; a later one with its pid does not count."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # not this system
        while is_process(pid, started):
            await asyncio.sleep(POLL_S)
        return
    try:
        if is_process(pid, started):
            gone = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(descriptor, gone.set)
            await gone.wait()
            loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)


async def has_active_runs(context: ServerContext) -> bool:
    """Does a run go on, on a cluster of this server?"""
    if len(context.starts) or len(context.sweeps):
        return True
    names = await context.clusters.names()
    records = [record for record in await asyncio.to_thread(context.runs.list) if record.is_active]
    mine = [record for record in records if record.cluster in names]
    return any([await context.run_states.true_state(record) != "lost" for record in mine])


async def _may_have_active_runs(app: ServerApp, num_tries: int = UNKNOWN_TRIES) -> bool:
    """The same, asked again when it cannot be told: a disk that refuses for a moment must not end what trains."""
    for _ in range(num_tries):
        try:
            return await has_active_runs(context_of(app))
        except (LLMCloudError, OSError, sqlite3.Error) as error:
            app.log.warning("whether runs go on cannot be told now: %s", error)
            await asyncio.sleep(POLL_S)
    return False


async def end_with_owner(app: ServerApp, pid: int, started: float) -> None:
    """Stop the server when its owner has gone, its lease is over and its runs have ended."""
    try:
        await owner_gone(pid, started)
        app.log.info("the owner (pid %s) has gone", pid)
        await asyncio.sleep(config.lease_s(HEADLESS_LEASE_S))
        while await _may_have_active_runs(app):
            await asyncio.sleep(POLL_S)
        app.log.info("the lease is over")
    finally:  # whatever went wrong: a server without an owner must not stay
        app.stop()


def remove_folder(app: ServerApp) -> None:
    """Its private empty folder, which something may have been put into."""
    try:
        os.rmdir(app.root_dir)
    except OSError as error:
        app.log.warning("%s is left: %s", app.root_dir, error)


def serve(owner_pid: int, owner_started: float, path: Path, token: str, begun_cluster_id: str = "") -> None:
    """Serve until the owner has gone, and leave nothing."""
    app = make_app(Identity(headless=True, owner_pid=owner_pid, begun_cluster_id=begun_cluster_id), token)
    app.io_loop.add_callback(announce, path, app, token)
    app.io_loop.add_callback(end_with_owner, app, owner_pid, owner_started)
    try:
        app.start()
    finally:
        for suffix in (".json", ".lock", ".log"):
            path.with_suffix(suffix).unlink(missing_ok=True)
        remove_folder(app)
        if begun_cluster_id:
            end_agents(begun_cluster_id)
