"""Where a process crashed, from the stacks that it has printed."""

from __future__ import annotations

from jupyter_llmcloud.core.run.stacks import crash_place, shortened_crash

CELLS = {"/tmp/ipykernel_1/22.py": 4}
DUMP = """before
Fatal Python error: Segmentation fault

Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/x/jupyter_llmcloud/training/rank.py", line 187 in _listen

{head} 0x00007f02 (most recent call first):
  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at
  File "/tmp/ipykernel_1/22.py", line 7 in step
  File "/tmp/ipykernel_1/22.py", line 9 in <module>
  File "/x/IPython/core/interactiveshell.py", line 3823 in run_code

Extension modules: numpy (total: 1)
"""


def test_the_innermost_line_of_a_cell_is_where_it_was() -> None:
    assert crash_place(DUMP.format(head="Current thread"), CELLS) == "In [4], line 7 in step"


def test_a_crash_in_a_thread_of_c_is_placed_by_the_thread_that_executes_the_cell() -> None:
    assert crash_place(DUMP.format(head="Thread"), CELLS) == "In [4], line 7 in step"


def test_without_a_dump_or_a_cell_in_it_nothing_is_said() -> None:
    assert crash_place('  File "/tmp/ipykernel_1/22.py", line 7 in step', CELLS) == ""
    assert crash_place(DUMP.format(head="Current thread"), {}) == ""


def test_a_crash_is_shown_without_what_is_not_the_users() -> None:
    shown = shortened_crash(DUMP.format(head="Current thread"))
    assert shown.splitlines() == [
        "before",
        "Fatal Python error: Segmentation fault",
        "",
        "Current thread 0x00007f02 (most recent call first):",
        '  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at',
        '  File "/tmp/ipykernel_1/22.py", line 7 in step',
        '  File "/tmp/ipykernel_1/22.py", line 9 in <module>',
    ]
    assert shortened_crash("Fatal Python error: Aborted\n\n<no Python frame>\n") == (
        "Fatal Python error: Aborted\n\n<no Python frame>\n"
    )
