"""%endpoints keys: scoped keys, how much they may ask, and what was asked with them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from jupyter_llmcloud.core.names import parse_duration
from jupyter_llmcloud.core.options import Option, Syntax, integer, take_verb
from jupyter_llmcloud.core.spec import Interface, KeySpec
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.commands.tables import Table, ago
from jupyter_llmcloud.magics.serving.records import Records
from jupyter_llmcloud.magics.session import session

_KEY_OPTIONS = (
    Option(
        ("--scope",),
        "infer:NAME (NAME may hold * and ?) or models:read; may be repeated.",
        metavar="SCOPE",
        repeat=True,
    ),
    Option(("--expires",), "How long the key is valid, for example 12h or 30d.", metavar="TIME", parse=parse_duration),
    Option(("--label",), "What the key is for.", metavar="TEXT"),
    *KeySpec.options(Interface.NOTEBOOK),
    Option(("--overlap",), "rotate: how long the old key stays valid (1h).", metavar="TIME", parse=parse_duration),
    Option(("--days",), "usage: of how many days (30).", metavar="N", parse=integer(1)),
)
_OPTIONS_OF = {
    "create": {"scope", "expires", "label", *(option.name for option in KeySpec.options())},
    "rotate": {"overlap"},
    "usage": {"days"},
}
_UNITS = {"requests_per_minute": "requests/min", "tokens_per_minute": "tokens/min", "parallel_requests": "at once"}
_NEEDS_ID = ("revoke", "rotate")
KEY_VERBS = ("list", "create", "rotate", "revoke", "usage", "alerts")
KEYS = Syntax("%endpoints keys", _KEY_OPTIONS, f"[{'|'.join(KEY_VERBS)}] [ID]", "Scoped keys.", names="keys")


def create_key(
    scopes: str | Iterable[str],
    expires_s: float | None = None,
    label: str | None = None,
    *,
    expires: str | None = None,
    **limits: int | None,
) -> str:
    """A new scoped key, which cannot be read again later.

    Args:
        scopes: one, such as "infer:NAME", or several.
        expires: how long it is valid, such as "30d", in place of `expires_s`.
        limits: requests_per_minute, tokens_per_minute, parallel_requests.
    """
    KeySpec.make(limits)
    expires_s = _seconds("expires", expires_s, expires)
    scopes = [scopes] if isinstance(scopes, str) else [*scopes]
    return str(session.current().server.create_key(scopes, expires_s, label, **limits)["key"])


def _seconds(name: str, seconds: float | None, text: str | None) -> float | None:
    """A time that may be given in either way. Raises UsageError."""
    if text is None:
        return seconds
    if seconds is not None:
        raise UsageError(f"{name} and {name}_s are the same: give one of them.")
    return parse_duration(str(text))


def rotate_key(key_id: str, overlap_s: float | None = None, *, overlap: str | None = None) -> str:
    """A new key in place of one, which stays valid for `overlap_s` (an hour), or `overlap`, such as "2h"."""
    overlap_s = _seconds("overlap", overlap_s, overlap)
    return str(session.current().server.rotate_key(key_id, overlap_s)["key"])


def key_usage(days: int | None = None) -> Records:
    """What was asked with each key, by day: a list of dicts, shown as a table; `.to_frame()` gives a DataFrame."""
    columns = ("day", "id", "label", "requests", "refused", "prompt_tokens", "generated_tokens")
    return Records(session.current().server.key_usage(days), columns, "No key was used in this time.")


def key_alerts() -> Any:
    """Records of what was unusual in the use of keys."""
    return session.current().server.key_alerts()


def keys() -> Any:
    """Records of the keys, without their secrets."""
    return session.current().server.keys()


def revoke_key(key_id: str) -> None:
    """End a key at once, also for the streams it has open."""
    session.current().server.revoke_key(key_id)


def key_table() -> Table:
    """The keys, without their secrets."""
    rows = [
        (
            row["id"],
            row["state"],
            ", ".join(row["scopes"]),
            row["label"],
            limits_of(row),
            ago(row["created"]),
            _until(row["expires"]),
            ago(row["last_used"]) if row["last_used"] else "never",
        )
        for row in keys()
    ]
    headings = ["id", "state", "scopes", "label", "limits", "made", "expires", "used"]
    return Table(headings, rows, "There is no key yet.")


def limits_of(key: Any) -> str:
    """How much a key may ask: `60 requests/min, 2 at once`."""
    known = (
        ("requests_per_minute", "requests/min"),
        ("tokens_per_minute", "tokens/min"),
        ("parallel_requests", "at once"),
    )
    return ", ".join(f"{key[name]} {unit}" for name, unit in known if key[name])


def usage_table(days: int | None = None) -> Table:
    """What was asked with each key, by day."""
    rows = [
        (
            row["day"],
            row["id"],
            row["label"],
            *(str(row[name]) for name in ("requests", "refused", "prompt_tokens", "generated_tokens")),
            ago(row["last_used"]),
        )
        for row in key_usage(days)
    ]
    headings = ["day", "id", "label", "requests", "refused", "prompt tokens", "generated tokens", "last"]
    return Table(headings, rows, "No key was used in this time.")


def alert_table() -> Table:
    """What was unusual in the use of keys."""
    rows = [(ago(row["t"]), row["id"], row["rule"], row["what"]) for row in key_alerts()]
    return Table(["seen", "id", "rule", "what"], rows, "Nothing unusual was seen.")


def _until(expires: float | None) -> str:
    return datetime.fromtimestamp(expires).strftime("%Y-%m-%d %H:%M") if expires else "never"


class NewKey:
    """A key that was just made. Shown by its id; the key itself is in `.key`, and copied from there."""

    def __init__(self, key: str, key_id: str, scopes: Any) -> None:
        self.key = key
        self.id = key_id
        self.scopes = [*scopes]

    def __repr__(self) -> str:
        return f"<key {self.id} for {', '.join(self.scopes)}: the key itself is in .key of this object, once>"


def run_verb(given: Any) -> Table | NewKey | None:
    """%endpoints keys VERB."""
    rest = [*given.arguments]
    verb = take_verb("%endpoints keys", dict.fromkeys(KEY_VERBS), rest, "list")
    if (verb in _NEEDS_ID) != bool(rest) or len(rest) > 1:
        wanted = f"what does {rest[-1]!r} mean?" if rest else "expected the ID of a key."
        raise UsageError(f"%endpoints keys {verb}: {wanted}")
    if stray := sorted(set(given.given) - _OPTIONS_OF.get(verb, set())):
        raise UsageError(f"%endpoints keys {verb}: --{stray[0].replace('_', '-')} is not an option of it.")
    server = session.current().server
    match verb:
        case "list":
            return key_table()
        case "usage":
            return usage_table(given.days)
        case "alerts":
            return alert_table()
        case "revoke":
            revoke_key(rest[0])
            return None
        case "rotate":
            told = server.rotate_key(rest[0], given.overlap)
        case _:
            limits = {option.name: given.given.get(option.name) for option in KeySpec.options()}
            scopes = given.scope or ["infer:*", "models:read"]
            told = server.create_key(scopes, given.expires, given.label, **limits)
    return NewKey(told["key"], told["id"], told["scopes"])
