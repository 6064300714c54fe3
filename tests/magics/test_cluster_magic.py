"""%cluster by values: the server is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.magics.commands import clusters
from jupyter_llmcloud.magics.session import session


def test_an_option_of_the_kind_may_be_called_as_one_of_the_magic_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KubeCluster has a name."""
    asked: list[dict[str, Any]] = []

    def start_cluster(**given: Any) -> dict[str, Any]:
        asked.append(given)
        return {"name": "mine"}

    server = SimpleNamespace(start_cluster=start_cluster, clusters=list)
    monkeypatch.setattr(session, "current", lambda: SimpleNamespace(server=server, cluster=None))
    clusters.ClusterMagics(shell=None).cluster("start kubernetes --name mine name=dask kind=x")
    options = {"name": "dask", "kind": "x"}
    assert asked == [{"kind": "kubernetes", "workers": None, "name": "mine", "options": options}]
