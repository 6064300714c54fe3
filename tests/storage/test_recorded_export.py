"""Recorded runs as scripts and beside each other: folders on disk, no ranks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.recorded import export
from jupyter_llmcloud.storage.recorded.comparison import compared, compared_again
from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from jupyter_llmcloud.storage.search.sweeps import SweepRecord, SweepStore, TrialRow


def record(name: str, source: str, created: float, losses: tuple[float, ...] = (), **fields: Any) -> None:
    folder = RunStore().folder(name)
    about = {"ranks": [0, 1], "world_size": 2, "world_id": "w", "state": "finished", **fields}
    folder.create(RunRecord(name, name, created=created, **about), source)
    writer = JournalWriter(folder.metrics(0))
    writer.append([{"t": 1.0, "step": step, "values": {"loss": loss}} for step, loss in enumerate(losses)])
    writer.close()


def test_cells_of_the_same_ranks_go_along_in_their_order(own_root: Path) -> None:
    record("makes", "%%distribute -n 2\nmodel = [1]", 1.0)
    record("other-world", "%%distribute\nmodel = [2]", 2.0, world_id="v")
    record("last", "%%distribute\nrun.log(loss=len(model))", 3.0)
    record("later", "%%distribute\nmodel = [3]", 4.0)
    text = export.exported(RunStore(), "last", "train.py").text
    assert "model = [1]" in text and "[2]" not in text and "[3]" not in text and "%%distribute" not in text
    compile(text, "train.py", "exec", dont_inherit=True)


def test_a_fresh_run_has_no_cells_before_it(own_root: Path) -> None:
    record("makes", "model = [1]", 1.0)
    record("last", "x = 1", 3.0, spec={"fresh": True})
    assert (
        "model" not in export.exported(RunStore(), "last", "t.py").text.replace("--- what", "").split("run = Run()")[1]
    )


def of_a_sweep(state: str, run_id: str = "tuned-0007") -> None:
    trial = TrialRow(7, state, 0.5, {"lr": 0.01, "kind": None}, step=4, run_id=run_id)
    found = SweepRecord("tuned", "finished", spec={"metric": "valid_loss"}, trials=[trial])
    SweepStore().folder("tuned").create(found, {"source": ""}, b"")


TRIAL = (
    "%%sweep -n 2\nlr = trial.suggest_float('lr', 0.0, 1.0)\nkind = trial.suggest_categorical('kind', ['a', None])\n"
)
TRIAL += "trial.report(lr * width, trial.number)"


def test_a_trial_of_a_sweep_has_its_values_in_a_script_and_on_ranks(own_root: Path) -> None:
    pytest.importorskip("optuna")
    record("tuned-0007", TRIAL, 1.0, owner="sweep:tuned", spec={"fresh": True, "seed": 3}, pushed={"width": "4"})
    of_a_sweep("pruned")
    text = export.exported(RunStore(), "tuned-0007", "t.py").text
    assert "%%sweep" not in text and "# The sweep ended it early (pruned); here it goes on to its end." in text
    made = text[text.index("import optuna") : text.index("os.environ['ACCELERATE_MIXED")]
    logged: list[Any] = []
    names: dict[str, Any] = {"run": SimpleNamespace(log=lambda values, step: logged.append((values, step))), "width": 4}
    exec(f"{made}\n{TRIAL.partition(chr(10))[2]}", names)
    assert (names["lr"], names["kind"], logged) == (0.01, None, [({"valid_loss": 0.04}, 7)])
    compile(text, "t.py", "exec", dont_inherit=True)
    _, source, is_seeded = export.as_one_cell(RunStore(), "tuned-0007")
    order = [
        source.index(text)
        for text in ("width = 4", "trial = _Trial({'lr': 0.01, 'kind': None}, number=7)", "begin_again(3")
    ]
    assert is_seeded and order == sorted(order)


def test_a_choice_that_is_no_plain_value_is_found_again_by_its_name(own_root: Path) -> None:
    pytest.importorskip("optuna")
    code = (
        "h = trial.suggest_categorical('lr', [(8,), (8, 8)])\na = trial.suggest_categorical('kind', [dict, set, None])"
    )
    record("tuned-0007", f"%%sweep -n 2\n{code}", 1.0, owner="sweep:tuned", spec={"fresh": True})
    trial = TrialRow(7, "done", 0.5, {"lr": "(8, 8)", "kind": "set"}, step=4, run_id="tuned-0007")
    SweepStore().folder("tuned").create(SweepRecord("tuned", "finished", spec={}, trials=[trial]), {"source": ""}, b"")
    text = export.exported(RunStore(), "tuned-0007", "t.py").text
    names: dict[str, Any] = {"run": None}
    exec(text[text.index("import optuna") : text.index("os.environ['ACCELERATE_MIXED")] + code, names)
    assert (names["h"], names["a"]) == ((8, 8), set)


def test_a_trial_whose_values_are_not_known_is_refused_by_name(own_root: Path) -> None:
    record("tuned-0007", TRIAL, 1.0, owner="sweep:tuned", spec={"fresh": True}, pushed={"width": "4"})
    for state, run_id, words in [
        (None, "", "was a trial of the sweep 'tuned', which was deleted"),
        ("running", "tuned-0007", "still runs: its values are known when it has ended"),
        (
            "done",
            "tuned-0007-again",
            "is no trial of the sweep 'tuned' that is kept. It was run again as tuned-0007-again",
        ),
    ]:
        if state:
            of_a_sweep(state, run_id)
        for attempt in (
            lambda: export.exported(RunStore(), "tuned-0007", "t.py"),
            lambda: export.as_one_cell(RunStore(), "tuned-0007"),
        ):
            with pytest.raises(UsageError, match=words):
                attempt()


def test_a_script_takes_its_arguments_along(own_root: Path) -> None:
    record("s", "x = 1", 1.0, script={"file": "/x/s.py", "arguments": ["--lr", "1 2"], "folder": "/x"})
    assert "sys.argv[1:] = ['--lr', '1 2']" in export.exported(RunStore(), "s", "t.py").text


def test_one_cell_for_ranks_seeds_each_cell_as_its_run_was(own_root: Path) -> None:
    record("makes", "%%distribute\nfrom __future__ import annotations\nmodel = f = [1]", 1.0, spec={"seed": 3})
    record("last", "%%distribute\nprint(model, lr)", 3.0, spec={"seed": 4}, pushed={"lr": "0.5"})
    _, source, is_seeded = export.as_one_cell(RunStore(), "last")
    assert is_seeded and source.startswith("from __future__ import annotations\n")
    order = [
        source.index(text) for text in ("begin_again(3", "model = f = [1]", "lr = 0.5", "begin_again(4", "print(model")
    ]
    assert order == sorted(order)
    compile(source, "cell", "exec", dont_inherit=True)


def test_each_cell_has_the_arguments_and_the_precision_of_its_own_run(own_root: Path) -> None:
    found = "found.append((__import__('sys').argv[1:], __import__('os').environ.get('ACCELERATE_MIXED_PRECISION')))"
    record("makes", f"%%distribute\nfound = []\n{found}", 1.0, spec={"args": "--lr 1", "precision": "bf16"})
    record("adds", f"%%distribute\n{found}", 2.0)
    record("last", f"%%distribute\n{found}", 3.0, spec={"args": "--width '2 3'"})
    _, source, _ = export.as_one_cell(RunStore(), "last")
    expected = [(["--lr", "1"], "bf16"), ([], "no"), (["--width", "2 3"], "no")]
    assert executed(source, ["--width", "2 3"]) == expected, "as a cell of ranks that are given what the last one had"
    text = export.exported(RunStore(), "last", "train.py").text
    assert executed(text[text.index("# --- run makes") : text.index("def _leave")], []) == expected, "as a script"


def executed(source: str, arguments: list[str]) -> Any:
    """What a source leaves as `found`, in a process of its own."""
    begin = "import os, sys\nrank, world_size = 0, 1\nos.environ['ACCELERATE_MIXED_PRECISION'] = 'no'\n"
    command = [sys.executable, "-c", f"{begin}{source}\nprint(found)", *arguments]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return ast.literal_eval(told)


def test_a_cell_that_needs_nothing_is_run_again_as_it_is(own_root: Path) -> None:
    record("last", "%%distribute --seed 4\nprint(1)\n", 3.0, spec={"seed": 4})
    assert export.as_one_cell(RunStore(), "last")[1:] == ("print(1)\n", False)


@pytest.mark.parametrize(
    ("code", "options", "words"),
    [
        ("x = 1", {"background": True}, "-b does not"),
        ("x = 1", {"ranks": "0"}, "leave --ranks out"),
        ("x = 1", {"plan": "tp:2"}, "--plan tp:2"),
        ("import jupyter_llmcloud as lc\nlc.data.load('x')", {}, "lc.data (line 2)"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_it_is_run(code: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        export.check(code, RunSpec.make({"export": "t.py", **options}), False)
    assert words in str(refused.value)


def test_a_file_that_is_no_script_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected a file that ends in \.py"):
        RunSpec.make({"export": "train.txt"})


def test_runs_are_compared_by_their_records(own_root: Path) -> None:
    record("a", "%%distribute --seed 1\nx = 1", 1.0, (2.0, 1.0), spec={"seed": 1}, versions={"torch": "2.13"})
    record("b", "%%distribute --seed 1\nx = 2", 2.0, (2.0, 1.5), spec={"seed": 1}, versions={"torch": "2.14"})
    found = compared(RunStore(), ["a", "b"])
    assert found.facts == [("torch", ["2.13", "2.14"])]
    assert found.metrics == [("loss", [1.0, 1.5], 1.0)]
    assert "+x = 2" in found.code[0]


def test_what_was_pushed_for_runs_of_the_same_text_is_what_differs(own_root: Path) -> None:
    record("a", "%%distribute -n 2 --push lr\nx = lr", 1.0, (2.0,), spec={"nproc": 2}, pushed={"lr": "0.1"})
    record("b", "%%distribute --push lr\nx = lr", 2.0, (3.0,), pushed={"lr": "0.05"})
    found = compared(RunStore(), ["a", "b"])
    assert found.facts == [("pushed lr", ["0.1", "0.05"])] and found.code == [""]


def test_what_the_cells_before_have_made_is_compared_as_well(own_root: Path) -> None:
    record("defines", "%%distribute\n!ls\ndef make():\n    return width", 1.0, pushed={"lr": "0.1"})
    record("width", "%%distribute\nwidth = 8", 2.0)
    record("a", "%%distribute\nmodel = make()\nfit(model, lr)", 3.0, (2.0,))
    record("shows", "%%distribute\nprint(model)", 4.0)
    record("again", "%%distribute\nwidth = 16", 5.0, pushed={"lr": "0.2"})
    record("stopped", "%%distribute\ndef make():\n    return 0", 5.5, state="stopped")
    record("b", "%%distribute\nmodel = make()\nfit(model, lr)", 6.0, (3.0,))
    found = compared(RunStore(), ["a", "b"])
    assert found.facts == [("pushed lr", ["0.1", "0.2"])]
    changed = [line for line in found.code[0].split("\n") if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == ["-width = 8", "+width = 16"]


def test_a_run_that_was_made_from_another_differs_by_where_it_ran_and_not_by_how_it_was_made(own_root: Path) -> None:
    record("a", "%%distribute --push lr\nx = lr", 1.0, (2.0,), pushed={"lr": "0.1"}, versions={"torch": "2.13"})
    record("a-again", "lr = 0.1\nx = lr", 2.0, (2.0,), spec={"fresh": True}, versions={"torch": "2.14"})
    found = compared_again(RunStore(), "a", "a-again")
    assert found.facts == [("torch", ["2.13", "2.14"])] and found.code == [""] and found.has_same_metrics


def test_a_run_that_is_not_there_cannot_be_compared(own_root: Path) -> None:
    record("a", "x = 1", 1.0)
    with pytest.raises(NotFound, match="no run 'zzz'"):
        compared(RunStore(), ["a", "zzz"])
    with pytest.raises(UsageError, match="at least two"):
        compared(RunStore(), ["a", "a"])
