"""Why a classifier of images, or a module that is given an array, answers so: scores of pixels and numbers."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.explanation.attribution import GRADIENTS, PartScores, ablation, integrated_gradients
from jupyter_llmcloud.explanation.models import OpenedModel
from jupyter_llmcloud.explanation.texts import chosen_label, measured, probability
from jupyter_llmcloud.inference.open_inference.classifiers.scores import Labels
from jupyter_llmcloud.protocol.explanation import Attribution, ExplainedModel, ExplainRequest
from jupyter_llmcloud.protocol.model_work import Tell
from jupyter_llmcloud.storage.datasets.pixels import as_rgb

PATCHES = 14  # along each side of an image, for an ablation
MAX_SCORES = 1 << 20
_SHOWN_PIXELS = 320
_FOR, _AGAINST = (245, 130, 32), (46, 125, 225)


def explain_array(opened: OpenedModel, request: ExplainRequest, tell: Tell) -> None:
    """One label, by the pixels or numbers of an input."""
    given = read_input(opened, Path(request.file))
    if given.numel() > MAX_SCORES:
        raise UsageError(f"%explain {opened.name}: an input of {given.numel()} numbers is too much: {MAX_SCORES} are.")
    row = outputs(opened, given).detach()[0]
    labels = labels_of(opened, len(row))
    label = chosen_label(labels, request.label, row, opened.name)
    quantity, number = measured(labels, label)
    method = request.method or GRADIENTS
    is_image = given.ndim == 4
    flat = "each colour its mean over the image" if is_image else "the mean of the input's numbers"
    tell(ExplainedModel(name=opened.name, kind=opened.kind, method=method, baseline=flat, source=opened.source))

    def forward(rows: torch.Tensor) -> torch.Tensor:
        return number(outputs(opened, rows))

    baseline = flattened(given)
    if method == GRADIENTS:
        found = integrated_gradients(forward, given, baseline, request.steps)
    else:
        found = ablation(forward, given, baseline, patches(given))
    tell(_attribution(labels, label, quantity, found, given, row))


def _attribution(
    labels: Labels, label: int, quantity: str, found: PartScores, given: torch.Tensor, row: torch.Tensor
) -> Attribution:
    scores = found.scores[0]
    if given.ndim == 4:  # an ablation gives each colour of a patch the score of all of them
        scores = scores.sum(0) if found.adds_up else scores[0]
    return Attribution(
        answer="" if labels.problem == "regression" else labels.names[label],
        quantity=quantity,
        value=found.value,
        baseline_value=found.baseline_value,
        probability=probability(labels, row, label),
        scores=scores.flatten().tolist(),
        shape=list(scores.shape),
        difference=found.difference,
        steps=found.steps,
        picture=_picture(given[0], scores) if given.ndim == 4 else "",
    )


def labels_of(opened: OpenedModel, num_outputs: int) -> Labels:
    """The labels of a classifier; those of a module are numbers, and one output is a predicted number."""
    if opened.kind == "image-classifier":
        return Labels.of(opened.model.config, opened.kind)
    names = tuple(str(number) for number in range(num_outputs))
    return Labels(names, "regression" if num_outputs == 1 else "single_label_classification")


def outputs(opened: OpenedModel, rows: torch.Tensor) -> torch.Tensor:
    """A row of numbers for each input. Raises UsageError when the model gives something else."""
    try:
        told: Any = opened.model(pixel_values=rows) if opened.kind == "image-classifier" else opened.model(rows)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"%explain {opened.name}: the model takes no input of shape {list(rows.shape)}: {error}"
        ) from None
    told = getattr(told, "logits", told)
    if isinstance(told, torch.Tensor) and told.ndim == 1 and len(told) == len(rows):
        told = told[:, None]
    if not isinstance(told, torch.Tensor) or told.ndim != 2 or len(told) != len(rows):
        shape = f" of shape {list(told.shape)}" if isinstance(told, torch.Tensor) else ""
        raise UsageError(
            f"%explain {opened.name}: explained is a row of numbers for each input, and forward gives a "
            f"{type(told).__name__}{shape}."
        )
    return told.float()


def read_input(opened: OpenedModel, file: Path) -> torch.Tensor:
    """One row of what the model takes, of a file: an image, or an array as numpy saves it."""
    if file.suffix == ".npy":
        array = np.load(file, allow_pickle=False)
        if opened.processor is None or array.dtype.kind == "f":
            return _one_row(opened, torch.from_numpy(array.astype(np.float32)))
        return pixel_values(opened, array)
    if opened.processor is None:
        raise UsageError(f"%explain {opened.name}: it takes an array: --input VARIABLE, with one of numpy or torch.")
    from PIL import Image, UnidentifiedImageError

    try:
        return pixel_values(opened, as_rgb(Image.open(file)))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UsageError(f"%explain {opened.name}: {file} is no image that can be read: {error}.") from None


def pixel_values(opened: OpenedModel, image: Any) -> torch.Tensor:
    """What the processor of the model makes of an image."""
    made = opened.processor(images=image, return_tensors="np")["pixel_values"]
    return torch.from_numpy(np.asarray(made, dtype=np.float32))[:1]


def _one_row(opened: OpenedModel, array: torch.Tensor) -> torch.Tensor:
    """With a first dimension that counts rows, also where it was left out."""
    if opened.kind == "image-classifier":
        return array if array.ndim == 4 else array[None]
    candidates = [array[None], *([array] if array.ndim > 1 and len(array) == 1 else [])]
    raised: list[str] = []
    for rows in candidates:
        try:
            with torch.no_grad():
                told = opened.model(rows)
        except Exception as error:  # code of the user's own: the other one is tried
            raised.append(f"{type(error).__name__} with an input of shape {list(rows.shape)}: {error}")
            continue
        told = getattr(told, "logits", told)
        if isinstance(told, torch.Tensor) and told.ndim in (1, 2) and len(told) == len(rows):
            return rows
    if len(raised) == len(candidates):
        raise UsageError(f"%explain {opened.name}: the model takes no such input: {'; '.join(raised)}.")
    return candidates[-1]


def flattened(given: torch.Tensor) -> torch.Tensor:
    """An input without structure: every number is the mean, of an image that of its colour."""
    places = tuple(range(2, given.ndim)) if given.ndim == 4 else tuple(range(1, given.ndim))
    return given.mean(dim=places, keepdim=True).expand_as(given).contiguous()


def patches(given: torch.Tensor) -> torch.Tensor:
    """The number of the part that each number belongs to: a patch of an image, else itself."""
    if given.ndim != 4:
        return torch.arange(given[0].numel()).view(given.shape)
    height, width = given.shape[2:]
    rows, columns = min(PATCHES, height), min(PATCHES, width)
    down = torch.arange(height) * rows // height
    across = torch.arange(width) * columns // width
    return (down[:, None] * columns + across[None, :]).expand_as(given).contiguous()


def _picture(image: torch.Tensor, scores: torch.Tensor) -> str:
    """The image in grey beside itself under its scores: orange speaks for the answer, blue against it."""
    from PIL import Image

    low, high = image.min(), image.max()
    grey = ((image - low) / (high - low).clamp_min(1e-9)).mean(0).numpy()
    share = np.clip(scores.numpy() / max(1e-12, float(np.quantile(np.abs(scores.numpy()), 0.995))), -1, 1)
    colour = np.where(share[..., None] > 0, np.array(_FOR), np.array(_AGAINST))
    weight = np.abs(share)[..., None] ** 0.6
    base = np.repeat(255 * (0.25 + 0.75 * grey)[..., None], 3, axis=2)
    plain = np.repeat(255 * grey[..., None], 3, axis=2)
    both = np.concatenate([plain, base * (1 - weight) + colour * weight], axis=1)
    times = max(1, _SHOWN_PIXELS // max(grey.shape))
    drawn = Image.fromarray(both.round().astype(np.uint8))
    shown = drawn.resize((drawn.width * times, drawn.height * times), Image.Resampling.NEAREST)
    if max(grey.shape) > _SHOWN_PIXELS:
        shown.thumbnail((2 * _SHOWN_PIXELS, _SHOWN_PIXELS))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
