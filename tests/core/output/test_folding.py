"""Folding the output of ranks: text in, blocks out, time as an argument."""

from __future__ import annotations

import re
import time

import pytest

from jupyter_llmcloud.core.output.folding import OutputFolder

CAP_LINE = re.compile(r"… further output is in the full log: %runs logs \S+\n")


def text_of(blocks, kind=None):
    return "".join(block.text for block in blocks if kind in (None, block.kind))


def on_screen(blocks):
    """What a notebook shows after carriage returns have been carried out, without padding."""
    lines = []
    for line in text_of(blocks).split("\n"):
        row = ""
        for piece in line.split("\r"):
            row = piece + row[len(piece) :]
        lines.append(row.rstrip())
    return lines


def run(folder, *events, until=10.0):
    """Feed (now, rank, text[, kind]) and flush; every block shown."""
    blocks = []
    for now, rank, text, *kind in events:
        blocks += folder.feed(rank, *(kind or ["stdout"]), text, now)
    return blocks + folder.flush(until, final=True)


def test_a_run_of_one_rank_has_no_labels():
    folder = OutputFolder([0])
    assert text_of(folder.feed(0, "stdout", "hello\nworld\n", 0.0)) == "hello\nworld\n"


def test_a_single_rank_is_shown_at_once():
    assert OutputFolder([3]).feed(3, "stdout", "now\n", 5.0)[0].ranks == (3,)


def test_the_same_line_of_all_ranks_is_shown_once_as_soon_as_the_last_one_wrote_it():
    folder = OutputFolder([0, 1])
    assert folder.feed(0, "stdout", "loss 2.3\n", 0.0) == []
    (block,) = folder.feed(1, "stdout", "loss 2.3\n", 0.01)
    assert (block.text, block.ranks, block.kind) == ("[0-1] loss 2.3\n", (0, 1), "stdout")


def test_different_lines_are_labelled_with_their_rank_when_the_time_is_up():
    folder = OutputFolder([0, 1], hold_s=0.08)
    assert folder.feed(0, "stdout", "loss 2.3\n", 0.0) == []
    assert folder.feed(1, "stdout", "loss 2.4\n", 0.01) == []
    assert text_of(folder.flush(0.085)) == "[0] loss 2.3\n"
    assert text_of(folder.flush(0.095)) == "[1] loss 2.4\n"


def test_some_ranks_may_agree_while_others_differ():
    folder = OutputFolder([0, 1, 2, 3])
    blocks = run(folder, (0.0, 0, "a\n"), (0.0, 1, "b\n"), (0.0, 2, "a\n"), (0.0, 3, "a\n"))
    assert text_of(blocks) == "[0,2-3] a\n[1] b\n"


def test_a_line_of_one_rank_only_does_not_keep_the_others_from_folding():
    folder = OutputFolder([0, 1])
    blocks = run(folder, (0.0, 0, "A\nB\n"), (0.01, 1, "X\nA\nB\n"))
    assert text_of(blocks) == "[1] X\n[0-1] A\n[0-1] B\n"


def test_separators_between_different_lines_are_folded():
    folder = OutputFolder([0, 1])
    blocks = run(folder, (0.0, 0, "a0\n--\nb0\n--\n"), (0.0, 1, "a1\n--\nb1\n--\n"))
    assert text_of(blocks) == "[0] a0\n[1] a1\n[0-1] --\n[0] b0\n[1] b1\n[0-1] --\n"


def test_crossing_lines_keep_the_order_of_each_rank():
    folder = OutputFolder([0, 1])
    blocks = run(folder, (0.0, 0, "A\nB\nC\n"), (0.0, 1, "B\nA\nC\n"))
    lines = text_of(blocks).splitlines()
    for rank, expected in ((0, "ABC"), (1, "BAC")):
        assert "".join(line[-1] for line in lines if rank in ranks_of(line)) == expected


def ranks_of(line):
    first, _, last = re.match(r"\[(\d)(-(\d))?\]", line).group(1, 2, 3)
    return range(int(first), int(last or first) + 1)


def test_the_order_of_each_rank_survives_any_interleaving():
    import random

    choose = random.Random(3)
    for _ in range(200):
        folder = OutputFolder([0, 1], hold_s=0.05)
        said = {rank: [choose.choice("ABCD-") for _ in range(20)] for rank in (0, 1)}
        left = {rank: list(lines) for rank, lines in said.items()}
        blocks, now = [], 0.0
        while any(left.values()):
            rank = choose.choice([rank for rank in left if left[rank]])
            now += choose.random() * 0.03
            blocks += folder.feed(rank, "stdout", left[rank].pop(0) + "\n", now)
        lines = text_of(blocks + folder.flush(now, final=True)).splitlines()
        for rank in said:
            assert [line[-1] for line in lines if rank in ranks_of(line)] == said[rank]


def test_lines_of_a_rank_that_has_fallen_silent_are_not_waited_for_longer_than_the_hold():
    folder = OutputFolder([0, 1], hold_s=0.08)
    folder.feed(0, "stdout", "alone\n", 1.0)
    assert folder.next_deadline() == pytest.approx(1.08)
    assert text_of(folder.flush(1.08)) == "[0] alone\n"
    assert folder.next_deadline() is None


def test_stdout_and_stderr_are_kept_apart_and_in_the_order_of_the_rank():
    folder = OutputFolder([0, 1])
    events = [(0.0, rank, text, kind) for rank in (0, 1) for text, kind in (("x\n", "stdout"), ("x\n", "stderr"))]
    blocks = run(folder, *events)
    assert [(block.kind, block.text) for block in blocks] == [
        ("stdout", "[0-1] x\n"),
        ("stderr", "[0-1] x\n"),
    ]


def test_blank_and_whitespace_lines_are_preserved():
    folder = OutputFolder([0, 1])
    text = "a\n\n   \n\tb  \n"
    assert text_of(run(folder, (0.0, 0, text), (0.0, 1, text))) == "[0-1] a\n[0-1]\n[0-1]    \n[0-1] \tb  \n"
    assert text_of(run(OutputFolder([0]), (0.0, 0, text))) == text


def test_a_line_written_in_pieces_stays_whole():
    folder = OutputFolder([0, 1])
    blocks = run(folder, (0.0, 0, "lo"), (0.0, 1, "other\n"), (0.01, 0, "ss "), (0.02, 0, "1.5\n"))
    assert text_of(blocks) == "[1] other\n[0] loss 1.5\n"


def test_a_line_without_an_end_is_shown_in_passing_after_a_while_and_once_when_complete():
    folder = OutputFolder([0, 1], hold_s=0.08)
    assert folder.feed(0, "stdout", "Loading...", 1.0) == []
    assert folder.next_deadline() == pytest.approx(1.24)
    (passing,) = folder.flush(1.24)
    assert (passing.text, passing.passing) == ("\r[0] Loading...", True)
    blocks = [
        passing,
        *folder.feed(0, "stdout", " done\n", 3.0),
        *folder.feed(1, "stdout", "Loading... done\n", 3.0),
    ]
    assert on_screen(blocks) == ["[0-1] Loading... done", ""]


def test_text_left_without_an_end_is_shown_at_the_end():
    assert text_of(run(OutputFolder([0, 1]), (0.0, 0, "no end"))) == "[0] no end\n"
    assert text_of(run(OutputFolder([0]), (0.0, 0, "no end"))) == "no end\n"


def test_windows_line_ends_are_line_ends():
    assert text_of(run(OutputFolder([0]), (0.0, 0, "a\r\nb\r"), (0.0, 0, "\n"))) == "a\nb\n"


def test_a_progress_bar_shows_the_newest_state_of_one_rank_and_ends_as_a_line():
    folder = OutputFolder([0, 1], hold_s=0.08)
    blocks = []
    for step in range(1, 11):
        for rank in (0, 1):
            blocks += folder.feed(rank, "stderr", f"\r{step * 10}% of {rank}", step * 0.2)
    assert {block.ranks for block in blocks} == {(0,)}
    assert all(block.passing for block in blocks)
    assert on_screen(blocks) == ["[0] 100% of 0"]
    blocks += folder.feed(0, "stderr", "\n", 2.1) + folder.feed(1, "stderr", "\n", 2.1)
    blocks += folder.flush(2.5) + folder.flush(2.7)
    assert text_of(blocks, "stderr") == "[0] 100% of 0\n[1] 100% of 1\n"
    assert on_screen([block for block in blocks if block.kind == "stdout"]) == [""]


def test_lines_printed_beside_a_bar_write_over_it():
    folder = OutputFolder([0, 1], hold_s=0.08)
    blocks = folder.feed(0, "stderr", "\r 5%|#####     |", 0.0)
    blocks += folder.feed(0, "stdout", "x\n", 0.1) + folder.feed(1, "stdout", "x\n", 0.1)
    assert on_screen(blocks)[0] == "[0-1] x"


def test_nested_bars_that_move_the_cursor_up_do_not_end_the_outer_bar():
    folder = OutputFolder([0])
    blocks, now = [], 0.0
    for outer in range(2):
        for inner in range(3):
            now += 0.15
            blocks += folder.feed(0, "stderr", f"\router {outer}/2", now)
            for piece in ("\n", f"\rinner {inner}/3", "\x1b[A"):
                blocks += folder.feed(0, "stderr", piece, now)
    assert not [block for block in blocks if not block.passing]
    blocks += folder.feed(0, "stderr", "\router 2/2\n", now) + folder.flush(now + 1)
    assert "outer 2/2\n" in text_of(blocks, "stderr")
    assert text_of(blocks, "stderr").count("outer") == 1


def test_a_bar_that_wipes_itself_leaves_nothing():
    folder = OutputFolder([0])
    blocks = folder.feed(0, "stderr", "\r50%|####|", 0.0)
    blocks += folder.feed(0, "stderr", "\r          \r", 1.0) + folder.flush(2.0, final=True)
    assert [line for line in on_screen(blocks) if line] == []


def test_a_bar_rewrites_itself_a_bounded_number_of_times_however_long_it_runs():
    folder = OutputFolder([0])
    blocks = []
    for tick in range(36_000):
        blocks += folder.feed(0, "stderr", f"\r{tick} " + "#" * 70, tick * 0.1)
    assert len(text_of(blocks)) < 50_100
    assert 150 < len(blocks) < 650


def test_a_long_output_keeps_its_head_and_its_tail_and_says_how_much_is_between():
    folder = OutputFolder([0, 1], max_chars=1_000, name="demo")
    blocks = []
    for number in range(500):
        for rank in (0, 1):
            blocks += folder.feed(rank, "stdout", f"line {number}\n", number * 0.01)
    text = text_of(blocks + folder.flush(99.0, final=True))
    assert len(CAP_LINE.findall(text)) == 1
    shown = [line for line in text.split("\r")[-1].splitlines() if line.startswith("[0-1] line")]
    head, tail = text.partition("… further")[0], text.rpartition("[0-1] …\n")[2]
    num_head = head.count("[0-1] line")
    assert head.startswith("[0-1] line 0\n") and num_head > 20
    assert tail.splitlines()[-2] == "[0-1] line 499" and len(shown) >= 2
    num_left = 500 - num_head - tail.count("[0-1] line")
    assert tail.splitlines()[-1] == (
        f"… left out above: {num_left} lines of each of ranks 0-1. All of it: %runs logs demo"
    )


def test_a_rank_that_floods_the_cell_leaves_room_for_the_head_of_every_other_one():
    folder = OutputFolder(range(4), max_chars=8_000, name="demo")
    blocks = folder.feed(1, "stdout", "".join(f"flood {n}\n" for n in range(100_000)), 0.0) + folder.flush(1.0)
    for rank in (0, 2, 3):
        blocks += folder.feed(rank, "stdout", f"hello of {rank}\n", 2.0) + folder.flush(3.0)
    blocks += folder.feed(1, "stderr", "the end\n", 4.0)
    lines = on_screen(blocks + folder.flush(99.0, final=True))
    for line in ("[1] flood 0", "[0] hello of 0", "[2] hello of 2", "[3] hello of 3", "[1] flood 99999", "[1] the end"):
        assert lines.count(line) == 1, line
    assert re.fullmatch(r"… left out above: 99,\d\d\d lines of rank 1\. All of it: %runs logs demo", lines[-2])


def test_each_rank_keeps_a_tail_of_its_own():
    folder = OutputFolder([0, 1], max_chars=2_000, name="demo")
    blocks = []
    for number in range(300):
        for rank in (0, 1):
            blocks += folder.feed(rank, "stdout", f"rank {rank} line {number}\n", number * 0.5)
    text = text_of(blocks + folder.flush(999.0, final=True))
    for rank in (0, 1):
        assert f"[{rank}] rank {rank} line 0\n" in text
        assert f"[{rank}] …\n" in text and f"[{rank}] rank {rank} line 299\n" in text
    assert "lines of each of ranks 0-1" in text or ("of rank 0" in text and "of rank 1" in text)


def test_the_newest_line_is_shown_in_passing_while_the_rest_is_left_out():
    folder = OutputFolder([0], max_chars=1_000, name="demo")
    blocks = []
    for number in range(3_000):
        blocks += folder.feed(0, "stdout", f"step {number} of 3000\n", number * 1.0)
    assert re.fullmatch(r"step 2[6-9]\d\d of 3000", on_screen(blocks)[-1])
    assert len(text_of(blocks)) < 5_000


@pytest.mark.parametrize("num_over", [1, 15])
def test_what_the_end_shows_whole_is_not_said_to_be_left_out(num_over):
    folder = OutputFolder([0], max_chars=1_000, name="demo")
    fits = 0
    while "full log" not in text_of(run(OutputFolder([0], max_chars=1_000), (0.0, 0, "word\n" * (fits + 1)))):
        fits += 1
    text = text_of(run(folder, (0.0, 0, "".join(f"{n:04d}\n" for n in range(fits + num_over)))))
    assert [line for line in text.splitlines() if line.isdigit()][-1] == f"{fits + num_over - 1:04d}"
    assert ("left out" in text) == (num_over > 5)


def test_a_line_that_is_torn_where_nobody_takes_it_apart_any_more_is_whole_at_the_end():
    folder = OutputFolder([0], max_chars=1_000, name="demo")
    events = [(0.0, 0, "x\n" * 1_500 + "be"), (0.1, 0, "gun\n"), (0.2, 0, "er", "stderr"), (0.3, 0, "ror\n", "stderr")]
    assert on_screen(run(folder, *events))[-4:-2] == ["begun", "error"]


def test_a_bar_that_is_left_out_ends_as_one_line():
    folder = OutputFolder([0], max_chars=200, name="demo")
    events = [(0.0, 0, "x\n" * 500), *((1.0 + n, 0, f"\rbar {n}%") for n in range(100)), (200.0, 0, "\n")]
    lines = [line for line in on_screen(run(folder, *events, until=300.0)) if line.startswith("bar")]
    assert lines == ["bar 99%"]


def test_an_error_is_shown_even_after_the_cap():
    folder = OutputFolder([0, 1], max_chars=100, name="demo")
    folder.feed(0, "stdout", "x\n" * 1_000, 0.0)
    folder.flush(1.0)
    folder.feed_rich(1, {"kind": "error", "ename": "ValueError", "evalue": "no"}, 2.0)
    (block,) = [block for block in folder.flush(3.0) if not block.passing]
    assert (block.kind, block.ranks, block.record["ename"]) == ("error", (1,), "ValueError")


def test_a_line_longer_than_the_cell_is_cut():
    folder = OutputFolder([0], max_chars=10_000, name="demo")
    text = text_of(run(folder, (0.0, 0, "x" * 50_000), (0.0, 0, "\nafter\n")))
    assert text.startswith("x" * 9_000)
    assert CAP_LINE.search(text)
    assert "\nafter\n" in text and len(text) < 12_000


@pytest.mark.parametrize("chunk", [64, 4096, 1 << 20], ids=str)
@pytest.mark.alone
def test_ten_megabytes_cost_well_under_a_second(chunk):
    text = "".join(f"step {n} loss {n / 7:.6f} some more words to fill the line\n" for n in range(1 << 18))[: 10 << 20]
    chunks = [text[at : at + chunk] for at in range(0, len(text), chunk)]
    folder = OutputFolder([0, 1])
    began = time.process_time()
    for number, piece in enumerate(chunks):
        folder.feed(0, "stdout", piece, number * 1e-4)
        folder.feed(1, "stdout", piece, number * 1e-4)
    folder.flush(99.0, final=True)
    assert time.process_time() - began < 1.5


@pytest.mark.alone
def test_the_cost_of_a_line_does_not_grow_with_what_was_shown_before():
    folder = OutputFolder([0, 1], max_chars=1 << 40)

    def cost(first):
        began = time.process_time()
        for number in range(first, first + 20_000):
            for rank in (0, 1):
                folder.feed(rank, "stdout", f"step {number}\n", number * 0.001)
        return time.process_time() - began

    early = cost(0)
    for part in range(1, 4):
        cost(part * 20_000)
    assert cost(100_000) < 3 * early + 0.1


@pytest.mark.alone
def test_a_line_written_byte_by_byte_is_not_joined_again_and_again():
    folder = OutputFolder([0, 1])
    began = time.process_time()
    for number in range(100_000):
        folder.feed(0, "stdout", "x", number * 1e-5)
    assert time.process_time() - began < 1.5


def display(data, **more):
    return {"seq": 1, "t": 0.0, "kind": "display", "data": data, "metadata": {}, **more}


def test_identical_displays_of_several_ranks_are_shown_once_with_a_label():
    folder = OutputFolder([0, 1])
    assert folder.feed_rich(0, display({"image/png": "AAAA"}), 0.0) == []
    (block,) = folder.feed_rich(1, display({"image/png": "AAAA"}) | {"seq": 7, "t": 3.0}, 0.01)
    assert (block.kind, block.label, block.ranks) == ("display", "[0-1]", (0, 1))
    assert block.record["data"] == {"image/png": "AAAA"}


def test_different_results_are_shown_for_each_rank_with_text_to_fall_back_on():
    folder = OutputFolder([0, 1])
    for rank in (0, 1):
        folder.feed_rich(rank, {"kind": "result", "data": {"text/plain": f"{rank}\nmore"}}, 0.0)
    blocks = folder.flush(1.0)
    assert [(block.kind, block.text) for block in blocks] == [
        ("result", "[0] 0\n[0] more\n"),
        ("result", "[1] 1\n[1] more\n"),
    ]


def test_a_display_stays_between_the_lines_printed_before_and_after_it():
    folder = OutputFolder([0])
    blocks = folder.feed(0, "stdout", "before", 0.0)
    blocks += folder.feed_rich(0, display({"text/html": "<b>x</b>"}), 0.0)
    blocks += folder.feed(0, "stdout", "after\n", 0.0)
    assert [block.text or block.kind for block in blocks] == ["before\n", "display", "after\n"]


def test_figures_have_a_budget_of_their_own():
    folder = OutputFolder([0], max_chars=1_000)
    shown = []
    for number in range(10):
        shown += folder.feed_rich(0, display({"image/png": str(number) * 1_000_000}), 0.0)
    assert sum(block.kind == "display" for block in shown) == 4
    assert folder.num_dropped_rich == 6
    assert CAP_LINE.search(text_of(shown)) or "%runs logs" in text_of(shown)


def test_a_display_that_updates_itself_is_not_counted_again():
    folder = OutputFolder([0])
    record = display({"text/html": "x" * 1_000_000}, display_id="d", update=True)
    assert sum(len(folder.feed_rich(0, record | {"n": n}, 0.0)) for n in range(10)) == 10


def test_a_rank_that_joins_later_is_folded_too():
    folder = OutputFolder([0])
    blocks = run(folder, (0.0, 1, "a\n"), (0.0, 0, "a\n"))
    assert text_of(blocks) == "[0-1] a\n"


# --- what terminals can ---


def test_rows_are_final_only_when_a_hidden_cursor_is_shown_again():
    """As rich draws: two bars, rewritten from below a few times a second."""
    folder = OutputFolder([0])
    blocks = folder.feed(0, "stdout", "\x1b[?25l", 0.0)
    for step in range(4):
        back = "\r\x1b[2K\x1b[1A\x1b[2K" if step else ""
        blocks += folder.feed(0, "stdout", f"{back}a {step}/3\nb {step}/3", step * 0.5)
    blocks += folder.feed(0, "stdout", "\n\x1b[?25h", 2.0) + folder.flush(3.0)
    blocks += folder.feed(0, "stdout", "after\n", 3.5) + folder.flush(4.0, final=True)
    assert [line for line in on_screen(blocks) if line] == ["a 3/3", "b 3/3", "after"]


def test_a_cursor_that_stays_hidden_loses_nothing():
    folder = OutputFolder([0])
    blocks = run(folder, (0.0, 0, "\x1b[?25l" + "".join(f"line {n}\n" for n in range(200))))
    assert [line for line in on_screen(blocks) if line] == [f"line {n}" for n in range(200)]


def test_backspaces_and_erased_lines_are_carried_out():
    folder = OutputFolder([0])
    blocks = run(
        folder,
        (0.0, 0, "step 1" + "\b" * 6 + "step 2\n"),
        (0.1, 0, "1/2 [=>..]\r2/2 [====]\x1b[K\n"),
        (0.2, 0, "gone\x1b[2K\rend\n"),
    )
    assert [line for line in on_screen(blocks) if line] == ["step 2", "2/2 [====]", "end"]


def test_an_escape_sequence_in_two_pieces_is_one():
    folder = OutputFolder([0])
    assert (
        text_of(run(folder, (0.0, 0, "a\nb\n\x1b["), (0.01, 0, "31mred\x1b"), (0.02, 0, "[0m\n")))
        == "a\nb\n\x1b[31mred\x1b[0m\n"
    )


def test_a_color_ends_with_the_line_of_its_rank():
    folder = OutputFolder([0, 1])
    blocks = run(folder, (0.0, 0, "\x1b[31mred\nplain\n"), (0.0, 1, "mine\n"))
    assert "[0] \x1b[31mred\x1b[0m\n" in text_of(blocks)


def test_control_characters_do_not_reach_the_notebook():
    text = text_of(run(OutputFolder([0]), (0.0, 0, "a\x00b\x07\x1bc\td \u202e\U0001f600\n")))
    assert text == "a\ufffdb\ufffd\ufffdc\td \u202e\U0001f600\n"


def test_lines_in_passing_may_be_left_out():
    folder = OutputFolder([0])
    folder.shows_passing = False
    assert folder.feed(0, "stderr", "\r50%", 0.0) + folder.flush(5.0) == []
    assert folder.next_deadline() is None
    folder.shows_passing = True
    assert on_screen(folder.flush(5.0)) == ["50%"]


# --- warnings ---


def test_a_warning_is_shown_once_however_far_apart_the_ranks_say_it():
    folder = OutputFolder([0, 1, 2])
    text = 'cell.py:3: UserWarning: mind\nthe gap\n  warn("mind\\nthe gap")\n'
    blocks = []
    for rank, now in ((1, 0.0), (0, 1.0), (2, 9.0)):
        blocks += folder.feed_warning(rank, "stderr", text, now) + folder.flush(now + 0.5)
    assert text_of(blocks, "stderr") == "".join(f"[1] {line}\n" for line in text.splitlines())


def test_a_warning_that_a_rank_says_again_is_shown_again_once():
    folder = OutputFolder([0, 1])
    blocks = []
    for now in range(3):
        for rank in (0, 1):
            blocks += folder.feed_warning(rank, "stderr", "again\n", now + rank * 0.5) + folder.flush(
                now + rank * 0.5 + 0.4
            )
    assert text_of(blocks) == "[0] again\n" * 3


def test_warnings_that_come_together_name_all_their_ranks():
    folder = OutputFolder([0, 1])
    blocks = folder.feed_warning(0, "stderr", "once\n", 0.0) + folder.feed_warning(1, "stderr", "once\n", 0.1)
    assert text_of(blocks) == "[0-1] once\n"


def test_warnings_of_native_code_are_equal_whenever_and_by_whomever_they_were_written():
    folder = OutputFolder([0, 1])
    blocks = []
    for rank, now in ((0, 0.0), (1, 5.0)):
        line = f"[rank{rank}]:[W1122 11:03:0{rank}.5{rank}1 Group.cpp:512] Warning: slow\n"
        blocks += folder.feed(rank, "stderr", line, now) + folder.flush(now + 1)
    assert text_of(blocks) == "[0] [W1122 11:03:00.501 Group.cpp:512] Warning: slow\n"


def test_lines_that_differ_in_their_time_only_are_folded():
    folder = OutputFolder([0, 1])
    blocks = run(
        folder,
        (0.0, 0, "2026-11-22 11:03:00,123 INFO ready\n", "stderr"),
        (0.0, 1, "2026-11-22 11:03:00,456 INFO ready\n", "stderr"),
    )
    assert text_of(blocks) == "[0-1] 2026-11-22 11:03:00,123 INFO ready\n"


# --- taking back ---


def clear(wait=True):
    return {"kind": "clear_output", "wait": wait}


def test_ranks_that_clear_together_are_one_block():
    folder = OutputFolder([0, 1])
    assert folder.feed_rich(0, clear(), 0.0) == []
    (block,) = folder.feed_rich(1, clear(), 0.1)
    assert (block.kind, block.ranks, block.record["wait"]) == ("clear_output", (0, 1), True)


def test_what_was_taken_back_leaves_room_for_more():
    folder = OutputFolder([0], max_chars=1_000, name="demo")
    blocks = []
    for number in range(100):
        blocks += folder.feed_rich(0, clear(), number)
        blocks += folder.feed(0, "stdout", f"{number} " + "x" * 800 + "\n", number)
        blocks += folder.feed_rich(0, display({"image/png": "A" * 1_000_000}), number)
    assert folder.num_dropped_lines == folder.num_dropped_rich == 0
    assert "full log" not in text_of(blocks)


def test_room_comes_back_when_a_full_cell_is_cleared():
    folder = OutputFolder([0, 1], max_chars=1_000)
    folder.feed(0, "stdout", "x\n" * 1_000, 0.0)
    assert "full log" in text_of(folder.flush(1.0))
    for rank in (0, 1):
        folder.feed_rich(rank, clear(), 2.0)
    assert text_of(run(folder, (3.0, 0, "again\n"))) == "[0] again\n"


def test_what_one_rank_clears_does_not_make_room_for_what_others_said():
    folder = OutputFolder([0, 1], max_chars=1_000)
    folder.feed(1, "stdout", "y\n" * 30, 0.0)
    folder.flush(1.0)
    folder.feed_rich(0, clear(), 2.0)
    assert "full log" in text_of(run(folder, (5.0, 0, "x\n" * 20)))


def test_displays_that_will_be_updated_are_folded_and_tell_the_id_of_each_rank():
    folder = OutputFolder([0, 1])
    for update in ({}, {"update": True}):
        folder.feed_rich(0, display({"text/plain": f"{update}"}, display_id="aaa", **update), 0.0)
        (block,) = folder.feed_rich(1, display({"text/plain": f"{update}"}, display_id="bbb", **update), 0.0)
        assert (block.ranks, block.display_ids) == ((0, 1), {0: "aaa", 1: "bbb"})
