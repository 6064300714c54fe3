"""What goes along when a run becomes a script, and what is refused: by values."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from jupyter_llmcloud.core.export.cells import SourceCell, needed_cells
from jupyter_llmcloud.core.export.literals import literal
from jupyter_llmcloud.core.export.names_used import names_used
from jupyter_llmcloud.core.export.own_calls import plain_code
from jupyter_llmcloud.core.export.plans import check_options
from jupyter_llmcloud.core.export.script import ExportedRun, export, source_for_ranks
from jupyter_llmcloud.errors import UsageError


@pytest.mark.parametrize(
    ("code", "needed", "bound"),
    [
        ("model = wrap(model)", {"wrap", "model"}, {"model"}),
        ("def f(x):\n    y = x + z\n    return g(y)\ndef g(a): return a", {"z"}, {"f", "g"}),
        ("for batch in loader:\n    loss = model(batch)\nprint(loss)", {"loader", "model"}, {"batch", "loss"}),
        ("try:\n    model\nexcept NameError:\n    model = make()", {"make"}, {"model"}),
        ("class A(B):\n    x = c\n    def f(self): return d + self.x", {"B", "c", "d"}, {"A"}),
        ("import torch.nn as nn\nnn.Linear([q for q in range(n)])", {"n"}, {"nn"}),
        ("step += 1\nif a:\n    u = 1\nelse:\n    u = 2\nu", {"step", "a"}, {"step", "u"}),
        ("with open(p) as f, g as (a, b):\n    a(f)", {"p", "g"}, {"f", "a", "b"}),
        ("def count():\n    global total\n    total = start", {"start"}, {"count", "total"}),
        ("(n := 3); f = lambda x, y=m: x + y + n + k", {"m", "k"}, {"n", "f"}),
        ("x: int = 3\ndel x\nx", set(), {"x"}),
        ("best = {k: max(v, key=lambda t: t[k] + w) for k, v in d.items()}", {"d", "w"}, {"best"}),
        ("sets = [data.map(lambda row: row[c]) for c in columns]", {"data", "columns"}, {"sets"}),
        ("add = lambda x: lambda y, z=x: x + y + z + k", {"k"}, {"add"}),
        ("f = lambda rows: [sorted(row, key=lambda q: q + s + len(rows)) for row in rows]", {"s"}, {"f"}),
        ("def f(x):\n    return [sorted(x, key=lambda t: t * i * m) for i in x]", {"m"}, {"f"}),
    ],
)
def test_a_text_tells_what_it_needs_and_what_it_makes(code: str, needed: set[str], bound: set[str]) -> None:
    used = names_used(ast.parse(code))
    assert (used.needed, used.bound) == (needed, bound)


class TypeVar(ast.AST):
    """As Python 3.12 has it in its syntax, where `type_params` of a definition are such."""

    _fields = ("name", "bound")


class TypeAlias(ast.stmt):
    """As Python 3.12 has it."""

    _fields = ("name", "type_params", "value")


def typed(code: str, **bounds: str) -> ast.Module:
    """The syntax of a definition with these parameters in brackets: `T` for `T`, `T="B"` for `T: B`."""
    tree = ast.parse(code)
    parameters = [
        TypeVar(name=name, bound=ast.parse(bound, mode="eval").body if bound else None)
        for name, bound in bounds.items()
    ]
    tree.body[0].type_params = parameters  # type: ignore[attr-defined]
    return tree


def alias(name: str, value: str, **bounds: str) -> ast.Module:
    """`type name[...] = value`."""
    tree = typed(f"{name} = {value}", **bounds)
    [node] = tree.body
    assert isinstance(node, ast.Assign)
    tree.body = [TypeAlias(name=node.targets[0], type_params=node.type_params, value=node.value)]  # type: ignore[attr-defined]
    return tree


TYPED = {
    "function": (typed("def f(x: T) -> list[T]:\n    return [T, x, a]", T=""), {"a"}, {"f"}),
    "bound": (typed("def f(x: T = d): return x", T="B"), {"B", "d"}, {"f"}),
    "class": (typed("class Box(Base[T]):\n    def get(self) -> T: return T, z", T=""), {"Base", "z"}, {"Box"}),
    "alias": (alias("Pair", "tuple[A, A, Late]", A=""), {"Late"}, {"Pair"}),
    "after": (ast.Module([*typed("def f(x: T): pass", T="").body, *ast.parse("T").body], []), {"T"}, {"f"}),
}


@pytest.mark.parametrize(("tree", "needed", "bound"), TYPED.values(), ids=list(TYPED))
def test_parameters_in_brackets_are_names_of_their_definition_alone(
    tree: ast.Module, needed: set[str], bound: set[str]
) -> None:
    used = names_used(tree)
    assert (used.needed, used.bound) == (needed, bound)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="its syntax")
def test_syntax_of_python_312_is_exported() -> None:
    box = SourceCell("box", "type Row[T] = list[T]\nclass Box[T]:\n    def get[S: int](self, x: S) -> T | S: return x")
    parts, notes = needed_cells(SourceCell("last", "x: Row[int] = [Box().get(3)]"), [box])
    assert [part.cell.run_id for part in parts] == ["box", "last"] and not notes


def test_what_a_newer_python_reads_is_refused_with_the_version_that_looks_at_it() -> None:
    with pytest.raises(UsageError, match=rf"line 1, 'class \$', is no Python that version 3\.{sys.version_info[1]}, "):
        needed_cells(SourceCell("last", "class $"), [])


def test_cells_go_along_that_may_matter_and_definitions_that_are_needed() -> None:
    earlier = [
        SourceCell("imports", "import torch\nWIDTH = 3"),
        SourceCell("unused", "def unused():\n    return 1"),
        SourceCell("shows", "print(WIDTH)"),
        SourceCell("seeds", "torch.manual_seed(3)"),
        SourceCell("makes", "model = torch.nn.Linear(WIDTH, 1)"),
        SourceCell("trains", "for step in range(3):\n    model(torch.ones(WIDTH)).sum().backward()"),
    ]
    parts, notes = needed_cells(SourceCell("last", "print(model.weight.grad)"), earlier)
    assert [part.cell.run_id for part in parts] == ["imports", "seeds", "makes", "trains", "last"] and not notes


def test_pushed_values_are_set_before_the_cell_that_found_them() -> None:
    earlier = [SourceCell("a", "lr = 1"), SourceCell("b", "x = 5", pushed={"lr": "0.5", "other": ""})]
    parts, _ = needed_cells(SourceCell("last", "y = lr", pushed={"n": "2"}), earlier)
    assert [(part.cell.run_id, part.assigned) for part in parts] == [("b", (("lr", "0.5"),)), ("last", ())]


@pytest.mark.parametrize(
    ("last", "earlier", "words"),
    [
        (SourceCell("l", "use(vocab)"), [], "needs 'use' (and 1 more: vocab)"),
        (SourceCell("l", "print(vocab)", pushed={"vocab": ""}), [], "'vocab' was pushed from the notebook"),
        (SourceCell("l", "print(m)"), [SourceCell("e", "m = make()", "stopped")], "run e, which was stopped"),
        (SourceCell("l", "print(m)"), [SourceCell("e", "m = [1, f()]", on_all_ranks=False)], "on some ranks only"),
        (SourceCell("l", "x", num_ranks=1), [SourceCell("e", "x = f()", num_ranks=2)], "resized to 1"),
        (SourceCell("l", "x = 1\nfiles = !ls"), [], "line 2, 'files = !ls', is a magic"),
        (SourceCell("l", "%%bash\nls"), [], "line 1, '%%bash', is a magic"),
        (SourceCell("l", "!pip list"), [], "a magic or a command of the shell"),
    ],
)
def test_what_cannot_go_along_is_named(last: SourceCell, earlier: list[SourceCell], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        needed_cells(last, earlier)
    assert words in str(refused.value)


LATE = "def make():\n    return build(width, lr)"


@pytest.mark.parametrize("last", ["print(make())", "torch.manual_seed(1)\nprint(make())"], ids=["exact", "seeds"])
def test_what_a_function_reads_is_what_cells_after_its_own_have_bound(last: str) -> None:
    earlier = [
        SourceCell("old", "width = 8"),
        SourceCell("defines", LATE + "\ndef build(*of): return of", pushed={"lr": "1"}),
        SourceCell("imports", "import torch"),
        SourceCell("new", "width = 16"),
        SourceCell("other", "height = 3"),
    ]
    parts, _ = needed_cells(SourceCell("last", last, pushed={"lr": "2"}), earlier)
    kept = [part.cell.run_id for part in parts if part.cell.run_id != "imports"]
    assert kept == ["defines", "new", "last"] and parts[-1].assigned == (("lr", "2"),)
    parts, _ = needed_cells(SourceCell("last", last, pushed={"lr": "2"}), earlier[1:])
    assert "new" in [part.cell.run_id for part in parts], "also where there was none before"


def test_a_function_may_read_what_the_last_cell_binds() -> None:
    earlier = [SourceCell("trains", "model = load()"), SourceCell("defines", "def evaluate():\n    return model(3)")]
    parts, _ = needed_cells(SourceCell("last", "import torch\ntorch.manual_seed(0)\nmodel = abs\nevaluate()"), earlier)
    assert [part.cell.run_id for part in parts] == ["defines", "last"]


def test_a_function_that_was_defined_anew_needs_nothing_of_its_first_form() -> None:
    earlier = [
        SourceCell("typo", "def assist():\n    return lenn"),
        SourceCell("again", "def assist():\n    return len"),
    ]
    last = SourceCell("last", "main()")
    parts, _ = needed_cells(last, [SourceCell("main", "def main():\n    assist()"), *earlier])
    assert [part.cell.run_id for part in parts] == ["main", "again", "last"]
    parts, _ = needed_cells(last, [earlier[0], SourceCell("main", "def main():\n    assist()"), earlier[1]])
    assert [part.cell.run_id for part in parts] == ["main", "again", "last"]


def test_what_is_changed_after_a_function_that_reads_it_goes_along() -> None:
    earlier = [
        SourceCell("config", "import types\ncfg = types.SimpleNamespace(width=8)"),
        SourceCell("defines", "def make():\n    return cfg.width"),
        SourceCell("changes", "cfg.width = 16"),
    ]
    parts, notes = needed_cells(SourceCell("last", "print(make())", spec={"seed": 1}), earlier)
    assert [part.cell.run_id for part in parts] == ["config", "defines", "changes", "last"] and not notes


@pytest.mark.parametrize("last", ["print(rank)", "torch.manual_seed(1)\nprint(rank)"], ids=["exact", "seeds"])
def test_a_name_that_ranks_are_given_is_that_of_the_cell_which_bound_it(last: str) -> None:
    earlier = [
        SourceCell("own", "rank = 8"),
        SourceCell("imports", "import torch"),
        SourceCell("other", "y = [device]"),
    ]
    parts, _ = needed_cells(SourceCell("last", last), earlier)
    assert "own" in [part.cell.run_id for part in parts]
    parts, _ = needed_cells(SourceCell("last", last, pushed={"rank": "4", "device": ""}), earlier)
    assert parts[-1].assigned == (("rank", "4"),) and "own" not in [part.cell.run_id for part in parts]


def test_a_name_of_pythons_own_that_a_cell_has_bound_is_that_cells() -> None:
    earlier = [SourceCell("makes", "input = make = max = dict"), SourceCell("defines", "def show():\n    print(max)")]
    parts, _ = needed_cells(SourceCell("last", "show()", spec={"seed": 1}), earlier)
    assert [part.cell.run_id for part in parts] == ["makes", "defines", "last"]
    parts, _ = needed_cells(SourceCell("last", "for input in [1]:\n    print(input)"), earlier)
    assert [part.cell.run_id for part in parts] == ["last"]


def test_commands_of_earlier_cells_are_left_out_and_said() -> None:
    earlier = [SourceCell("looks", "!ls\n%matplotlib inline"), SourceCell("makes", "%time\nmodel = f()\nf = 2")]
    parts, notes = needed_cells(
        SourceCell("last", "f = print\nprint(model)"), [SourceCell("f", "f = g = dict"), *earlier]
    )
    assert [part.cell.code for part in parts] == ["f = g = dict", "pass\nmodel = f()\nf = 2", "f = print\nprint(model)"]
    assert notes == [
        "Left out: '%time' of run makes.",
        "Left out: '!ls' of run looks.",
        "Left out: '%matplotlib inline' of run looks.",
    ]
    timed, other = SourceCell("timed", "%%time\nmodel = 3"), SourceCell("other", "%%bash\necho $HOME")
    parts, notes = needed_cells(SourceCell("last", "print(model)"), [timed, other])
    assert [part.cell.run_id for part in parts] == ["timed", "last"]
    assert notes == ["Left out: '%%bash' of run other.", "Left out: '%%time' of run timed."]
    with pytest.raises(UsageError, match="is a magic or a command of the shell"):
        needed_cells(SourceCell("last", "print(files)"), [SourceCell("lists", "files = !ls")])


def test_what_a_notebook_alone_understands_is_left_out_of_the_cell_itself_too() -> None:
    code = "%%time\nif rank == 0:\n    %matplotlib inline\n    !nvidia-smi\n%time model = make()\nmodel"
    parts, notes = needed_cells(SourceCell("last", code), [SourceCell("makes", "def make(): return 1")])
    assert parts[-1].cell.code == "pass\nif rank == 0:\n    pass\n    pass\nmodel = make()\nmodel"
    assert [note.split("'")[1] for note in notes] == ["%%time", "%matplotlib inline", "!nvidia-smi", "%time"]


def test_a_cell_that_was_timed_by_many_runs_has_bound_nothing() -> None:
    earlier = [SourceCell("makes", "x = make = dict"), SourceCell("timed", "%%timeit\nx = 3")]
    parts, notes = needed_cells(SourceCell("last", "print(x)"), earlier)
    assert [part.cell.run_id for part in parts] == ["makes", "last"]
    assert notes == ["Left out: '%%timeit' of run timed."]


def test_a_cell_that_has_not_run_yet_finds_what_any_number_of_ranks_has_made() -> None:
    ran = SourceCell("trains", "model = f()", num_ranks=2)
    parts, _ = needed_cells(SourceCell("last", "print(model)"), [SourceCell("f", "f = dict", num_ranks=2), ran])
    assert [part.cell.run_id for part in parts] == ["f", "trains", "last"]


def test_a_training_that_has_nothing_to_do_with_a_cell_that_seeds_or_is_only_tried_stays_out() -> None:
    trains = "import torch\ndef main():\n    torch.rand(1)\nfor epoch in range(2):\n    main()"
    earlier = [
        SourceCell("sets", "import torch\ntorch.set_default_dtype(torch.bfloat16)"),
        SourceCell("trains", trains, spec={"accelerate_config": "{}"}),
        SourceCell("goes on", "main()"),
        SourceCell("makes", "model = [1, print()]"),
        SourceCell("changes", "for part in model:\n    print(part)"),
    ]
    last = SourceCell("last", trains.replace("torch.rand(1)", "model.clear()"))
    parts, _ = needed_cells(last, earlier, is_exact=False)
    assert [part.cell.run_id for part in parts] == ["sets", "makes", "changes", "last"]
    assert len(needed_cells(last, earlier)[0]) == 6
    parts, notes = needed_cells(replace(last, code=f"import torch\ntorch.manual_seed(1)\n{last.code}"), earlier)
    assert [part.cell.run_id for part in parts] == ["sets", "makes", "changes", "last"]
    assert notes[:-1] == [
        f"Left out: run {run}, which makes and reads nothing that is needed here." for run in ("goes on", "trains")
    ]
    assert notes[-1] == "What the cell draws at random before it seeds itself is another draw without these."


def test_a_cell_that_failed_is_left_out_and_said() -> None:
    earlier = [SourceCell("makes", "model = dict(a=1)"), SourceCell("typo", "model.trian(1)", "failed")]
    parts, notes = needed_cells(SourceCell("last", "print(model)"), earlier)
    assert [part.cell.run_id for part in parts] == ["makes", "last"]
    assert notes == ["Left out: run typo, which failed. It read model: what it changed of them is missing here."]


@pytest.mark.parametrize(
    ("code", "plain"),
    [
        ("import jupyter_llmcloud as lc\nlc.run.log(loss=1)", "pass\nrun.log(loss=1)"),
        ("import os, jupyter_llmcloud\njupyter_llmcloud.run.steps(3)", "import os\nrun.steps(3)"),
        ("from jupyter_llmcloud import run as r\nr.log(ä=1)", "r = run\nr.log(ä=1)"),
        ("'ä'; from __future__ import annotations", "'ä'; pass"),
    ],
)
def test_uses_of_this_package_are_replaced(code: str, plain: str) -> None:
    assert plain_code(SourceCell("r", code))[0] == plain


@pytest.mark.parametrize(
    "text",
    [
        "f'lc.run.rank {lc.run.rank:{lc.run.world_size}d}', lc.run.id",
        'f"""\n{lc.run.rank}\n{3}""" "a", lc.run.id',
        "f'{f\"{lc.run.rank}\"}', f'lc.run.id', lc.run.id",
        "'lc.run.rank' f' lc.run.rank={lc.run.rank!r}', lc.run.id",
    ],
)
def test_uses_of_this_package_within_a_text_are_replaced_at_their_places(text: str) -> None:
    run = SimpleNamespace(rank=7, world_size=3, id="r")
    code, _ = plain_code(SourceCell("r", f"import jupyter_llmcloud as lc\nfound = {text}"))
    made: dict[str, object] = {"run": run}
    exec(code, made)
    assert made["found"] == eval(text, {"lc": SimpleNamespace(run=run)})


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import jupyter_llmcloud as lc\nd = lc.data.load('x')", "lc.data (line 2)"),
        ("from jupyter_llmcloud import data", "jupyter_llmcloud.data (line 1)"),
        ("import jupyter_llmcloud as lc\nf(lc)", "lc (line 2)"),
        ("run.checkpoints.ask()", "run.checkpoints (line 1)"),
        ("x = await f()", "asyncio.run()"),
        ("get_ipython().run_line_magic('x', '')", "get_ipython (line 1)"),
    ],
)
def test_what_ranks_only_have_is_refused_by_name(code: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        plain_code(SourceCell("r", code))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"plan": "tp:2"}, "--plan tp:2"),
        ({"resume": "r"}, "--resume r"),
        ({"compress_gradients": "fp16"}, "--compress-gradients"),
        ({"something_new": 3}, "--something-new"),
    ],
)
def test_options_without_a_plain_counterpart_are_refused_by_name(spec: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_options(spec)


def test_options_that_change_no_loss_are_left_out_and_said() -> None:
    (note,) = check_options({"checkpoint_every": 5, "max_restarts": 2, "seed": 1, "precision": "bf16", "plan": "ddp"})
    assert note.startswith("--checkpoint-every, --max-restarts:")
    assert check_options({"timeout": 60.0, "hang_after": 20.0, "watch": "loss-spike=stop", "track": ["wandb"]}) == []
    [note] = check_options({"watch": "not-finite=skip"})
    assert note.startswith("--watch not-finite=skip: a script takes every step")


@pytest.mark.parametrize("value", [1, 0.5, "a'b", None, True, [1, (2, "x")], {"a": [1.5]}, {1, 2}, b"x"])
def test_plain_values_are_written_as_they_are(value: object) -> None:
    assert ast.literal_eval(literal(value)) == value


@pytest.mark.parametrize("value", [object(), math.nan, math.inf, [object()], "x" * 3000, set(), range(3)])
def test_other_values_have_no_literal(value: object) -> None:
    assert literal(value) == ""


def test_a_run_of_a_tracker_is_that_of_the_cell_which_made_it() -> None:
    earlier = [SourceCell("begins", "import wandb\nrun = wandb.init()")]
    run = ExportedRun(SourceCell("last", "print(run.summary)"), "last", 1)
    assert "print(run.summary)" in export(run, earlier, "train.py").text


def test_this_package_is_known_by_the_name_that_an_earlier_cell_gave_it() -> None:
    earlier = [SourceCell("imports", "import jupyter_llmcloud as lc")]
    text = export(ExportedRun(SourceCell("last", "lc.run.log(loss=1)"), "last", 1), earlier, "train.py").text
    assert "\nrun.log(loss=1)" in text
    with pytest.raises(UsageError, match=r"lc\.data \(line 1\)"):
        export(ExportedRun(SourceCell("last", "lc.data.load('x')"), "last", 1), earlier, "train.py")


REBINDS = """\
json, rank, device, dist, run, world_size = {"a": 1}, 8, "cpu", print, None, 3
import torch
from random import random
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
accelerator = Accelerator()
model = DistributedDataParallel(torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
accelerator.log({"drawn": torch.rand(()).item(), "first": torch.initial_seed()})
"""


def test_a_script_does_what_it_has_to_whatever_its_cells_call_their_variables(tmp_path: Path) -> None:
    run = ExportedRun(SourceCell("r-1", REBINDS, spec={"seed": 3, "save": ["model"]}), "r", 1)
    (tmp_path / "train.py").write_text(export(run, [], "train.py").text)
    command = [sys.executable, "train.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0 and '{"drawn": ' in ended.stdout, ended.stderr
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.pt"]


TAKES_NAMES = """\
iter = float = str = WIDTH = 3
def print(text): raise AssertionError(text)
def any(*_): raise AssertionError
import os as sys
os = "linux"
"""


def test_a_script_runs_on_whatever_names_of_python_and_of_modules_a_cell_takes(tmp_path: Path) -> None:
    last = "import torch, sys\nfor step in run.steps(2): run.log(loss=step)\nmodel = torch.nn.Linear(WIDTH, 1)"
    last += (
        "\nloader = torch.utils.data.DataLoader(range(3), shuffle=True)\nrun.log(drawn=sum(loader), args=len(sys.argv))"
    )
    cells = [SourceCell("takes", TAKES_NAMES, spec={"args": "--a", "seed": 1})]
    cell = SourceCell("last", last, spec={"args": "--b 1", "seed": 2, "save": ["model"]})
    (tmp_path / "train.py").write_text(export(ExportedRun(cell, "r", 1), cells, "train.py").text)
    command = [sys.executable, "train.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    logged = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0 and logged == [{"loss": 0}, {"loss": 1}, {"drawn": 3, "args": 3}], ended.stderr
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.pt"]


def test_a_script_is_python_that_says_how_it_is_launched() -> None:
    cell = SourceCell("r-1", "from __future__ import annotations\nrun.log(loss=1)", spec={"seed": 3, "args": "--lr 1"})
    script = export(ExportedRun(cell, "r", 4, num_threads=2, has_gpus=True), [], "my train.py")
    compile(script.text, "train.py", "exec", dont_inherit=True)
    assert "_seed(3)" in script.text and "sys.argv[1:] = ['--lr', '1']" in script.text
    torchrun, accelerate, sbatch = script.launches
    assert torchrun == "OMP_NUM_THREADS=2 torchrun --nproc-per-node 4 'my train.py'"
    assert "--num_processes 4" in accelerate and "--gpus-per-node=4" in sbatch


def test_names_of_a_star_import_are_not_asked_of_earlier_cells() -> None:
    last = SourceCell("last", "data = make(untar())\nlearn(data)")
    earlier = [
        SourceCell("e", "rate = 1"),
        SourceCell("star", "from fastai.vision.all import *"),
        SourceCell("x", "y = 2"),
    ]
    parts, _ = needed_cells(last, earlier)
    assert [part.cell.run_id for part in parts] == ["star", "last"]
    parts, _ = needed_cells(SourceCell("last", "from torch import *\nx = zeros(rate)"), earlier[:1])
    assert [part.cell.run_id for part in parts] == ["e", "last"]


@pytest.mark.parametrize("odd", ["\u2028", "\x0c", "\x85"], ids=["line-separator", "form-feed", "next-line"])
def test_a_text_with_a_character_that_only_some_take_for_the_end_of_a_line_stays_whole(odd: str) -> None:
    code, _ = plain_code(SourceCell("l", f"x = 'a{odd}b'\nfrom jupyter_llmcloud import run\nrun.log(x=1)"))
    assert code == f"x = 'a{odd}b'\npass\nrun.log(x=1)"


def test_what_looks_like_a_command_within_a_text_is_text() -> None:
    code = 'template = """\n%d items\n!important\n"""'
    parts, notes = needed_cells(SourceCell("last", "print(template % 3)"), [SourceCell("made", f"!ls\n{code}")])
    assert [part.cell.code for part in parts] == [f"pass\n{code}", "print(template % 3)"]
    assert notes == ["Left out: '!ls' of run made."]


def _with_its_own_settings() -> tuple[SourceCell, list[SourceCell]]:
    """A cell that was run without arguments in float32, after one that had some in bfloat16."""
    before = SourceCell("before", "rate = float(sys.argv[2])", spec={"args": "--lr 1", "precision": "bf16"})
    return SourceCell("last", "print(rate, sys.argv)"), [SourceCell("i", "import sys"), before]


def test_each_cell_of_a_script_finds_the_arguments_that_its_own_run_had() -> None:
    last, earlier = _with_its_own_settings()
    text = export(ExportedRun(last, "r", 1), earlier, "train.py").text
    before, after = text.index("rate = float"), text.index("print(rate")
    assert "sys.argv[1:] = ['--lr', '1']" in text[:before]
    assert "sys.argv[1:] = []" in text[before:after]
    assert "sys.argv[1:]" not in export(ExportedRun(SourceCell("l", "run.log(x=1)"), "r", 1), [], "train.py").text


def test_cells_that_are_run_again_as_one_find_the_arguments_and_the_precision_that_each_had() -> None:
    last, earlier = _with_its_own_settings()
    text = source_for_ranks(last, earlier)
    before, after = text.index("rate = float"), text.index("print(rate")
    assert all(line in text[:before] for line in ("argv[1:] = ['--lr', '1']", "'ACCELERATE_MIXED_PRECISION'] = 'bf16'"))
    assert all(line in text[before:after] for line in ("argv[1:] = []", "'ACCELERATE_MIXED_PRECISION'] = 'no'"))
    assert "argv" not in source_for_ranks(SourceCell("l", "print(x)"), [SourceCell("x", "x = int()")])
