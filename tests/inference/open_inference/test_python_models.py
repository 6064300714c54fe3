"""Cells, objects and modules as models."""

from __future__ import annotations

import asyncio
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.open_inference.opening import PredictorSpec
from jupyter_llmcloud.magics.serving import predictions
from jupyter_llmcloud.storage.models import served_code
from tests.support.predictions import Replica, cell_spec, serve, tensor


def cell(text: str, root: Path) -> PredictorSpec:
    return cell_spec(textwrap.dedent(text), root)


def test_a_cell_gets_json_values_and_arrays(tmp_path: Path) -> None:
    spec = cell(
        """
        import numpy as np
        def load():
            global offset
            offset = 10
        def predict(inputs):
            if isinstance(inputs, dict) and "x" in inputs:
                assert isinstance(inputs["x"], np.ndarray)
                return {"sum": inputs["x"].sum(axis=1) + offset, "names": np.array(["a", "b"])}
            return {"seen": inputs, "n": np.int64(3), "list": np.arange(2)}
        """,
        tmp_path,
    )

    async def asks(replica: Replica) -> None:
        told = await replica.infer({"inputs": {"text": "hello", "k": [1, None]}, "id": "a1"})
        assert told["outputs"] == {"seen": {"text": "hello", "k": [1, None]}, "n": 3, "list": [0, 1]}
        assert told["id"] == "a1"
        outputs = await replica.outputs(("x", "FP32", [[1, 2], [3, 4]]))
        assert outputs == {"sum": ([2], [13.0, 17.0]), "names": ([2], ["a", "b"])}

    serve(spec, asks)


def test_numbers_that_json_has_not_come_to_a_notebook_and_are_null_elsewhere(tmp_path: Path) -> None:
    spec = cell(
        """
        import math
        def load(): pass
        def predict(inputs): return {"loss": math.nan, "most": [math.inf, -math.inf, None, 1.5], "in": inputs, 1: "null"}
        def stream(inputs): yield math.nan
        """,
        tmp_path,
    )

    async def asks(replica: Replica) -> None:
        told = await replica.infer({"inputs": 3})
        assert told["outputs"] == {"loss": None, "most": [None, None, None, 1.5], "in": 3, "1": "null"}
        body, headers = predictions.request({"é": "a"}, None)
        async with replica.client.post("/v2/models/it/infer", data=body, headers=headers) as response:
            answer = predictions.answer(await response.read(), None)
        assert math.isnan(answer.pop("loss"))
        assert answer == {"most": [math.inf, -math.inf, None, 1.5], "in": {"é": "a"}, "1": "null"}
        [event, _] = await replica.events(json.loads(body))
        assert math.isnan(predictions.piece(event))

    serve(spec, asks)


def test_the_model_that_load_returned_is_the_second_argument(tmp_path: Path) -> None:
    spec = cell("def load(): return 5\ndef predict(inputs, model): return inputs * model", tmp_path)

    async def asks(replica: Replica) -> None:
        assert (await replica.infer({"inputs": 3}))["outputs"] == 15

    serve(spec, asks)


def test_parameters_that_take_each_other_for_the_other_are_told_what_they_got(tmp_path: Path) -> None:
    spec = cell("def load(): return len\ndef predict(f, values): return f(values)", tmp_path)

    async def asks(replica: Replica) -> None:
        error = (await replica.infer({"inputs": [3]}, status=500))["error"]
        assert "TypeError" in error and "Cell In[4], line" in error
        told = "predict gets the inputs first: f was of type list; then what load() returned: values was of type builtin_function_or_method."
        assert told in error

    serve(spec, asks)


def test_texts_are_strings_and_coroutines_are_awaited(tmp_path: Path) -> None:
    spec = cell(
        """
        import asyncio
        async def load():
            await asyncio.sleep(0)
            return asyncio.get_running_loop()
        async def predict(inputs, loop):
            assert asyncio.get_running_loop() is loop
            return np_upper(inputs["t"])
        def np_upper(texts):
            import numpy as np
            return np.array([text.upper() for text in texts])
        """,
        tmp_path,
    )

    async def asks(replica: Replica) -> None:
        assert await replica.outputs(("t", "BYTES", ["a", "ß"])) == {"output": ([2], ["A", "SS"])}

    serve(spec, asks)


def test_an_exception_is_told_in_the_lines_of_the_cell_and_the_endpoint_lives_on(tmp_path: Path) -> None:
    spec = cell("def load(): ...\ndef predict(inputs):\n    return 1 / inputs", tmp_path)

    async def asks(replica: Replica) -> None:
        error = (await replica.infer({"inputs": 0}, 500))["error"]
        assert error == "ZeroDivisionError: division by zero\nCell In[4], line 4, in predict\n    return 1 / inputs"
        assert (await replica.infer({"inputs": 2}))["outputs"] == 0.5
        assert replica.status.num_failed == 1

    serve(spec, asks)


@pytest.mark.parametrize("what", ["SystemExit(3)", "KeyboardInterrupt", "asyncio.CancelledError"])
def test_what_would_end_a_process_or_a_task_ends_one_request(what: str, tmp_path: Path) -> None:
    text = f"import asyncio\ndef load(): ...\ndef predict(inputs):\n    if inputs: raise {what}\n    return []"
    text += f"\ndef stream(inputs):\n    yield 1\n    raise {what}"

    async def asks(replica: Replica) -> None:
        error = (await replica.infer({"inputs": 1}, 500))["error"]
        assert what.partition("(")[0] in error and "Cell In[4], line 5, in predict" in error
        assert (await replica.infer({"inputs": 0}))["outputs"] == []

    serve(cell(text, tmp_path), asks)


def test_what_cannot_be_sent_is_said_so(tmp_path: Path) -> None:
    spec = cell("def load(): ...\ndef predict(inputs): return object() if inputs else {1, 2}", tmp_path)

    async def asks(replica: Replica) -> None:
        assert "cannot be sent: an object is no JSON value" in (await replica.infer({"inputs": 1}, 500))["error"]
        body = {"inputs": [tensor("x", "BOOL", [True, True])]}
        assert "no datatype of the protocol" in (await replica.infer(body, 500))["error"]

    serve(spec, asks)


def test_tables_times_and_collections_are_told_as_json(tmp_path: Path) -> None:
    spec = cell(
        """
        import collections
        import numpy as np
        import pandas as pd
        class Name(str): pass
        times = [pd.Timestamp("2026-01-02"), pd.NaT]
        values = {
            "frame": pd.DataFrame({"a": [1, 2], "b": ["x", None], "t": times}),
            "series": pd.Series([1.5, np.nan]),
            "missing": [pd.NA, pd.NaT],
            "took": pd.Timedelta("3s"),
            "long": np.longdouble(1.5),
            "range": range(2),
            "kept": collections.deque([1]),
            "names": {"a": 1}.keys(),
            "values": {"a": 1}.values(),
            "own": [Name("q"), collections.UserDict(a=1)],
        }
        def load(): ...
        def predict(inputs): return values if inputs == "all" else values["frame"][["a", "t"]][:1]
        """,
        tmp_path,
    )

    async def asks(replica: Replica) -> None:
        told = (await replica.infer({"inputs": "all"}))["outputs"]
        assert told == {
            "frame": [
                {"a": 1, "b": "x", "t": "2026-01-02T00:00:00"},
                {"a": 2, "b": None, "t": None},
            ],
            "series": [1.5, None], "missing": [None, None], "took": "PT3S", "long": 1.5, "range": [0, 1], "kept": [1],
            "names": ["a"], "values": [1], "own": ["q", {"a": 1}],
        }  # fmt: skip
        assert (await replica.infer({"inputs": "one"}))["outputs"] == [{"a": 1, "t": "2026-01-02T00:00:00"}]

    serve(spec, asks)


def test_a_table_for_arrays_is_its_columns_by_name(tmp_path: Path) -> None:
    spec = cell(
        """
        import pandas as pd
        def load(): ...
        def predict(inputs): return pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
        """,
        tmp_path,
    )

    async def asks(replica: Replica) -> None:
        assert await replica.outputs(("x", "FP32", [1.0])) == {"a": ([2], [1, 2]), "b": ([2], ["x", "y"])}

    serve(spec, asks)


def test_predict_that_yields_is_told_where_that_belongs(tmp_path: Path) -> None:
    spec = cell("def load(): ...\ndef predict(inputs): yield 1", tmp_path)

    async def asks(replica: Replica) -> None:
        error = (await replica.infer({"inputs": 1}, 500))["error"]
        assert "a generator is no JSON value: return a list, or yield from stream(inputs)" in error

    serve(spec, asks)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "def load():\n    open('/no/such')\ndef predict(i): ...",
            "FileNotFoundError.*\nCell In\\[4\\], line 3, in load",
        ),
        ("x = y\ndef load(): ...\ndef predict(i): ...", "NameError: name 'y'.*\nCell In\\[4\\], line 2\n    x = y"),
        ("def load(): exit()\ndef predict(i): ...", "SystemExit.*\nCell In\\[4\\], line 2, in load"),
        ("max_batch = -1\ndef load(): ...\ndef predict(i): ...", "max_batch of the cell is a whole number"),
    ],
)
def test_a_cell_that_does_not_load_says_why(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        serve(cell(text, tmp_path), lambda replica: asyncio.sleep(0))


def test_pieces_come_one_after_another_and_requests_take_turns(tmp_path: Path) -> None:
    spec = cell(
        """
        ended = []
        def load(): ...
        def predict(inputs): return ended
        def stream(inputs):
            try:
                for number in range(inputs):
                    yield {"n": number}
                    if number == 5:
                        raise ValueError("no more")
            finally:
                ended.append(inputs)
        """,
        tmp_path,
    )

    async def asks(replica: Replica) -> None:
        events = await replica.events({"inputs": 3})
        assert [event["outputs"]["n"] for event in events[:-1]] == [0, 1, 2] and events[-1] == "[DONE]"
        broken = await replica.events({"inputs": 9})
        assert broken[-1]["error"].startswith("ValueError: no more\nCell In[4], line 11, in stream")
        async with replica.client.post("/v2/models/it/infer_stream", json={"inputs": 4}) as response:
            await response.content.readany()  # and hang up
        assert 3 in (await replica.infer({"inputs": 0}))["outputs"]
        for _ in range(100):
            if replica.status.num_open == 0 and len((await replica.infer({"inputs": 0}))["outputs"]) == 3:
                break
            await asyncio.sleep(0.02)
        assert len((await replica.infer({"inputs": 0}))["outputs"]) == 3

    serve(spec, asks)


def test_a_stream_of_arrays_and_of_an_async_generator(tmp_path: Path) -> None:
    spec = cell(
        """
        def load(): ...
        def predict(inputs): return 0
        async def stream(inputs):
            for row in inputs["x"]:
                yield row
        """,
        tmp_path,
    )

    async def asks(replica: Replica) -> None:
        events = await replica.events({"inputs": [tensor("x", "INT64", [[1, 2], [3, 4]])]})
        assert [event["outputs"][0]["data"] for event in events[:-1]] == [[1, 2], [3, 4]]

    serve(spec, asks)


def test_a_model_without_stream_says_so(tmp_path: Path) -> None:
    spec = cell("def load(): ...\ndef predict(inputs): return 0", tmp_path)

    async def asks(replica: Replica) -> None:
        assert "no stream(inputs)" in (await replica.infer({"inputs": 1}, 400, "infer_stream"))["error"]

    serve(spec, asks)


def test_rows_of_several_requests_share_a_call_where_the_cell_allows_it(tmp_path: Path) -> None:
    spec = cell(
        """
        import time
        max_batch = 8
        calls = []
        def load(): ...
        def predict(inputs):
            if inputs == ["calls"]:
                return [calls]
            calls.append(len(inputs))
            time.sleep(0.01)
            return [1 / row for row in inputs]
        """,
        tmp_path,
    )

    async def asks(replica: Replica) -> None:
        asked = [[1, 2], [4], [5, 10]] * 6
        answers = await asyncio.gather(*(replica.infer({"inputs": rows}) for rows in asked))
        assert [answer["outputs"] for answer in answers] == [[1 / row for row in rows] for rows in asked]
        [calls] = (await replica.infer({"inputs": ["calls"]}))["outputs"]
        assert sum(calls) == 30 and max(calls) <= 8 and len(calls) < 18
        bad, *good = await asyncio.gather(
            replica.infer({"inputs": [0]}, 500), *(replica.infer({"inputs": [2]}) for _ in range(5))
        )
        assert "division by zero" in bad["error"] and all(answer["outputs"] == [0.5] for answer in good)

    serve(spec, asks)


def test_too_many_that_wait_are_refused_with_429(tmp_path: Path) -> None:
    spec = cell("import time\ndef load(): ...\ndef predict(inputs): time.sleep(0.05)", tmp_path)
    spec = PredictorSpec(**{**vars(spec), "max_rows": 1})

    async def asks(replica: Replica) -> None:
        async def ask() -> int:
            async with replica.client.post("/v2/models/it/infer", json={"inputs": 1}) as response:
                if response.status == 429:
                    assert response.headers["Retry-After"] == "1" and "is full" in (await response.json())["error"]
                return response.status

        statuses = await asyncio.gather(*(ask() for _ in range(12)))
        assert set(statuses) == {200, 429}
        assert await ask() == 200 and replica.status.num_open == 0

    serve(spec, asks)


class Estimator:
    """As scikit-learn's."""

    def fit(self, X: Any, y: Any) -> Estimator:
        return self

    def get_params(self) -> dict[str, Any]:
        return {}

    def predict(self, X: Any) -> Any:
        array = np.asarray(X)
        if array.shape[1] != 2:
            raise ValueError(f"X has {array.shape[1]} features, but Estimator is expecting 2 features")
        return array.sum(axis=1)

    def predict_proba(self, X: Any) -> Any:
        return np.asarray(X) / np.asarray(X).sum(axis=1, keepdims=True)


def object_spec(value: Any, root: Path) -> PredictorSpec:
    digest = served_code.write_object(cloudpickle.dumps(value), str(root), root)
    return PredictorSpec("it", "python", None, str(served_code.object_file(digest, root)))


def test_an_estimator_predicts_rows(tmp_path: Path) -> None:
    async def asks(replica: Replica) -> None:
        told = (await replica.infer({"inputs": [[1, 3], [2, 2]]}))["outputs"]
        assert told == {"predictions": [4, 4], "probabilities": [[0.25, 0.75], [0.5, 0.5]]}
        outputs = await replica.outputs(("features", "FP64", [[1.0, 3.0]]))
        assert outputs["predictions"] == ([1], [4.0])
        assert "is expecting 2 features" in (await replica.infer({"inputs": [[1]]}, 400))["error"]

    serve(object_spec(Estimator(), tmp_path), asks)


def test_a_function_is_a_model(tmp_path: Path) -> None:
    async def asks(replica: Replica) -> None:
        assert (await replica.infer({"inputs": "abc"}))["outputs"] == "cba"

    serve(object_spec(lambda text: text[::-1], tmp_path), asks)


def test_a_module_is_asked_by_its_forward_and_batched_once_that_is_known_to_be_the_same(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    rows = torch.randn(20, 3)
    wanted = model(rows).detach().numpy()

    async def asks(replica: Replica) -> None:
        answers = await asyncio.gather(
            *(replica.outputs(("input", "FP32", [row.tolist()])) for row in rows),
        )
        told = np.array([answer["output"][1] for answer in answers])
        np.testing.assert_allclose(told, wanted, rtol=1e-4, atol=1e-6)
        again = await replica.infer({"inputs": rows[:2].tolist()})
        np.testing.assert_allclose(again["outputs"], wanted[:2], rtol=1e-4, atol=1e-6)
        assert "mat1 and mat2" in (await replica.infer({"inputs": [[1.0]]}, 500))["error"]
        bad = {"inputs": [tensor("x", "FP32", [[1.0]]), tensor("y", "FP32", [[1.0]])]}
        assert "forward has no parameter" in (await replica.infer(bad, 400))["error"]

    serve(object_spec(model, tmp_path), asks)


class Centred(__import__("torch").nn.Module):  # type: ignore[misc]
    """Its rows see each other."""

    def forward(self, x: Any) -> Any:
        return x - x.mean(0, keepdim=True)


def test_a_module_whose_rows_see_each_other_is_never_batched(tmp_path: Path) -> None:
    async def asks(replica: Replica) -> None:
        answers = await asyncio.gather(*(replica.outputs(("x", "FP32", [[float(n)], [0.0]])) for n in range(20)))
        assert [answer["output"][1] for answer in answers] == [[n / 2, -n / 2] for n in range(20)]

    serve(object_spec(Centred(), tmp_path), asks)


def test_only_code_that_was_given_to_be_served_is_run(tmp_path: Path) -> None:
    from jupyter_llmcloud.errors import NotFound

    for digest in ("../../etc", "0" * 16, "x", "", "a" * 16 + "/.."):
        with pytest.raises(NotFound):
            served_code.object_file(digest, tmp_path)
    (tmp_path / "evil.pkl").write_bytes(cloudpickle.dumps(print))
    with pytest.raises(ModelError, match="is no code that was given"):
        spec = PredictorSpec("it", "python", None, str(tmp_path / "evil.pkl"))
        serve(spec, lambda replica: asyncio.sleep(0))
