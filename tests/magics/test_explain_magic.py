"""%explain before a process is started: what is asked of which model, and what is said of what cannot be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jupyter_llmcloud.client.model_work import explaining
from jupyter_llmcloud.client.model_work.inputs import array_file
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.magics.understand import explain as magic
from jupyter_llmcloud.magics.understand.explain import ExplainMagics, explain
from jupyter_llmcloud.protocol.explanation import Attribution, ExplainedModel, ExplainRequest
from jupyter_llmcloud.storage.runs import RunRecord, RunStore


class Asked:
    """In place of the process: keeps the request, and tells one attribution."""

    requests: list[Any] = []

    def __init__(self, request: Any) -> None:
        self.requests.append(request)

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def events(self, progress: Any) -> list[Any]:
        model = ExplainedModel(name="m", kind="generator", method="ablation", baseline="the token x", source="run m-1")
        answer = Attribution(
            answer="a", quantity="q", value=1.0, baseline_value=0.0, tokens=["t"], scores=[0.5], num_given=1
        )
        return [model, answer]


@pytest.fixture(autouse=True)
def requests(monkeypatch: pytest.MonkeyPatch, own_root: Path) -> list[Any]:
    monkeypatch.setattr(explaining, "ExplanationProcess", Asked)
    monkeypatch.setattr(magic.session, "current", lambda: SimpleNamespace(known_server=Server()))
    Asked.requests = []
    return Asked.requests


class Server:
    """One that knows two endpoints."""

    def ask(self, method: str, path: str, **_: Any) -> dict[str, Any]:
        folder = str(RunStore().folder("m-1").model)
        plain = {"kind": "generator", "target": "m", "base_model": None, "model": folder, "name": "served"}
        return {"endpoints": [plain, {**plain, "name": "cell", "kind": "python", "target": ""}]}


def line(text: str, **variables: Any) -> Any:
    """What a line of the magic gives, in a notebook with these variables."""
    group: Any = ExplainMagics.__new__(ExplainMagics)
    group.shell = SimpleNamespace(user_ns=variables)
    return group.explain(text)


def test_words_are_the_text_and_a_variable_stands_in_its_place(requests: list[Any]) -> None:
    shown = line('m "The for  statement" --new 3')
    line("m --input prompt", prompt="from a variable")
    assert [(asked.text, asked.num_new) for asked in requests] == [("The for  statement", 3), ("from a variable", 1)]
    assert (
        shown.tokens == ["t"] and shown.scores == [0.5] and "Run m-1, by ablation, against the token x." in repr(shown)
    )


def test_an_endpoint_is_the_run_whose_model_it_serves(requests: list[Any]) -> None:
    folder = RunStore().folder("m-1")
    folder.model.mkdir(parents=True)
    folder.create(RunRecord("m-1", "m", state="finished"), "")
    line("served text")
    assert requests[-1] == ExplainRequest(target="m-1", text="text")
    with pytest.raises(UsageError, match="the endpoint serves code, which is no folder with weights here"):
        line("cell text")


def test_arrays_and_images_go_in_files(requests: list[Any], tmp_path: Path) -> None:
    line("m --input x", x=[[1, 2], [3, 4]])
    assert requests[-1].file.endswith("input.npy") and not requests[-1].text
    image = tmp_path / "shape.png"
    image.write_bytes(b"")
    line(f"m {image}")
    assert requests[-1].file == str(image)
    assert np.load(array_file(np.ones(3), tmp_path)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("m", "what is the model asked"),
        ("m --input nothing", "--input 'nothing' is not a variable of this notebook"),
        ("m text --input x", "'text' and --input x are both what is asked"),
        ("m --adversarial nothing", "--adversarial 'nothing' is neither a file nor a variable"),
        ("m --input x --adversarial x", "leave one of both out"),
        ("m --input made", "the input is a text, an image or an array of numbers, not object"),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(text: str, words: str, requests: list[Any]) -> None:
    with pytest.raises((UsageError, NotFound), match=words):
        line(text, x=["a text"], made=object())
    assert requests == []


def test_data_are_texts_rows_or_one_text(requests: list[Any]) -> None:
    for data in (["one", "two"], "one text", [("one", "label")]):
        with pytest.raises(StopIteration):  # this process tells no table
            line("m --adversarial data --outside other", data=data, other="of another kind")
    assert {asked.told for asked in requests} == {"the data given"}
    with pytest.raises(UsageError, match="there is no option 'nwe' here"):
        explain("m", "text", nwe=3)
