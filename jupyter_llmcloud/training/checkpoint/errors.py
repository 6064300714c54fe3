"""What a checkpoint cannot do."""

from __future__ import annotations


class ResumeMissed(RuntimeError):
    """The cell took another way than before and did not come back to the position it was to resume at."""
