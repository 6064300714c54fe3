"""A preparation: its tasks are handed to the workers of a cluster, a few at a time, until the manifest is written.

Our clusters are set up to do nothing but place ranks (see `dask_config`): one thread a worker, no stealing, no second
try. So this has a profile of its own: each task leaves that thread at once and waits for a process beside the worker,
of which each host has one per core; which worker takes the next partition is decided here, when it has a process free;
and what a lost worker had is given to others. No more is under way than there are processes, so that neither the
scheduler nor a worker holds more than that, however many partitions there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
from distributed import Client, secede
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from jupyter_llmcloud.cluster.data import features, signatures
from jupyter_llmcloud.cluster.data.duplicates import to_drop
from jupyter_llmcloud.cluster.data.planning import PreparationPlan
from jupyter_llmcloud.cluster.data.recipe import is_shard_key
from jupyter_llmcloud.cluster.data.work import STAGED, FirstPass
from jupyter_llmcloud.cluster.data.worker_process import carry_out, end_processes
from jupyter_llmcloud.core.data.partitions import Partition
from jupyter_llmcloud.errors import ConnectionLost, UsageError
from jupyter_llmcloud.storage.datasets import filesystem, manifest
from jupyter_llmcloud.storage.datasets.columns import unified
from jupyter_llmcloud.storage.datasets.manifest import SHARDS, Manifest, Shard
from jupyter_llmcloud.storage.datasets.shards import schema_of

LOOK_S = 3.0  # how often it is looked which workers there are
MAX_TRIES = 3  # of a partition whose worker is lost
BUCKETS_AT_ONCE = 8
SAMPLED = 4  # partitions whose first rows decide the schema


def _left_over(names: Iterable[str], keys: Collection[str]) -> list[str]:
    """The files of a preparation whose keys are not among these; what others keep in the folder is theirs."""
    ours = [name for name in names if is_shard_key(name.partition(".")[0])]
    return [name for name in ours if name.partition(".")[0] not in keys or name.endswith(".part")]


@dataclass
class PreparationProgress:
    """How far a preparation is. `done` of `total` partitions in this phase."""

    phase: str = "planning"
    done: int = 0
    total: int = 0
    num_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    rows: int = 0
    dropped: int = 0
    processes: int = 0
    began: float = field(default_factory=time.time)


def task(preparation: str, recipe: bytes, method: str, arguments: tuple[Any, ...]) -> Any:
    """What Dask executes: on a worker, beside its thread."""
    with contextlib.suppress(ValueError):  # not on a worker
        secede()
    return carry_out(preparation, recipe, method, arguments)


def host_cores() -> tuple[str, int]:
    """The name of this host, and the cores that this process may use."""
    return platform.node(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Preparation:
    """Carries a plan out.

    Args:
        processes: on each worker; None: the cores of its host, shared out over its workers.
    """

    def __init__(
        self, client: Client, plan: PreparationPlan, progress: PreparationProgress, processes: int | None = None
    ) -> None:
        self._client = client
        self._plan = plan
        self._processes = processes
        self._id = secrets.token_hex(8)
        self._recipe = cloudpickle.dumps(plan.recipe)
        self.progress = progress

    async def run(self) -> Manifest:
        """Until the manifest is there. Cancelled, it keeps the shards that are finished."""
        try:
            return await self._run()
        finally:
            await self._end_processes()

    async def _run(self) -> Manifest:
        plan, recipe = self._plan, self._plan.recipe
        todo = [partition for partition in plan.partitions if partition.key not in plan.finished]
        schema = await self._schema()
        first: dict[str, FirstPass] = {}
        dropped: dict[int, tuple[list[int], list[int]]] = {}
        known: dict[str, list[float]] = {}
        if recipe.has_first_pass and plan.partitions:
            first = await self._first_pass()
            if recipe.dedup != "none" and todo:
                dropped = await self._duplicates(first)
            if recipe.normalize:
                whole = features.together(found.moments for found in first.values())
                known = dict(plan.before.statistics) if plan.kept and plan.before else features.statistics(whole)
        numbers = {partition.key: number for number, partition in enumerate(plan.partitions, len(plan.kept))}
        written = dict(plan.finished)
        self._begin("writing shards", len(plan.partitions), len(written))

        def arguments(partition: Partition) -> tuple[Any, ...]:
            drop = dropped.get(numbers[partition.key], ([], []))
            return partition, schema, drop, known, first.get(partition.key)

        def take(partition: Partition, shard: Shard) -> None:
            written[partition.key] = shard
            self.progress.tokens += shard.tokens
            self.progress.rows += shard.num_rows
            self.progress.documents += shard.documents
            self.progress.dropped += shard.filtered + shard.exact + shard.near
            self.progress.num_bytes += partition.num_bytes

        await self._map("shard", todo, arguments, take)
        shards = [*plan.kept, *(written[partition.key] for partition in plan.partitions)]
        return await asyncio.to_thread(self._finish, shards, schema, known)

    # --- phases ---

    async def _schema(self) -> bytes:
        recipe = self._plan.recipe
        if recipe.tokenizer is not None or recipe.kind == "images":
            return b""
        import pyarrow as pa

        if there := next((shard for shard in self._plan.kept if shard.num_rows), None):  # more of the same
            at = filesystem.join(recipe.out, SHARDS, there.name)
            return bytes((await asyncio.to_thread(schema_of, at, recipe.storage)).serialize())
        found: list[Any] = []

        def take(partition: Partition, told: bytes) -> None:
            if told:
                found.append(pa.ipc.read_schema(pa.py_buffer(told)))

        partitions = list(self._plan.partitions)
        spread = partitions[:: max(1, len(partitions) // SAMPLED)][:SAMPLED]
        self._begin("looking at the columns", len(spread))
        await self._map("sample", spread, lambda partition: (partition,), take)
        if not found:
            if self._plan.partitions:
                raise UsageError("no row is left of the source: every one was dropped by a step, or files are empty.")
            return b""
        merged = unified(found, "files")
        null = [name for name, kind in zip(merged.names, merged.types, strict=True) if pa.types.is_null(kind)]
        if null:
            merged = pa.schema([pa.field(f.name, pa.string()) if f.name in null else f for f in merged])
        for option, names in (("normalize", recipe.normalize), ("types", [name for name, _ in recipe.types])):
            if wrong := next((name for name in names if name not in merged.names), None):
                raise UsageError(f"{option}={wrong!r}: there is no such column, but {', '.join(merged.names)}.")
        return bytes(merged.serialize())

    async def _first_pass(self) -> dict[str, FirstPass]:
        found: dict[str, FirstPass] = {}
        self._begin("cleaning", len(self._plan.partitions))

        def take(partition: Partition, told: FirstPass) -> None:
            found[partition.key] = told

        await self._map("first_pass", self._plan.partitions, lambda partition: (partition,), take)
        return found

    async def _duplicates(self, first: dict[str, FirstPass]) -> dict[int, tuple[list[int], list[int]]]:
        plan = self._plan
        keys = [shard.name.removesuffix(".parquet") for shard in plan.kept]
        keys += [first[partition.key].key for partition in plan.partitions]
        buckets = [range(at, at + BUCKETS_AT_ONCE) for at in range(0, signatures.NUM_BUCKETS, BUCKETS_AT_ONCE)]
        pairs: list[Any] = []
        self._begin("finding duplicates", len(buckets))
        await self._map("pairs", buckets, lambda part: (keys, list(part)), lambda _, told: pairs.append(told))
        exact = sorted(pair for found, _ in pairs for pair in found)
        near = sorted(pair for _, found in pairs for pair in found)
        return await asyncio.to_thread(to_drop, exact, near, len(plan.kept))

    def _finish(self, shards: list[Shard], schema: bytes, known: dict[str, list[float]]) -> Manifest:
        """Write the manifest, then remove what it does not name."""
        from jupyter_llmcloud.cluster.data.work import PartitionWork

        plan, recipe = self._plan, self._plan.recipe
        if not any(shard.num_rows for shard in shards):
            raise UsageError("no row is left of the source: every one was dropped by a step, as a duplicate or as bad.")
        before = plan.before
        if plan.partitions or before is None:
            columns = {f.name: str(f.type) for f in PartitionWork.schema_of(recipe, schema)}
        else:
            columns = before.columns
        made = Manifest(
            kind="tokens" if recipe.tokenizer else "images" if recipe.kind == "images" else "rows",
            columns=columns,
            seq_len=recipe.seq_len if recipe.tokenizer else None,
            recipe=recipe.described(),
            tokenizer=recipe.tokenizer,
            steps=list(recipe.steps),
            statistics=known or (before.statistics if before is not None else {}),
            classes=list(recipe.classes),
            sources=list(plan.sources),
            shards=shards,
            created=time.time(),
        )
        manifest.write(recipe.out, made, recipe.storage)
        kept = {shard.name.partition(".")[0] for shard in made.shards}
        for folder, keys in ((STAGED, set()), (SHARDS, kept), (signatures.FOLDER, kept)):
            at = filesystem.join(recipe.out, folder)
            filesystem.remove_files(at, _left_over(filesystem.names_in(at, recipe.storage), keys), recipe.storage)
        return made

    def _begin(self, phase: str, total: int, done: int = 0) -> None:
        self.progress.phase, self.progress.total, self.progress.done = phase, total, done

    # --- the window ---

    async def _map(
        self,
        method: str,
        items: Sequence[Any],
        arguments: Callable[[Any], tuple[Any, ...]],
        take: Callable[[Any, Any], None],
    ) -> None:
        """Have every item carried out, each on a worker that has a process free; the first error ends it."""
        waiting = deque(items)
        tries: Counter[int] = Counter()
        under_way: dict[asyncio.Task[Any], tuple[Any, str]] = {}
        room: dict[str, int] = {}
        looked = 0.0
        try:
            while waiting or under_way:
                if time.monotonic() - looked > LOOK_S:
                    before, room, looked = room, await self._room(), time.monotonic()
                    self.progress.processes = sum(room.values())
                    for asked, (_, address) in under_way.items():
                        if address not in room and address not in before:
                            asked.cancel()  # the scheduler keeps what is for a worker that does not come back
                busy = Counter(address for _, address in under_way.values())
                for address, num in room.items():
                    for _ in range(num - busy[address]):
                        if waiting:
                            item = waiting.popleft()
                            asked = asyncio.ensure_future(self._ask(address, method, arguments(item)))
                            under_way[asked] = item, address
                if not under_way:  # no worker now
                    await asyncio.sleep(LOOK_S / 3)
                    continue
                done, _ = await asyncio.wait(under_way, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                for asked in done:
                    item, _ = under_way.pop(asked)
                    try:
                        take(item, asked.result())
                        self.progress.done += 1
                    except (KilledWorker, CommClosedError, asyncio.CancelledError) as error:
                        tries[id(item)] += 1
                        if tries[id(item)] >= MAX_TRIES:
                            raise ConnectionLost(
                                f"the workers that were to carry a partition out were lost {MAX_TRIES} times: "
                                f"{error or type(error).__name__}. What is finished is kept."
                            ) from None
                        waiting.appendleft(item)
                        looked = 0.0
        finally:
            for asked in under_way:
                asked.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _ask(self, address: str, method: str, arguments: tuple[Any, ...]) -> Any:
        future = self._client.submit(
            task,
            self._id,
            self._recipe,
            method,
            arguments,
            key=f"llmcloud-data-{method}-{secrets.token_hex(8)}",
            workers=[address],
            allow_other_workers=False,
            pure=False,
            retries=0,
        )
        try:
            return await future.result()
        finally:
            future.release()

    async def _room(self) -> dict[str, int]:
        """How many processes each worker may have now."""
        told = await self._client.run(host_cores, on_error="ignore")
        hosts = Counter(host for host, _ in told.values())
        return {
            address: self._processes or max(1, cores // hosts[host]) for address, (host, cores) in sorted(told.items())
        }

    async def _end_processes(self) -> None:
        with contextlib.suppress(Exception):  # workers that are gone have none
            await asyncio.wait_for(self._client.run(end_processes, self._id, on_error="ignore"), 10)
