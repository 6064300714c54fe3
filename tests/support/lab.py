"""A real JupyterLab in a process of its own, and a headless browser that looks at it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.support.plain_http import PLAIN
from tests.support.worlds import alive

ENDING_S = 120.0
PATIENCE_MS = 45_000  # of what a page is expected to show: none of it is a promise about time
# The first does without the windows that the others draw, for nobody: a page costs it two thirds of the processor time.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# Nothing that reaches out of the machine, nothing that needs a display or a sandbox of its own.
BROWSER_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
QUIET = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}


@dataclass(frozen=True)
class Lab:
    """Where a running JupyterLab is, and what it opens with."""

    url: str
    token: str
    log: Path

    def page_url(self, notebook: str = "") -> str:
        tree = f"/tree/{notebook}" if notebook else ""
        # Of a workspace of its own: without what another page has open, and not sent on while another is open.
        return f"{self.url}lab/workspaces/test-{secrets.token_hex(4)}{tree}?token={self.token}"

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """What a route of ours answers, below /llmcloud/api."""
        headers = {"Authorization": f"token {self.token}"}
        url = f"{self.url}llmcloud/api/{path}"
        with httpx.Client(trust_env=False, timeout=ENDING_S, verify=PLAIN) as client:
            answer = client.request(method, url, headers=headers, json=body or None)
        assert answer.is_success, f"{method} {path}: {answer.text}"
        return answer.json() if answer.content else None

    def end_clusters(self) -> None:
        """End what outlives kernels and servers: endpoints, and clusters with all that is on them."""
        self.end_endpoints()
        self._end("clusters")

    def end_endpoints(self) -> None:
        self._end("endpoints")

    def _end(self, kind: str) -> None:
        for item in self.ask("GET", kind)[kind]:
            if item["state"] not in ("stopped", "failed"):
                self.ask("DELETE", f"{kind}/{item['name']}")


def browser_path() -> str | None:
    """The browser on this machine, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextlib.contextmanager
def running_lab(
    folder: Path,
    config: dict[str, Any] | None = None,
    app: tuple[str, str] = ("jupyterlab", "LabApp"),
    again: Lab | None = None,
) -> Iterator[Lab]:
    """JupyterLab on `folder`, its settings, runtime files and log beside it; `config` is the server's.

    `app` is another front end, by its module and its class of settings; `again` one that has ended, whose address and
    token this one takes.
    """
    module, settings_of = app
    token = again.token if again else secrets.token_hex(16)
    port = urlsplit(again.url).port if again else 0
    home = folder.parent / "lab"
    settings = home / "config" / "labconfig"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "default_setting_overrides.json").write_text(json.dumps(QUIET), encoding="utf-8")
    (home / "config" / "jupyter_server_config.json").write_text(json.dumps(config or {}), encoding="utf-8")
    own = {
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_TOKEN": token,
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
    }
    command = [sys.executable, "-m", module, "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += [f"--ServerApp.root_dir={folder}", f"--{settings_of}.expose_app_in_browser=True"]
    with (home / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = _announced_url(process, home / "runtime", home / "log")
            yield Lab(url=url, token=token, log=home / "log")
        finally:
            _end(process)


def _announced_url(process: subprocess.Popen[bytes], runtime: Path, log: Path, timeout_s: float = 60) -> str:
    """The URL that the server tells in its runtime folder, once it listens, which is a moment later."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(StopIteration, OSError, ValueError):
            announced = (json.loads(path.read_text(encoding="utf-8")) for path in runtime.glob("jpserver-*.json"))
            told = next(one for one in announced if alive(one["pid"]))  # another may have been killed here
            socket.create_connection(("127.0.0.1", told["port"]), timeout=timeout_s).close()
            return str(told["url"])
        time.sleep(0.05)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")


def _end(process: subprocess.Popen[bytes], grace_s: float = 20) -> None:
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


@contextlib.contextmanager
def running_browser(path: str) -> Iterator[Browser]:
    """Headless Chromium. One a test: while it runs, this thread can run no event loop of its own."""
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE_MS)
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=BROWSER_OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


def open_lab(browser: Browser | BrowserContext, lab: Lab, notebook: str = "", *, page: Page | None = None) -> Page:
    """A page with JupyterLab restored and, if one is named, the notebook open and its kernel ready."""
    page = page or browser.new_page()
    page.set_default_timeout(2 * PATIENCE_MS)
    page.set_viewport_size({"width": 1280, "height": 860})
    page.goto(lab.page_url(notebook))
    page.wait_for_function("() => window.jupyterapp !== undefined")
    page.evaluate("async () => { await window.jupyterapp.restored; }")
    if notebook:
        page.wait_for_function("() => window.jupyterapp.shell.currentWidget?.sessionContext !== undefined")
        page.evaluate(
            """async () => {
                const context = window.jupyterapp.shell.currentWidget.sessionContext;
                await context.ready;
                await context.session.kernel.info;
            }"""
        )
    return page
