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

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)  # faulthandler knows these

# Of a rank that the last rung of a Stop, or of the release after another one's failure, has ended.
KILLED_BY_US = "it did not end when it was asked to, as in a call that nothing interrupts, and was killed (SIGKILL)."
_LESS_MEMORY = "Use a smaller batch (with gradient accumulation), fewer ranks on this host, or a host with more memory."
LOST_AGENT = "The node agent"
LOST_WITH_AGENT = "RankLost"  # the short name of such an end
_LOST = "Its rank has ended with it. With --max-restarts K such a run goes on elsewhere from its last checkpoint."
_OOM = "The kernel's out-of-memory killer ended it"


def oom_evidence(kills_before: int, kills_now: int, kernel_line: str, rss: int) -> str:
    """What speaks for the out-of-memory killer: its count in the memory cgroup, the kernel's log. "" if nothing."""
    signs = []
    if kills_now > kills_before:
        signs.append(f"oom_kill of its memory cgroup went from {kills_before} to {kills_now}")
    if kernel_line:
        signs.append(f"the kernel's log says {kernel_line!r}")
    if not signs:
        return ""
    if rss:
        signs.append(f"its memory was last seen at {rss / 2**30:.2f} GiB")
    return f"{_OOM}: {', '.join(signs)}."


def has_dumped(status: int) -> bool:
    """Whether a process with this status has printed the stacks of its threads."""
    return -status in _CRASHES


def describe_exit(status: int, evidence: str = "") -> tuple[str, str]:
    """(short name, sentence) for a status as from `os.waitstatus_to_exitcode`: negative is minus a signal's number."""
    if status >= 0:
        return "RankExited", f"the process ended by itself with exit code {status}."
    if evidence.startswith(LOST_AGENT):
        return LOST_WITH_AGENT, f"{evidence} {_LOST}"
    try:
        number = signal.Signals(-status)
        name, advice = number.name, _ADVICE.get(number, "")
    except ValueError:
        name, advice = f"signal {-status}", ""
    if evidence.startswith(_OOM):
        return "RankOutOfMemory", f"the process was ended by {name} ({-status}). {evidence} {_LESS_MEMORY}"
    words = f"the process was ended by {name} ({-status})."
    return "RankKilled", " ".join(part for part in (words, evidence, advice) if part)
