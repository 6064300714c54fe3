"""What a run that has ended reports of its ranks, one line for each kind of end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jupyter_llmcloud.core.metrics.eta import TimeLeft
from jupyter_llmcloud.core.names import format_ranks

_ANEW = "the next cell runs on a new process without its variables"
_WORDS = {
    "running": "lost with the agent that led the run",
    "done": "finished",
    "failed": "failed",
    "died": f"lost: {_ANEW}",
}


def describe_saved(names: Sequence[str], num_bytes: int, run: str) -> str:
    """`Saved model and tokenizer of the run long (12.8 MB): %serve long serves them.`"""
    size = f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
    what = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"Saved {what} of the run {run} ({size}): %serve {run} serves {'it' if len(names) == 1 else 'them'}."


def report(
    states: Mapping[int, str], errors: Mapping[int, Mapping[str, Any]], culprit: int | None, was_stopped: bool
) -> list[str]:
    """Lines such as `ranks 0-2: released, variables kept`.

    Args:
        states: of each rank, as of core.lifecycle.
        errors: of those ranks that had one: "ename", "evalue", "collateral".
        culprit: the rank that failed first.
        was_stopped: whether somebody pressed Stop.
    """
    interrupted = f"{'stopped' if was_stopped else 'released'}, variables kept"
    groups: dict[str, list[int]] = {}
    for rank, state in states.items():
        error = errors.get(rank)
        echo = state == "failed" and error is not None and error.get("collateral") and rank != culprit
        text = interrupted if echo or state == "interrupted" else _WORDS[state]
        if state == "died" and error is not None and error.get("collateral"):
            text = f"lost, since it did not end when it was asked to: {_ANEW}"
        if state == "failed" and not echo and error is not None:
            text = f"{_what(error)}, variables kept"
        groups.setdefault(text, []).append(rank)
    return [f"rank{'s' if len(ranks) > 1 else ''} {format_ranks(ranks)}: {text}" for text, ranks in groups.items()]


def _what(error: Mapping[str, Any]) -> str:
    if error["ename"] != "SystemExit":
        return str(error["ename"])
    code = str(error.get("evalue", ""))
    return f"left with exit status {code}" if code.lstrip("-").isdigit() else f"left by sys.exit: {code}"


def read_price(text: str) -> tuple[float, str]:
    """What a rank costs an hour, 0 where no price is given, and why a text is none."""
    if not text.strip():
        return 0.0, ""
    try:
        each = float(text)
    except ValueError:
        each = -1.0
    if not 0 <= each < math.inf:
        return 0.0, f"what it costs is not known: LLMCLOUD_PRICE_PER_HOUR={text!r} is not the price of an hour."
    return each, ""


def describe_cost(price: float, rank_seconds: float) -> str:
    """What a run has cost: `2 rank-hours at 1.50 an hour: about 3.00`; "" where no price is given."""
    if not price:
        return ""
    hours = rank_seconds / 3600
    return f"{hours:,.2f} rank-hours at {_amount(price)} an hour: about {_amount(hours * price)}."


def cost_so_far(price: float, rank_seconds: float, num_ranks: int, left: TimeLeft | None) -> str:
    """`cost 1.20 so far, about 4.10 in the end (3.90 to 4.60)`, by the time left; "" where no price is given."""
    if not price:
        return ""
    spent = price * rank_seconds / 3600
    said = f"cost {_amount(spent)} so far"
    if left is None:
        return said
    ends = (left.middle, left.low, left.high)
    middle, low, high = (_amount(spent + price * num_ranks * seconds / 3600) for seconds in ends)
    return f"{said}, about {middle} in the end" + (f" ({low} to {high})" if low != high else "")


def _amount(value: float) -> str:
    """Hundredths, of what is small two digits."""
    return f"{value:,.2f}" if value == 0 or value >= 0.1 else f"{value:.2g}"


def own_errors(errors: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The errors without the echoes of others' and without ranks that were merely released."""
    own = [error for error in errors if not error.get("collateral") and error.get("ename") != "KeyboardInterrupt"]
    return own or list(errors)
