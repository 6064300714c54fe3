"""What may be asked for when an answer of a model is explained: every option, defined once."""

from __future__ import annotations

from dataclasses import dataclass

from jupyter_llmcloud.core.names import whole_number
from jupyter_llmcloud.core.options import Syntax, integer
from jupyter_llmcloud.core.spec import COUNT, TEXT, Interface, OptionType, Spec, option
from jupyter_llmcloud.errors import UsageError

METHODS = ("integrated-gradients", "ablation")
_HERE = Interface.NOTEBOOK
_BOTH = Interface.NOTEBOOK | Interface.SHELL


@dataclass(frozen=True, kw_only=True)
class ExplainSpec(Spec):
    """How an answer is explained, or what a model is tried with."""

    input: str | None = option(
        OptionType("VARIABLE", names="variables"),
        "A variable with the text, image or array, in place of INPUT.",
        interfaces=_HERE,
    )
    new: int = option(
        COUNT, "Of a model that generates: how many tokens it goes on, each of them explained.", 1, interfaces=_BOTH
    )
    answer: str | None = option(
        TEXT, "Of a model that generates: explain this continuation in place of its own.", interfaces=_BOTH
    )
    label: str | None = option(
        OptionType("LABEL"), "Of a classifier: the class that is explained (default: the likeliest).", interfaces=_BOTH
    )
    method: str | None = option(
        OptionType(values=METHODS),
        "How: by the gradient on the way from an input that says nothing, or by what changes without each part "
        "(default: the first, where the model has gradients).",
        interfaces=_BOTH,
    )
    adversarial: str | None = option(
        TEXT,
        "Explain nothing: ask the model this data as it is, then with typos, noise and the like, and text of another "
        "kind. JSON lines with text and label, a text, a folder of images with a folder for each class, or (in a "
        "notebook) a variable.",
        metavar="DATA",
        interfaces=_BOTH,
    )
    outside: str | None = option(
        TEXT,
        "With --adversarial: the text of another kind (default: some that is here).",
        metavar="FILE|VARIABLE",
        interfaces=_BOTH,
    )
    rows: int = option(
        OptionType("N", integer(10)), "With --adversarial: how many rows of the data at most.", 200, interfaces=_BOTH
    )
    seed: int = option(OptionType("N", whole_number), "With --adversarial: of what is changed.", 0, interfaces=_BOTH)
    base_model: str | None = option(
        TEXT,
        "Of a PEFT adapter: the folder of its base model, if it is not where the adapter says.",
        metavar="FOLDER",
        interfaces=_BOTH,
    )

    def checked(self, has_input: bool) -> ExplainSpec:
        """This one, when its options fit together; `has_input`: something to be asked was given. Raises UsageError."""
        if self.adversarial is None:
            if self.outside is not None:
                raise UsageError("%explain: --outside is for --adversarial DATA.")
            if not has_input:
                raise UsageError(
                    "%explain: what is the model asked? Give a text, an image or --input VARIABLE; or "
                    "--adversarial DATA."
                )
        elif has_input:
            raise UsageError("%explain: --adversarial DATA is instead of an input: leave one of both out.")
        elif given := [name for name in ("answer", "label", "method") if getattr(self, name) is not None]:
            raise UsageError(f"%explain: --{given[0]} is not for --adversarial.")
        if self.answer is not None and self.new != 1:
            raise UsageError(
                "%explain: --new is how many tokens the model chooses, and --answer says which: leave one out."
            )
        return self


EXPLAIN = Syntax(
    "%explain",
    ExplainSpec.options(_HERE),
    "MODEL [INPUT...]",
    "Which parts of an input led a model to its answer; or how it answers when inputs are changed (--adversarial).",
    names="what can be explained",
)
