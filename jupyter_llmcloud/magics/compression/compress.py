"""%compress and %export: smaller models of one, measured as they are served; and models for other runtimes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class

from jupyter_llmcloud.client.model_work.process import CompressionProcess
from jupyter_llmcloud.client.model_work.texts import kept_texts, texts_of_file
from jupyter_llmcloud.client.stop_signal import said, swallow_more_presses
from jupyter_llmcloud.core.compression.spec import COMPRESS, EXPORT, CompressSpec, ExportSpec
from jupyter_llmcloud.core.compression.table import MeasuredModel, headings, rows
from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.core.options import parse, split
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.output.progress_line import ProgressLine
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import Cell, current_number
from jupyter_llmcloud.protocol.compression import (
    Caption,
    CompressRequest,
    Exported,
    ExportRequest,
    Made,
    MeasureRequest,
    MethodRefused,
    ModelMeasured,
    Trainable,
)
from jupyter_llmcloud.storage.runs import RunStore

AT_ONCE = 8
Tell = Callable[[str], None]
# What a cell makes stays on the ranks: under names that are nobody else's.
DISTILLED = ["distilled_model", "distilled_tokenizer"]
DISTILLATION = """\
from jupyter_llmcloud.training.compression import distillation as _distillation

{names} = _distillation.distill(run, {student!r}, {teacher!r}, {texts!r}, num_steps={steps})
"""


class Compressed:
    """What %compress gives: the models, by what was measured of them.

    Attributes:
        names: of the runs that hold the models, in order.
        refused: reasons by method.
        measured: what was measured, the model as it was first; empty with --no-table.
        table: the same, shown.
        caption: what the figures are of.
    """

    def __init__(self, bound: float) -> None:
        self.names: list[str] = []
        self.refused: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.measured: list[MeasuredModel] = []
        self.caption = ""
        self._bound = bound

    @property
    def table(self) -> Table:
        """Before and after."""
        if self.measured:
            return Table(headings(AT_ONCE), rows(self.measured[0], self.measured[1:], self._bound), "")
        told = [(name, self.notes.get(name, "")) for name in self.names]
        return Table(["model", "made of it"], told, "No model was made.")

    @property
    def lines(self) -> list[str]:
        """What is said below the table."""
        said = [f"{method}: {reason}" for method, reason in self.refused.items()]
        if self.caption:
            said.insert(0, f"{self.caption[0].upper()}{self.caption[1:]}; perplexity may rise by {self._bound:g} %.")
        if self.names:
            said.append(f"%serve {self.names[0]} serves one; %endpoints update NAME {self.names[0]} as a new revision.")
        return [shown(line) for line in said]

    def __repr__(self) -> str:
        return "\n".join([repr(self.table), *self.lines])

    def _repr_html_(self) -> str:
        import html

        return self.table._repr_html_() + "".join(f"<div>{html.escape(line)}</div>" for line in self.lines)


def compress(
    target: str | Path, method: str | Sequence[str], *, progress: Tell | None = None, **options: Any
) -> Compressed:
    """Make smaller models of a run's model or of a folder, as `%compress` does; each is a run that can be served.

    A method that cannot be had of this model is named in `refused`; the others are made. Stop keeps what is made.

    Args:
        target: a run or a folder.
        method: one or several of int8, int4, bf16, prune:RATIO, distill:TEACHER, lora-merge.
        eval, text: also lists of texts.
        progress: told in a few words how far it is.
    """
    words = method if isinstance(method, str) else ",".join(method)
    given = {name: _as_texts(options.pop(name), name) for name in ("eval", "text") if _is_list(options.get(name))}
    spec = CompressSpec.make({"method": words, **options}, Interface.NOTEBOOK).checked()
    tell = progress or (lambda text: None)
    result = Compressed(spec.bound)
    try:
        with ExitStack() as stack:
            _compress(result, str(target), spec, given, tell, stack)
    except KeyboardInterrupt:
        raise _stopped(result) from None
    if not result.names:
        raise LLMCloudError("; ".join(f"{method}: {reason}" for method, reason in result.refused.items()))
    return result


def _stopped(result: Compressed) -> KeyboardInterrupt:
    swallow_more_presses()
    kept = f"What is made stays: {', '.join(result.names)}." if result.names else "Nothing was made."
    return said(f"stopped. {kept}", f"KeyboardInterrupt: stopped. {kept}")


def _compress(
    result: Compressed, target: str, spec: CompressSpec, given: Mapping[str, list[str]], tell: Tell, stack: ExitStack
) -> None:
    held_out, told = (given["eval"], "the texts given") if "eval" in given else _texts(spec.eval, "--eval")
    seen = given["text"] if "text" in given else _texts(spec.text, "--text")[0]
    request = CompressRequest(
        target=_named(target),
        methods=list(spec.method),
        name=spec.name or "",
        base_model=_absolute(spec.base_model),
        texts=stack.enter_context(kept_texts(seen)),
        line=_line(target, spec),
        owner=session.current().owner,
    )
    to_train = []
    with CompressionProcess(request) as process:
        for event in process.events(tell):
            if isinstance(event, Made):
                result.names.append(event.run_id if _is_hidden(event) else event.name)
                result.notes[result.names[-1]] = event.note
            elif isinstance(event, MethodRefused):
                result.refused[event.method] = event.reason
            elif isinstance(event, Trainable):
                to_train.append(event)
                if not request.texts:
                    stack.callback(Path(event.texts).unlink, missing_ok=True)
    for distillation in to_train:
        tell(f"{distillation.method} is trained on the ranks")
        _train(result, distillation, spec)
    if result.names and not spec.no_table:
        _measure(result, request, stack.enter_context(kept_texts(held_out)), told, tell)


def _is_hidden(made: Made) -> bool:
    """Whether another run of this name is newer, so that the name stands for that one."""
    return RunStore().find(made.name).run_id != made.run_id


def _train(result: Compressed, distillation: Trainable, spec: CompressSpec) -> None:
    code = DISTILLATION.format(
        names=", ".join(DISTILLED),
        student=distillation.student,
        teacher=distillation.teacher,
        texts=distillation.texts,
        steps=spec.steps,
    )
    shell = _shell()
    number = current_number(shell)
    cell = Cell(code, code, 0, shell.compile.get_code_name(code, code, number), number)
    try:
        asked = {"nproc": spec.nproc, "name": distillation.name, "save": DISTILLED, "no_replay": True}
        session.current().distribute(shell, cell, asked)
    except LLMCloudError as error:
        result.refused[distillation.method] = f"{error}"
        return
    result.names.append(distillation.name)
    result.notes[distillation.name] = f"{spec.steps} steps of distillation from {distillation.teacher}"


def _measure(result: Compressed, request: CompressRequest, texts: str, told: str, tell: Tell) -> None:
    models = [request.target, *result.names]
    asked = MeasureRequest(models=models, texts=texts, told=told, base_model=request.base_model)
    with CompressionProcess(asked) as process:
        for event in process.events(tell):
            if isinstance(event, ModelMeasured):
                result.measured.append(MeasuredModel(**event.model))
            elif isinstance(event, Caption):
                result.caption = event.text


def _named(target: str) -> str:
    """A run by its name, a folder by its whole path."""
    if NAME_PATTERN.fullmatch(target):
        try:
            RunStore().find(target)
            return target
        except NotFound:
            if not Path(target).is_dir():
                raise
    return _absolute(target)


def _absolute(folder: str | None) -> str:
    return "" if folder is None else str(Path(folder).expanduser().absolute())


def _line(target: str, spec: CompressSpec) -> str:
    named = f" --name {spec.name}" if spec.name else ""
    return f"%compress {shlex.quote(target)} --method {','.join(spec.method)}{named}"


def _texts(given: str | None, option: str) -> tuple[list[str] | None, str]:
    """The texts that an option names, and what they are; (None, "") when it is left out."""
    if given is None:
        return None, ""
    path = Path(given).expanduser()
    if path.is_file():
        return texts_of_file(path), path.name
    variables: Mapping[str, Any] = _shell().user_ns if given.isidentifier() else {}
    if given not in variables:
        raise UsageError(f"{option} {given!r} is neither a file nor a variable of this notebook.")
    return _as_texts(variables[given], option), f"the variable {given}"


def _shell() -> Any:
    from IPython.core.getipython import get_ipython
    from IPython.core.interactiveshell import InteractiveShell

    return get_ipython() or InteractiveShell.instance()


def _is_list(value: Any) -> bool:
    return value is not None and not isinstance(value, str | Path)


def _as_texts(value: Any, option: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
        return list(texts)
    raise UsageError(f"{option} is a text or a list of texts, not {type(value).__name__}.")


def export(target: str | Path, to: str, *, progress: Tell | None = None, **options: Any) -> ExportedModel:
    """Write a run's model or a folder for another runtime, as `%export` does, and compare what that computes.

    Args:
        target: a run or a folder.
        to: onnx, gguf or executorch.
        progress: told in a few words how far it is.
    """
    spec = ExportSpec.make({"to": to, **options}, Interface.NOTEBOOK).checked()
    request = ExportRequest(
        target=_named(str(target)),
        to=str(spec.to),
        out=_absolute(spec.out),
        weights=spec.type,
        base_model=_absolute(spec.base_model),
    )
    try:
        with CompressionProcess(request) as process:
            found = [event for event in process.events(progress or (lambda text: None)) if isinstance(event, Exported)]
    except KeyboardInterrupt:
        swallow_more_presses()
        raise said("stopped. Nothing was written.", "KeyboardInterrupt: stopped. Nothing was written.") from None
    return ExportedModel(found[0].path, found[0].notes)


class ExportedModel:
    """What %export gives.

    Attributes:
        path: of the file.
        notes: how what it computes compares with the model.
    """

    def __init__(self, path: str, notes: Sequence[str]) -> None:
        self.path = path
        self.notes = list(notes)

    def __repr__(self) -> str:
        return "\n".join([shown(self.path), *(f"  {note}" for note in self.notes)])


@magics_class
class CompressMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    @line_magic
    def compress(self, line: str) -> Compressed:
        """%compress TARGET --method int8,prune:0.3: smaller models, with a table of before and after."""
        parsed = parse(COMPRESS, split(line, "%compress"))
        given = {**parsed.given, "method": [word for words in parsed.method for word in words]}
        line_of_progress = ProgressLine()
        result = compress(parsed.arguments[0], given.pop("method"), progress=line_of_progress.tell, **given)
        line_of_progress.tell("")
        return result

    @line_magic
    def export(self, line: str) -> ExportedModel:
        """%export TARGET --to onnx|gguf|executorch: the model for another runtime, compared with it."""
        parsed = parse(EXPORT, split(line, "%export"))
        given = parsed.given
        ExportSpec.make(given, Interface.NOTEBOOK).checked()
        line_of_progress = ProgressLine()
        result = export(parsed.arguments[0], given.pop("to"), progress=line_of_progress.tell, **given)
        line_of_progress.tell("")
        return result
