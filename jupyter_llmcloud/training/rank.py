"""A rank: the main thread is the shell, a side thread listens to the agent and is never blocked by a collective."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import random
import re
import socket
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from accelerate.state import AcceleratorState
from torch.optim.optimizer import register_optimizer_step_post_hook

import jupyter_llmcloud
from jupyter_llmcloud.core.detect.run_detectors import rolls_back
from jupyter_llmcloud.core.options import did_you_mean
from jupyter_llmcloud.errors import LLMCloudError, ProtocolError, UsageError
from jupyter_llmcloud.protocol.agent_messages import Execute, Names, NamesFound, Pull, Pulled, Push
from jupyter_llmcloud.protocol.frames import Decoder, Message, Unreadable, replace
from jupyter_llmcloud.protocol.rank_messages import (
    CellEnded,
    DumpRankStacks,
    Exit,
    ForkRank,
    ForkStore,
    Interrupt,
    Join,
    Joined,
    LeaseUntil,
    ListRankVariables,
    Preempted,
    RankVariables,
    Release,
    SaveAt,
    SaveLastState,
    StepQuery,
    StepReply,
    StopAt,
)
from jupyter_llmcloud.protocol.rpc import Done, Reply, Request, not_answered, refusal
from jupyter_llmcloud.system import patching
from jupyter_llmcloud.system.shared_ring import RingWriter
from jupyter_llmcloud.training import artifacts
from jupyter_llmcloud.training.control import ControlSocket
from jupyter_llmcloud.training.diagnostics.finite_gradients import FINITE
from jupyter_llmcloud.training.diagnostics.flight_recorder import as_sent
from jupyter_llmcloud.training.diagnostics.left_out_steps import LEFT_OUT
from jupyter_llmcloud.training.diagnostics.time_split import CHECKPOINT, TIMES
from jupyter_llmcloud.training.diagnostics.watchdog import Watchdog
from jupyter_llmcloud.training.group import process_group
from jupyter_llmcloud.training.group.own_groups import CELL_STORES
from jupyter_llmcloud.training.group.process_group import WorldGroup
from jupyter_llmcloud.training.group.random_streams import STREAMS
from jupyter_llmcloud.training.group.stop_barrier import Steps
from jupyter_llmcloud.training.integrations import (
    accelerator_plans,
    cut_tensors,
    launchers,
    lightning,
    metrics,
    rare_launchers,
    spawned_workers,
    trainer_plans,
    uneven_inputs,
)
from jupyter_llmcloud.training.output import notebook_tqdm, warning_capture
from jupyter_llmcloud.training.output.sender import OutputSender
from jupyter_llmcloud.training.parallel import plans
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.preflight.automatic import FORECAST
from jupyter_llmcloud.training.resume.checkpointer import Checkpointer
from jupyter_llmcloud.training.resume.hooks import Hooks
from jupyter_llmcloud.training.run import Run
from jupyter_llmcloud.training.search import trials
from jupyter_llmcloud.training.shell import failure_locals, failure_memory, namespace, no_stdin
from jupyter_llmcloud.training.shell.interrupts import Interrupts
from jupyter_llmcloud.training.shell.process_state import ProcessState
from jupyter_llmcloud.training.shell.program_end import PROGRAM_END, end_fork
from jupyter_llmcloud.training.shell.script import was_stopped
from jupyter_llmcloud.training.shell.shell import RankShell, start_shell
from jupyter_llmcloud.training.shell.tracebacks import came_from, text_of

_ECHO_OF_A_PEER = re.compile(
    r"connection (closed|reset|was closed)|gloo|nccl|broken pipe|socket|process group|ProcessGroup",
    re.IGNORECASE,
)
_OF_ONES_OWN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)  # though it speaks of a socket
_COLLECTIVES = re.compile(r"/torch/(distributed|autograd)/")


def begin(request: ForkRank | ForkStore, fds: list[int]) -> int:
    """The first thing a forked child does. Returns its exit status, if it returns."""
    os.setsid()
    os.dup2(fds[1], 1)
    os.dup2(fds[2], 2)
    for fd in fds[1:3]:
        os.close(fd)
    os.environ.update(request.env)
    if isinstance(request, ForkStore):  # which goes on ignoring SIGTERM, as the zygote does
        return hold_store(fds[0], request)
    return Rank(socket.socket(fileno=fds[0]), RingWriter(fds[3]), request).serve()


def hold_store(control: int, request: ForkStore) -> int:
    """Own the world's TCPStore on the agent's listening socket until the agent closes the control socket."""
    import torch.distributed as dist

    sock = socket.socket(fileno=control)
    _, (listener,), _, _ = socket.recv_fds(sock, 1, 1)
    options: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener}
    try:
        store = dist.TCPStore(request.host, request.port, **options)
    except NotImplementedError:  # of torch 2.6, whose newer store cannot be given a socket
        store = dist.TCPStore(request.host, request.port, use_libuv=False, **options)
    sock.sendall(b"+")
    sock.recv(1)
    del store
    return 0


class Rank:
    """One training process that keeps its variables between cells."""

    def __init__(self, sock: socket.socket, ring: RingWriter, request: ForkRank) -> None:
        faulthandler.enable()
        self.interrupts = Interrupts(self._is_cell, lambda: self.shell is not None and self.shell.is_drawing)
        self._control_socket = ControlSocket(sock, request.until)
        self.requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.sender = OutputSender(sock, ring)
        self.steps = Steps()
        self.group = WorldGroup(request.store, request.rank, request.world_size, request.backend, _device(request))
        self.watchdog = Watchdog(self.sender, lambda: self.steps.count, self._cell_number)
        self.checkpoints = Checkpointer(self.sender, self.steps, lambda: self.group.store, self.group.rank)
        self.hooks = Hooks(self.checkpoints.cursor)
        self.run = Run(self.sender, self.group.rank, self.group.world_size, self.checkpoints)
        self.shell: RankShell | None = None
        self._process = ProcessState()
        self._prepare(request)

    def _prepare(self, request: ForkRank) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        random.seed()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        if (folder := request.cwd) and Path(folder).is_dir():
            os.chdir(folder)
            sys.path.insert(0, folder)
        process_group.adopt(lambda: self.group)
        self.watchdog.start()
        plans.install()
        STREAMS.install(lambda: self.steps.count)
        register_optimizer_step_post_hook(self.steps.boundary)
        LEFT_OUT.install(lambda: self.steps.count)
        FINITE.install(self.sender, lambda: self.steps.count)
        FORECAST.install(lambda text: self.sender.warning("stderr", text))
        TIMES.install(lambda: self.steps.count)
        self.checkpoints.install()
        metrics.attach(self.run)
        accelerator_plans.install()
        cut_tensors.install()
        trainer_plans.install()
        launchers.adopt(self.run)
        lightning.adopt(self.run)
        rare_launchers.adopt(self.run)
        spawned_workers.install(self.run)
        spawned_workers.keep_sockets_in(request.sockets)
        uneven_inputs.install()
        no_stdin.install()
        PROGRAM_END.install()
        notebook_tqdm.install()
        warning_capture.install(self.sender)
        self._process.install()

    # --- the two threads ---

    def serve(self) -> int:
        """Work off requests until told to leave."""
        threading.Thread(target=self._listen, name="llmcloud-control", daemon=True).start()
        while True:
            message = self.requests.get()
            try:
                self._handle(message)
            except KeyboardInterrupt:
                continue  # came a moment after the cell had ended

    def _listen(self) -> None:
        decoder = Decoder("the node agent")
        try:
            while data := self._control_socket.receive():
                for message in decoder.feed(data):
                    self._control(message)
        except ProtocolError as error:  # an agent of another version, for instance: nobody can be answered
            os.write(2, f"this rank ends: {error}\n".encode())
        os._exit(0)  # the agent has gone or has closed this rank

    def _cell_number(self, filename: str) -> int | None:
        return self.shell.compile.cell_number(filename) if self.shell is not None else None

    def _is_cell(self, filename: str) -> bool:
        return self._cell_number(filename) is not None

    def _control(self, message: Message) -> None:
        match message:
            case DumpRankStacks():
                self._answer(message, lambda _: self.watchdog.stacks())
            case ListRankVariables():
                self._answer(message, self._variables)
            case Interrupt():
                self.run.should_stop = True
                self.interrupts.press()
            case Release():
                self.checkpoints.note_release()
                self.group.release(message.generation)
            case StepQuery():
                self.run.should_stop |= message.stops
                self.sender.send(StepReply(step=self.steps.ask()))
            case StopAt():
                self.steps.stop_at(message.step)
            case Preempted():
                self._control_socket.outlive_sigterm()
            case SaveAt():
                self.checkpoints.save_at(message.step)
                self.steps.stop_at(-1)
            case SaveLastState():
                self.checkpoints.tell_who_is_left(message.left)
            case LeaseUntil():
                self._control_socket.renew(message.until)
            case Exit():
                with contextlib.suppress(OSError):
                    self.sender.flush()
                os._exit(0)
            case _:
                self.requests.put(message)

    # --- requests of the main thread ---

    def _handle(self, message: Message) -> None:
        match message:
            case Join():
                self._join(message)
            case Execute():
                self._execute(message)
            case Push():
                self._answer(message, self._push)
            case Pull():
                self._answer(message, self._pull)
            case Names():
                self._answer(message, self._names)
            case Unreadable() | Request():
                self._reply(message, refusal(not_answered(f"rank {self.group.rank}", message)))

    def _join(self, wanted: Join) -> None:
        try:
            self._process.set_environment(wanted.env)
            rank = wanted.rank if wanted.rank >= 0 else self.group.rank
            if (rank, wanted.world_size) != (self.group.rank, self.group.world_size):
                self._resize(rank, wanted.world_size)
            if wanted.store and wanted.store != self.group.address:
                self.group.move(wanted.store, wanted.interface)
            self.group.join(wanted.generation)
            if wanted.generation:
                self.group.renew_former()
                plans.rebuild(torch.distributed.group.WORLD)
            self._start_shell()
        except Exception as error:
            with contextlib.suppress(Exception):  # released while it waited: the next time it needs the store again
                self.group.move(self.group.address)
            self.sender.send(Joined(generation=wanted.generation, error=f"{type(error).__name__}: {error}"))
        else:
            self.sender.send(Joined(generation=wanted.generation))

    def _resize(self, rank: int, world_size: int) -> None:
        self.group.rank = self.run.rank = rank
        self.checkpoints.renumber(rank)
        self.group.world_size = self.run.world_size = world_size
        self._start_shell().give(rank=rank, world_size=world_size)
        AcceleratorState._reset_state(reset_partial_state=True)  # the next Accelerator() sees the new size

    def _start_shell(self) -> RankShell:
        if self.shell is None:
            local_rank = int(os.environ["LOCAL_RANK"])
            jupyter_llmcloud.run = self.run  # `lc.run` and `from jupyter_llmcloud import run` are this one here
            self.shell = start_shell(
                self.sender,
                {
                    "rank": self.group.rank,
                    "local_rank": local_rank,
                    "world_size": self.group.world_size,
                    "device": self.group.device,
                    "run": self.run,
                },
            )
            self.shell.is_echo = self._is_echo
        return self.shell

    def _answer(self, request: Any, handler: Callable[[Any], Reply]) -> None:
        try:
            reply = handler(request)
        except Exception as error:  # of what a user has made: it cannot be loaded, or pickled
            what = str(error) if isinstance(error, LLMCloudError) else f"{type(error).__name__}: {error}"
            reply = refusal(UsageError(f"rank {self.group.rank}: {what}"))
        self._reply(request, reply)

    def _reply(self, request: Any, reply: Reply) -> None:
        if request.number:
            self.sender.send(replace(reply, reply_to=request.number))

    def _push(self, message: Push) -> Done:
        self._start_shell().user_ns.update(cloudpickle.loads(message.payload))
        return Done()

    def _pull(self, message: Pull) -> Pulled:
        known = self._start_shell().user_ns
        if missing := [name for name in message.names if name not in known]:
            own = [name for name in known if not name.startswith("_")]
            raise UsageError(f"there is no variable {missing[0]!r}.{did_you_mean(missing[0], own)}")
        return Pulled(payload=self._pickled(message.names))

    def _names(self, message: Names) -> NamesFound:
        shell = self._start_shell()
        values = shell.user_ns
        missing = [name for name in message.names if name not in values]
        own = [name for name in values if name not in shell.initial_names and not name.startswith("_")]
        imported = [name for name in own if _is_imported(values[name])]
        return NamesFound(missing=missing, own=own, imported=imported)

    def _variables(self, _: ListRankVariables) -> RankVariables:
        # In the thread that listens: the main one may compute for hours.
        shell = self.shell
        return RankVariables(variables=namespace.rows(shell.user_ns, shell.initial_names) if shell is not None else [])

    def _pickled(self, names: list[str], what: str = "%pull") -> bytes:
        variables = self._start_shell().user_ns
        values = {}
        for name in names:
            if name not in variables:
                raise NameError(f"there is no variable {name!r} on rank {self.group.rank}")
            values[name] = variables[name]
        return artifacts.pickled(values, what)

    # --- a cell ---

    def _execute(self, cell: Execute) -> None:
        self.sender.begin_cell()
        self.steps.begin()
        self.run.begin(cell.run_id, cell.name, cell.folder, len(cell.ranks))
        ended: dict[str, Any] = {}
        error: BaseException | None = None
        shell = self._start_shell()
        self.interrupts.catch()
        try:
            self.interrupts.begin()
            TIMES.begin(cell.attempt, len(cell.ranks))
            self.watchdog.begin(cell.run_id, cell.hang_after_s)
            self._set_up(cell, shell)
            self.checkpoints.begin(cell, shell.user_ns, shell.initial_names)
            if self.checkpoints.follows:
                self.hooks.begin(shell.compile.code)
            for notice in [] if self.checkpoints.replaying else patching.take_notices():
                self.sender.warning("stderr", notice + "\n")
            error = trials.unless_pruned(self._run_cell(cell, shell), cell, shell.user_ns)
            self.checkpoints.end(error, error is not None and self._is_echo(error))
            self.hooks.end()  # what is pulled and saved is as it was written
            FORECAST.close()
            if error is None:
                notebook_tqdm.draw_open_bars()
                ACTIVE.end()
                ended = self._collect(cell, shell)
            self.interrupts.end()
        except BaseException as raised:
            self.interrupts.end()
            error = raised
        self.hooks.end()
        FORECAST.close()
        ACTIVE.close()
        self.watchdog.end()
        self.sender.send(
            CellEnded(
                run_id=cell.run_id,
                error=self._describe(error, shell) if error is not None else None,
                interrupted=was_stopped(error),
                in_group=self.group.is_usable,
                groups=as_sent(self.watchdog.collectives.state()),
                times=TIMES.take(),
                reply_to=cell.number,
                **ended,
            )
        )
        self.sender.end_cell()
        self.checkpoints.close()  # what nobody waits for comes last
        if was_stopped(error):
            self._process.interrupt_children()
        self._process.end(shell.user_ns)
        if cell.trial:
            trials.forget(shell.user_ns, shell.initial_names)
        if error is not None:
            failure_memory.let_go(error)
            error = None  # this frame is one that the error leads to
        else:
            failure_memory.forget()

    def _run_cell(self, cell: Execute, shell: RankShell) -> BaseException | None:
        """Its error. A process that the cell has forked, and that comes to the end of the cell, ends there."""
        error: BaseException | None = None
        try:
            error = shell.run(cell)
        except BaseException as raised:
            if not self.sender.forked:
                raise
            error = raised
        if self.sender.forked:  # the rank's sockets are its parent's: it must neither tell an end nor take a cell
            end_fork(error, shell.last_traceback)
        return error

    def _set_up(self, cell: Execute, shell: RankShell) -> None:
        shell.last_traceback = []
        notebook_tqdm.forget_open_bars()
        self._process.begin(cell, shell.user_ns, shell.initial_names)
        if cell.payload:
            shell.user_ns.update(cloudpickle.loads(cell.payload))
        if cell.trial:
            shell.user_ns[trials.NAME] = trials.Trial(cell.trial, self.run, lambda: self.group.store)
        if os.environ.get("ACCELERATE_MIXED_PRECISION") != (precision := cell.precision or "no"):
            os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        CELL_STORES.begin(cell.run_id, self.group.generation)
        ACTIVE.begin(cell, self.group.rank, self.group.world_size, self.group.device)
        STREAMS.begin(cell.seed, *ACTIVE.data_rank)
        LEFT_OUT.begin(cell)
        FINITE.begin(cell, self.group.world_size)
        FORECAST.begin(cell, self.group.world_size, self.group.device)
        self.run.num_steps = (lambda: self.steps.count) if rolls_back(cell.spec.get("watch")) else (lambda: None)

    def _collect(self, cell: Execute, shell: RankShell) -> dict[str, Any]:
        if not cell.save and not cell.pull:
            return {}
        ranks = ACTIVE.savers(cell.ranks or [0])
        first = self.group.rank == ranks[0]
        if self.group.rank not in ranks:
            return {}
        with TIMES.within(CHECKPOINT):
            saved = artifacts.save(cell.save, shell.user_ns, Path(cell.folder) / "model", ranks, self.group.rank)
        return {"artifacts": saved, "payload": self._pickled(cell.pull, "--pull") if cell.pull and first else b""}

    def _describe(self, error: BaseException, shell: RankShell) -> dict[str, Any]:
        ename, evalue = type(error).__name__, text_of(error)
        drawing = shell.last_traceback or [f"{ename}: {evalue}"]
        place, variables = failure_locals.of_failure(error, self._cell_number, shell.initial_names)
        return {
            "place": place,
            "locals": variables,
            "ename": ename,
            "evalue": evalue,
            "traceback": drawing,
            "collateral": self._is_echo(error),
            "step": self.steps.count,
            "replaying": self.checkpoints.replaying,
        }

    def _is_echo(self, error: BaseException) -> bool:
        """Whether it came of a peer that has gone, or from a group that was broken for that."""
        if type(error) is not RuntimeError and not isinstance(error, torch.distributed.DistError):
            return False
        text = text_of(error)
        said = bool(_ECHO_OF_A_PEER.search(text)) and not _OF_ONES_OWN.search(text)
        return said or (self.group.broken and came_from(error, _COLLECTIVES))


def _is_imported(value: Any) -> bool:
    """Whether another process can have it by importing it."""
    if isinstance(value, types.ModuleType):
        return True
    module = sys.modules.get(str(getattr(value, "__module__", "")))
    name = getattr(value, "__qualname__", "")
    return module is not None and module.__name__ != "__main__" and getattr(module, name, None) is value


def _device(request: ForkRank) -> torch.device:
    if not request.gpu:
        return torch.device("cpu")
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
