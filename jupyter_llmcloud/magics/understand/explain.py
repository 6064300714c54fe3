"""%explain: why a model answers so, and how it stands inputs that are changed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class

from jupyter_llmcloud.client.model_work.process import ExplanationProcess
from jupyter_llmcloud.client.model_work.texts import kept_texts
from jupyter_llmcloud.client.stop_signal import said, swallow_more_presses
from jupyter_llmcloud.core.explain.robustness import OutsideInputs, TriedInputs
from jupyter_llmcloud.core.explain.spec import EXPLAIN, ExplainSpec
from jupyter_llmcloud.core.options import parse, split
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.errors import LLMCloudError, UsageError
from jupyter_llmcloud.magics.output.progress_line import ProgressLine
from jupyter_llmcloud.magics.serving.endpoint import Endpoint
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.understand.inputs import array_file, data_file, texts_of, value_named
from jupyter_llmcloud.magics.understand.results import Explanation, Robustness
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


def explain(
    model: str | Path | Endpoint, input: Any = None, *, progress: Tell | None = None, **options: Any
) -> Explanation | Robustness:
    """Say which parts of an input led a model to its answer, as `%explain` does.

    Args:
        model: an endpoint, a run or a folder.
        input: a text; of a classifier of images a file or an image, of a module an array.
        adversarial: also a list of texts, of rows with `text` and `label`, or a pair (inputs, labels).
        outside: also a list of texts.
        progress: told in a few words how far it is.
    """
    beside = {name: options.pop(name) for name in ("adversarial", "outside") if _is_value(options.get(name))}
    written = {**options, **{name: name for name in beside}}
    spec = ExplainSpec.make(written, Interface.NOTEBOOK).checked(input is not None)
    target, base = _target(model, spec)
    try:
        with ExitStack() as stack:
            if spec.adversarial is None:
                return _explained(target, base, input, spec, progress, stack)
            return _tried(target, base, beside, spec, progress, stack)
    except KeyboardInterrupt:
        swallow_more_presses()
        raise said("stopped.", "KeyboardInterrupt: stopped.") from None


def _is_value(given: Any) -> bool:
    return given is not None and not isinstance(given, str | Path)


def _explained(
    target: str, base: str, given: Any, spec: ExplainSpec, progress: Tell | None, stack: ExitStack
) -> Explanation:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmcloud-explain-")))
    text, file = (given, "") if isinstance(given, str) else ("", array_file(given, folder))
    if text and _is_file_of_image(text):
        text, file = "", str(Path(text).expanduser().absolute())
    if not text and not file:
        raise UsageError("%explain: the text is empty.")
    request = ExplainRequest(
        target=target,
        text=text,
        file=file,
        num_new=spec.new,
        answer=spec.answer or "",
        label=spec.label or "",
        method=spec.method or "",
        base_model=base,
    )
    with ExplanationProcess(request) as process:
        events = list(process.events(progress or (lambda text: None)))
    model = next(event for event in events if isinstance(event, ExplainedModel))
    return Explanation(model, [event for event in events if isinstance(event, Attribution)])


_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".npy")


def _is_file_of_image(text: str) -> bool:
    """A prompt is hardly ever the name of an image that is there."""
    return text.lower().endswith(_IMAGES) and "\n" not in text and Path(text).expanduser().is_file()


def _tried(
    target: str, base: str, beside: Mapping[str, Any], spec: ExplainSpec, progress: Tell | None, stack: ExitStack
) -> Robustness:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmcloud-explain-")))
    rows, told = data_file(beside.get("adversarial", spec.adversarial), folder)
    outside = None if spec.outside is None else texts_of(beside.get("outside", spec.outside), "--outside")
    request = TryRequest(
        target=target,
        rows=rows,
        told=told,
        outside=stack.enter_context(kept_texts(outside)),
        num_rows=spec.rows,
        seed=spec.seed,
        base_model=base,
    )
    with ExplanationProcess(request) as process:
        events = list(process.events(progress or (lambda text: None)))
    model = next(event for event in events if isinstance(event, TriedModel))
    found = [event for event in events if isinstance(event, TriedChange)]
    return Robustness(
        model,
        [TriedInputs(**event.row) for event in found if not event.is_outside],
        [OutsideInputs(**event.row) for event in found if event.is_outside],
    )


def _target(model: str | Path | Endpoint, spec: ExplainSpec) -> tuple[str, str]:
    """What the process is told: a run or a folder, and the base model of an adapter. An endpoint is what it serves."""
    base = "" if spec.base_model is None else str(Path(spec.base_model).expanduser().absolute())
    name = model.name if isinstance(model, Endpoint) else str(model)
    served = _served(name)
    if served is not None:
        return _folder_as_run(str(served["model"])), base or str(served.get("base_model") or "")
    if isinstance(model, Endpoint):
        raise UsageError(f"%explain {name}: the endpoint is not known to the server any more.")
    if Path(name).expanduser().is_dir() and not any(
        name in (record.name, record.run_id) for record in RunStore().list()
    ):
        return str(Path(name).expanduser().absolute()), base
    return name, base


def _served(name: str) -> Mapping[str, Any] | None:
    """The endpoint of this name; None when there is none, or no server that could have it."""
    server = session.current().known_server
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


@magics_class
class ExplainMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    @line_magic
    def explain(self, line: str) -> Explanation | Robustness:
        """%explain MODEL "text": which parts of it led to the answer; %explain MODEL --adversarial DATA: a table."""
        parsed = parse(EXPLAIN, split(line, "%explain"))
        variables: Mapping[str, Any] = self.shell.user_ns if self.shell is not None else {}
        given = parsed.given
        model, *words = parsed.arguments
        if words and "input" in given:
            raise UsageError(
                f"%explain: {words[0]!r} and --input {given['input']} are both what is asked: leave one out."
            )
        asked: Any = " ".join(words) or None
        if "input" in given:
            asked = value_named(given.pop("input"), variables, "--input")
        served = variables.get(model)
        for name in ("adversarial", "outside"):
            if name in given and not Path(given[name]).expanduser().exists():
                value = value_named(given[name], variables, f"--{name}")
                given[name] = [value] if isinstance(value, str) else value
        line_of_progress = ProgressLine()
        result = explain(
            served if isinstance(served, Endpoint) else model, asked, progress=line_of_progress.tell, **given
        )
        line_of_progress.tell("")
        return result
