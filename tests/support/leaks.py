"""What a test may not leave behind: processes, listening ports, a changed environment, stray files.

Every process a test starts inherits `LLMCLOUD_TEST_ID`, whatever session or parent it ends up with, so what
outlives the test is found by that mark. What a fixture starts for the session carries the mark of that.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "LLMCLOUD_TEST_ID"
REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUT = REPOSITORY / "test-output"  # pictures and logs, kept on purpose
_SOURCES = [str(REPOSITORY / name) for name in ("", "tests", "notebooks", "jupyter_llmcloud")]
# Written by pytest itself, or once and for all by a library when it is first imported.
FREE_VARIABLES = {
    MARK,
    "PYTEST_CURRENT_TEST",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "PYDEVD_USE_FRAME_EVAL",
    "TORCHINDUCTOR_CACHE_DIR",
}
# Python's own audit events of a new process.
SPAWNS = frozenset(
    (
        "subprocess.Popen",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "os.startfile",
        "pty.spawn",
    )
)
# One per Python process by design; it ends with that process.
FREE_COMMANDS = ("multiprocessing.resource_tracker",)


def _mark_of(process: psutil.Process) -> str:
    """The mark a process was started with; empty when it has none or cannot be read."""
    try:
        mark = process.environ().get(MARK, "")
    except (psutil.Error, OSError):
        return ""
    return "" if mark == _INHERITED else mark


# This process may have a mark itself: a worker of pytest-xdist, or a pytest that a test has started.
_INHERITED = psutil.Process().environ().get(MARK, "")


def _is_of_interest(process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return not any(word in " ".join(process.cmdline()) for word in FREE_COMMANDS)
    except psutil.Error:
        return False


def marked_processes(prefix: str) -> list[psutil.Process]:
    """Living processes whose mark begins with `prefix`, this one excepted."""
    found = (process for process in _with_mark(prefix) if process.pid != os.getpid())
    return [process for process in found if _mark_of(process).startswith(prefix) and _is_of_interest(process)]


def _with_mark(prefix: str) -> Iterator[psutil.Process]:
    """Processes that may have the mark: found quickly, since every test looks at all processes of the machine."""
    wanted = f"{MARK}={prefix}".encode()
    if not os.path.isdir("/proc/self"):
        yield from psutil.process_iter()
        return
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, psutil.Error):
            if wanted in Path("/proc", name, "environ").read_bytes():
                yield psutil.Process(int(name))


def unmarked_children(pid: int | None = None) -> set[psutil.Process]:
    """Children without a mark: forked, without an exec, from this very process; and theirs.

    Nothing is looked for below a child with a mark: Chromium's pages overwrite their environment, and end with the
    process that was started, which has one.
    """
    found: set[psutil.Process] = set()
    for child in _children(os.getpid() if pid is None else pid):
        with contextlib.suppress(psutil.Error):  # gone
            process = psutil.Process(child)
            if not _mark_of(process):
                found |= {process} if _is_of_interest(process) else set()
                found |= unmarked_children(child)
    return found


def _children(pid: int) -> list[int]:
    """The processes that a process has forked; found without a look at all processes where the system lists them."""
    lists = list(Path(f"/proc/{pid}/task").glob("*/children"))
    if not lists:
        with contextlib.suppress(psutil.Error):
            return [child.pid for child in psutil.Process(pid).children()]
    found: list[int] = []
    for path in lists:
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, path.read_text().split())
    return found


def listening_ports() -> set[tuple[str, int]]:
    """The TCP addresses this process listens on."""
    found: set[tuple[str, int]] = set()
    for fd in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):  # the descriptor of the list itself, or no socket
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as end:
                    found |= {end.getsockname()[:2]} if _listens(end) else set()
    return found


def _listens(end: socket.socket) -> bool:
    is_tcp = end.family in (socket.AF_INET, socket.AF_INET6) and end.type == socket.SOCK_STREAM
    return is_tcp and bool(end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def watched_files() -> set[str]:
    """All that stands where a careless program writes: beside the sources, and in the home folder."""
    found: set[str] = set()
    for folder in watched_folders():
        with contextlib.suppress(OSError):  # there is none
            found.update([f"{folder}/{name}" for name in os.listdir(folder)])
    return found


def new_files(before: set[str]) -> list[Path]:
    """What has come since, of what may not. Only this is looked at closely: every test asks."""
    found = map(Path, watched_files() - before)
    # Sources come from whoever works on them while the tests run, folders of sources too.
    return sorted(path for path in found if path.name[0] != "." and path != OUTPUT and not _is_source(path))


def watched_folders() -> list[str]:
    """Folders in which nothing may appear; the home folder is that of this worker, the others are everybody's."""
    home = os.path.expanduser("~")
    return [*_SOURCES, home, f"{home}/.jupyter", f"{home}/.ipython", f"{home}/.local/share/jupyter"]


def _is_source(path: Path) -> bool:
    return path.suffix in (".py", ".md") or path.name == "__pycache__" or (path / "__init__.py").is_file()


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FREE_VARIABLES}


def describe(process: psutil.Process) -> str:
    """One line that says which process it is."""
    try:
        return f"process {process.pid}: {' '.join(process.cmdline())[:160]}"
    except psutil.Error:
        return f"process {process.pid} (gone meanwhile)"


class _Spawned:
    """Counts what may have made this process the parent of another: a look at all processes is only needed then."""

    def __init__(self) -> None:
        self.count = 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, _: object) -> None:
        if event in SPAWNS:
            self.count += 1


_spawned = _Spawned()


def end(processes: list[psutil.Process]) -> None:
    """Kill what was left, so that one leak does not fail the next test too."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def settle(look: Callable[[], list[psutil.Process]], grace_s: float) -> list[psutil.Process]:
    """What `look` still finds after at most `grace_s`: ending takes a moment, and a lease its time."""
    deadline = time.monotonic() + grace_s
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@contextlib.contextmanager
def marked(mark: str) -> Iterator[None]:
    """Processes started inside carry `mark`."""
    before = os.environ.get(MARK, "")
    os.environ[MARK] = mark
    try:
        yield
    finally:
        os.environ[MARK] = before


@dataclass
class Snapshot:
    """The state before a test, to compare with the one after it."""

    mark: str
    num_spawned: int = field(default_factory=lambda: _spawned.count)
    children: set[psutil.Process] = field(default_factory=unmarked_children)
    ports: set[tuple[str, int]] = field(default_factory=listening_ports)
    variables: dict[str, str] = field(default_factory=environment)
    files: set[str] = field(default_factory=watched_files)

    def leaks(self, grace_s: float) -> list[str]:
        """What the test left behind, one line each; left processes are ended."""
        left = settle(self._left_processes, grace_s) if _spawned.count > self.num_spawned else []
        lines = [describe(process) for process in left]
        end(left)
        lines += [f"listening port {host}:{port}" for host, port in sorted(listening_ports() - self.ports)]
        lines += [f"file {path}" for path in new_files(self.files)]
        return lines + self._changed_variables()

    def _left_processes(self) -> list[psutil.Process]:
        return [*marked_processes(self.mark), *(unmarked_children() - self.children)]

    def _changed_variables(self) -> list[str]:
        now = environment()
        names = sorted(name for name in self.variables.keys() | now.keys() if self.variables.get(name) != now.get(name))
        os.environ.update(self.variables)
        for name in now.keys() - self.variables.keys():
            del os.environ[name]
        return [f"variable {name}: {self.variables.get(name)!r} became {now.get(name)!r}" for name in names]
