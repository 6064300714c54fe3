"""Clusters that a dask-gateway has started: their schedulers stand behind a proxy, which only TLS of their own passes.

A gateway gives the credentials of a cluster to whoever may use it. Where it is and how a user says who they are stands
in dask-gateway's own part of Dask's configuration (`gateway.address`, `gateway.auth`), which its own client reads.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

from distributed import Security

from jupyter_llmcloud.errors import ConnectionLost, UsageError

SCHEME = "gateway://"
ANSWER_TIMEOUT_S = 10.0
_EXAMPLE = f"for example {SCHEME}host:8786/NAME, which is the cluster's scheduler_address, or {SCHEME}NAME"


def is_behind_gateway(address: str) -> bool:
    """Whether an address is of a cluster that a dask-gateway has started."""
    return address.strip().startswith(SCHEME)


def cluster_name(address: str) -> str:
    """The name that a gateway knows a cluster by. Raises UsageError."""
    name = address.strip().removeprefix(SCHEME).rstrip("/").rpartition("/")[2]
    if not name or ":" in name:
        raise UsageError(f"{address!r} names no cluster of a dask-gateway: the name is missing, {_EXAMPLE}.")
    return name


def learn_scheme(address: str) -> None:
    """Have Dask know how such an address is reached, before it is used. Raises UsageError without dask-gateway."""
    if is_behind_gateway(address):
        _package("dask_gateway.comm", address)


async def look_up(address: str) -> tuple[str, Security]:
    """The address of a cluster's scheduler and how to speak to it, as the gateway says.

    Raises UsageError where the package or the gateway's address is missing, ConnectionLost with the gateway's reason.
    """
    name = cluster_name(address)
    learn_scheme(address)
    gateway = _gateway(address)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            report = await gateway.get_cluster(name)
    except TimeoutError:
        raise ConnectionLost(
            f"the dask-gateway at {gateway.address} says nothing of {address!r} in {ANSWER_TIMEOUT_S:g} s."
        ) from None
    except Exception as error:  # of whatever kind its client makes of the answer
        raise ConnectionLost(
            f"the dask-gateway at {gateway.address} does not let {address!r} be used: {_reason(error)}."
        ) from None
    finally:
        await gateway.close()
    if not report.scheduler_address or report.tls_key is None:
        raise ConnectionLost(
            f"the cluster {name!r} of the dask-gateway does not run: it is {report.status.name.lower()}."
        )
    cert, key = report.tls_cert, report.tls_key
    security = Security(tls_ca_file=cert, tls_client_cert=cert, tls_client_key=key, require_encryption=True)
    return str(report.scheduler_address), security


def _gateway(address: str) -> Any:
    try:
        return _package("dask_gateway", address).Gateway(asynchronous=True)
    except ValueError as error:  # no address is configured
        raise UsageError(
            f"{address!r} cannot be looked up: {_reason(error)}. Set gateway.address in the Dask configuration of the"
            " Jupyter server, or DASK_GATEWAY__ADDRESS in its environment, and gateway.auth where it asks who you are."
        ) from None


def _package(name: str, address: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{address!r} is a cluster of a dask-gateway, and its client cannot be imported ({error}). Install it,"
            " of the gateway's version, in the environment of the Jupyter server: pip install dask-gateway."
        ) from None


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
