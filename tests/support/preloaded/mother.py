"""Has imported what a zygote imports, and forks the zygotes of tests: python mother.py LISTENING_FD.

It ends with the pytest that owns its folder, and with it everything that was forked from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
import threading
from typing import Any

MODULE = "jupyter_llmcloud.training.zygote"
OWNER = "LLMCLOUD_TEST_PRELOADED_BY"  # the pid of the pytest
GROUP = "LLMCLOUD_TEST_GROUP"  # the file by which a process enters the control group of its test


class Mother:
    """Forks on request until its owner has gone."""

    def __init__(self, listener: socket.socket, owner: int) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = listener
        self.owner = os.pidfd_open(owner)
        self.zygotes: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> (pid, who stands for it)
        self.pidfds: dict[socket.socket, int] = {}
        self.selector.register(listener, selectors.EVENT_READ, self.accept)
        self.selector.register(self.owner, selectors.EVENT_READ, self.end)

    def serve(self) -> tuple[dict[str, Any], list[int]]:
        """Returns in a fork: what was asked for, and its descriptors."""
        while True:
            for key, _ in self.selector.select():
                if (asked := key.data(key.fileobj)) is not None:
                    return asked

    def accept(self, _: Any) -> None:
        connection, _ = self.listener.accept()
        self.selector.register(connection, selectors.EVENT_READ, self.heard)

    def heard(self, connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
        """A request; or, later, the end of who has asked."""
        if connection in self.pidfds:
            os.kill(self.zygotes[self.pidfds[connection]][0], signal.SIGKILL)  # is reaped, and told to nobody
            self.selector.unregister(connection)
            return None
        try:
            data, fds, _, _ = socket.recv_fds(connection, 1 << 20, 4)
        except OSError:
            data, fds = b"", []
        if not data:
            self.selector.unregister(connection)
            connection.close()
            return None
        assert threading.active_count() == 1  # a lock that another thread holds is never free in the fork
        if (pid := os.fork()) == 0:
            self.close()
            return json.loads(data), fds
        for fd in fds:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        self.zygotes[pidfd], self.pidfds[connection] = (pid, connection), pidfd
        self.selector.register(pidfd, selectors.EVENT_READ, self.reap)
        return None

    def reap(self, pidfd: int) -> None:
        """A zygote has ended."""
        pid, connection = self.zygotes.pop(pidfd)
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
        for pid, _ in self.zygotes.values():
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    def close(self) -> None:
        """In a fork: none of this is its own."""
        self.selector.close()
        self.listener.close()
        os.close(self.owner)
        for pidfd in self.zygotes:
            os.close(pidfd)
        for key in self.pidfds:
            key.close()


def look_like(arguments: list[str], env: dict[str, str]) -> None:
    """Have /proc tell of the process that stands for this one: who looks for what a test has left reads it there."""
    with open("/proc/self/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    where = [int(field) for field in fields[45:49]]  # arg_start, arg_end, env_start, env_end: proc(5)
    told = [b"".join(word.encode() + b"\0" for word in arguments)]
    told.append(b"".join(f"{name}={value}".encode() + b"\0" for name, value in env.items()))
    for (start, end), data in zip((where[:2], where[2:]), told, strict=True):
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, data[: end - start - 1], min(len(data), end - start - 1))


def become(asked: dict[str, Any], fds: list[int], before: dict[str, str]) -> None:
    """Be the zygote that is asked for, as far as anybody can see."""
    control, *standard = fds
    os.setsid()
    for number, fd in enumerate(standard):
        os.dup2(fd, number)
        os.close(fd)
    os.set_inheritable(control, True)
    os.chdir(asked["cwd"])
    by_imports = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ.clear()
    look_like([sys.executable, "-m", MODULE, str(control)], asked["env"])
    os.environ.update({**by_imports, **asked["env"]})
    sys.argv = ["-m", str(control)]
    sys.path[0] = asked["cwd"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if group := os.environ.get(GROUP):
        with contextlib.suppress(OSError), open(group, "w", encoding="ascii") as file:
            file.write(str(os.getpid()))


def main() -> None:
    """Import, and fork on request."""
    before = dict(os.environ)
    os.environ.pop("LLMCLOUD_TEST_PADDING")
    listener = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()
    sys.path[0] = "/"  # not this folder, of whose modules a zygote knows nothing
    from jupyter_llmcloud.training.zygote import preload, settle

    preload()
    settle()
    asked, fds = Mother(listener, int(os.environ[OWNER])).serve()
    become(asked, fds, before)
    del listener
    gc.collect()
    globals()["__name__"] = "mother"  # the frames of a cell are counted from those of __main__ that are the user's own
    zygote = sys.modules.pop(MODULE)  # else it was run as the program; __main__ is the shell's by now
    zygote.Zygote(socket.socket(fileno=fds[0])).serve()


if __name__ == "__main__":
    main()
