"""An answer of a model, explained: which model it is, and who explains such."""

from __future__ import annotations

from jupyter_llmcloud.core.serving.models.model_kind import GENERATOR, says
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.explanation.attribution import check_installed
from jupyter_llmcloud.explanation.models import TEXT_KINDS, open_model
from jupyter_llmcloud.protocol.explanation import ExplainRequest
from jupyter_llmcloud.protocol.model_work import Tell, WorkProgress


def explain(request: ExplainRequest, tell: Tell) -> None:
    """Tell which parts of the input led to the answer."""
    check_installed()
    tell(WorkProgress(text=f"{request.target} is read"))
    opened = open_model(request.target, request.base_model)
    takes_text = opened.kind in TEXT_KINDS
    if takes_text != (not request.file):
        wanted = "a text" if takes_text else "an image or an array, by its file or --input VARIABLE"
        raise UsageError(f"%explain {opened.name}: it {says(opened.kind)}, and is asked by {wanted}.")
    if opened.kind != GENERATOR and (request.answer or request.num_new != 1):
        raise UsageError(
            f"%explain {opened.name}: --new and --answer are for models that generate; it {says(opened.kind)}."
        )
    if opened.kind == GENERATOR and request.label:
        raise UsageError(
            f"%explain {opened.name}: --label is for classifiers; it {says(opened.kind)}: say --answer TEXT."
        )
    tell(WorkProgress(text=f"{opened.name} is asked"))
    if not takes_text:
        from jupyter_llmcloud.explanation.arrays import explain_array

        explain_array(opened, request, tell)
        return
    from jupyter_llmcloud.explanation.texts import explain_classifier, explain_generator

    (explain_generator if opened.kind == GENERATOR else explain_classifier)(opened, request, tell)
