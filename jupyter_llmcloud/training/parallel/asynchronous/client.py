"""A worker's end of the parameter servers: what it sends and asks, in its main thread."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import torch

from jupyter_llmcloud.core.parallel.left_rows import Place
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.group.process_group import watched_sockets
from jupyter_llmcloud.training.parallel.asynchronous.wire import Wire, as_bytes, as_tensor

_END = -1
_CONNECT_S = 30.0
_GONE = (
    "--plan async-ps: this model was prepared in an earlier cell of another world, and its parameter servers are gone. "
    "Prepare it again: accelerator.prepare(model)."
)


class ParameterClient:
    """Talks to every server of a world. Whatever interrupts it leaves it closed.

    Args:
        servers: their addresses, in the order of their parts.
        tokens: of each.
        worker: the number of this one.
    """

    def __init__(self, servers: list[tuple[str, int]], tokens: list[str], worker: int) -> None:
        self.servers, self._tokens = servers, tokens
        self._worker = worker
        self._wires: list[Wire] = []
        self._num_meetings = 0

    @property
    def is_open(self) -> bool:
        """Whether a cell is under way."""
        return bool(self._wires)

    def open(self, session: str) -> None:
        """A cell begins."""
        self.close()
        try:
            self._connect(session)
        except BaseException as error:
            self.close()  # to some of them: what is sent would be cut for those
            if isinstance(error, ConnectionRefusedError):
                raise UsageError(_GONE) from error
            raise

    def _connect(self, session: str) -> None:
        with watched_sockets():  # a Stop, and the failure of a rank, release who waits at them
            for (host, port), token in zip(self.servers, self._tokens, strict=True):
                sock = socket.create_connection((host, port), timeout=_CONNECT_S)
                sock.settimeout(None)
                wire = Wire(sock)
                wire.trust()
                self._wires.append(wire)
                wire.send({"token": token, "worker": self._worker, "session": session})
        for wire in self._wires:
            wire.receive()

    def close(self) -> None:
        """A cell has ended, or what was under way is lost."""
        for wire in self._wires:
            wire.close()
        self._wires, self._num_meetings = [], 0

    def push(self, model: int, moved: torch.Tensor, places: Mapping[str, Place]) -> None:
        """Send what a model has moved by, flat, and the places in passes up to which that is."""
        parts = moved.to("cpu", torch.float32).tensor_split(len(self._wires))
        header = {"op": "push", "model": model, "places": dict(places)}
        with _ClosedOnError(self):
            # The first server keeps the places: what has not come to it is trained by others when this worker is lost.
            for wire, part in reversed(list(zip(self._wires, parts, strict=True))):
                wire.send(header, as_bytes(part))
            for wire in self._wires:  # it counts everywhere before anything else is asked
                wire.receive()

    def pull(self, model: int) -> torch.Tensor:
        """The values of a model as they are now, flat."""
        with _ClosedOnError(self):
            for wire in self._wires:
                wire.send({"op": "pull", "model": model})
            answers = [wire.receive() for wire in self._wires]
        for header, _ in answers:
            if "error" in header:
                raise UsageError(f"--plan async-ps: {header['error']}.")
        return torch.cat([as_tensor(data) for _, data in answers])

    def knows(self, model: int) -> bool:
        """Whether a model is served: one of an earlier world is not."""
        return bool(self._ask({"op": "knows", "model": model})[0]["knows"])

    def finish_round(self, model: int, num_steps: int, seconds: float) -> int:
        """Say that a round is finished, and wait until the next may begin; returns its number of steps."""
        asked = {"op": "round", "model": model, "num_steps": num_steps, "seconds": seconds}
        return int(self._ask(asked)[0]["num_steps"])

    def meet(self, given: bytes = b"", is_last: bool = False) -> dict[int, bytes]:
        """Wait for all workers that train; returns what each has given."""
        self._num_meetings += 1
        number = _END if is_last else self._num_meetings
        header, data = self._ask({"op": "meet", "number": number}, given)
        found, at = {}, 0
        for worker, size in header["sizes"].items():
            found[int(worker)] = bytes(data[at : at + size])
            at += size
        return found

    def end_phase(self, key: str, phase: int) -> tuple[list[int], dict[int, Place]]:
        """Wait for all workers that are in this pass; returns who is there, and the places of those that are lost."""
        asked = {"op": "phase", "key": key, "phase": phase, "num_meetings": self._num_meetings}
        header, _ = self._ask(asked)
        self._num_meetings = max(self._num_meetings, int(header["num_meetings"]))
        left = {int(worker): (int(phase), int(number)) for worker, (phase, number) in header["left"].items()}
        return list(header["takers"]), left

    def about(self, model: int) -> dict[str, Any]:
        """What has become of the workers in this cell."""
        return self._ask({"op": "about", "model": model})[0]

    def _ask(self, asked: dict[str, Any], given: bytes = b"") -> tuple[dict[str, Any], bytearray]:
        """Of the first server, which keeps the rounds."""
        with _ClosedOnError(self):
            self._wires[0].send(asked, given)
            return self._wires[0].receive()


class _ClosedOnError:
    """A message that was broken off in the middle, by a Stop for instance, leaves nothing to go on with."""

    def __init__(self, client: ParameterClient) -> None:
        self._client = client

    def __enter__(self) -> None:
        if not self._client.is_open:
            raise UsageError(_GONE)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._client.close()
