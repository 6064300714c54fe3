"""Stacks of all ranks as text: what is equal is said once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.core.names import format_ranks
from jupyter_llmcloud.core.run.hang import ProcessSample, describe_state

_FRAME = re.compile(r'  File "(.+)", line (\d+|\?\?\?) in (.+)')
_OURS = re.compile(r"/jupyter_llmcloud/training/(rank|output/sender|diagnostics/watchdog|shell/interrupts)\.py")
_FATAL = "Fatal Python error: "
_SHELL = "/IPython/core/interactiveshell.py"


def fold_stacks(rows: Mapping[int, Mapping[str, Any]], cells: Mapping[str, int]) -> list[str]:
    """Lines to show.

    Args:
        rows: by rank, either {"main": lines, "threads": {name: lines}, "op"} of a rank that answers, or
            {"state", "busy", "dump"} of one that does not.
        cells: execution counts by the files of notebook cells, for the dumps.
    """
    folded: dict[tuple[str, ...], list[int]] = {}
    for rank, row in sorted(rows.items()):
        folded.setdefault(tuple(_lines(row, cells)), []).append(rank)
    out: list[str] = []
    for lines, ranks in folded.items():
        head, *body = lines
        out += [f"rank{'s' if len(ranks) > 1 else ''} {format_ranks(ranks)}: {head}", *(f"  {line}" for line in body)]
    return out


def _lines(row: Mapping[str, Any], cells: Mapping[str, int]) -> list[str]:
    """The first line says what the rank does, the others where."""
    if "main" not in row:
        return _silent_lines(row, cells)
    main = list(row["main"])
    head = f"in {row['op']}" if row.get("op") else "running" if main else "idle"
    lines = [head, *main]
    for name, frames in sorted(row["threads"].items()):
        lines += [f"thread {name}:", *(f"  {frame}" for frame in frames)]
    return lines


def _silent_lines(row: Mapping[str, Any], cells: Mapping[str, int]) -> list[str]:
    if not row.get("state"):
        return ["its process has gone"]
    lines = [describe_state(ProcessSample(row["state"], 0.0, bool(row.get("busy"))))]
    for thread in parse_dump(str(row.get("dump", "")), cells):
        lines += thread if len(lines) == 1 else ["another thread:", *(f"  {frame}" for frame in thread)]
    return lines


def parse_dump(text: str, cells: Mapping[str, int]) -> list[list[str]]:
    """The threads of a faulthandler dump, the main one first, each with its outermost frame first; ours left out."""
    threads: list[list[str]] = []
    for part in re.split(r"^(?:Thread|Current thread) .*\n", text, flags=re.MULTILINE)[1:]:
        frames = [match.groups() for match in map(_FRAME.match, part.splitlines()) if match]
        cut = next((index for index, frame in enumerate(frames) if _SHELL in frame[0]), None)
        if cut is None and any(_OURS.search(frame[0]) for frame in frames):
            continue
        lines = [_frame(file, line, name, cells) for file, line, name in frames[:cut]][::-1]
        if lines:
            threads.insert(0 if cut is not None else len(threads), lines)
    return threads


def crash_place(text: str, cells: Mapping[str, int]) -> str:
    """Where the notebook's code was when a process crashed, from the last dump of faulthandler in what it printed.

    "" where no cell is in it.
    """
    dump = text.rpartition(_FATAL)[2] if _FATAL in text else ""
    parts = re.split(r"^((?:Thread|Current thread) .*\n)", dump, flags=re.MULTILINE)[1:]
    threads = sorted(zip(parts[::2], parts[1::2], strict=True), key=lambda pair: not pair[0].startswith("Current"))
    for match in (match for _, body in threads for match in map(_FRAME.match, body.splitlines()) if match):
        filename, line, name = match.groups()
        if filename in cells:
            return _frame(filename, line, name, cells)
    return ""


def is_crash(text: str) -> bool:
    """Whether this is the begin of what faulthandler prints when a process crashes."""
    return _FATAL in text


def shortened_crash(text: str) -> str:
    """What a process printed when it crashed, without our threads, IPython's frames and the names of all modules."""
    before, fatal, dump = text.rpartition(_FATAL)
    kind, *parts = re.split(r"^((?:Thread|Current thread) .*\n)", dump, flags=re.MULTILINE)
    out = [before, fatal, kind]
    for head, body in zip(parts[::2], parts[1::2], strict=True):
        frames, rest = _leading_frames(body.splitlines(keepends=True))
        cut = next((index for index, line in enumerate(frames) if _SHELL in line), None)
        if cut is not None or not any(map(_OURS.search, frames)):
            out += [head, *frames[:cut], *([] if head.startswith("Current") else ["\n"])]
        out += [line for line in rest if line.strip() and not line.startswith("Extension modules: ")]
    return "".join(out)


def _leading_frames(lines: list[str]) -> tuple[list[str], list[str]]:
    end = next((index for index, line in enumerate(lines) if not line.startswith("  ")), len(lines))
    return lines[:end], lines[end:]


def place(number: int, filename: str, line: int | str) -> str:
    """A line as its reader knows it: of a notebook cell by its execution count, of a script (0) by its file."""
    return f"In [{number}], line {line}" if number else f"{short_path(filename)}:{line}"


def _frame(filename: str, line: str, name: str, cells: Mapping[str, int]) -> str:
    where = place(cells.get(filename, 0), filename, line)
    return where if name == "<module>" else f"{where} in {name}"


def short_path(filename: str) -> str:
    """`.../site-packages/torch/x.py` -> `torch/x.py`."""
    for folder in ("/site-packages/", "/dist-packages/"):
        if folder in filename:
            return filename.rpartition(folder)[2]
    return re.sub(r"^.*/lib/python3\.\d+/", "", filename)
