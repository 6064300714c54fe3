"""When the fragments of a model are exchanged between replicas that train on their own (Streaming DiLoCo).

Of `every` inner steps each fragment gets one at which it is sent, evenly apart, the last fragment at the end of the
round; what was averaged is applied `delay` steps later (arXiv 2501.18512, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OuterSchedule:
    """The schedule of one model."""

    every: int
    fragments: int = 1
    delay: int = 0

    def sent(self, step: int) -> list[int]:
        """The fragments that are sent after this inner step, counted from 1."""
        return [number for number in range(self.fragments) if step > 0 and self._is_at(step, number)]

    def applied(self, step: int) -> list[int]:
        """The fragments whose average is applied after this inner step."""
        sent_at = step - self.delay
        return self.sent(sent_at) if sent_at > 0 else []

    def _is_at(self, step: int, number: int) -> bool:
        offset = (number + 1) * self.every // self.fragments
        return step % self.every == offset % self.every


def fragments_of(sizes: list[int], number: int) -> list[list[int]]:
    """Cut tensors, by their sizes and in order, into consecutive fragments of about equal size; none is empty."""
    number, total = min(number, len(sizes)), sum(sizes)
    found: list[list[int]] = []
    at = taken = 0
    for left in reversed(range(number)):
        wanted = total * (number - left) / number
        fragment: list[int] = []
        while at < len(sizes) - left and (not fragment or not left or taken + sizes[at] / 2 <= wanted):
            fragment.append(at)
            taken += sizes[at]
            at += 1
        found.append(fragment)
    return found
