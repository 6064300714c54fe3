"""`lc.data`: data is prepared on the cluster, looked at, and loaded by ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.data.spec import PrepareSpec
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.twin import describe

if TYPE_CHECKING:
    from jupyter_llmcloud.magics.commands.tables import Table
    from jupyter_llmcloud.magics.output.prepared import Prepared

Place = str | os.PathLike[str]

__all__ = ["load", "prepare", "shards"]


def prepare(
    source: Place | Sequence[Place],
    *,
    tokenizer: Any = None,
    steps: Sequence[str | Callable[[Any], Any]] | Callable[[Any], Any] | str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Prepared:
    """Clean, deduplicate, tokenize and pack a source on the cluster, as `%prepare` does; waits for the end of it.

    What is there already is gone on with: shards that are finished are not made again, and of a source that has grown
    only new files are prepared. Stop keeps what is finished.

    Args:
        source: files, folders, globs or URLs of anything that fsspec reads: s3://, hdfs://, https://, ...
        tokenizer: of Hugging Face (an object, a folder or a name), or a function from a text to a list of token ids.
        steps: names of steps, and functions: from a text to a text or None (to drop it); on rows that keep their
            columns, from a dict to a dict or None.
        storage_options: for fsspec, such as key, secret, endpoint_url; they are not kept.

    Raises:
        UsageError, NotFound: what is wrong with the options, the source or what is there, before anything is done.
    """
    from jupyter_llmcloud.magics.output.prepared import follow
    from jupyter_llmcloud.magics.session import session
    from jupyter_llmcloud.magics.session.packed_code import pack

    sources = _places(source)
    named = steps.split(",") if isinstance(steps, str) else [steps] if callable(steps) else list(steps or ())
    is_text = isinstance(tokenizer, str | Path)
    own = None
    texts = [step for step in named if isinstance(step, str)]
    if texts != named or not (tokenizer is None or is_text):
        own = pack(named, None if is_text else tokenizer, str(tokenizer) if is_text else None)
    name = str(tokenizer) if is_text else None if tokenizer is None else type(tokenizer).__name__
    given = {**options, "tokenizer": name, "steps": texts or None}
    spec = PrepareSpec.make({key: value for key, value in given.items() if value is not None}, Interface.NOTEBOOK)
    spec = spec.checked()
    body = {**spec.as_dict(), "out": absolute(str(spec.out))}
    if is_text and Path(os.path.expanduser(str(tokenizer))).exists():
        body["tokenizer"] = absolute(str(tokenizer))
    if own is not None:
        body = {key: value for key, value in body.items() if key != "tokenizer"} | {"code": own}
    if storage_options:
        body["storage_options"] = dict(storage_options)
    return follow(session.current().server, sources, body)


describe(prepare, PrepareSpec)


def shards(
    url: Place,
    nproc: int | None = None,
    limit: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Table:
    """The shards of prepared data as a table: what each holds, where it was written, how uneven they are.

    Args:
        nproc: also which rank of so many takes how many rows.
        limit: shards that are listed, the largest first.
        storage_options: for fsspec; its options can be given one by one as well.
    """
    from jupyter_llmcloud.magics.output.prepared import shard_table

    return shard_table(absolute(os.fspath(url)), nproc, limit or 20, {**(storage_options or {}), **options})


def load(source: Any, batch_size: int | None = None, **options: Any) -> Any:
    """A loader of prepared data, or of a data set that is there already, for this rank: each row once an epoch.

    Args:
        source: the folder or URL of prepared data; or a data set of Hugging Face `datasets` or of torch.
        batch_size: rows of a step on each rank (8 when nothing is said).
        global_batch_size: in its place, rows of a step over all ranks: the same steps on any number of ranks.
        shuffle: in each epoch otherwise, by `seed`. Streams without a shuffle of their own keep their order.
        seed: 0 when left out.
        streaming: prepared data: row groups in random order, rows shuffled within `window` groups at a time, no more
            in memory than that. Else rows are shuffled over all of it, and what was read stays in memory.
        last: what becomes of the rows that fill no step: "share" (each goes to one rank), "pad" (filled up from the
            beginning, as Accelerate does, for `gather_for_metrics`), "drop".
        columns: only these.
        transform: a function that is given the rows of a batch as a list of dicts, and gives the batch.
        tokenizer: raise an error when it is not the one that made the tokens.
        prefetch: batches that are read ahead.
        rank, world_size: in place of this process's own. Ranks that compute a batch together (`--plan tp:N`,
            `pipeline:N`) get the same rows by themselves.
        storage_options: for fsspec.

    Returns:
        A DataLoader that Accelerate takes as it is (`accelerator.prepare`), resumed exactly with the cell, and by
        `state_dict()` and `load_state_dict()` elsewhere, on any number of ranks.

    Raises:
        NotFound, UsageError: the data, or a shard of it, is missing, changed or cannot be read.
    """
    from jupyter_llmcloud.training.data import loading

    place = absolute(os.fspath(source)) if isinstance(source, str | os.PathLike) else source
    return loading.load(place, batch_size, **options)


def _places(source: Any) -> list[str]:
    """The places of a source. Raises UsageError for what holds rows itself."""
    if isinstance(source, str | os.PathLike):
        return [absolute(os.fspath(source))]
    is_table = isinstance(source, Mapping) or hasattr(source, "columns") or hasattr(source, "column_names")
    places: list[Any] = list(source) if isinstance(source, Iterable) and not is_table else [None]
    if not all(isinstance(place, str | os.PathLike) for place in places):
        raise UsageError(
            f"a source is files, folders, globs or URLs, not {type(source).__name__}: write the rows as Parquet or "
            "JSONL first; or hand a data set that is there already to lc.data.load()."
        )
    return [absolute(os.fspath(place)) for place in places]


def absolute(place: str) -> str:
    """A path as seen from anywhere; a URL as it is."""
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))
