"""How many files and connections this process may have open."""

from __future__ import annotations

import contextlib
import resource

MOST = 1 << 16  # programs that close everything they have not opened go through all numbers up to the limit


def allow_many_open_files() -> int:
    """Raise the limit of this process, and of those it starts, as far as the system lets it; returns it.

    A shell's is often 1,024: an agent that leads 400 ranks has two journals and a connection for each.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(MOST, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    with contextlib.suppress(OSError, ValueError):  # where the system allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
