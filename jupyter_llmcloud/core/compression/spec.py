"""What may be asked for when a model is made smaller or exported: every option, defined once."""
# ruff: noqa: RUF009 - option() makes a field

from __future__ import annotations

from dataclasses import dataclass, replace

from jupyter_llmcloud.core.compression.methods import METHODS, parse_methods
from jupyter_llmcloud.core.options import Syntax, integer, number
from jupyter_llmcloud.core.spec import COUNT, NAME, SWITCH, TEXT, Interface, OptionType, Spec, option
from jupyter_llmcloud.errors import UsageError

FORMATS = ("onnx", "gguf", "executorch")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
_WHERE = Interface.NOTEBOOK | Interface.SHELL


@dataclass(frozen=True, kw_only=True)
class CompressSpec(Spec):
    """How a model is made smaller."""

    method: list[str] = option(
        OptionType("METHOD", parse_methods),
        f"One or several of {', '.join(METHODS)}, with commas or repeated; each gives a model of its own.",
        (),
        short="-m",
        interfaces=_WHERE,
    )
    name: str | None = option(
        NAME, "Name of the result, of one method (default: RUN-int8 and so on).", interfaces=_WHERE
    )
    eval: str | None = option(
        TEXT,
        "Held-out text that perplexity is measured on: a file (text, or JSON lines with a field text), or (in a "
        "notebook) a variable with a text or a list of them (default: text that the model itself has written).",
        metavar="FILE|VARIABLE",
        interfaces=_WHERE,
    )
    text: str | None = option(
        TEXT,
        "Text that pruning looks at and distillation learns from, written as --eval is (default: text that the model, "
        "or the teacher, has written).",
        metavar="FILE|VARIABLE",
        interfaces=_WHERE,
    )
    bound: float = option(
        OptionType("PERCENT", number(0)),
        "How much perplexity may rise before the table says that it is too much.",
        5.0,
        interfaces=_WHERE,
    )
    steps: int = option(OptionType("N", integer(1)), "Steps of distillation.", 200, interfaces=_WHERE)
    nproc: int | None = option(COUNT, "Ranks of distillation, when it starts the world.", short="-n", interfaces=_WHERE)
    base_model: str | None = option(
        TEXT,
        "Of a PEFT adapter: the folder of its base model, if it is not where the adapter says.",
        metavar="FOLDER",
        interfaces=_WHERE,
    )
    no_table: bool = option(SWITCH, "Measure nothing.", False, interfaces=_WHERE)

    def checked(self) -> CompressSpec:
        """This one, when its options fit together. Raises UsageError."""
        if not self.method:
            raise UsageError(f"%compress: --method METHOD is missing: one or several of {', '.join(METHODS)}.")
        if self.name is not None and len(self.method) > 1:
            raise UsageError(f"--name {self.name} is for one method, and there are {len(self.method)}.")
        return self


@dataclass(frozen=True, kw_only=True)
class ExportSpec(Spec):
    """How a model is written for another runtime."""

    to: str | None = option(OptionType("FORMAT", values=FORMATS), "What it is written for.", interfaces=_WHERE)
    out: str | None = option(
        TEXT, "The file (default: in the folder of the run, or beside the model).", metavar="FILE", interfaces=_WHERE
    )
    type: str = option(
        OptionType(values=GGUF_TYPES), "Of gguf: the type of the large weights.", "f16", interfaces=_WHERE
    )
    base_model: str | None = option(
        TEXT,
        "Of a PEFT adapter: the folder of its base model, if it is not where the adapter says.",
        metavar="FOLDER",
        interfaces=_WHERE,
    )

    def checked(self) -> ExportSpec:
        """This one, when its options fit together. Raises UsageError."""
        if self.to is None:
            raise UsageError(f"%export: --to FORMAT is missing: one of {', '.join(FORMATS)}.")
        if self.to != "gguf" and self.type != "f16":
            raise UsageError(f"--type {self.type} is for --to gguf only.")
        return self


_COMPRESS_OPTIONS = tuple(
    replace(item, repeat=True) if item.name == "method" else item for item in CompressSpec.options(Interface.NOTEBOOK)
)
COMPRESS = Syntax(
    "%compress",
    _COMPRESS_OPTIONS,
    "TARGET",
    "Make smaller models of a run's model or of a folder, and measure them beside it as they are served.",
    names="what can be served",
)
EXPORT = Syntax(
    "%export",
    ExportSpec.options(Interface.NOTEBOOK),
    "TARGET",
    "Write a run's model or a folder for another runtime, and compare what that computes.",
    names="what can be served",
)
