"""Has imported what programs of one kind import, and forks those of tests: python mother.py LISTENING_FD KIND PADDING.

It ends with the pytest that owns its folder, and with it everything that was forked from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
from typing import Any

OWNER = "LLMCLOUD_TEST_PRELOADED_BY"  # the pid of the pytest
GROUP = "LLMCLOUD_TEST_GROUP"  # the file by which a process enters the control group of its test
ABOVE = 300  # descriptors of the fork are kept there while they come to their places
PR_SET_MM, PR_SET_MM_ARG_END, PR_SET_MM_ENV_END = 35, 9, 11


class Mother:
    """Forks on request until its owner has gone."""

    def __init__(self, listener: socket.socket, owner: int) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = listener
        self.owner = os.pidfd_open(owner)
        self.forked: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> (pid, who stands for it)
        self.pidfds: dict[socket.socket, int] = {}
        self.selector.register(listener, selectors.EVENT_READ, self.accept)
        self.selector.register(self.owner, selectors.EVENT_READ, self.end)

    def serve(self) -> list[int]:
        """Returns in a fork: its descriptors, the first of which tells what was asked for."""
        while True:
            for key, _ in self.selector.select():
                if (fds := key.data(key.fileobj)) is not None:
                    return list(fds)

    def accept(self, _: Any) -> None:
        connection, _ = self.listener.accept()
        self.selector.register(connection, selectors.EVENT_READ, self.heard)

    def heard(self, connection: socket.socket) -> list[int] | None:
        """A request; or, later, the end of who has asked."""
        if connection in self.pidfds:
            os.kill(self.forked[self.pidfds[connection]][0], signal.SIGKILL)  # is reaped, and told to nobody
            self.selector.unregister(connection)
            return None
        try:
            data, fds, _, _ = socket.recv_fds(connection, 64, 253)
        except OSError:
            data, fds = b"", []
        if not data:
            self.selector.unregister(connection)
            connection.close()
            return None
        assert threading.active_count() == 1  # a lock that another thread holds is never free in the fork
        if (pid := os.fork()) == 0:
            self.close()
            return fds
        for fd in fds:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        self.forked[pidfd], self.pidfds[connection] = (pid, connection), pidfd
        self.selector.register(pidfd, selectors.EVENT_READ, self.reap)
        with contextlib.suppress(OSError):  # it has gone: that is heard next
            connection.send(str(pid).encode())
        return None

    def reap(self, pidfd: int) -> None:
        """A fork has ended."""
        pid, connection = self.forked.pop(pidfd)
        self.selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        del self.pidfds[connection]
        if connection in {key.fileobj for key in self.selector.get_map().values()}:
            self.selector.unregister(connection)
        with contextlib.suppress(OSError):  # it has gone before
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        connection.close()

    def end(self, _: Any) -> None:
        """The owner has gone."""
        for pid, _ in self.forked.values():
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    def close(self) -> None:
        """In a fork: none of this is its own."""
        connections = [
            key.fileobj for key in self.selector.get_map().values() if isinstance(key.fileobj, socket.socket)
        ]
        self.selector.close()
        for connection in {*connections, *self.pidfds}:
            connection.close()
        os.close(self.owner)
        for pidfd in self.forked:
            os.close(pidfd)


def look_like(arguments: list[str], env: dict[str, str]) -> None:
    """Have /proc tell of the process that stands for this one: who looks for what a test has left reads it there."""
    with open("/proc/self/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    zero = ctypes.c_ulong(0)
    where = [int(field) for field in fields[45:49]]  # arg_start, arg_end, env_start, env_end: proc(5)
    told = [b"".join(word.encode() + b"\0" for word in arguments)]
    told.append(b"".join(f"{name}={value}".encode() + b"\0" for name, value in env.items()))
    for (start, end), data, option in zip(
        (where[:2], where[2:]), told, (PR_SET_MM_ARG_END, PR_SET_MM_ENV_END), strict=True
    ):
        length = min(len(data), end - start - 1)
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, data[:length], length)
        ctypes.CDLL(None).prctl(PR_SET_MM, option, ctypes.c_ulong(start + length), zero, zero)  # where it may


def become(asked: dict[str, Any], fds: list[int], before: dict[str, str]) -> None:
    """Be the process that is asked for, as far as anybody can see."""
    os.setsid()
    _take(fds, asked["fds"])
    os.chdir(asked["cwd"])
    by_imports = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ.clear()
    look_like(asked["command"], asked["env"])
    os.environ.update({**by_imports, **asked["env"]})
    sys.path[:] = asked["path"]
    sys.orig_argv[:] = asked["command"]
    ignored = int(asked["ignored"], 16)
    for number in signal.valid_signals():
        if ignored >> (number - 1) & 1:
            signal.signal(number, signal.SIG_IGN)
        elif signal.getsignal(number) is signal.SIG_IGN:  # the shell has had a mother ignore those of its terminal
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if group := os.environ.get(GROUP):
        with contextlib.suppress(OSError), open(group, "w", encoding="ascii") as file:
            file.write(str(os.getpid()))


def _take(fds: list[int], numbers: list[int]) -> None:
    """Have the descriptors at the numbers that they have there."""
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ABOVE) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(above, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    for number in {0, 1, 2} - {*numbers}:
        os.close(number)


def renew(stand_in: int) -> None:
    """What a process makes when it begins, and what differs from one to the next."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
        buffer: Any = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
        by_line = number == 2 or raw.isatty()
        new = io.TextIOWrapper(
            buffer, old.encoding, old.errors, line_buffering=by_line, write_through=old.write_through
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    for generator in {id(one): one for module in list(sys.modules.values()) for one in _generators(module)}.values():
        generator.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    own, getppid = os.getpid(), os.getppid
    os.getppid = lambda: _parent_of(stand_in) if os.getpid() == own else getppid()


def _generators(module: Any) -> list[random.Random]:
    return [value for value in getattr(module, "__dict__", {}).values() if type(value) is random.Random]


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 1


def run(command: list[str], place: int) -> None:
    """What the interpreter does with a command line."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = main
    sys.argv[:] = [command[place], *command[place + 2 :]]
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    for name in (command[place + 1], f"{command[place + 1]}.__main__"):
        module = sys.modules.get(name)
        if module is not None and not hasattr(module, "__path__"):
            del sys.modules[name]  # else it was run as the program
    runpy._run_module_as_main(command[place + 1])


def preload(kind: str) -> None:
    """Import."""
    import kinds

    sys.path[0] = "/"  # not this folder, of whose modules a program knows nothing
    if kind == kinds.ZYGOTE:
        zygote = importlib.import_module(kind)
        zygote.preload()
        zygote.settle()
        return
    for name in kinds.IMPORTS[kind]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.enable()


def main() -> None:
    """Import, and fork on request."""
    before = dict(os.environ)
    os.environ.pop("LLMCLOUD_TEST_PADDING")
    listener, kind = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    gc.disable()
    preload(kind)
    told, *fds = Mother(listener, int(os.environ[OWNER])).serve()
    with open(told, "rb", closefd=True) as file:
        asked = json.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
    become(asked, fds, before)
    for name in ("kinds", "stand_in"):
        sys.modules.pop(name, None)
    del listener
    globals()["__name__"] = "mother"  # the frames of a cell are counted from those of __main__ that are the user's own
    if zygote := sys.modules.get("jupyter_llmcloud.training.zygote"):
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        sys.argv = ["-m", asked["command"][-1]]
        sys.path.insert(0, asked["cwd"])
        gc.collect()
        del sys.modules[
            "jupyter_llmcloud.training.zygote"
        ]  # else it was run as the program; __main__ is the shell's by now
        zygote.Zygote(socket.socket(fileno=int(sys.argv[1]))).serve()
    else:
        renew(asked["pid"])
        run(asked["command"], asked["place"])


if __name__ == "__main__":
    main()
