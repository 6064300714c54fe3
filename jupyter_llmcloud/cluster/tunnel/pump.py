"""Bytes of a local socket carried over a Dask comm, both tasks, with a bound on what is under task.

A comm takes whatever is written to it and queues without bound. So each end says how much it has handed on, and the
other end sends no more than `WINDOW` bytes beyond that: a reader that does not read stops its writer, not the memory
of a worker or of the scheduler in between. What crosses: bytes, the number of bytes handed on, and `END`.
"""

from __future__ import annotations

import asyncio
import contextlib

from distributed.comm.core import Comm, CommClosedError

WINDOW = 2 << 20
CHUNK = 1 << 18
END = "end"
CLOSE_TIMEOUT_S = 5.0


class _Pump:
    """One connection. Over when both directions have ended and everything was handed on, or when anything breaks."""

    def __init__(self, comm: Comm, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._comm = comm
        self._reader = reader
        self._writer = writer
        self._under_way = 0  # bytes that were sent and not handed on yet; an END counts as one
        self._has_window = asyncio.Event()
        self._sent_end = False
        self._heard_end = False
        self._arrived: asyncio.Queue[bytes] = asyncio.Queue()  # holds no more than the window

    async def send(self) -> None:
        """What is read here goes out."""
        while data := await self._reader.read(CHUNK):
            while self._under_way + len(data) > WINDOW:
                self._has_window.clear()
                await self._has_window.wait()
            self._under_way += len(data)
            await self._comm.write(data)
        self._under_way += 1
        self._sent_end = True
        await self._comm.write(END)

    async def receive(self) -> None:
        """What comes in is queued for `hand_on`; returns when the connection is over."""
        while not (self._sent_end and self._heard_end and not self._under_way):
            message = await self._comm.read()
            if isinstance(message, int):
                self._under_way -= message
                self._has_window.set()
            elif message == END:
                self._heard_end = True
                self._arrived.put_nowait(b"")
            else:
                self._arrived.put_nowait(bytes(message))

    async def hand_on(self) -> None:
        """Write here what was queued, and acknowledge it."""
        handed_on = 0
        while data := await self._arrived.get():
            self._writer.write(data)
            await self._writer.drain()
            handed_on += len(data)
            if handed_on >= WINDOW // 4:
                await self._comm.write(handed_on)
                handed_on = 0
        self._writer.write_eof()
        await self._comm.write(handed_on + 1)


async def carry(comm: Comm, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes both ways until both ends have closed, or one has broken; then both are closed."""
    pump = _Pump(comm, reader, writer)
    over = asyncio.create_task(pump.receive())
    tasks = [over, asyncio.create_task(pump.send()), asyncio.create_task(pump.hand_on())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if not any(task.exception() for task in tasks if task.done()):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await comm.close()  # sends what is queued first
    except TimeoutError:
        pass
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, OSError | CommClosedError):
                raise outcome
        comm.abort()
        writer.close()


async def join(one: Comm, other: Comm) -> None:
    """Pass messages between two comms until either ends; their far ends bound what is under task."""

    async def pass_on(source: Comm, target: Comm) -> None:
        while True:
            await target.write(await source.read())

    tasks = [asyncio.create_task(pass_on(one, other)), asyncio.create_task(pass_on(other, one))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for comm in (one, other):  # before the tasks are cancelled: a read that is cancelled drops what is queued
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await comm.close()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for comm in (one, other):
            comm.abort()
