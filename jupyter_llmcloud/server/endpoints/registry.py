"""The endpoints of a server, by name: made, changed, stopped. What can be refused is refused before anything starts."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.names import check_name, replica_bounds
from jupyter_llmcloud.core.scheduling.priorities import Shortage, give_way
from jupyter_llmcloud.core.serving.endpoint import rollout
from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.core.serving.models.engine_names import AUTO, LLAMA_CPP, is_external, is_url
from jupyter_llmcloud.core.serving.models.model_kind import GENERATOR, why_not_instead
from jupyter_llmcloud.core.spec import EndpointSpec
from jupyter_llmcloud.errors import Busy, LLMCloudError, ModelError, NameTaken, NotFound, UsageError
from jupyter_llmcloud.server.endpoints.controller import ACTIVE_STATES, EndpointController
from jupyter_llmcloud.server.endpoints.follow import FollowedRun, RunModel, newest_model
from jupyter_llmcloud.server.endpoints.model_folder import (
    ModelFolder,
    model_elsewhere,
    of_followed_run,
    resolve_adapter,
    resolve_gguf,
    resolve_target,
)
from jupyter_llmcloud.storage.models.weights_layout import difference
from jupyter_llmcloud.storage.server_state import StoredEndpoint

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.endpoints.records import EndpointRecords
    from jupyter_llmcloud.server.endpoints.replica_host import ReplicaHost
    from jupyter_llmcloud.storage.runs import RunStore


PYTHON = "python"


class EndpointRegistry:
    """All endpoints of one server."""

    def __init__(
        self, records: EndpointRecords, host: ReplicaHost, runs: RunStore, root_dir: Path | None, log: Logger
    ) -> None:
        self._records = records
        self._host = host
        self._runs = runs
        self._root_dir = root_dir
        self._log = log
        self._endpoints: dict[str, EndpointController] = {}

    async def start(self) -> None:
        """Take up the endpoints that the database knows; those that lived find their replicas again."""
        for stored in self._records.load():
            if stored.name not in self._endpoints:
                endpoint = self._add(stored)
                if stored.state in ACTIVE_STATES:
                    endpoint.open(inherited=True)
                    self._follow(endpoint)
        await asyncio.to_thread(self._records.remove_unneeded)

    def _add(self, stored: StoredEndpoint) -> EndpointController:
        endpoint = EndpointController(stored, self._host, self._records, self._log)
        self._endpoints[stored.name] = endpoint
        return endpoint

    async def create(
        self, target: str, spec: EndpointSpec, reuse: bool = False, code: ModelFolder | None = None
    ) -> EndpointController:
        """Begin to serve a target, or `code` of the user's own.

        With `reuse` an endpoint that serves it under that name already is returned as it is. Code takes the place of
        code that is served under the same name: other replicas are ready before the old ones end.
        """
        try:
            step = None
            if spec.follow:
                folder, step = await self._newest_of(target)
            else:
                folder = code or await self._resolve(target, spec.base_model, spec.engine)
        except NotFound:
            running = self._endpoints.get(target)
            if reuse and spec.name in (None, target) and running is not None and running.is_active:
                return running
            raise
        name = check_name(spec.name or (target if spec.follow else folder.name), "endpoint")
        known = await self._alone(name)
        if known is not None and known.is_active and code is not None and known.stored.current.kind == PYTHON:
            self._replace(known, revision_of(folder, target, spec, rollout.next_number(known.stored.revisions)))
            return known
        if known is not None and known.is_active:
            current = known.stored.current
            if reuse and (current.model, current.fingerprint) == (str(folder.path), folder.revision):
                return known
            raise NameTaken(
                f"endpoint {name!r} serves {known.stored.current.target!r} already: choose another --name, "
                f"stop it first (%endpoints stop {name}), or give it this model: %endpoints update {name} {target}."
            )
        before = known.stored.revisions if known is not None else []
        revision = revision_of(folder, target, spec, rollout.next_number(before))
        revisions = rollout.updated(before, dataclasses.replace(revision, step=step), time.time())
        endpoint = self._add(StoredEndpoint(name, revisions, created=time.time(), cluster=spec.cluster))
        endpoint.stored.follows = self._runs.find(target).run_id if spec.follow else ""
        endpoint.open()
        self._follow(endpoint)
        return endpoint

    async def _alone(self, name: str) -> EndpointController | None:
        """The endpoint of this name; one that has failed, when nothing is left of it.

        Until then it still writes down how its replicas end, which would be taken for what comes after it.
        """
        while (known := self._endpoints.get(name)) is not None and not known.is_active:
            await known.ended()
            if self._endpoints.get(name) is known:
                break
        return known

    def _replace(self, endpoint: EndpointController, new: Revision) -> None:
        current = endpoint.stored.current
        alike = {name: getattr(current, name) for name in ("number", "role", "weight", "in_place_of", "was_stable")}
        if dataclasses.replace(new, **alike) != current:
            endpoint.change(rollout.updated(endpoint.stored.revisions, new, time.time()))

    # --- a run that is followed ---

    async def _newest_of(self, target: str) -> tuple[ModelFolder, int | None]:
        """The newest model of a run that trains. Raises Busy when there is none yet."""
        run = self._runs.find(target)
        found = await asyncio.to_thread(newest_model, run)
        record = run.read()
        if found is None and not record.spec.get("checkpoint_every"):
            raise ModelError(
                f"run {record.name!r} saves no checkpoints that could be followed: start it with --checkpoint-every N "
                "--save model,tokenizer."
            )
        if found is None:
            raise Busy(f"run {record.name!r} has not saved a checkpoint yet.")
        return await self._resolve(str(found.folder), is_own=True), found.step

    def _follow(self, endpoint: EndpointController) -> None:
        stored = endpoint.stored
        if not stored.follows:
            return

        run = self._runs.folder(stored.follows)

        async def serve(model: RunModel) -> None:
            folder = await self._resolve(str(model.folder), is_own=True)
            await self._update(endpoint, folder, (await asyncio.to_thread(run.read)).name, step=model.step)

        def serving() -> tuple[int | None, Path] | None:
            if not endpoint.is_settled:
                return None
            return stored.current.step, Path(stored.current.model)

        followed = FollowedRun(run, serve, serving, self._log)
        endpoint.follow(followed.follow)

    async def _resolve(
        self, target: str, base_model: str | None = None, engine: str = AUTO, *, is_own: bool = False
    ) -> ModelFolder:
        if is_url(engine):
            return model_elsewhere(target, engine)
        if engine == LLAMA_CPP:
            return await asyncio.to_thread(resolve_gguf, target, self._runs, self._root_dir)
        if is_own:
            return await asyncio.to_thread(of_followed_run, Path(target))
        return await asyncio.to_thread(resolve_target, target, self._runs, self._root_dir, base_model)

    def get(self, name: str) -> EndpointController:
        """The endpoint with this name; raises NotFound."""
        if (endpoint := self._endpoints.get(name)) is None:
            known = ", ".join(sorted(self._endpoints)[:8])
            raise NotFound(
                f"there is no endpoint {name!r}. " + (f"There is: {known}." if known else "There are none yet.")
            )
        return endpoint

    def active(self, name: str) -> EndpointController:
        """The endpoint with this name, which answers or will. Raises NotFound, UsageError."""
        endpoint = self.get(name)
        if not endpoint.is_active:
            raise UsageError(f"endpoint {name!r} has {endpoint.state}: serve it again (%serve) to change it.")
        return endpoint

    def list(self) -> list[EndpointController]:
        """Every endpoint, the newest first."""
        return sorted(self._endpoints.values(), key=lambda endpoint: endpoint.stored.created, reverse=True)

    def endpoint_of(self, model: str) -> str:
        """The endpoint that is asked for a model: of that name, or with an adapter `NAME:ADAPTER`, or just ADAPTER."""
        if model in self._endpoints:
            return model
        name, colon, adapter = model.partition(":")
        if colon and name in self._endpoints and adapter in self._endpoints[name].stored.adapters:
            return name
        having = (one.name for one in self.list() if one.is_active and model in one.stored.adapters)
        return next(having, model)

    # --- changed while it answers ---

    async def scale(self, name: str, replicas: int | str) -> EndpointController:
        """Have so many replicas, or as many as the load needs between bounds (`1:4`)."""
        endpoint = self.active(name)
        wanted, low, high = replica_bounds(replicas)
        if low is not None and high is not None:
            wanted = min(high, max(low, endpoint.stored.current.num_replicas))
        bounded = [
            dataclasses.replace(item, min_replicas=low, max_replicas=high) if item.role == rollout.STABLE else item
            for item in endpoint.stored.revisions
        ]
        endpoint.change(rollout.scaled(bounded, wanted))
        return endpoint

    def give_way(self, shortage: Shortage) -> None:
        """A world waits for slots of a cluster: endpoints of lower priority give back what they can."""
        lenders = {name: one for name, e in self._endpoints.items() if (one := e.lender(shortage.held)) is not None}
        for name, num_replicas in give_way(shortage, [one for one in lenders.values() if one.held]).items():
            self._endpoints[name].give_way(num_replicas)

    async def update(self, name: str, target: str, canary: int | None = None) -> EndpointController:
        """Serve another model under the same name: instead of the one there is, or to `canary` percent beside it.

        Where only the weights differ they are loaded into the replicas there are, between two steps; else other
        replicas are ready before the old ones end.
        """
        endpoint = self.active(name)
        folder = await self._resolve(target, engine=endpoint.stored.current.engine)
        _check_kind(endpoint, folder, target)
        return await self._update(endpoint, folder, target, canary)

    async def _update(
        self,
        endpoint: EndpointController,
        folder: ModelFolder,
        target: str,
        canary: int | None = None,
        step: int | None = None,
    ) -> EndpointController:
        while True:
            before, current = endpoint.stored.revisions, endpoint.stored.current
            revisions = _that_are_there(before)
            new = dataclasses.replace(
                current, number=rollout.next_number(before), model=str(folder.path), target=target, note="",
                fingerprint=folder.revision, base_model=folder.base_model, in_place_of=0, kind=folder.kind,
                source=folder.source, step=step,
            )  # fmt: skip
            if canary is not None:
                endpoint.change(rollout.with_canary(revisions, dataclasses.replace(new, num_replicas=1), canary))
                return endpoint
            if not new.keep_previous:  # whose replicas shall stay as they are
                new = dataclasses.replace(new, in_place_of=await self._in_place_of(new, current))
            if endpoint.stored.revisions is before:  # else it was changed meanwhile, and this must be thought of anew
                endpoint.change(rollout.updated(revisions, new, time.time()))
                return endpoint

    async def _in_place_of(self, new: Revision, before: Revision) -> int:
        """The revision whose replicas can load the weights of `new`, since nothing else differs; 0: none can."""
        is_plain = new.kind == before.kind == GENERATOR and not is_external(new.engine)
        if not is_plain or new.base_model or before.base_model or new.source or before.source:
            return 0
        try:
            reason = await asyncio.to_thread(difference, Path(before.model), Path(new.model))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            self._log.info("revision %s needs replicas of its own: %s", new.number, reason)
        return 0 if reason else before.number

    async def split(self, name: str, shares: Mapping[str, int]) -> EndpointController:
        """Share the requests out over revisions, in percent."""
        endpoint = self.active(name)
        endpoint.change(rollout.split(endpoint.stored.revisions, shares, time.time()))
        return endpoint

    async def rollback(self, name: str) -> EndpointController:
        """Without the canary, or back to the revision before this one."""
        endpoint = self.active(name)
        while True:
            before, current = endpoint.stored.revisions, endpoint.stored.current
            revisions = rollout.rolled_back(before)
            stable = rollout.with_role(revisions, rollout.STABLE)
            previous = rollout.with_role(before, rollout.PREVIOUS)
            is_warm = stable is not None and previous is not None and stable.number == previous.number
            if stable is not None and stable.number != current.number and not is_warm:
                in_place = dataclasses.replace(stable, in_place_of=await self._in_place_of(stable, current))
                revisions = [in_place if item.number == stable.number else item for item in revisions]
            if endpoint.stored.revisions is before:  # nobody has changed it meanwhile
                endpoint.change(revisions)
                return endpoint

    async def shadow(self, name: str, revision: str | None) -> EndpointController:
        """Copy requests to a revision (its number, or a target to serve as a new one); None ends that."""
        endpoint = self.active(name)
        revisions = endpoint.stored.revisions
        if revision is None:
            endpoint.change(rollout.shadowed(revisions, None))
            return endpoint
        try:
            new = rollout.find(revisions, revision)
        except UsageError as error:
            try:
                folder = await self._resolve(revision, engine=endpoint.stored.current.engine)
            except LLMCloudError as other:
                raise type(other)(f"{error} {other}") from None
            _check_kind(endpoint, folder, revision)
            revisions = endpoint.stored.revisions  # as they are now
            new = dataclasses.replace(
                endpoint.stored.current, number=rollout.next_number(revisions), model=str(folder.path), target=revision,
                fingerprint=folder.revision, base_model=folder.base_model, num_replicas=1, step=None,
                kind=folder.kind, source=folder.source,
            )  # fmt: skip
        endpoint.change(rollout.shadowed(revisions, new))
        return endpoint

    async def add_adapter(self, name: str, path: str, adapter: str | None = None) -> EndpointController:
        """Load an adapter of PEFT beside the model; it is asked for as `NAME:ADAPTER`, or by its own name."""
        endpoint = self.active(name)
        folder = await asyncio.to_thread(resolve_adapter, path, self._runs, self._root_dir, endpoint.stored.current)
        adapter = check_name(adapter or folder.name, "adapter")
        taken = self.endpoint_of(adapter)
        if taken != adapter and taken != name:
            raise NameTaken(f"endpoint {taken!r} has an adapter {adapter!r}: give this one another --name.")
        if adapter in self._endpoints:
            raise NameTaken(f"there is an endpoint {adapter!r}: give the adapter another --name.")
        await endpoint.set_adapter(adapter, str(folder.path))
        return endpoint

    async def remove_adapter(self, name: str, adapter: str) -> EndpointController:
        """Answer for an adapter no longer."""
        endpoint = self.active(name)
        if adapter not in endpoint.stored.adapters:
            known = ", ".join(sorted(endpoint.stored.adapters)) or "none"
            raise NotFound(f"endpoint {name!r} has no adapter {adapter!r}. There is: {known}.")
        await endpoint.set_adapter(adapter, "")
        return endpoint

    # --- the end ---

    async def stop(self, name: str) -> dict[str, Any]:
        """End an endpoint; one that has ended already is forgotten."""
        endpoint = self.get(name)
        if endpoint.is_active:
            await endpoint.stop()
        elif await self._alone(name) is endpoint:
            del self._endpoints[name]
            self._records.delete(name)
            await asyncio.to_thread(self._records.remove_unneeded)
        return endpoint.describe()

    async def close(self, stop: bool) -> None:
        """The server ends; `stop` ends the replicas too."""
        endpoints = list(self._endpoints.values())
        await asyncio.gather(*(e.stop() if stop else e.detach() for e in endpoints if e.is_active))
        await asyncio.gather(*(endpoint.ended() for endpoint in endpoints if not endpoint.is_active))
        self._records.close()


def revision_of(folder: ModelFolder, target: str, spec: EndpointSpec, number: int) -> Revision:
    """What is served, and how it was asked for."""
    num_replicas, low, high = replica_bounds(spec.replicas)
    return Revision(
        number, str(folder.path), target, folder.revision, spec.dtype, num_replicas,
        base_model=folder.base_model,
        kind=folder.kind,
        source=folder.source,
        engine=spec.engine,
        api_key_env=spec.api_key_env or "",
        max_model_len=spec.max_model_len,
        max_concurrent=spec.max_concurrent,
        threads=spec.threads,
        cores=spec.cores,
        memory_bytes=spec.memory,
        cache_bytes=spec.kv_cache,
        devices=spec.devices,
        min_replicas=low,
        max_replicas=high,
        keep_requests=spec.keep_requests,
        keep_previous=spec.keep_previous,
        priority=spec.priority,
    )  # fmt: skip


def _that_are_there(revisions: Sequence[Revision]) -> list[Revision]:
    """Without models of checkpoints that are gone: to these one cannot go back."""
    return [
        item for item in revisions if item.role != rollout.RETIRED or item.step is None or Path(item.model).is_dir()
    ]


def _check_kind(endpoint: EndpointController, folder: ModelFolder, target: str) -> None:
    """Raise UsageError for a model that would answer none of the requests that an endpoint gets."""
    current = endpoint.stored.current
    if reason := why_not_instead(endpoint.stored.name, current.kind, folder.kind, target):
        raise UsageError(reason)
