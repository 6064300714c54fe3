"""A cell measured or rehearsed before it starts: `--dry-run` and `--rehearse`, in processes that are thrown away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.parallel.plan import ParallelPlan
from jupyter_llmcloud.core.preflight.findings import RankAct, RankStory, findings, is_stuck, wait_for_each_other
from jupyter_llmcloud.core.preflight.memory import RankMemory, describe, estimate, fits, plan_of
from jupyter_llmcloud.core.preflight.timeline import MeasuredStep
from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.system.spawn import log_tail, spawn

MODULES = "jupyter_llmcloud.training.preflight."
MEASURE_S = 600.0  # the first two steps take longer than this only on a machine that does something else
REHEARSAL_S = 300.0
SILENCE_S = 45.0  # a rank in a collective whose peer has written nothing for so long waits in vain
ON_ITS_WAY_S = 5.0  # what a rank has sent another has by then
POLL_S = 0.1
RANKS = 2
_NO_RUN = {"dry_run", "rehearse", "name"}  # nobody expects more of them
_ALWAYS = {"--push", "--args", "--precision", "--accelerate-config"}
_BY_DRY_RUN = {*_ALWAYS, "--plan", "--nproc"}


class CellText:
    """What is executed.

    Args:
        parts: dicts of filename, shown (how a line's place begins), line_offset and code; the cell is the last. Others
            may have arguments and a precision that are not the cell's.
        arguments: of its sys.argv.
        folder: where it runs; "" for here.
        pushed: pickled variables.
    """

    def __init__(
        self,
        parts: Sequence[Mapping[str, Any]],
        arguments: Sequence[str] = (),
        folder: str = "",
        pushed: bytes = b"",
    ) -> None:
        self.parts = list(parts)
        self.arguments = list(arguments)
        self.folder = folder
        self.pushed = pushed


@dataclass(frozen=True)
class Report:
    """What is shown, and whether the cell may be started as it is."""

    lines: list[str]
    is_good: bool = False


def dry_run(text: CellText, plan: str | None, world_size: int, precision: str | None) -> Report:
    """Lines that say what each rank would hold, whether it fits, and what to change. Nothing else is changed.

    Raises UsageError when the world does not take the plan.
    """
    chosen = plan_of(plan, world_size)
    for is_fake in (True, False):
        answer = _measured(text, world_size, chosen, precision or "no", is_fake)
        if answer.get("step"):
            step, budget = MeasuredStep(**answer["step"]), RankMemory(**answer["budget"])
            how = "worked out without memory" if is_fake else "measured with real tensors"
            lines = describe(step, chosen, world_size, budget, precision or "no")
            has_room = fits(estimate(step, chosen, world_size).peak, budget)
            return Report([f"Two steps of the cell, {how} on this machine:", *lines], has_room)
    if answer.get("too_large"):
        said = (
            "The first step needs more than half of this machine's memory in one process, and could not be worked out "
            "without it. Nothing more is known. --plan fsdp or a smaller batch make it smaller."
        )
        return Report([said])
    if "error" in answer:
        at = f"{answer['where']}: " if answer.get("where") else ""
        return Report([f"The cell fails before its second step: {at}{answer['error']}"])
    return Report(["The cell came to its end without two optimizer steps: there is nothing to measure."], True)


def _measured(text: CellText, world_size: int, plan: ParallelPlan, precision: str, is_fake: bool) -> dict[str, Any]:
    sharded = plan.text if "wrap" in plan.settings else "fsdp"  # what is advised where others have no room
    with _Workplace(text, world_size, precision, {"is_fake": is_fake, "sharded": sharded}) as place:
        process = place.start("measure", str(place.folder / "answer.json"))
        try:
            process.wait(MEASURE_S)
        except subprocess.TimeoutExpired:
            return {"error": f"two steps were not made within {MEASURE_S:g} s"}
        try:
            found: dict[str, Any] = json.loads((place.folder / "answer.json").read_text())
        except (OSError, ValueError):
            said = f"{log_tail(place.folder / 'measure.log')}"
            return {"error": f"the process that measured ended with status {process.returncode}. {said}"}
        return found


def rehearse(text: CellText, precision: str | None) -> Report:
    """Lines that say what would make ranks wait for each other, or that nothing was found."""
    with _Workplace(text, RANKS, precision or "no", {}) as place:
        request = json.loads(place.request.read_text()) | {"store": str(place.folder / "store")}
        place.request.write_text(json.dumps(request))
        journals = [place.folder / f"rank-{rank}.jsonl" for rank in range(RANKS)]
        processes = [place.start("rehearse", str(rank), str(path)) for rank, path in enumerate(journals)]
        stories, silent = _follow(processes, journals)
        found = findings(stories)
        if not found and silent:
            found = _said_of_silence(stories)
        failed = [story.end for story in stories.values() if "it failed in" in story.end]
        if found:
            lines = [f"  {line}" for line in found]
            return Report(["The rehearsal on 2 CPU ranks found:", *lines, "Nothing was trained."])
        if failed:
            said = f"The rehearsal on 2 CPU ranks: the cell fails by itself: {failed[0].removeprefix('it ')}."
            return Report([said])
        if any(story.end == "" for story in stories.values()):
            tail = log_tail(place.folder / "rehearse.log")
            said = f"The rehearsal did not come to an end, and nothing was found. Its output ends with: {tail}"
            return Report([said])
    return Report(["The rehearsal on 2 CPU ranks found nothing that would hang: " + _ended_how(stories)], True)


def _ended_how(stories: Mapping[int, RankStory]) -> str:
    num = sum(entry.kind == "together" for entry in stories[0].entries)
    steps = sum(entry.kind == "step" for entry in stories[0].entries)
    rest = "" if "end of the cell" in stories[0].end else " What comes after these steps was not rehearsed."
    return f"{steps} optimizer steps, {num} collectives in the same order on both.{rest}"


def _said_of_silence(stories: Mapping[int, RankStory]) -> list[str]:
    for rank, story in stories.items():
        waiting = [entry for entry in story.entries if entry.kind == "together" and not entry.ended]
        if waiting:
            return [f"{waiting[-1].where}: rank {rank} waits in {waiting[-1].what} and nothing goes on elsewhere."]
    return []


def _follow(
    processes: Sequence[subprocess.Popen[bytes]], journals: Sequence[Path]
) -> tuple[dict[int, RankStory], bool]:
    """Until all ranks have ended or can only wait; says whether nothing had happened for long."""
    begun = heard = time.monotonic()
    sizes: list[int] = []
    while True:
        over = [process.poll() is not None for process in processes]
        stories = {rank: read_story(path, over[rank]) for rank, path in enumerate(journals)}
        now = time.monotonic()
        if (known := [len(story.entries) for story in stories.values()]) != sizes:
            sizes, heard = known, now
        if all(over) or is_stuck(stories):
            return stories, False
        if now - heard > ON_ITS_WAY_S and wait_for_each_other(stories):
            return stories, False
        if (now - heard > SILENCE_S and any(sizes)) or now - begun > REHEARSAL_S:
            return stories, True
        time.sleep(POLL_S)


def read_story(path: Path, is_over: bool) -> RankStory:
    """A journal as what the rank did."""
    entries: dict[int, RankAct] = {}
    end = ""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError:
        lines = []
    for line in lines:
        try:
            about = json.loads(line)
        except ValueError:
            break  # being written
        if (number := about.get("ended")) in entries:
            entries[number] = RankAct(**{**_plain(entries[number]), "ended": True})
        elif about.get("kind") == "end":
            end = about["what"] if about["what"] else ("" if not about.get("enough") else "it was ended on purpose")
        elif "kind" in about:
            entries[about["number"]] = RankAct(
                about["kind"],
                about["what"],
                about["where"],
                about.get("shape", ""),
                tuple(about.get("group", ())),
                number=about["number"],
            )
    if is_over and not end:
        end = "its process has ended"
    return RankStory(list(entries.values()), end)


def _plain(entry: RankAct) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in ("kind", "what", "where", "shape", "group", "ended", "number")}


class _Workplace:
    """A folder and the processes that work there; both are gone behind the block, or when this process is killed."""

    def __init__(self, text: CellText, world_size: int, precision: str, more: Mapping[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="llmcloud-preflight-"))
        of_run = self.folder / "run"  # gone with the rest
        of_run.mkdir()
        self.request = self.folder / "request.json"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._alive = os.pipe()  # whose end tells the processes that this one was killed
        pushed = self.folder / "pushed"
        if text.pushed:
            pushed.write_bytes(text.pushed)
        about = {
            "parts": text.parts,
            "arguments": text.arguments,
            "folder": text.folder or os.getcwd(),
            "run_folder": str(of_run),
            "pushed": str(pushed) if text.pushed else "",
            "world_size": world_size,
            "precision": precision,
            "alive": self._alive[0],
            **more,
        }
        self.request.write_text(json.dumps(about))

    def __enter__(self) -> _Workplace:
        return self

    def start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A program of `training.preflight`, with what it prints in a log."""
        command = [sys.executable, "-m", MODULES + module, str(self.request), *arguments]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
        process = spawn(command, self.folder / f"{module}.log", env=environment, pass_fds=self._alive[:1])
        self._processes.append(process)
        return process

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for fd in self._alive:
            os.close(fd)
        shutil.rmtree(self.folder, ignore_errors=True)


def check_options(spec: RunSpec) -> list[str]:
    """Lines that name the options which change nothing here. Raises UsageError for those that exclude each other."""
    if spec.background:
        raise UsageError("--dry-run and --rehearse show what they find here: leave -b out.")
    given = ["--" + name.replace("_", "-") for name in spec.as_dict() if name not in _NO_RUN]
    lines = []
    for is_asked, what, used, why in (
        (spec.rehearse, "--rehearse", _ALWAYS, f"it runs on {RANKS} CPU ranks of this machine, from the beginning"),
        (spec.dry_run, "--dry-run", _BY_DRY_RUN, "it measures on this machine, from the beginning"),
    ):
        if is_asked and (ignored := [flag for flag in given if flag not in used]):
            lines.append(f"{what} ignores {', '.join(ignored)}: {why}.")
    return lines
