"""Ways to make a model smaller, as they are written: `int8`, `prune:0.3`, `distill:TEACHER`, several with commas."""

from __future__ import annotations

from dataclasses import dataclass

from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.core.options import did_you_mean
from jupyter_llmcloud.errors import UsageError

PLAIN = ("int8", "int4", "bf16", "lora-merge")
WITH_VALUE = {"prune": "RATIO", "distill": "TEACHER"}
METHODS = (*PLAIN[:3], *(f"{kind}:{value}" for kind, value in WITH_VALUE.items()), PLAIN[3])


@dataclass(frozen=True)
class CompressionMethod:
    """One way.

    Attributes:
        kind: int8, int4, bf16, prune, distill or lora-merge.
        value: of prune the part of heads and rows that goes; of distill the teacher, a run or a folder.
    """

    kind: str
    value: str = ""

    @classmethod
    def parse(cls, text: str) -> CompressionMethod:
        """`prune:0.3` as a method. Raises UsageError."""
        kind, colon, value = text.strip().partition(":")
        if kind in PLAIN:
            if colon:
                raise UsageError(f"{kind} takes no value, not {value!r}")
            return cls(kind)
        if kind not in WITH_VALUE:
            hint = did_you_mean(kind, (*PLAIN, *WITH_VALUE))
            raise UsageError(f"{text!r} is no method: use {', '.join(METHODS)}.{hint}")
        if not value:
            raise UsageError(f"{kind} needs a value: {kind}:{WITH_VALUE[kind]}")
        method = cls(kind, value)
        if kind == "prune":
            method.ratio  # noqa: B018 - checked
        return method

    @property
    def ratio(self) -> float:
        """Which part goes when a model is pruned."""
        try:
            ratio = float(self.value)
        except ValueError:
            raise UsageError(f"prune:{self.value}: expected a number between 0 and 1, such as prune:0.3") from None
        if not 0 < ratio < 1:
            raise UsageError(f"prune:{self.value}: the part that goes is between 0 and 1, such as prune:0.3")
        return ratio

    @property
    def text(self) -> str:
        """As it is written."""
        return f"{self.kind}:{self.value}" if self.value else self.kind

    @property
    def trains(self) -> bool:
        """Whether the model is trained for it, on the ranks."""
        return self.kind == "distill"

    def name_of(self, source: str) -> str:
        """What the result of a model with this name is called: `NAME-int8`, `NAME-prune-0.3`, `NAME-merged`."""
        suffix = {"prune": f"prune-{self.value}", "lora-merge": "merged"}.get(self.kind, self.kind)
        return f"{source[: 127 - len(suffix)]}-{suffix}"


def parse_methods(text: str) -> list[str]:
    """`int8, prune:0.3` -> those words, each checked. Raises UsageError."""
    words = [part.strip() for part in text.split(",") if part.strip()]
    if not words:
        raise UsageError(f"--method METHOD is missing: one or several of {', '.join(METHODS)}.")
    methods = [CompressionMethod.parse(word).text for word in words]
    if len(set(methods)) < len(methods):
        twice = next(method for method in methods if methods.count(method) > 1)
        raise UsageError(f"{twice} is there twice")
    return methods


def source_name(target: str, named: str) -> str:
    """The name that results are called after: that of the run, or of the folder. Raises UsageError."""
    name = named if NAME_PATTERN.fullmatch(named) else named.strip("-._ ").replace(" ", "-")
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(f"{target!r} gives no name for what is made of it: say --name NAME.")
    return name
