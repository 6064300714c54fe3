"""What a model is for, from its config.json."""

from __future__ import annotations

from typing import Any

import pytest

from jupyter_llmcloud.core.serving.models.model_kind import (
    GENERATOR,
    kind_of_adapter,
    kind_of_config,
    why_not_instead,
)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "generator"),
        ({"architectures": ["GPT2LMHeadModel"]}, "generator"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "generator"),
        ({}, "generator"),
        ({"architectures": ["BertForSequenceClassification"]}, "classifier"),
        ({"architectures": ["BertForSequenceClassification"], "problem_type": "regression"}, "regressor"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, "regressor"),
        ({"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}, "classifier"),
        ({"architectures": ["BertForTokenClassification"]}, "token-classifier"),
        ({"architectures": ["ViTForImageClassification"]}, "image-classifier"),
        ({"architectures": ["DeiTForImageClassificationWithTeacher"]}, "image-classifier"),
        ({"architectures": ["BertModel"]}, "embedder"),
        ({"architectures": ["BertForMaskedLM"]}, "embedder"),
        ({"architectures": ["BertForQuestionAnswering"]}, "unknown"),
        ({"architectures": ["WavLMForXVector"]}, "unknown"),
        ({"architectures": "nonsense"}, "generator"),
    ],
)
def test_the_kind_is_told_by_the_class_name(config: dict[str, Any], kind: str) -> None:
    assert kind_of_config(config) == kind


def test_an_adapter_makes_another_kind_of_its_base() -> None:
    assert kind_of_adapter("SEQ_CLS", GENERATOR) == "classifier"
    assert kind_of_adapter("CAUSAL_LM", "embedder") == "generator"
    assert kind_of_adapter(None, GENERATOR) == "generator"


@pytest.mark.parametrize(
    ("before", "after", "can"),
    [
        ("generator", "generator", True),
        ("classifier", "regressor", True),
        ("module", "python", True),
        ("generator", "classifier", False),
        ("python", "generator", False),
        ("embedder", "generator", False),
    ],
)
def test_a_model_takes_over_from_one_that_is_asked_in_the_same_way(before: str, after: str, can: bool) -> None:
    assert (why_not_instead("m", before, after, "other") == "") == can
