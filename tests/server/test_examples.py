"""What `jupyter llmcloud serve` prints to paste fits what is served; tests/server/test_listener.py pastes it."""

from __future__ import annotations

import shlex

import pytest

from jupyter_llmcloud.server.headless.foreground import examples


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("generator", "/llmcloud/v1/completions"),
        ("embedder", "/llmcloud/v1/embeddings"),
        ("classifier", "/llmcloud/v2/models/m/infer"),
        ("module", "/llmcloud/v2/models/m/infer"),
        ("python", "/llmcloud/v2/models/m/infer"),
    ],
)
def test_each_kind_is_asked_where_it_answers(kind: str, path: str) -> None:
    curl, _, python = examples(kind, "http://h/llmcloud/v1", "sk-key", "m").strip().partition("\n\n")
    words = shlex.split(curl)
    assert words[1] == f"http://h{path}" and "Authorization: Bearer sk-key" in words
    compile(python, "pasted", "exec")
    assert "sk-key" in python and ("OpenAI(" in python) == ("/v1/" in path)
