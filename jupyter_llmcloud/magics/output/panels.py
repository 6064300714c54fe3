"""Panels as values of a cell: live where the front end can, a table in a terminal and in a saved notebook."""

from __future__ import annotations

from typing import Any

from jupyter_llmcloud.magics.commands import clusters, endpoints, worlds
from jupyter_llmcloud.magics.commands.tables import PanelOf, Table


class _Panel:
    """Displayed by IPython. The table is made anew each time it is shown."""

    def _table(self) -> Table:
        raise NotImplementedError

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return self._table()._repr_mimebundle_(include, exclude)


class ClusterPanel(_Panel):
    """The clusters of the server: start, scale, watch and stop them. Its Python twin is `lc.cluster`.

    Args:
        name: of one cluster; all of them when it is None.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def _table(self) -> Table:
        return clusters.table().shown_by(PanelOf("cluster", self.name or ""))


class WorldPanel(_Panel):
    """The ranks of this notebook: what they do and hold. Its Python twin is `lc.world`.

    Args:
        world_id: of another world; "" for all worlds of the server.
    """

    def __init__(self, world_id: str | None = None) -> None:
        self.world_id = world_id

    def _table(self) -> Table:
        if self.world_id is None:
            return worlds.status()
        return worlds.listing().shown_by(PanelOf("world", self.world_id))


class EndpointPanel(_Panel):
    """An endpoint with its rates, keys and playground. Its Python twin is `lc.endpoints`.

    Args:
        name: of one endpoint; all of them when it is None.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def _table(self) -> Table:
        return endpoints.table().shown_by(PanelOf("endpoint", self.name or ""))
