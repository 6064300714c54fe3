"""What the process that makes and exports models is asked, step by step: for a notebook and the command line."""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from jupyter_llmcloud.client.model_work.process import CompressionProcess
from jupyter_llmcloud.client.model_work.texts import kept_texts, texts_of_file
from jupyter_llmcloud.core.compression.spec import CompressSpec, ExportSpec
from jupyter_llmcloud.core.compression.table import MeasuredModel, headings, rows
from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError
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
_EXPORT = "'jupyter-llmcloud[export]'"
_NEEDED = {  # packages of each format, and how they are installed
    "onnx": dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), _EXPORT),
    "gguf": {"gguf": _EXPORT},
    "executorch": {"executorch": "executorch, made for the torch that is installed"},
}
Tell = Callable[[str], None]
Train = Callable[[str, str], None]  # a source on the ranks, as a run of this name that saves DISTILLED
# What a run makes stays on the ranks: under names that are nobody else's.
DISTILLED = ["distilled_model", "distilled_tokenizer"]
_DISTILLATION = """\
from jupyter_llmcloud.training.compression import distillation as _distillation

{names} = _distillation.distill(run, {student!r}, {teacher!r}, {texts!r}, num_steps={steps})
"""


@dataclass(frozen=True)
class CompressTexts:
    """What models are measured on and learn from; None stands for texts that the model itself writes.

    Attributes:
        told: what the held-out texts are.
    """

    held_out: Sequence[str] | None = None
    told: str = ""
    seen: Sequence[str] | None = None


class CompressedModels:
    """The models that were made, by what was measured of them.

    Attributes:
        names: of the runs that hold the models, in order.
        refused: reasons by method.
        measured: what was measured, the model as it was first; empty with --no-table.
        caption: what the figures are of.
        not_measured: why there are none, where what was made could not be measured.
    """

    def __init__(self, bound: float) -> None:
        self.names: list[str] = []
        self.refused: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.measured: list[MeasuredModel] = []
        self.caption = ""
        self.not_measured = ""
        self.bound = bound

    @property
    def headings(self) -> list[str]:
        """Of the table."""
        return headings(AT_ONCE) if self.measured else ["model", "made of it"]

    @property
    def rows(self) -> list[list[str]]:
        """Before and after; without figures, what was made."""
        if self.measured:
            return [list(row) for row in rows(self.measured[0], self.measured[1:], self.bound)]
        return [[name, self.notes.get(name, "")] for name in self.names]

    @property
    def refusals(self) -> list[str]:
        """The methods that could not be had, each with its reason, which may name it already."""
        return [
            reason if reason.startswith(f"{method}: ") else f"{method}: {reason}"
            for method, reason in self.refused.items()
        ]

    @property
    def lines(self) -> list[str]:
        """What is said below the table: what the figures are of, and what could not be made."""
        said = self.refusals
        if self.not_measured:
            said.append(f"Nothing was measured: {self.not_measured}")
        if self.caption:
            said.insert(0, f"{self.caption[0].upper()}{self.caption[1:]}; perplexity may rise by {self.bound:g} %.")
        return said


def make_models(
    result: CompressedModels,
    target: str,
    spec: CompressSpec,
    texts: CompressTexts,
    owner: str,
    tell: Tell,
    train: Train,
) -> None:
    """Fill `result` as it goes on, so that what is made is known when somebody presses Stop. Raises LLMCloudError."""
    with ExitStack() as stack:
        request = CompressRequest(
            target=named_model(target),
            methods=list(spec.method),
            name=spec.name or "",
            base_model=absolute(spec.base_model),
            texts=stack.enter_context(kept_texts(texts.seen)),
            line=_line(target, spec),
            owner=owner,
        )
        for distillation in _made(result, request, tell, stack):
            tell(f"{distillation.method} is trained on the ranks")
            _distil(result, distillation, spec.steps, train)
        if result.names and not spec.no_table:
            try:
                _measure(result, request, stack.enter_context(kept_texts(texts.held_out)), texts.told, tell)
            except LLMCloudError as error:  # what is made is there, and is told
                result.not_measured = str(error)
    if not result.names:
        raise LLMCloudError("; ".join(result.refusals))


def _made(result: CompressedModels, request: CompressRequest, tell: Tell, stack: ExitStack) -> list[Trainable]:
    """Make what needs no ranks; returns what does."""
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
    return to_train


def _is_hidden(made: Made) -> bool:
    """Whether another run of this name is newer, so that the name stands for that one."""
    return RunStore().find(made.name).run_id != made.run_id


def _distil(result: CompressedModels, distillation: Trainable, steps: int, train: Train) -> None:
    code = _DISTILLATION.format(
        names=", ".join(DISTILLED),
        student=distillation.student,
        teacher=distillation.teacher,
        texts=distillation.texts,
        steps=steps,
    )
    try:
        train(code, distillation.name)
    except LLMCloudError as error:
        result.refused[distillation.method] = f"{error}"
        return
    result.names.append(distillation.name)
    teacher = distillation.method.partition(":")[2] or distillation.teacher
    result.notes[distillation.name] = f"{steps} steps of distillation from {teacher}"


def _measure(result: CompressedModels, request: CompressRequest, texts: str, told: str, tell: Tell) -> None:
    models = [request.target, *result.names]
    asked = MeasureRequest(models=models, texts=texts, told=told, base_model=request.base_model)
    with CompressionProcess(asked) as process:
        for event in process.events(tell):
            if isinstance(event, ModelMeasured):
                result.measured.append(MeasuredModel(**event.model))
            elif isinstance(event, Caption):
                result.caption = event.text


def named_model(target: str) -> str:
    """A run by its name, a folder by its whole path. Raises NotFound."""
    if NAME_PATTERN.fullmatch(target):
        try:
            RunStore().find(target)
            return target
        except NotFound:
            if not Path(target).is_dir():
                raise
    return absolute(target)


def absolute(folder: str | None) -> str:
    """The whole path; "" of none."""
    return "" if folder is None else str(Path(os.path.expanduser(folder)).absolute())


def _line(target: str, spec: CompressSpec) -> str:
    name = f" --name {spec.name}" if spec.name else ""
    return f"%compress {shlex.quote(target)} --method {','.join(spec.method)}{name}"


def texts_at(path: str | None) -> Sequence[str] | None:
    """The texts of a file. Raises UsageError."""
    return None if path is None else texts_of_file(Path(os.path.expanduser(path)))


def _check_installed(to: str) -> None:
    """Before the model is read, which takes its time. The process is one of this Python."""
    for package, how in _NEEDED[to].items():
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"--to {to} needs the package {package}: pip install {how}.")


def export_model(target: str, spec: ExportSpec, tell: Tell) -> Exported:
    """Write it, and compare what the file computes. Raises LLMCloudError, at once when a package is missing."""
    _check_installed(str(spec.to))
    request = ExportRequest(
        target=named_model(target),
        to=str(spec.to),
        out=absolute(spec.out),
        weights=spec.type,
        base_model=absolute(spec.base_model),
    )
    with CompressionProcess(request) as process:
        return next(event for event in list(process.events(tell)) if isinstance(event, Exported))
