"""The commit that a run's folder was at, read from the files of git."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupyter_llmcloud.agent.runs.git_state import git_state

COMMIT = "a" * 40


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A work tree on the branch topic/x, and a folder in it."""
    git = tmp_path / "tree" / ".git"
    (git / "refs" / "heads" / "topic").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/topic/x\n", encoding="utf-8")
    (tmp_path / "tree" / "notebooks").mkdir()
    return tmp_path / "tree"


def test_a_branch_is_read_from_its_file_and_from_the_packed_ones(tree: Path) -> None:
    packed = tree / ".git" / "packed-refs"
    packed.write_text(f"# pack-refs\n{'b' * 40} refs/heads/y\n{COMMIT} refs/heads/topic/x\n", encoding="utf-8")
    expected = {"commit": COMMIT, "branch": "topic/x", "folder": str(tree)}
    assert git_state(str(tree / "notebooks")) == expected
    (tree / ".git" / "refs" / "heads" / "topic" / "x").write_text("c" * 40 + "\n", encoding="utf-8")
    assert git_state(str(tree))["commit"] == "c" * 40


def test_a_commit_without_a_branch_and_a_further_work_tree_are_read(tree: Path, tmp_path: Path) -> None:
    own = tree / ".git" / "worktrees" / "w"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/topic/x", encoding="utf-8")
    (own / "commondir").write_text("../..", encoding="utf-8")
    (tree / ".git" / "refs" / "heads" / "topic" / "x").write_text(COMMIT, encoding="utf-8")
    further = tmp_path / "further"
    further.mkdir()
    (further / ".git").write_text(f"gitdir: {own}\n", encoding="utf-8")
    assert git_state(str(further)) == {"commit": COMMIT, "branch": "topic/x", "folder": str(further)}
    (tree / ".git" / "HEAD").write_text(COMMIT, encoding="utf-8")
    assert git_state(str(tree)) == {"commit": COMMIT, "branch": "", "folder": str(tree)}


def test_a_folder_that_git_does_not_know_has_no_state(tmp_path: Path) -> None:
    assert git_state("") == {}
    (tmp_path / ".git").mkdir()  # not even a HEAD
    assert git_state(str(tmp_path)) == {}


def test_what_was_read_is_read_again_when_it_has_changed(tree: Path) -> None:
    branch, notebooks = tree / ".git" / "refs" / "heads" / "topic" / "x", str(tree / "notebooks")
    assert git_state(notebooks)["commit"] == ""
    branch.write_text(COMMIT, encoding="utf-8")
    assert git_state(notebooks)["commit"] == git_state(notebooks)["commit"] == COMMIT
    (tree / "new").write_text("d" * 40, encoding="utf-8")
    (tree / "new").replace(branch)  # as git writes it
    assert git_state(notebooks)["commit"] == "d" * 40
    (tree / ".git" / "HEAD").write_text("ref: refs/heads/main\n", encoding="utf-8")
    assert git_state(notebooks) == {"commit": "", "branch": "main", "folder": str(tree)}
    (tree / "notebooks" / ".git").mkdir()
    (tree / "notebooks" / ".git" / "HEAD").write_text("e" * 40, encoding="utf-8")
    assert git_state(notebooks)["commit"] == "e" * 40
