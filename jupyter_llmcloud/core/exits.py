"""What an exit status says: the reason in words and what to do."""

from __future__ import annotations

import signal

_ADVICE = {
    signal.SIGKILL: "Somebody killed it, or the machine ran out of memory: try a smaller batch or fewer ranks.",
    signal.SIGSEGV: "A native library crashed; its stack is in the log of the rank.",
    signal.SIGABRT: "A native library gave up; its message is in the log of the rank.",
    signal.SIGBUS: "Usually shared memory (/dev/shm) or a disk is full.",
    signal.SIGTERM: "Somebody asked it to end.",
}


def describe_exit(status: int, evidence: str = "") -> tuple[str, str]:
    """(short name, sentence) for a status as from `os.waitstatus_to_exitcode`: negative is minus a signal's number."""
    if status >= 0:
        return "RankExited", f"the process ended by itself with exit code {status}."
    try:
        number = signal.Signals(-status)
        name, advice = number.name, _ADVICE.get(number, "")
    except ValueError:
        name, advice = f"signal {-status}", ""
    words = f"the process was ended by {name} ({-status})."
    return "RankKilled", " ".join(part for part in (words, evidence, advice) if part)
