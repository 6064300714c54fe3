"""What may be asked for when hyperparameters are searched: every option, defined once, as in `core.spec`."""
# ruff: noqa: RUF009 - option() makes a field

from __future__ import annotations

from dataclasses import dataclass

from jupyter_llmcloud.core.options import Syntax, integer
from jupyter_llmcloud.core.parallel.plan import normalised
from jupyter_llmcloud.core.search.choices import PRUNERS, SAMPLERS, checked_pruner
from jupyter_llmcloud.core.spec import (
    CLUSTER,
    COUNT,
    COUNT_OR_NONE,
    DURATION,
    NAME,
    OWN_VARIABLES,
    PRIORITY,
    SWITCH,
    TEXT,
    VARIABLES,
    Interface,
    OptionType,
    Spec,
    option,
)

DEFAULT_TRIALS = 20


@dataclass(frozen=True, kw_only=True)
class SweepSpec(Spec):
    """How a cell with `trial.suggest_...` is run as many trials."""

    nproc: int | None = option(COUNT, "Ranks of each trial: one per GPU when left out, two on a CPU.", short="-n")
    trials: int = option(OptionType("N", integer(1)), "Trials in all, those before --resume too (20).", DEFAULT_TRIALS)
    parallel: int = option(COUNT, "Trials at the same time, as far as there are slots for their ranks (1).", 1)
    metric: str | None = option(
        TEXT,
        "What is compared: a metric that the cell logs. Left out: what it hands to trial.report(value, step).",
        metavar="NAME",
    )
    direction: str = option(
        OptionType(values=("minimize", "maximize")), "Whether less of it is better, or more.", "minimize"
    )
    sampler: str = option(
        OptionType(values=SAMPLERS),
        "What proposes values: Optuna's TPE (default), Gaussian process, CMA-ES, every combination, or at random.",
        "tpe",
    )
    prune: str = option(
        OptionType("PRUNER", checked_pruner),
        f"Which trials are ended early: {', '.join(name for name in PRUNERS if name != 'pbt')}. Settings follow with "
        "commas: asha,min=1,reduction=3. Or pbt: trials are turns of a population, whose worst members take over the "
        "state of the best: pbt,population=5,share=25,resample=25.",
        "none",
    )
    storage: str | None = option(
        TEXT,
        "Where Optuna keeps the study: sqlite:///FILE, postgresql://..., redis://..., or a journal file "
        "(default: one in the folder of the sweep).",
        metavar="URL",
    )
    name: str | None = option(NAME, "Name of the sweep; its runs are NAME-0000, NAME-0001, ...")
    resume: bool = option(SWITCH, "Go on with the sweep of this --name: what it has found is kept.", False)
    timeout: float | None = option(DURATION, "Start and keep no trial after this time: 90s, 30m, 2h.")
    seed: int | None = option(
        COUNT_OR_NONE, "Seed the sampler, and Python, NumPy and torch on the ranks of every trial."
    )
    push: list[str] | None = option(
        OWN_VARIABLES, "Variables that every trial finds, each a copy of its own.", interfaces=Interface.NOTEBOOK
    )
    save: list[str] | None = option(
        VARIABLES, "Variables that each trial saves with its run as a model.", metavar="model,tokenizer"
    )
    precision: str | None = option(OptionType(values=("no", "bf16", "fp16", "fp8")), "Mixed precision of Accelerate.")
    plan: str | None = option(OptionType("PLAN", normalised), "How the model is spread, as in %%distribute.")
    cluster: str | None = option(CLUSTER, "The cluster to run on (default: the newest).")
    priority: int = option(PRIORITY, "Who gets slots that others wait for, too: a higher number first (0).", 0)
    background: bool = option(
        SWITCH, "Return at once; the sweep goes on by itself.", False, short="-b", interfaces=Interface.NOTEBOOK
    )


SWEEP = Syntax(
    "%%sweep",
    SweepSpec.options(Interface.NOTEBOOK),
    help="Run the cell as many trials, each on ranks of its own; trial.suggest_float(...) and others give the values.",
)
