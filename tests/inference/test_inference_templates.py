"""Chat templates are programs of others: each has a budget, and none holds up the requests of anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.app import Application, ReplicaStatus
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from jupyter_llmcloud.inference.engines.select import open_engine
from jupyter_llmcloud.inference.openai.chat import templates as module
from jupyter_llmcloud.inference.openai.chat.template_process import MAX_TEXT
from jupyter_llmcloud.inference.openai.chat.templates import RENDER_S, START_S, TemplateFailed, Templates
from jupyter_llmcloud.inference.openai.completion import ServedModel
from jupyter_llmcloud.inference.openai.prompts import chat_prompt
from jupyter_llmcloud.inference.openai.requests import decode_chat
from tests.support.tiny_models import CHAT_TEMPLATE, byte_level_tokenizer, one_thread, save_tiny_llama
from tests.support.worlds import until

MESSAGES = [{"role": "user", "content": "hello"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LOOPS_WHEN_ASKED = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + CHAT_TEMPLATE


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def templates() -> Iterator[Templates]:
    opened = Templates()
    yield opened
    opened.close()


ENDLESS = {
    "loops in one another": LOOP,
    "an endless macro": "{% macro m(n) %}{% for i in range(9) %}{{ m(n + 1) if n < 90 }}{% endfor %}{% endmacro %}{{ m(0) }}",
    "one operation that does not return": "{{ 10 ** (10 ** 9) }}",
}
TOO_MUCH = {
    "a range over everything": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
    "a text that fills the memory": ("{{ ('x' * 10**10) | length }}", "MemoryError"),
    "padding that fills the memory": ("{{ 'x'.center(10**10) | length }}", "MemoryError"),
    "a text that doubles": ("{% set s = namespace(t='x') %}{% for i in range(60) %}{% set s.t = s.t ~ s.t %}{% endfor %}", "MemoryError"),
    "an output of its own size": ("{{ 'x' * 9000000 }}", f"it wrote 9000000 characters, which is more than {MAX_TEXT}"),
    "a macro that calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "a wrong type": ("{{ messages + 1 }}", "TypeError"),
    "no template": ("{% for %}", "Expected"),
    "its own words": ("{{ raise_exception('Only user and assistant roles are supported!') }}", "Only user and assistant"),
}  # fmt: skip


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_that_does_not_end_is_ended_and_the_next_one_is_rendered(
    templates: Templates, template: str
) -> None:
    assert templates.render(CHAT_TEMPLATE, {}, MESSAGES) == "<|user|>hello\n<|assistant|>"
    began = time.monotonic()
    with pytest.raises(TemplateFailed, match="did not end within 2 s of processor time"):
        templates.render(template, {}, MESSAGES)
    assert time.monotonic() - began < RENDER_S + 1
    assert templates.render(CHAT_TEMPLATE, {}, MESSAGES) == "<|user|>hello\n<|assistant|>"


@pytest.mark.parametrize(("template", "says"), TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_a_template_that_wants_too_much_or_is_wrong_says_so(templates: Templates, template: str, says: str) -> None:
    with pytest.raises(TemplateFailed, match=says):
        templates.render(template, {}, MESSAGES)
    assert templates.render("{{ eos_token }}", {"eos_token": "</s>"}, MESSAGES) == "</s>"


def test_many_are_rendered_at_once(templates: Templates) -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = [f"message {number}" for number in range(40)]
        rendered = threads.map(
            lambda text: templates.render("{{ messages[0].content }}", {}, [{"role": "user", "content": text}]), texts
        )
        assert list(rendered) == texts


@pytest.mark.usefixtures("not_preloaded")
def test_who_comes_while_the_one_process_renders_waits_for_that_and_not_for_the_start_of_another(
    templates: Templates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two first chats waited until a process had imported all that it needs: seconds, for a millisecond."""
    assert templates.render(CHAT_TEMPLATE, {}, MESSAGES)
    (tmp_path / "never_ready.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "_MODULE", "never_ready")
    with ThreadPoolExecutor(6) as pool:
        slow = "{% for i in range(5) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + CHAT_TEMPLATE
        began = time.monotonic()
        told = list(pool.map(lambda one: templates.render(one, {}, MESSAGES), [slow, *[CHAT_TEMPLATE] * 5]))
    assert set(told) == {"<|user|>hello\n<|assistant|>"}
    assert time.monotonic() - began < START_S / 2


def test_a_process_that_does_not_start_is_told_and_the_next_one_is_tried(
    templates: Templates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module._MODULE
    monkeypatch.setattr(module, "_MODULE", "there_is_no_such_module")
    with pytest.raises(TemplateFailed, match="exit status 1"):
        templates.render(CHAT_TEMPLATE, {}, MESSAGES)
    monkeypatch.setattr(module, "_MODULE", name)
    for _ in range(2):  # one that was to take its place has ended as well
        with contextlib.suppress(TemplateFailed):
            assert templates.render(CHAT_TEMPLATE, {}, MESSAGES)
            break
    assert templates.render(CHAT_TEMPLATE, {}, MESSAGES) == "<|user|>hello\n<|assistant|>"


def test_a_process_that_was_killed_is_replaced(templates: Templates) -> None:
    templates.render(CHAT_TEMPLATE, {}, MESSAGES)
    [process] = templates._idle
    process._process.kill()
    until(process._has_said_something, "all that was forked for it has gone")
    with pytest.raises(TemplateFailed, match="ended the process that rendered it"):
        templates.render(CHAT_TEMPLATE, {}, MESSAGES)
    assert templates.render("fine", {}, MESSAGES) == "fine"


def test_a_prompt_is_what_the_tokenizers_own_method_makes_of_it() -> None:
    tokenizer = byte_level_tokenizer(chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    loaded = LoadedModel(None, tokenizer, 256, len(tokenizer), frozenset(), is_encoder_decoder=False)
    request = decode_chat(b'{"model": "m", "messages": [{"role": "user", "content": "Gr\xc3\xb6\xc3\x9fe"}]}')
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Größe"}], add_generation_prompt=True, tokenize=False
    )
    assert chat_prompt(request, loaded).tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = LOOP
    with pytest.raises(ApiError, match="did not end") as caught:
        chat_prompt(request, loaded)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_while_a_template_loops_others_are_answered_and_it_is_a_400(tmp_path: Any) -> None:
    loaded = load_model(save_tiny_llama(tmp_path, chat_template=LOOPS_WHEN_ASKED))

    async def run() -> None:
        templates = Templates()
        model = ServedModel(loaded, await open_engine(loaded, 8), "tiny", templates=templates)
        status = ReplicaStatus("endpoint", "tiny", 8)
        application = Application(status, "secret")
        application.model, status.state = model, "ready"
        server = TestServer(application.build(), handler_cancellation=True)
        async with TestClient(server, headers={"Authorization": "Bearer secret"}) as client, asyncio.timeout(60):
            try:
                await others_are_answered(client)
            finally:
                await model.close()

    asyncio.run(run())


async def others_are_answered(client: TestClient[Any, Any]) -> None:
    async def chat(content: str) -> tuple[int, Any]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
        async with client.post("/v1/chat/completions", json=body) as response:
            return response.status, await response.json()

    assert (await chat("hello"))[0] == 200
    loops = [asyncio.create_task(chat("loop")) for _ in range(2)]
    num_answered, longest_s = 0, 0.0
    while not all(loop.done() for loop in loops):
        began = time.monotonic()
        async with client.get("/readyz") as response:
            assert response.status == 200
        longest_s = max(longest_s, time.monotonic() - began)
        assert (await chat("hello"))[0] == 200
        num_answered += 1
    assert num_answered >= 2
    assert longest_s < 1.0
    for status, body in [await loop for loop in loops]:
        assert (status, body["error"]["param"]) == (400, "messages")
        assert "did not end within 2 s" in body["error"]["message"]
