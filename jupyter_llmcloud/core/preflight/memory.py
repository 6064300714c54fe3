"""Memory of each rank under a plan, whether it fits, and what to change when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jupyter_llmcloud.core.output.numerals import format_duration
from jupyter_llmcloud.core.parallel.plan import ParallelPlan, parse_plan
from jupyter_llmcloud.core.preflight.timeline import MeasuredStep

GIB = 1 << 30
# Factors, of which none is exact: what they lead to is said with "about". The bytes of tensors are counted, and agree
# with torch.profiler's memory events: the peak of a step of an MLP (3.1 M parameters) and a GPT-2 (3.4 M), each with
# AdamW and with SGD and momentum, float32 on a CPU, is equal for the MLP and 96 bytes of 0.5 GB apart for the GPT-2.
LEFT = 0.92  # of a GPU's memory: the rest goes to fragments and the libraries' own buffers. A guess
# Of the host's memory: in the steps named above resident memory grew by 1.23 times what tensors take (GPT-2), by 1.37
# and 1.59 times (MLP, where 30 to 40 MB of libraries weigh more).
LEFT_ON_CPU = 0.8
# Of the activations stay where each block is computed again in backward: counted in two GPT-2 with a batch of 8, 0.25
# (12 layers of 768) and 0.42 (4 of 192, where the loss's own weigh more); the larger one, rounded up.
RECOMPUTED = 0.45
# Of the activations stay under bf16. Counted in the same two under autocast on a CPU: 0.90 and 0.93; far from a half,
# as values that are cast are there twice and much stays float32. Not compared with a GPU.
HALF_WIDTH = 0.93
# Of the rate of large matrix products that a whole step reaches. A guess: training of large models is reported at 0.46
# (PaLM, Chowdhery et al. 2022) to 0.57 (Megatron-LM, Korthikanti et al. 2022) of what the device could do at most.
BUSY = 0.55


@dataclass(frozen=True)
class RankMemory:
    """The memory that each rank has.

    Attributes:
        bytes: of its device, or its part of the host's.
        device: "cpu" or the name of the GPU.
        flops_per_s: of large matrix products in the precision of the run; 0 when unknown.
        overhead: bytes that a rank takes before it has a model.
    """

    bytes: int
    device: str = "cpu"
    flops_per_s: float = 0.0
    overhead: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, at most over a step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    peak: int


def estimate(step: MeasuredStep, plan: ParallelPlan, world_size: int) -> MemoryEstimate:
    """What each rank of a world holds under a plan. Raises UsageError when the world does not fit the plan."""
    mesh = plan.mesh(world_size)
    parts = mesh.get("shard", 1) * mesh.get("tp", 1) * mesh.get("stage", 1)
    if plan.kind == "fsdp":
        parts = world_size
    parameters, gradients, optimizer = (-(-each // parts) for each in (step.parameters, step.gradients, step.optimizer))
    activations = step.activations // mesh.get("stage", 1)
    update, buffers = step.update // parts, 0
    if "shard" in mesh or plan.kind == "fsdp":
        buffers = 3 * step.largest_block  # the block in use, the next one, the gradient of the one before
    elif plan.kind == "async-ps":  # what was pulled, and of the first ranks what they serve: values, momentum, arrivals
        buffers = step.parameters + 3 * -(-step.parameters // plan.settings["servers"])
    elif plan.kind == "diloco":
        buffers = 2 * step.parameters  # the parameters of the last exchange, the momentum of the outer optimizer
    elif plan.kind == "local-sgd":
        buffers = _of_round(step, plan)
    elif world_size > 1 and parts == 1:
        buffers = step.gradients  # DDP's buckets
    alone = step.parameters + step.gradients + step.optimizer
    # Gradients grow while activations go, so that the two are rarely full at the same time: what was saved by that in
    # one process is saved on a rank.
    saved = max(0, alone + max(step.activations, step.update) - step.peak)
    held = parameters + gradients + optimizer
    beside = buffers if plan.kind != "local-sgd" else 0
    peak = held + beside + max(max(activations, update) - saved // parts, _of_round(step, plan))
    return MemoryEstimate(parameters, gradients, optimizer, activations, buffers, peak)


def _of_round(step: MeasuredStep, plan: ParallelPlan) -> int:
    """What an exchange holds for a moment, when activations have gone: vectors as large as what travels."""
    if plan.kind == "local-sgd":
        return step.gradients
    if plan.kind == "diloco":
        return (5 if plan.settings["bits"] == 8 else 3) * step.gradients // int(plan.settings["fragments"])
    if plan.kind == "async-ps":  # what was pulled, in parts and whole; and at a server, what arrives and its share
        return 2 * step.parameters + 2 * -(-step.parameters // int(plan.settings["servers"]))
    return 0


@dataclass(frozen=True)
class Advice:
    """A change, and what each rank would hold with it."""

    change: str
    peak: int
    fits: bool


def fits(peak: int, budget: RankMemory) -> bool:
    """Whether a rank that holds so much at most has room."""
    return peak + budget.overhead <= (LEFT_ON_CPU if budget.device == "cpu" else LEFT) * budget.bytes


def advise(
    step: MeasuredStep, plan: ParallelPlan, world_size: int, budget: RankMemory, precision: str = "no"
) -> list[Advice]:
    """What makes a run fit that does not, the smallest change first; what comes nearest when nothing does."""
    tried = [
        Advice(change, peak, fits(peak, budget)) for change, peak in _changes(step, plan, world_size, budget, precision)
    ]
    working = [advice for advice in tried if advice.fits]
    return working or sorted(tried, key=lambda advice: advice.peak)[:2]


def _changes(
    step: MeasuredStep, plan: ParallelPlan, world_size: int, budget: RankMemory, precision: str
) -> Iterator[tuple[str, int]]:
    def peak(changed: MeasuredStep, plan: ParallelPlan) -> int:
        return estimate(changed, plan, world_size).peak

    cheaper = _with_activations(step, RECOMPUTED)
    if precision == "no" and budget.device != "cpu":
        yield "--precision bf16", peak(_with_activations(step, HALF_WIDTH), plan)
    yield "activation checkpointing (model.gradient_checkpointing_enable())", peak(cheaper, plan)
    if step.batch > 1 and (rows := _rows_that_fit(step, plan, world_size, budget)):
        yield (
            f"a batch of {rows} in place of {step.batch}, with gradient accumulation",
            peak(_with_activations(step, rows / step.batch), plan),
        )
    if world_size > 1 and plan.kind == "ddp":
        sharded = parse_plan("fsdp")
        yield "--plan fsdp", peak(step, sharded)
        yield "--plan fsdp with activation checkpointing", peak(cheaper, sharded)
    if world_size < 64:
        yield f"--plan fsdp on {2 * world_size} ranks (-n)", estimate(step, parse_plan("fsdp"), 2 * world_size).peak


def _with_activations(step: MeasuredStep, share: float) -> MeasuredStep:
    less = int(step.activations * share)
    alone = step.parameters + step.gradients + step.optimizer
    return replace(step, activations=less, peak=min(step.peak, alone + max(less, step.update)))


def _rows_that_fit(step: MeasuredStep, plan: ParallelPlan, world_size: int, budget: RankMemory) -> int:
    rows = step.batch // 2
    while rows and not fits(estimate(_with_activations(step, rows / step.batch), plan, world_size).peak, budget):
        rows //= 2
    return rows


def step_time(step: MeasuredStep, plan: ParallelPlan, world_size: int, budget: RankMemory) -> float:
    """A guess of the seconds of a step; 0.0 when nothing is known. Communication is not in it."""
    if not (step.flops and budget.flops_per_s):
        return 0.0
    mesh = plan.mesh(world_size)
    return step.flops / (mesh.get("tp", 1) * mesh.get("stage", 1)) / (BUSY * budget.flops_per_s)


def plan_of(text: str | None, world_size: int) -> ParallelPlan:
    """A plan as `--plan` says it. Raises UsageError for one that the world does not fit."""
    plan = parse_plan(text or "ddp")
    plan.mesh(world_size)
    return plan


def in_words(num_bytes: float) -> str:
    """1.5 GiB."""
    if num_bytes < 1 << 10:
        return f"{int(num_bytes)} bytes"
    units = (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", GIB), ("TiB", 1 << 40), ("PiB", 1 << 50))
    # Of a thousand and more, three digits would be written with an exponent.
    unit, size = next((known for known in units if num_bytes / known[1] < 999.5), units[-1])
    return f"{num_bytes / size:.3g} {unit}"


def describe(
    step: MeasuredStep, plan: ParallelPlan, world_size: int, budget: RankMemory, precision: str = "no"
) -> list[str]:
    """The table, the verdict, the guess and the advice, as lines."""
    found = estimate(step, plan, world_size)
    at_most = "at most" if found.activations == step.activations else "about, at most"
    many = "1 rank" if world_size == 1 else f"{world_size} ranks"
    rows = [
        ("parameters", found.parameters, f"{step.num_parameters:,} numbers, {plan.text} on {many}"),
        ("gradients", found.gradients, ""),
        ("optimizer", found.optimizer, ""),
        ("activations", found.activations, f"{at_most}, batch of {step.batch}" if step.batch else at_most),
        ("buffers", found.buffers, "about, of communication"),
        ("peak", found.peak, "about, what the tensors of one rank take at most"),
    ]
    lines = [f"{name:<12} {in_words(size):>10}  {note}".rstrip() for name, size, note in rows if size]
    lines.append(_verdict(found.peak, budget))
    if time_s := step_time(step, plan, world_size, budget):
        took = f"{time_s:.3g} s" if time_s < 60 else format_duration(time_s)
        lines.append(f"About {took} a step, without communication: a guess from {step.flops:.3g} operations.")
    if not fits(found.peak, budget):
        advice = advise(step, plan, world_size, budget, precision)
        lines += [
            f"  {'fits' if each.fits else 'less'}: {each.change} (about {in_words(each.peak)})" for each in advice
        ]
    return lines


def _word(advice: Advice) -> str:
    return "fits" if advice.fits else "less"


def _verdict(peak: int, budget: RankMemory) -> str:
    overhead = f" and {in_words(budget.overhead)} of its own" if budget.overhead else ""
    have = f"each rank has {in_words(budget.bytes)} ({budget.device})"
    if fits(peak, budget):
        return f"It fits: about {in_words(peak)}{overhead}, and {have}."
    return f"It does not fit: about {in_words(peak)}{overhead}, but {have}."
