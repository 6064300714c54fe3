"""What clients of other APIs, and of this one with a wrong base URL, are told."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.serving.unknown_paths import model_in, unknown_path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/llmcloud/v1/messages", "Anthropic"),
        ("/llmcloud/v1/messages/count_tokens", "Anthropic"),
        ("/llmcloud/v1/images/generations", "read and write text"),
        ("/llmcloud/v1/rerank", "/llmcloud/v2"),
        ("/llmcloud/v1/api/chat", "Ollama"),
        ("/llmcloud/v1/fine_tuning/jobs", "%%distribute"),
        ("/llmcloud/v1/v1/chat/completions", "/v1 twice. Ask /llmcloud/v1/chat/completions."),
        ("/llmcloud/chat/completions", "/v1 is missing. Ask /llmcloud/v1/chat/completions;"),
        ("/llmcloud/v1", "There is POST /llmcloud/v1/chat/completions"),
        ("/llmcloud/v1/nothing/at/all", "There is POST /llmcloud/v1/chat/completions"),
    ],
)
def test_the_message_says_whose_it_is_and_what_there_is(path: str, words: str) -> None:
    told = unknown_path("POST", path)
    assert told.startswith(f"POST {path} does not exist here") and words in told


@pytest.mark.parametrize(
    ("path", "name"),
    [("models/a%2Fb", "a/b"), ("models/a/b/", "a/b"), ("models/a b", "a b"), ("models", None), ("files/a", None)],
)
def test_the_model_that_a_path_names(path: str, name: str | None) -> None:
    for base in ("/", "/user/ada/"):
        assert model_in(f"{base}llmcloud/v1/{path}", base) == name


def test_the_paths_are_those_below_the_prefix_of_the_server() -> None:
    told = unknown_path("POST", "/user/ada/llmcloud/v1/v1/completions", "/user/ada/")
    assert told.endswith("Ask /user/ada/llmcloud/v1/completions.")
