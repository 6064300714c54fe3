"""%serve, %endpoints and the Endpoint they give; what is shown never holds a key."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from jupyter_llmcloud import errors
from jupyter_llmcloud.client.batches import BatchClient
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.magics.commands import endpoints
from jupyter_llmcloud.magics.commands.endpoints import EndpointMagics, NewKey
from jupyter_llmcloud.magics.serving.endpoint import Endpoint
from jupyter_llmcloud.magics.serving.endpoint_card import make_card
from jupyter_llmcloud.magics.session import session
from tests.support.server_parts import Server, make_model, until

pytest_plugins = ["tests.support.server_fixtures"]


@pytest.fixture
def magics(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[EndpointMagics]:
    """The magics of a session whose server is `server`."""
    current = session.Session()
    current._server = ServerClient(server.url, server.token)
    monkeypatch.setattr(session, "_session", current)
    yield EndpointMagics(None)
    current._server.close()


async def off_loop(function: Callable[..., Any], *arguments: Any) -> Any:
    """The server runs in the loop of the test: whoever waits for it does so in another thread."""
    return await asyncio.to_thread(function, *arguments)


async def test_serve_waits_until_the_endpoint_answers(magics: EndpointMagics, model: Path, capsys: Any) -> None:
    endpoint = await off_loop(magics.serve, f"{model} --name tiny --replicas 1 --dtype auto")
    assert await off_loop(lambda: endpoint.state) == "ready"
    assert await off_loop(endpoint.complete, "hello") == "hello!"
    assert await off_loop(endpoint.chat, "hello") == "hello!"
    assert await off_loop(lambda: list(endpoint.chat("count 3", stream=True))) == ["0 ", "1 ", "2 "]
    assert "tiny" in capsys.readouterr().out
    await off_loop(endpoint.stop)
    assert await off_loop(lambda: endpoint.state) == "stopped"


async def test_the_card_and_the_table_tell_what_each_replica_takes(magics: EndpointMagics, model: Path) -> None:
    line = f"{model} --name tiny --max-model-len 512 --max-concurrent 4 --threads 3"
    endpoint = await off_loop(magics.serve, line)
    card = await off_loop(endpoint._repr_html_)
    assert "300 MiB, of them 64 MiB for keys and values (up to 5.0 GiB when needed), 3 threads, 4 sequences" in card
    assert "512 tokens each" in card
    assert "0.3 GiB" in str(await off_loop(endpoints.table))
    await off_loop(endpoint.stop)


async def test_map_answers_every_input_in_its_order(magics: EndpointMagics, model: Path, capsys: Any) -> None:
    endpoint = await off_loop(magics.serve, f"{model} --name tiny")
    inputs = [{"text": f"{number}", "label": 0} for number in range(40)]
    answers = await off_loop(lambda: endpoint.map(inputs, column="text", max_tokens=4))
    assert answers == [f"{number}!" for number in range(40)]
    assert " of 40 answered" in capsys.readouterr().out  # a terminal gets the first line only
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    assert await off_loop(endpoint.map, chats) == ["a!", "b!"]
    statuses = {row["status"] for row in await off_loop(endpoint.batches)}
    assert statuses == {"completed"}
    assert await off_loop(endpoint.map, []) == []


class Lost(Exception):
    """The kernel has gone: nobody is there to cancel anything."""


@pytest.mark.parametrize("end", [KeyboardInterrupt, Lost])
async def test_the_same_map_again_asks_for_no_row_that_was_answered(
    magics: EndpointMagics, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, end: type[BaseException]
) -> None:
    endpoint = await off_loop(magics.serve, f"{model} --name tiny")
    inputs = [*map(str, range(8)), "slow 2000", "9"]
    asked: list[str] = []
    wait = BatchClient.wait

    def ended_when_nine_are_answered(client: BatchClient, ids: Any, progress: Any) -> Any:
        def told(done: int, total: int) -> None:
            progress(done, total)
            if done == 9:
                raise end

        return wait(client, ids, told)

    def call() -> Any:
        try:
            return endpoint.map(inputs, max_tokens=4)
        except (KeyboardInterrupt, Lost):
            asked.append("ended")

    with monkeypatch.context() as patch:
        patch.setattr(BatchClient, "wait", ended_when_nine_are_answered)
        await off_loop(call)
    assert await off_loop(call) == [f"{text}!" for text in inputs]
    assert asked == ["ended"]
    totals = [row["request_counts"]["total"] for row in await off_loop(endpoint.batches)]
    assert totals == ([1, 10] if end is KeyboardInterrupt else [10])
    assert ("9 of 10 inputs were answered by an earlier" in capsys.readouterr().out) == (end is KeyboardInterrupt)
    # What has come to its end is asked anew, as any cell that is run again.
    assert await off_loop(lambda: endpoint.map(inputs[:8], max_tokens=4)) == [f"{text}!" for text in inputs[:8]]
    assert await off_loop(call) == [f"{text}!" for text in inputs]
    assert len(await off_loop(endpoint.batches)) == len(totals) + 2


async def test_a_fresh_map_asks_for_all_rows_and_another_model_answers_all_of_them(
    magics: EndpointMagics, model: Path, own_root: Path
) -> None:
    endpoint = await off_loop(magics.serve, f"{model} --name tiny")
    body = {"model": "tiny", "prompt": "slow 60000"}
    row = {"custom_id": "0", "method": "POST", "url": "/v1/completions", "body": body}
    client, rows = endpoint._batch_client(), [json.dumps(row).encode()]
    first = await off_loop(client.begin, "completions", rows, "24h", "one model", False)
    await off_loop(client.cancel, first.batch_id)
    again, fresh, other = [
        await off_loop(client.begin, "completions", rows, "24h", served, fresh)
        for served, fresh in (("one model", False), ("one model", True), ("another model", False))
    ]
    assert len({first.batch_id, again.batch_id, fresh.batch_id, other.batch_id}) == 4
    same = await off_loop(client.begin, "completions", rows, "24h", "another model", False)
    assert same.batch_id == other.batch_id, "it is still answered"
    for one in (again, fresh, other):
        await off_loop(client.cancel, one.batch_id)


async def test_map_says_which_input_is_wrong_before_anything_is_asked(magics: EndpointMagics, model: Path) -> None:
    endpoint = await off_loop(magics.serve, f"{model} --name tiny")
    for inputs, column, hint in (
        (["a", 3], None, "input 1 is 3"),
        (["a", [{"role": "user", "content": "b"}]], None, "input 1 goes to chat/completions"),
        ([{"text": "a"}], "body", "no column 'body'. It has text"),
    ):
        with pytest.raises(errors.UsageError, match=re.escape(hint)):
            await off_loop(endpoint.map, inputs, column)
    assert await off_loop(endpoint.batches) == []


async def test_a_folder_is_found_from_the_notebooks_folder(
    magics: EndpointMagics, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    for target in ("model", "./model"):
        endpoint = await off_loop(lambda target=target: endpoints.serve(target, name="tiny"))
        await off_loop(endpoint.stop)


async def test_nothing_that_is_shown_holds_the_key(magics: EndpointMagics, model: Path) -> None:
    endpoint = await off_loop(lambda: endpoints.serve(str(model), name="tiny"))
    key = await off_loop(lambda: endpoint.api_key)
    assert key.startswith("sk-llmc-")
    shown = [repr(endpoint), str(endpoint), await off_loop(endpoint._repr_html_)]
    shown.append(json.dumps(await off_loop(endpoint._bundle)))
    card = make_card(endpoint.name, endpoint.base_url, endpoint.snippets(), lambda: endpoint.api_key)
    shown.append(json.dumps(card.get_state(), default=str))
    assert all(key.split("-")[3] not in text for text in shown)
    assert endpoint.base_url in shown[2] and "$LLMCLOUD_API_KEY" in shown[2]


async def test_the_cards_button_sends_the_key_in_a_message_and_keeps_it_nowhere(
    magics: EndpointMagics, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = await off_loop(lambda: endpoints.serve(str(model), name="tiny"))
    card = make_card(endpoint.name, endpoint.base_url, endpoint.snippets(), lambda: endpoint.api_key)
    sent: list[Any] = []
    monkeypatch.setattr(card, "send", lambda content, buffers=None: sent.append(content))
    await off_loop(card._handle_custom_msg, {"kind": "key"}, [])
    key = await off_loop(lambda: endpoint.api_key)
    assert sent == [{"kind": "key", "key": key}]
    assert key not in json.dumps(card.get_state(), default=str)


def test_what_a_card_shows_is_escaped() -> None:
    endpoint = Endpoint("<script>alert(1)</script>", ServerClient("http://127.0.0.1:1/<i>"))
    assert "<script>" not in endpoint._repr_html_() and "<i>" not in endpoint._repr_html_()


async def test_a_refusal_of_the_model_is_raised_as_an_error_of_ours(magics: EndpointMagics, model: Path) -> None:
    endpoint = await off_loop(lambda: endpoints.serve(str(model), name="tiny"))
    with pytest.raises(errors.ServerError, match="busy"):
        await off_loop(endpoint.complete, "busy")
    with pytest.raises(errors.UsageError, match="stream"):
        await off_loop(lambda: endpoint.complete("x", stream=True))
    with pytest.raises(errors.UsageError, match="n: a stream of pieces is of one reply"):
        await off_loop(lambda: endpoint.chat("x", stream=True, n=2))
    assert await off_loop(lambda: list(endpoint.chat("count 1", stream=True, n=1))) == ["0 "]
    with pytest.raises(errors.ServerError, match="broke off"):
        await off_loop(lambda: list(endpoint.chat("die after 2", stream=True)))
    await off_loop(endpoint.stop)
    with pytest.raises(errors.NotFound, match="'tiny'"):
        await off_loop(endpoint.complete, "x")


async def test_a_model_that_cannot_be_loaded_is_an_error_of_the_cell(magics: EndpointMagics, own_root: Path) -> None:
    folder = make_model(own_root.parent / "broken", "broken")
    with pytest.raises(errors.ModelError, match="another shape"):
        await off_loop(magics.serve, f"{folder} --name tiny")


async def test_stop_while_waiting_leaves_the_endpoint_starting(
    magics: EndpointMagics, own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(own_root.parent / "slow", "slow")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ServerClient, "endpoint", interrupt)

    def serve() -> None:
        with pytest.raises(KeyboardInterrupt):
            magics.serve(f"{folder} --name tiny")

    await off_loop(serve)
    [row] = await off_loop(endpoints.list)
    assert (row["name"], row["state"]) == ("tiny", "starting")


@pytest.mark.parametrize(
    ("magic", "line", "says"),
    [
        ("serve", "", "expected TARGET"),
        ("serve", "x --dtype int4", "one of auto, float32, bfloat16, float16"),
        ("serve", "x --replicas none", "--replicas 'none'"),
        ("serve", "x --replica 2", "Did you mean --replicas"),
        ("serve", "x --name a/b", "not a valid name"),
        ("endpoints", "start", "one of list, show, stop, logs, scale, update,"),
        ("endpoints", "stop", "expected NAME"),
        ("endpoints", "keys mint", "one of list, create, rotate, revoke, usage, alerts"),
        ("endpoints", "keys revoke", "the ID of a key"),
        ("endpoints", "keys create --expires soon", "--expires 'soon'"),
        ("endpoints", "keys create --scope admin", "'admin' does not exist"),
        ("endpoints", "logs nothing", "'nothing'"),
    ],
)
async def test_a_bad_option_is_answered_in_one_line(magics: EndpointMagics, magic: str, line: str, says: str) -> None:
    with pytest.raises((errors.UsageError, errors.NotFound)) as raised:
        await off_loop(getattr(magics, magic), line)
    assert says in str(raised.value) and "\n" not in str(raised.value)


async def test_endpoints_and_keys_are_listed_escaped(magics: EndpointMagics, model: Path) -> None:
    await off_loop(lambda: endpoints.serve(str(model), name="tiny"))
    table = await off_loop(magics.endpoints, "")
    assert "tiny" in repr(table) and "1/1" in repr(table)
    key = await off_loop(magics.endpoints, "keys create --scope infer:t* --expires 1h --label <b>mine</b>")
    assert isinstance(key, NewKey) and key.key.split("-")[3] not in repr(key)
    table = await off_loop(magics.endpoints, "keys")
    assert key.id in repr(table) and "<b>mine" not in table._repr_html_()
    await off_loop(magics.endpoints, f"keys revoke {key.id}")
    assert "revoked" in repr(await off_loop(magics.endpoints, "keys list"))
    await off_loop(magics.endpoints, "stop tiny")
    assert "stopped" in repr(await off_loop(magics.endpoints, "list"))


def test_the_magics_can_be_registered() -> None:
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    shell.register_magics(EndpointMagics)
    assert {"serve", "endpoints"} <= set(shell.magics_manager.magics["line"])


# --- changed while it answers ---


async def test_serving_what_runs_already_returns_its_handle_and_another_model_is_refused_with_the_way_out(
    magics: EndpointMagics, model: Path, tmp_path: Path
) -> None:
    first = await off_loop(magics.serve, f"{model} --name tiny")
    created = (await off_loop(endpoints.list))[0]["created"]
    for line in (f"{model} --name tiny", "tiny"):
        again = await off_loop(magics.serve, line)
        assert (again.name, again.base_url) == (first.name, first.base_url)
    assert [row["created"] for row in await off_loop(endpoints.list)] == [created]
    with pytest.raises(errors.NameTaken, match="%endpoints update tiny"):
        await off_loop(magics.serve, f"{make_model(tmp_path / 'other')} --name tiny")


async def test_many_prompts_and_many_choices_come_back_as_they_were_asked_for(
    magics: EndpointMagics, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = await off_loop(lambda: endpoints.serve(str(model), name="tiny"))

    def ask(route: str, body: dict[str, Any]) -> dict[str, Any]:
        prompts = body.get("prompt", [body.get("messages")])
        prompts = [prompts] if isinstance(prompts, str) or isinstance(prompts[0], int) else prompts
        texts = [f"{i}{'abc'[k]}" for i in range(len(prompts)) for k in range(body.get("n") or 1)]
        rows = [{"index": at, "text": text, "message": {"content": text}} for at, text in enumerate(texts)]
        return {"choices": rows[::-1]}

    monkeypatch.setattr(endpoint, "_ask", ask)
    assert endpoint.complete("x") == "0a" and endpoint.complete([1, 2]) == "0a"
    assert endpoint.complete(["x", "y"]) == ["0a", "1a"]
    assert endpoint.complete("x", n=2) == ["0a", "0b"]
    assert endpoint.complete(["x", "y"], n=2) == [["0a", "0b"], ["1a", "1b"]]
    assert endpoint.chat("x") == "0a" and endpoint.chat("x", n=2) == ["0a", "0b"]


async def test_the_verbs_and_the_methods_of_the_handle_do_the_same(
    magics: EndpointMagics, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = await off_loop(lambda: endpoints.serve(str(model), name="tiny"))
    make_model(tmp_path / "better")
    monkeypatch.chdir(tmp_path)
    shown = str(await off_loop(magics.endpoints, "update tiny better --canary 20"))
    assert "canary" in shown and "20 %" in shown
    assert str(await off_loop(magics.endpoints, "split tiny stable:60,canary:40")).count("40 %") == 1
    await off_loop(endpoint.rollback)
    assert [row["role"] for row in await off_loop(lambda: endpoint.revisions)] == ["stable", "retired"]
    assert "1/1 (1:2)" in str(await off_loop(magics.endpoints, "scale tiny 1:2"))
    assert "1/1 (1:2)" in str(await off_loop(endpoints.table))
    await off_loop(endpoint.shadow, "better")
    await off_loop(endpoint.complete, "hello")  # at once: it waited until requests are copied
    await until(lambda: _is_compared(endpoint), "the answers are compared")
    await off_loop(magics.endpoints, "shadow tiny")
    make_model(tmp_path / "worse", "broken")
    with pytest.raises(errors.ModelError, match="another shape"):
        await off_loop(magics.endpoints, "shadow tiny worse")
    assert "no adapter yet" in str(await off_loop(magics.endpoints, "adapters tiny"))
    for line, words in (
        ("split tiny stable", "stable:95,canary:5"),
        ("scale tiny none", "bounds such as 1:4"),
        ("update tiny nothing", "nothing"),
        ("adapters tiny add", "expected a PATH"),
        ("adapters tiny drop x", "add"),
    ):
        with pytest.raises(errors.LLMCloudError, match=words):
            await off_loop(magics.endpoints, line)


async def _is_compared(endpoint: Endpoint) -> bool:
    shadow = next(row for row in await off_loop(lambda: endpoint.revisions) if row["role"] == "shadow")
    assert shadow["comparison"]["num_dropped"] == 0
    return bool(shadow["comparison"]["num_compared"] == 1)


async def test_options_that_a_running_endpoint_does_not_have_are_told(
    magics: EndpointMagics, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await off_loop(magics.serve, f"{model} --name tiny --replicas 1 --priority 2 --memory 4GiB --dtype auto")
    for line in ("", "--replicas 1", "--priority 2 --memory 4GiB"):
        await off_loop(magics.serve, f"{model} --name tiny {line}")
    assert "served already" not in capsys.readouterr().out
    await off_loop(magics.serve, f"{model} --name tiny --replicas 1:3 --keep-requests --priority 2")
    told = capsys.readouterr().out
    assert "tiny was served already" in told and "--replicas is 1, --keep-requests is not set." in told
    assert (await off_loop(session.current().server.endpoint, "tiny"))["num_replicas"] == 1


async def test_a_key_is_made_with_the_words_of_the_magic(magics: EndpointMagics) -> None:
    key = await off_loop(lambda: endpoints.create_key("infer:tiny", expires="2h", label="a", requests_per_minute=3))
    [made] = await off_loop(endpoints.keys)
    assert made["scopes"] == ["infer:tiny"] and made["id"] == key.split("-")[2]
    assert made["expires"] - made["created"] == pytest.approx(7200, abs=5)
    await off_loop(lambda: endpoints.rotate_key(made["id"], overlap="30m"))
    [old] = [row for row in await off_loop(endpoints.keys) if row["id"] == made["id"]]
    assert old["expires"] - time.time() == pytest.approx(1800, abs=60)
    for wrong in (lambda: endpoints.create_key("infer:tiny", 60, expires="1h"),
                  lambda: endpoints.create_key("infer:tiny", expires="soon")):  # fmt: skip
        with pytest.raises(errors.UsageError):
            await off_loop(wrong)


async def test_an_update_returns_when_the_new_revision_answers(magics: EndpointMagics, model: Path) -> None:
    endpoint = await off_loop(magics.serve, f"{model} --name tiny")
    other = make_model(model.parent / "other")
    await off_loop(magics.endpoints, f"update tiny {other} --canary 50")
    told = await off_loop(lambda: endpoint.revisions)
    assert [(row["number"], row["role"], row["weight"]) for row in told] == [(1, "stable", 50), (2, "canary", 50)]
    assert " 2/2 " in str(await off_loop(endpoints.table))  # one of each
    replicas = (await off_loop(session.current().server.endpoint, "tiny"))["replicas"]
    assert {(row["revision"], row["state"]) for row in replicas} == {(1, "ready"), (2, "ready")}


async def test_an_update_that_does_not_load_says_why(magics: EndpointMagics, model: Path) -> None:
    await off_loop(magics.serve, f"{model} --name tiny")
    broken = make_model(model.parent / "broken-model", "broken")
    with pytest.raises(errors.ModelError, match=r"does not serve revision 2: .*another shape"):
        await off_loop(lambda: endpoints.update("tiny", str(broken), canary=50))


@pytest.mark.parametrize(
    ("url", "public", "shown"),
    [
        ("http://127.0.0.1:41/user/ada/", "https://hub.org/user/ada/", "https://hub.org/user/ada/llmcloud/v1"),
        ("http://127.0.0.1:41/user/ada/", "", "http://127.0.0.1:41/user/ada/llmcloud/v1"),
        ("http://127.0.0.1:41/", "https://hub.org/user/ada/", "http://127.0.0.1:41/llmcloud/v1"),
    ],
)
def test_behind_a_hub_what_is_shown_is_the_url_that_others_reach(
    url: str, public: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/")
    monkeypatch.setenv("JUPYTERHUB_PUBLIC_URL", public)
    endpoint = Endpoint("tiny", ServerClient(url))
    assert endpoint.base_url == f"{url}llmcloud/v1" and endpoint.public_url == shown
    assert all(shown in text for text in endpoint.snippets().values()) and shown in repr(endpoint)
