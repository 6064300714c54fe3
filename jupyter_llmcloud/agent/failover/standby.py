"""Runs that this agent leads when their leader has gone: those it stands by for, and those of the agent before it.

`leads.json` in the agent's folder tells of the runs that are led from here. The agent that takes a killed one's place
there finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil

from jupyter_llmcloud.agent.ranks.zygote_client import ZygoteClient
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.protocol.agent_messages import Execute, Replayed, StartWorld
from jupyter_llmcloud.protocol.rank_messages import StandBy
from jupyter_llmcloud.storage.leadership import Leadership, TermClaim
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from jupyter_llmcloud.system.atomic_files import read_json, write_json
from jupyter_llmcloud.system.processes import is_process

FILE = "leads.json"
ENDING_TIMEOUT_S = 60.0
POLL_S = 0.02


LeadOn = Callable[[StartWorld, Execute, list[Replayed], RunRecord, int], Awaitable[None]]


class LedRuns:
    """The runs that are led from here, as `leads.json` tells of them.

    Args:
        folder: of the agent.
    """

    def __init__(self, folder: Path, zygote: ZygoteClient) -> None:
        self._file = folder / FILE
        self._zygote = zygote
        self._inheritance = read_json(self._file) or {}
        self._leads: dict[str, float] = dict(self._inheritance.get("runs", {}))

    def inheritance(self) -> dict[str, Any]:
        """What the agent before this one has left; once."""
        inheritance, self._inheritance = self._inheritance, {}
        return inheritance

    @property
    def has_zygote(self) -> bool:
        """Whether what the agent before this one forked its ranks from is this one's: those ranks have ended."""
        return self._zygote.is_inherited

    def leads(self, folder: Path, wait_s: float) -> None:
        """A run with restarts is led from here; ranks of it may be elsewhere for so long after this agent's end."""
        self._leads[str(folder)] = wait_s
        self._write()

    def leads_no_more(self, folder: Path) -> None:
        """It has ended, or is led from elsewhere."""
        if self._leads.pop(str(folder), None) is not None:
            self._write()

    def _write(self) -> None:
        zygote = self._zygote.process
        about: dict[str, Any] = {"runs": self._leads}
        if zygote is not None:
            with contextlib.suppress(psutil.Error):
                about |= {"pid": zygote.pid, "started": psutil.Process(zygote.pid).create_time()}
        with contextlib.suppress(OSError):
            write_json(self._file, about, durable=False)  # for the agent after this one, on this host as it runs now


def _is_alive(inheritance: dict[str, Any]) -> bool:
    """Whether what an agent forked its ranks from has not ended with it yet."""
    return "pid" in inheritance and is_process(inheritance["pid"], inheritance["started"])


class Standby:
    """The runs of other agents that are led from here when those have gone.

    Args:
        address: of this agent.
        led: what the agent before this one has led.
        lead_on: sees a run through that was claimed.
    """

    def __init__(self, address: str, led: LedRuns, lead_on: LeadOn) -> None:
        self._address = address
        self._led = led
        self._lead_on = lead_on
        self._waiting: set[Path] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Runs that nobody leads, until it is certain that this agent may."""
        return len(self._waiting)

    def inherit(self) -> None:
        """Lead what the agent before this one has led, once its ranks have gone."""
        inheritance = self._led.inheritance()
        for folder, wait_s in inheritance.get("runs", {}).items():
            self._do(Path(folder), self._inherit(Path(folder), float(wait_s), inheritance))

    async def _inherit(self, folder: Path, wait_s: float, inheritance: dict[str, Any]) -> None:
        async with asyncio.timeout(ENDING_TIMEOUT_S):
            while not self._led.has_zygote and _is_alive(inheritance):
                await asyncio.sleep(POLL_S)
        await asyncio.sleep(wait_s)
        newest = await asyncio.to_thread(Leadership(folder).newest)
        here = (self._address, socket.gethostname())
        is_ours = newest is not None and (newest.agent, newest.host) == here
        if newest is None or not is_ours or not await self._take_over(folder, newest.term + 1):
            self._led.leads_no_more(folder)

    def expect(self, run: StandBy, at: float) -> None:
        """The leader of a run has gone, or will have gone `at` a time of the loop's clock."""
        self._do(Path(run.folder), self._take_over_at(run, at))

    async def _take_over_at(self, run: StandBy, at: float) -> None:
        folder = Path(run.folder)
        await asyncio.sleep(at - asyncio.get_running_loop().time())
        newest = await asyncio.to_thread(Leadership(folder).newest)
        # The leader may have gone before it could tell of a newer term: its file says whether we are to follow there.
        if newest is not None and (newest.term == run.term or run.heir in newest.heirs):
            await self._take_over(folder, newest.term + 1)

    def _do(self, folder: Path, work: Coroutine[Any, Any, None]) -> None:
        if self._is_closed:  # it is this agent's end that ends its connections, and not that of a leader
            work.close()
            return
        task = asyncio.ensure_future(self._seen_through(folder, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _seen_through(self, folder: Path, work: Any) -> None:
        self._waiting.add(folder)
        try:
            await work
        except Exception:
            traceback.print_exc(file=sys.stderr)
        finally:
            self._waiting.discard(folder)

    async def _take_over(self, folder: Path, term: int) -> bool:
        run, leadership = RunFolder(folder), Leadership(folder)
        claim = TermClaim(term, self._address, socket.gethostname())
        try:
            # Before the claim: who cannot read it leaves the run to others, and it is not taken for one that is led.
            spec, cell, definitions = await asyncio.to_thread(leadership.load)
            if not leadership.can_be_taken or not await asyncio.to_thread(leadership.claim, claim):
                return False
            record = await asyncio.to_thread(run.read)
        except (NotFound, FileNotFoundError):
            return False  # it has ended
        if not record.is_active:
            return False
        record.agent, record.host = claim.agent, claim.host
        self._waiting.discard(folder)
        await self._lead_on(spec, cell, definitions, record, term)
        return True

    def close(self) -> None:
        """The agent ends: it leads nothing from now on, also when it hears no leader any more."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
