"""The plan of the cell that this rank executes, and what of it is asked between cells."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from jupyter_llmcloud.core.parallel.plan import APART, ParallelPlan, parse_plan
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.group import shared_draws
from jupyter_llmcloud.training.parallel.balance import BALANCE, DataRanks
from jupyter_llmcloud.training.parallel.mesh import MESHES
from jupyter_llmcloud.training.parallel.strategies.base import Copy, Models, Strategy
from jupyter_llmcloud.training.parallel.strategies.prepared import PREPARED


def _of_kind(kind: str) -> type[Strategy]:
    # Only what is asked for is imported: a rank starts with the plan `ddp`.
    match kind:
        case "fsdp" | "hsdp":
            from jupyter_llmcloud.training.parallel.strategies.fully_sharded import FullySharded

            return FullySharded
        case "local-sgd":
            from jupyter_llmcloud.training.parallel.strategies.local_sgd import LocalSGD

            return LocalSGD
        case "diloco":
            from jupyter_llmcloud.training.parallel.strategies.diloco import DiLoCo

            return DiLoCo
        case "async-ps":
            from jupyter_llmcloud.training.parallel.asynchronous.strategy import AsyncParameterServer

            return AsyncParameterServer
        case "tp":
            from jupyter_llmcloud.training.parallel.strategies.tensor_parallel import TensorParallel

            return TensorParallel
        case "tp+fsdp":
            from jupyter_llmcloud.training.parallel.strategies.tensor_parallel import TensorParallelSharded

            return TensorParallelSharded
        case "pipeline":
            from jupyter_llmcloud.training.parallel.strategies.pipeline import Pipeline

            return Pipeline
    raise UsageError(f"--plan {kind}: this version does not know it.")


class ActivePlan:
    """What the rank does beside data parallel training.

    Attributes:
        strategy: of the present cell; None under `ddp`, which DistributedDataParallel carries out.
        data_rank: which part of the data this rank gets, of how many.
        compression: of gradients, "" for none.
    """

    def __init__(self) -> None:
        self.strategy: Strategy | None = None
        self.data_rank = (0, 1)
        self.compression = ""
        self._is_first_step = False
        self._last: Strategy | None = None
        self._plan = ParallelPlan()
        self._is_on_all = True
        self._former: dict[str, str | None] = {}

    def install(self) -> None:
        """Hear of the steps of optimizers. Called once, in a rank, before others that hear of them."""
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)

    def begin(self, cell: Execute, rank: int, world_size: int, device: torch.device) -> None:
        """A cell begins. One that goes on with the plan of an earlier cell keeps its state."""
        plan = parse_plan(cell.plan or "ddp")
        self._plan, self.compression, self.strategy = plan, cell.compress_gradients, None
        self._is_first_step = plan.kind != "ddp" and world_size > 1
        self._is_on_all = len(cell.ranks) in (0, world_size)
        self._former = {name: os.environ.get(name) for name in cell.environment}
        if cell.environment:
            os.environ.update(cell.environment)
        if plan.kind != "ddp":
            self._begin_strategy(plan, rank, world_size, device).begin(f"{cell.run_id}/{cell.attempt}")
        self.data_rank = self.strategy.data_rank if self.strategy is not None else (rank, world_size)
        is_averaged = self.strategy is not None and plan.kind not in APART
        BALANCE.begin(
            cell.balance, DataRanks.of(self.data_rank, world_size, cell.reference_ranks, cell.elastic, is_averaged)
        )

    def _begin_strategy(self, plan: ParallelPlan, rank: int, world_size: int, device: torch.device) -> Strategy:
        if self._last is not None and (self._last.plan, self._last.world_size) == (plan, world_size):
            self.strategy = self._last
        else:
            if self._last is not None:
                self._last.leave()
            self.strategy = self._last = _of_kind(plan.kind)(plan, rank, world_size, device)
        return self.strategy

    def end(self) -> None:
        """The cell has ended well, on every rank: replicas become one model.

        One that a rank executes alone, as it does what others have defined before it came, waits for nobody.
        """
        if self.strategy is not None and self._is_on_all:
            self.strategy.end()

    def close(self) -> None:
        """The cell has ended, however."""
        if self.strategy is not None:
            self.strategy.close()
        self.strategy, self.compression, self._plan = None, "", ParallelPlan()
        BALANCE.close()
        for name, value in self._former.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self._former = {}

    def savers(self, ranks: list[int]) -> list[int]:
        """The ranks that save what the cell names together: the first alone, where others may be lost."""
        return ranks[:1] if self.strategy is not None and self.strategy.is_asynchronous else ranks

    # --- training ---

    def draw_alike(self) -> None:
        """Ranks that compute one batch together go on from numbers that may be those of ranks that did not."""
        if self.strategy is not None and self.data_rank[1] < self.strategy.world_size:
            shared_draws.draw_alike(self.data_rank[0])

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if PREPARED.is_stale(optimizer):
            raise UsageError(
                f"--plan {self._plan.text}: this optimizer trains parameters that its model has no more: it was made "
                "before the model was prepared. Hand both to one call: accelerator.prepare(model, optimizer)."
            )
        if self._is_first_step:
            self._is_first_step = False
            self._look_what_is_trained(optimizer)

    def _look_what_is_trained(self, optimizer: Any) -> None:
        """Plain torch and Lightning spread their models themselves, and the plan would be left out without a word."""
        strategy = self.strategy
        if strategy is not None and strategy.rank == 0 and not PREPARED.trains(optimizer):
            print(
                f"--plan {self._plan.text}: the model that is trained here was not handed to accelerator.prepare() or "
                "to a Trainer of transformers: the plan does nothing for it, and it is trained as the cell made it.",
                file=sys.stderr,
            )

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if self.strategy is not None:
            self.strategy.after_step(optimizer)
        BALANCE.after_step()

    # --- the group ---

    def rebuild(self, group: Any) -> int:
        """Models that were spread use a renewed group, if every rank still has its part of them."""
        models = PREPARED.models
        signatures: list[Any] = [None] * dist.get_world_size(group)
        own = [(type(model).__name__, sum(1 for _ in model.parameters())) for model in models]
        dist.all_gather_object(signatures, (own, MESHES.dimensions()), group)
        if any(signature != signatures[0] for signature in signatures):
            MESHES.forget()  # a rank is new: it has no part of these models
            if self._last is not None:
                self._last.forget()
            return 0
        MESHES.renew()
        if self._last is not None:
            self._last.broken()
        return len(models)

    # --- checkpoints ---

    def state(self, copy: Copy, models: Models) -> dict[str, Any]:
        """What a checkpoint of these models says of the plan."""
        own = self.strategy.state(copy, models) if self.strategy is not None else None
        return {"text": self._plan.text, "state": own}

    def how_to_load(self, saved: dict[str, Any] | None, same_world: bool) -> str:
        """What of a checkpoint of this plan is loaded: "own", "whole" (put together), "first" (rank's for all).

        Raises ResumeMissed when it cannot be converted to the present plan.
        """
        then = parse_plan((saved or {}).get("text", "ddp"))
        now = self._plan
        is_same = (then.kind, then.sizes) == (now.kind, now.sizes)
        if "pipeline" in (then.kind, now.kind) and not (is_same and same_world):
            raise ResumeMissed(
                f"it was saved under --plan {then.text}, and now the plan is {now.text}: the optimizer of a pipeline "
                f"knows its own stage alone. Resume it with --plan {then.text}, or serve and train on from the model "
                "that the run has saved."
            )
        if then.kind in APART and not (is_same and same_world):
            return "first"
        return "own" if is_same and same_world else "whole"

    def put(self, saved: dict[str, Any] | None, how: str, models: Models) -> None:
        """These models are restored: so is what belongs to the plan."""
        if self.strategy is not None:
            self.strategy.put(saved["state"] if saved is not None and how == "own" else None, models)


ACTIVE = ActivePlan()
