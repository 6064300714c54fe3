"""The manifest of a prepared data set, `manifest.json` in its folder: what it holds and what it was made of.

It is written last: a folder without one holds no data set, or one that is not finished.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.storage.datasets import filesystem

NAME = "manifest.json"
SHARDS = "shards"
VERSION = 1


class Shard(msgspec.Struct, kw_only=True, frozen=True):
    """A Parquet file, made of one partition.

    Attributes:
        rows: of each of its row groups.
        tokens: in its rows, without padding.
        documents: kept; filtered, exact, near: those that were dropped, and why.
        bytes, sha256: of the file.
        host: where it was written.
        seconds: CPU time of its preparation.
    """

    name: str
    key: str
    rows: list[int]
    bytes: int
    sha256: str
    tokens: int = 0
    documents: int = 0
    filtered: int = 0
    exact: int = 0
    near: int = 0
    bad: int = 0
    sources: list[str] = []
    host: str = ""
    seconds: float = 0.0

    @property
    def num_rows(self) -> int:
        """Of the whole shard."""
        return sum(self.rows)


class CleaningStep(msgspec.Struct, kw_only=True, frozen=True):
    """A cleaning step: its name, and the fingerprint of its code ("" for a named one of ours)."""

    name: str
    source_hash: str = ""


class Source(msgspec.Struct, kw_only=True, frozen=True):
    """A file that was read, as it was listed then."""

    url: str
    size: int
    version: str = ""


class Tokenizer(msgspec.Struct, kw_only=True, frozen=True):
    """What made the tokens.

    Attributes:
        fingerprint: SHA-256 of its definition.
        eos: the token between documents; pad: fills the last row of a shard up.
    """

    name: str
    fingerprint: str
    vocab_size: int
    eos: int | None = None
    pad: int = 0


class Manifest(msgspec.Struct, kw_only=True, frozen=True):
    """A prepared data set.

    Attributes:
        kind: "tokens" (rows of `seq_len` tokens), "rows" (columns as they were) or "images".
        columns: the type of each, as Arrow names it.
        recipe: what decides how a partition is prepared, part by part; shards of another recipe do not fit.
        statistics: mean and standard deviation of each normalised column.
        classes: of images, by the number that is their label.
    """

    version: int = VERSION
    kind: str
    columns: dict[str, str]
    seq_len: int | None = None
    recipe: dict[str, Any]
    tokenizer: Tokenizer | None = None
    steps: list[CleaningStep] = []
    statistics: dict[str, list[float]] = {}
    classes: list[str] = []
    sources: list[Source]
    shards: list[Shard]
    created: float = 0.0

    @property
    def num_rows(self) -> int:
        """Over all shards."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Over all shards, without padding."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """The same for the same rows in the same order."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]

    def check_tokenizer(self, fingerprint: str, url: str) -> None:
        """Raise UsageError when the tokens were made by another tokenizer."""
        known = self.tokenizer
        if known is None:
            raise UsageError(f"{url!r} holds {self.kind}, which no tokenizer has made.")
        if known.fingerprint != fingerprint:
            raise UsageError(
                f"the tokens in {url!r} were made by another tokenizer: {known.name} {known.fingerprint[:12]}, now it "
                f"is {fingerprint[:12]}. Prepare the data again into another folder, or use the tokenizer of then."
            )


def different(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Which parts of two recipes differ, in words; "" when none does."""
    names = sorted(name for name in {*kept, *wanted} if kept.get(name) != wanted.get(name))
    return ", ".join(f"{name} {_short(kept.get(name))} -> {_short(wanted.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def read(url: str, options: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest in a folder. Raises NotFound when there is none, UsageError when it cannot be read."""
    at = filesystem.join(url, NAME)
    try:
        content = filesystem.read_bytes(at, options)
    except NotFound:
        raise NotFound(
            f"{url!r} holds no prepared data: there is no {NAME}. Prepare it first (%prepare), or finish what was "
            "stopped: the same %prepare goes on where it was."
        ) from None
    try:
        found = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{at!r} cannot be read: {error}. Prepare the data again.") from None
    if found.version != VERSION:
        raise UsageError(f"{at!r} is of version {found.version}, this package reads version {VERSION}.")
    return found


def read_if_there(url: str, options: Mapping[str, Any] | None = None) -> Manifest | None:
    """The manifest in a folder; None when there is none."""
    try:
        return read(url, options)
    except NotFound:
        return None


def write(url: str, manifest: Manifest, options: Mapping[str, Any] | None = None) -> None:
    """Put a manifest in its folder, in place of the one before."""
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    filesystem.replace(filesystem.join(url, NAME), content, options)
