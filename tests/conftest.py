"""What every test gets: folders and settings of its own, and a look at what it left behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jupyter_events import schema
from jupyter_events.schema import EventSchema
from jupyter_server import serverapp
from jupyter_server.serverapp import ServerApp

from tests.support import guardian, leaks
from tests.support.session import FOLDER, is_worker, make_folder, mark_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest_plugins = [
    "pytest_jupyter.jupyter_server",
    "tests.support.worlds",
    "tests.support.schedule",
    "tests.support.kept_logs",
    "tests.support.cpu_time",
    "tests.support.shared_server",
]

LEASE_S = 2.0
GRACE_S = LEASE_S + 28.0  # on a busy machine ending takes its time
FOREIGN_VARIABLES = ("JPY_PARENT_PID", "JPY_SESSION_NAME", "LLMCLOUD_SERVER_URL", "LLMCLOUD_SERVER_TOKEN")

# The GPUs of this machine: tests below tests/gpu use them, all others see none, so that they test the same everywhere.
GPUS = "LLMCLOUD_TEST_GPUS"
SUPPORT = Path(__file__).parent / "support"
# Found before all else by every Python that a test starts.
FIRST_ON_PATH = (str(SUPPORT / "absent"), str(SUPPORT / "preloaded"))

with contextlib.suppress(ImportError):  # not there beside the oldest and the newest libraries
    from hypothesis import settings

    settings.load_profile("ci")  # the same examples each time; --hypothesis-profile=default draws others

_variables = pytest.StashKey[dict[str, str]]()
_guardian = pytest.StashKey[subprocess.Popen[bytes]]()


def _settings(folder: Path, mark: str) -> dict[str, str]:
    """The environment of the tests: nothing of the user's own, nothing from outside this machine."""
    return {
        GPUS: os.environ.get(GPUS, os.environ.get("CUDA_VISIBLE_DEVICES", "all")),
        "CUDA_VISIBLE_DEVICES": "",
        leaks.MARK: f"{mark}session",
        "PYTHONPATH": os.pathsep.join(filter(None, (*FIRST_ON_PATH, os.environ.get("PYTHONPATH")))),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "t"),
        "LLMCLOUD_ROOT": str(folder / "root"),
        "LLMCLOUD_RUNTIME_DIR": str(folder / "run"),
        "LLMCLOUD_LEASE_S": str(LEASE_S),
        "JUPYTER_CONFIG_DIR": str(folder / "jupyter/config"),
        "JUPYTER_DATA_DIR": str(folder / "jupyter/data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter/runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "MPLBACKEND": "agg",
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Settle the environment before any test module is imported. Every worker of pytest-xdist does so for itself."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; programs would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = config.stash[FOLDER] = make_folder(config)
    for name in ("home", "t"):
        (folder / name).mkdir()
    if config.option.basetemp is None or is_worker(config):
        config.option.basetemp = folder / "tmp"
    gc.disable()  # until all is imported: looking through it again and again takes a tenth of that time
    config.stash[_variables] = dict(os.environ)
    for name in FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(_settings(folder, mark_of(config)))
    tempfile.tempdir = None  # asked for anew
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process that a test starts compiles our sources anew
    sys.dont_write_bytecode = False  # nor does this one rewrite the asserts of all test modules each time
    if not is_worker(config):
        os.environ.setdefault("LLMCLOUD_TEST_PRELOADED", str(folder))
        os.environ.setdefault("LLMCLOUD_TEST_PRELOADED_BY", str(os.getpid()))
        config.stash[_guardian] = guardian.start(mark_of(config), folder)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported stays: nobody looks through it from now on."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Give the environment back and remove the session's folder, and what workers left that did not come so far."""
    gc.enable()
    guardian.clean_up(mark_of(config), config.stash[FOLDER])
    if _guardian in config.stash:
        config.stash[_guardian].kill()
        config.stash[_guardian].wait()
    os.environ.clear()
    os.environ.update(config.stash[_variables])
    tempfile.tempdir = None


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_by_the_session(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    mark = mark_of(request.config)
    left = leaks.settle(lambda: leaks.marked_processes(mark), GRACE_S)
    lines = [leaks.describe(process) for process in left]
    leaks.end(left)
    if lines:
        pytest.fail("the tests left behind:\n  " + "\n  ".join(lines), pytrace=False)


@pytest.fixture(autouse=True)
def _nothing_is_left_by_the_test(
    request: pytest.FixtureRequest, _nothing_is_left_by_the_session: None
) -> Iterator[None]:
    mark = f"{mark_of(request.config)}{uuid.uuid4().hex[:8]}"
    before = leaks.Snapshot(mark)
    with leaks.marked(mark):
        yield
    if lines := before.leaks(GRACE_S):
        pytest.fail("the test left behind:\n  " + "\n  ".join(lines), pytrace=False)


@pytest.fixture(scope="session")
def for_the_session(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[None]]:
    """Processes started inside `with for_the_session():` may live until the session ends.

    Fixtures of a wider scope than a test need it only when a test asks for them by `request.getfixturevalue`.
    """
    return lambda: leaks.marked(f"{mark_of(request.config)}session")


@contextlib.contextmanager
def own_folders(patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A root and a runtime folder of one's own; gives the root."""
    session = Path(os.environ["LLMCLOUD_ROOT"]).parent
    with tempfile.TemporaryDirectory(prefix="own-", dir=session) as folder:
        patch.setenv("LLMCLOUD_ROOT", f"{folder}/root")
        patch.setenv("LLMCLOUD_RUNTIME_DIR", f"{folder}/run")
        yield Path(folder) / "root"


@pytest.fixture
def own_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A root and a runtime folder that no other test sees; returns the root."""
    with own_folders(monkeypatch) as root:
        yield root


@pytest.fixture
def not_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this test starts is no fork of another process: it kills some of it, and watches how the rest ends."""
    monkeypatch.delenv("LLMCLOUD_TEST_PRELOADED")


@pytest.fixture(scope="module")
def module_root() -> Iterator[Path]:
    """The same for all tests of a module."""
    with pytest.MonkeyPatch.context() as patch, own_folders(patch) as root:
        yield root


@pytest.fixture(scope="session", autouse=True)
def _servers_read_once_what_is_the_same_for_all() -> Iterator[None]:
    """The schemas of a Jupyter server's events, which it parses and checks, and the commit of which it asks git.

    Fifteen milliseconds of the hundred that a start takes of a processor, and there are hundreds.
    """
    load, validate, checked = EventSchema._load_schema, schema.validate_schema, set[str]()
    of_file = functools.cache(load)

    def load_once(told: Any) -> Any:
        return of_file(told) if isinstance(told, Path) else load(told)

    def validate_once(told: dict[str, Any]) -> None:
        if (text := repr(told)) not in checked:
            validate(told)
            checked.add(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EventSchema, "_load_schema", staticmethod(load_once))
        patch.setattr(schema, "validate_schema", validate_once)
        patch.setattr(serverapp, "get_sys_info", functools.cache(serverapp.get_sys_info))
        yield


@pytest.fixture
def jp_nbconvert_templates() -> None:
    """pytest-jupyter's copies fifty files for every server; ours converts nothing by nbconvert."""


@pytest.fixture(autouse=True)
def jp_server_cleanup(jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """pytest-jupyter's, where there was a server: its own makes one for every test, only to clean up after it."""
    yield
    if ServerApp.initialized():
        app = ServerApp.instance()
        with contextlib.suppress(RuntimeError, SystemExit):
            jp_asyncio_loop.run_until_complete(app._cleanup())
        if hasattr(app, "kernel_manager"):
            app.kernel_manager.context.destroy()
        ServerApp.clear_instance()


@pytest.fixture(scope="session")
def pictures() -> Path:
    """Where browser tests keep their screenshots, to be looked at afterwards."""
    leaks.OUTPUT.mkdir(exist_ok=True)
    return leaks.OUTPUT


def new_browser() -> Iterator[Browser]:
    """For a fixture: a headless browser, or why there is none."""
    from tests.support import lab

    path = lab.browser_path()
    if path is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say("there is no Chromium on this machine: make setup installs it where it can")
    with lab.running_browser(path) as browser:
        yield browser


@pytest.fixture
def chromium(pictures: Path) -> Iterator[Browser]:
    """A headless browser; without one the test is skipped, under continuous integration it fails."""
    yield from new_browser()
