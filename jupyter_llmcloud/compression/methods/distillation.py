"""Whether one model can learn from another: checked before ranks are asked."""

from __future__ import annotations

import json

from jupyter_llmcloud.compression.sources import SourceModel
from jupyter_llmcloud.errors import ModelError


def check_teacher(student: SourceModel, teacher: SourceModel) -> None:
    """Raise ModelError unless the scores of both are of the same tokens."""
    from transformers import AutoTokenizer

    if student.folder == teacher.folder:
        raise ModelError(f"distill:{teacher.name}: a model learns nothing from itself: name another teacher.")
    for one in (student, teacher):
        if one.layout.adapter is not None:
            raise ModelError(f"distill is for whole models, and {one.name} is an adapter: lora-merge makes one of it.")
        if "quantization_config" in json.loads((one.folder / "config.json").read_bytes()):
            raise ModelError(f"distill is for plain models, and {one.name} is quantized: name what it was made of.")
    mine, theirs = (AutoTokenizer.from_pretrained(one.layout.tokenizer).get_vocab() for one in (student, teacher))
    if mine != theirs:
        unlike = len(mine.items() ^ theirs.items())
        raise ModelError(
            f"distill:{teacher.name}: the teacher has another vocabulary ({len(theirs)} tokens, {student.name} has "
            f"{len(mine)}, and {unlike} are of one only or have other numbers), so its scores are of other tokens. "
            "Name a teacher with the same tokenizer."
        )
