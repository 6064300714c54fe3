"""The preparations of data of a server: planned, carried out on a cluster, looked at while they go on, stopped."""

from __future__ import annotations

import asyncio
import base64
import importlib
import pickle
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.data.spec import PrepareSpec
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.errors import LLMCloudError, NameTaken, NotFound, UsageError
from jupyter_llmcloud.protocol.http.data.preparations import DataPreparation, StartPreparation
from jupyter_llmcloud.storage.datasets.manifest import CleaningStep, Tokenizer
from jupyter_llmcloud.storage.datasets.tokenizer import pack_tokenizer

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.cluster.data.planning import PreparationPlan
    from jupyter_llmcloud.cluster.data.preparation import PreparationProgress
    from jupyter_llmcloud.server.audit import Audit
    from jupyter_llmcloud.server.cluster_access import ClusterAccess

KEPT = 50  # preparations that are told of
LOOK_S = 0.25
OWN_FIELDS = ("source", "code", "storage_options")


class Running:
    """One preparation: what is told of it, and the task that carries it out."""

    def __init__(self, ident: str, out: str, cluster: str, progress: PreparationProgress, note: str) -> None:
        self.ident, self.out, self.cluster, self.note = ident, out, cluster, note
        self.progress = progress
        self.result: dict[str, Any] = {}
        self.state: Any = "running"
        self.task: asyncio.Task[None] | None = None

    def end(self, state: str, **result: Any) -> None:
        """It has ended so."""
        self.state, self.result = state, {"ended": time.time(), **result}

    def describe(self) -> DataPreparation:
        """How it is now."""
        progress = self.progress
        values = {
            name: getattr(progress, name)
            for name in ("phase", "done", "total", "processes", "documents", "tokens", "rows", "dropped", "began")
        }
        told = (self.state, *values.values())
        version = hash(told) & 0x7FFFFFFF
        common = {"id": self.ident, "out": self.out, "cluster": self.cluster, "state": self.state, "note": self.note}
        return DataPreparation(**{**common, **values, "version": version, **self.result})


class Preparations:
    """What a server does about data. A preparation ends with the server; the next one goes on where it was."""

    def __init__(self, clusters: ClusterAccess, audit: Audit, log: Logger) -> None:
        self._clusters = clusters
        self._audit = audit
        self._log = log
        self._known: dict[str, Running] = {}
        self._planning: set[str] = set()

    def list(self) -> list[DataPreparation]:
        """The newest first."""
        return [running.describe() for running in reversed(self._known.values())]

    def find(self, ident: str) -> Running:
        """One of them. Raises NotFound."""
        if ident not in self._known:
            raise NotFound(f"there is no preparation {ident!r} on this server.")
        return self._known[ident]

    async def wait(self, ident: str, seen: int, wait_s: float) -> DataPreparation:
        """How it is when it is not as `seen` any more, or after a while."""
        running = self.find(ident)
        deadline = time.monotonic() + wait_s
        while (told := running.describe()).version == seen and time.monotonic() < deadline:
            if running.task is None or running.task.done():
                break
            await asyncio.wait([running.task], timeout=LOOK_S)
        return told

    async def start(self, body: StartPreparation, actor: str) -> DataPreparation:
        """Plan it, and begin. Raises what is wrong with the source, the options, or with what is there."""
        spec = PrepareSpec.make({k: v for k, v in body.given().items() if k not in OWN_FIELDS}, Interface.REST)
        out = str(spec.out or "").rstrip("/")
        if out in self._planning or any(r.out == out and r.state == "running" for r in self._known.values()):
            raise NameTaken(f"data is being prepared into {out!r} already. Wait for its end, or stop it.")
        self._planning.add(out)
        try:
            plan = await asyncio.to_thread(_plan, spec, body)
            running = await self._begin(plan, spec, actor)
        finally:
            self._planning.discard(out)
        return running.describe()

    async def _begin(self, plan: PreparationPlan, spec: PrepareSpec, actor: str) -> Running:
        module = await asyncio.to_thread(importlib.import_module, "jupyter_llmcloud.cluster.data.preparation")
        progress: PreparationProgress = module.PreparationProgress(total=len(plan.partitions))
        ident = secrets.token_hex(6)
        if plan.is_done:
            assert plan.before is not None
            running = Running(ident, plan.recipe.out, "", progress, "nothing has changed")
            running.end("finished", **_summary(plan.before, 0))
        else:
            pool = await self._clusters.pool()
            cluster, client = await pool.client_for_data(spec.cluster)
            running = Running(ident, plan.recipe.out, cluster, progress, plan.note)
            work = module.Preparation(client, plan, progress, spec.processes)
            running.task = asyncio.ensure_future(self._carry_out(running, work, len(plan.partitions), actor))
        self._known[ident] = running
        for old in [r.ident for r in self._known.values() if r.state != "running"][:-KEPT]:
            del self._known[old]
        return running

    async def _carry_out(self, running: Running, work: Any, num_new: int, actor: str) -> None:
        try:
            made = await work.run()
            running.end("finished", **_summary(made, num_new))
        except asyncio.CancelledError:
            reason = "it was stopped; finished shards are kept, and the same request goes on from there"
            running.end("stopped", reason=reason)
        except LLMCloudError as error:
            running.end("failed", reason=str(error), error=error.code)
        except Exception as error:
            self._log.error("the preparation of %s has failed", running.out, exc_info=error)
            running.end("failed", reason=f"{type(error).__name__}: {error}", error="InternalError")
        self._audit.tell(actor, "data.prepare", running.out, outcome=running.state)

    async def stop(self, ident: str) -> DataPreparation:
        """End it, and wait for that. What is finished is kept."""
        running = self.find(ident)
        if running.task is not None and not running.task.done():
            running.task.cancel()
            await asyncio.wait([running.task], timeout=15)
        return running.describe()

    async def close(self) -> None:
        """The server ends."""
        tasks = [running.task for running in self._known.values() if running.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _summary(made: Any, num_new: int) -> dict[str, Any]:
    return {
        "num_shards": len(made.shards),
        "num_new_shards": num_new,
        "rows": made.num_rows,
        "tokens": made.num_tokens,
        "documents": sum(shard.documents for shard in made.shards),
        "dropped": sum(shard.filtered + shard.exact + shard.near for shard in made.shards),
        "fingerprint": made.fingerprint,
    }


def _plan(spec: PrepareSpec, body: StartPreparation) -> PreparationPlan:
    """In a thread: it lists the source."""
    planning = importlib.import_module("jupyter_llmcloud.cluster.data.planning")
    recipe = _recipe(spec, body)
    found: PreparationPlan = planning.plan(recipe, body.source, spec.partition_size, spec.overwrite)
    return found


def _recipe(spec: PrepareSpec, body: StartPreparation) -> Any:
    recipes = importlib.import_module("jupyter_llmcloud.cluster.data.recipe")
    code = body.code
    tokenizer = None
    content = b""
    if code is not None:
        try:
            content = base64.b64decode(code.content, validate=True)
        except ValueError:
            raise UsageError("code.content is no base64.") from None
        told = code.tokenizer
        if told is not None:
            tokenizer = Tokenizer(**{name: getattr(told, name) for name in told.__struct_fields__})
    elif spec.tokenizer is not None:
        tokenizer, definition = pack_tokenizer(spec.tokenizer)
        content = pickle.dumps({"steps": {}, "tokenizer": definition})
    replace(spec, tokenizer=spec.tokenizer or (tokenizer.name if tokenizer is not None else None)).checked()
    steps = code.steps if code is not None and code.steps else [CleaningStep(name=name) for name in spec.steps or ()]
    return recipes.Recipe(
        kind=spec.format,
        out=str(spec.out).rstrip("/"),
        column=spec.text_column,
        seq_len=spec.seq_len,
        unit=spec.unit,
        steps=tuple(CleaningStep(name=step.name, source_hash=step.source_hash) for step in steps),
        tokenizer=tokenizer,
        own=content,
        dedup=spec.dedup,
        threshold=spec.threshold,
        normalize=tuple(spec.normalize or ()),
        image_size=spec.image_size,
        skip_bad=spec.bad_rows == "skip",
        encoding=spec.encoding,
        types=tuple((name, kind) for name, _, kind in (item.rpartition("=") for item in spec.types or ())),
        storage=dict(body.storage_options or {}),
    )
