"""Processes that go on by themselves, with a log."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from jupyter_llmcloud.system.spawn import MAX_TAIL_BYTES, log_tail, open_log, spawn


def run(code: str, log: Path, **options: object) -> str:
    process = spawn([sys.executable, "-c", code], log, **options)  # type: ignore[arg-type]
    assert process.wait(30) == 0
    return log.read_text()


def test_it_leads_a_session_of_its_own_and_its_log_is_closed_to_others(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert run("import os; print(os.getsid(0) == os.getpid())", log) == "True\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_what_it_prints_goes_behind_what_is_there_or_in_its_place(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    run("print(1)", log)
    assert run("import sys; print(2); sys.stdout.flush(); print(3, file=sys.stderr)", log) == "1\n2\n3\n"
    assert run("print(4)", log, fresh_log=True) == "4\n"


def test_it_has_no_input_unless_it_is_given_some(tmp_path: Path) -> None:
    code = "import sys; print(repr(sys.stdin.read()))"
    assert run(code, tmp_path / "a.log") == "''\n"
    process = spawn([sys.executable, "-c", code], tmp_path / "b.log", takes_input=True)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(b"spec")
    assert process.wait(30) == 0 and (tmp_path / "b.log").read_text() == "'spec'\n"


def test_it_has_the_folder_environment_and_descriptors_that_it_is_given(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        code = f"import os; os.write({writing}, (os.getcwd() + os.environ['X']).encode())"
        spawn([sys.executable, "-c", code], tmp_path / "x.log", cwd=tmp_path, env={"X": "!"}, pass_fds=[writing])
        os.close(writing)
        assert os.read(reading, 1000).decode() == f"{tmp_path}!"
    finally:
        os.close(reading)


def test_the_end_of_a_log_is_what_it_said_last(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert log_tail(log) == ""
    log.write_bytes(b"x" * 10_000 + "é\n".encode() + b"the end\n")
    assert log_tail(log).endswith("xé\nthe end") and len(log_tail(log)) <= MAX_TAIL_BYTES
    with open_log(log) as fd:
        os.write(fd, b"\xff and more\n")
    assert log_tail(log).endswith("\N{REPLACEMENT CHARACTER} and more")
