"""`--fresh`: a cell finds what a script in a new process finds; what other cells have made is back afterwards."""

from __future__ import annotations

from pathlib import Path

from tests.support.worlds import Ranks

LOOK = """
import decimal, logging, os, random, socket, sys, warnings
import numpy, torch, own_settings
from accelerate.state import PartialState
found = {
    "earlier": "earlier" in globals(),
    "own module": own_settings.rate,
    "environment": os.environ.get("MY_FLAG"),
    "rank": os.environ["RANK"] == str(rank),
    "dtype": torch.get_default_dtype(),
    "device": torch.get_default_device().type,
    "deterministic": torch.are_deterministic_algorithms_enabled(),
    "threads": torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]),
    "gradients": torch.is_grad_enabled(),
    "print": numpy.get_printoptions()["precision"],
    "errors": numpy.geterr()["divide"],
    "recursion": sys.getrecursionlimit() == 4321,
    "decimals": decimal.getcontext().prec,
    "timeout": socket.getdefaulttimeout(),
    "level": logging.getLogger().level,
    "level of a library": logging.getLogger("transformers").level == logging.INFO,
    "filters": any(row[2] is ResourceWarning and row[0] == "error" for row in warnings.filters),
    "folder": os.getcwd() == os.environ["MY_HOME"] if "MY_HOME" in os.environ else True,
    "path": "/own/path" in sys.path,
    "processes": PartialState().num_processes,
}
print(found)
"""
SET = """
import decimal, logging, os, random, socket, sys, warnings
import numpy, torch
earlier = 1
os.environ["MY_HOME"] = os.getcwd()
sys.path.insert(0, {folder!r})
import own_settings
own_settings.rate = 9
os.environ["MY_FLAG"] = "on"
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.use_deterministic_algorithms(True)
torch.set_num_threads(3)
torch.set_grad_enabled(False)
numpy.set_printoptions(precision=2)
numpy.seterr(divide="ignore")
sys.setrecursionlimit(4321)
decimal.getcontext().prec = 5
socket.setdefaulttimeout(7)
logging.getLogger().setLevel("DEBUG")
import transformers
transformers.logging.set_verbosity_info()
warnings.simplefilter("error", ResourceWarning)
os.chdir("/")
sys.path.append("/own/path")
"""
NEW = {
    "earlier": False,
    "own module": 1,
    "environment": None,
    "rank": True,
    "device": "cpu",
    "deterministic": False,
    "threads": True,
    "gradients": True,
    "print": 8,
    "errors": "warn",
    "recursion": False,
    "decimals": 28,
    "timeout": None,
    "level": 30,
    "level of a library": False,
    "filters": False,
    "folder": True,
    "path": False,
    "processes": 2,
}
CHANGED = {
    "earlier": True,
    "own module": 9,
    "environment": "on",
    "rank": True,
    "device": "meta",
    "deterministic": True,
    "threads": False,
    "gradients": False,
    "print": 2,
    "errors": "ignore",
    "recursion": True,
    "decimals": 5,
    "timeout": 7.0,
    "level": 10,
    "level of a library": True,
    "filters": True,
    "folder": False,
    "path": True,
    "processes": 2,
}


def looked(text: str) -> dict[str, object]:
    found = eval(text, {"torch": __import__("torch")})
    found.pop("dtype")
    return dict(found)


def test_a_fresh_cell_finds_a_new_process_and_leaves_what_others_have_set(world: Ranks, tmp_path: Path) -> None:
    (tmp_path / "own_settings.py").write_text("rate = 1\n")
    world.ok(SET.format(folder=str(tmp_path)))
    find = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    for rank, text in enumerate([world.ok(find + LOOK, fresh=True).text(rank) for rank in range(2)]):
        assert looked(text) == NEW, rank
        assert "torch.float32" in text
    after = world.ok(LOOK).text(1)
    assert looked(after) == CHANGED
    assert "torch.float64" in after
    undo = "import torch, os; torch.set_default_device(None); torch.set_default_dtype(torch.float32)\n"
    undo += "import transformers; transformers.logging.set_verbosity_warning()\n"
    world.ok(undo + "torch.use_deterministic_algorithms(False); torch.set_grad_enabled(True)")
    world.ok("import os, socket; os.chdir(os.environ['MY_HOME']); socket.setdefaulttimeout(None)")


def test_its_variables_stay_beside_those_of_other_cells(world: Ranks) -> None:
    world.ok("kept, both = 'kept', 'old'")
    world.ok("both, new = 'new', 'new'\ndef tell():\n    return both", fresh=True)
    assert world.ok("[kept, both, new, tell()]").results() == ["['kept', 'new', 'new', 'new']"] * 2


def test_its_settings_end_with_it_also_when_it_fails(world: Ranks) -> None:
    before = "import os, sys, torch\n[os.environ.get('LEFT'), torch.get_default_dtype(), os.getcwd(), len(sys.path)]"
    found = world.ok(before).results()
    failing = """
import os, sys, torch
os.environ["LEFT"] = "1"
torch.set_default_dtype(torch.float64)
os.chdir("/tmp")
sys.path.append("/left")
raise ValueError("on purpose")
"""
    assert world.run(failing, fresh=True).state == "failed"
    assert world.ok(before).results() == found


PROGRAM = """
import atexit, os, threading

def say(word):
    print(word, flush=True)
    with open(run.folder / f"order-{rank}", "a") as file:
        file.write(word + " ")

def late():
    go.wait(60)
    say("thread")

go = threading.Event()
atexit.register(say, "first registered, called last")
atexit.register(say, word="second")
forgotten = atexit.register(lambda: say("never"))
atexit.unregister(forgotten)
unclosed = open(run.folder / f"unclosed-{rank}", "w")
unclosed.write("kept")
threading.Thread(target=late).start()
threading.Timer(0.2, go.set).start()
say("main")
raise SystemExit(0)
"""


def test_a_whole_script_ends_as_a_program_does(world: Ranks) -> None:
    outcome = world.ok(PROGRAM, fresh=True)
    words = "main thread second first registered, called last "
    for rank in range(2):
        assert (outcome.folder.path / f"order-{rank}").read_text() == words
        assert (outcome.folder.path / f"unclosed-{rank}").read_text() == "kept"
    world.ok(f"import atexit\natexit.register(print, 'no program')\n{'pass'}")
    assert "no program" not in world.ok("pass", fresh=True).text()


def test_random_numbers_are_those_of_a_process_that_was_never_seeded(world: Ranks) -> None:
    draw = "import random, numpy, torch\n[random.random(), numpy.random.rand(), torch.rand(()).item()]"
    seed = "random.seed(0); numpy.random.seed(0); torch.manual_seed(0)"
    world.ok(f"import random, numpy, torch\n{seed}")
    expected = world.ok(draw).results()
    world.ok(f"{seed}")
    fresh = [eval(text) for text in world.ok(draw, fresh=True).results()]
    assert all(fresh[0][i] != eval(expected[0])[i] for i in range(3))
    assert fresh[0][:2] != fresh[1][:2]  # from the system's entropy
    assert fresh[0][2] == fresh[1][2]  # torch has one seed for every new process
    assert world.ok(draw).results() == expected


def test_a_cell_has_the_file_of_its_run_and_its_arguments(world: Ranks) -> None:
    look = "import os, sys\n[*os.path.split(__file__), sys.argv[0], sys.argv[1:]] == [str(run.folder), 'cell.py', __file__, {}]"
    assert world.ok(look.format([])).results() == ["True"] * 2
    given = ["--name", "two words"]
    assert world.ok(look.format(given), arguments=given).results() == ["True"] * 2
    world.ok("sys.argv += ['x']")
    assert world.ok("import sys\nsys.argv[1:]").results() == ["[]"] * 2


def test_argparse_of_a_pasted_script_reads_the_arguments(world: Ranks) -> None:
    script = """
import argparse

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    print(parser.parse_args().lr)

if __name__ == "__main__":
    main()
"""
    assert world.ok(script, arguments=["--lr", "3e-4"], fresh=True).text(0) == "0.0003\n"
    refused = world.run(script, arguments=["--rate", "1"], fresh=True)
    assert refused.state == "failed"
    assert "unrecognized arguments: --rate 1" in refused.text(0, "stderr")
