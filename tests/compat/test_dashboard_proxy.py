"""Dask's dashboard through the Jupyter server: the address that the cluster panel links to answers, where it is linked."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from jupyter_llmcloud.client.rest import ServerClient
from tests.server.test_server_restart import jupyter_server

pytest_plugins = ["tests.support.server_fixtures"]


@pytest.mark.slow
def test_the_link_to_the_dashboard_answers_through_the_jupyter_server(own_root: Path) -> None:
    pytest.importorskip("jupyter_server_proxy")
    with jupyter_server(own_root.parent) as (process, client):
        assert isinstance(process, subprocess.Popen)
        assert client.ask("GET", "cluster-kinds")["has_dashboard_proxy"] is True
        cluster = client.start_cluster(kind="local", name="shown", workers=1)
        try:
            answer = through_the_server(client, cluster["dashboard"])
            assert answer.status_code == 200 and re.search(r"<title>Dask: .*Status</title>|Bokeh|bokeh", answer.text)
        finally:
            client.stop_cluster("shown")


def through_the_server(client: ServerClient, dashboard: str) -> httpx.Response:
    """As the panel builds the link: BASE_URL/proxy/PORT/status."""
    url = urlsplit(dashboard)
    assert url.hostname == "127.0.0.1", "a dashboard that others can reach"
    return httpx.get(
        f"{client.url}proxy/{url.port}{url.path}",
        headers={"Authorization": f"token {client._token}"},
        timeout=60,
        follow_redirects=True,
        trust_env=False,
    )
