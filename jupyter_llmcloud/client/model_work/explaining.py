"""What the process that explains models is asked, and what it answers: for a notebook, Python and the command line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud.client.model_work.inputs import array_file, data_file, texts_of
from jupyter_llmcloud.client.model_work.process import ExplanationProcess
from jupyter_llmcloud.client.model_work.texts import kept_texts, named_file
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.core.explain.robustness import OutsideInputs, TriedInputs
from jupyter_llmcloud.core.explain.spec import ExplainSpec
from jupyter_llmcloud.errors import LLMCloudError, UsageError
from jupyter_llmcloud.protocol.explanation import (
    Attribution,
    ExplainedModel,
    ExplainRequest,
    TriedChange,
    TriedModel,
    TryRequest,
)
from jupyter_llmcloud.storage.runs import RunStore

Tell = Callable[[str], None]
_PATIENCE_S = 5.0
_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".npy")


@dataclass(frozen=True)
class ExplainTarget:
    """What is explained: a run or a folder, and the base model when it is an adapter."""

    model: str
    base_model: str = ""


def find_target(
    name: str, base_model: str | None, server: ServerClient | None, *, is_endpoint: bool = False
) -> ExplainTarget:
    """The endpoint of this name is what it serves now; else, unless it must be one, a folder or a run.

    Raises UsageError.
    """
    base = "" if base_model is None else str(Path(os.path.expanduser(base_model)).absolute())
    if (served := _served(name, server)) is not None:
        return ExplainTarget(_folder_as_run(str(served["model"])), base or str(served.get("base_model") or ""))
    if is_endpoint:
        raise UsageError(f"%explain {name}: the endpoint is not known to the server any more.")
    is_run = any(name in (record.name, record.run_id) for record in RunStore().list())
    if Path(os.path.expanduser(name)).is_dir() and not is_run:
        return ExplainTarget(str(Path(os.path.expanduser(name)).absolute()), base)
    return ExplainTarget(name, base)


def _served(name: str, server: ServerClient | None) -> Mapping[str, Any] | None:
    """The endpoint of this name; None when there is none, or no server that could have it."""
    if server is None:
        return None
    try:
        endpoints = server.ask("GET", "endpoints", timeout_s=_PATIENCE_S)["endpoints"]
    except (LLMCloudError, OSError):
        return None
    found = next((row for row in endpoints if row["name"] == name), None)
    if found is not None and (found["kind"] == "python" or not Path(found["model"]).is_dir()):
        raise UsageError(
            f"%explain {name}: the endpoint serves {found['target'] or 'code'}, which is no folder with weights here. "
            "Explained are models of runs and folders."
        )
    return found


def _folder_as_run(folder: str) -> str:
    """The id of the run that a folder belongs to, whose own architecture may then be used; else the folder."""
    runs = RunStore().path.resolve()
    path = Path(folder).resolve()
    if runs in path.parents:
        run = path.relative_to(runs).parts[0]
        if (RunStore().folder(run).model).resolve() == path:
            return run
    return folder


def ask_scores(
    target: ExplainTarget, given: Any, spec: ExplainSpec, tell: Tell
) -> tuple[ExplainedModel, list[Attribution]]:
    """Which parts of an input led to the answer: a text, a file of an image, an image, an array."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmcloud-explain-")))
        text, file = (given, "") if isinstance(given, str) else ("", array_file(given, folder))
        if text.lower().endswith(_IMAGES) and (image := named_file(text)) is not None:
            text, file = "", str(image.absolute())
        if not text and not file:
            raise UsageError("%explain: the text is empty.")
        request = ExplainRequest(
            target=target.model,
            text=text,
            file=file,
            num_new=spec.new,
            answer=spec.answer or "",
            label=spec.label or "",
            method=spec.method or "",
            base_model=target.base_model,
        )
        with ExplanationProcess(request) as process:
            events = list(process.events(tell))
    model = next(event for event in events if isinstance(event, ExplainedModel))
    return model, [event for event in events if isinstance(event, Attribution)]


def ask_robustness(
    target: ExplainTarget, data: Any, outside: Any, spec: ExplainSpec, tell: Tell
) -> tuple[TriedModel, Sequence[TriedInputs], Sequence[OutsideInputs]]:
    """How a model answers `data` when they are changed, and inputs of another kind (None: those that are here)."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmcloud-explain-")))
        rows, told = data_file(data, folder)
        request = TryRequest(
            target=target.model,
            rows=rows,
            told=told,
            outside=stack.enter_context(kept_texts(None if outside is None else texts_of(outside, "--outside"))),
            num_rows=spec.rows,
            seed=spec.seed,
            base_model=target.base_model,
        )
        with ExplanationProcess(request) as process:
            events = list(process.events(tell))
    model = next(event for event in events if isinstance(event, TriedModel))
    found = [event for event in events if isinstance(event, TriedChange)]
    return (
        model,
        [TriedInputs(**event.row) for event in found if not event.is_outside],
        [OutsideInputs(**event.row) for event in found if event.is_outside],
    )
