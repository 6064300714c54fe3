"""How a model is spread over the ranks of a run: the plan that `--plan` names, its mesh, and what it is refused for.

    ddp | fsdp | hsdp:GxR | tp:N | tp+fsdp[:N] | pipeline:N | local-sgd:K | diloco:K | async-ps[:K]

After the name may follow options with commas: `diloco:30,fragments=2,bits=8`. Ranks are laid out row by row, the last
dimension of the mesh fastest, so that ranks which talk most are neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.errors import UsageError

COMPRESSIONS = ("fp16", "bf16", "powersgd")  # of gradients
APART = ("local-sgd", "diloco", "async-ps")  # replicas that differ between two exchanges


@dataclass(frozen=True)
class _Setting:
    """An option of a plan: its default, how it is read, what it takes in words."""

    default: Any
    parse: Callable[[str], Any]
    takes: str


def _count(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < minimum:
            raise ValueError
        return int(text)

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def _one_of(values: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text not in values:
            raise ValueError
        return values[text]

    return parse


_YES_NO = _one_of({"yes": True, "no": False})
_NAMES = "class names joined by +"
_OF_SHARDING = {
    "wrap": _Setting((), lambda text: tuple(filter(None, text.split("+"))), _NAMES),
    "min-params": _Setting(0, _count(1), "a whole number"),
    "reshard": _Setting(True, _YES_NO, "yes or no"),
    "offload": _Setting(False, _YES_NO, "yes or no"),
    "recompute": _Setting(False, _YES_NO, "yes or no"),
}
_SETTINGS: dict[str, dict[str, _Setting]] = {
    "ddp": {},
    "fsdp": _OF_SHARDING,
    "hsdp": _OF_SHARDING,
    "tp": {},
    "tp+fsdp": _OF_SHARDING,
    "pipeline": {"microbatches": _Setting(0, _count(1), "a whole number")},
    "local-sgd": {},
    "diloco": {
        "fragments": _Setting(1, _count(1), "a whole number"),
        "delay": _Setting(0, _count(0), "a whole number of steps"),
        "bits": _Setting(32, _one_of({"8": 8, "32": 32}), "8 or 32"),
        "outer-lr": _Setting(0.7, _number(1e-6, 10), "a number"),
        "momentum": _Setting(0.9, _number(0, 0.999), "a number from 0 to 0.999"),
    },
    "async-ps": {
        "servers": _Setting(1, _count(1), "a whole number of ranks"),
        "staleness": _Setting(2, _count(0), "a whole number of rounds"),
        "outer-lr": _Setting(1.0, _number(1e-6, 10), "a number"),
        "momentum": _Setting(0.5, _number(0, 0.999), "a number from 0 to 0.999"),
    },
}
_ROUND = 8  # steps of the fastest worker's round of async-ps, unless they are given
_SHAPES = {
    "hsdp": "hsdp:GxR: G groups that hold the whole model, of R ranks each",
    "tp": "tp:N: each layer over N ranks",
    "pipeline": "pipeline:N: N stages",
    "local-sgd": "local-sgd:K: parameters are averaged every K steps",
    "diloco": "diloco:K: an outer step every K steps",
    "async-ps": "async-ps:K: the fastest worker exchanges with the parameter server every K steps",
}
_USAGE = "ddp, fsdp, hsdp:GxR, tp:N, tp+fsdp, pipeline:N, local-sgd:K, diloco:K, async-ps:K"


@dataclass(frozen=True)
class ParallelPlan:
    """One plan.

    Attributes:
        kind: its name.
        sizes: the numbers behind the colon.
        settings: its options, defaults included.
    """

    kind: str = "ddp"
    sizes: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """How it is written."""
        name = self.kind + (":" + "x".join(map(str, self.sizes)) if self.sizes else "")
        own = _SETTINGS[self.kind]
        changed = {key: value for key, value in self.settings.items() if value != own[key].default}
        return ",".join([name, *(f"{key}={_as_text(value)}" for key, value in changed.items())])

    def mesh(self, world_size: int) -> dict[str, int]:
        """The dimensions of its mesh, outermost first. Raises UsageError when the world does not fit."""
        match self.kind:
            case "hsdp":
                groups, ranks = self.sizes
                self._needs(groups * ranks, world_size)
                return {"replicate": groups, "shard": ranks}
            case "tp":
                self._needs(self.sizes[0], world_size, f"tp+fsdp:{self.sizes[0]}")
                return {"tp": self.sizes[0]}
            case "tp+fsdp":
                (size,) = self.sizes
                if world_size < 2 * size or world_size % size:
                    raise UsageError(
                        f"--plan {self.text} needs a multiple of {size} ranks, {2 * size} or more; this world has "
                        f"{world_size}. {_resize(2 * size)}"
                    )
                return {"shard": world_size // size, "tp": size}
            case "pipeline":
                self._needs(self.sizes[0], world_size)
                return {"stage": self.sizes[0]}
            case "async-ps" if self.settings["servers"] > world_size:
                raise UsageError(
                    f"--plan {self.text}: {self.settings['servers']} ranks are to hold the parameters, and this world "
                    f"has {world_size}. {_resize(self.settings['servers'])}"
                )
        return {"rank": world_size}

    def num_data_ranks(self, world_size: int) -> int:
        """How many ranks get data of their own; those beside them in the mesh get the same."""
        mesh = self.mesh(world_size)
        return world_size // (mesh.get("tp", 1) * mesh.get("stage", 1))

    def _needs(self, wanted: int, world_size: int, instead: str = "") -> None:
        if world_size == wanted:
            return
        hint = f" For more ranks say --plan {instead}." if instead and world_size > wanted else ""
        raise UsageError(
            f"--plan {self.text} needs {wanted} ranks, this world has {world_size}. {_resize(wanted)}{hint}"
        )


def _resize(size: int) -> str:
    return f"Start one with -n {size}, or resize it: %world resize {size}."


@functools.lru_cache(maxsize=64)  # every rank asks several times a cell
def parse_plan(text: str) -> ParallelPlan:
    """Read a plan. Raises UsageError that says what is wrong with which part of it."""
    head, *rest = (part.strip() for part in text.strip().split(","))
    kind, colon, sizes = head.partition(":")
    kind = kind.lower()
    if kind not in _SETTINGS:
        import difflib  # what every process holds is small

        close = difflib.get_close_matches(kind, list(_SETTINGS), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(f"--plan {text!r}: there is no plan {kind!r}. Choose one of {_USAGE}.{hint}")
    return ParallelPlan(kind, _sizes(kind, sizes if colon else None, text), _settings(kind, rest, text))


def check(plan: str, compression: str, ranks: int, world_size: int) -> None:
    """Raise UsageError when ranks of a world cannot carry out what a run asks for."""
    asked = parse_plan(plan or "ddp")
    if asked.kind == "ddp":
        return
    if compression not in ("", "no"):
        raise UsageError(
            f"--compress-gradients {compression} is for --plan ddp: {asked.text} sends no gradients that it could "
            "compress. Leave one of both out" + (" (diloco has bits=8)." if asked.kind == "diloco" else ".")
        )
    if ranks != world_size:
        raise UsageError(
            f"--plan {asked.text} is over all {world_size} ranks of the world, and --ranks names {ranks}. "
            "Leave --ranks out."
        )
    asked.mesh(world_size)


def check_balance(is_asked: bool, plan: str, ranks: int, world_size: int) -> None:
    """Raise UsageError when `--balance` is asked for where it is not possible."""
    if not is_asked:
        return
    asked = parse_plan(plan or "ddp")
    if asked.kind != "ddp":
        raise UsageError(
            f"--balance is for --plan ddp: under {asked.text} ranks do not average gradients that could be weighed by "
            "rows. Leave one of both out."
        )
    if ranks != world_size:
        raise UsageError(
            f"--balance is over all {world_size} ranks of the world, and --ranks names {ranks}. Leave --ranks out."
        )


def dispensable(plan: str, ranks: Sequence[int], may_restart: bool) -> frozenset[int]:
    """The ranks of a run that the others go on without when one dies; where it may restart, the run does that."""
    asked = parse_plan(plan or "ddp")
    if asked.kind != "async-ps" or may_restart:
        return frozenset()
    return frozenset(ranks[max(1, asked.settings["servers"]) :])


def normalised(text: str) -> str:
    """A plan as it is written in a record. Raises UsageError."""
    return parse_plan(text).text


def _sizes(kind: str, given: str | None, text: str) -> tuple[int, ...]:
    if given is None:
        if kind == "async-ps":
            return (_ROUND,)
        if kind in _SHAPES:
            raise UsageError(f"--plan {text!r}: a number is missing, as in {_SHAPES[kind]}.")
        return (2,) if kind == "tp+fsdp" else ()
    if kind in ("ddp", "fsdp"):
        raise UsageError(f"--plan {text!r}: {kind} takes no number; it is over all ranks of the world.")
    parts = given.lower().split("x")
    minimum = 1 if kind in (*APART, "hsdp") else 2
    if len(parts) != (2 if kind == "hsdp" else 1) or not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"--plan {text!r}: after the colon a number is expected, as in {_SHAPES.get(kind, kind)}.")
    numbers = tuple(map(int, parts))
    if min(numbers) < minimum:
        raise UsageError(f"--plan {text!r}: expected at least {minimum}, not {min(numbers)}.")
    return numbers


def _settings(kind: str, given: list[str], text: str) -> dict[str, Any]:
    known = _SETTINGS[kind]
    found = {name: setting.default for name, setting in known.items()}
    for part in given:
        name, _, value = part.partition("=")
        if name not in known:
            allowed = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UsageError(f"--plan {text!r}: {kind} has no option {name!r}; {allowed}.")
        try:
            found[name] = known[name].parse(value)
        except ValueError:
            raise UsageError(f"--plan {text!r}: {name} takes {known[name].takes}, not {value!r}.") from None
    if kind == "diloco":
        _check_fragments(found, text)
    return found


def _check_fragments(settings: dict[str, Any], text: str) -> None:
    every = int(text.partition(":")[2].partition(",")[0])
    fragments, delay = settings["fragments"], settings["delay"]
    if fragments > every:
        raise UsageError(f"--plan {text!r}: {every} steps have no room for {fragments} fragments, one of them a step.")
    if delay >= every // fragments:
        raise UsageError(
            f"--plan {text!r}: a delay of {delay} steps is no shorter than the {every // fragments} steps until the "
            "next fragment is sent."
        )


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "+".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
