"""%compress and %export: smaller models of one, measured as they are served; and models for other runtimes."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class

from jupyter_llmcloud.client.model_work.compressing import (
    DISTILLED,
    CompressedModels,
    CompressTexts,
    export_model,
    make_models,
)
from jupyter_llmcloud.client.model_work.texts import named_file, texts_of_file
from jupyter_llmcloud.client.stop_signal import said, swallow_more_presses
from jupyter_llmcloud.core.compression.spec import COMPRESS, EXPORT, CompressSpec, ExportSpec
from jupyter_llmcloud.core.options import parse, split
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.output.progress_line import ProgressLine
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import Cell, current_number
from jupyter_llmcloud.magics.session.run_handle import RunHandle, named

Tell = Callable[[str], None]


class Compressed(CompressedModels):
    """What %compress gives, shown in a cell."""

    @property
    def table(self) -> Table:
        """Before and after."""
        return Table(self.headings, self.rows, "No model was made.")

    @property
    def lines(self) -> list[str]:
        """What is said below the table."""
        said = list(super().lines)
        if self.names:
            said.append(f"%serve {self.names[0]} serves one; %endpoints update NAME {self.names[0]} as a new revision.")
        return [shown(line) for line in said]

    def __repr__(self) -> str:
        return "\n".join([repr(self.table), *self.lines])

    def _repr_html_(self) -> str:
        return self.table._repr_html_() + "".join(f"<div>{html.escape(line)}</div>" for line in self.lines)


def compress(
    target: str | Path | RunHandle, method: str | Sequence[str], *, progress: Tell | None = None, **options: Any
) -> Compressed:
    """Make smaller models of a run's model or of a folder, as `%compress` does; each is a run that can be served.

    A method that cannot be had of this model is named in `refused`; the others are made. Stop keeps what is made.

    Args:
        target: a run (its name, its id or its handle) or a folder.
        method: one or several of int8, int4, bf16, prune:RATIO, distill:TEACHER, lora-merge.
        eval, text: also lists of texts.
        progress: told in a few words how far it is.
    """
    words = method if isinstance(method, str) else ",".join(method)
    given = {name: _as_texts(options.pop(name), name) for name in ("eval", "text") if _is_list(options.get(name))}
    spec = CompressSpec.make({"method": words, **options}, Interface.NOTEBOOK).checked()
    held_out, told = (given["eval"], "the texts given") if "eval" in given else _texts(spec.eval, "--eval")
    texts = CompressTexts(held_out, told, given["text"] if "text" in given else _texts(spec.text, "--text")[0])
    result = Compressed(spec.bound)

    def train(code: str, name: str) -> None:
        _distribute(code, {"nproc": spec.nproc, "name": name, "save": DISTILLED, "no_replay": True})

    try:
        make_models(result, named(target), spec, texts, session.current().owner, progress or (lambda text: None), train)
    except KeyboardInterrupt:
        raise _stopped(result) from None
    return result


def _stopped(result: Compressed) -> KeyboardInterrupt:
    swallow_more_presses()
    kept = f"What is made stays: {', '.join(result.names)}." if result.names else "Nothing was made."
    return said(f"stopped. {kept}", f"KeyboardInterrupt: stopped. {kept}")


def _distribute(code: str, options: dict[str, Any]) -> None:
    """Execute a cell of ours on the ranks of this notebook. Raises LLMCloudError."""
    shell = _shell()
    number = current_number(shell)
    cell = Cell(code, code, 0, shell.compile.get_code_name(code, code, number), number)
    session.current().distribute(shell, cell, options)


def _texts(given: str | None, option: str) -> tuple[list[str] | None, str]:
    """The texts that an option names, and what they are; (None, "") when it is left out."""
    if given is None:
        return None, ""
    if (path := named_file(given)) is not None:
        return texts_of_file(path), path.name
    variables: Mapping[str, Any] = _shell().user_ns if given.isidentifier() else {}
    if given not in variables:
        raise UsageError(f"{option} {given[:200]!r} is neither a file nor a variable of this notebook.")
    return _as_texts(variables[given], option), f"the variable {given}"


def _shell() -> Any:
    from IPython.core.getipython import get_ipython
    from IPython.core.interactiveshell import InteractiveShell

    return get_ipython() or InteractiveShell.instance()


def _is_list(value: Any) -> bool:
    return value is not None and not isinstance(value, str | Path)


def _as_texts(value: Any, option: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{option} is a text or a list of texts, not {type(value).__name__}.")
    if not any(text.strip() for text in texts):
        raise UsageError(f"{option}: there is no text in what was given.")
    return list(texts)


def export(target: str | Path | RunHandle, to: str, *, progress: Tell | None = None, **options: Any) -> ExportedModel:
    """Write a run's model or a folder for another runtime, as `%export` does, and compare what that computes.

    Args:
        target: a run (its name, its id or its handle) or a folder.
        to: onnx, gguf or executorch.
        progress: told in a few words how far it is.
    """
    spec = ExportSpec.make({"to": to, **options}, Interface.NOTEBOOK).checked()
    try:
        found = export_model(named(target), spec, progress or (lambda text: None))
    except KeyboardInterrupt:
        swallow_more_presses()
        raise said("stopped. Nothing was written.", "KeyboardInterrupt: stopped. Nothing was written.") from None
    return ExportedModel(found.path, found.notes)


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
