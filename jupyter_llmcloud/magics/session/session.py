"""What a kernel knows: its server, its world, and how a cell becomes a run. The magics and the Python API share it."""

from __future__ import annotations

import ast
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud import config
from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.client.accelerate_file import with_content
from jupyter_llmcloud.client.stop_signal import said_when_stopped
from jupyter_llmcloud.core.export.literals import literal
from jupyter_llmcloud.core.names import format_ranks, run_id
from jupyter_llmcloud.core.spec import Interface, RunSpec
from jupyter_llmcloud.errors import Busy, CapacityError, ConnectionLost, LLMCloudError, NotFound, RankError, UsageError
from jupyter_llmcloud.magics.recorded.preflight import preflight
from jupyter_llmcloud.magics.recorded.take_away import export
from jupyter_llmcloud.magics.session import cell as cells
from jupyter_llmcloud.magics.session import environment_check
from jupyter_llmcloud.magics.session.cell import Cell
from jupyter_llmcloud.magics.session.kernel_end import kernel_end
from jupyter_llmcloud.magics.session.leader_lookup import LeaderLookup
from jupyter_llmcloud.magics.session.run_start import FINDING, STARTING, RunStart
from jupyter_llmcloud.magics.session.saved_worlds import forget, recall, remember
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.protocol.run_request import execute
from jupyter_llmcloud.storage.recorded import export as recorded_export
from jupyter_llmcloud.storage.resume import Resumption, resume
from jupyter_llmcloud.storage.runs import RunFolder, RunStore, nonce

if TYPE_CHECKING:
    from jupyter_llmcloud.client.rest import ServerClient
    from jupyter_llmcloud.magics.session.run_handle import RunHandle
    from jupyter_llmcloud.magics.session.world_client import RunResult, WorldClient

FRESH_S = 5.0  # a world that was heard so recently is not asked whether it lives
GRACE_S = 10.0  # ranks of a notebook that was shut down stay so long, for one that is opened again at once
_PROCESS = "pid:"  # what the owner begins with where no server tells the name of the notebook
WAIT_S = 0.25  # how often a world that waits for slots asks again


class Session:
    """One per kernel.

    Attributes:
        cluster: the cluster that the next world starts on; None means the newest, or a new local one.
        world: the world of this notebook, if one was started.
    """

    def __init__(self) -> None:
        self.cluster: str | None = None
        self.world: WorldClient | None = None
        self._server: ServerClient | None = None
        self._settling = threading.RLock()  # threads of the notebook that need a world get the same one

    @property
    def owner(self) -> str:
        """Who owns what this kernel starts: the notebook, where the server tells its name."""
        return os.environ.get("JPY_SESSION_NAME") or f"{_PROCESS}{os.getpid()}"

    @property
    def server(self) -> ServerClient:
        """The Jupyter server, found or started at the first use."""
        return self._find_server()

    @property
    def known_server(self) -> ServerClient | None:
        """The server, where it need not be started for that."""
        if self._server is None and os.environ.get(config.ENV_SERVER_URL):
            return self._find_server()
        return self._server or discovery.parent_server()

    def _find_server(self, for_world: bool = False) -> ServerClient:
        if self._server is not None and discovery.has_ended(self._server):
            self._server.close()
            self._server = None
        if self._server is None:
            environment_check.check()
            self._server = discovery.find_or_start(for_world)
        return self._server

    # --- worlds ---

    def start_world(
        self,
        num_ranks: int | None = None,
        cluster: str | None = None,
        ticket: str = "",
        on_phase: Callable[[str], None] = lambda _: None,
        priority: int = 0,
    ) -> WorldClient:
        """Start a world; there must be none.

        A `ticket` keeps the turn that was had with it. `on_phase` is told what is being done.
        """
        if self.world is not None:
            raise UsageError(
                f"this notebook has a world of {self.world.world_size} ranks already: %world restart or %world stop."
            )
        with said_when_stopped("stopped while the ranks were being started. Nothing was run, nothing is held."):
            self.world = self._start_when_there_is_capacity(
                num_ranks, cluster or self.cluster, ticket or nonce(), on_phase, priority
            )
            remember(self.owner, self.world)
        return self.world

    def _start_when_there_is_capacity(
        self,
        num_ranks: int | None,
        cluster: str | None,
        ticket: str,
        on_phase: Callable[[str], None],
        priority: int,
    ) -> WorldClient:
        from jupyter_llmcloud.magics.session.world_client import WorldClient

        on_phase(FINDING)
        server = self._find_server(for_world=cluster is None)
        said = ""
        while True:
            try:
                placement = server.place(cluster, num_ranks, ticket, priority=priority)
                if placement["started"]:
                    print(f"Started the cluster {placement['cluster']!r} on this machine.", flush=True)
                on_phase(STARTING)
                return WorldClient.start(placement, self.owner, LeaderLookup(lambda: self.server))
            except Busy as busy:
                # All or nothing: nothing but a place in the server's line is held while we wait, so two worlds cannot
                # wait for each other.
                if str(busy) != said:
                    print(f"Waiting for free slots. {busy}", flush=True)
                    said = str(busy)
                time.sleep(WAIT_S)

    def restart_world(self, num_ranks: int | None = None, cluster: str | None = None, priority: int = 0) -> WorldClient:
        """End the ranks and start others, as many as before when `num_ranks` is None.

        Raises Busy or CapacityError, and has ended nothing, when those cannot be had.
        """
        world = self.attach_world()
        if world is None:
            raise NotFound("this notebook has no world to restart: %world start.")
        size, where, ticket = num_ranks or world.world_size, cluster or world.cluster, nonce()
        try:
            self.server.place(where, size, ticket, replaces=world.world_id, priority=priority)
        except CapacityError as error:
            kept = f"{world.world_size} ranks were counted as free; they stay, with their variables"
            raise type(error)(f"{error} This notebook's {kept}: nothing was ended.") from None
        self.stop_world()
        return self.start_world(size, where, ticket, priority=priority)

    def attach_world(self) -> WorldClient | None:
        """The world that this notebook has, also from before its kernel was restarted."""
        if self.world is None:
            environment_check.check()
        if self.world is None and (known := recall(self.owner, LeaderLookup(lambda: self.server))) is not None:
            self.world = known
            run_id = known.describe().run_id
            goes_on = f" The run {run_id} goes on there: %runs attach {run_id} shows all of it." if run_id else ""
            print(
                f"This notebook's world of {known.world_size} ranks was still there, with its variables "
                f"(%world restart starts afresh).{goes_on}"
            )
        return self.world

    def stop_world(self) -> None:
        """End this notebook's world; its variables are gone."""
        world = self.attach_world()
        if world is None:
            raise NotFound("this notebook has no world.")
        self.lose_world()
        world.stop()

    def lose_world(self) -> None:
        """Somebody ends this notebook's world."""
        self.world = None
        forget(self.owner)

    def kernel_ends(self, restart: bool) -> None:
        """The kernel was asked to end: its ranks are given back unless another kernel can find them again.

        A kernel that is killed says nothing: its ranks are kept for their lease.
        """
        is_found_again = not self.owner.startswith(_PROCESS)
        if self.world is None or (restart and is_found_again):
            return
        with contextlib.suppress(LLMCloudError):  # its agent has gone: so have the ranks
            self.world.release(GRACE_S if is_found_again else 0.0)

    def ensure_world(
        self, num_ranks: int | None, on_phase: Callable[[str], None] = lambda _: None, priority: int = 0
    ) -> WorldClient:
        """The living world, or a new one. Raises UsageError when it has another size than asked for."""
        with self._settling:
            return self._settle(num_ranks, on_phase, priority)

    def _settle(self, num_ranks: int | None, on_phase: Callable[[str], None], priority: int) -> WorldClient:
        self.attach_world()
        if self.world is not None and not self._is_alive(self.world):
            print("The world of this notebook has ended (its lease ran out or it was stopped): starting a new one.")
            self.world = None
        if self.world is None:
            return self.start_world(num_ranks, on_phase=on_phase, priority=priority)
        if num_ranks is not None and num_ranks != self.world.world_size:
            raise UsageError(
                f"-n {num_ranks}: the world of this notebook has {self.world.world_size} ranks, "
                f"which hold your variables. Leave -n out, or start afresh with %world restart -n {num_ranks}."
            )
        return self.world

    def _is_alive(self, world: WorldClient) -> bool:
        if time.monotonic() - world.heard_at < FRESH_S:
            return True
        try:
            world.describe()
        except (NotFound, ConnectionLost):
            if not self._is_found_again(world):
                return False
            remember(self.owner, world)
        return True

    @staticmethod
    def _is_found_again(world: WorldClient) -> bool:
        try:
            return world.find_again()
        except (NotFound, ConnectionLost):
            return False

    # --- cells ---

    def distribute(self, shell: Any, cell: Cell, given: Mapping[str, Any]) -> RunResult | RunHandle | None:
        """Run a cell on the ranks; `given` are options of RunSpec. What can be refused is refused before any start.

        None with --dry-run and --rehearse, which train nothing.
        """
        from jupyter_llmcloud.magics.session.run_handle import RunHandle

        asked, runs = time.time(), RunStore()
        given, notes = with_content(given, self.world.world_size if self.world is not None else 0)
        spec = RunSpec.make(given, Interface.NOTEBOOK)
        for note in notes:
            print(note, file=sys.stderr)
        if spec.dry_run or spec.rehearse:
            cells.check_syntax(shell, cell)
            preflight(self, cell, spec, pushed_values(shell.user_ns, spec.push or ()))
            return None
        with said_when_stopped("stopped before the ranks had the cell: nothing was run."):
            values = pushed_values(shell.user_ns, spec.push or ())
            pushed = {name: literal(shell.user_ns[name]) for name in spec.push or ()}
            tree = cells.check_syntax(shell, cell)
            if spec.background and spec.pull:
                raise UsageError(
                    "--pull waits for the end of the run, -b does not. Leave one out; %pull brings variables later."
                )
            spec, resumption = resuming(runs, spec, given)
            if spec.export:
                recorded_export.check(cell.code, spec, resumption is not None)
            name = spec.name or f"cell-{cell.number}"
            folder = runs.folder(run_id(name, asked, nonce()))
            start = RunStart(folder, name, cell.source, spec, self.owner, asked)
        try:
            with said_when_stopped("stopped before the ranks had the cell: nothing was run."):
                world = self.ensure_world(spec.nproc, start.phase, spec.priority)
                chosen = self._check_ranks(spec.ranks, world)
                self._check_names(world, tree, {"--save": spec.save or (), "--pull": spec.pull or ()}, spec.push or ())
                self._warn_of_guards(world, tree, chosen)
                message = self._message(
                    world, folder, cell, spec, name, values, pushed, chosen, tree, resumption, asked
                )
        except BaseException:
            start.take_back()
            raise
        try:
            result = self._submit(world, message) if spec.background else self._execute(world, message, chosen, start)
        except LLMCloudError as error:  # refused, failed, or its agent is gone
            start.take_back()
            if isinstance(error, RankError):
                error.report += cells.name_of_notebook(error.ename, error.evalue, shell.user_ns)
            raise
        if not isinstance(result, RunHandle):
            start.check_kept()
            shell.user_ns.update(result.pulled)
            if spec.export:
                export(folder.run_id, spec.export)
        return result

    def _execute(self, world: WorldClient, message: Execute, ranks: Sequence[int], start: RunStart) -> RunResult:
        address = world.address
        try:
            return world.execute(message, ranks, start.live)
        finally:
            if world.address != address:
                remember(self.owner, world)  # the run has taken it along to another agent

    def _submit(self, world: WorldClient, message: Execute) -> RunHandle:
        from jupyter_llmcloud.magics.session.run_handle import RunHandle

        world.submit(message)
        return RunHandle(message.run_id, lambda: self.server)

    @staticmethod
    def _check_ranks(ranks: str | None, world: WorldClient) -> list[int]:
        from jupyter_llmcloud.core.names import parse_ranks

        return parse_ranks(ranks, world.world_size) if ranks is not None else list(range(world.world_size))

    @staticmethod
    def _check_names(world: WorldClient, tree: Any, options: dict[str, Sequence[str]], pushed: Sequence[str]) -> None:
        wanted = {name: option for option, names in options.items() for name in names}
        bound = cells.bound_names(tree) if wanted else None
        if bound is None:
            return
        unbound = [name for name in wanted if name not in bound and name not in pushed]
        for name in world.missing(unbound) if unbound else []:
            raise UsageError(
                f"{wanted[name]} {name}: the cell does not make a variable {name!r}, "
                "and the ranks have none. Nothing was run."
            )

    @staticmethod
    def _warn_of_guards(world: WorldClient, tree: ast.Module | None, ranks: Sequence[int]) -> None:
        """Say when ranks go different ways through `if "model" not in globals()`: they may wait for each other."""
        names = sorted(cells.guarded_names(tree)) if tree is not None else []
        if not names or len(ranks) < 2 or world.beside().run_id:
            return
        missing = {rank: world.missing(names, rank) for rank in ranks}
        for name in names:
            lacking = [rank for rank in ranks if name in missing[rank]]
            if 0 < len(lacking) < len(ranks):
                having = format_ranks([rank for rank in ranks if rank not in lacking])
                print(
                    f"Only ranks {having} have {name!r}, for which this cell asks: ranks {format_ranks(lacking)} take "
                    f"another way. Where that is not meant, run the cell that makes it again, or del {name} first.",
                    flush=True,
                )

    def _message(
        self,
        world: WorldClient,
        folder: RunFolder,
        cell: Cell,
        spec: RunSpec,
        name: str,
        values: bytes,
        pushed: dict[str, str],
        ranks: list[int],
        tree: ast.Module | None,
        resumption: Resumption | None,
        asked: float,
    ) -> Execute:
        bound = cells.bound_names(tree) if tree is not None else None
        return execute(
            spec,
            world_id=world.world_id,
            run_id=folder.run_id,
            name=name,
            code=cell.code,
            source=cell.source,
            filename=cell.filename,
            execution_count=cell.number,
            line_offset=cell.line_offset,
            ranks=ranks,
            folder=str(folder.path),
            agent=world.address,
            cluster=world.cluster,
            owner=self.owner,
            is_definition=tree is not None and not spec.no_replay and cells.is_definition(tree),
            definitions="" if spec.no_replay else cells.definitions_of(cell.code),
            makes=None if bound is None else sorted(bound),
            asked=asked,
            pushed=pushed,
            payload=values,
            **(resumption.request if resumption is not None else {}),
        )


def resuming(store: RunStore, spec: RunSpec, given: Mapping[str, Any]) -> tuple[RunSpec, Resumption | None]:
    """With --resume: the options that the earlier run had and what it goes on from, which is said."""
    if not spec.resume:
        return spec, None
    resumption = resume(store, spec.resume, given)
    print(*resumption.notes, sep="\n", flush=True)
    return resumption.spec, resumption


def pushed_values(namespace: dict[str, Any], names: Sequence[str]) -> bytes:
    """The pickled variables that --push or %push name; raises UsageError for one that is not there."""
    from jupyter_llmcloud.magics.session.world_client import pickled

    missing = [name for name in names if name not in namespace]
    if missing:
        raise UsageError(f"--push {missing[0]}: there is no variable {missing[0]!r} in this notebook.")
    return pickled({name: namespace[name] for name in names}) if names else b""


_session: Session | None = None


def current() -> Session:
    """The session of this kernel."""
    global _session
    if _session is None:
        _session = Session()
        kernel_end.watch(_shell(), _session.kernel_ends)
    return _session


def _shell() -> Any:
    """The IPython that runs here, if one does."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
