"""What a notebook asks a model, and makes of its answers, by values: replies that a transport of ours gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from jupyter_llmcloud.client.model_work.inputs import data_file, texts_of
from jupyter_llmcloud.client.model_work.texts import texts_of_file
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.compression.compress import _as_texts, _texts
from jupyter_llmcloud.magics.serving.endpoint import Endpoint


def endpoint(content: bytes | Any) -> Endpoint:
    """One that answers so; pieces of bytes come one by one."""
    found = Endpoint("tiny", ServerClient("http://127.0.0.1:1"))
    found._key = "sk"
    found._http = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, content=content)))
    return found


def event(text: str) -> bytes:
    """As replicas write it: JSON in UTF-8, nothing of which is escaped that need not be."""
    body = {"choices": [{"index": 0, "delta": {"content": text}}]}
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85"], ids=["line", "paragraph", "next-line"])
def test_a_stream_may_hold_what_ends_lines_elsewhere(char: str) -> None:
    data = event(f"one{char}two") + event("three") + b"data: [DONE]\n\n"
    for size in (1, 7, len(data)):
        pieces = (data[at : at + size] for at in range(0, len(data), size))
        assert list(endpoint(pieces).chat("Hello", stream=True)) == [f"one{char}two", "three"]


def test_a_reply_of_calls_alone_has_no_text() -> None:
    choices = [{"index": 0, "message": {"content": None, "tool_calls": [{"id": "a"}]}}]
    content = json.dumps({"choices": choices}).encode()
    assert endpoint(content).chat("Hello", tools=[]) is None
    assert endpoint(content).chat("Hello", n=1) == [None]


@pytest.mark.parametrize("text", ["word " * 200, "~nobody-of-that-name is here", "a\0b"], ids=["long", "tilde", "zero"])
def test_a_text_that_can_be_no_files_name_is_a_text(text: str) -> None:
    assert texts_of(text, "--outside") == [text]
    with pytest.raises(UsageError, match="is neither a file nor a variable"):
        _texts(text, "--eval")
    with pytest.raises(UsageError, match="is neither a file, a folder nor"):
        data_file(text, Path())


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "as-windows-writes-it"])
def test_lines_of_json_may_hold_what_ends_lines_elsewhere(tmp_path: Path, mark: str) -> None:
    rows = [{"text": "one\u2028two", "label": "a"}, {"text": "three\x85", "label": "b"}]
    file = tmp_path / "a.jsonl"
    file.write_text(mark + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), "utf-8", newline="")
    assert texts_of_file(file) == ["one\u2028two", "three\x85"]
    kept, _ = data_file(str(file), tmp_path)
    assert json.loads(Path(kept).read_text()) == rows


@pytest.mark.parametrize("value", ["null", "3", "[]"])
def test_a_row_whose_text_is_none_is_refused_by_its_line(tmp_path: Path, value: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "one"}}\n\n{{"text": {value}}}\n')
    with pytest.raises(UsageError, match="a field text that is a text, and line 3 is not"):
        texts_of_file(file)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_texts_that_are_none_are_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": " "}\n' if name.endswith("l") else "\n \n")
    with pytest.raises(UsageError, match="there is no text in it"):
        texts_of_file(tmp_path / name)
    with pytest.raises(UsageError, match="there is no text in what was given"):
        _as_texts(["", " "], "--eval")
