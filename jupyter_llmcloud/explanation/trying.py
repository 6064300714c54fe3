"""A model asked inputs that are changed, and such as it was not made for."""

from __future__ import annotations

from jupyter_llmcloud.core.serving.models.model_kind import GENERATOR, says
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.explanation.models import open_model
from jupyter_llmcloud.protocol.explanation import TryRequest
from jupyter_llmcloud.protocol.model_work import Tell, WorkProgress


def try_model(request: TryRequest, tell: Tell) -> None:
    """Tell how it stands each change of the data, and what it says of other inputs."""
    tell(WorkProgress(text=f"{request.target} is read"))
    opened = open_model(request.target, request.base_model)
    if opened.kind == "regressor":
        raise UsageError(
            f"%explain {opened.name} --adversarial: it {says(opened.kind)}; tried are classifiers and generators."
        )
    if opened.kind in ("image-classifier", "module"):
        from jupyter_llmcloud.explanation.tried_arrays import try_arrays as try_kind
    elif opened.kind == GENERATOR:
        from jupyter_llmcloud.explanation.tried_generators import try_generator as try_kind
    else:
        from jupyter_llmcloud.explanation.tried_texts import try_classifier as try_kind
    try_kind(opened, request, tell)
