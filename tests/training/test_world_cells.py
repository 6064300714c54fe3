"""A cell on the ranks behaves as it does in the notebook: names, magics, results, displays, line numbers."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path

from tests.support.worlds import AgentProcess, Outcome, Ranks


def traceback_of(outcome: Outcome) -> str:
    """The culprit's traceback without its colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(outcome.error["traceback"]))


def test_a_rank_collects_garbage_although_the_imports_before_it_did_not(world: Ranks) -> None:
    assert world.ok("import gc\ngc.isenabled(), gc.get_freeze_count() > 100_000").results() == ["(True, True)"] * 2


def test_variables_persist_between_cells(world: Ranks) -> None:
    world.ok("kept = [rank, world_size]")
    assert world.ok("kept").results() == ["[0, 2]", "[1, 2]"]


def test_a_rank_knows_who_it_is_and_where_it_runs(world: Ranks) -> None:
    outcome = world.ok(
        """
        import os
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        print(rank, local_rank, world_size, device, *(os.environ[name] for name in names), run.rank, run.world_size)
        """
    )
    assert outcome.text(0) == "0 0 2 cpu 0 0 2 2 0 2\n"
    assert outcome.text(1) == "1 1 2 cpu 1 1 2 2 1 2\n"


def test_the_run_of_a_rank_is_also_that_of_the_imported_package(world: Ranks) -> None:
    """`lc.run` was the quiet one of a notebook there, so that what it logged was lost without a word."""
    outcome = world.ok("import jupyter_llmcloud as lc\nfrom jupyter_llmcloud import run as mine\nlc.run is run is mine")
    assert outcome.results() == ["True", "True"]


def test_the_last_expression_is_a_result_of_each_rank(world: Ranks) -> None:
    assert world.ok("print('first')\nrank * 10").results() == ["0", "10"]


def test_an_assignment_or_a_semicolon_shows_nothing(world: Ranks) -> None:
    assert world.ok("quiet = 5").results() == []
    assert world.ok("quiet;").results() == []


def test_a_shell_command_writes_to_the_cell_and_gives_its_lines(world: Ranks) -> None:
    outcome = world.ok("!echo from $rank\nlines = !echo one; echo two\nprint(list(lines))")
    assert "from 1" in outcome.text(1)
    assert "['one', 'two']" in outcome.text(0)


def test_line_and_cell_magics_work(world: Ranks) -> None:
    outcome = world.ok("%who_ls str\n%env LLMCLOUD_NO_SUCH=7\nimport os; print(os.environ['LLMCLOUD_NO_SUCH'])")
    assert outcome.text(0).endswith("7\n")


def test_an_unknown_magic_is_named(world: Ranks) -> None:
    assert "%no_such_magic" in str(world.run("%no_such_magic").logs)


def test_time_as_the_first_line_of_the_body_times_it(world: Ranks) -> None:
    outcome = world.ok("%%time\ntimed = rank + 5\ntimed")
    assert "Wall time" in outcome.text(0)
    assert outcome.results() == ["5", "6"]
    assert world.ok("timed").results() == ["5", "6"]


def test_await_works_at_the_top_level(world: Ranks) -> None:
    outcome = world.ok("import asyncio\nasync def late(): await asyncio.sleep(0.01); return rank\nawait late()")
    assert outcome.results() == ["0", "1"]


def test_functions_and_classes_see_variables_of_later_cells(world: Ranks) -> None:
    world.ok("def read_later(): return made_later")
    assert world.ok("made_later = 'yes'\nread_later()").results() == ["'yes'", "'yes'"]


def test_a_display_and_its_update_keep_their_id(world: Ranks) -> None:
    outcome = world.ok(
        """
        from IPython.display import HTML, display
        handle = display(HTML("<b>1</b>"), display_id=True)
        handle.update(HTML("<b>2</b>"))
        """
    )
    first, second = (r for n, r in outcome.logs if n == 0 and r["kind"] == "display")
    assert (first["data"]["text/html"], second["data"]["text/html"]) == ("<b>1</b>", "<b>2</b>")
    assert first["display_id"] == second["display_id"]
    assert second["update"]


def test_a_cleared_output_is_told(world: Ranks) -> None:
    outcome = world.ok("from IPython.display import clear_output\nclear_output(wait=True)")
    assert [r["wait"] for _, r in outcome.logs if r["kind"] == "clear_output"] == [True, True]


def test_a_figure_is_shown_at_the_end_of_the_cell(world: Ranks) -> None:
    outcome = world.ok("import matplotlib.pyplot as plt\nif rank == 0: plt.plot([1, 2])", ranks=[0])
    [bundle] = outcome.shown("display")
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")


def test_a_figure_shown_on_purpose_comes_where_it_was_shown(world: Ranks) -> None:
    outcome = world.ok("import matplotlib.pyplot as plt\nplt.plot([2, 1]); plt.show(); print('after')", ranks=[1])
    kinds = [r["kind"] for _, r in outcome.logs]
    assert kinds == ["display", "stdout"]


def test_a_frame_comes_as_text_and_html(world: Ranks) -> None:
    [bundle] = world.ok("import pandas as pd\npd.DataFrame({'a': [1]})", ranks=[0]).shown("result")
    assert "<table" in bundle["text/html"]
    assert "a" in bundle["text/plain"]


def test_an_error_names_the_line_of_the_notebook(world: Ranks) -> None:
    outcome = world.run("fine = 1\n\ndef broken():\n    return 1 / (rank - rank)\n\nbroken()")
    assert outcome.state == "failed"
    text = traceback_of(outcome)
    assert "line 7" in text
    assert "line 5" in text
    assert "return 1 / (rank - rank)" in text
    assert outcome.error["ename"] == "ZeroDivisionError"


def test_an_error_in_a_function_of_an_earlier_cell_shows_that_cells_line(world: Ranks) -> None:
    world.ok("x0 = 0\n\ndef from_before():\n    raise LookupError('from before')")
    text = traceback_of(world.run("from_before()"))
    assert "raise LookupError('from before')" in text
    assert "line 5" in text


def test_an_error_under_time_names_the_line_of_the_notebook(world: Ranks) -> None:
    text = traceback_of(world.run("%%time\nfine = 1\n1 / 0"))
    assert re.search(r"<timed exec>:4|<timed exec>, line 4|line 4", text)
    assert "1 / 0" in text


def test_an_error_under_capture_names_the_line_of_the_notebook(world: Ranks) -> None:
    outcome = world.run("%%capture out\nfine = 1\n\n1 / 0", ranks=[0])
    text = re.sub(r"\x1b\[[\d;]*m", "", outcome.text(kind="stderr"))
    assert outcome.state == "finished"  # as in the notebook: %%capture goes on
    assert "line 5" in text
    assert "----> 5 1 / 0" in text
    assert "line 4" in traceback_of(world.run("fine = 2\n\n1 / 0"))


def test_a_cell_that_is_only_a_comment_finishes(world: Ranks) -> None:
    assert world.ok("# nothing").results() == []


def test_help_of_an_object_is_text(world: Ranks) -> None:
    outcome = world.ok("len?", ranks=[0])
    assert "Return the number of items" in str(outcome.logs)


def test_the_seed_makes_ranks_alike(world: Ranks) -> None:
    code = "import random, numpy, torch\n(random.random(), float(numpy.random.rand()), torch.rand(1).item())"
    first, second = world.ok(code, seed=3).results()
    assert first == second
    assert world.ok(code, seed=3).results() == [first, second]


def test_without_a_seed_ranks_draw_differently(new_world: Callable[..., Ranks]) -> None:
    first, second = new_world().ok("import random, numpy\n(random.random(), float(numpy.random.rand()))").results()
    assert first.strip("()").split(",")[0] != second.strip("()").split(",")[0]
    assert first.strip("()").split(",")[1] != second.strip("()").split(",")[1]


def test_a_missing_keyboard_is_explained(world: Ranks) -> None:
    outcome = world.run("answer = input('Who? ')")
    assert outcome.state == "failed"
    assert "--push" in outcome.error["evalue"]


def test_modules_beside_the_notebook_can_be_imported(node_agent: AgentProcess, tmp_path: Path) -> None:
    (tmp_path / "beside_the_notebook.py").write_text("answer = 42\n")
    ranks = Ranks(node_agent, 1, cwd=str(tmp_path))
    try:
        assert ranks.ok("import beside_the_notebook, os\nbeside_the_notebook.answer").results() == ["42"]
        assert ranks.ok("os.getcwd()").results() == [repr(str(tmp_path))]
    finally:
        ranks.end()
