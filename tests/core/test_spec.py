"""Every option is defined once, and every interface to a run, a world or an endpoint has those that are its own."""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jupyter_llmcloud as lc
from jupyter_llmcloud.core.compression.spec import CompressSpec
from jupyter_llmcloud.core.data.spec import PREPARE, PrepareSpec
from jupyter_llmcloud.core.explain.spec import EXPLAIN, ExplainSpec
from jupyter_llmcloud.core.options import Option, complete, parse, split, usage
from jupyter_llmcloud.core.search.spec import SWEEP, SweepSpec
from jupyter_llmcloud.core.spec import (
    DISTRIBUTE,
    RUN,
    SERVE,
    EndpointSpec,
    Interface,
    RunSpec,
    Spec,
    WorldSpec,
    as_arguments,
    inherited,
    table,
)
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics import extension
from jupyter_llmcloud.server.cli import parser

README = next(
    folder / "README.md" for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists()
)
VALUES: dict[str, tuple[str, Any]] = {
    "nproc": ("2", 2),
    "ranks": ("0,2-3", "0,2-3"),
    "cluster": ("c1", "c1"),
    "name": ("long", "long"),
    "push": ("a,b", ["a", "b"]),
    "pull": ("x", ["x"]),
    "background": ("", True),
    "precision": ("bf16", "bf16"),
    "plan": ("tp+fsdp", "tp+fsdp:2"),
    "accelerate_config": ("config.yaml", "config.yaml"),
    "compress_gradients": ("fp16", "fp16"),
    "balance": ("", True),
    "save": ("model,tokenizer", ["model", "tokenizer"]),
    "no_replay": ("", True),
    "timeout": ("30m", 1800.0),
    "hang_after": ("1m", 60.0),
    "watch": ("loss-spike=stop", "loss-spike=stop"),
    "price": ("2.5", 2.5),
    "track": ("tensorboard,wandb", ["tensorboard", "wandb"]),
    "checkpoint_every": ("100", 100),
    "keep_checkpoints": ("5", 5),
    "max_restarts": ("3", 3),
    "elastic": ("1:4", "1:4"),
    "resume": ("earlier", "earlier"),
    "seed": ("0", 0),
    "priority": ("-1", -1),
    "fresh": ("", True),
    "export": ("train.py", "train.py"),
    "dry_run": ("", True),
    "rehearse": ("", True),
    "args": ("'--lr 3e-4'", "--lr 3e-4"),
}


def options(spec: type[Spec], interface: Interface) -> dict[str, Option]:
    return {option.name: option for option in spec.options(interface)}


@pytest.mark.parametrize("name", options(RunSpec, Interface.NOTEBOOK))
def test_the_magic_takes_completes_and_explains_every_option_of_a_notebook(name: str) -> None:
    option = options(RunSpec, Interface.NOTEBOOK)[name]
    text, value = VALUES[name]
    parsed = parse(DISTRIBUTE, split(f"{option.flags[0]} {text}", "%%distribute"))
    assert parsed.given == {name: value}
    assert getattr(RunSpec.make(parsed.given, Interface.NOTEBOOK), name) == value
    assert option.flags[-1] in complete(DISTRIBUTE, option.flags[-1][:-1])
    assert option.flags[-1] in extension.completions(f"%%distribute {option.flags[-1]}")
    assert option.help in usage(DISTRIBUTE)


@pytest.mark.parametrize("name", options(RunSpec, Interface.SHELL))
def test_the_command_line_takes_and_explains_every_option_of_a_terminal(
    name: str, capsys: pytest.CaptureFixture
) -> None:
    option = options(RunSpec, Interface.SHELL)[name]
    text, value = VALUES[name]
    given = getattr(parser().parse_args(["run", "x.py", option.flags[0], *([text] if text else [])]), name)
    assert (option.read(given, option.flags[-1]) if option.takes_value else given) == value
    with pytest.raises(SystemExit):
        parser().parse_args(["run", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert option.flags[-1] in shown and option.help in shown


def test_a_bad_value_is_refused_alike_at_every_interface() -> None:
    words = "fp7' is not possible. Choose one of no, bf16, fp16, fp8."
    for interface in Interface.NOTEBOOK, Interface.REST:
        with pytest.raises(UsageError, match=re.escape(words)):
            RunSpec.make({"precision": "fp7"}, interface)
    with pytest.raises(UsageError, match=re.escape(words)):
        parse(DISTRIBUTE, ["--precision", "fp7"])


@pytest.mark.parametrize(
    ("function", "spec"),
    [
        (lc.distribute, RunSpec),
        (lc.serve, EndpointSpec),
        (lc.data.prepare, PrepareSpec),
        (lc.sweep, SweepSpec),
        (lc.explain, ExplainSpec),
    ],
)
def test_the_python_twin_names_and_explains_every_option(function: Any, spec: type[Spec]) -> None:
    known = inspect.signature(function).parameters
    for option in spec.options(Interface.NOTEBOOK):
        assert known[option.name].default == option.default
        assert option.help in function.__doc__


def test_the_readme_has_the_table_of_every_option() -> None:
    assert table(RunSpec) in README.read_text(encoding="utf-8")
    assert table(EndpointSpec) in README.read_text(encoding="utf-8")
    assert table(PrepareSpec) in README.read_text(encoding="utf-8")
    assert table(SweepSpec) in README.read_text(encoding="utf-8")
    assert table(CompressSpec) in README.read_text(encoding="utf-8")
    assert table(ExplainSpec) in README.read_text(encoding="utf-8")


def test_serve_and_world_have_the_options_of_their_specs() -> None:
    assert SERVE.options == EndpointSpec.options(Interface.NOTEBOOK)
    assert extension.VERBS["%world"]["start"].options == WorldSpec.options()
    command = parser().parse_args(["serve", "folder", "--replicas", "2", "--dtype", "float16", "--name", "x"])
    assert all(hasattr(command, option.name) for option in EndpointSpec.options(Interface.SHELL))
    assert PREPARE.options == PrepareSpec.options(Interface.NOTEBOOK)
    command = parser().parse_args(["prepare", "in", "--out", "out"])
    assert all(hasattr(command, option.name) for option in PrepareSpec.options(Interface.SHELL))
    assert EXPLAIN.options == ExplainSpec.options(Interface.NOTEBOOK)
    command = parser().parse_args(["explain", "m", "text"])
    assert all(hasattr(command, option.name) for option in ExplainSpec.options(Interface.SHELL))
    assert SWEEP.options == SweepSpec.options(Interface.NOTEBOOK)
    command = parser().parse_args(["sweep", "tune.py", "--trials", "3"])
    assert all(hasattr(command, option.name) for option in SweepSpec.options(Interface.SHELL))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"nproc": 0}, "nproc '0': expected at least 1, not 0."),
        ({"nproc": True}, "nproc True is not possible"),
        ({"nproc": 2.5}, "expected a whole number"),
        ({"save": ["not a name"]}, "expected names of variables"),
        ({"save": [1]}, "save [1] is not possible"),
        ({"timeout": "soon"}, "is not a duration"),
        ({"name": "../x"}, "is not a valid name"),
        ({"background": 1}, "background is true or false, not 1."),
        ({"steps": 1}, "there is no option 'steps' here. Allowed: nproc, "),
        ({"nprocs": 2}, "there is no option 'nprocs' here. Did you mean nproc? Allowed: nproc, "),
    ],
)
def test_what_python_or_json_gives_is_checked_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        RunSpec.make(given)
    assert words in str(caught.value)


def test_a_door_has_no_options_of_another() -> None:
    with pytest.raises(UsageError, match="there is no option 'push' here"):
        RunSpec.make({"push": ["a"]}, Interface.REST)
    assert "push" not in {option.name for option in RUN.options}


def test_values_may_be_written_as_text_or_as_what_they_are() -> None:
    asked = RunSpec.make({"timeout": "2m", "save": "model,tokenizer", "nproc": "2", "seed": None})
    assert asked == RunSpec.make({"timeout": 120, "save": ["model", "tokenizer"], "nproc": 2})


def test_a_record_keeps_what_differs_from_the_defaults_and_gives_it_back() -> None:
    spec = RunSpec.make({"name": "long", "checkpoint_every": 100, "keep_checkpoints": 2, "max_restarts": 0})
    assert spec.as_dict() == {"name": "long", "checkpoint_every": 100}
    assert RunSpec.restore(spec.as_dict()) == spec


def test_a_record_of_another_version_is_read() -> None:
    assert RunSpec.restore({"name": "old", "an_option_of_tomorrow": 7}) == RunSpec(name="old")


def test_who_resumes_has_the_options_of_training_but_not_those_of_the_call() -> None:
    earlier = RunSpec.make(
        {"name": "long", "nproc": 2, "checkpoint_every": 100, "seed": 1, "timeout": 60, "save": "model"}
    )
    assert inherited(earlier.as_dict()) == {"checkpoint_every": 100, "seed": 1, "save": ["model"]}


def test_options_can_be_written_as_they_were_typed() -> None:
    words = "--nproc 2 --name long --background --save model,tokenizer --timeout 90s"
    parsed = parse(DISTRIBUTE, words.split())
    assert " ".join(as_arguments(RunSpec, parsed.given)) == words


@pytest.mark.parametrize("spec", [RunSpec, WorldSpec, EndpointSpec])
def test_every_option_is_explained_in_a_sentence(spec: type[Spec]) -> None:
    for option in spec.options():
        assert option.help[0].isupper() and option.help.endswith(".")


def test_the_list_of_values_of_this_test_is_whole() -> None:
    assert set(VALUES) == {option.name for option in RunSpec.options()}
    assert isinstance(parser(), argparse.ArgumentParser)


def test_a_hint_ends_with_its_question_mark() -> None:
    with pytest.raises(UsageError, match=r"Did you mean fsdp\?$"):
        parse(DISTRIBUTE, split("--plan fsdpp", "%%distribute"))


def test_tab_offers_what_the_package_is_for() -> None:
    assert {"distribute", "serve", "runs", "cluster"} <= set(dir(lc)) <= {*lc.__all__, "__version__"}


def test_numbers_of_numpy_and_paths_are_taken_as_what_they_are() -> None:
    given = {"nproc": np.int64(2), "seed": np.uint8(7), "price": np.float64(0.5), "export": Path("plain.py")}
    assert RunSpec.make(given) == RunSpec(nproc=2, seed=7, price=0.5, export="plain.py")
    with pytest.raises(UsageError, match="nproc"):
        RunSpec.make({"nproc": np.array([1, 2])})


@pytest.mark.parametrize("nothing", [[], ()], ids=["list", "tuple"])
def test_an_empty_list_is_nothing(nothing: Any) -> None:
    assert RunSpec.make({"push": nothing, "save": nothing}) == RunSpec()


def test_numbers_are_written_with_all_of_their_digits_and_in_their_unit() -> None:
    asked = {"timeout": 1234567.0, "hang_after": 0.5, "price": 12.345678}
    words = as_arguments(RunSpec, asked)
    assert words == ["--timeout", "1234567s", "--hang-after", "0.5s", "--price", "12.345678"]
    assert parse(DISTRIBUTE, words).given == asked
