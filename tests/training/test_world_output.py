"""What ranks write reaches the notebook and the run's folder, whatever way it was written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from jupyter_llmcloud.protocol.frames import MAX_HEADER
from jupyter_llmcloud.training.output.sender import MAX_PENDING
from tests.support.worlds import Ranks, until


def test_prints_are_labelled_with_their_rank_and_stream(world: Ranks) -> None:
    outcome = world.ok("import sys\nprint('out', rank)\nprint('err', rank, file=sys.stderr)")
    assert (outcome.text(0), outcome.text(1)) == ("out 0\n", "out 1\n")
    assert (outcome.text(0, "stderr"), outcome.text(1, "stderr")) == ("err 0\n", "err 1\n")


def test_output_comes_while_the_cell_runs(world: Ranks, tmp_path) -> None:
    flag = tmp_path / "go on"
    running = world.send(f"import os, time\nprint('begun')\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.01)")
    running.wait_for("begun", times=2)
    flag.touch()
    assert running.end().state == "finished"


def test_what_a_subprocess_and_low_level_code_write_is_the_cells(world: Ranks) -> None:
    outcome = world.ok(
        """
        import ctypes, os, subprocess, sys
        os.write(1, b"by os.write\\n")
        os.system("echo by os.system")
        subprocess.run([sys.executable, "-c", "import sys; print('by a subprocess', file=sys.stderr)"], check=True)
        libc = ctypes.CDLL(None)
        libc.puts(b"by puts")
        libc.fflush(None)
        """
    )
    for rank in (0, 1):
        assert {"by os.write", "by os.system", "by puts"} <= set(outcome.text(rank).splitlines())
        assert outcome.text(rank, "stderr") == "by a subprocess\n"


def test_one_print_may_be_longer_than_any_message(world: Ranks) -> None:
    """It leaves in pieces: nobody has to take all of it at once."""
    num_chars = MAX_HEADER + 1_000_000
    outcome = world.ok(f"print('x' * {num_chars} + 'the end')", ranks=[1])
    pieces = [record["text"] for _, record in outcome.logs if record["kind"] == "stdout"]
    assert sum(map(len, pieces)) == num_chars + len("the end\n") and "".join(pieces[-2:]).endswith("the end\n")
    assert max(map(len, pieces)) <= 2 * MAX_PENDING


def test_a_display_that_is_too_large_says_so_and_harms_nobody(world: Ranks) -> None:
    outcome = world.ok("from IPython.display import HTML, display\ndisplay(HTML('x' * 9_000_000))\n'next'", ranks=[1])
    assert "A display of 9 MB" in outcome.text(1, "stderr") and "write it to a file" in outcome.text(1, "stderr")
    several = world.ok("for _ in range(3): display(HTML('\u00fc' * 8_000_000))\n'next'", ranks=[1])
    assert (
        sum(len(record["data"]["text/html"]) for _, record in several.logs if record["kind"] == "display") == 24_000_000
    )


def test_a_warning_is_shown_with_its_line(world: Ranks) -> None:
    outcome = world.ok("import warnings\nwarnings.warn('mind the gap')", ranks=[0])
    assert "UserWarning: mind the gap" in outcome.text(kind="stderr")


def test_logging_writes_to_the_cell(world: Ranks) -> None:
    outcome = world.ok("import logging\nlogging.getLogger('mine').warning('logged by %d', rank)", ranks=[1])
    assert "logged by 1" in outcome.text(kind="stderr")


def test_a_progress_bar_moves_the_runs_progress(world: Ranks) -> None:
    outcome = world.ok("from tqdm.auto import tqdm\nfor _ in tqdm(range(5), desc='work'): pass", ranks=[0])
    progress = [r for _, r in outcome.metrics if "progress" in r]
    assert progress[-1]["progress"] == [5, 5]
    assert progress[-1]["desc"] == "work"


def test_numbers_are_logged_and_what_is_no_number_is_left_out(world: Ranks) -> None:
    outcome = world.ok(
        """
        import torch
        run.log(loss=torch.tensor(0.5, requires_grad=True), name="no number", many=torch.ones(2), step=3)
        run.log({"nan": float("nan"), "inf": float("inf")})
        run.log(nothing="x")
        run.progress(1, 4, "quarter")
        """,
        ranks=[0],
    )
    first, second, third = (r for _, r in outcome.metrics)
    assert (first["step"], first["values"]) == (3, {"loss": 0.5})
    assert math.isnan(second["values"].pop("nan"))
    assert second["values"] == {"inf": math.inf}
    assert (third["progress"], third["desc"]) == ([1, 4], "quarter")


def test_strange_text_arrives_as_it_was_written(world: Ranks) -> None:
    outcome = world.ok("print('äß€😀', '\\x1b[31mred\\x1b[0m', '\\udc80', 'a\\rb', '\\u2028')", ranks=[0])
    assert outcome.text().startswith("äß€😀 \x1b[31mred\x1b[0m ")
    assert outcome.text().endswith("a\rb \u2028\n")
    assert "".join(r["text"] for _, r in outcome.folder.records("logs")) == outcome.text()


def test_bytes_that_are_no_text_do_not_hurt(world: Ranks) -> None:
    outcome = world.ok("import os\nos.write(1, b'\\xff\\xfe\\x00 bytes\\n')", ranks=[0])
    assert outcome.text().endswith(" bytes\n")


def test_a_flood_of_output_is_complete_and_in_order(world: Ranks) -> None:
    outcome = world.ok("for i in range(40_000): print(i)", ranks=[0])
    assert outcome.text() == "".join(f"{i}\n" for i in range(40_000))
    assert "".join(r["text"] for _, r in outcome.folder.records("logs")) == outcome.text()


def test_one_huge_write_is_complete_on_disk_too(world: Ranks) -> None:
    outcome = world.ok("print('x' * 9_000_000)\nprint('after')", ranks=[0])
    assert len(outcome.text()) == 9_000_007
    assert sum(len(r["text"]) for _, r in outcome.folder.records("logs")) == 9_000_007


def test_threads_of_a_cell_may_print(world: Ranks) -> None:
    outcome = world.ok(
        """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: print(f"line {i}"), range(200)))
        """,
        ranks=[0],
    )
    assert sorted(outcome.text().replace("line", "").split(), key=int) == [str(i) for i in range(200)]


def test_a_cell_ends_while_nobody_reads(new_world: Callable[..., Ranks]) -> None:
    ranks = new_world(1)
    running = ranks.send("for i in range(30_000): print('a line that nobody reads', i)")
    began = time.monotonic()
    until(lambda: running.outcome.folder.path.joinpath("run.json").exists(), "the run has a folder")
    until(lambda: not running.outcome.folder.read().is_active, "the run ends though its follower does not read")
    assert time.monotonic() - began < 15
    assert running.end().text().count("\n") == 30_000


def test_workers_of_a_loader_may_print_and_log(world: Ranks) -> None:
    outcome = world.ok(
        """
        import logging
        import torch
        from torch.utils.data import DataLoader

        shout = logging.getLogger("worker")
        shout.addHandler(logging.StreamHandler())

        class Talking(torch.utils.data.Dataset):
            def __len__(self): return 40
            def __getitem__(self, index):
                print(f"item {index}")
                shout.warning("at %d", index)
                return index

        for _ in range(3):
            print("mine", sum(len(batch) for batch in DataLoader(Talking(), batch_size=4, num_workers=2)))
        """
    )
    for rank in (0, 1):
        assert outcome.text(rank).count("item ") == 120
        assert outcome.text(rank, "stderr").count("at ") == 120
        assert outcome.text(rank).count("mine 40") == 3


def test_a_forked_child_may_print_a_flood(world: Ranks) -> None:
    outcome = world.ok(
        """
        import multiprocessing
        child = multiprocessing.get_context("fork").Process(target=lambda: [print("y" * 1000) for _ in range(500)])
        child.start()
        for _ in range(500): print("x" * 1000)
        child.join()
        """,
        ranks=[1],
    )
    assert (outcome.text().count("x"), outcome.text().count("y")) == (500_000, 500_000)


def test_text_of_a_subprocess_is_not_cut_inside_a_letter(world: Ranks) -> None:
    code = "import os\ntext = ('x' + '€' * 99_999).encode()\nwhile text: text = text[os.write(1, text):]"
    outcome = world.ok(code, ranks=[0])
    assert outcome.text() == "x" + "€" * 99_999


def test_whoever_asks_for_a_person_is_answered_at_once(world: Ranks) -> None:
    for code in (
        "input('name? ')",
        "import getpass; getpass.getpass()",
        "breakpoint()",
        "import pdb; pdb.set_trace()",
        "from IPython.core.debugger import set_trace; set_trace()",
        "import code; code.interact()",
        "%debug",
    ):
        outcome = world.run(code)
        assert outcome.state == "failed", code
        assert "has no keyboard on a rank" in outcome.error["evalue"], (code, outcome.error)
        assert "--push" in outcome.error["evalue"] or "%world locals" in outcome.error["evalue"]
        assert "no_stdin" not in "".join(outcome.error["traceback"])  # nobody asked for our lines


def test_a_debugger_that_is_on_does_not_hide_the_error(world: Ranks) -> None:
    outcome = world.run("%pdb on\n1 / 0")
    assert outcome.error["ename"] == "ZeroDivisionError"
    world.ok("%pdb off")


def test_a_command_that_asks_finds_that_there_is_nothing_to_read(world: Ranks) -> None:
    outcome = world.ok("cmd = 'a b'\n!cat; echo {cmd}\nlines = !cat\nprint(lines, _exit_code)", ranks=[0])
    assert outcome.text().splitlines() == ["a b", "[] 0"]


def test_bars_made_for_notebooks_are_text_on_a_rank(world: Ranks) -> None:
    outcome = world.ok(
        """
        import tqdm.notebook
        from tqdm.notebook import tqdm as bar, trange
        for _ in bar(range(5), desc="work", ncols="80%"): pass
        for _ in trange(3, display=False): pass
        for _ in tqdm.notebook.tqdm(range(2)): pass
        """,
        ranks=[0],
    )
    assert "work: 100%" in outcome.text(kind="stderr")
    assert not outcome.shown("display")
    assert outcome.metrics[-1][1]["progress"] == [2, 2]


def test_warnings_are_told_as_such_and_other_text_is_not(world: Ranks) -> None:
    outcome = world.ok(
        """
        import logging, sys, warnings
        warnings.warn("mind\\nthe gap")
        own = logging.getLogger("own")
        own.addHandler(logging.StreamHandler(sys.stdout))
        own.propagate = False
        own.warning("logged")
        own.error("an error")
        print("text", file=sys.stderr)
        """,
        ranks=[0],
    )
    told = [record["text"] for _, record in outcome.logs if record.get("warning")]
    assert len(told) == 2
    assert told[0].endswith('UserWarning: mind\nthe gap\n  warnings.warn("mind\\nthe gap")\n')
    assert told[1] == "logged\n"
    assert (outcome.text(), outcome.text(kind="stderr")) == ("logged\nan error\n", told[0] + "text\n")
