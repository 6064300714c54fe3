"""Variables that are too large for one message: found before they fill the memory, named, with a way out."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import Any

import numpy
import pytest
import torch

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.protocol import frames, payload_size
from jupyter_llmcloud.protocol.agent_messages import Push
from jupyter_llmcloud.protocol.payload_size import MAX_VARIABLES, TooLarge, amount, dump_within, known_size


def dump(value: Any, file: Any) -> None:
    pickle.Pickler(file, 5).dump(value)


def refused(values: dict[str, Any], limit: int) -> str:
    with pytest.raises(TooLarge) as error:
        dump_within(values, dump, limit, "--push", "/shared/root")
    return str(error.value)


def test_what_fits_is_pickled_with_what_variables_share() -> None:
    shared = [1, 2]
    data = dump_within({"a": shared, "b": {"of a": shared}}, dump, 1000, "--push", "/shared")
    found = pickle.loads(data)
    assert found["a"] is found["b"]["of a"]
    assert dump_within({"a": shared, "b": {"of a": shared}}, dump, len(data), "--push", "/shared") == data


def test_one_that_is_too_large_is_named_and_the_others_are_not() -> None:
    told = refused({"small": 1, "large": [b"x" * 900, b"y" * 900]}, 1000)
    assert told.startswith("--push: large (1.8 KiB), but at most 1000 B of variables can travel at once.")
    assert "Save large to a folder" in told and "/shared/root" in told and "small" not in told


def test_several_that_are_too_large_together_are_told_with_their_sizes() -> None:
    told = refused({"a": b"x" * 600, "b": [b"y" * 700]}, 1000)
    assert told.index("b (7") < told.index("a (6") and "1.3 KiB together" in told and "Fewer at a time" in told
    many = refused({f"v{n}": bytes(600) for n in range(20)}, 1000)
    assert "and 15 more" in many and len(many) < 600


def test_what_follows_after_the_limit_need_not_be_picklable() -> None:
    with pytest.raises((TypeError, AttributeError)):
        dump_within({"large": [bytes(5000)], "lock": lambda: 0}, dump, 1000, "--push", "/shared")


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (torch.ones(1000), 4000),
        (torch.ones(1000)[:10], 4000),
        (torch.ones(1).expand(1 << 40), 4),
        (torch.ones(1 << 40, device="meta"), 0),
        (torch.Tensor, 0),
        (numpy.ones((10, 10)), 800),
        (numpy.ndarray, 0),
        (bytes(10), 10),
        ("text", 0),
        ([torch.ones(1000)], 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_size_of_tensors_and_arrays_is_known_before_they_are_pickled(value: Any, size: int) -> None:
    assert known_size(value) == size


def test_what_is_too_large_is_never_copied() -> None:
    array, large = numpy.ones(1 << 20), [bytes(1 << 20) for _ in range(64)]
    tracemalloc.start()
    try:
        refused({"array": array, "large": large}, 1 << 20)
        refused({"large": large}, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_a_notebook_is_refused_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload_size, "MAX_VARIABLES", 10_000)
    names = {"model": {"weights": torch.ones(5_000)}, "table": numpy.ones(10)}
    with pytest.raises(UsageError, match=r"--push: model \(\d+\.\d KiB\), but at most 9.8 KiB.*Save model to a folder"):
        session.pushed_values(names, ["model", "table"])
    assert session.pushed_values(names, ["table"])


def test_what_may_be_pushed_fits_into_a_message_that_is_carried_in_others() -> None:
    size, room = frames._HEAD.size, frames.MAX_PAYLOAD - MAX_VARIABLES
    assert room >= 3 * (size + 1024) and amount(MAX_VARIABLES) == "3.9 GiB"


def test_no_end_sends_what_the_other_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_PAYLOAD", 100)
    with pytest.raises(ValueError, match=r"Push has .* 101 bytes"):
        frames.encode(Push(world_id="w", payload=bytes(101)))
    assert frames.Decoder().feed(frames.encode(Push(world_id="w", payload=bytes(100))))
    monkeypatch.setattr(frames, "MAX_HEADER", 100)
    with pytest.raises(ValueError, match="more than a message holds"):
        frames.encode(Push(world_id="w" * 100))
