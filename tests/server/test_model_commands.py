"""`jupyter llmcloud explain`, `compress` and `export`: what is asked of the processes that work on models, what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.client.model_work import compressing, explaining
from jupyter_llmcloud.protocol.compression import Caption, Exported, Made, MethodRefused, ModelMeasured, Trainable
from jupyter_llmcloud.protocol.explanation import Attribution, ExplainedModel, TriedChange, TriedModel
from jupyter_llmcloud.server import model_commands
from jupyter_llmcloud.server.cli import main
from jupyter_llmcloud.storage.runs import RunRecord, RunStore


@pytest.fixture
def asked(own_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The requests; in place of the processes, what each of them may tell is told. There is no server."""
    requests: list[Any] = []

    class Process:
        def __init__(self, request: Any) -> None:
            requests.append(request)

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def events(self, tell: Any) -> list[Any]:
            tell("works")
            return TOLD[type(requests[-1]).__name__]

    monkeypatch.setattr(explaining, "ExplanationProcess", Process)
    monkeypatch.setattr(compressing, "CompressionProcess", Process)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    for name in ("m", "m-int8"):
        RunStore().folder(f"{name}-1").create(RunRecord(f"{name}-1", name, state="finished"), "")
    return requests


_PARTS: dict[str, Any] = {"tokens": ["The", " for"], "scores": [0.5, -1.5], "num_given": 2}
TOLD: dict[str, list[Any]] = {
    "ExplainRequest": [
        ExplainedModel(name="m", kind="generator", method="ablation", baseline="the token x"),
        Attribution(answer="a", quantity="q", value=1.0, baseline_value=0.0, **_PARTS),
    ],
    "TryRequest": [
        TriedModel(name="m", kind="generator", caption="of one row"),
        TriedChange(is_outside=False, row={"change": "as it is", "num_rows": 1, "perplexity": 3.5}),
        TriedChange(is_outside=True, row={"what": "as it is", "num_rows": 1, "bits_per_byte": 2.0}),
    ],
    "CompressRequest": [
        Made(method="int8", run_id="m-int8-1", name="m-int8", note="8 bits"),
        MethodRefused(method="lora-merge", reason="nothing to merge"),
        Trainable(method="distill:t", name="m-small", student="/m", teacher="t", texts="/texts.json"),
    ],
    "MeasureRequest": [
        ModelMeasured(model={"name": name, "num_bytes": size, "perplexity": 10.0})
        for name, size in (("m", 4_000_000), ("m-int8", 1_000_000))
    ]
    + [Caption(text="perplexity of a text")],
    "ExportRequest": [Exported(path="/m.onnx", notes=["the same in ONNX Runtime"])],
}


def test_a_model_is_explained_in_a_terminal(asked: list[Any], capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """What is asked for stands behind options or before them; without a server a run or a folder is explained."""
    for words in (["m", "The for", "--new", "3"], ["--new", "3", "m", "The", "for"], ["m", "--new", "3", "The for"]):
        assert main(["explain", *words]) == 0
        shown = capsys.readouterr()
        assert "·for  -1.5   75%" in shown.out and shown.err == "works\n"
    assert [(request.target, request.text, request.num_new) for request in asked] == [("m", "The for", 3)] * 3
    assert main(["explain", "m", "text", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"]["method"] == "ablation" and told["answers"][0]["scores"] == [0.5, -1.5]
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "label": 1}\n')
    assert main(["explain", "m", "--adversarial", str(tmp_path / "rows.jsonl"), "--rows", "10"]) == 0
    shown = capsys.readouterr().out
    assert "m: of one row." in shown and "as it is" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain", "m"], "jupyter llmcloud explain MODEL INPUT"),
        (["explain", "m", "--adversarial", "/no/such"], "is neither a file, a folder nor, in a notebook, a variable"),
        (["compress", "m"], "--method METHOD is missing"),
        (["compress", "nobody", "-m", "int8"], "there is no run 'nobody'"),
        (["compress", "m", "-m", "int8", "--eval", "/no/such"], "cannot be read as text"),
        (["export", "m"], "--to FORMAT is missing"),
    ],
)
def test_what_cannot_be_asked_is_said_and_no_process_is_started(
    asked: list[Any], words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(words) == 1
    assert said in capsys.readouterr().err and asked == []


def test_smaller_models_are_made_and_measured_and_what_needs_ranks_is_a_run(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without a server to run on, distillation is refused and the others are made."""
    assert main(["compress", "m", "-m", "int8", "--method", "lora-merge,distill:t"]) == 0
    shown = capsys.readouterr().out
    assert asked[0].methods == ["int8", "lora-merge", "distill:t"] and asked[1].models == ["m", "m-int8"]
    assert "m-int8  1.00 MB" in shown and "lora-merge: nothing to merge" in shown
    assert "distill:t: no Jupyter server with jupyter-llmcloud runs here" in shown
    trained: list[tuple[str, str, int | None]] = []
    monkeypatch.setattr(model_commands, "_train", lambda code, name, nproc: trained.append((code, name, nproc)))
    assert main(["compress", "m", "-m", "int8,distill:t", "-n", "2", "--no-table", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == ["m-int8", "m-small"]
    [(code, name, nproc)] = trained
    assert "distill(run, '/m', 't', '/texts.json', num_steps=200)" in code and (name, nproc) == ("m-small", 2)


def test_a_package_that_is_missing_is_said_before_a_model_is_read(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(compressing.importlib.util, "find_spec", lambda package: None)
    assert main(["export", "m", "--to", "gguf"]) == 1
    assert "--to gguf needs the package gguf: pip install 'jupyter-llmcloud[export]'." in capsys.readouterr().err
    assert main(["export", "m", "--to", "executorch"]) == 1
    assert "pip install executorch, made for the torch that is installed." in capsys.readouterr().err
    assert asked == []


def test_a_model_is_exported_and_how_it_compares_is_said(asked: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main(["export", "m", "--to", "onnx", "--out", "/m.onnx"]) == 0
    assert capsys.readouterr().out == "/m.onnx\n  the same in ONNX Runtime\n"
    assert (asked[0].target, asked[0].to, asked[0].out) == ("m", "onnx", "/m.onnx")
