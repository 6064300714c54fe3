"""Preparations in a cell: a line while they go on, a summary in the end; shards as a table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.client.rest import MAX_WAIT_S, ServerClient
from jupyter_llmcloud.client.stop_signal import said, swallow_more_presses
from jupyter_llmcloud.core.data.shares import EpochShares
from jupyter_llmcloud.magics.commands.tables import Table, span
from jupyter_llmcloud.magics.output.progress_line import ProgressLine
from jupyter_llmcloud.protocol.rpc import restored_body
from jupyter_llmcloud.storage.datasets import manifest


class Prepared:
    """Prepared data.

    Attributes:
        out: its folder or URL, for `lc.data.load`.
        rows, tokens, documents, dropped, num_shards: counts over all of it.
        num_new_shards: made by this preparation.
        fingerprint: the same for the same rows in the same order.
    """

    def __init__(self, told: Mapping[str, Any], storage_options: Mapping[str, Any]) -> None:
        self.out: str = told["out"]
        self.rows: int = told["rows"]
        self.tokens: int = told["tokens"]
        self.documents: int = told["documents"]
        self.dropped: int = told["dropped"]
        self.num_shards: int = told["num_shards"]
        self.num_new_shards: int = told["num_new_shards"]
        self.fingerprint: str = told["fingerprint"]
        self._text = _summary(told)
        self._storage_options = storage_options
        self._shown_in = _cell_number()

    @property
    def manifest(self) -> manifest.Manifest:
        """All that is known of it, read from where it is."""
        return manifest.read(self.out, self._storage_options)

    def __repr__(self) -> str:
        return self._text

    def __fspath__(self) -> str:
        return self.out

    def __str__(self) -> str:
        return self.out

    def _ipython_display_(self) -> None:
        # The cell that has prepared it says so already.
        if _cell_number() != self._shown_in:
            from IPython.display import display

            display({"text/plain": self._text}, raw=True)


def _cell_number() -> int | None:
    from IPython.core.getipython import get_ipython

    return getattr(get_ipython(), "execution_count", None)


def follow(server: ServerClient, sources: list[str], body: dict[str, Any]) -> Prepared:
    """Begin a preparation and show how far it is until it has ended."""
    line = ProgressLine()
    line.tell("Looking at the source …")
    try:
        told = server.prepare_data(sources, **body)
        while told["state"] == "running":
            line.tell(_how_far(told))
            told = server.preparation(told["id"], told["version"], MAX_WAIT_S)
            time.sleep(0.05)
    except KeyboardInterrupt:
        swallow_more_presses()
        _stop(server, body["out"])
        text = f"stopped: finished shards are kept in {body['out']}, and the same %prepare goes on from there."
        line.tell(text)
        raise said(text, f"KeyboardInterrupt: {text}") from None
    if told["state"] != "finished":
        line.tell(f"{told['state']}: {told['reason']}")
        raise restored_body({"error": told["error"], "message": told["reason"]}, told["reason"])
    prepared = Prepared(told, body.get("storage_options") or {})
    line.tell(repr(prepared))
    return prepared


def _stop(server: ServerClient, out: str) -> None:
    for told in server.ask("GET", "preparations")["preparations"]:
        if told["out"] == out and told["state"] == "running":
            server.stop_preparation(told["id"])


def _how_far(told: Mapping[str, Any]) -> str:
    took = max(0.001, time.time() - told["began"])
    parts = [f"{told['phase']}: {told['done']} of {told['total']}"]
    if told["tokens"]:
        parts.append(f"{told['tokens']:,} tokens ({told['tokens'] / took:,.0f}/s)")
    elif told["rows"]:
        parts.append(f"{told['rows']:,} rows")
    if told["processes"]:
        parts.append(f"{told['processes']} processes on {told['cluster']}")
    elif told["total"]:
        parts.append(f"waiting for workers of {told['cluster']}")
    return " · ".join([*parts, span(took)])


def _summary(told: Mapping[str, Any]) -> str:
    parts = [f"{told['rows']:,} rows"]
    if told["tokens"]:
        parts.append(f"{told['tokens']:,} tokens")
    parts.append(f"{told['documents']:,} documents ({told['dropped']:,} dropped)")
    parts.append(f"{told['num_shards']:,} shards, {told['num_new_shards']:,} of them new")
    if told["note"]:
        parts.append(told["note"])
    return f"{told['out']}: {', '.join(parts)}; {span((told['ended'] or time.time()) - told['began'])}."


def shard_table(url: str, nproc: int | None, limit: int, storage_options: Mapping[str, Any]) -> Table:
    """The shards of prepared data, the largest first; with `nproc` how many rows each rank takes in an epoch."""
    found = manifest.read(url, storage_options)
    if nproc is not None:
        return _rank_table(found, nproc)
    sizes = [shard.num_rows for shard in found.shards]
    mean = sum(sizes) / max(1, len(sizes))
    rows: list[tuple[object, ...]] = [
        (
            shard.name.removesuffix(".parquet"),
            f"{shard.num_rows:,}",
            f"{shard.tokens:,}" if shard.tokens else "",
            _size(shard.bytes),
            f"{shard.num_rows / mean:.2f}" if mean else "",
            shard.filtered + shard.exact + shard.near,
            shard.host,
            _sources(shard.sources),
        )
        for shard in sorted(found.shards, key=lambda shard: -shard.num_rows)[:limit]
    ]
    total = sum(shard.bytes for shard in found.shards)
    skew = f"{max(sizes) / mean:.2f}" if mean else ""
    tokens = f"{found.num_tokens:,}" if found.num_tokens else ""
    rows.append((f"all {len(sizes)}", f"{found.num_rows:,}", tokens, _size(total), f"most: {skew}", "", "", ""))
    headings = ["shard", "rows", "tokens", "size", "of the mean", "dropped", "written on", "from"]
    return Table(headings, rows, "There are no shards.")


def _rank_table(found: manifest.Manifest, nproc: int) -> Table:
    shares = EpochShares(found.num_rows, max(nproc, 8 * nproc), nproc)
    counts = [sum(len(shares.places(step, rank)) for step in range(shares.num_steps)) for rank in range(nproc)]
    mean = sum(counts) / nproc
    rows = [(rank, f"{num:,}", f"{num / mean:.3f}") for rank, num in enumerate(counts)]
    return Table(["rank", "rows of an epoch", "of the mean"], rows, "")


def _sources(urls: list[str]) -> str:
    names = [url.rsplit("/", 1)[-1] for url in urls]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})" if names else ""


def _size(num_bytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000  # type: ignore[assignment]
    return f"{num_bytes:.3g} GB"
