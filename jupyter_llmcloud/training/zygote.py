"""The zygote: imports what every rank needs once, then does nothing but fork.

    python -m jupyter_llmcloud.training.zygote FD

FD is one end of a SOCK_SEQPACKET socket pair to the agent. Each packet is one message: ForkRank and ForkStore come with
file descriptors attached (SCM_RIGHTS) and are answered by Forked; ZygoteReady and ForkEnded tell of what has happened.

With LLMCLOUD_NEXT_AGENT=SECONDS:PATH in its environment it waits there for so long for the agent that takes a killed
one's place, which has no need to import anything then: what the killed one had started has ended before.

Nothing here may run an OpenMP region, open a process group, touch CUDA or batch-encode text: a child of a process that
did hangs (gloo and libgomp do not survive a fork). Imports alone are safe.

What a rank has started ends with it: each child leads a process group of its own, and since this process is never
blocked it is the one that ends such a group, when the child has ended by whatever cause or when the agent has gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import linecache
import os
import re
import selectors
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from jupyter_llmcloud.protocol.connection import NEXT_AGENT
from jupyter_llmcloud.protocol.frames import Message, decode, encode, replace
from jupyter_llmcloud.protocol.rank_messages import (
    Forked,
    ForkEnded,
    ForkProgram,
    ForkRank,
    ForkStore,
    ZygoteReady,
)
from jupyter_llmcloud.protocol.rpc import Reply, not_answered, refusal
from jupyter_llmcloud.system import unix_sockets
from jupyter_llmcloud.system.processes import give_back_memory

_WHO = "the process that forks ranks"
PR_SET_PDEATHSIG = 1
MADV_DONTNEED = 4
IMPORT_THRESHOLD = 100_000  # objects that imports make between two looks for those that are of no use any more
# Parts of this package whose functions are called in place of a library's.
_BETWEEN = (
    *("integrations", "group", "parallel", "resume", "output.notebook_tqdm"),
    *("diagnostics.grad_mode", "diagnostics.time_split"),
)
# In /proc/<pid>/smaps: a mapping of a file that is only read or executed, with what follows; what of it is our own.
_MAPPING = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) r-[-x]p \S+ \S+ [1-9]\d* +/.*\n(?P<fields>(?:[A-Z].*\n)+)", re.MULTILINE
)
_OWN = re.compile(r"^(?:Anonymous|Swap): +(\d+) kB$", re.MULTILINE)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends (Linux); `parent` closes the race."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


def outlive_parent() -> None:
    """Take `die_with_parent` back: from now on the end of the control socket tells of it, and there is work to do."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)


def end_group(pid: int) -> None:
    """Kill a child with its loaders' workers, its subprocesses and whatever else is in the group that it leads."""
    for send_signal in (os.killpg, os.kill):  # a child that was forked just now leads no group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send_signal(pid, signal.SIGKILL)


def preload() -> None:
    """Import what ranks use; model classes are what takes the time."""
    import pdb  # noqa: F401 - a rank replaces parts of it

    import accelerate.local_sgd  # noqa: F401 - likewise
    import torch  # noqa: F401
    from pygments.lexers import PythonLexer

    from jupyter_llmcloud.system.transparent_frames import make_transparent
    from jupyter_llmcloud.training import model_imports

    model_imports.import_models()
    from jupyter_llmcloud.training import forked_program, patches, rank  # noqa: F401
    from jupyter_llmcloud.training.shell.isolation import first_levels
    from jupyter_llmcloud.training.shell.shell import make_shell

    make_transparent(f"jupyter_llmcloud.training.{part}" for part in _BETWEEN)
    make_shell()
    first_levels()
    PythonLexer()  # the first one compiles its expressions: else it were each rank with its first error
    for patch in patches.CATALOGUE:
        patch.check_once()


def settle() -> None:
    """What was imported is shared from now on: do here once what each rank would do to it, and hold no more than that.

    Most of the code that imports run is never run again, and a fork leaves it behind: ranks map what they use of it.
    """
    if rules := sys.modules.get("torch._dynamo.trace_rules"):
        rules.clear_lru_cache()  # as init_process_group does: it counts references to thousands of functions
    linecache.clearcache()
    gc.collect()
    gc.freeze()
    gc.enable()  # which whoever had it imported may have turned off
    give_back_memory()
    forget_clean_pages()


def forget_clean_pages() -> None:
    """Take the pages of libraries that are as in their files out of this process (Linux); used again they come back."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(OSError, AttributeError):
        for start, end in list(_clean_mappings()):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def _clean_mappings() -> Iterator[tuple[int, int]]:
    """Private mappings of files that cannot be written to, and that hold nothing of this process's own."""
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        for mapping in _MAPPING.finditer(file.read()):
            is_clean = all(int(number) == 0 for number in _OWN.findall(mapping["fields"]))
            if is_clean and _OWN.search(mapping["fields"]):
                yield int(mapping["start"], 16), int(mapping["end"], 16)


class NextAgent:
    """Where the agent that takes a killed one's place finds this process."""

    def __init__(self, told: str) -> None:
        wait_s, _, path = told.partition(":")
        self._wait_s = float(wait_s or 0)
        self._listener = unix_sockets.bind(path, kind=socket.SOCK_SEQPACKET) if path else None
        if self._listener is not None:
            self._listener.listen(1)
            self._listener.settimeout(self._wait_s)

    def wait(self) -> socket.socket | None:
        """Its end of the connection; None when there is none in time."""
        with contextlib.suppress(OSError):
            return self._listener.accept()[0] if self._listener is not None else None
        return None

    def close(self) -> None:
        """In a fork: it is not to be found there."""
        if self._listener is not None:
            self._listener.close()


class Zygote:
    """Serves fork requests on a socket until it closes."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.next_agent = NextAgent(os.environ.pop(NEXT_AGENT, ""))
        self.children: dict[int, tuple[int, str]] = {}  # pidfd -> (pid, name of the request)
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ)

    def serve(self) -> None:
        """Answer until the agent has gone."""
        self.tell(ZygoteReady())
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.control:
                    self.fork_on_request()
                elif key.fd in self.children:  # they are gone when the agent is
                    self.reap(key.fd)

    def tell(self, message: Message) -> None:
        """Send a message; an agent that has gone is the end, or followed by another one."""
        try:
            self.control.send(encode(message))
        except OSError:
            self.end()

    def fork_on_request(self) -> None:
        """Take one request and answer it."""
        data, fds = self.receive()
        if not data:
            self.end()
            return
        request: Any = decode(data)
        reply: Reply
        try:
            reply = self.fork(request, fds)
        except Exception as error:  # no more processes, for instance: what was forked before goes on
            reply = refusal(error, _WHO, type(request).__name__)
        finally:
            for fd in fds:
                os.close(fd)
        self.tell(replace(reply, reply_to=request.number))

    def fork(self, request: Message, fds: list[int]) -> Forked:
        """Fork the process that is asked for. Raises what a fork raises."""
        if not isinstance(request, ForkRank | ForkStore | ForkProgram):
            raise not_answered(_WHO, request)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self.become_child(request, fds, parent)
        pidfd = os.pidfd_open(pid)
        self.children[pidfd] = (pid, request.name)
        self.selector.register(pidfd, selectors.EVENT_READ)
        return Forked(name=request.name, pid=pid)

    def receive(self) -> tuple[bytes, list[int]]:
        """A request with its file descriptors; empty when the agent has gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self.control, 1 << 20, 8)
        except OSError:
            return b"", []
        return data, fds

    def end(self) -> None:
        """The agent has gone, in whatever way: nothing that it has started stays. Returns with another agent."""
        for pid, _ in self.children.values():
            end_group(pid)
        self.forget_children()
        self.selector.unregister(self.control)
        self.control.close()
        if (control := self.next_agent.wait()) is None:
            os._exit(0)
        self.control = control
        self.selector.register(control, selectors.EVENT_READ)
        self.tell(ZygoteReady())

    def forget_children(self) -> None:
        """They have been killed: return when they have gone."""
        for pidfd, (pid, _) in self.children.items():
            os.waitpid(pid, 0)
            self.selector.unregister(pidfd)
            os.close(pidfd)
        self.children.clear()

    def become_child(self, request: ForkRank | ForkStore | ForkProgram, fds: list[int], parent: int) -> None:
        """Be that process until it ends; runs in the fork, and does not return."""
        status = 1
        try:
            die_with_parent(parent)
            self.selector.close()
            self.control.close()
            self.next_agent.close()
            for pidfd in self.children:
                os.close(pidfd)
            from jupyter_llmcloud.training import rank
            from jupyter_llmcloud.training.forked_program import run_program

            status = run_program(request, fds) if isinstance(request, ForkProgram) else rank.begin(request, fds)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def reap(self, pidfd: int) -> None:
        """A child has ended: end what it has started, and say so."""
        pid, name = self.children.pop(pidfd)
        self.selector.unregister(pidfd)
        os.close(pidfd)
        end_group(pid)  # before the pid can be used again
        _, status = os.waitpid(pid, 0)
        self.tell(ForkEnded(name=name, status=os.waitstatus_to_exitcode(status)))


def main() -> None:
    """Import, then fork on request."""
    die_with_parent(os.getppid())
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # likewise, as a notice
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all when a place is taken away: the agent says when to end
    # Imports make what stays: looking through it again and again takes a tenth of their time. What does not stay is
    # looked for now and then: left until the end, it would leave its memory in holes, three megabytes of them.
    thresholds = gc.get_threshold()
    gc.set_threshold(IMPORT_THRESHOLD)
    preload()
    gc.set_threshold(*thresholds)
    settle()
    outlive_parent()
    Zygote(control).serve()


if __name__ == "__main__":
    main()
