"""What the process that makes models smaller is asked, and what it tells: a line of JSON each."""

from __future__ import annotations

from typing import Any

import msgspec

from jupyter_llmcloud.protocol.model_work import Failed, WorkProgress


class CompressRequest(msgspec.Struct, kw_only=True, frozen=True, tag="compress"):
    """Make models.

    Attributes:
        target: a run, or a folder.
        methods: as `core.compression.methods` reads them.
        name: of the result, when it is not that of its method; "" otherwise.
        base_model: of an adapter, the folder of its base model; "": the one it names.
        texts: a file with JSON, a list of texts that pruning and distillation see; "": the model writes them.
        line: what was typed, for the record.
        owner: of the runs that are made.
    """

    target: str
    methods: list[str]
    name: str = ""
    base_model: str = ""
    texts: str = ""
    line: str = ""
    owner: str = ""


class MeasureRequest(msgspec.Struct, kw_only=True, frozen=True, tag="measure"):
    """Measure models beside the first one.

    Attributes:
        models: runs or folders, the first as it was before.
        texts: a file with JSON, a list of held-out texts; "": the first model writes them.
        told: what those texts are, for the table.
        base_model: of the first one.
    """

    models: list[str]
    texts: str = ""
    told: str = ""
    base_model: str = ""


class ExportRequest(msgspec.Struct, kw_only=True, frozen=True, tag="export"):
    """Write a model for another runtime, and compare.

    Attributes:
        to: onnx, gguf or executorch.
        out: an absolute path; "": a file in the folder of the run, or beside the model.
        weights: of gguf, the type of the large weights.
    """

    target: str
    to: str
    out: str = ""
    weights: str = "f16"
    base_model: str = ""


Request = CompressRequest | MeasureRequest | ExportRequest


class Made(msgspec.Struct, kw_only=True, frozen=True, tag="made"):
    """A model was made, and is kept as a run."""

    method: str
    run_id: str
    name: str
    note: str = ""


class MethodRefused(msgspec.Struct, kw_only=True, frozen=True, tag="refused"):
    """A method cannot be had of this model; others may."""

    method: str
    reason: str


class Trainable(msgspec.Struct, kw_only=True, frozen=True, tag="trainable"):
    """A distillation that was checked, and can be done on ranks.

    Attributes:
        student, teacher: folders.
        texts: a file with JSON, a list of texts.
    """

    method: str
    name: str
    student: str
    teacher: str
    texts: str


class ModelMeasured(msgspec.Struct, kw_only=True, frozen=True, tag="measured"):
    """The fields of a core.compression.table.MeasuredModel."""

    model: dict[str, Any]


class Exported(msgspec.Struct, kw_only=True, frozen=True, tag="exported"):
    """A file was written. The notes say how it compares."""

    path: str
    notes: list[str]


class Caption(msgspec.Struct, kw_only=True, frozen=True, tag="caption"):
    """What the figures of a table are of."""

    text: str


Event = WorkProgress | Made | MethodRefused | Trainable | ModelMeasured | Exported | Caption | Failed
