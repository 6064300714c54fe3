"""How variables are called as they are served, and what is said of an endpoint that stays as it is."""

from __future__ import annotations

from typing import Any

import pytest

from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.core.serving.models.variable_role import MODEL
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.magics.commands import endpoints, serve_variable
from jupyter_llmcloud.magics.commands.serve_variable import NOTEBOOK, NamedVariable, is_run_or_folder, run_name
from jupyter_llmcloud.magics.serving.as_asked import say_what_stays
from jupyter_llmcloud.magics.session import session


class _Server:
    def run(self, name: str) -> Any:
        raise NotFound(name)

    endpoint = run


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.Session, "server", property(lambda _: _Server()))


@pytest.mark.parametrize("name", ["_model", "modèle", "模型"])
def test_a_variable_that_no_endpoint_can_be_called_after_needs_a_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = NamedVariable(name, NOTEBOOK, {name: MODEL}, "Module")
    monkeypatch.setattr(endpoints, "find", lambda target, shell: found)
    with pytest.raises(UsageError, match="say --name NAME"):
        endpoints._variable(name, {})
    assert endpoints._variable(name, {"name": "m"}) is found
    assert not capsys.readouterr().out  # nothing of a run or a folder


def test_the_run_that_saves_a_variable_has_a_name_that_runs_can_have() -> None:
    assert run_name("model") == "serve-model"
    names = {run_name(name) for name in ("modèle", "modele", "模型", "_model", "m" * 300)}
    assert len(names) == 5 and all(NAME_PATTERN.fullmatch(name) for name in names)


@pytest.mark.parametrize("name", ["_model", "modèle"])
def test_a_folder_of_that_name_is_a_folder(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_run_or_folder(name)
    (tmp_path / name).mkdir()
    assert is_run_or_folder(name)


_RECORD = {
    "name": "m", "min_replicas": 1, "max_replicas": None, "num_replicas": 1, "dtype": "auto", "engine": "auto",
    "max_model_len": None, "max_concurrent": 32, "threads": None, "cores": None, "memory_bytes": None,
    "cache_bytes": None, "devices": None, "priority": 0, "keep_requests": False, "keep_previous": None,
    "state": "ready", "target": "serve-model", "model": "", "kind": "generator", "reason": "",
}  # fmt: skip


def test_options_that_an_endpoint_does_not_take_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    say_what_stays(_RECORD, {"replicas": 1, "dtype": None, "cluster": "x", "tokenizer": "t"})
    assert not capsys.readouterr().out
    say_what_stays(_RECORD, {"replicas": 2, "memory": "1GiB"})
    assert "--replicas is 1, --memory is not set" in capsys.readouterr().out


def test_a_variable_that_is_served_anew_says_which_options_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_Server, "endpoint", lambda self, name: _RECORD)
    monkeypatch.setattr(_Server, "openai_url", "http://127.0.0.1:1/v1", raising=False)
    monkeypatch.setattr(_Server, "update_endpoint", lambda self, name, run: _RECORD, raising=False)
    monkeypatch.setattr(serve_variable, "wait_for_revision", lambda server, record, progress: record)
    serve_variable._serve_saved("model", "r-1", "m", pytest.fail, None, {"replicas": 2})
    assert "m was served already, and stays as it is: --replicas is 1" in capsys.readouterr().out
