"""Requests and replies: they find each other, errors cross as what they are, and what is wrong is said."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud import errors
from jupyter_llmcloud.errors import (
    Busy,
    CapacityError,
    ConnectionLost,
    InternalError,
    LLMCloudError,
    NotFound,
    ProtocolError,
    RankError,
    ServerError,
    UsageError,
)
from jupyter_llmcloud.protocol.agent_messages import (
    Describe,
    DescribeReplicas,
    Execute,
    FindStandby,
    Pull,
    Pulled,
    Push,
    ReplicaList,
    RunEnded,
    StandbyFound,
    StopRun,
    Submitted,
)
from jupyter_llmcloud.protocol.client import AgentChannel, AgentConnection
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.frames import PROTOCOL_VERSION, Decoder, Message, Unreadable, encode
from jupyter_llmcloud.protocol.rank_messages import CellEnded
from jupyter_llmcloud.protocol.rpc import (
    Calls,
    Done,
    Refused,
    Reply,
    Request,
    Responder,
    refusal,
    refusal_body,
    restored,
    restored_body,
    result,
)

PULL = Pull(world_id="w", names=["x"])

# --- an exception as a refusal, and back ---


def crossed(error: BaseException) -> LLMCloudError:
    """The error at the other end of a wire."""
    (message,) = Decoder().feed(encode(refusal(error, "the agent", "Pull")))
    assert isinstance(message, Refused)
    return restored(message)


def test_the_codes_are_what_they_have_always_been() -> None:
    assert sorted(LLMCloudError.by_code) == [
        "Busy", "CapacityError", "ConnectionLost", "InternalError", "LLMCloudError", "ModelError", "NameTaken",
        "NotFound", "ProtocolError", "RankError", "ServerError", "SweepFailed", "UsageError", "WorldError",
    ]  # fmt: skip
    ours = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LLMCloudError)]
    assert set(ours) == set(LLMCloudError.by_code.values())


def test_no_two_errors_have_one_code() -> None:
    with pytest.raises(TypeError, match="Other has the code 'Busy' of Busy"):
        type("Other", (LLMCloudError,), {"code": "Busy"})
    assert LLMCloudError.by_code["Busy"] is Busy


@pytest.mark.parametrize("kind", [kind for kind in LLMCloudError.by_code.values() if kind is not RankError])
def test_every_error_of_ours_is_raised_as_what_it_was(kind: type[LLMCloudError]) -> None:
    error = crossed(kind("a name 'x'\nin two lines"))
    assert type(error) is kind and str(error) == "a name 'x'\nin two lines"


def test_an_error_brings_along_what_it_carries() -> None:
    told = RankError(
        1, "ValueError", "no", ["line 1"], ranks=[1, 3], report=["0: stopped"], run_id="r", place="In [3], line 1",
        local_variables={"x": "1"},
    )  # fmt: skip
    error = crossed(told)
    assert isinstance(error, RankError) and vars(error) == vars(told) and str(error) == str(told)


def test_an_error_of_a_class_without_a_code_is_the_next_one_that_has_one() -> None:
    class Nearly(CapacityError):
        pass

    assert type(crossed(Nearly("no room"))) is CapacityError


def test_an_error_that_is_not_known_here_is_still_told() -> None:
    assert type(restored(Refused(code="InventedLater", message="m"), default=ServerError)) is ServerError
    other = restored(Refused(code="RankError", message="rank 0: failed", detail={"invented": "later"}))
    assert type(other) is LLMCloudError and str(other) == "rank 0: failed"


def test_what_nobody_foresaw_is_logged_where_it_happened(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError as raised:
        error = crossed(raised)
    assert type(error) is InternalError
    assert str(error) == "the agent failed on Pull: ZeroDivisionError: by zero. Its log has the traceback."
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "the agent failed on Pull" in record.getMessage()
    assert record.exc_info is not None and record.exc_info[2] is not None
    caplog.clear()
    crossed(UsageError("on purpose"))
    assert not caplog.records


def test_the_rest_api_says_the_same_errors() -> None:
    told = RankError(1, "ValueError", "no", ranks=[1, 3])
    assert refusal_body(NotFound("no run 'x'.")) == {"error": "NotFound", "message": "no run 'x'."}
    for error in (Busy("not now"), told):
        again = restored_body(refusal_body(error), "?")
        assert type(again) is type(error) and vars(again) == vars(error) and str(again) == str(error)
    for body in (None, [], {}, {"error": "Teapot"}, {"error": "RankError"}, {"error": ["x"], "detail": 3}):
        again = restored_body(body, "status 418")
        assert type(again) is ServerError and str(again) == "status 418"


# --- a request and its reply ---


def test_a_request_names_the_types_of_its_reply() -> None:
    assert Pull.replies == (Pulled,) and Push.replies == (Done,) and Execute.replies == (Submitted, CellEnded)


def test_a_reply_of_another_type_is_a_protocol_error() -> None:
    assert result(PULL, Pulled(payload=b"x"), "the agent").payload == b"x"
    with pytest.raises(ProtocolError, match="the agent answered Pull with Done: expected Pulled"):
        result(PULL, Done(), "the agent")
    with pytest.raises(ProtocolError, match="the agent answered Pull with 'Later', which is not known here"):
        result(PULL, Unreadable(kind="Later", reason="is not known here"), "the agent")
    with pytest.raises(NotFound, match="no x"):
        result(PULL, Refused(code="NotFound", message="no x"), "the agent")


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(within())


def test_replies_find_their_requests_in_any_order() -> None:
    async def test() -> None:
        calls, sent = Calls("the agent"), list[Message]()
        asked = [asyncio.create_task(calls.ask(PULL, sent.append)) for _ in range(3)]
        await asyncio.sleep(0)
        for request in reversed(sent):
            assert isinstance(request, Pull)
            calls.take(Pulled(reply_to=request.number, payload=str(request.number).encode()))
        assert [reply.payload for reply in await asyncio.gather(*asked)] == [b"1", b"2", b"3"]

    in_loop(test)


def test_a_reply_to_what_nobody_asked_is_a_protocol_error_and_one_too_late_is_none() -> None:
    async def test() -> None:
        calls = Calls("the agent")
        with pytest.raises(ProtocolError, match="the agent sent Done as the reply to request 1, which was not made"):
            calls.take(Done(reply_to=1))
        with pytest.raises(ConnectionLost, match=r"the agent did not answer in 0\.01 s"):
            await calls.ask(PULL, lambda _: None, 0.01)
        calls.take(Done(reply_to=1))
        with pytest.raises(ProtocolError, match="the agent sent Later as the reply to request 2"):
            calls.take(Unreadable(kind="Later", reason="", reply_to=2))

    in_loop(test)


def test_all_who_wait_are_told_that_no_reply_comes_and_so_is_who_asks_later() -> None:
    async def test() -> None:
        calls = Calls("the agent")
        asked = [asyncio.create_task(calls.ask(PULL, lambda _: None)) for _ in range(2)]
        await asyncio.sleep(0)
        calls.fail(NotFound("it has gone"))
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [(type(error), str(error)) for error in found] == [(NotFound, "it has gone")] * 2
        assert found[0] is not found[1]
        with pytest.raises(NotFound, match="it has gone"):
            await calls.ask(PULL, lambda _: None)

    in_loop(test)


# --- who answers ---


def answered(request: Request[Any] | Unreadable, handler: Callable[[Any], Any] | None = None) -> Reply | None:
    responder = Responder("the agent")
    if handler is not None:
        responder.on(type(request), handler)  # type: ignore[type-var, arg-type]
    return asyncio.run(responder.answer(request))


def numbered(request: Request[Any]) -> Any:
    from jupyter_llmcloud.protocol.frames import replace

    return replace(request, number=5)


def test_a_handler_answers_at_once_or_later_or_with_nothing_to_say() -> None:
    async def later(_: Pull) -> Pulled:
        await asyncio.sleep(0)
        return Pulled(payload=b"later")

    assert answered(numbered(PULL), lambda _: Pulled(payload=b"now")) == Pulled(payload=b"now", reply_to=5)
    assert answered(numbered(PULL), later) == Pulled(payload=b"later", reply_to=5)
    assert answered(numbered(StopRun(run_id="r")), lambda _: None) == Done(reply_to=5)
    cell = Execute(world_id="w", run_id="r", name="n", code="1")
    assert answered(numbered(cell), lambda _: None) is None  # its end is told by other messages


def test_nobody_is_answered_who_does_not_wait() -> None:
    assert answered(StopRun(run_id="r"), lambda _: None) is None
    assert answered(StopRun(run_id="r")) is None


def test_what_cannot_be_answered_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def refused(reply: Reply | None) -> tuple[str, str]:
        assert isinstance(reply, Refused) and reply.reply_to == 5
        return reply.code, reply.message

    def raises(_: Any) -> Pulled:
        raise Busy("not now")

    assert refused(answered(numbered(PULL), raises)) == ("Busy", "not now")
    assert refused(answered(numbered(PULL))) == ("ProtocolError", "the agent does not answer Pull.")
    unknown = Unreadable(kind="Later", reason="is not known here", number=5)
    assert refused(answered(unknown)) == ("ProtocolError", "the agent was asked 'Later', which is not known here.")
    assert not caplog.records
    code, message = refused(answered(numbered(PULL), lambda _: Done()))
    assert code == "InternalError" and "the handler of Pull returned a Done" in message
    assert len(caplog.records) == 1


def test_a_reply_that_no_message_can_carry_is_a_failure_of_who_answers(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Message] = []

    def send(message: Message) -> None:
        encode(message)
        sent.append(message)

    responder = Responder("the agent")
    responder.on(Pull, lambda _: Pulled(payload=object()))  # type: ignore[arg-type]
    responder.on(DescribeReplicas, lambda _: ReplicaList(replicas=[{"log": object()}]))
    for request in (numbered(PULL), numbered(DescribeReplicas())):
        asyncio.run(responder.serve(request, send))
        refused = sent.pop()
        assert isinstance(refused, Refused) and (refused.code, refused.reply_to) == ("InternalError", 5)
        assert f"the agent failed on {type(request).__name__}: TypeError" in refused.message
    assert len(caplog.records) == 2


# --- over a real socket ---


class Server:
    """A process of ours that is asked, or one that only looks so: `serve` has the connection of whoever comes."""

    def __init__(self, path: Path, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]):
        self.address = str(path)
        self._serve = serve

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_unix_server(self._connected, self.address)
        return self

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        finally:
            writer.close()

    async def __aexit__(self, *_: Any) -> None:
        self._server.close()


def saying(*replies: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """Answers whatever it is asked with these bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in replies:
            if not await reader.read(1 << 16):
                return
            writer.write(reply)
        await reader.read()

    return serve


async def blocking(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


def ask_channel(address: str, *requests: Request[Any]) -> Any:
    channel = AgentChannel(address)
    try:
        return [channel.request(request, 5) for request in requests][-1]
    finally:
        channel.close()


OTHER_VERSION = struct.pack("!2sHII", b"LC", PROTOCOL_VERSION + 1, 0, 0)
OLD_VERSION = b'\0\0\0\x21\0\0\0\0{"type":"Refused","reply_to":1}  '
WRONG = [
    (encode(Done(reply_to=1)), ProtocolError, "answered Pull with Done: expected Pulled"),
    (encode(Done(reply_to=9)), ProtocolError, "sent Done as the reply to request 9, which was not made"),
    (
        OTHER_VERSION,
        ProtocolError,
        "the node agent at .*a.sock speaks version 3 of the protocol, this process version 2",
    ),
    (OLD_VERSION, ProtocolError, "does not speak our protocol.*an older version"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError, "does not speak our protocol.*another program"),
    (encode(Refused(code="NotFound", message="nobody here")), NotFound, "nobody here"),
    (encode(Refused(code="Busy", message="not now", reply_to=1)), Busy, "not now"),
    (encode(Pulled(reply_to=1))[:-1], ConnectionLost, "has gone|did not answer"),
]


@pytest.mark.parametrize(("reply", "kind", "words"), WRONG)
def test_a_wrong_reply_is_a_clear_error_over_a_socket(
    reply: bytes, kind: type[LLMCloudError], words: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with Server(tmp_path / "a.sock", saying(reply)) as server:
            async with await AgentConnection.open(server.address) as connection:
                with pytest.raises(kind, match=words):
                    await connection.request(PULL, 1)
            with pytest.raises(kind, match=words):
                await blocking(lambda: _with_patience(server.address))

    in_loop(test)


def _with_patience(address: str) -> Any:
    channel = AgentChannel(address)
    try:
        return channel.request(PULL, 1)
    finally:
        channel.close()


def test_both_ends_of_a_connection_ask_and_answer(tmp_path: Path) -> None:
    async def test() -> None:
        found: list[str] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection, responder = Connection(reader, writer, "the worker"), Responder("the agent")

            async def pull(asked: Pull) -> Pulled:
                found.append((await connection.request(FindStandby())).address)
                with pytest.raises(ProtocolError, match="the worker does not answer Describe"):
                    await connection.request(Describe())
                return Pulled(payload=asked.names[0].encode())

            responder.on(Pull, pull)
            tasks = []
            async for message in connection.messages():
                assert isinstance(message, Request)

                async def answer(request: Request[Any] = message) -> None:
                    reply = await responder.answer(request)
                    assert reply is not None
                    connection.send(reply)

                tasks.append(asyncio.create_task(answer()))

        worker = Responder("the worker")
        worker.on(FindStandby, lambda _: StandbyFound(address="there"))
        async with (
            Server(tmp_path / "a.sock", serve) as server,
            await AgentConnection.open(server.address, responder=worker) as connection,
        ):
            assert (await connection.request(PULL)).payload == b"x"
            with pytest.raises(ProtocolError, match="the agent does not answer StopRun"):
                await connection.request(StopRun(run_id="r"))
            assert found == ["there"]

    in_loop(test)


def test_a_request_over_a_connection_that_has_gone_fails_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async def leave(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            await reader.read(1)

        async with Server(tmp_path / "a.sock", leave) as server:
            connection = await AgentConnection.open(server.address)
            with pytest.raises(ConnectionLost, match="has gone"):
                await connection.request(PULL, 60)
            await connection.gone.wait()
            with pytest.raises(ConnectionLost, match="has gone"):
                await connection.request(PULL, 60)

    in_loop(test)


def test_a_blocking_client_keeps_what_is_told_between_a_request_and_its_reply(tmp_path: Path) -> None:
    told = RunEnded(run_id="r", state="finished")

    async def test() -> None:
        async with Server(tmp_path / "a.sock", saying(encode(told) + encode(Pulled(reply_to=1)))) as server:

            def ask() -> tuple[Reply, Message | None]:
                channel = AgentChannel(server.address)
                try:
                    return channel.request(PULL, 5), channel.receive(5)
                finally:
                    channel.close()

            assert await blocking(ask) == (Pulled(reply_to=1), told)

    in_loop(test)
