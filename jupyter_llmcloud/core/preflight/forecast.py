"""What a rank needs for its first steps beside its parameters, and the words when that is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jupyter_llmcloud.core.parallel.plan import ParallelPlan
from jupyter_llmcloud.core.preflight.memory import LEFT, RankMemory, advise, estimate, in_words
from jupyter_llmcloud.core.preflight.timeline import MeasuredStep

# Of a host's memory a step takes more than its tensors: fitted to 30 trainings of `python -m tests.chaos preflight`.
KEPT_ON_HOST = 1.2
LIBRARIES = 80 << 20
CAN_BE_SMALL = 0.1  # of what is left: a step that cannot take more is not looked at
_STATES = {
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam", "LAMB", "Adadelta", "ASGD"), 2),
    **dict.fromkeys(("Adagrad", "RMSprop", "Rprop", "Lion"), 1),
}
_MADE_BEFORE = ("diloco", "async-ps")  # plans whose own tensors are there when a model is prepared
_PER_VALUE = 800  # bytes that a value of a batch leads to at most in an ordinary model, beside those that follow
_OF_PARAMETERS = 0.01  # of a model's bytes, for each value: tokens of language models


def state_bytes(kind: str, options: Mapping[str, object], parameters: int) -> int:
    """The state that an optimizer of this class keeps for parameters of so many bytes; 0 when that is not known."""
    if kind in ("SGD", "RMSprop"):
        return ((kind == "RMSprop") + bool(options.get("momentum")) + bool(options.get("centered"))) * parameters
    return (_STATES.get(kind, 0) + bool(options.get("amsgrad"))) * parameters


def may_matter(parameters: int, num_values: int, left: int) -> bool:
    """Whether a step with so many values in its batch can need a noticeable part of what is left."""
    rough = 4 * parameters + num_values * (_PER_VALUE + _OF_PARAMETERS * parameters)
    return rough > CAN_BE_SMALL * left


def still_needed(step: MeasuredStep, plan: ParallelPlan, world_size: int, device: str = "cpu") -> int:
    """Bytes that a rank needs at most, beside its parameters; on a host with what allocator and libraries keep."""
    found = estimate(step, plan, world_size)
    held = found.buffers if plan.kind in _MADE_BEFORE else 0
    tensors = max(0, found.peak - found.parameters - held)
    return int(KEPT_ON_HOST * tensors) + LIBRARIES if device == "cpu" else tensors


def forecast(
    step: MeasuredStep, plan: ParallelPlan, world_size: int, left: int, device: str, missing: Sequence[str] = ()
) -> str:
    """A warning when a rank has too little memory left; "" when it fits.

    Args:
        step: of one process that trains alone; `missing` says in words what is not in it.
        left: bytes that the rank can still have, with its parameters already there.
    """
    needed = still_needed(step, plan, world_size, device)
    if needed <= (1 if device == "cpu" else LEFT) * left:
        return ""
    found = estimate(step, plan, world_size)
    parts = {
        "gradients": found.gradients,
        "the optimizer": found.optimizer,
        "activations": found.activations,
        "communication": found.buffers if plan.kind not in _MADE_BEFORE else 0,
    }
    table = ", ".join(f"{name} {in_words(size)}" for name, size in parts.items() if size)
    without = f", without {' and '.join(missing)}" if missing else ""
    budget = RankMemory(left + found.parameters, device, overhead=LIBRARIES if device == "cpu" else 0)
    working = [advice for advice in advise(step, plan, world_size, budget) if advice.fits]
    less = f" Would fit: {'; '.join(advice.change for advice in working[:3])}." if working else ""
    return (
        f"memory: a step of this rank needs about {in_words(needed)} beside its parameters ({table}{without}), and "
        f"{in_words(left)} of {device} memory is left. It may run out.{less}"
    )
