"""The parameter server: threads in a rank that hold a part of each model's parameters and the outer optimizer's state.

The first server keeps the rounds, too: who may go on, and where all meet.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import sys
import threading
import traceback
from typing import Any

import torch

from jupyter_llmcloud.training.parallel.asynchronous.session import WorkerSession
from jupyter_llmcloud.training.parallel.asynchronous.shard import ParameterShard
from jupyter_llmcloud.training.parallel.asynchronous.wire import ServerGone, Wire, as_bytes, as_tensor, note_open

UNKNOWN = "its parameter server does not have this model any more: prepare it again, accelerator.prepare(model)"


class ParameterServer:
    """Serves until it is closed, whatever cell is executed.

    Args:
        host: the address of this rank that the other ranks reach.
        token: what workers show that belong to this world.
        num_workers, most_steps, staleness: of every cell.
    """

    def __init__(self, host: str, token: str, num_workers: int, most_steps: int, staleness: int) -> None:
        self._token = token
        self._settings = num_workers, most_steps, staleness
        self._shards: dict[int, ParameterShard] = {}
        self._versions: dict[tuple[int, int], int] = {}  # that a worker has of a model
        self._session = WorkerSession("", *self._settings)
        self._lock = threading.Lock()
        self.oldest = 0  # of the updates that have arrived: how many others had arrived since their worker asked
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = note_open(socket.create_server((host, 0), family=family, backlog=num_workers))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, name="llmcloud-parameter-server", daemon=True).start()

    def add(self, model: int, shard: ParameterShard) -> None:
        """Serve a part of a model."""
        self._shards[model] = shard

    def shard(self, model: int) -> ParameterShard | None:
        """The part of a model that is here."""
        return self._shards.get(model)

    def keep(self, models: set[int]) -> None:
        """Let go of all other models."""
        self._shards = {model: shard for model, shard in self._shards.items() if model in models}

    def close(self) -> None:
        """Serve nobody any more."""
        self._shards.clear()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which ends its thread
        self._listener.close()

    # --- connections ---

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(Wire(sock),), name="llmcloud-ps-worker", daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        worker, session = -1, None
        try:
            header, _ = wire.receive()
            if not hmac.compare_digest(str(header.get("token", "")), self._token):
                return
            wire.trust()
            worker, session = int(header["worker"]), self._session_of(str(header["session"]))
            wire.send({})
            while True:
                self._answer(wire, worker, session, *wire.receive())
        except ServerGone:
            pass
        except Exception:
            traceback.print_exc(file=sys.stderr)
        finally:
            wire.close()
            if session is not None:
                session.lose(worker)

    def _session_of(self, key: str) -> WorkerSession:
        with self._lock:
            if self._session.key != key:
                self._session.close()
                self._session = WorkerSession(key, *self._settings)
                self.oldest = 0
            return self._session

    def _answer(self, wire: Wire, worker: int, session: WorkerSession, asked: dict[str, Any], data: bytearray) -> None:
        match asked["op"]:
            case "push":
                self._push(worker, session, int(asked["model"]), as_tensor(data))
                session.note_trained(worker, int(asked["model"]), asked["places"])
                wire.send({})
            case "pull":
                self._pull(wire, worker, int(asked["model"]))
            case "knows":
                wire.send({"knows": int(asked["model"]) in self._shards})
            case "round":
                model, num_steps = int(asked["model"]), int(asked["num_steps"])
                steps = session.finish_round(wire, worker, model, num_steps, float(asked["seconds"]))
                wire.send({"num_steps": steps})
            case "meet":
                given = session.meet(wire, worker, int(asked["number"]), bytes(data))
                sizes = {str(other): len(part) for other, part in given.items()}
                wire.send({"sizes": sizes}, b"".join(given.values()))
            case "phase":
                wire.send(session.end_phase(wire, worker, asked["key"], asked["phase"], asked["num_meetings"]))
            case "about":
                about = {"lost": session.lost(), "rounds": session.rounds(int(asked["model"])), "oldest": self.oldest}
                wire.send(about)

    def _push(self, worker: int, session: WorkerSession, model: int, moved: torch.Tensor) -> None:
        if (shard := self._shards.get(model)) is None:
            return  # it hears of it when it asks for the values
        age = shard.num_arrived - self._versions.get((worker, model), 0)
        self.oldest = max(self.oldest, age)
        shard.apply(moved, session.num_live())

    def _pull(self, wire: Wire, worker: int, model: int) -> None:
        if (shard := self._shards.get(model)) is None:
            wire.send({"error": UNKNOWN})
            return
        self._versions[worker, model] = shard.num_arrived
        wire.send({}, as_bytes(shard.values()))
