"""Methods as they are written, the options that go together, and what a table of before and after says."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.compression.methods import CompressionMethod, parse_methods
from jupyter_llmcloud.core.compression.spec import COMPRESS, CompressSpec, ExportSpec
from jupyter_llmcloud.core.compression.table import MeasuredModel, headings, rows, verdict
from jupyter_llmcloud.core.options import parse
from jupyter_llmcloud.errors import UsageError

BEFORE = MeasuredModel("m", 4_000_000, 10.0, 100.0, 400.0, 0.010, 500_000_000, "slots")


def after(**changed: float | str | None) -> MeasuredModel:
    values = {**vars(BEFORE), "name": "m-x", **changed}
    return MeasuredModel(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int8", "m-int8"),
        ("prune:0.25", "m-prune-0.25"),
        ("distill:other", "m-distill"),
        ("lora-merge", "m-merged"),
        ("bf16", "m-bf16"),
    ],
)
def test_a_result_is_named_after_its_model_and_its_method(text: str, name: str) -> None:
    assert CompressionMethod.parse(text).name_of("m") == name
    assert CompressionMethod.parse(text).text == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int9", "Did you mean int"),
        ("int8:3", "int8 takes no value"),
        ("prune", "prune needs a value: prune:RATIO"),
        ("prune:1.5", "between 0 and 1"),
        ("prune:much", "expected a number between 0 and 1"),
        ("distill:", "distill needs a value: distill:TEACHER"),
        ("int8,int8", "int8 is there twice"),
        ("", "--method METHOD is missing"),
    ],
)
def test_a_method_that_there_is_not_is_refused_in_a_word(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_methods(text)


def test_methods_are_given_with_commas_or_repeated() -> None:
    parsed = parse(COMPRESS, ["run", "--method", "int8,bf16", "-m", "prune:0.3"])
    assert [word for words in parsed.method for word in words] == ["int8", "bf16", "prune:0.3"]
    assert CompressSpec.make({"method": ["int8", "prune:0.3"]}).checked().method == ["int8", "prune:0.3"]


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UsageError, match="--method METHOD is missing"):
        CompressSpec().checked()
    with pytest.raises(UsageError, match="--name x is for one method, and there are 2"):
        CompressSpec.make({"method": "int8,bf16", "name": "x"}).checked()
    with pytest.raises(UsageError, match="--to FORMAT is missing: one of onnx, gguf, executorch"):
        ExportSpec().checked()
    with pytest.raises(UsageError, match="--type q8_0 is for --to gguf only"):
        ExportSpec.make({"to": "onnx", "type": "q8_0"}).checked()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (after(num_bytes=1_000_000), "smaller on disk (0.25 x)"),
        (after(num_bytes=2_000_000, tokens_per_s=50.0), "smaller on disk (0.5 x), but slower (0.5 x)"),
        (after(tokens_per_s=80.0), "does not help: slower (0.8 x)"),
        (after(tokens_per_s=103.0, first_token_s=0.0103), "does not help: nothing is smaller or faster"),
        (
            after(num_bytes=1_000_000, perplexity=11.0),
            "does not help: perplexity +10 %, and +5 % is the bound; smaller on disk (0.25 x)",
        ),
        (after(num_bytes=1_000_000, perplexity=10.4), "smaller on disk (0.25 x)"),
        (after(num_bytes=1_000_000, perplexity=None), "smaller on disk (0.25 x)"),
        (
            after(num_bytes=1_000_000, perplexity=float("nan")),
            "does not help: perplexity +nan %, and +5 % is the bound; smaller on disk (0.25 x)",
        ),
        (MeasuredModel("m-x", problem="it cannot be served: no"), "not measured: it cannot be served: no"),
        (after(memory_bytes=250_000_000), "less memory (0.5 x)"),
        (after(perplexity=5.0), "perplexity -50 %"),
        (after(perplexity=5.0, tokens_per_s=80.0), "perplexity -50 %, but slower (0.8 x)"),
        (after(perplexity=9.8), "does not help: nothing is smaller or faster"),
    ],
)
def test_a_method_is_said_to_help_only_where_something_is_better_and_perplexity_within_its_bound(
    made: MeasuredModel, said: str
) -> None:
    assert verdict(BEFORE, made, 5.0) == said


def test_the_table_has_the_model_as_it_was_first_and_every_figure_with_its_unit() -> None:
    table = rows(BEFORE, [after(num_bytes=1_000_000)], 5.0)
    assert len(headings(8)) == len(table[0])
    assert table[0] == ["m", "4.00 MB", "10", "100", "400", "10.0 ms", "500.00 MB", "slots", "as it was"]
    assert table[1][0] == "m-x" and table[1][-1] == "smaller on disk (0.25 x)"
