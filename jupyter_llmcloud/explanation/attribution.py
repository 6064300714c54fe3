"""Scores of the parts of an input for one output, by captum."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from jupyter_llmcloud.core.explain.tokens import is_complete
from jupyter_llmcloud.errors import UsageError

GRADIENTS, ABLATION = "integrated-gradients", "ablation"
MAX_STEPS = 512
_NUMBERS_AT_ONCE = (
    1 << 18
)  # of an input that are computed in one pass, copies together: activations are many times that
_MOST_ROWS = 32

Forward = Callable[[torch.Tensor], torch.Tensor]  # rows of inputs -> a number for each


@dataclass(frozen=True)
class PartScores:
    """What each part of an input adds to an output.

    Attributes:
        scores: as the input has parts.
        value: the output for the input.
        baseline_value: the output for the baseline.
        steps: of the integral; of an ablation, how many times the model was asked.
        adds_up: whether the sum of the scores should be the difference of the outputs (completeness).
    """

    scores: torch.Tensor
    value: float
    baseline_value: float
    steps: int
    adds_up: bool = True

    @property
    def difference(self) -> float:
        """Of the sum of the scores from what it should be; 0 where it need not be anything."""
        if not self.adds_up:
            return 0.0
        return float(self.scores.double().sum()) - (self.value - self.baseline_value)


def check_installed() -> None:
    """Raises UsageError that says what to install."""
    if importlib.util.find_spec("captum") is None:
        raise UsageError(
            "%explain needs captum, which is not installed: pip install 'jupyter-llmcloud[explain]'. "
            "(%explain NAME --adversarial DATA does without.)"
        )


def integrated_gradients(forward: Forward, given: torch.Tensor, baseline: torch.Tensor, steps: int) -> PartScores:
    """The gradient, summed up on the straight way from the baseline to the input, times the way.

    With more and more steps, until the scores add up to the difference of the outputs, or to `MAX_STEPS`.

    Args:
        forward: differentiable.
        given, baseline: one row each.
        steps: to begin with.
    """
    check_installed()
    from captum.attr import IntegratedGradients

    with torch.no_grad():
        value, baseline_value = forward(given).item(), forward(baseline).item()
    while True:
        scores = IntegratedGradients(forward).attribute(
            given, baselines=baseline, n_steps=steps, internal_batch_size=_rows(given)
        )
        found = PartScores(scores.detach(), value, baseline_value, steps)
        if is_complete(found.difference, value - baseline_value) or steps * 2 > MAX_STEPS:
            return found
        steps *= 2


def ablation(forward: Forward, given: torch.Tensor, baseline: torch.Tensor, parts: torch.Tensor) -> PartScores:
    """By how much the output falls when a part is that of the baseline, each by itself.

    Args:
        forward: any.
        given, baseline: one row each.
        parts: of the same shape, the number of the part that each place belongs to.
    """
    check_installed()
    from captum.attr import FeatureAblation

    with torch.no_grad():
        value, baseline_value = forward(given).item(), forward(baseline).item()
        scores = FeatureAblation(forward).attribute(
            given, baselines=baseline, feature_mask=parts, perturbations_per_eval=_rows(given)
        )
    return PartScores(scores, value, baseline_value, int(parts.max()) + 2, adds_up=False)


def _rows(given: torch.Tensor) -> int:
    return max(1, min(_MOST_ROWS, _NUMBERS_AT_ONCE // max(1, given.numel())))


def log_odds(logits: torch.Tensor, label: int) -> torch.Tensor:
    """Of one label against all others: log(p / (1 - p)) of each row."""
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return logits[:, label] - others.logsumexp(dim=1)
