"""The house is in order: what an import costs, who imports whom, what lies where, what the documents say."""

from __future__ import annotations

import json
import os
import pwd
import re
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from jupyter_llmcloud.magics import extension
from jupyter_llmcloud.magics.commands import endpoints
from tests.compat import core

REPOSITORY = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    *("pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
    *("jupyter_llmcloud", "notebooks", "labextension", "tests"),
}
HEAVY = (
    "torch",
    "accelerate",
    "transformers",
    "dask",
    "distributed",
    "tornado",
    "IPython",
    "ipywidgets",
    "aiohttp",
)
IMPORT = """
import json, sys, time
begin = time.perf_counter()
import jupyter_llmcloud
print(json.dumps([time.perf_counter() - begin, sorted(sys.modules)]))
"""


def fresh_import() -> tuple[float, set[str]]:
    """How long the import takes in a fresh Python, and which modules are there then."""
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, set(modules)


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    """The files that are, or are about to be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("this is not a git checkout")
    return [REPOSITORY / name for name in done.stdout.splitlines() if (REPOSITORY / name).is_file()]


def make_targets() -> set[str]:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):.*## ", text, re.MULTILINE)) - {"help"}


@pytest.mark.alone
def test_importing_the_package_costs_less_than_150_ms() -> None:
    assert statistics.median(fresh_import()[0] for _ in range(5)) < 0.150


def test_importing_the_package_pulls_in_nothing_heavy() -> None:
    assert fresh_import()[1].isdisjoint(HEAVY)


def test_the_import_rules_hold() -> None:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_top_level_holds_only_what_belongs_there(committed: list[Path]) -> None:
    names = {path.relative_to(REPOSITORY).parts[0] for path in committed}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_no_committed_file_names_a_path_of_this_machine(committed: list[Path]) -> None:
    home = pwd.getpwuid(os.getuid()).pw_dir  # the tests themselves have another HOME
    everywhere = {"/", tempfile.gettempdir()}
    own = [f"{folder}/" for folder in map(str, (REPOSITORY, REPOSITORY.parent, home)) if folder not in everywhere]
    texts = {path: path.read_bytes().decode("utf-8", "replace") for path in committed}
    assert [path for path, text in texts.items() if any(folder in text for folder in own)] == []


def test_the_lock_and_the_constraints_hold_no_addresses() -> None:
    for name in ("labextension/yarn.lock", ".ci/constraints.txt"):
        assert "://" not in (REPOSITORY / name).read_text(encoding="utf-8"), name


def test_one_version_is_told_everywhere() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    front_end = json.loads((REPOSITORY / "labextension/package.json").read_text(encoding="utf-8"))
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert front_end["version"] == project["version"]
    assert front_end["name"] == project["name"]
    assert f"## [{project['version']}]" in changes


@pytest.mark.parametrize("target", sorted(make_targets()))
def test_every_make_target_is_explained_in_the_documents(target: str) -> None:
    documents = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    assert any(f"`make {target}`" in text or f"make {target}\n" in text for text in documents)


def test_every_magic_and_its_verbs_are_in_the_readme() -> None:
    rows = re.findall(r"^\| `%.*$", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: row for row in rows for name in re.findall(r"`(%+\w+)", row)}
    verbs = {**extension.VERBS, "%endpoints": endpoints.VERBS, "%serve": {}}
    missing = [f"{name} {verb}" for name in verbs for verb in verbs[name] if f"`{verb}" not in told.get(name, "")]
    missing += [name for name in (*extension.SINGLE, *verbs) if name not in told]
    assert missing == []


def test_the_limits_and_lifetimes_of_the_readme_are_those_of_the_code() -> None:
    from jupyter_llmcloud.core.output.folding import MAX_CHARS
    from jupyter_llmcloud.inference.openai.chat import template_process
    from jupyter_llmcloud.magics.session.world_client import WORLD_LEASE_S
    from jupyter_llmcloud.protocol.openai import fields
    from jupyter_llmcloud.server import cluster_access
    from jupyter_llmcloud.server.api import base, keys
    from jupyter_llmcloud.server.gateway import admission, handlers

    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for told in (
        f"embeddings {handlers.MAX_EMBEDDED >> 20} MiB, others {base.MAX_BODY >> 20} MiB; {fields.MAX_CHOICES} choices; {fields.MAX_STOPS} stop strings",
        f"{admission.MAX_QUEUED_PER_REPLICA} more requests may wait, {admission.QUEUE_TIMEOUT_S:.0f} seconds",
        f"{template_process.CPU_S} seconds of processor time, {template_process.MAX_MEMORY >> 20} MiB, "
        f"{template_process.MAX_TEXT >> 20} MiB of text",
        f"{handlers.SLOW_READER_S:.0f} seconds without reading",
        f"up to {WORLD_LEASE_S / 60:.0f} minutes while it is idle",
        f"up to {cluster_access.CLUSTER_LEASE_S / 60:.0f} minutes longer",
        f"{keys.DEFAULT_EXPIRY_S / 86400:.0f} days, or `--expires`",
    ):
        assert told in text, told
    assert MAX_CHARS <= 200_000


def test_every_kind_of_cluster_of_the_readme_is_one() -> None:
    from jupyter_llmcloud.cluster.factory import KINDS

    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^%cluster start (\w+)", text, re.MULTILINE)) | {"pbs", "lsf", "sge", "htcondor", "oar"}
    configured = set(re.findall(r"^  clusters:\n    (\w+):", text, re.MULTILINE))
    assert configured == {"gpus"}
    assert told <= {*KINDS, *configured}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "jupyter_llmcloud/README.md"])
def test_every_file_a_document_points_to_is_there(name: str) -> None:
    document = REPOSITORY / name
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "jupyter_llmcloud/README.md"])
def test_every_row_of_a_table_has_as_many_cells_as_its_head(name: str) -> None:
    """`--replicas K|MIN:MAX` was two cells, and what it does was in none."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, *rows = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert rows == [head] * len(rows), table


def test_every_folder_of_a_package_is_in_the_table_of_the_architecture_page() -> None:
    text = (REPOSITORY / "jupyter_llmcloud/README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)\|$", text, re.MULTILINE))
    modules = (REPOSITORY / "jupyter_llmcloud").glob("*/*/__init__.py")
    missing = [
        f"{package.name}/{folder.name}"
        for folder, package in ((module.parent, module.parents[1]) for module in modules)
        if f"`{folder.name}`" not in rows.get(package.name, "")
    ]
    assert missing == []


def test_every_path_that_a_document_names_in_passing_is_there() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w.]+/)+[\w.-]*)`", text)) - {"test-output/failed/"}
    roots = [REPOSITORY / folder for folder in ("", "jupyter_llmcloud", "labextension", "labextension/src/shared")]
    assert {"labextension/src/shared/", "protocol/rpc"} <= named
    assert [name for name in sorted(named) if not any(_is_there(root / name) for root in roots)] == []


def _is_there(path: Path) -> bool:
    return path.exists() or path.with_suffix(".py").exists()


def test_the_core_of_compat_names_tests_that_there_are() -> None:
    for name, words in core.CORE.items():
        (module,) = (REPOSITORY / "tests").rglob(f"{name}.py")
        tests = re.findall(r"^(?:async )?def (test_\w+)", module.read_text(encoding="utf-8"), re.MULTILINE)
        assert any(words in test for test in tests), name
