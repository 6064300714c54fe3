"""What watching over a training costs it.

The promise is less than 1 % of throughput. Wall time cannot show that here: the same training varies by more than that
from round to round, and the product has no switch that would turn its supervision off. CPU time can, since with as many
ranks as cores whatever else computes takes its time from a rank. So each rank of the training of `throughput` tells
the CPU that each of its threads has used after the warm-up (/proc/<pid>/task/*/schedstat, in nanoseconds), and rank 0
that of all processes which were started for this contender:

- the side threads of a rank (control, sender, watchdog: named llmcloud-*) and the node agents, which hold the hang
  watch and write the journals, are supervision, as a share of the time that the ranks trained;
- what supervision does in the main thread itself (run.log, print, the hooks of a step) is a fraction of a millisecond,
  lost in a step of 160: so the ranks also run the loop round a model that is next to nothing. What its steps take more
  of the main thread's CPU than under torchrun, whose ranks log to nowhere and print to a file, is divided by
  the CPU of a real step;
- Dask's processes (which place ranks, whether they train or not) and the rest (the notebook with its live view, the
  Jupyter server, the zygote) are told apart. They are on the rank's machine here; a scheduler and a notebook need
  not be.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from tests.bench.measured import Row

Ranks = list[dict[str, Any]]  # what the ranks of one training told
SIDE_THREAD = "llmcloud-"
AGENT = ("-m jupyter_llmcloud.agent",)
DASK = ("-m jupyter_llmcloud.cluster.host", "multiprocessing")  # its nannies start workers by that
REST = ("-m tests.bench.shell", "-m jupyter_llmcloud.server", "-m jupyter_llmcloud.training.zygote")
EVERYTHING = ("",)


def rows(ours: list[Ranks], torchrun: list[Ranks]) -> list[Row]:
    """Of several rounds: the share with its limit, then its parts."""
    side = [_side_threads(ranks) for ranks in ours]
    agents, dask, rest = ([_processes(ranks, names) for ranks in ours] for names in (AGENT, DASK, REST))
    main = [_main_thread(*both) for both in zip(ours, torchrun, strict=True)]
    together = [sum(parts) for parts in zip(side, agents, main, strict=True)]
    theirs = [_processes(ranks, EVERYTHING) for ranks in torchrun]
    return [
        Row(
            "throughput", "supervision: CPU per second of a rank", "%", "torchrun's agent", together, theirs, limit=1.0
        ),
        Row("throughput", "  of it the side threads of the ranks", "%", "", side),
        Row("throughput", "  of it the node agents", "%", "", agents),
        Row("throughput", "  of it in the main threads", "%", "", main),
        Row("throughput", "beside it: Dask", "%", "", dask),
        Row("throughput", "beside it: notebook, server, zygote", "%", "", rest),
    ]


def _main_thread(ours: Ranks, torchrun: Ranks) -> float:
    """Per cent of a step that its surroundings cost more in ours."""
    small, theirs = (median(ranks[0]["small_cpu_seconds"]) for ranks in (ours, torchrun))
    return 100 * (small - theirs) / median(torchrun[0]["cpu_seconds"][torchrun[0]["warm_up"] :])


def _side_threads(ranks: Ranks) -> float:
    """Per cent of the ranks' time."""
    seconds = 0.0
    for rank in ranks:
        used = _used(rank, "threads")
        seconds += sum(used.get(ident, 0.0) for ident, name in rank["names"].items() if name.startswith(SIDE_THREAD))
    return _share(ranks, seconds)


def _processes(ranks: Ranks, names: tuple[str, ...]) -> float:
    """Per cent of the ranks' time that the processes of the family with such a command line take, the ranks aside."""
    used, own = _used(ranks[0], "family"), {str(rank["pid"]) for rank in ranks}
    commands = ranks[0]["commands"].items()
    chosen = [pid for pid, command in commands if pid not in own and any(name in command for name in names)]
    return _share(ranks, sum(used.get(pid, 0.0) for pid in chosen))


def _used(rank: dict[str, Any], group: str) -> dict[str, float]:
    before, after = rank["before"][group], rank["after"][group]
    return {key: seconds - before.get(key, 0.0) for key, seconds in after.items()}


def _share(ranks: Ranks, seconds: float) -> float:
    return 100 * seconds / sum(rank["wall"] for rank in ranks)
