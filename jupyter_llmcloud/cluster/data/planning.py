"""What a preparation has to do: the partitions of its source, and what of the data set that is there already stays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from jupyter_llmcloud.cluster.data.reading import class_of
from jupyter_llmcloud.cluster.data.recipe import Recipe
from jupyter_llmcloud.cluster.data.signatures import FOLDER
from jupyter_llmcloud.cluster.data.work import STAGED
from jupyter_llmcloud.core.data.partitions import Partition, SourceFile, cut
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets import filesystem, manifest
from jupyter_llmcloud.storage.datasets.manifest import SHARDS, Manifest, Shard, Source


@dataclass(frozen=True)
class PreparationPlan:
    """What there is to do.

    Attributes:
        recipe: with the format and the classes of the source.
        kept: shards of an earlier preparation that still hold.
        partitions: to prepare, behind those that are kept, in the order of the source.
        finished: shards of these that an unfinished preparation has left, by the key of their partition.
        sources: all files, those of the kept shards first.
        before: the manifest that is there.
        note: what becomes of it, in words; "" for a new data set.
    """

    recipe: Recipe
    kept: tuple[Shard, ...]
    partitions: tuple[Partition, ...]
    finished: Mapping[str, Shard]
    sources: tuple[Source, ...]
    before: Manifest | None
    note: str = ""

    @property
    def is_done(self) -> bool:
        """Whether the data set is already what was asked for."""
        return self.before is not None and not self.partitions and len(self.kept) == len(self.before.shards)


def plan(recipe: Recipe, sources: Sequence[str], partition_bytes: int, overwrite: bool = False) -> PreparationPlan:
    """Look at the source and at what is there. Raises UsageError, NotFound in clear words before anything is done."""
    filesystem.require("pyarrow", what="preparing data")
    if recipe.dedup == "near":
        filesystem.require("datasketch", what="finding near duplicates")
    own = [filesystem.join(recipe.out, name) for name in (SHARDS, STAGED, FOLDER, manifest.NAME)]
    kind, files = filesystem.list_source(sources, recipe.kind, recipe.storage, without=own)
    if kind == "images":
        filesystem.require("PIL", what="reading images")
    _check(recipe, kind)
    recipe = replace(recipe, kind=kind)
    before = manifest.read_if_there(recipe.out, recipe.storage) if not overwrite else None
    if before is not None:
        _check_recipe(recipe, before)
    recipe = _with_classes(recipe, files, before)
    there = filesystem.names_in(filesystem.join(recipe.out, SHARDS), recipe.storage)
    kept, new, note = _split(files, before, there, forgets=recipe.dedup != "none")
    if kind == "parquet":
        new = [_with_row_groups(file, partition_bytes, recipe.storage) for file in new]
    whole_units = (kind == "text" and recipe.unit != "line") or recipe.encoding != "utf-8"
    partitions = cut(new, "whole" if whole_units else kind, partition_bytes)
    recipe = _named_whole(recipe, kept, partitions)
    known = {source.url: source for source in (before.sources if before is not None else ())}
    covered = {url for shard in kept for url in shard.sources}
    old = [source for url, source in known.items() if url in covered]
    added = [Source(url=f.url, size=f.size, version=f.version) for f in new]
    return PreparationPlan(
        recipe, tuple(kept), tuple(partitions), _finished(recipe, partitions, there), (*old, *added), before, note
    )


def _named_whole(recipe: Recipe, kept: Sequence[Shard], partitions: Sequence[Partition]) -> Recipe:
    if not recipe.depends_on_all:
        return recipe
    told = repr(([shard.name for shard in kept], [partition.key for partition in partitions]))
    return replace(recipe, whole=hashlib.sha256(told.encode()).hexdigest()[:12])


def _check(recipe: Recipe, kind: str) -> None:
    if recipe.tokenizer is not None and kind == "images":
        raise UsageError("images are not tokenized: leave tokenizer= out.")
    if recipe.normalize and (kind in ("text", "images") or recipe.tokenizer is not None):
        raise UsageError("normalize= is for columns of numbers (jsonl, csv, parquet without a tokenizer).")
    if recipe.encoding != "utf-8" and kind in ("parquet", "images"):
        raise UsageError(f"encoding= is for text, jsonl and csv, not for {kind}.")
    if recipe.types and (kind in ("text", "images") or recipe.tokenizer is not None):
        raise UsageError("types= is for columns (jsonl, csv, parquet without a tokenizer).")
    if recipe.dedup == "near" and kind == "images":
        raise UsageError("dedup='near' compares texts: for images there is dedup='exact'.")
    if kind == "images" and recipe.steps:
        named = [step.name for step in recipe.steps if not step.source_hash]
        if named:
            raise UsageError(f"the step {named[0]!r} cleans texts. On images there are functions of your own.")


def _check_recipe(recipe: Recipe, before: Manifest) -> None:
    if told := manifest.different(before.recipe, recipe.described()):
        raise UsageError(
            f"{recipe.out!r} holds data that was prepared otherwise: {told}. Choose another folder, or have it "
            "replaced: overwrite=True."
        )


def _with_classes(recipe: Recipe, files: Sequence[SourceFile], before: Manifest | None) -> Recipe:
    if recipe.kind != "images":
        return recipe
    classes = sorted({class_of(file.url) for file in files})
    if before is not None:  # labels stay what they are
        classes = [*before.classes, *(name for name in classes if name not in before.classes)]
    return replace(recipe, classes=tuple(classes))


def _split(
    files: Sequence[SourceFile], before: Manifest | None, there: Mapping[str, int], *, forgets: bool
) -> tuple[list[Shard], list[SourceFile], str]:
    """Shards that stay, files that are prepared, and what that means in words.

    `forgets`: documents were left out of shards because others have them, which may be the ones that do not stay.
    """
    if before is None:
        return [], list(files), ""
    now = {file.url: Source(url=file.url, size=file.size, version=file.version) for file in files}
    then = {source.url: source for source in before.sources}
    changed = {url for url in then if url in now and now[url] != then[url]}
    gone = {url for url in then if url not in now}
    lost = {shard.name for shard in before.shards if there.get(shard.name) != shard.bytes}
    stale = [s for s in before.shards if s.name in lost or (changed | gone) & set(s.sources)]
    if stale and forgets:
        stale += [shard for shard in before.shards if shard not in stale and (shard.exact or shard.near)]
    again = {url for shard in stale for url in shard.sources}
    while more := [s for s in before.shards if s not in stale and again & set(s.sources)]:  # of a file that was cut
        stale += more
        again |= {url for shard in more for url in shard.sources}
    kept = [shard for shard in before.shards if shard not in stale]
    new = [file for file in files if file.url not in then or file.url in again]
    words = [
        f"{len(names)} {what}"
        for names, what in (
            ([file for file in new if file.url not in then], "new files"),
            (changed, "changed files"),
            (gone, "files that are gone"),
            (lost, "shards that were missing or damaged"),
        )
        if names
    ]
    return kept, new, ", ".join(words)


def _with_row_groups(file: SourceFile, partition_bytes: int, storage: Mapping[str, Any]) -> SourceFile:
    if file.size <= partition_bytes:
        return file
    import pyarrow as pa
    import pyarrow.parquet as parquet

    fs, path = filesystem.filesystem(file.url, storage)
    try:
        with filesystem.translated(file.url), fs.open(path, "rb") as opened:
            told = parquet.read_metadata(opened)
    except pa.ArrowException as error:
        raise UsageError(f"{file.url!r} cannot be read as Parquet: {error}.") from None
    sizes = tuple(told.row_group(number).total_byte_size for number in range(told.num_row_groups))
    return replace(file, row_groups=sizes)


def _finished(recipe: Recipe, partitions: Sequence[Partition], there: Mapping[str, int]) -> dict[str, Shard]:
    staged = filesystem.names_in(filesystem.join(recipe.out, STAGED), recipe.storage)
    found = {}
    for partition in partitions:
        name, told = f"{recipe.shard_key(partition.key)}.parquet", recipe.finished_name(partition.key)
        if name in there and told in staged:
            url = filesystem.join(recipe.out, STAGED, told)
            shard = msgspec.json.decode(filesystem.read_bytes(url, recipe.storage), type=Shard)
            if there[name] == shard.bytes:
                found[partition.key] = shard
    return found
