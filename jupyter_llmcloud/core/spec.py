"""What may be asked for when a run, a world or an endpoint is started: every option, defined once.

The magics and their Python twins, the REST routes, the command line, completion, help and the table in the README are
derived from these classes; the record of a run keeps its RunSpec.
"""
# ruff: noqa: RUF009 - option() makes a field

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Self

from jupyter_llmcloud.core.detect.run_detectors import parse_policies
from jupyter_llmcloud.core.names import (
    check_name,
    parse_arguments,
    parse_duration,
    parse_elastic,
    parse_kept,
    parse_ranges,
    parse_replicas,
    parse_script_file,
    parse_size,
    parse_variable_name,
    parse_variables,
    whole_number,
)
from jupyter_llmcloud.core.options import Option, Syntax, did_you_mean, integer, number
from jupyter_llmcloud.core.parallel.accelerate_config import parse_content
from jupyter_llmcloud.core.parallel.plan import COMPRESSIONS, normalised
from jupyter_llmcloud.core.serving.models.engine_names import parse_engine, parse_variable
from jupyter_llmcloud.core.trackers import parse_trackers
from jupyter_llmcloud.errors import UsageError


class Interface(enum.Flag):
    """Where something is started from."""

    NOTEBOOK = enum.auto()  # the magic and its Python twin
    SHELL = enum.auto()
    REST = enum.auto()
    ANY = NOTEBOOK | SHELL | REST


@dataclass(frozen=True)
class OptionType:
    """A kind of value: what stands for it in the help, and how it is read."""

    metavar: str = ""
    parse: Callable[[str], Any] = str
    values: tuple[str, ...] = ()
    names: str = ""  # as in Option
    is_command_line: bool = False  # as in Option


SWITCH = OptionType()
TEXT = OptionType("TEXT")
NAME = OptionType("NAME", lambda text: check_name(text, "--name"))
COUNT = OptionType("N", integer(1))
COUNT_OR_NONE = OptionType("N", integer(0))
TIMES = OptionType("K", integer(0))
SIZE = OptionType("SIZE", parse_size)
PRIORITY = OptionType("N", whole_number)
REPLICAS = OptionType("K|MIN:MAX", parse_replicas)
DURATION = OptionType("TIME", parse_duration)
KEPT = OptionType("TIME", parse_kept)
ARGUMENTS = OptionType('"ARGS"', parse_arguments, is_command_line=True)
VARIABLES = OptionType("a,b", parse_variables, names="variables of ranks")
OWN_VARIABLES = OptionType("a,b", parse_variables, names="variables")
CLUSTER = OptionType("NAME", NAME.parse, names="clusters")
RUN_NAME = OptionType("RUN", names="runs")
ENGINE = OptionType("ENGINE", parse_engine, names="engines")
CLUSTER_KINDS = ("local", "cuda", "ssh", "slurm", "pbs", "lsf", "sge", "htcondor", "oar", "kubernetes")


_PRIORITY_OF_RANKS = (
    "When it starts the world: who gets slots that others wait for, too: a higher number first (0). Endpoints with a "
    "lower one give back what they have beyond their least replicas."
)


def option(
    kind: OptionType,
    help: str,
    default: Any = None,
    *,
    short: str = "",
    metavar: str = "",
    interfaces: Interface = Interface.ANY,
    resumes: bool = False,
) -> Any:
    """A field of a spec that is an option: its long flag is the field's name.

    Args:
        kind: of its value.
        help: one sentence.
        default: when it is left out.
        short: a flag of one letter.
        metavar: in place of the kind's own.
        interfaces: where there is this option.
        resumes: whether a run that resumes an earlier one has it from there, unless it says otherwise.
    """
    about = {
        "kind": kind,
        "help": help,
        "short": short,
        "metavar": metavar,
        "interfaces": interfaces,
        "resumes": resumes,
    }
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Options with their values."""

    @classmethod
    @cache
    def options(cls, interface: Interface = Interface.ANY) -> tuple[Option, ...]:
        """Those that there are at a interface, in order."""
        return tuple(_as_option(item) for item in fields(cls) if item.metadata["interfaces"] & interface)

    @classmethod
    @cache
    def _by_name(cls, interface: Interface = Interface.ANY) -> dict[str, Option]:
        return {option.name: option for option in cls.options(interface)}

    @classmethod
    def make(cls, given: Mapping[str, Any], interface: Interface = Interface.ANY) -> Self:
        """Checked values by name; None or an empty list is left out. Raises UsageError that names the option."""
        known = cls._by_name(interface)
        if unknown := [name for name in given if name not in known]:
            hint = did_you_mean(unknown[0], known)
            raise UsageError(f"there is no option {unknown[0]!r} here.{hint} Allowed: {', '.join(known)}.")
        said = {name: value for name, value in given.items() if not (value is None or _is_empty(value))}
        return cls(**{name: known[name].check(value) for name, value in said.items()})

    @classmethod
    def restore(cls, kept: Mapping[str, Any]) -> Self:
        """What `as_dict` gave, also in another version: what is not known any more is left out."""
        known = cls._by_name()
        return cls(**{name: known[name].check(value) for name, value in kept.items() if name in known})

    @classmethod
    @cache
    def _defaults(cls) -> dict[str, Any]:
        return {item.name: item.default for item in fields(cls)}

    def as_dict(self) -> dict[str, Any]:
        """What differs from the defaults, in values that JSON can carry."""
        defaults = self._defaults()
        return {name: value for name, value in vars(self).items() if value != defaults[name]}


def _is_empty(value: Any) -> bool:
    return isinstance(value, list | tuple) and not value


def _as_option(item: Any) -> Option:
    about = item.metadata
    kind: OptionType = about["kind"]
    long = "--" + item.name.replace("_", "-")
    return Option(
        (about["short"], long) if about["short"] else (long,),
        about["help"],
        values=kind.values,
        metavar=about["metavar"] or kind.metavar,
        parse=kind.parse,
        default=item.default,
        resumes=about["resumes"],
        names=kind.names,
        is_command_line=kind.is_command_line,
    )


@dataclass(frozen=True, kw_only=True)
class WorldSpec(Spec):
    """The ranks on which runs are executed."""

    nproc: int | None = option(COUNT, "Number of ranks: one per GPU when left out, two on a CPU.", short="-n")
    cluster: str | None = option(CLUSTER, "The cluster to start it on.")
    priority: int = option(PRIORITY, _PRIORITY_OF_RANKS, 0)


@dataclass(frozen=True, kw_only=True)
class RunSpec(Spec):
    """How a source text is executed on the ranks of a world."""

    nproc: int | None = option(
        COUNT, "Number of ranks, when it starts the world; else one per GPU, two on a CPU.", short="-n"
    )
    ranks: str | None = option(
        OptionType("RANKS", parse_ranges), "Run on these ranks only, for example 0,2-3.", interfaces=Interface.NOTEBOOK
    )
    cluster: str | None = option(
        CLUSTER, "The cluster to run on (default: the newest).", interfaces=Interface.SHELL | Interface.REST
    )
    name: str | None = option(NAME, "Name of the run, by which it is shown, served and compared.")
    priority: int = option(PRIORITY, _PRIORITY_OF_RANKS, 0, resumes=True)
    push: list[str] | None = option(
        OWN_VARIABLES, "Variables to copy to every rank first.", interfaces=Interface.NOTEBOOK
    )
    pull: list[str] | None = option(
        VARIABLES,
        "Variables to bring back from the first rank afterwards.",
        metavar="x,y",
        interfaces=Interface.NOTEBOOK,
    )
    background: bool = option(
        SWITCH,
        "Return at once; the run goes on by itself.",
        False,
        short="-b",
        interfaces=Interface.NOTEBOOK | Interface.SHELL,
    )
    precision: str | None = option(
        OptionType(values=("no", "bf16", "fp16", "fp8")), "Mixed precision of Accelerate.", resumes=True
    )
    plan: str | None = option(
        OptionType("PLAN", normalised),
        "How the model is spread: ddp (default), fsdp, hsdp:GxR, tp:N, tp+fsdp, pipeline:N, local-sgd:K, diloco:K, "
        "async-ps:K. Options follow with commas: diloco:30,fragments=2,bits=8.",
        resumes=True,
    )
    accelerate_config: str | None = option(
        OptionType("FILE", parse_content),
        "What `accelerate config` has written: its plan, precision and settings, where the options do not say "
        "otherwise. Over REST the content of the file, as JSON.",
        resumes=True,
    )
    compress_gradients: str | None = option(
        OptionType(values=("no", *COMPRESSIONS)), "How gradients of --plan ddp travel between ranks.", resumes=True
    )
    balance: bool = option(
        SWITCH,
        "Give each rank as many rows of a batch as suit its speed, which is measured; the gradient stays that of the "
        "whole batch, of a loss that is a mean over its rows. For --plan ddp and loaders that Accelerate prepares.",
        False,
        resumes=True,
    )
    save: list[str] | None = option(
        VARIABLES,
        "Variables to save with the run as a model: model, tokenizer.",
        metavar="model,tokenizer",
        resumes=True,
    )
    no_replay: bool = option(
        SWITCH, "Do not run this cell again on a rank that replaces a lost one.", False, interfaces=Interface.NOTEBOOK
    )
    fresh: bool = option(
        SWITCH,
        "Run the cell as a whole script in a new process would be: without the variables, the environment, the own "
        "modules and the settings of other cells, which are back afterwards.",
        False,
        interfaces=Interface.NOTEBOOK,
        resumes=True,
    )
    args: str | None = option(
        ARGUMENTS,
        'What the cell finds in sys.argv[1:]: --args "--lr 3e-4".',
        interfaces=Interface.NOTEBOOK,
        resumes=True,
    )
    timeout: float | None = option(DURATION, "Stop the run after this time: 90s, 30m, 2h.")
    hang_after: float = option(
        DURATION,
        "Report a rank that others have waited for this long (10s), or longer where that is normal.",
        10.0,
        resumes=True,
    )
    watch: str | None = option(
        OptionType("DETECTOR=POLICY", parse_policies),
        "What an alert does, by detector: note (default), stop, off; not-finite=skip leaves the step out; rollback, "
        "where a loss or gradient norm is meant, goes back to the last good checkpoint; straggler=scale has a run with "
        "--elastic go on without the host of a slow rank. For example straggler=off; a name that is not known is "
        "answered with those there are.",
        resumes=True,
    )
    track: list[str] | None = option(
        OptionType("NAMES", parse_trackers),
        "Send what is logged to these trackers, too, as one run: tensorboard, wandb, mlflow, trackio.",
        metavar="tensorboard,wandb",
        resumes=True,
    )
    price: float | None = option(
        OptionType("PRICE", number(0)),
        "What a rank costs an hour: the cost so far and in the end stands beside the time left "
        "(default: LLMCLOUD_PRICE_PER_HOUR of the node agents).",
        resumes=True,
    )
    checkpoint_every: int = option(
        COUNT_OR_NONE,
        "Save a checkpoint of everything that is trained every N optimizer steps.",
        0,
        resumes=True,
    )
    keep_checkpoints: int = option(
        OptionType("K", integer(1)), "Keep the last K checkpoints (2), besides the best by metric.", 2, resumes=True
    )
    max_restarts: int = option(
        TIMES,
        "Execute the run again up to K times when a rank, an agent or a host is lost, from its newest checkpoint.",
        0,
        resumes=True,
    )
    elastic: str | None = option(
        OptionType("MIN:MAX", parse_elastic),
        "Go on with fewer ranks, down to MIN, when a worker is lost, and with more, up to MAX, when one comes; neither "
        "uses up a restart.",
        resumes=True,
    )
    resume: str | None = option(
        RUN_NAME,
        "Go on from the newest checkpoint of an earlier run of this source, with its options, on any number of ranks.",
    )
    seed: int | None = option(
        COUNT_OR_NONE,
        "Seed Python, NumPy and torch: alike on all ranks while models and splits are made, apart while they train.",
        resumes=True,
    )
    export: str | None = option(
        OptionType("FILE.py", parse_script_file),
        "When the run has finished, write it as a plain script that gives the same losses without this package.",
        interfaces=Interface.NOTEBOOK | Interface.SHELL,
    )
    dry_run: bool = option(
        SWITCH,
        "Train nothing: say what each rank would hold and for how long it computes, whether it fits, what to change.",
        False,
        interfaces=Interface.NOTEBOOK | Interface.SHELL,
    )
    rehearse: bool = option(
        SWITCH,
        "Train nothing: run a few steps on two CPU ranks with a small model, and say what would make ranks hang.",
        False,
        interfaces=Interface.NOTEBOOK | Interface.SHELL,
    )


def inherited(earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that resumes another one has from that one's spec, where it does not say otherwise."""
    names = [option.name for option in RunSpec.options() if option.resumes]
    kept = RunSpec.restore(earlier).as_dict()
    return {name: kept[name] for name in names if name in kept}


def table(spec: type[Spec]) -> str:
    """Every option as a table in Markdown: how it is written, where it is there, what it does."""
    interfaces = ((Interface.NOTEBOOK, "notebook"), (Interface.SHELL, "terminal"), (Interface.REST, "REST"))
    lines = ["| option | where | does |", "|---|---|---|"]
    for option in spec.options():
        value = (option.metavar or "|".join(option.values)).replace("|", "\\|")  # which parts the cells of a row
        flags = ", ".join(f"`{flag}`" for flag in option.flags) + (f" {value}" if value else "")
        at = [word for interface, word in interfaces if option in spec.options(interface)]
        lines.append(f"| {flags} | {'everywhere' if len(at) == len(interfaces) else ', '.join(at)} | {option.help} |")
    return "\n".join(lines)


def as_arguments(spec: type[Spec], values: Mapping[str, Any]) -> list[str]:
    """Values as they would be typed: ["--name", "long", "--background"]."""
    words: list[str] = []
    for option in spec.options():
        if option.name in values:
            value = values[option.name]
            words += [option.flags[-1], *([_as_text(option, value)] if option.takes_value else [])]
    return words


def _as_text(option: Option, value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    if not isinstance(value, float):
        return str(value)
    text = str(int(value)) if value.is_integer() else repr(value)
    return f"{text}s" if option.metavar == DURATION.metavar else text


@dataclass(frozen=True, kw_only=True)
class Script:
    """A program that is run as `python FILE ARGUMENTS` would, not as a cell.

    Attributes:
        file: its absolute path; "" for a text that comes from no file.
        arguments: what it finds in `sys.argv[1:]`.
        folder: where it is run.
    """

    file: str = ""
    arguments: list[str] = field(default_factory=list)
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class EndpointSpec(Spec):
    """How a model is served."""

    name: str | None = option(NAME, "Name of the endpoint (default: the run's or the folder's).")
    replicas: int | str = option(
        REPLICAS, "How many processes serve it; with bounds as many as the load needs, from 0 on where MIN is 0.", 1
    )
    dtype: str = option(
        OptionType(values=("auto", "float32", "bfloat16", "float16")), "Type of the weights while serving.", "auto"
    )
    engine: str = option(
        ENGINE,
        "What generates the tokens: auto (the fastest that answers as the model itself does; vLLM on a GPU where it is "
        "installed), slots, continuous-batching, generate, vllm, llama.cpp (TARGET is a GGUF file, or a folder with "
        "one), or the URL of an OpenAI server elsewhere (TARGET is the model's name there).",
        "auto",
    )
    api_key_env: str | None = option(
        OptionType("NAME", parse_variable),
        "Of --engine URL: the environment variable, where models are served, that holds the key of that server.",
    )
    max_model_len: int | None = option(
        COUNT, "Tokens of prompt and answer together, at most (default: as many as the model was made for)."
    )
    max_concurrent: int = option(COUNT, "Sequences that each process generates at once; others wait.", 32)
    threads: int | None = option(
        COUNT, "CPU threads of each process (default: the cores of its host, shared out over its replicas)."
    )
    cores: int | None = option(
        COUNT, "Cores that each process has to itself among replicas; it waits until a host has them (default: shared)."
    )
    memory: int | None = option(
        SIZE, "Memory of its host that each process may take, such as 4GiB; it waits until a host has it."
    )
    kv_cache: int | None = option(
        SIZE, "Memory for the keys and values of all sequences of a process (default: a share of what is free)."
    )
    devices: int | None = option(
        COUNT_OR_NONE, "GPUs of each process: 0 serves on the CPU (default: one where there is one)."
    )
    priority: int = option(
        PRIORITY,
        "Who gets slots that others wait for, too: runs and endpoints with a higher number first (0). What an endpoint "
        "has beyond MIN replicas it gives back to runs with a higher number.",
        0,
    )
    follow: bool = option(
        SWITCH,
        "TARGET is a run: serve its newest checkpoint's model while it trains, and its final model in the end.",
        False,
    )
    tokenizer: str | None = option(
        OptionType("NAME", parse_variable_name, names="variables"),
        "Of a TARGET that is a variable: the variable with its tokenizer (default: the one beside it).",
        interfaces=Interface.NOTEBOOK,
    )
    base_model: str | None = option(
        TEXT, "Of a PEFT adapter: the folder of its base model, if it is not where the adapter says.", metavar="FOLDER"
    )
    keep_requests: bool = option(
        SWITCH, "Keep what is asked and answered, so that feedback on it makes a data set.", False
    )
    keep_previous: float | None = option(
        KEPT,
        "After an update, keep the replicas of the revision before it for this time (1h at most): until then a "
        "rollback only changes where requests go. Both need room (default: they end when the new ones are ready).",
    )
    cluster: str | None = option(
        CLUSTER, "Cluster to serve on (default: the newest).", interfaces=Interface.NOTEBOOK | Interface.REST
    )


@dataclass(frozen=True, kw_only=True)
class KeySpec(Spec):
    """How much a scoped key may ask."""

    requests_per_minute: int | None = option(COUNT, "Requests in any 60 seconds, at most (default: no limit).")
    tokens_per_minute: int | None = option(
        COUNT, "Tokens of prompts and answers together in any 60 seconds, at most (default: no limit)."
    )
    parallel_requests: int | None = option(COUNT, "Requests at the same time, at most (default: no limit).")


DISTRIBUTE = Syntax(
    "%%distribute",
    RunSpec.options(Interface.NOTEBOOK),
    help="Run the cell on every rank of the world as if it ran in the notebook.",
)
RUN = Syntax(
    "jupyter llmcloud run", RunSpec.options(Interface.SHELL), "FILE.py", "Run a script on the ranks of a new world."
)
_OF_FOLDERS = (
    "name",
    "dtype",
    "max_model_len",
    "base_model",
    "kv_cache",
    "engine",
    "api_key_env",
    "follow",
    "tokenizer",
)  # make no sense for code
SERVE = Syntax(
    "%serve",
    EndpointSpec.options(Interface.NOTEBOOK),
    "TARGET",
    "Serve a run's model, a folder in the Hugging Face layout, or a variable of the ranks or of the notebook.",
    names="what can be served",
)
SERVE_CELL = Syntax(
    "%%serve",
    tuple(option for option in EndpointSpec.options(Interface.NOTEBOOK) if option.name not in _OF_FOLDERS),
    "NAME",
    "Serve the Python model of the cell, which defines load() and predict(inputs), and perhaps stream(inputs).",
    names="endpoints",
)
