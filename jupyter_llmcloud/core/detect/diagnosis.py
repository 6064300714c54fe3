"""Why has a run failed? Ordered rules over what is left of it; what no rule knows stays unknown.

The order is that of certainty. What the operating system or the node agent saw of a process (a signal, the
out-of-memory killer, a host that has gone) comes before what exceptions say, an exception of a rank's own before the
echo that its end made in others, and a hang counts only when the run was ended during it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.detect.failure_texts import Meaning, read_text
from jupyter_llmcloud.core.names import name_ranks
from jupyter_llmcloud.core.run.end_report import own_errors
from jupyter_llmcloud.core.run.hang import ADVICE

CODE_ERROR = "code-error"
_SIGNAL = re.compile(r"ended by (?P<name>SIG\w+|signal \d+)")
_PEER = re.compile(r"connection (?:was )?(?:closed|reset) by peer \[(?P<address>[^\]]+)\]", re.IGNORECASE)
_OWN_CODE = frozenset(
    {
        "NameError", "UnboundLocalError", "AttributeError", "TypeError", "KeyError", "IndexError", "ZeroDivisionError",
        "AssertionError", "SyntaxError", "IndentationError", "RecursionError", "StopIteration", "NotImplementedError",
    }
)  # fmt: skip
_NATIVE_END = {
    "SIGSEGV": ("native-crash", "{who} crashed in native code (a memory access that is not allowed)."),
    "SIGABRT": ("native-crash", "{who} was ended by a native library that gave up."),
    "SIGILL": ("native-crash", "{who} met an instruction that its processor does not have."),
    "SIGFPE": ("native-crash", "{who} divided by zero in native code."),
    "SIGBUS": (
        "shared-memory-full",
        "{who} was ended by SIGBUS: shared memory (/dev/shm) is full, or a file was cut off.",
    ),
}
_GO_ON = "Look at the worker's host; with --max-restarts K a run goes on elsewhere from its last checkpoint."
_READ_LOG = "Read the last lines of its log (%runs logs NAME --rank N): the stack of the crash stands there."


_ARGUMENTS = Meaning(
    "arguments",
    "The script did not get the arguments that it asks for.",
    'Give them to the cell: %%distribute --args "--data FILE --lr 3e-4".',
)


@dataclass(frozen=True)
class Evidence:
    """What is left of a run that has ended.

    Attributes:
        state: of the run: failed, stopped, lost, finished.
        errors: as in RunRecord.errors, the culprit's first: `rank`, `ename`, `evalue`, `collateral`.
        hang: the last report of late ranks that had not gone on when the run ended: `text`, `late`, `waiting`.
        logs: by rank, the last lines that its process wrote.
    """

    state: str
    errors: Sequence[Mapping[str, Any]] = ()
    hang: Mapping[str, Any] = field(default_factory=dict)
    logs: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """Why a run has failed.

    Attributes:
        cause: a short name, such as `device-out-of-memory`.
        ranks: the culprits, as far as they are known.
        sentence: what has happened.
        action: what to do next.
    """

    cause: str
    ranks: tuple[int, ...]
    sentence: str
    action: str

    @property
    def is_told(self) -> bool:
        """Whether the cell has said all of it: an ordinary error by its traceback, a hang by its report."""
        return self.cause in (CODE_ERROR, "hang", "deadlock")


def diagnose(evidence: Evidence) -> Diagnosis | None:
    """The cause that the first rule knows; None for a run that has not failed, or whose cause is unknown."""
    if evidence.state == "stopped":
        return _hang(evidence.hang)
    if evidence.state not in ("failed", "lost"):
        return None
    errors = [dict(error) for error in evidence.errors if not error.get("interrupted")]
    own = [error for error in own_errors(errors) if not error.get("collateral")]  # one that is unknown stays so
    return (
        _lost_process([error for error in errors if not error.get("collateral")], evidence.logs)
        or _exceptions(own)
        or _hang(evidence.hang)
        or (None if own else _echoes([error for error in errors if error.get("collateral")]))
        or (_lost_run() if evidence.state == "lost" else None)
    )


# --- what was seen from outside ---


def _lost_process(errors: Sequence[Mapping[str, Any]], logs: Mapping[int, str]) -> Diagnosis | None:
    """A rank whose process has gone: the first one that tells more than that it was killed, else the first."""
    found = [diagnosis for error in errors if (diagnosis := _lost(error, logs))]
    return next((diagnosis for diagnosis in found if diagnosis.cause != "killed"), found[0] if found else None)


def _lost(error: Mapping[str, Any], logs: Mapping[int, str]) -> Diagnosis | None:
    rank, name, text = int(error["rank"]), str(error.get("ename", "")), str(error.get("evalue", ""))
    if name not in ("RankOutOfMemory", "RankLost", "RankKilled", "RankExited"):
        return None
    who = name_ranks([rank])
    if name == "RankOutOfMemory":
        action = "Use a smaller batch, fewer ranks on this host, or a host with more memory."
        return _diagnosis(
            "host-out-of-memory", [rank], f"{who} was ended by the out-of-memory killer of its host.", action
        )
    if meaning := read_text(text, who) or read_text(logs.get(rank, ""), who, native=True):
        return _told(meaning, [rank])
    if name == "RankLost":
        return _diagnosis(
            "host-lost", [rank], f"{who} was lost with the node agent or the host that it ran on.", _GO_ON
        )
    return _ended(rank, text)


def _ended(rank: int, text: str) -> Diagnosis:
    who, found = name_ranks([rank]), _SIGNAL.search(text)
    if found is None:
        action = "Look for a call of exit, or for a library that ends the process; its log has the last lines."
        return _diagnosis("exited", [rank], f"The process of {who} ended by itself.", action)
    signal = found["name"]
    if signal in _NATIVE_END:
        cause, sentence = _NATIVE_END[signal]
        return _diagnosis(cause, [rank], sentence.format(who=who), _READ_LOG)
    sentence = f"The process of {who} was ended by {signal} from outside."
    action = "Somebody or something on its host did that, often a memory limit: look at its log and the host's."
    return _diagnosis("killed", [rank], sentence, action)


def _lost_run() -> Diagnosis:
    sentence = "The node agent that led the run is gone, and no other one could take it over."
    return _diagnosis("host-lost", (), sentence, _GO_ON)


# --- what exceptions say ---


def _exceptions(errors: Sequence[Mapping[str, Any]]) -> Diagnosis | None:
    """The exception of the first rank that had one of its own, with all ranks that had the like."""
    for error in errors:
        if cause := _cause_of(error):
            ranks = [int(other["rank"]) for other in errors if _cause_of(other) == cause]
            return _exception(error, ranks)
    return None


def _cause_of(error: Mapping[str, Any]) -> str:
    if _is_of_argparse(error):
        return _ARGUMENTS.cause
    meaning = read_text(_text(error), "")
    if meaning is not None:
        return meaning.cause
    return CODE_ERROR if str(error.get("ename", "")) in _OWN_CODE else ""


def _is_of_argparse(error: Mapping[str, Any]) -> bool:
    """Whether the arguments of the command line were not what the script asks for: its usage is printed already."""
    left = error.get("ename") == "SystemExit" and error.get("evalue") == "2"
    return left and any("argparse.py" in line for line in error.get("traceback", ()))


def _exception(error: Mapping[str, Any], ranks: Sequence[int]) -> Diagnosis:
    if _is_of_argparse(error):
        return _diagnosis(_ARGUMENTS.cause, ranks, _ARGUMENTS.sentence, _ARGUMENTS.action)
    meaning = read_text(_text(error), name_ranks(ranks))
    if meaning is not None:
        return _told(meaning, ranks)
    place = f" at {error['place']}" if error.get("place") else ""
    sentence = f"{name_ranks(ranks)} raised {_short(_text(error))}{place}."
    return _diagnosis(CODE_ERROR, ranks, sentence, "The traceback shows the line.")


def _echoes(errors: Sequence[Mapping[str, Any]]) -> Diagnosis | None:
    """Only echoes are left: what broke the group is not on record, the echoes may name the peer or the disagreement."""
    if not errors:
        return None
    for error in errors:
        meaning = read_text(_text(error), name_ranks([int(error["rank"])]))
        if meaning is not None and meaning.cause != "connection-lost":
            return _told(meaning, [] if meaning.cause == "collective-mismatch" else [int(error["rank"])])
    ranks = [int(error["rank"]) for error in errors]
    peers = sorted({found["address"] for error in errors if (found := _PEER.search(_text(error)))})
    sentence = f"{name_ranks(ranks)} lost the connection to {', '.join(peers) or 'another rank'} within a collective."
    meaning = read_text("connection closed by peer", name_ranks(ranks))
    return _diagnosis("connection-lost", (), sentence, meaning.action if meaning else "")


# --- who is missing in a collective ---


def _hang(hang: Mapping[str, Any]) -> Diagnosis | None:
    if not hang or hang.get("recovered"):
        return None
    text = ADVICE.sub("", str(hang.get("text", "")).strip()).rstrip(".;")
    late = tuple(int(rank) for rank in hang.get("late", ()))
    if late:
        action = "Find why it does not come: see the line that is named; every rank must reach the same collectives."
        return _diagnosis("hang", late, f"The run hung: {text}.", action)
    action = "Let every rank call the same collectives in the same order, and pair each send with one recv."
    return _diagnosis("deadlock", tuple(hang.get("waiting", ())), f"The run hung: {text}.", action)


# --- words ---


def _text(error: Mapping[str, Any]) -> str:
    return f"{error.get('ename', '')}: {error.get('evalue', '')}"


def _short(text: str, limit: int = 160) -> str:
    line = text.strip().partition("\n")[0].rstrip(".")
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _told(meaning: Meaning, ranks: Sequence[int]) -> Diagnosis:
    return _diagnosis(meaning.cause, ranks, meaning.sentence, meaning.action)


def _diagnosis(cause: str, ranks: Sequence[int], sentence: str, action: str) -> Diagnosis:
    return Diagnosis(cause, tuple(sorted(ranks)), sentence[:1].upper() + sentence[1:], action)
