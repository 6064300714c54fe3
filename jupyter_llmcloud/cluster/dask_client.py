"""The Dask client of a cluster: opened, asked for the agents beside its workers, told to have such."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from typing import Any

from distributed import Client, Security
from distributed.comm import connect, parse_address, parse_host_port

from jupyter_llmcloud.cluster.host import security_from
from jupyter_llmcloud.cluster.kinds import gateway
from jupyter_llmcloud.cluster.record import ClusterRecord
from jupyter_llmcloud.cluster.tunnel.relay import RelayPlugin
from jupyter_llmcloud.cluster.worker_plugin import AgentPlugin, register
from jupyter_llmcloud.errors import ConnectionLost, UsageError

CONNECT_TIMEOUT_S = 8.0
REACH_TIMEOUT_S = 2.0  # for a connection to a host
SPEAKS_FIRST_S = 1.0  # a Dask server greets whoever connects
SHAKE_TIMEOUT_S = 2.0
MAX_GREETING = 1 << 20  # bytes
SCHEMES = ("tcp", "tls", "ws", "wss")
_CLOSES = "whatever listens there closes the connection at once"


async def open_client(address: str) -> Client:
    """A client of a cluster that somebody else has started.

    Raises UsageError and ConnectionLost with the reason when no scheduler answers there.
    """
    security = None
    if gateway.is_behind_gateway(address):
        address, security = await gateway.look_up(address)
    else:
        await check_scheduler(address)
    client = Client(address, security=security, asynchronous=True, set_as_default=False)
    try:
        await asyncio.wait_for(client, CONNECT_TIMEOUT_S)
    except BaseException:
        with contextlib.suppress(Exception):
            await client.close()
        raise
    return client


async def open_known_client(record: ClusterRecord) -> Client:
    """A client of a cluster that this server has been a client of before."""
    gateway.learn_scheme(record.address)
    security = security_from(record.tls)
    return await Client(record.address, security=security, asynchronous=True, set_as_default=False)


# --- whether a scheduler is there -----------------------------------------------------------------------------------


async def check_scheduler(address: str) -> None:
    """Look who answers at an address, within five seconds.

    Dask's own client tries again until its time is up, says for every reason that it has passed, and takes the first
    bytes of whoever answers for a length. Raises UsageError for what is no address, ConnectionLost with the reason.
    """
    scheme, host, port = _parts(address)
    if scheme in ("tcp", "tls"):
        await _reach(address, host, port, greets=scheme == "tcp")
    refused = f"no Dask scheduler answers at {address!r}"
    try:
        async with asyncio.timeout(SHAKE_TIMEOUT_S):
            kind = await _kind(address)
    except TimeoutError:
        raise ConnectionLost(f"{refused}: whatever listens there does not finish Dask's handshake.") from None
    except Exception as error:  # whatever Dask makes of the answer
        raise ConnectionLost(f"{refused}: {_reason(error)}.") from None
    if kind != "a Dask Scheduler":
        raise ConnectionLost(
            f"{refused}: a Dask {kind or 'server of another kind'} does. Give its scheduler's address."
        )


def _parts(address: str) -> tuple[str, str, int]:
    example = "for example tcp://host:8786"
    if address.startswith(("http://", "https://")):
        raise UsageError(
            f"{address!r} is a web page, such as a scheduler's dashboard. Give the scheduler's own address, {example}."
        )
    try:
        scheme, where = parse_address(address.strip())
        if scheme not in SCHEMES:
            raise ValueError(f"{scheme}:// is not one of {', '.join(f'{one}://' for one in (*SCHEMES, 'gateway'))}")
        host, port = parse_host_port(where.partition("/")[0])
    except ValueError as error:
        raise UsageError(f"{address!r} is no address of a Dask scheduler, {example}: {error}.") from None
    if not host or not 0 < port < 65536:
        raise UsageError(f"{address!r} is no address of a Dask scheduler, {example}: the port is missing.")
    return scheme, host, port


async def _reach(address: str, host: str, port: int, *, greets: bool) -> None:
    """Connect without Dask; one that `greets` says first of all how long its greeting is."""
    refused = f"no Dask scheduler answers at {address!r}"
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        raise ConnectionLost(f"{refused}: the host does not answer in {REACH_TIMEOUT_S:g} s.") from None
    except OSError as error:
        raise ConnectionLost(f"{refused}: {_reason(error)}.") from None
    try:
        problem = await _greeting(reader, writer) if greets else ""
        if problem == _CLOSES and await _speaks_tls(host, port):
            problem = "a server that speaks TLS does. Write tls://, and have the certificates in Dask's configuration"
        if problem:
            raise ConnectionLost(f"{refused}: {problem}.")
    finally:
        writer.transport.abort()


async def _greeting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """What is wrong with the first bytes of a server; "" when they are Dask's."""
    start = await _heard(reader)
    if start is not None:
        is_dask = len(start) == 8 and struct.unpack("Q", start)[0] <= MAX_GREETING
        return "" if is_dask else _describe_answer(start)
    with contextlib.suppress(OSError):  # whoever is silent may be waiting to be asked
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        await writer.drain()
    answer = await _heard(reader)
    if answer is None:
        return f"something listens there and says nothing for {SPEAKS_FIRST_S:g} s, unlike a scheduler"
    return _describe_answer(answer)


async def _speaks_tls(host: str, port: int) -> bool:
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE  # nothing is said to it
    try:
        async with asyncio.timeout(SPEAKS_FIRST_S):
            _, writer = await asyncio.open_connection(host, port, ssl=anyone)
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return True


async def _heard(reader: asyncio.StreamReader) -> bytes | None:
    """The next eight bytes, fewer when the server has closed; None when nothing comes."""
    try:
        async with asyncio.timeout(SPEAKS_FIRST_S):
            return await reader.readexactly(8)
    except asyncio.IncompleteReadError as error:
        return error.partial
    except TimeoutError:
        return None
    except OSError:
        return b""


def _describe_answer(start: bytes) -> str:
    if start.startswith(b"HTTP/"):
        return "an HTTP server does. A scheduler's own port is often 8786, its dashboard's 8787"
    if not start:
        return _CLOSES
    return f"another kind of server does, which begins with {start!r}"


async def _kind(address: str) -> str:
    """What kind of Dask server answers: `a Dask Scheduler`, `a Dask Worker`."""
    arguments = Security().get_connection_args("client")
    comm = await connect(address, timeout=SHAKE_TIMEOUT_S, **arguments)
    try:
        await comm.write({"op": "identity", "reply": True})
        told: Any = await comm.read()
    finally:
        comm.abort()
    return f"a Dask {told['type']}" if isinstance(told, dict) and "type" in told else ""


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    match error:
        case ConnectionRefusedError():
            return "nothing listens on that port"
        case socket.gaierror():
            return "the host's name is not known"
    return str(error).rstrip(".") or type(error).__name__


# --- agents ---------------------------------------------------------------------------------------------------------


async def install(client: Client, record: ClusterRecord) -> None:
    """Have agents beside the workers of a cluster that somebody else has started."""
    with contextlib.suppress(Exception):  # a scheduler that allows no plugins: workers are reached directly or not
        await client.register_plugin(RelayPlugin())
    await register(client, AgentPlugin(record.cluster_id, record.options.get("slots")))
