"""The names of cleaning steps, what each does, and how a list of them is read."""

from __future__ import annotations

from jupyter_llmcloud.core.options import did_you_mean
from jupyter_llmcloud.errors import UsageError

NAMES = {
    "strip": "spaces at both ends are removed",
    "nfc": "Unicode in composed form (NFC)",
    "nfkc": "Unicode in compatibility form (NFKC)",
    "lowercase": "lower case",
    "whitespace": "runs of spaces are one space, more than two newlines are two",
    "html": "tags are removed, entities are characters",
    "urls": "addresses of web pages are removed",
    "emails": "mail addresses are removed",
    "control": "control characters are removed",
    "drop-empty": "what holds nothing but spaces is dropped",
    "drop-short": "what is shorter than N characters is dropped",
    "drop-long": "what is longer than N characters is dropped",
    "drop-symbols": "what is more than N percent neither letters, digits nor spaces is dropped",
}
_WITH_NUMBER = ("drop-short", "drop-long", "drop-symbols")


def parse_steps(text: str) -> list[str]:
    """`html,whitespace,drop-short:20` -> its names. Raises UsageError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        check_step(name)
    return names


def check_step(name: str) -> str:
    """Raise UsageError unless this names a step of ours."""
    base, colon, number = name.partition(":")
    if base not in NAMES:
        raise UsageError(f"there is no step {name!r}. Choose from {', '.join(NAMES)}.{did_you_mean(base, NAMES)}")
    if (base in _WITH_NUMBER) != bool(colon) or (colon and not number.isdigit()):
        example = f"{base}:20" if base in _WITH_NUMBER else base
        raise UsageError(f"the step {name!r} is written {example}.")
    return name
