"""The forms of clusters: kinds, their options, and what an administrator declares."""

from __future__ import annotations

from typing import Any

import dask
import pytest

from jupyter_llmcloud.cluster.factory import known_kinds, make_cluster
from jupyter_llmcloud.cluster.kinds.describe import describe_kinds
from jupyter_llmcloud.errors import UsageError


def kind(name: str) -> dict[str, Any]:
    """What is told of one kind."""
    return next(row for row in describe_kinds() if row["kind"] == name)


def options(name: str) -> dict[str, dict[str, Any]]:
    """Its options by name."""
    return {row["name"]: row for row in kind(name)["options"]}


def test_every_kind_is_told_and_one_that_is_not_installed_says_which_package_it_needs() -> None:
    rows = describe_kinds()
    assert [row["kind"] for row in rows] == known_kinds()
    cuda = kind("cuda")
    assert cuda["options"] or "pip install dask-cuda" in cuda["problem"]


def test_the_options_of_a_local_cluster_have_the_defaults_that_it_starts_with() -> None:
    found = options("local")
    assert found["slots"]["type"] == "integer" and found["slots"]["default"] == 1
    assert found["dashboard_address"]["default"] == "127.0.0.1:0"
    assert "n_workers" not in found and "security" not in found


def test_types_and_help_come_from_the_signature_and_the_docstring() -> None:
    found = options("ssh")
    assert found["hosts"]["type"] == "list" and found["worker_options"]["type"] == "object"
    assert found["remote_python"]["help"] == "Path to Python on remote nodes."


def test_an_administrator_declares_what_is_asked_for() -> None:
    declared = {
        "factory": "distributed:LocalCluster",
        "options": {"interface": "lo"},
        "title": "Big",
        "form": {"interface": {"choices": ["lo", "eth0"], "help": "Which network."}, "scheduler_port": {"default": 0}},
    }
    with dask.config.set({"llmcloud.clusters": {"big": declared}}):
        told, found = kind("big"), options("big")
    assert told["title"] == "Big" and list(found) == ["interface", "scheduler_port"]
    assert found["interface"] == {
        "name": "interface", "type": "choice", "default": "lo", "help": "Which network.", "choices": ["lo", "eth0"],
    }  # fmt: skip
    assert found["scheduler_port"]["type"] == "integer"


def test_a_kind_whose_class_is_not_there_is_told_with_its_problem() -> None:
    with dask.config.set({"llmcloud.clusters": {"odd": {"factory": "distributed:NoSuchCluster"}}}):
        assert "NoSuchCluster" in kind("odd")["problem"]


def test_a_cluster_over_ssh_without_hosts_says_how_they_are_given() -> None:
    with pytest.raises(UsageError, match=r"""hosts='\["head", "node1", "node2"\]'"""):
        make_cluster("ssh", None, {"hosts": []}, None)
