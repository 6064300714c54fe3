"""One headless server with a warm cluster for the session, for kernels and clients that break neither. A plugin of pytest.

A server with a cluster of its own costs a test ten seconds of processor time: torch and transformers are imported anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from jupyter_llmcloud import config
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.errors import NotFound
from tests.support.headless import headless_server
from tests.support.worlds import NUM_SLOTS


@pytest.fixture(scope="session")
def _server_of_the_session() -> Iterator[ServerClient]:
    with headless_server("of-the-session", slots=NUM_SLOTS) as client:
        yield client


@pytest.fixture(scope="module")
def shared_server(_server_of_the_session: ServerClient) -> Iterator[ServerClient]:
    """The server that kernels of this module use instead of starting one; its runs are in the root of the session.

    What the tests leave on it, worlds and endpoints, ends after the module; its cluster is started again when one of
    them has stopped it.
    """
    server = _server_of_the_session
    if not server.clusters():
        server.start_cluster(workers=1, options={"slots": NUM_SLOTS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(config.ENV_SERVER_URL, server.url)
        patch.setenv(config.ENV_SERVER_TOKEN, server._token)
        yield server
    for endpoint in server.endpoints():
        if endpoint["state"] not in ("stopped", "failed"):
            server.stop_endpoint(endpoint["name"])
    for world in server.worlds():
        with contextlib.suppress(NotFound):  # of a kernel that has ended: its world may end by itself meanwhile
            server.stop_world(world["world_id"])
