"""Fixtures of the tests of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from traitlets.config import Config

from jupyter_llmcloud import config
from jupyter_llmcloud.server.routes import SETTING
from tests.support.server_parts import Server, StandInAgent, StandInPool, make_model

HEADLESS_DEADLINE_S = 60


@pytest.fixture
def jp_server_config(own_root: Path) -> Config:
    """Our extension alone, and no route that forgot its access rule."""
    extensions = {"jupyter_llmcloud": True, "jupyter_server_terminals": False}
    return Config({"ServerApp": {"jpserver_extensions": extensions, "allow_unauthenticated_access": False}})


@pytest.fixture
def agent(own_root: Path, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[StandInAgent]:
    """A node agent that starts stand-in replicas."""
    agent = StandInAgent(own_root.parent / "a")
    jp_asyncio_loop.run_until_complete(agent.start())
    yield agent
    jp_asyncio_loop.run_until_complete(agent.close())


@pytest.fixture
def server(
    agent: StandInAgent,
    jp_serverapp: Any,
    http_server: Any,
    http_server_port: Any,
    jp_base_url: str,
    jp_asyncio_loop: asyncio.AbstractEventLoop,
) -> Iterator[Server]:
    """A Jupyter server with our extension, whose clusters and replicas are stand-ins."""
    context = jp_serverapp.web_app.settings[SETTING]
    pool = StandInPool(agent)

    async def make_pool() -> StandInPool:
        return pool

    context.clusters.make_pool = make_pool
    url = f"http://127.0.0.1:{http_server_port[-1]}{jp_base_url.rstrip('/')}"

    async def make() -> Server:
        return Server(url, jp_serverapp.identity_provider.token, context, agent, pool)

    server = jp_asyncio_loop.run_until_complete(make())
    yield server
    jp_asyncio_loop.run_until_complete(server.client.aclose())


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says nothing of sense, in a folder that can be served."""
    from tests.support.tiny_models import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("real") / "model")


@pytest.fixture
def headless_root(own_root: Path) -> Iterator[Path]:
    """A root of its own; waits in the end until the headless servers that were started there have ended."""
    yield own_root
    deadline = time.monotonic() + HEADLESS_DEADLINE_S
    while announced := list(config.runtime_dir().glob("headless-*.json")):
        assert time.monotonic() < deadline, f"{announced} stays"
        time.sleep(0.05)


@pytest.fixture
def model(own_root: Path) -> Path:
    """A folder that looks like a model."""
    return make_model(own_root.parent / "model")
