"""Classifiers and regressors of texts, and of the tokens of texts, from transformers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.inference.open_inference.classifiers.scores import Labels
from jupyter_llmcloud.inference.open_inference.messages import InferRequest
from jupyter_llmcloud.inference.open_inference.predictor import ModelMetadata, TensorMetadata
from jupyter_llmcloud.inference.open_inference.tensors import BYTES, InvalidInput, Tensor
from jupyter_llmcloud.inference.openai.prompt_length import far_too_long

log = logging.getLogger(__name__)

_TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TEXT_INPUTS = ("text", "text_pair")
_TRIAL_LENGTHS = (5, 9)


@dataclass(frozen=True)
class TextRow:
    """A text, or two that belong together."""

    text: str
    pair: str | None = None
    truncates: bool = False


@dataclass(frozen=True)
class TokenRow:
    """Token ids that whoever asks has made; the other inputs by name, each as long."""

    input_ids: list[int]
    others: dict[str, list[int]]


@dataclass(frozen=True)
class Encoded:
    """What the model gets of a row.

    Attributes:
        offsets: where in the text each token is; None for ids that were sent.
    """

    inputs: dict[str, list[int]]
    offsets: list[tuple[int, int]] | None = None

    @property
    def length(self) -> int:
        """Its number of tokens."""
        return len(self.inputs["input_ids"])


class TextModel:
    """What models of texts share: from rows to batches that may be padded, and to logits.

    Attributes:
        max_rows: of a batch; 1 when the model mixes the rows of a batch.
        pads: whether rows of several lengths may share a batch.
    """

    def __init__(self, model: Any, tokenizer: Any, kind: str, max_rows: int) -> None:
        self.kind = kind
        self.max_rows = max_rows
        self.pads = True
        self.labels = Labels.of(model.config, kind)
        self.details: dict[str, Any] = {}
        self._model = model
        self._tokenizer = tokenizer
        self._limit = max_length(model, tokenizer)
        self._pad_id = _pad_id(model, tokenizer)
        self._try_batches()
        self.details |= {"context_length": self._limit, "num_labels": len(self.labels.names), "pads": self.pads}

    # --- a request to rows ---

    def rows(self, asked: InferRequest) -> list[Any]:
        """Raises InvalidInput."""
        truncates = _switch(asked, "truncation")
        if asked.tensors is None:
            return [TextRow(text, pair, truncates) for text, pair in _texts(asked.value)]
        if "input_ids" in asked.tensors:
            return self._token_rows(asked.tensors)
        return _text_rows(asked.tensors, truncates)

    def _token_rows(self, tensors: dict[str, Tensor]) -> list[Any]:
        if unknown := [name for name in tensors if name not in _TOKEN_INPUTS]:
            raise InvalidInput(f"there is no input {unknown[0]!r:.60} beside input_ids: {', '.join(_TOKEN_INPUTS)}")
        ids = tensors["input_ids"]
        for tensor in tensors.values():
            if tensor.data.dtype.kind not in "iu":
                raise InvalidInput(f"inputs[{tensor.name!r}] must be INT64, not {tensor.datatype}")
            if len(tensor.shape) != 2 or tensor.shape != ids.shape or 0 in tensor.shape:
                raise InvalidInput(
                    f"inputs[{tensor.name!r}] must have the shape [rows, tokens] of input_ids, at least [1, 1], "
                    f"not {list(tensor.shape)}"
                )
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        if (outside := ids.data[(ids.data < 0) | (ids.data >= vocabulary)]).size:
            raise InvalidInput(f"input_ids holds {int(outside[0])}: the model knows the ids 0 to {vocabulary - 1}")
        if ids.shape[1] > self._limit:
            raise InvalidInput(f"input_ids has {ids.shape[1]} tokens in a row: the model takes {self._limit}")
        others = [name for name in _TOKEN_INPUTS[1:] if name in tensors]
        return [
            TokenRow(ids.data[row].tolist(), {name: tensors[name].data[row].tolist() for name in others})
            for row in range(ids.shape[0])
        ]

    # --- rows to logits ---

    def predict(self, rows: list[Any]) -> list[Any]:
        """The logits of each row with what it was encoded as: (array, Encoded)."""
        results: list[Any] = [self._encoded(row) for row in rows]
        good = [index for index, result in enumerate(results) if isinstance(result, Encoded)]
        for group in self._groups(good, [results[index].length for index in good]):
            for index, logits in zip(group, self._logits([results[i] for i in group]), strict=True):
                results[index] = (logits, results[index])
        return results

    def _groups(self, rows: list[int], lengths: list[int]) -> Iterable[list[int]]:
        """Rows that are computed in one pass: all of them, or those of the same length."""
        if self.pads:
            return [rows] if rows else []
        by_length: dict[int, list[int]] = {}
        for row, length in zip(rows, lengths, strict=True):
            by_length.setdefault(length, []).append(row)
        return by_length.values()

    def _encoded(self, row: TextRow | TokenRow) -> Encoded | InvalidInput:
        if isinstance(row, TokenRow):
            ones = [1] * len(row.input_ids)
            return Encoded({"attention_mask": ones, **row.others, "input_ids": row.input_ids})
        given = (row.text,) if row.pair is None else (row.text, row.pair)
        for text in () if row.truncates else given:  # rows of others wait for it
            if (found := far_too_long(text, self._tokenizer, self._limit)) is not None:
                return self._too_long(f"at least {found.num_tokens}")
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        options: dict[str, Any] = {"truncation": True, "max_length": self._limit} if row.truncates else {}
        encoding = self._tokenizer(*given, return_offsets_mapping=fast, return_attention_mask=True, **options)
        offsets = encoding.pop("offset_mapping") if fast else None
        names = {"input_ids", "attention_mask", *self._tokenizer.model_input_names} & set(_TOKEN_INPUTS)
        encoded = Encoded({name: list(encoding[name]) for name in names if name in encoding}, offsets)
        if not encoded.length:
            return InvalidInput("the text has no tokens: send one that is not empty")
        if encoded.length > self._limit:
            return self._too_long(str(encoded.length))
        return encoded

    def _too_long(self, num_tokens: str) -> InvalidInput:
        return InvalidInput(
            f"the text has {num_tokens} tokens, and the model takes {self._limit}: shorten it, or send "
            '"parameters": {"truncation": true} to have its end cut off'
        )

    def _logits(self, rows: Sequence[Encoded]) -> list[Any]:
        """One array a row, without what was padded: [labels], or [tokens, labels]."""
        length = max(row.length for row in rows)
        padding = {"input_ids": self._pad_id}
        names = set.intersection(*(set(row.inputs) for row in rows))
        if any(set(row.inputs) != names for row in rows):  # of some rows more is known: they go alone
            return [logits for row in rows for logits in self._logits([row])]
        inputs = {
            name: torch.tensor(
                [[*row.inputs[name], *[padding.get(name, 0)] * (length - row.length)] for row in rows],
                device=self._model.device,
            )
            for name in names
        }
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float().cpu().numpy()
        if logits.ndim == 3:
            return [logits[index, : row.length] for index, row in enumerate(rows)]
        return list(logits)

    # --- what may share a batch ---

    def _try_batches(self) -> None:
        """Compare rows that share a batch with the same rows alone: what differs is never put together."""
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        generator = np.random.default_rng(0)
        ids = [generator.integers(0, vocabulary, length) for length in _TRIAL_LENGTHS]
        short, long = ([int(item) for item in row if item != self._pad_id] or [0] for row in ids)
        rows = [Encoded({"input_ids": row, "attention_mask": [1] * len(row)}) for row in (short, long, long[::-1])]
        alone = [self._logits([row])[0] for row in rows]
        if self.max_rows > 1 and not self._agree(rows[1:], alone[1:]):
            log.warning("rows are computed one at a time: the model mixes the rows of a batch")
            self.max_rows = 1
        if self.max_rows == 1 or not self._agree(rows, alone):
            self.pads = False
        self.details["batches"] = self.max_rows

    def _agree(self, rows: Sequence[Encoded], alone: Sequence[Any]) -> bool:
        tolerance = 1e-4 if self._model.dtype == torch.float32 else 3e-2
        try:
            together = self._logits(rows)
        except (ValueError, RuntimeError, IndexError) as error:  # no padding token, for one
            log.info("rows cannot share a batch: %s", error)
            return False
        return all(
            np.allclose(one, two, rtol=tolerance, atol=tolerance * (1 + float(np.abs(one).max())))
            for one, two in zip(alone, together, strict=True)
        )

    def close(self) -> None:
        """Nothing is held beside memory."""

    def _inputs_metadata(self) -> list[TensorMetadata]:
        texts = [TensorMetadata("text", BYTES, (-1,))]
        return [*texts, *(TensorMetadata(name, "INT64", (-1, -1)) for name in _TOKEN_INPUTS[:2])]


class TextClassifier(TextModel):
    """Sequence classification and regression: a row of scores for each text."""

    def metadata(self) -> ModelMetadata:
        """What it takes and gives. Of text and input_ids one is sent."""
        outputs = self.labels.metadata((-1,))
        return ModelMetadata("transformers", self._inputs_metadata(), outputs, self.labels.details())

    def reply(self, asked: InferRequest, results: list[Any]) -> dict[str, Tensor] | Any:
        """`logits`, `scores` and `labels`; as JSON an object for each text."""
        logits = np.stack([logits for logits, _ in results])
        if not asked.is_json:
            return self.labels.tensors(logits)
        told = self.labels.told(logits)
        return told[0] if _is_one(asked.value) else told


class TokenClassifier(TextModel):
    """A row of scores for each token. Rows of several lengths are told with zeros behind the shorter ones."""

    def metadata(self) -> ModelMetadata:
        """What it takes and gives. Of text and input_ids one is sent."""
        outputs = [
            *self.labels.metadata((-1, -1)),
            TensorMetadata("input_ids", "INT64", (-1, -1)),
            TensorMetadata("attention_mask", "INT64", (-1, -1)),
            TensorMetadata("offsets", "INT64", (-1, -1, 2)),
        ]
        return ModelMetadata("transformers", self._inputs_metadata(), outputs, self.labels.details())

    def reply(self, asked: InferRequest, results: list[Any]) -> dict[str, Tensor] | Any:
        """Tensors of [rows, tokens], `attention_mask` telling which are there; as JSON a list of tokens a text."""
        if asked.is_json:
            told = [
                self._tokens(asked_text, *result) for asked_text, result in zip(_plain(asked), results, strict=True)
            ]
            return told[0] if _is_one(asked.value) else told
        length = max(encoded.length for _, encoded in results)
        logits = np.zeros((len(results), length, len(self.labels.names)), dtype=np.float32)
        present = np.zeros((len(results), length), dtype=np.int64)
        ids = np.zeros_like(present)
        offsets = np.zeros((len(results), length, 2), dtype=np.int64)
        for row, (values, encoded) in enumerate(results):
            logits[row, : encoded.length] = values
            present[row, : encoded.length] = encoded.inputs["attention_mask"]
            ids[row, : encoded.length] = encoded.inputs["input_ids"]
            if encoded.offsets is not None:
                offsets[row, : encoded.length] = encoded.offsets
        outputs = self.labels.tensors(logits, present != 0)
        more = {"input_ids": ids, "attention_mask": present, "offsets": offsets}
        return {**outputs, **{name: Tensor(name, "INT64", value) for name, value in more.items()}}

    def _tokens(self, text: str, logits: Any, encoded: Encoded) -> list[dict[str, Any]]:
        rows = self.labels.told(logits)
        ids = encoded.inputs["input_ids"]
        tokens = self._tokenizer.convert_ids_to_tokens(ids)
        offsets: Iterable[Any] = encoded.offsets or itertools.repeat((0, 0), len(ids))
        told = []
        for token, (start, end), row in zip(tokens, offsets, rows, strict=True):
            if encoded.offsets is not None and start == end:  # a special token
                continue
            told.append({"token": token, "start": start, "end": end, **row})
        return told


def _texts(value: Any) -> list[tuple[str, str | None]]:
    items = [value] if _is_one(value) else value
    if not isinstance(items, list) or not items:
        raise InvalidInput("inputs must be a text, a list of at least one text, or a list of tensors")
    return [_text(item) for item in items]


def _is_one(value: Any) -> bool:
    return isinstance(value, str | dict)


def _text(item: Any) -> tuple[str, str | None]:
    if isinstance(item, str):
        return item, None
    if isinstance(item, dict) and set(item) <= set(_TEXT_INPUTS) and all(isinstance(v, str) for v in item.values()):
        if "text" in item:
            return item["text"], item.get("text_pair")
    elif isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item):
        return item[0], item[1]
    raise InvalidInput(f'each of inputs is a text, {{"text": ..., "text_pair": ...}} or a pair, not {item!r:.80}')


def _plain(asked: InferRequest) -> list[str]:
    return [text for text, _ in _texts(asked.value)]


def _text_rows(tensors: dict[str, Tensor], truncates: bool) -> list[Any]:
    named = dict(tensors)
    if len(named) == 1:
        [only] = named.values()
        named = {only.name if only.name in _TEXT_INPUTS else "text": only}
    if "text" not in named or (unknown := [name for name in named if name not in _TEXT_INPUTS]):
        wrong = unknown[0] if "text" in named else ", ".join(named)
        raise InvalidInput(
            f"there is no input {wrong!r:.60}: send text (BYTES), or input_ids and attention_mask (INT64)"
        )
    columns = [_column(tensor) for tensor in (named["text"], *([named["text_pair"]] if "text_pair" in named else []))]
    if len({len(column) for column in columns}) != 1:
        raise InvalidInput("text and text_pair must have the same shape")
    pairs: Iterable[Any] = columns[1] if len(columns) == 2 else itertools.repeat(None, len(columns[0]))
    return [TextRow(text, pair, truncates) for text, pair in zip(columns[0], pairs, strict=True)]


def _column(tensor: Tensor) -> list[str]:
    shape = tensor.shape
    if tensor.datatype != BYTES:
        raise InvalidInput(f"inputs[{tensor.name!r}] must be BYTES, not {tensor.datatype}")
    if not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)) or not shape[0]:
        raise InvalidInput(f"inputs[{tensor.name!r}] must have the shape [texts], at least [1], not {list(shape)}")
    try:
        return [item.decode() for item in tensor.data.flat]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"inputs[{tensor.name!r}] holds a text that is no UTF-8: {error}") from None


def _switch(asked: InferRequest, name: str) -> bool:
    value = asked.parameters.get(name, False)
    if not isinstance(value, bool):
        raise InvalidInput(f"parameters.{name} is true or false, not {value!r:.40}")
    return value


def max_length(model: Any, tokenizer: Any) -> int:
    """Tokens that a text may have."""
    config = model.config.get_text_config()
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits = [limit for limit in known if isinstance(limit, int) and limit > 0]
    for name, module in model.named_modules():
        is_table = name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
        if is_table and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from there
    of_tokenizer = getattr(tokenizer, "model_max_length", None)
    if isinstance(of_tokenizer, int) and 0 < of_tokenizer < 10_000_000:
        limits.append(of_tokenizer)
    return min(limits, default=2048)


def _pad_id(model: Any, tokenizer: Any) -> int:
    known = (getattr(tokenizer, "pad_token_id", None), getattr(model.config, "pad_token_id", None))
    return next((int(value) for value in known if isinstance(value, int) and value >= 0), 0)
