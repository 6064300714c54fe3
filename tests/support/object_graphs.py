"""A training in one process that is broken off, and resumed from a checkpoint by another one that makes everything anew."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch

from jupyter_llmcloud.training.checkpoint.serialization import load
from jupyter_llmcloud.training.object_graph.graph import MUST, Graph, Identities
from jupyter_llmcloud.training.object_graph.restore import Restorer
from jupyter_llmcloud.training.object_graph.state import ObjectState

Names = dict[str, Any]


def graph_of(names: Names, known: Identities) -> Graph:
    graph = Graph(known)
    for name, value in names.items():
        graph.add(f"0 {name}", value, MUST)
    return graph


def saved_by(
    make: Callable[[], Names], train: Callable[[Names], None], restored: dict[str, Any] | None = None
) -> tuple[dict[str, Any], Names]:
    """The checkpoint of a training that made its objects and has trained, and what it had then.

    `restored`: from which it has gone on, where it found its objects as that has them.
    """
    names, state = make(), ObjectState()
    state.remember(graph_of(names, state.known), set())
    if restored is not None:
        state.note_restored(restored)
    train(names)
    buffer = io.BytesIO()
    torch.save(state.take(graph_of(names, state.known), set(), lambda _, t: t.detach().clone(), 1 << 16), buffer)
    assert not any(compare.has_changed() for compare in state.later)
    buffer.seek(0)
    return load(buffer), names


def put(saved: dict[str, Any], names: Names, everything: bool = True) -> Names:
    """Puts a checkpoint into objects that were made anew."""
    restorer = Restorer(saved["nodes"], graph_of(names, Identities()), everything)
    values = {address[2:]: restorer.root(root) for address, root in saved["roots"].items()}
    restorer.finish()
    names.update(values)
    return names


def resumed(make: Callable[[], Names], train: Callable[[Names], None]) -> tuple[Names, Names]:
    """(resumed, undisturbed): what a training has when it goes on from its checkpoint, and what it had."""
    saved, undisturbed = saved_by(make, train)
    return put(saved, make()), undisturbed
