"""OpenAI's own client asks a real server with a real replica: what is told is what the model computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from tests.support.tiny_models import CHAT_TEMPLATE, one_thread, save_tiny_bert, save_tiny_llama

pytest_plugins = ["tests.support.server_fixtures"]
ASKED: Any = [{"role": "user", "content": "Which function?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"word": {"enum": ["for", "while"]}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}


class Verdict(pydantic.BaseModel):
    """What the model is made to say."""

    model_config = pydantic.ConfigDict(extra="forbid")
    word: Literal["for", "while"]
    is_statement: bool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model", chat_template=CHAT_TEMPLATE, context_length=1024)


@contextmanager
def serving(server: ServerClient, folder: Path, num_replicas: int) -> Iterator[openai.OpenAI]:
    """A client of a real server with an endpoint `tiny`."""
    server.create_endpoint(str(folder), name="tiny", replicas=num_replicas)
    while (told := server.endpoint("tiny", wait_s=20))["state"] == "starting":
        continue
    assert told["state"] == "ready", told
    key = server.create_key(["infer:tiny"])["key"]
    with openai.OpenAI(base_url=server.openai_url, api_key=key, max_retries=0, timeout=60) as opened:
        yield opened
    server.stop_endpoint("tiny")


@pytest.mark.slow
def test_what_a_client_is_told_is_what_the_model_computes(shared_server: ServerClient, folder: Path) -> None:
    loaded = load_model(folder)
    with serving(shared_server, folder, num_replicas=2) as client:
        check_scores(client, loaded)
        check_greedy_answers(client)
        check_seeds(client)
        check_forms(client)
        for _ in range(4):  # whichever replica answers first, the second request finds it
            check_responses(client)
        check_embeddings(client, loaded)
        check_attacks(client)


@pytest.mark.slow
def test_an_encoder_is_an_endpoint_that_embeds(shared_server: ServerClient, tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "model", "BertModel")
    with serving(shared_server, folder, num_replicas=1) as client:
        told = client.embeddings.create(model="tiny", input=["the film was good", "bad"]).data
        assert [sum(number**2 for number in row.embedding) for row in told] == pytest.approx([1, 1])
        with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
            client.completions.create(model="tiny", prompt="a")
        described: Any = client.get("/openapi.json", cast_to=object)
        assert "/embeddings" in described["paths"]


def check_scores(client: openai.OpenAI, loaded: LoadedModel) -> None:
    import torch

    prompt = loaded.tokenizer("The for statement is used")["input_ids"]
    reply = client.completions.create(model="tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=0, temperature=0)
    with torch.inference_mode(), one_thread():
        rows = loaded.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    told = reply.choices[0].logprobs
    assert told is not None and told.token_logprobs is not None
    assert told.token_logprobs[0] is None and len(told.token_logprobs) == len(prompt)
    expected = [float(row[token]) for row, token in zip(rows, prompt[1:], strict=False)]
    assert told.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    assert reply.choices[0].text == "The for statement is used"


def check_greedy_answers(client: openai.OpenAI) -> None:
    """One is the same alone, in a stream, in a list, and beside others."""
    prompts = ["The for", "A function", "The while statement is", "text"]

    def ask(prompt: str) -> str:
        reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0)
        return reply.choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    chunks = client.completions.create(model="tiny", prompt=prompts[0], max_tokens=24, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == alone[0]
    together = client.completions.create(model="tiny", prompt=prompts, max_tokens=24, temperature=0)
    assert [choice.text for choice in together.choices] == alone
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, prompts * 4)) == alone * 4


def check_seeds(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        reply = client.completions.create(model="tiny", prompt="The", max_tokens=16, seed=seed, temperature=1.5, n=2)
        return [choice.text for choice in reply.choices]

    assert ask(7) == ask(7) != ask(8)


def check_forms(client: openai.OpenAI) -> None:
    """An answer that must follow a schema does, and a call that is forced is one."""
    parsed = client.chat.completions.parse(model="tiny", messages=ASKED, response_format=Verdict, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Verdict)
    forced: Any = {"type": "function", "function": {"name": "look_up"}}
    fields: Any = {"tools": [TOOL], "tool_choice": forced, "max_tokens": 200, "temperature": 0}
    whole = client.chat.completions.create(model="tiny", messages=ASKED, **fields).choices[0]
    assert whole.finish_reason in ("tool_calls", "stop") and whole.message.tool_calls
    with client.chat.completions.stream(model="tiny", messages=ASKED, **fields) as stream:
        for _ in stream:
            continue
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls
    for message in (whole.message, streamed.message):
        [call] = message.tool_calls
        assert (call.function.name, call.function.arguments) in {
            ("look_up", '{"word": "for"}'),
            ("look_up", '{"word": "while"}'),
        }


def check_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="Hello", max_output_tokens=8)
    second = client.responses.create(
        model="tiny", input="More", previous_response_id=first.id, max_output_tokens=8, temperature=0
    )
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        client.responses.create(model="tiny", input="x", previous_response_id="resp_of_nobody")


def check_embeddings(client: openai.OpenAI, loaded: LoadedModel) -> None:
    import torch

    told = client.embeddings.create(model="tiny", input=["The for", "A function"]).data
    with torch.inference_mode(), one_thread():
        tokens = torch.tensor([loaded.tokenizer("A function")["input_ids"]])
        states = loaded.model.base_model(tokens).last_hidden_state[0].mean(0)
        expected = torch.nn.functional.normalize(states, dim=-1).tolist()
    assert told[1].embedding == pytest.approx(expected, abs=1e-3)
    assert told[0].embedding != pytest.approx(expected, abs=1e-3)


def check_attacks(client: openai.OpenAI) -> None:
    """What asks for too much, or is no request, is refused by the name of what is wrong, and the next one is answered."""
    deep = b"[" * 10_000 + b"]" * 10_000
    bodies: list[tuple[str, dict[str, Any] | bytes, int, str | None]] = [
        ("completions", {"prompt": "a", "max_tokens": 10**9}, 400, "max_tokens"),
        ("chat/completions", {"messages": ASKED, "max_completion_tokens": 10**9}, 400, "max_completion_tokens"),
        ("responses", {"input": "a", "max_output_tokens": 10**9}, 400, "max_output_tokens"),
        ("completions", {"prompt": "a", "n": 10**6}, 400, "n"),
        ("completions", b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, None),
        ("completions", b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400, "temperature"),
        ("completions", {"prompt": "a b " * 50_000}, 400, "prompt"),
        ("completions", {"prompt": [5] * 50_000}, 400, "prompt"),
        ("completions", {"prompt": ["a"] * 20_000}, 400, "prompt"),
        ("embeddings", {"input": ["a"] * 20_000}, 400, "input"),
        ("completions", b'{"model": "tiny", "prompt": ' + deep + b"}", 400, None),
        ("completions", b'{"model": "tiny", "prompt": "a', 400, None),
        ("completions", b'{"model": "tiny", "prompt": "' + b"a" * 10_000_000 + b'"}', 413, None),
    ]
    headers = {"Authorization": f"Bearer {client.api_key}", "Content-Type": "application/json"}
    with httpx.Client(base_url=str(client.base_url), headers=headers, timeout=60, trust_env=False) as http:
        for route, body, status, param in bodies:
            content = body if isinstance(body, bytes) else json.dumps({"model": "tiny", **body}).encode()
            answer = http.post(route, content=content)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, param), (route, content[:80], error)
        page = "<script>alert(1)</script>"
        answer = http.post("completions", json={"model": "tiny", "prompt": page, "max_tokens": 1, "echo": True})
        assert answer.json()["choices"][0]["text"].startswith(page)
        assert answer.headers["Content-Type"].startswith("application/json")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
