"""Cells as other people write them, pasted: what they expect of a notebook and of a launcher is what happens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.agent_messages import ListVariables
from tests.support.worlds import Ranks, until
from tests.training.test_world_cells import traceback_of

SCRIPT = """
import argparse
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

def training_function(config, args):
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
    torch.manual_seed(config["seed"])
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(3):
        for inputs, targets in loader:
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print("done", parser_name)
    accelerator.end_training()
    return loss.item()

def main():
    global parser_name
    parser = argparse.ArgumentParser()
    parser_name = parser.prog
    parser.add_argument("--mixed_precision", default=None, choices=["no", "fp16", "bf16", "fp8"])
    parser.add_argument("--cpu", action="store_true")
    return training_function({"lr": 0.1, "seed": 42}, parser.parse_args())

if __name__ == "__main__":
    loss = main()
loss < 1
"""


def test_a_script_that_parses_its_command_line_has_been_given_no_arguments(world: Ranks) -> None:
    outcome = world.ok(SCRIPT)
    assert outcome.results() == ["True", "True"]
    assert outcome.text(0) == "done cell.py\n"


def test_launchers_of_torch_call_a_function_of_the_cell_on_the_ranks(world: Ranks) -> None:
    outcome = world.ok(
        """
        import torch.multiprocessing as mp
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
        def train(factor): return factor * (rank + 1)
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_endpoint="127.0.0.1:0", rdzv_backend="c10d")
        found = []
        mp.start_processes(lambda rank, factor: found.append((rank, factor)), args=(3,), nprocs=2, start_method="fork")
        elastic_launch(config, train)(10), found
        """
    )
    assert outcome.results() == ["({0: 10}, [(0, 3)])", "({1: 20}, [(1, 3)])"]
    assert outcome.text() == outcome.text(kind="stderr") == ""


def test_a_notebook_launcher_trains_on_the_ranks_that_are_there(world: Ranks) -> None:
    outcome = world.ok(
        """
        from accelerate import Accelerator, debug_launcher, notebook_launcher
        def train(factor):
            accelerator = Accelerator()
            print(accelerator.process_index, "of", accelerator.num_processes, accelerator.mixed_precision)
            return factor * accelerator.process_index
        first = notebook_launcher(train, args=(10,), num_processes=2, mixed_precision="bf16")
        debug_launcher(train, (3,))
        first
        """
    )
    assert outcome.results() == ["0", "10"]
    assert outcome.text(1) == "1 of 2 bf16\n1 of 2 no\n"
    assert outcome.text(kind="stderr") == ""
    told = world.ok("notebook_launcher(train, (1,), num_processes=8)")
    assert "%world resize 8" in told.text(0, "stderr")
    assert told.text(1, "stderr") == ""
    failed = world.run("def fail():\n    x = 1\n    1 / 0\nnotebook_launcher(fail, num_processes=2)")
    assert "----> 4" in traceback_of(failed)


def test_the_state_that_comes_before_any_accelerator_knows_all_ranks(world: Ranks) -> None:
    outcome = world.ok(
        """
        from accelerate import Accelerator, PartialState
        from accelerate.state import AcceleratorState
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a new world
        state = PartialState()
        with state.split_between_processes([1, 2, 3, 4]) as own:
            print(own, state.is_main_process, Accelerator().num_processes)
        """
    )
    assert [outcome.text(rank) for rank in (0, 1)] == ["[1, 2] True 2\n", "[3, 4] False 2\n"]


def test_an_error_of_ones_own_is_not_taken_for_the_echo_of_a_peers(world: Ranks) -> None:
    outcome = world.run(
        """
        import time
        if rank == 0:
            raise LookupError("first")
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            raise RuntimeError("second") from None
        """
    )
    assert outcome.error["rank"] == 0
    assert "rank 1: RuntimeError, variables kept" in outcome.report


def test_a_spawn_of_a_function_of_the_cell_runs_it_on_the_ranks(world: Ranks) -> None:
    outcome = world.ok(
        """
        import os
        import torch
        import torch.distributed as dist
        import torch.multiprocessing as mp
        def demo(rank, world_size):
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", "12355"
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
            total = torch.tensor([float(rank + 1)])
            dist.all_reduce(total)
            print("rank", rank, "total", total.item())
            dist.destroy_process_group()
        mp.spawn(demo, args=(2,), nprocs=2, join=True)
        assert mp.spawn(demo, args=(2,), nprocs=2, join=False).join()
        """
    )
    assert outcome.text(1) == "rank 1 total 3.0\n" * 2
    refused = world.run("mp.spawn(demo, args=(4,), nprocs=4)")
    assert re.search("nprocs=4.*there are 2.*%world resize 4", refused.error["evalue"])


def test_a_partial_function_of_a_cell_runs_on_the_rank_as_the_function_does(world: Ranks) -> None:
    world.ok(
        """
        import functools, os, torch
        seen = []
        def main(index, *more):
            seen.append((index, more, os.getpid() == own))
        own = os.getpid()
        torch.multiprocessing.spawn(functools.partial(main), args=(3,), nprocs=world_size)
        """
    )
    assert [world.pull("seen", at) for at in (0, 1)] == [[(0, (3,), True)], [(1, (3,), True)]]


def test_the_line_that_failed_is_pointed_at_inside_with_and_try(world: Ranks) -> None:
    text = traceback_of(world.run("import contextlib\nwith contextlib.nullcontext():\n    fine = 1\n    1 / 0"))
    assert "----> 5     1 / 0" in text
    assert "line 5" in text
    chained = traceback_of(
        world.run("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('b') from e")
    )
    assert "----> 3     1 / 0" in chained
    assert "----> 5     raise ValueError('b') from e" in chained
    assert "----> 3     [][1]" in traceback_of(world.run("try:\n    [][1]\nfinally:\n    over = True"))


def test_an_endless_recursion_is_drawn_short(world: Ranks) -> None:
    outcome = world.run("def deeper(n): return other(n)\ndef other(n):\n    return deeper(n + 1)\ndeeper(0)")
    text = traceback_of(outcome)
    assert outcome.error["ename"] == "RecursionError"
    assert re.search(r'Cell In\[\d+\]", line 5, in <module>\n +deeper\(0\)', text)
    assert re.search(r'Cell In\[\d+\]", line 4, in other', text)
    assert re.search(r"[\d,]+ frames between are left out", text)
    assert len(text) < 5000
    assert outcome.report == "ranks 0-1: RecursionError, variables kept"


def test_a_group_of_exceptions_is_the_cells_error_with_its_lines(world: Ranks) -> None:
    outcome = world.run("fine = 1\nraise ExceptionGroup('several', [ValueError('a'), TypeError('b')])", ranks=[0])
    text = traceback_of(outcome)
    assert re.search(r"Cell In\[\d+\]\", line 3, in <module>", text)
    assert "ValueError: a" in text
    assert "TypeError: b" in text
    assert "interactiveshell" not in text
    assert outcome.text(kind="stderr") == ""
    code = (
        "try:\n    raise ExceptionGroup('g', [OSError(5)])\nexcept* OSError as e:\n    raise LookupError('on') from e"
    )
    later = world.run(code, ranks=[0])
    assert (later.error["ename"], later.text(kind="stderr")) == ("LookupError", "")
    assert "LookupError: on" in traceback_of(later)


def test_an_exit_shows_where_it_was_and_gives_no_advice_for_terminals(world: Ranks) -> None:
    outcome = world.run(
        "import sys, warnings\nwith warnings.catch_warnings():\n    warnings.simplefilter('error')\n    sys.exit(3)"
    )
    assert (outcome.error["ename"], outcome.error["evalue"]) == ("SystemExit", "3")
    assert "----> 5     sys.exit(3)" in traceback_of(outcome)
    assert "%tb" not in traceback_of(outcome)
    outcome = world.run("import warnings\nwarnings.filterwarnings('error')\nquit(2)")
    assert (outcome.error["ename"], outcome.error["evalue"]) == ("SystemExit", "2")
    assert outcome.text(kind="stderr") == ""
    world.ok("warnings.resetwarnings()")


LEFT_WELL = {
    "status 0": "sys.exit(0)",
    "no status": "sys.exit()",
    "None": "sys.exit(None)",
    "main that returns nothing": "def main(): print('trained')\nsys.exit(main())",
    "main that returns 0": "def main(): return 0\nraise SystemExit(main())",
    "a status that is no int of its own": "sys.exit(False)",
    "quit": "quit()",
    "exit of a library": "import builtins\nbuiltins.exit(0)",
    "help of argparse": "import argparse\nargparse.ArgumentParser(prog='train').parse_args(['--help'])",
    "inside a with and a function": "def stop():\n    with torch.no_grad():\n        sys.exit(0)\nstop()",
}


@pytest.mark.parametrize("leave", LEFT_WELL.values(), ids=LEFT_WELL)
def test_a_cell_that_leaves_with_status_0_ends_well_and_saves(world: Ranks, leave: str) -> None:
    outcome = world.ok(f"import sys, torch\nmodel = torch.nn.Linear(2, 1)\n{leave}", save=["model"])
    assert (outcome.folder.path / "model" / "model.safetensors").exists()
    assert "SystemExit" not in outcome.text(kind="stderr")
    assert ("usage: train" in outcome.text(0)) == ("argparse" in leave)
    assert outcome.report == "ranks 0-1: finished"


@pytest.mark.parametrize(
    ("leave", "evalue", "report"),
    [
        ("sys.exit(2)", "2", "left with exit status 2"),
        ("exit(7)", "7", "left with exit status 7"),
        ("sys.exit(True)", "True", "left by sys.exit: True"),
        ("sys.exit('no data at /tmp')", "no data at /tmp", "left by sys.exit: no data at /tmp"),
        ("sys.exit('')", "", "left by sys.exit: "),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--lr'])", "2", "left with exit status 2"),
    ],
)
def test_a_cell_that_leaves_with_another_status_fails_with_it(
    world: Ranks, leave: str, evalue: str, report: str
) -> None:
    outcome = world.run(f"import sys, torch\nmodel = torch.nn.Linear(2, 1)\n{leave}", save=["model"])
    assert outcome.state == "failed"
    assert (outcome.error["ename"], outcome.error["evalue"]) == ("SystemExit", evalue)
    *why, last = outcome.report.splitlines()
    assert last == f"ranks 0-1: {report}, variables kept"
    assert ("--args" in "".join(why)) == bool(why) == ("argparse" in leave)
    assert not (outcome.folder.path / "model").exists()


def test_a_keyboard_interrupt_of_the_cells_own_is_drawn_with_the_cells_lines(world: Ranks) -> None:
    outcome = world.run("if rank == 1:\n    raise KeyboardInterrupt('mine')")
    text = traceback_of(outcome)
    assert outcome.state == "failed"
    assert re.search(r"Cell In\[\d+\]\", line 3, in <module>", text)
    assert "interactiveshell" not in text


def test_an_error_that_cannot_be_printed_takes_nothing_with_it(world: Ranks) -> None:
    world.ok("kept_over_it = 5")
    outcome = world.run("class Silent(Exception):\n    def __str__(self): raise RuntimeError('no')\nraise Silent()")
    assert (outcome.state, outcome.error["ename"]) == ("failed", "Silent")
    assert "__str__" in outcome.error["evalue"]
    assert world.ok("kept_over_it").results() == ["5", "5"]


@pytest.mark.alone
def test_a_stop_works_after_a_cell_that_has_ignored_interrupts(world: Ranks) -> None:
    world.ok("import signal, time\nkept_over_stop = 6\nsignal.signal(signal.SIGINT, signal.SIG_IGN)")
    stopped = world.send("print('in it')\nwhile True: time.sleep(0.01)").wait_for("in it", 2).stop().end()
    assert "ranks 0-1: stopped, variables kept" in stopped.report
    assert stopped.seconds < 2
    assert world.ok("kept_over_stop").results() == ["6", "6"]


def test_a_run_that_took_too_long_says_so(world: Ranks) -> None:
    outcome = world.run("import time\ntime.sleep(60)", timeout_s=0.2)
    assert outcome.state == "stopped"
    assert "--timeout: 0.2 s have passed." in outcome.report


def test_a_widget_of_a_rank_is_shown_as_text(world: Ranks) -> None:
    outcome = world.ok("import ipywidgets\nipywidgets.IntSlider()", ranks=[0])
    assert outcome.results() == ["IntSlider(value=0)"]
    assert [*outcome.shown("result")[0]] == ["text/plain"]


def test_what_is_pulled_has_left_its_group_wherever_it_is(world: Ranks) -> None:
    world.ok(
        """
        import torch
        from torch.nn.parallel import DistributedDataParallel
        held = {"models": [DistributedDataParallel(torch.nn.Linear(2, 1))]}
        bad = {"model": 1, "lock": __import__("threading").Lock()}
        """
    )
    assert type(world.pull("held")["models"][0]).__name__ == "Linear"
    with pytest.raises(UsageError, match=r"'bad' \(dict\) cannot be pickled"):
        world.pull("bad")


def test_a_model_that_is_spread_over_the_ranks_is_gathered_when_saved_and_refused_when_pulled(world: Ranks) -> None:
    outcome = world.ok(
        """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        torch.manual_seed(3)
        spread = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 1))
        spread[1].weight.data.fill_(2.0)
        fully_shard(spread, mesh=init_device_mesh("cpu", (2,)))
        part = spread[0].weight
        """,
        save=["spread"],
    )
    saved = load_file(outcome.folder.path / "model" / "model.safetensors")
    assert saved["0.weight"].shape == (6, 4)
    assert saved["1.weight"].tolist() == [[2.0] * 6]
    with pytest.raises(UsageError, match=r"'part'.*full_tensor"):
        world.pull("part")


def test_bytes_and_settings_of_a_scripts_streams(world: Ranks) -> None:
    outcome = world.ok(
        """
        import sys
        sys.stdout.reconfigure(line_buffering=True)
        print("text", end=" ")
        sys.stdout.buffer.write("bytes ü\\n".encode())
        sys.stdout.buffer.flush()
        """,
        ranks=[0],
    )
    assert outcome.text() == "text bytes ü\n"


def test_names_that_were_removed_are_given_again(world: Ranks) -> None:
    world.ok("kept_over_reset = 1\ndel run, rank")
    world.ok("%reset -f")
    assert world.ok("rank, world_size, run.rank, 'kept_over_reset' in globals()").results() == [
        "(0, 2, 0, False)",
        "(1, 2, 1, False)",
    ]
    world.ok("rank = 'mine'")
    assert world.ok("rank").results() == ["'mine'"] * 2
    world.ok("del rank")


@pytest.mark.alone
def test_a_rank_starts_no_ranks_of_its_own(world: Ranks) -> None:
    world.ok("%load_ext jupyter_llmcloud")
    for code in ("%%distribute\n1", "%pull x", "import jupyter_llmcloud as lc\nlc.distribute('1')", "%cluster start"):
        outcome = world.run(code)
        assert "this is a rank" in outcome.error["evalue"], code
        assert outcome.seconds < 5


def test_a_script_that_fails_on_one_rank_fails_the_cell_and_lets_the_others_go(world: Ranks, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nif 'fail' in sys.argv:\n    1 / 0\nsys.exit(3 if 'leave' in sys.argv else 0)\n")
    outcome = world.run(f"if rank == 1:\n    %run {script} fail\nimport torch.distributed as dist\ndist.barrier()")
    assert (outcome.state, outcome.error["rank"], outcome.error["ename"]) == ("failed", 1, "ZeroDivisionError")
    assert "script.py:3" in traceback_of(outcome)
    assert "rank 0: released" in outcome.report
    assert world.run(f"%run {script} leave", ranks=[0]).error["ename"] == "SystemExit"
    world.ok(f"%run {script}\n%run -e {script} leave")


def test_settings_of_the_shell_are_those_of_a_notebook(world: Ranks) -> None:
    world.ok("import os\nbefore = os.getcwd()\n%cd -q /\n%cd -q -\nassert os.getcwd() == before")
    assert (
        "inline" in world.ok("%matplotlib widget\nimport matplotlib\nmatplotlib.get_backend()", ranks=[0]).results()[0]
    )
    world.ok("%config InteractiveShell.ast_node_interactivity = 'all'")
    assert [shown["text/plain"] for shown in world.ok("1\n2", ranks=[0]).shown("result")] == ["1", "2"]
    world.ok("%config InteractiveShell.ast_node_interactivity = 'last_expr'")
    assert world.ok("1\n2").results() == ["2", "2"]


def test_a_cell_that_binds_the_number_of_a_rank_to_another_is_told_how_to_have_it_back(
    new_world: Callable[..., Ranks],
) -> None:
    world = new_world()
    first = world.ok("for rank in range(2):\n    pass\nrank")
    assert first.results() == ["1", "1"]
    assert "rank is 1 in later cells, too" in first.text(0, "stderr")
    assert first.text(1, "stderr") == ""
    assert world.ok("rank").text(kind="stderr") == ""
    assert world.ok("rank", fresh=True).results() == ["0", "1"]
    hidden = world.ok("rank = 8\ndef run(rank, size): pass")
    assert "run is a function of this cell" in hidden.text(0, "stderr")
    assert "run is" not in world.ok("def run(): pass").text(0, "stderr"), "it is said once"
    world.ok("del rank")
    assert world.ok("rank").results() == ["0", "1"]
    world.ok("run.name", fresh=True)


def test_a_bar_that_a_cell_leaves_open_is_drawn_to_its_end_and_moves_no_bar_of_a_later_cell(world: Ranks) -> None:
    left = world.ok("from tqdm.auto import tqdm\nleft = tqdm(range(4), mininterval=60)\nleft.update(2)\nleft.update(1)")
    assert "3/4" in left.text(0, "stderr")
    assert [row["progress"] for rank, row in left.metrics if "progress" in row][-1] == [3, 4]
    drawn = world.ok("for _ in tqdm(range(3)):\n    pass").text(0, "stderr")
    assert "3/3" in drawn
    assert "\n" not in drawn.rstrip("\n")
    assert "4/4" in world.ok("left.update(1)\nleft.close()").text(0, "stderr")


def test_a_process_that_a_cell_forks_and_does_not_end_is_no_second_rank(world: Ranks) -> None:
    outcome = world.ok(
        """
        import os
        pid = os.fork()
        if pid:
            print("ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        else:
            print("forked")
        """
    )
    assert [sorted(outcome.text(rank).splitlines()) for rank in (0, 1)] == [["ended with 0", "forked"]] * 2
    world.ok("import torch.distributed as dist\ndist.barrier()")  # a second process would take what is for the rank


@pytest.mark.parametrize(
    ("left", "status", "said"),
    [
        pytest.param("1 / 0", 1, "ZeroDivisionError", id="error"),
        pytest.param("sys.exit(3)", 3, "", id="status"),
        pytest.param("sys.exit('why')", 1, "why", id="words"),
    ],
)
def test_how_a_forked_process_leaves_is_nothing_of_its_rank(world: Ranks, left: str, status: int, said: str) -> None:
    outcome = world.ok(
        f"import os, sys\nif not (pid := os.fork()): {left}\nos.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
    )
    assert outcome.results() == [str(status)] * 2
    assert said in outcome.text(0, "stderr")


def test_what_a_thread_prints_between_two_cells_is_shown_by_the_next_one(world: Ranks, tmp_path: Path) -> None:
    world.ok(
        f"""
        import pathlib, threading, time
        folder = pathlib.Path({str(tmp_path)!r})
        def work(text):
            while not (folder / "go").exists(): time.sleep(0.01)
            print(text)
            print("end of", len(text))
            (folder / f"printed-{{len(text)}}").touch()
        threads = [threading.Thread(target=work, args=(text,), daemon=True) for text in ("tick", "x" * 100_000)]
        threads[0].start()
        """,
        ranks=[0],
    )
    (tmp_path / "go").touch()
    until((tmp_path / "printed-4").exists, "the thread has printed")
    assert world.ok("print('next')", ranks=[0]).text() == "tick\nend of 4\nnext\n"
    (tmp_path / "go").unlink()
    world.ok("threads[1].start()", ranks=[0])
    (tmp_path / "go").touch()
    until((tmp_path / "printed-100000").exists, "the other one has printed, held back by nobody")
    outcome = world.ok("for thread in threads: thread.join()", ranks=[0])
    assert outcome.text().endswith("x\nend of 100000\n") and len(outcome.text()) < 40_000
    assert "what threads had written before is left out" in outcome.text(kind="stderr")


def test_a_variable_that_warns_whoever_looks_at_it_warns_of_nothing_of_ours(world: Ranks) -> None:
    world.ok("from torch.distributed import *")  # reduce_op is such a one
    failed = world.run("own = 1\nown / 0")
    assert failed.text(kind="stderr") == "", failed.text(kind="stderr")
    asked = world.ok("isinstance(reduce_op, list)", ranks=[0])
    assert "FutureWarning" in asked.text(kind="stderr"), "what the cell asks itself is its own affair"


SHY = """
import weakref, torch
class Shy:
    @property
    def __class__(self): raise RuntimeError("outside of its context")
    def __getattr__(self, name): raise RuntimeError(name)
    def __eq__(self, other): raise RuntimeError("compared")
    def __bool__(self): raise RuntimeError("asked")
    def __len__(self): raise RuntimeError("counted")
    def __hash__(self): raise RuntimeError("hashed")
    def __repr__(self): raise RuntimeError("printed")
class Gone: pass
gone = Gone()
token, shy, proxy = Shy(), Shy(), weakref.proxy(gone)
del gone
"""


def test_variables_that_let_nobody_look_at_them_stand_in_the_way_of_no_cell(world: Ranks) -> None:
    world.ok(SHY)
    assert world.ok("print('next')").text(0) == "next\n"
    failed = world.run("0 / 0")
    assert failed.error["ename"] == "ZeroDivisionError"
    assert "shy" in failed.error["locals"], "named, though not readable"
    listed = world.channel.request(ListVariables(world_id=world.world_id)).ranks[0]
    names = {row["name"] for row in listed["variables"]}
    assert {"token", "shy", "proxy"} <= names
    world.push(kept=3)
    assert world.pull("kept") == 3
    trained = world.ok(  # a checkpoint is refused for them, aloud; the training goes on
        """
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(4):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        """,
        checkpoint_every=2,
        save=["model"],
    )
    assert (trained.folder.path / "model").exists()
    world.ok("del token, shy, proxy")
