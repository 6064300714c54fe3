"""The process that works on models: what it tells, what it says when it cannot, and that it ends with whoever asked."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jupyter_llmcloud.client.model_work import compressing
from jupyter_llmcloud.client.model_work import process as process_module
from jupyter_llmcloud.client.model_work.process import CompressionProcess, ModelProcess
from jupyter_llmcloud.client.model_work.texts import kept_texts, texts_of_file
from jupyter_llmcloud.compression.measure.measuring import _perplexity, _Texts
from jupyter_llmcloud.compression.results import ORIGIN
from jupyter_llmcloud.core.compression.spec import CompressSpec
from jupyter_llmcloud.core.compression.table import MeasuredModel
from jupyter_llmcloud.errors import ModelError, NotFound, UsageError
from jupyter_llmcloud.magics.compression.compress import Compressed, compress
from jupyter_llmcloud.protocol.compression import Caption, CompressRequest, Event, MeasureRequest
from jupyter_llmcloud.storage.runs import RunStore
from tests.support.tiny_models import TEXT, save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("whole") / "model")


@pytest.mark.soak
def test_models_are_made_and_measured_beside_the_one_as_it_was(folder: Path, own_root: Path) -> None:
    told: list[str] = []
    made = compress(folder, ["int8", "lora-merge"], eval=TEXT, progress=told.append)
    assert made.names == ["model-int8"] and "nothing to merge" in made.refused["lora-merge"]
    before, after = made.measured
    assert (before.name, after.name) == ("model", "model-int8") and after.num_bytes < before.num_bytes / 2
    assert before.engine == after.engine == "slots" and not after.problem
    for one in made.measured:
        assert one.perplexity and one.tokens_per_s and one.batch_tokens_per_s and one.first_token_s
        assert one.memory_bytes and one.memory_bytes > one.num_bytes
    assert abs(after.perplexity / before.perplexity - 1) < 0.3  # type: ignore[operator]
    assert "of the texts given" in made.caption and told[0].endswith("is read")
    shown = repr(made)
    assert "lora-merge: lora-merge is for adapters" in shown and "%serve model-int8 serves one" in shown
    assert (RunStore().find("model-int8").model / ORIGIN).is_file()


def test_what_is_not_there_is_said_before_a_process_is_started(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressing, "CompressionProcess", None)
    with pytest.raises(NotFound, match="there is no run 'nobody'"):
        compress("nobody", "int8")
    with pytest.raises(UsageError, match="--eval 'no-such-file' is neither a file nor a variable"):
        compress("nobody", "int8", eval="no-such-file")
    with pytest.raises(UsageError, match="eval is a text or a list of texts, not dict"):
        compress("nobody", "int8", eval={})
    with pytest.raises(UsageError, match="'int9' is no method"):
        compress("nobody", "int9")


def test_a_process_that_is_killed_is_told_with_the_end_of_its_log(own_root: Path) -> None:
    with CompressionProcess(MeasureRequest(models=["nobody"])) as process, pytest.raises(NotFound, match="nobody"):
        list(process.events(lambda text: None))


def test_what_was_told_counts_also_when_the_process_takes_long_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine the ends of some libraries take longer than anybody waits."""
    told = msgspec.json.encode(Caption(text="all")) + b"\n"
    code = f"import os, sys, time\nsys.stdin.readline()\nos.write(int(sys.argv[1]), {told!r})\n"
    (tmp_path / "slow_end.py").write_text(f"{code}os.close(int(sys.argv[1]))\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(process_module, "_END_S", 0.1)
    with ModelProcess(MeasureRequest(models=[]), "slow_end", Event) as process:
        assert list(process.events(lambda text: None)) == [Caption(text="all")]


def test_a_stop_ends_the_process_and_says_what_stays(
    folder: Path, own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Interrupted(CompressionProcess):
        def events(self, progress: Any) -> Any:
            assert self._process is not None
            started.append(self._process.pid)
            raise KeyboardInterrupt
            yield

    monkeypatch.setattr(compressing, "CompressionProcess", Interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"stopped\. Nothing was made\."):
        compress(folder, "int8", no_table=True)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], signal.SIGCONT)
    assert not RunStore().list()


def test_texts_are_read_from_files_of_text_and_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "one"}\n')
    assert texts_of_file(tmp_path / "a.txt") == ["one\ntwo"]
    assert texts_of_file(tmp_path / "a.jsonl") == ["one", "two"]
    with pytest.raises(UsageError, match="each line must be a JSON object with a field text"):
        texts_of_file(tmp_path / "b.jsonl")
    with kept_texts(["one"]) as path:
        assert Path(path).read_text() == '["one"]'
    assert not Path(path).exists()


def test_what_was_compressed_is_shown_with_what_was_refused() -> None:
    made = Compressed(5.0)
    made.names, made.refused = ["m-int8"], {"prune:0.3": "too small", "distill:t": "distill:t: another vocabulary"}
    made.measured = [MeasuredModel("m", 4_000_000, 10.0), MeasuredModel("m-int8", 1_000_000, 10.1)]
    made.caption = "perplexity of 10 tokens of a text"
    shown = repr(made)
    assert "m-int8  1.00 MB        10.1" in shown and "smaller on disk (0.25 x)" in shown
    assert "Perplexity of 10 tokens of a text; perplexity may rise by 5 %." in shown
    assert "prune:0.3: too small\ndistill:t: another vocabulary" in shown
    assert "<div>prune:0.3: too small</div>" in made._repr_html_()


def test_requests_cross_as_they_are() -> None:
    import msgspec

    from jupyter_llmcloud.protocol.compression import Request

    request = CompressRequest(target="m", methods=["int8"], texts="/t.json")
    assert msgspec.json.decode(msgspec.json.encode(request), type=Request) == request


class _Scored:
    """A replica that scores each token so."""

    def __init__(self, score: float | None) -> None:
        self._score = score

    def complete(self, prompts: list[list[int]], **_: Any) -> dict[str, Any]:
        scores = [None, *[self._score] * (len(prompts[0]) - 1)]
        return {"choices": [{"logprobs": {"token_logprobs": scores}}]}


def test_a_model_that_computes_no_numbers_is_broken_and_one_that_is_lost_has_a_perplexity() -> None:
    texts = _Texts([[1, 2, 3], [4, 5]], [[1]], 1, "a text")
    assert _perplexity(_Scored(-1.0), texts) == pytest.approx(math.e)  # type: ignore[arg-type]
    assert 1e300 < (_perplexity(_Scored(-5000.0), texts) or 0.0) < math.inf  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="it is broken"):
        _perplexity(_Scored(None), texts)  # type: ignore[arg-type]


def test_what_is_made_is_told_where_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, own_root: Path) -> None:
    def made(result: Compressed, *_: Any) -> list[Any]:
        result.names.append("m-int8")
        return []

    def measure(*_: Any) -> None:
        raise ModelError("m: it cannot be served.")

    monkeypatch.setattr(compressing, "_made", made)
    monkeypatch.setattr(compressing, "_measure", measure)
    result = Compressed(5.0)
    spec = CompressSpec.make({"method": "int8"})
    compressing.make_models(result, "/m", spec, compressing.CompressTexts(), "", lambda text: None, pytest.fail)
    assert "Nothing was measured: m: it cannot be served." in repr(result) and "m-int8" in repr(result)
