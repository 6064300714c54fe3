"""What a step or a tokenizer of the user is known by: all that decides what it does, and nothing else."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.storage.datasets.fingerprints import fingerprint, is_installed
from jupyter_llmcloud.storage.datasets.tokenizer import pack_tokenizer

LIST = """
STOP = {value}
def step(text): return " ".join(word for word in text.split() if word not in STOP)
"""
PATTERN = """
import re
RULE = re.compile({value})
def step(text): return RULE.sub("", text)
"""
CLOSURE = """
def make(limits): return lambda text: text[: limits["max"]]
step = make({{"max": {value}}})
"""
PARTIAL = """
import functools
def cut(text, size): return text[:size]
step = functools.partial(cut, size={value})
"""
OBJECT = """
class Clean:
    def __init__(self, size): self.size = size
    def __call__(self, text): return text[: self.size]
step = Clean({value})
"""
METHOD = OBJECT.replace("step = Clean({value})", "step = Clean({value}).__call__")
IN_A_CLASS = """
class Clean:
    SIZE = {value}
    def __call__(self, text): return text[: self.SIZE]
step = Clean()
"""
DECORATED = """
import functools
def upto(function):
    @functools.wraps(function)
    def within(text): return function(text)[: {value}]
    return within
@upto
def step(text): return text.strip()
"""
CALLED = """
def one(text): return text[: {value}] if text else two(text)
def two(text): return one(text)
def step(text): return two(text)
"""
CACHED = """
import functools
@functools.cache
def size(): return {value}
def step(text): return text[: size()]
"""
KEYWORD = """
SIZE = {value}
def step(text, *, size=SIZE): return text[:size]
"""
WAYS = {
    "a list": (LIST, '["a", "b"]', '["a"]'),
    "a set": (LIST, 'frozenset({"a", "b", "c", "d"})', 'frozenset({"a", "b", "c", "e"})'),
    "a pattern": (PATTERN, "r'[0-9]'", "r'[0-9]', re.I"),
    "a closure": (CLOSURE, "3", "4"),
    "a partial": (PARTIAL, "3", "4"),
    "an object": (OBJECT, "3", "4"),
    "a method": (METHOD, "3", "4"),
    "a class": (IN_A_CLASS, "3", "4"),
    "a decorator": (DECORATED, "3", "4"),
    "what it calls": (CALLED, "3", "4"),
    "what is cached": (CACHED, "3", "4"),
    "a default": (KEYWORD, "3", "4"),
}


def step_of(source: str, value: str, folder: Path) -> Callable[[str], str]:
    """The step of a notebook, whose text Python finds."""
    (folder / "own.py").write_text(source.format(value=value))
    module = types.ModuleType("own")
    module.__file__ = str(folder / "own.py")
    exec(compile(source.format(value=value), module.__file__, "exec"), vars(module))
    return module.step  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", list(WAYS))
def test_a_step_is_another_one_when_a_value_that_it_uses_is(way: str, tmp_path: Path) -> None:
    source, value, other = WAYS[way]
    (tmp_path / "other").mkdir()
    found = fingerprint(step_of(source, value, tmp_path))
    assert fingerprint(step_of(source, value, tmp_path)) == found
    assert fingerprint(step_of(source, other, tmp_path / "other")) != found


def test_a_step_is_the_same_in_another_process(tmp_path: Path) -> None:
    code = "\n".join(
        source.format(value=value).replace("step", f"step_{number}")
        for number, (source, value, _) in enumerate(WAYS.values())
    )
    code = f"{code}\nfrom jupyter_llmcloud.storage.datasets.fingerprints import fingerprint\n"
    code += "\n".join(f"print(fingerprint(step_{number}))" for number in range(len(WAYS)))
    (tmp_path / "steps.py").write_text(code)
    told = [
        subprocess.run(
            [sys.executable, str(tmp_path / "steps.py")],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] and len({*told[0].split()}) == len(WAYS)


def test_what_comes_with_a_package_is_known_by_its_name() -> None:
    assert fingerprint(re.sub) != fingerprint(re.split)
    assert fingerprint(str.strip) != fingerprint(str.lower) != fingerprint("".join)
    assert fingerprint(functools.partial(re.sub, "a", "b")) != fingerprint(functools.partial(re.sub, "a", "c"))


def _fast(*words: str) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<unk>", *words))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def _around(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: [*tokenizer.encode(text)]


@pytest.mark.parametrize("wrap", [_around, lambda made: made.encode], ids=["function", "method"])
def test_a_function_that_calls_a_tokenizer_is_another_one_with_another_tokenizer(wrap: Callable[..., Any]) -> None:
    told = pack_tokenizer(wrap(_fast("a", "b")))[0].fingerprint
    assert told == pack_tokenizer(wrap(_fast("a", "b")))[0].fingerprint
    assert told != pack_tokenizer(wrap(_fast("a", "c")))[0].fingerprint


def test_a_slow_tokenizer_is_known_by_its_rules_not_by_what_it_has_read(tmp_path: Path) -> None:
    from transformers import CTRLTokenizer

    def made(folder: str, merge: str) -> Any:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vocab.json").write_text('{"<unk>": 0, "a": 1, "b</w>": 2, "ab</w>": 3, "a@@": 4}')
        (tmp_path / folder / "merges.txt").write_text(f"#version: 0.2\n{merge}\n")
        at = tmp_path / folder
        return CTRLTokenizer(str(at / "vocab.json"), str(at / "merges.txt"))

    one, same, other = made("one", "a b</w>"), made("same", "a b</w>"), made("other", "b a</w>")
    told = pack_tokenizer(one)[0].fingerprint
    one.encode("ab ab " * 2000)
    assert told == pack_tokenizer(one)[0].fingerprint == pack_tokenizer(same)[0].fingerprint
    assert told != pack_tokenizer(other)[0].fingerprint


def test_a_tensor_is_known_by_its_values() -> None:
    import torch

    def around(value: Any) -> Callable[[str], str]:
        return lambda text: text * int(value[0])

    kinds = (torch.float32, torch.bfloat16)
    told = {
        fingerprint(around(torch.tensor([2, last], dtype=kind))) for kind in kinds for last in (3, 4) for _ in range(2)
    }
    assert len(told) == 4
    assert fingerprint(around(torch.nn.Linear(2, 2))) != fingerprint(around(torch.nn.Linear(2, 2)))


def test_what_is_installed_is_told_from_what_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (tmp_path / "of_mine").mkdir()
    (tmp_path / "of_mine" / "steps.py").write_text("def tidy(text): return text\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("of_mine.steps")
    names = ("os", "os.path", "sys", "torch.nn", torch.ops.__name__, "jupyter_llmcloud.errors", "numpy")
    assert [name for name in names if not is_installed(name)] == []
    assert [name for name in ("__main__", "of_mine", "of_mine.steps") if is_installed(name)] == []


def test_a_lambda_is_known_by_what_it_does_not_by_its_line() -> None:
    (one,) = [lambda text: [word for word in text if word not in {"a", "b"}]]
    same, other = (
        lambda text: [word for word in text if word not in {"a", "b"}], lambda text: [word for word in text if word not in {"a"}]
    )  # fmt: skip
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
