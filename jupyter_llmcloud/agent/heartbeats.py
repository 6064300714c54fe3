"""What is done every second for everything that an agent leads or hosts: leases end unless it is."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def by_itself() -> Iterator[None]:
    """What fails in the block is told in the agent's log, and holds nothing else up."""
    try:
        yield
    except Exception:
        traceback.print_exc(file=sys.stderr)
