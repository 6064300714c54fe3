"""Functions of other packages are replaced by record: checked first, alike in looks, put back as they were."""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.system import patching
from jupyter_llmcloud.system.patching import Patch

PACKAGE = Path(patching.__file__).parents[1]
# State of the process and of objects that are ours to set, not functions of another package.
STATE = {
    "sys.argv",
    "sys.stdout",
    "sys.stderr",
    "os.environ",
    "tempfile.tempdir",  # documented as settable
    "c10d._world.group_count",
    "builtins.LOOP_FUNCTION",
    "builtins.WHILE_FUNCTION",
    "module.name",  # variables of the user's modules, put back by a resume
    "settings.name",  # of the process: put back after a fresh cell
}


@pytest.fixture
def library() -> Iterator[Any]:
    """A module of somebody else's."""
    module: Any = types.ModuleType("somebodys_library")

    def train(model: Any, epochs: int = 3) -> str:
        """Trains."""
        return f"{model} for {epochs}"

    module.train = train
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]
    patching.take_notices()


def patch(*parameters: str, target: str = "somebodys_library:train") -> Patch:
    return Patch("Watching", "there is no hook", "Training works.", "version 1", {target: parameters})


def loudly(original: Any) -> Any:
    def function(*args: Any, **kwargs: Any) -> str:
        return str(original(*args, **kwargs)) + "!"

    return function


def test_what_is_checked_once_is_not_looked_at_again(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watching, missing = patch("model"), patch(target="nobodys_library:train")
    for one in watching, missing:
        one.check_once()
    monkeypatch.setattr(inspect, "signature", lambda _: pytest.fail("looked at again"))
    assert watching.problem() is None
    assert missing.problem() is not None


def test_nothing_is_read_of_a_built_in_function_which_would_touch_every_module(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.train = len
    asking = Patch("Asking", "there is no hook", "Training works.", "version 1", {"somebodys_library:train": None})
    with monkeypatch.context() as patched:
        patched.setattr(inspect, "signature", lambda _: pytest.fail("copies sys.modules"))
        assert asking.apply({"somebodys_library:train": lambda _: lambda *_: 0})
    assert library.train("abc") == 0
    assert [*inspect.signature(library.train).parameters] == ["obj"]
    asking.undo()


def test_a_replacement_looks_like_its_original_and_is_undone(library: Any) -> None:
    before, watching = library.train, patch("model")
    assert watching.apply({"somebodys_library:train": loudly})
    assert library.train("net") == "net for 3!"
    assert patching.applied() == ["somebodys_library:train"]
    assert library.train is not before and watching.original("somebodys_library:train") is before
    assert (library.train.__name__, library.train.__doc__) == ("train", "Trains.")
    assert list(inspect.signature(library.train).parameters) == ["model", "epochs"]
    assert inspect.getfullargspec(library.train).args == ["model", "epochs"]
    watching.undo()
    assert library.train is before and patching.applied() == []
    watching.undo()
    assert watching.apply({"somebodys_library:train": loudly})
    watching.undo()


def test_a_function_with_other_parameters_stays_and_one_notice_says_so(library: Any) -> None:
    before, watching = library.train, patch("network", "epochs")
    assert not watching.apply({"somebodys_library:train": loudly})
    assert not watching.apply({"somebodys_library:train": loudly})
    assert library.train is before
    (notice,) = patching.take_notices()
    assert "takes (model, epochs) instead of (network, epochs)" in notice
    assert notice.startswith("Watching is off: ") and notice.endswith("Training works.")
    assert patching.take_notices() == []


def test_a_parameter_may_have_one_name_in_one_version_and_another_in_the_next(library: Any) -> None:
    assert patch("net|model", "epochs").problem() is None
    problem = patch("net|network", "epochs").problem()
    assert problem is not None and "instead of (net or network, epochs)" in problem
    assert "takes (model, epochs)" in (patch("model", "epochs", "lr").problem() or "")


@pytest.mark.parametrize("target", ["somebodys_library:fit", "somebodys_library.gone:train", "no_such_library:train"])
def test_a_target_that_is_gone_is_named(library: Any, target: str) -> None:
    problem = patch(target=target).problem()
    assert problem is not None and f"there is no {target.replace(':', '.')}" in problem


def test_of_several_targets_none_is_replaced_when_one_does_not_fit(library: Any) -> None:
    library.test = library.train
    both = Patch("Both", "", "", "", {"somebodys_library:train": ("model",), "somebodys_library:test": ("data",)})
    before = library.train
    assert not both.apply(dict.fromkeys(both.targets, loudly))
    assert library.train is before


def test_a_patch_refuses_targets_that_are_not_its_own(library: Any) -> None:
    with pytest.raises(ValueError, match="somebodys_library:other"):
        patch("model").apply({"somebodys_library:other": loudly})


def test_a_module_that_was_not_there_is_gone_again_after_undo(library: Any) -> None:
    module = types.ModuleType("somebodys_library.notebook")
    whole = Patch("Text bars", "", "", "", {"somebodys_library.notebook": None})
    assert whole.apply({"somebodys_library.notebook": lambda _: module})
    assert sys.modules["somebodys_library.notebook"] is library.notebook is module
    whole.undo()
    assert "somebodys_library.notebook" not in sys.modules and not hasattr(library, "notebook")


# --- nothing is replaced without a record ----------------------------------------------------------------------------


def foreign_names(tree: ast.Module) -> set[str]:
    """Names in a module of ours that stand for something of another package."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names if not _is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom) and not _is_ours(node.module or "") and node.level == 0:
            names |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):  # `loader: Any = SourceFileLoader`
        value, targets = getattr(node, "value", None), getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Name) and value.id in names:
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == "jupyter_llmcloud"


def replacements(source: str) -> list[str]:
    """What a module of ours sets on modules and classes of others."""
    tree = ast.parse(source)
    names, found = foreign_names(tree), []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in [part for one in targets for part in (one.elts if isinstance(one, ast.Tuple) else [one])]:
            root: ast.AST = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in names:
                found.append(ast.unparse(target))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            first = ast.unparse(node.args[0])
            if first.split(".")[0] in names or first in ("owner", "module"):
                found.append(f"{first}.{ast.unparse(node.args[1])}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.autograd.backward = f",
        "from torch.utils.data import DataLoader\ndef install():\n    DataLoader.__iter__ = f",
        "from importlib.machinery import SourceFileLoader\nloader: Any = SourceFileLoader\nloader.get_code = f",
        "import torch\nsetattr(torch.nn.Module, name, f)",
        "import torch\ntorch.no_grad.__enter__, torch.no_grad.__exit__ = f, g",
    ],
)
def test_every_way_to_replace_a_function_is_seen(source: str) -> None:
    assert replacements(source)


# A dry run and a rehearsal measure in a process of their own that is thrown away: no run is ever in it.
THROWN_AWAY = PACKAGE / "training" / "preflight"


def test_no_module_of_ours_replaces_anything_but_by_a_patch() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), what)
        for path in PACKAGE.rglob("*.py")
        if path != Path(patching.__file__)
        if not path.is_relative_to(THROWN_AWAY)
        for what in replacements(path.read_text(encoding="utf-8"))
        if what not in STATE
    }
    assert found == set()


def test_what_wraps_a_builtin_without_a_signature_is_replaced_in_a_fork_as_elsewhere(library: Any) -> None:
    """As `warnings.warn` of Python 3.12 is, which others wrap."""

    class Odd:
        def __call__(self) -> None: ...

        @property
        def __signature__(self) -> Any:
            raise ValueError("builtin has invalid signature")

    library.train.__wrapped__ = Odd()
    talking = Patch("Talking", "there is no hook", "Training works.", "version 1", {"somebodys_library:train": None})
    talking.check_once()
    assert talking.apply({"somebodys_library:train": loudly})
    assert library.train("gpt") == "gpt for 3!"
    talking.undo()


def test_a_fork_takes_signatures_from_the_process_that_checked(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = patch("model")
    watching.check_once()
    wanted = inspect.signature(library.train)
    with monkeypatch.context() as patched:
        patched.setattr(inspect, "signature", lambda _: pytest.fail("read again"))
        watching.apply({"somebodys_library:train": loudly})
    assert library.train.__signature__ == wanted
    watching.undo()
