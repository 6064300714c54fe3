"""The live card of an endpoint, for front ends that cannot show its panel: the static one, and buttons that copy.

The key travels in one custom message, on a click, and lives in the clipboard alone: it is no trait, so that neither the
saved notebook nor its widget state can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import anywidget
import traitlets

from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.widgets.server_panels import STATIC


class EndpointCard(anywidget.AnyWidget):
    """Its panel where the server of the page can be asked, else this; built from labextension/src/widgets."""

    _esm = STATIC / "endpoint-card.js"
    _css = STATIC / "panels.css"
    name = traitlets.Unicode().tag(sync=True)
    url = traitlets.Unicode().tag(sync=True)
    snippets = traitlets.Dict().tag(sync=True)


def make_card(name: str, url: str, snippets: Mapping[str, str], make_key: Callable[[], str]) -> EndpointCard:
    """A card of an endpoint, whose button answers with the key that `make_key` returns."""
    card = EndpointCard(name=name, url=url, snippets=dict(snippets))

    def on_message(_card: Any, content: dict[str, Any], _buffers: Any) -> None:
        if content.get("kind") == "key":
            card.send(_key_message(make_key))

    card.on_msg(on_message)
    return card


def _key_message(make_key: Callable[[], str]) -> dict[str, str]:
    try:
        return {"kind": "key", "key": make_key()}
    except LLMCloudError as error:
        return {"kind": "error", "message": str(error)}
