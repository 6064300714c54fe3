"""A classifier of images, or a module that is given arrays, asked noisy inputs and such as are made to mislead it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.core.explain.robustness import compared
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.explanation.arrays import labels_of, outputs, pixel_values
from jupyter_llmcloud.explanation.models import OpenedModel
from jupyter_llmcloud.explanation.tried_rows import (
    label_numbers,
    outside_row,
    spread,
    tell_header,
    tell_row,
    tell_worst,
)
from jupyter_llmcloud.inference.open_inference.classifiers.scores import MULTI
from jupyter_llmcloud.protocol.explanation import TryRequest
from jupyter_llmcloud.protocol.model_work import Tell, WorkProgress
from jupyter_llmcloud.storage.datasets.pixels import as_rgb

_AT_ONCE = 32
NOISES = (0.05, 0.15)
STEPS = (2, 8)  # of 255, of the range of an input


class TriedArrays:
    """Inputs, and what each change makes of them.

    Args:
        inputs: all rows.
        labels: their numbers; None: nobody knows.
        low, high: the range of an input's numbers, which no change leaves.
    """

    def __init__(
        self, opened: OpenedModel, inputs: torch.Tensor, low: torch.Tensor, high: torch.Tensor, seed: int
    ) -> None:
        self.opened = opened
        self.inputs = inputs
        self._low, self._high = low, high
        self._range = high - low
        self._draw = torch.Generator().manual_seed(seed)

    def answers(self, rows: torch.Tensor) -> tuple[list[int], list[float]]:
        """The likeliest label of each, and its probability."""
        answers, confidences = [], []
        for batch in rows.split(_AT_ONCE):
            with torch.no_grad():
                best = outputs(self.opened, batch).softmax(-1).max(-1)
            answers += best.indices.tolist()
            confidences += best.values.tolist()
        return answers, confidences

    def changes(self, wanted: list[int]) -> dict[str, Callable[[], torch.Tensor]]:
        """By name; `wanted` are the labels that a misleading input leads away from."""
        found: dict[str, Callable[[], torch.Tensor]] = {}
        for size in NOISES:
            found[f"noise, {size:.0%} of the range"] = partial(self._noisy, size)
        if self.inputs.ndim == 4:
            found["blurred"] = self._blurred
            found["darker by a fifth"] = lambda: self._within(self.inputs - 0.2 * self._range)
        found[f"random signs, {STEPS[-1]}/255"] = lambda: self._signs(STEPS[-1] / 255)
        for step in STEPS:
            found[f"misleading signs (FGSM), {step}/255"] = partial(self._misleading, step / 255, wanted)
        return found

    def _within(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(rows, self._low), self._high)

    def _noisy(self, size: float) -> torch.Tensor:
        return self._within(self.inputs + size * self._range * torch.randn(self.inputs.shape, generator=self._draw))

    def _signs(self, size: float) -> torch.Tensor:
        signs = torch.randint(0, 2, self.inputs.shape, generator=self._draw) * 2 - 1
        return self._within(self.inputs + size * self._range * signs)

    def _blurred(self) -> torch.Tensor:
        padded = torch.nn.functional.pad(self.inputs, (1, 1, 1, 1), mode="replicate")
        return torch.nn.functional.avg_pool2d(padded, 3, stride=1)

    def _misleading(self, size: float, wanted: list[int]) -> torch.Tensor:
        """A step up the loss, of the same size for each number."""
        moved = []
        for rows, labels in zip(self.inputs.split(_AT_ONCE), torch.tensor(wanted).split(_AT_ONCE), strict=True):
            given = rows.clone().requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(outputs(self.opened, given), labels, reduction="sum")
            [gradient] = torch.autograd.grad(loss, given)
            moved.append(gradient.sign())
        return self._within(self.inputs + size * self._range * torch.cat(moved))

    def outside(self) -> dict[str, torch.Tensor]:
        """Inputs of another kind."""
        order = torch.randperm(self.inputs[0].numel(), generator=self._draw)
        uniform = torch.rand(self.inputs.shape, generator=self._draw)
        return {
            "the data, numbers in any order": self.inputs.flatten(1)[:, order].view(self.inputs.shape),
            "uniform noise": self._low + uniform * self._range,
        }


def try_arrays(opened: OpenedModel, request: TryRequest, tell: Tell) -> None:
    """The tables of a classifier of images, or of a module."""
    inputs, given = _read(opened, request)
    low, high = _range(opened, inputs)
    tried = TriedArrays(opened, inputs, low, high, request.seed)
    num_outputs = outputs(opened, inputs[:1]).shape[1]
    labels = labels_of(opened, num_outputs)
    if labels.problem in (MULTI, "regression"):
        raise UsageError(
            f"%explain {opened.name} --adversarial: it has not one answer of several, and that is compared."
        )
    numbers = label_numbers([{"label": label} for label in given], labels, request.told)
    told = "" if numbers is not None else ", whose labels nobody has told"
    tell_header(opened, f"{len(inputs)} inputs of {request.told}{told}; changes by seed {request.seed}", tell)
    before, inside = tried.answers(inputs)
    tell_row(compared("as they are", before, before, numbers), tell)
    all_answers = [before]
    wanted = before if numbers is None else [was if n is None else n for n, was in zip(numbers, before, strict=True)]
    for name, change in tried.changes(wanted).items():
        tell(WorkProgress(text=f"{opened.name}: {name}"))
        now, _ = tried.answers(change())
        all_answers.append(now)
        tell_row(compared(name, now, before, numbers), tell)
    tell_worst(all_answers, numbers, tell)
    tell_row(outside_row("the data", inside, None), tell)
    for what, others in tried.outside().items():
        tell_row(outside_row(what, tried.answers(others)[1], inside), tell)


def _read(opened: OpenedModel, request: TryRequest) -> tuple[torch.Tensor, list[Any]]:
    """All inputs, and their labels as they were given."""
    path = Path(request.rows)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as kept:
            rows, labels = kept["inputs"], kept["labels"].tolist() if "labels" in kept else [None] * len(kept["inputs"])
        chosen = spread(range(len(rows)), request.num_rows)
        inputs = [rows[number] for number in chosen]
        if opened.processor is not None and rows.dtype.kind != "f":
            return torch.cat([pixel_values(opened, row) for row in inputs]), [labels[number] for number in chosen]
        return torch.from_numpy(np.stack(inputs).astype(np.float32)), [labels[number] for number in chosen]
    if opened.processor is None:
        raise UsageError(f"--adversarial {request.told}: the model takes arrays: a variable (inputs, labels).")
    from PIL import Image

    found = spread(json.loads(path.read_bytes()), request.num_rows)
    images = [pixel_values(opened, as_rgb(Image.open(row["file"]))) for row in found]
    return torch.cat(images), [row.get("label") for row in found]


def _range(opened: OpenedModel, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest that a number of an input can be; of plain arrays, that it is.

    Of images by colour: what the processor makes of a black one and of a white one. Some centre, some normalise twice.
    """
    if opened.processor is None:
        return inputs.min(), inputs.max()
    both = torch.cat([pixel_values(opened, np.full((64, 64, 3), level, dtype=np.uint8)) for level in (0, 255)])
    return both.amin(dim=(0, 2, 3), keepdim=True), both.amax(dim=(0, 2, 3), keepdim=True)
