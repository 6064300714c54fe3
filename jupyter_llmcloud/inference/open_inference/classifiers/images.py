"""Classifiers of images, from transformers."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.inference.open_inference.classifiers.scores import Labels
from jupyter_llmcloud.inference.open_inference.messages import InferRequest
from jupyter_llmcloud.inference.open_inference.predictor import ModelMetadata, TensorMetadata
from jupyter_llmcloud.inference.open_inference.tensors import BYTES, Array, InvalidInput, Tensor
from jupyter_llmcloud.storage.datasets.pixels import as_rgb

MAX_PIXELS = 64 << 20


class ImageClassifier:
    """A row of scores for each image. Images are files (PNG, JPEG), arrays of pixels, or what a processor made of them.

    Args:
        model: of transformers, for image classification.
        processor: makes `pixel_values` of an image; None: they must be sent.
        max_rows: of a batch.
    """

    def __init__(self, model: Any, processor: Any, max_rows: int) -> None:
        self.kind = "image-classifier"
        self.max_rows = max_rows
        self.labels = Labels.of(model.config, self.kind)
        self.details: dict[str, Any] = {"num_labels": len(self.labels.names), "processor": processor is not None}
        self._model = model
        self._processor = processor

    def metadata(self) -> ModelMetadata:
        """What it takes and gives. One of the inputs is sent."""
        inputs = [TensorMetadata("pixel_values", "FP32", (-1, -1, -1, -1))]
        if self._processor is not None:
            inputs.append(TensorMetadata("image", BYTES, (-1,)))
        return ModelMetadata("transformers", inputs, self.labels.metadata((-1,)), self.labels.details())

    def rows(self, asked: InferRequest) -> list[Any]:
        """Raises InvalidInput. A row is the bytes of a file, uint8 pixels [height, width, 3] or float pixel values."""
        if asked.tensors is None:
            return self._files(asked.value)
        if len(asked.tensors) != 1:
            raise InvalidInput(f"one input is wanted, image or pixel_values, not {', '.join(asked.tensors)}")
        [tensor] = asked.tensors.values()
        if not tensor.shape or not tensor.shape[0]:
            raise InvalidInput(
                f"inputs[{tensor.name!r}] must have at least one row, not the shape {list(tensor.shape)}"
            )
        if tensor.name == "pixel_values":
            if tensor.data.dtype.kind != "f" or len(tensor.shape) != 4:
                raise InvalidInput("pixel_values must be FP32 of shape [images, channels, height, width]")
            return list(tensor.data.astype(np.float32))
        self._check_processor()
        if tensor.datatype == BYTES:
            return list(tensor.data.reshape(-1))
        if tensor.datatype == "UINT8" and len(tensor.shape) == 4 and tensor.shape[3] in (1, 3):
            return list(tensor.data)
        raise InvalidInput(
            f"inputs[{tensor.name!r}] must be BYTES (image files), or UINT8 of shape [images, height, width, 3], "
            f"not {tensor.datatype} of {list(tensor.shape)}"
        )

    def _check_processor(self) -> None:
        if self._processor is None:
            raise InvalidInput("the model was saved without an image processor: send pixel_values")

    def _files(self, value: Any) -> list[Any]:
        self._check_processor()
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
            raise InvalidInput("inputs must be an image file in base64, a list of such, or a list of tensors")
        try:
            return [base64.b64decode(item.rpartition("base64,")[2], validate=True) for item in items]
        except (binascii.Error, ValueError) as error:
            raise InvalidInput(f"inputs must be image files in base64: {error}") from None

    def predict(self, rows: list[Any]) -> list[Any]:
        """The logits of each row; images of one size share a pass."""
        results: list[Any] = [self._pixels(row) for row in rows]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, pixels in enumerate(results):
            if not isinstance(pixels, InvalidInput):
                shapes.setdefault(pixels.shape, []).append(index)
        for shape, indices in shapes.items():
            logits = self._logits(np.stack([results[index] for index in indices]), shape)
            for index, row in zip(indices, logits, strict=True):
                results[index] = row
        return results

    def _pixels(self, row: Any) -> Array | InvalidInput:
        if isinstance(row, np.ndarray) and row.dtype == np.float32:
            return row
        image = _opened(row) if isinstance(row, bytes) else row
        if isinstance(image, InvalidInput):
            return image
        made = self._processor(images=image, return_tensors="np")["pixel_values"]
        return np.asarray(made[0], dtype=np.float32)

    def _logits(self, pixels: Array, shape: tuple[int, ...]) -> list[Any]:
        inputs = torch.from_numpy(pixels).to(self._model.device, self._model.dtype)
        try:
            with torch.inference_mode():
                return list(self._model(pixel_values=inputs).logits.float().cpu().numpy())
        except (ValueError, RuntimeError) as error:  # a size or a number of channels that it does not take
            return [InvalidInput(f"the model takes no pixel_values of shape {list(shape)}: {error}")] * len(pixels)

    def reply(self, asked: InferRequest, results: list[Any]) -> dict[str, Tensor] | Any:
        """`logits`, `scores` and `labels`; as JSON an object for each image."""
        logits = np.stack(results)
        if not asked.is_json:
            return self.labels.tensors(logits)
        told = self.labels.told(logits)
        return told[0] if isinstance(asked.value, str) else told

    def close(self) -> None:
        """Nothing is held beside memory."""


def _opened(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            return InvalidInput(f"the image has {image.width} x {image.height} pixels: at most {MAX_PIXELS} are read")
        return as_rgb(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        return InvalidInput(f"the image cannot be read: {error}")
