"""What `jupyter llmcloud serve` prints to paste fits what is served; tests/server/test_listener.py pastes it."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("kind", ["generator", "embedder", "python"])
def test_a_certificate_is_named_to_curl_and_to_python_by_its_whole_path(kind: str) -> None:
    """Python was told nothing of it: what was pasted ended in "Connection error"."""
    curl, _, python = examples(kind, "https://h/llmcloud/v1", "sk-key", "m", "cert.pem").strip().partition("\n\n")
    whole = os.path.abspath("cert.pem")
    assert shlex.split(curl)[:3] == ["curl", "--cacert", whole]
    compile(python, "pasted", "exec")
    assert f"trusted.load_verify_locations({whole!r})" in python and "verify=trusted" in python
