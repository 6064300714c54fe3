"""Names of runs and endpoints, run ids, rank lists, durations, arguments: text in, values out."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterable
from typing import Any

from jupyter_llmcloud.errors import UsageError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)


def check_name(name: str, what: str) -> str:
    """Return `name` when it may name a run, endpoint or cluster; raise `UsageError` otherwise."""
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"{what} {name!r} is not a valid name: use 1 to 128 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit."
        )
    return name


def run_id(name: str, created: float, nonce: str) -> str:
    """`<name>-<UTC time>-<nonce>`: sorts by name, then time; unique by the nonce."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(created))
    return f"{name[:100]}-{stamp}-{nonce}"


def parse_ranks(text: str, world_size: int) -> list[int]:
    """`0,2-3` -> [0, 2, 3], sorted and without repeats; every rank must be below `world_size`."""
    ranks: set[int] = set()
    for first, last in _ranges(text):
        if last >= world_size:
            raise UsageError(f"--ranks {text!r}: the world has ranks 0-{world_size - 1}, there is no rank {last}.")
        ranks.update(range(first, last + 1))
    return sorted(ranks)


def parse_ranges(text: str) -> str:
    """`0,2-3` as it is, of a world that need not be there yet. Raises UsageError."""
    _ranges(text)
    return text


def _ranges(text: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII)
        if not match:
            raise UsageError(f"--ranks {text!r}: {part!r} is not a rank or a range such as 2-3.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"--ranks {text!r}: the range {part!r} runs backwards.")
        found.append((first, last))
    return found


def format_ranks(ranks: list[int]) -> str:
    """[0, 2, 3] -> `0,2-3`."""
    parts: list[str] = []
    for rank in sorted(set(ranks)):
        if parts and (last := parts[-1].split("-"))[-1] == str(rank - 1):
            parts[-1] = f"{last[0]}-{rank}"
        else:
            parts.append(str(rank))
    return ",".join(parts)


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 0` or `ranks 0-3`."""
    members = list(ranks)
    return f"rank{'s' if len(members) != 1 else ''} {format_ranks(members)}"


def short_name(name: str, limit: int = 60) -> str:
    """`name`, shortened in its middle: names of a kind begin alike, and differ at their end."""
    if len(name) <= limit:
        return name
    tail = (limit - 1) // 2
    return f"{name[: limit - 1 - tail]}…{name[-tail:]}"


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """`90`, `90s`, `30m`, `2h`, `1d` -> seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text)
    if not match or float(match[1]) == 0:
        raise UsageError(f"{text!r} is not a duration: write for example 90s, 30m or 2h.")
    return float(match[1]) * _UNITS[match[2]]


MAX_KEPT_S = 3600.0


def parse_kept(text: str) -> float:
    """`10m` -> seconds, for which something is kept that takes the place of others: an hour at most."""
    if (seconds := parse_duration(text)) > MAX_KEPT_S:
        raise UsageError(f"{text!r} is too long: replicas that answer nobody are kept for 1h at most.")
    return seconds


_BYTES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(text: str) -> int:
    """`512MiB`, `2GiB`, `2g` -> bytes, by powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if not match or not (size := int(float(match[1]) * _BYTES[match[2]])):
        raise UsageError(f"{text!r} is not a size of memory: write for example 512MiB or 2GiB.")
    return size


MAX_REPLICAS = 64


def parse_replicas(text: str) -> int | str:
    """`2` -> 2; `1:4` stays, as bounds between which the number follows the load. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,4})(?::(\d{1,4}))?\s*", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not match or high < 1 or (low < 1 and match[2] is None):
        raise UsageError(f"{text!r} is not possible: write a number such as 2, or bounds such as 1:4 for the load.")
    if low > high or high > MAX_REPLICAS:
        raise UsageError(f"{text!r} is not possible: the least comes first, as in 1:4; {MAX_REPLICAS} are the most.")
    return low if match[2] is None else f"{low}:{high}"


def parse_elastic(text: str) -> str:
    """`1:4` as it is, the least and the most ranks of a run. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,4}):(\d{1,4})\s*", text)
    low, high = (int(match[1]), int(match[2])) if match else (0, 0)
    if not match or not 1 <= low <= high:
        raise UsageError(f"{text!r} is not possible: write the least and the most ranks, such as 1:4.")
    return f"{low}:{high}"


def replica_bounds(replicas: int | str) -> tuple[int, int | None, int | None]:
    """What `parse_replicas` gave: how many at first, and the bounds, which are None for a number that is fixed."""
    if isinstance(replicas, int):
        return replicas, None, None
    low, high = map(int, replicas.split(":"))
    return max(1, low), low, high


def parse_variables(text: str, option: str = "") -> list[str]:
    """`a, b` -> ["a", "b"]; each must be a Python name. What is refused is said of `option`, if any."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    bad = [name for name in names if not name.isidentifier()]
    if bad or not names:
        words = "expected names of variables separated by commas" + (f", not {bad[0]!r}." if bad else ".")
        raise UsageError(f"{option} {text!r}: {words}" if option else words)
    return names


def type_in_words(value: Any) -> str:
    """What a value is, in an error: `a list`, `an int`."""
    word = type(value).__name__
    return f"{'an' if word[:1].lower() in tuple('aeiou') else 'a'} {word}"


def whole_number(text: str) -> int:
    """A whole number, also below zero. Raises UsageError."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 6):
        raise UsageError(f"{text!r}: expected a whole number")
    return int(text)


def parse_variable_name(text: str) -> str:
    """The name of a variable. Raises UsageError."""
    if not text.isidentifier():
        raise UsageError(f"{text!r}: expected the name of a variable")
    return text


def parse_arguments(text: str) -> str:
    """A command line's arguments, as they were: checked to be words and closed quotes of a shell."""
    shlex.split(text)
    return text


def parse_script_file(text: str) -> str:
    """The path of a script to be written. Raises UsageError."""
    if not text.endswith(".py") or text.endswith("/.py"):
        raise UsageError(f"{text!r}: expected a file that ends in .py")
    return text
