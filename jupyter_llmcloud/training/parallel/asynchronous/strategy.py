"""The plan `async-ps:K`: workers train apart and exchange with a parameter server when each is ready (2401.09135).

Every rank is a worker. The first `servers` ranks hold the parameters, cut between them, in threads of their own. After
its round a worker sends what it has moved by and goes on with what the servers hold then; it waits for nobody who is
less than `staleness` rounds behind, but at the end of a pass. A worker that is lost is not waited for, and what it
had not sent is lost; the others take over the rows of that, and those that it had still to train on.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from jupyter_llmcloud.core.parallel.left_rows import Place
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.diagnostics.time_split import BLOCKED, TIMES
from jupyter_llmcloud.training.group.process_group import own_address
from jupyter_llmcloud.training.parallel.asynchronous.client import ParameterClient
from jupyter_llmcloud.training.parallel.asynchronous.rows import SharedPasses, adopt
from jupyter_llmcloud.training.parallel.asynchronous.server import ParameterServer
from jupyter_llmcloud.training.parallel.asynchronous.shard import ParameterShard
from jupyter_llmcloud.training.parallel.asynchronous.wire import as_bytes, as_tensor, close_in_children
from jupyter_llmcloud.training.parallel.strategies.base import Copy, Models
from jupyter_llmcloud.training.parallel.strategies.local_sgd import LocalSGD, ModelReplica, differences, unpack

_children_are_told = False


def _tell_children() -> None:
    global _children_are_told
    if not _children_are_told:
        _children_are_told = True
        close_in_children()


class _Waiting:
    """Time that this worker spends waiting for others, which is none of its own speed."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def clock(self) -> float:
        """Seconds without those."""
        return time.monotonic() - self._seconds

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Within the block it waits."""
        began = time.monotonic()
        try:
            with TIMES.within(BLOCKED):
                yield
        finally:
            self._seconds += time.monotonic() - began


WAITING = _Waiting()


class ServedReplica(ModelReplica):
    """A worker's copy of a model.

    Attributes:
        number: of the model, the same on all ranks.
        pulled: its values when this worker has asked for them last, flat.
        round_steps: of the present round.
        begun: when it began, in seconds of the clock that stands still while this worker waits for others.
        session: of the cell that has prepared or trained it last.
    """

    session = ""

    def __init__(self, model: torch.nn.Module, number: int, round_steps: int) -> None:
        super().__init__(model)
        self.number = number
        self.round_steps = round_steps
        self.restart()

    def restart(self) -> None:
        """It holds what the servers hold."""
        self.pulled = self.flat()
        self.begun = WAITING.clock()
        self.num_left = 0

    def flat(self) -> torch.Tensor:
        """Its parameters, on the CPU."""
        parts = [parameter.detach().reshape(-1).to("cpu", torch.float32) for parameter in self.parameters]
        return torch.cat(parts) if parts else torch.empty(0)

    def adopt(self, values: torch.Tensor) -> None:
        """Go on with what the servers hold."""
        unpack(values, self.parameters)  # type: ignore[arg-type]
        self.restart()


class AsyncParameterServer(LocalSGD):
    """Rounds of this worker on every prepared model, and the part of them that this rank serves."""

    is_asynchronous = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._session = ""
        self._client: ParameterClient | None = None
        self._server: ParameterServer | None = None
        self._token = secrets.token_hex(16)
        self._passes = SharedPasses(self.rank, self._end_phase)
        _tell_children()

    # --- the cell ---

    def begin(self, cell_key: str) -> None:
        self._session = cell_key
        self._passes = SharedPasses(self.rank, self._end_phase)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def leave(self) -> None:
        self.close()
        if self._server is not None:
            self._server.close()

    def broken(self) -> None:
        self.close()

    @property
    def _served(self) -> list[ServedReplica]:
        return [one for one in self.replicas if isinstance(one, ServedReplica) and one.model is not None]

    @property
    def _in_cell(self) -> list[ServedReplica]:
        """Those that this cell has prepared or trained; others live on some ranks only, until they are collected."""
        served = self._served
        return [one for one in served if one.session == self._session] or served

    @property
    def _is_server(self) -> bool:
        return self.rank < self._num_servers

    @property
    def _num_servers(self) -> int:
        return min(int(self.plan.settings["servers"]), self.world_size)

    # --- models ---

    def make_replica(self, model: torch.nn.Module) -> ModelReplica:
        """All ranks call it: servers take their part, and every worker learns where they are."""
        own = max((one.number for one in self._served), default=-1) + 1
        if self._is_server and self._server is None:
            self._server = self._make_server()
        table: list[Any] = [None] * self.world_size
        dist.all_gather_object(table, (own, self._server.address if self._server else None, self._token))
        number = max(row[0] for row in table)  # a rank that has replaced another counts anew
        replica = ServedReplica(model, number, self.plan.sizes[0])
        replica.session = self._session
        self._serve(replica)
        self._connect([row[1] for row in table if row[1]], [row[2] for row in table if row[1]])
        return replica

    def _make_server(self) -> ParameterServer:
        settings = self.plan.sizes[0], int(self.plan.settings["staleness"])
        return ParameterServer(own_address(), self._token, self.world_size, *settings)

    def _serve(self, replica: ServedReplica) -> None:
        if self._server is not None:
            self._server.keep({one.number for one in self._served})
            settings = float(self.plan.settings["outer-lr"]), float(self.plan.settings["momentum"])
            self._server.add(replica.number, ParameterShard(self._own_part(replica.pulled), *settings))

    def _own_part(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.tensor_split(self._num_servers)[self.rank]

    def _connect(self, servers: list[tuple[str, int]], tokens: list[str]) -> None:
        """Servers have the model once all ranks have come here."""
        dist.barrier()
        if self._client is None or self._client.servers != servers or not self._client.is_open:
            self.close()
            self._client = ParameterClient(servers, tokens, self.rank)
            self._client.open(self._session)
        dist.barrier()

    @property
    def _is_open(self) -> bool:
        return self._client is not None and self._client.is_open

    @property
    def _servers(self) -> ParameterClient:
        assert self._client is not None, "a model was prepared"
        return self._client

    # --- rounds ---

    def stepped(self, replica: ModelReplica) -> None:
        assert isinstance(replica, ServedReplica)
        replica.session = self._session
        self._open()
        if replica.num_left >= replica.round_steps:
            with TIMES.within(BLOCKED):
                self.exchange(replica)

    def _open(self) -> None:
        """Where a model was prepared in an earlier cell, nobody has connected yet in this one."""
        if not self._is_open:
            self._servers.open(self._session)
            for other in self._served:
                other.begun = WAITING.clock()

    def exchange(self, replica: ModelReplica) -> None:
        """A round is finished: send what has moved, and go on with what the servers hold."""
        assert isinstance(replica, ServedReplica)
        seconds, num_steps = WAITING.clock() - replica.begun, replica.num_left
        self._push(replica)
        replica.round_steps = self._servers.finish_round(replica.number, num_steps, seconds)
        replica.adopt(self._servers.pull(replica.number))

    def _push(self, replica: ServedReplica) -> None:
        now = replica.flat()
        self._servers.push(replica.number, replica.pulled - now, self._passes.places)
        replica.pulled, replica.num_left = now, 0  # a Stop may come before anything is pulled

    # --- the rows ---

    def shared_pass(self, loader: Any, own: Iterator[Any]) -> Iterator[Any]:
        """A pass over a loader: the share of this worker, and while models train what lost workers have left, too."""
        if not any(replica.model is not None and replica.model.training for replica in self._in_cell):
            return own
        if self.world_size == 1 or (sampler := adopt(loader)) is None:
            return own
        self._open()
        return self._passes.begin(loader, sampler, own)

    def _end_phase(self, key: str, phase: int) -> tuple[list[int], dict[int, Place]]:
        """Everything is sent before the others are waited for; all begin what comes next with the same values."""
        served = [replica for replica in self._in_cell if replica.model is not None and replica.model.training]
        for replica in served:
            if replica.num_left:
                self._push(replica)
        with WAITING.block():
            answer = self._servers.end_phase(key, phase)
        for replica in served:
            replica.adopt(self._servers.pull(replica.number))
        with WAITING.block():
            self._servers.meet()  # until here nobody has sent anything new
        return answer

    def end(self) -> None:
        if not self._is_open:
            return
        served = [replica for replica in self._served if self._servers.knows(replica.number)]
        for replica in served:
            if replica.num_left:
                self._push(replica)
        buffers = [buffer for replica in served for buffer in replica.buffers()]
        own = torch.cat([buffer.reshape(-1).to("cpu", torch.float64) for buffer in [*buffers, torch.empty(0)]])
        with WAITING.block():
            every = self._servers.meet(bytes(as_bytes(own)), is_last=True)
        for replica in served:
            replica.adopt(self._servers.pull(replica.number))
        if buffers:
            first, *others = (as_tensor(bytearray(part), torch.float64) for part in every.values())
            moved = torch.stack([torch.zeros_like(first), *(differences(other, first) for other in others)]).mean(0)
            unpack(first + moved, buffers)
        if self.rank == 0 and served:
            self._say(self._servers.about(served[-1].number))

    def _say(self, about: dict[str, Any]) -> None:
        rounds = ", ".join(f"{number} (lost)" if at in about["lost"] else str(number)
                           for at, number in enumerate(about["rounds"]))  # fmt: skip
        print(
            f"--plan {self.plan.text}: rounds of ranks 0 to {self.world_size - 1}: {rounds}; at most "
            f"{about['oldest']} other updates had arrived when one did.",
            file=sys.stderr,
        )

    # --- what the body of a cell gathers ---

    def gathered(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The value of every worker that trains, in the order of ranks; it waits for them."""
        if not self._is_open:
            parts: list[Any] = [None] * self.world_size
            dist.all_gather_object(parts, value.detach().cpu())
            return [part.to(value.device) for part in parts]
        with WAITING.block():
            every = self._servers.meet(pickle.dumps((value.dtype, tuple(value.shape), bytes(as_bytes(value.cpu())))))
        return [_unpickled(part).to(value.device) for part in every.values()]

    def wait_for_everyone(self) -> None:
        """A barrier of the workers that train."""
        if self._is_open:
            with WAITING.block():
                self._servers.meet()
        else:
            dist.barrier()

    # --- checkpoints ---

    def state(self, copy: Copy, models: Models) -> Any:
        """A checkpoint is where all workers meet and exchange: each of them saves the one model that the servers hold.

        So another plan, and whoever serves the checkpoint, has what all have learned.
        """
        if not self._is_open:
            return None
        served = self._served
        for replica in served:
            if replica.num_left:
                self._push(replica)
        self._servers.meet()
        for replica in served:
            replica.adopt(self._servers.pull(replica.number))
        found = {}
        for address, own in self.addressed(models):
            assert isinstance(own, ServedReplica)
            found[address] = [own.num_steps, own.round_steps, self._state_of(own)]
        self._servers.meet()  # until here nobody has sent anything new
        return found

    def _state_of(self, replica: ServedReplica) -> Any:
        shard = self._server.shard(replica.number) if self._server is not None else None
        return shard.state() if shard is not None else None

    def put(self, state: Any, models: Models) -> None:
        if not self._served:
            return
        try:
            self._open()  # servers that hold what was trained after the checkpoint must not go on with that
        except UsageError:
            return  # they have gone, as whoever trains such a model is told
        self._servers.meet()
        addresses = {id(known): address for address, known in self.addressed(models)}
        for replica in self._served:
            saved = (state or {}).get(addresses.get(id(replica), ""))
            replica.restart()
            shard = self._server.shard(replica.number) if self._server is not None else None
            if shard is not None:
                shard.restart(self._own_part(replica.pulled))
            if saved is not None:
                replica.num_steps, replica.round_steps, of_shard = saved
                if shard is not None and of_shard is not None:
                    shard.put(of_shard)
        self._servers.meet()  # nobody sends to a server that is not ready


def _unpickled(part: bytes) -> torch.Tensor:
    dtype, shape, data = pickle.loads(part)  # of a rank of this world, which has shown its token
    values = torch.frombuffer(bytearray(data), dtype=dtype) if math.prod(shape) else torch.empty(0, dtype=dtype)
    return values.reshape(shape)
