"""A model as it is explained: loaded with plain weights in float32, so that it has gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.serving.models.model_kind import GENERATOR, says
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import loading
from jupyter_llmcloud.storage.model_folder import ModelLayout, check_folder, model_kind
from jupyter_llmcloud.storage.models.named_model import named_model

TEXT_KINDS = (GENERATOR, "classifier", "regressor")
OTHER_KINDS = ("image-classifier", "module")


@dataclass(frozen=True)
class OpenedModel:
    """A model in memory.

    Attributes:
        name: as it is shown.
        kind: what it is for.
        source: the run or the folder that its weights are from.
        model: in eval mode; of a generator whose architecture a cell has defined, that has no `inputs_embeds`.
        tokenizer: of a model of texts.
        processor: of a model of images; None: it is given pixel values.
        context_length: how many tokens a generator takes.
        eos: ids that end what it generates.
        num_tokens: of its vocabulary, where it generates.
    """

    name: str
    kind: str
    model: Any
    tokenizer: Any = None
    processor: Any = None
    context_length: int = 0
    eos: frozenset[int] = frozenset()
    num_tokens: int = 0
    is_encoder_decoder: bool = False
    source: str = ""

    @property
    def has_embeddings(self) -> bool:
        """Whether it can be given the vectors of tokens in place of their ids."""
        from jupyter_llmcloud.inference.own_models.causal_module import CausalModule

        return self.kind in TEXT_KINDS and not isinstance(self.model, CausalModule)


def open_model(target: str, base_model: str = "") -> OpenedModel:
    """Load what a user named: a run, or a folder. Raises NotFound or ModelError."""
    folder, run = named_model(target)
    layout = check_folder(folder, Path(base_model) if base_model else None, is_own=run is not None)
    kind = model_kind(layout)
    name = folder.name if run is None else run.read().name
    if kind not in (*TEXT_KINDS, *OTHER_KINDS):
        raise ModelError(
            f"{target} {says(kind)}. Explained are models that generate text, classifiers and regressors of texts, "
            "classifiers of images, and modules of a cell that are given an array."
        )
    with loading(folder):
        opened = _generator(name, folder, layout) if kind == GENERATOR else _other(name, kind, layout)
    for parameter in opened.model.parameters():
        parameter.requires_grad_(False)  # gradients are wanted of inputs alone
    return replace(opened, source=f"run {run.run_id}" if run is not None else str(folder))


def _generator(name: str, folder: Path, layout: ModelLayout) -> OpenedModel:
    from jupyter_llmcloud.inference.engines.loading import load_model
    from jupyter_llmcloud.inference.own_models.opening import load_folder

    if layout.architecture is not None:
        loaded = load_folder(folder, "float32", "cpu", None)
    else:
        base = layout.folder if layout.adapter is not None else None
        loaded = load_model(folder, dtype="float32", base_model=base)
    return OpenedModel(
        name,
        GENERATOR,
        loaded.model,
        loaded.tokenizer,
        context_length=loaded.context_length,
        eos=loaded.eos,
        num_tokens=loaded.num_vocabulary,
        is_encoder_decoder=loaded.is_encoder_decoder,
    )


def _other(name: str, kind: str, layout: ModelLayout) -> OpenedModel:
    from jupyter_llmcloud.inference.open_inference.classifiers.loading import image_processor, load_transformer

    if layout.architecture is not None:
        from jupyter_llmcloud.inference.architecture import load_own

        return OpenedModel(name, kind, load_own(layout.architecture, layout.folder, "float32", "cpu").eval())
    model = load_transformer(layout, kind, "float32")
    if kind == "image-classifier":
        return OpenedModel(name, kind, model, processor=image_processor(layout.folder))
    from transformers import AutoTokenizer

    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = -1  # no token: rows of one length are asked together
    tokenizer = AutoTokenizer.from_pretrained(layout.tokenizer, local_files_only=True, trust_remote_code=False)
    return OpenedModel(name, kind, model, tokenizer)
