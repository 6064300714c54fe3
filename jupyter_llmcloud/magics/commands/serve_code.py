"""%%serve: the functions of a cell, or an object of the kernel, as an endpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
from IPython.core.magic import Magics, cell_magic, magics_class

from jupyter_llmcloud.client.revision_wait import wait_for_revision
from jupyter_llmcloud.core.names import check_name, type_in_words
from jupyter_llmcloud.core.options import parse, split
from jupyter_llmcloud.core.serving.models.cell_source import CellSource, check_source
from jupyter_llmcloud.core.spec import SERVE_CELL, EndpointSpec, Interface
from jupyter_llmcloud.errors import ModelError, ServerError, UsageError
from jupyter_llmcloud.magics.output.progress_line import ProgressLine
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.magics.serving import kernel_models
from jupyter_llmcloud.magics.serving.as_asked import say_what_stays
from jupyter_llmcloud.magics.serving.endpoint import Endpoint
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import current_number
from jupyter_llmcloud.protocol.run_request import without_leading_blank_lines
from jupyter_llmcloud.storage.models import served_code

WAIT_S = 1
POLL_S = 0.2
MAX_OBJECT = 2 << 30
Progress = Callable[[str], None]


def serve_cell(name: str, source: CellSource, *, progress: Progress | None = None, **options: Any) -> Endpoint:
    """Serve a cell that defines `load()` and `predict(inputs)`; a cell that is served under that name is replaced."""
    check_name(name, "endpoint")
    check_source(source)
    return _serve(name, source.name, source.as_record(), progress, options)


def serve_object(
    value: Any,
    name: str | None,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
    called: str = "",
    **options: Any,
) -> Endpoint:
    """Serve a function of inputs, an object with `predict(inputs)`, or a `torch.nn.Module`, by value.

    A model of transformers is written as a folder, in the Hugging Face layout, and served as any other.

    Args:
        tokenizer: of a model that generates or classifies texts.
        called: what it is, where it is listed (default: its class).
    """
    kind = getattr(value, "__name__", type(value).__name__)
    if not (callable(value) or callable(getattr(value, "predict", None))):
        raise UsageError(
            f"{type_in_words(value)} cannot be served: name a run or a folder, or give a function, an object with "
            "predict(inputs), or a torch.nn.Module."
        )
    if name is None:
        raise UsageError(f"give the endpoint of this {kind} a name: lc.serve({kind}, name=...).")
    check_name(name, "endpoint")
    target = f"{kind} {called or 'of the kernel'}"
    value = kernel_models.unwrapped(value)
    if kernel_models.is_of_transformers(value):
        folder = kernel_models.write(value, tokenizer, name, _root())
        return _serve_folder(name, folder, progress, options)
    kept = value if tokenizer is None else {"model": value, "tokenizer": tokenizer}
    digest = served_code.write_object(_pickled(kept), os.getcwd(), _root(), has_tokenizer=tokenizer is not None)
    return _serve(name, target, {"object": digest}, progress, options)


def _serve_folder(name: str, folder: Path, progress: Progress | None, options: dict[str, Any]) -> Endpoint:
    """Serve a model that the kernel has written; one of it that is served under that name already is replaced."""
    EndpointSpec.make(options, Interface.NOTEBOOK)
    server = session.current().server
    known = next((row for row in server.endpoints() if row["name"] == name), None)
    if known is not None and known["state"] in ("starting", "ready") and kernel_models.is_kept(known["model"]):
        say_what_stays(known, options)
        record = wait_for_revision(server, server.update_endpoint(name, str(folder)), progress)
        return Endpoint(record["name"], server, record["kind"])
    options = {**options, "name": name, "cluster": options.get("cluster") or session.current().cluster}
    record = dict(server.create_endpoint(str(folder), **options))
    _wait(server, record, progress)
    return Endpoint(record["name"], server, server.endpoint(name)["kind"])


def _pickled(value: Any) -> bytes:
    try:
        data = cloudpickle.dumps(value)
    except Exception as error:
        raise UsageError(
            f"{type_in_words(value)} cannot be sent to where it is served: {error}. Serve it from a %%serve cell, "
            "whose load() makes it."
        ) from error
    if len(data) > MAX_OBJECT:
        raise UsageError(
            f"{type_in_words(value)} of {len(data)} bytes is too large to be sent: save it, and read it in the "
            "load() of a %%serve cell."
        )
    return data


def _root() -> Path:
    """Where the server keeps what it serves, as far as that is on this machine."""
    root = Path(session.current().server.status()["root"])
    if not root.is_dir():
        raise UsageError(
            "the Jupyter server is on another machine: serve a %%serve cell, whose load() makes the object."
        )
    return root


def _serve(
    name: str, target: str, source: dict[str, Any], progress: Progress | None, options: dict[str, Any]
) -> Endpoint:
    EndpointSpec.make(options, Interface.NOTEBOOK)
    server = session.current().server
    options = {**options, "name": name, "cluster": options.get("cluster") or session.current().cluster}
    record = dict(server.create_endpoint(target, source=source, **options))
    _wait(server, record, progress)
    return Endpoint(record["name"], server, server.endpoint(record["name"])["kind"])


def _wait(server: Any, record: dict[str, Any], progress: Progress | None) -> None:
    """Until the revision that was asked for answers. Raises ModelError when it never will."""
    number, began = record["revisions"][-1]["number"], time.monotonic()
    while not _answers(record, number):
        if progress is not None:
            reason = f" ({shown(record['reason'])})" if record.get("reason") else ""
            progress(f"{record['name']} is starting: {time.monotonic() - began:.0f} s{reason}")
        if record["state"] == "ready":
            time.sleep(POLL_S)
        record = server.endpoint(record["name"], wait_s=WAIT_S)


def _answers(record: dict[str, Any], number: int) -> bool:
    """Whether a replica of this revision is ready; raises what it failed with."""
    row = next((row for row in record["revisions"] if row["number"] == number), None)
    if record["state"] not in ("starting", "ready"):
        kind = ModelError if "model" in record["reason"] else ServerError
        raise kind(f"endpoint {record['name']!r} has {record['state']}: {record['reason'] or 'it was stopped.'}")
    if row is None or row["role"] == "retired":
        why = row["note"] if row is not None and row["note"] else "another one took its place."
        raise ModelError(f"endpoint {record['name']!r} goes on with what it served before: {why}")
    mine = [replica["state"] for replica in record["replicas"] if replica["revision"] == number]
    if record["state"] == "ready" and record["reason"] and not mine:
        raise ModelError(f"endpoint {record['name']!r} goes on with what it served before: {record['reason']}")
    return "ready" in mine


@magics_class
class ServeCellMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    @cell_magic
    def serve(self, line: str, cell: str) -> Endpoint:
        """%%serve NAME: the cell defines load() and predict(inputs), and perhaps stream(inputs)."""
        parsed = parse(SERVE_CELL, split(line, "%%serve"))
        [name] = parsed.arguments
        progress = ProgressLine()
        try:
            endpoint = serve_cell(name, self._source(cell), progress=progress.tell, **parsed.given)
        except KeyboardInterrupt:
            progress.tell("Not waiting any longer; the endpoint goes on starting: %endpoints shows it.")
            raise
        endpoint.show(progress.handle)
        return endpoint

    def _source(self, cell: str) -> CellSource:
        body = without_leading_blank_lines(cell)
        above = cell[: len(cell) - len(body)].count("\n")
        number = current_number(self.shell)
        return CellSource(body, f"Cell In[{number}]", 2 + above, os.getcwd())
