"""The panels of clusters, worlds and endpoints as widgets: for front ends that cannot show them from the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets

from jupyter_llmcloud.widgets.panel_mime import Kind

STATIC = Path(__file__).parent / "static"  # built from labextension/src/widgets


class ServerPanel(anywidget.AnyWidget):
    """Shows something of the page's server; where that cannot be asked, the text that the kernel had.

    Traits:
        ident: what is shown, by its id; empty for all there are.
        text: the same as text, as it was when it was shown.
    """

    _css = STATIC / "panels.css"
    ident = traitlets.Unicode("").tag(sync=True)
    text = traitlets.Unicode("").tag(sync=True)


class ClusterWidget(ServerPanel):
    """The clusters of a server, or one of them by its name."""

    _esm = STATIC / "cluster-panel.js"


class WorldWidget(ServerPanel):
    """The ranks of a world, or of all worlds."""

    _esm = STATIC / "world-panel.js"


class EndpointWidget(ServerPanel):
    """An endpoint with its playground and keys, or all of them."""

    _esm = STATIC / "endpoint-panel.js"


WIDGETS: dict[Kind, type[ServerPanel]] = {"cluster": ClusterWidget, "world": WorldWidget, "endpoint": EndpointWidget}


def widget_view(kind: Kind, ident: str, text: str) -> dict[str, Any]:
    """The part of a mime bundle by which a front end with widgets shows the panel."""
    found: Any = WIDGETS[kind](ident=ident, text=text)._repr_mimebundle_()
    data: dict[str, Any] = found[0] if isinstance(found, tuple) else found
    return {key: value for key, value in data.items() if key not in ("text/plain", "text/html")}
