"""What a cell has made of groups, after another rank has failed and the ranks have met in a new one."""

from __future__ import annotations

import collections
import functools
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.training.group.renewed import put_in_place
from tests.support.worlds import Ranks, until

MODELS = """
import copy, functools, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import always_wrap_policy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

def with_hook(model):
    model.register_comm_hook(None, halved)
    return model

def halved(state, bucket):
    halved.calls += 1
    return default_hooks.allreduce_hook(state, bucket)

halved.calls = 0
group, mesh, cpu = dist.new_group([0, 1]), init_device_mesh("cpu", (2,)), torch.device("cpu")
apart = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
models = {
    "ddp": DDP(net()),
    "ddp with an own group": DDP(net(), process_group=group),
    "ddp with a mesh": DDP(net(), device_mesh=mesh),
    "ddp with a hook": with_hook(DDP(net())),
    "zero": DDP(net()),
    "flat": FSDP(net(), device_id=cpu),
    "flat with the own parameters": FSDP(net(), device_id=cpu, use_orig_params=True),
    "flat and nested": FSDP(net(), device_id=cpu, auto_wrap_policy=always_wrap_policy),
    "flat in groups": FSDP(net(), device_id=cpu, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=apart),
    "fully_shard": fully_shard(net()),
    "fully_shard on a mesh": fully_shard(net(), mesh=mesh),
    "fully_shard in groups": fully_shard(net(), mesh=apart),
}
spread = parallelize_module(net(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in models.items()}
optimizers["zero"] = ZeroRedundancyOptimizer(models["zero"].parameters(), torch.optim.SGD, lr=0.1)
held = {"one": group}
class Holder: pass
holder = Holder()
holder.groups, holder.pair, holder.meet = {"two": group}, (group, [group]), functools.partial(dist.barrier, group)

def step(name, x):
    optimizers[name].zero_grad()
    loss = models[name](x).square().mean()
    loss.backward()
    optimizers[name].step()
    return loss

def steps():
    return {name: [round(step(name, torch.ones(4, 8) * (rank + 1)).item(), 5) for _ in range(3)] for name in models}

def sums():
    for one in (group, held["one"], holder.groups["two"], *holder.pair[1], holder.pair[0], mesh.get_group()):
        number = torch.ones(1)
        dist.all_reduce(number, group=one)
    holder.meet()
    return number.item(), spread(torch.ones(2, 8)).sum().item()

first, before = steps(), sums()
"""

FAILURES = {
    "before a step": "if rank == 1: raise RuntimeError('boom')\nstep(NAME, torch.ones(4, 8))",
    "in its forward pass": """
def fail(*_):
    if rank == 1: raise RuntimeError('boom')
inner = list(models[NAME].modules())[-1].register_forward_pre_hook(fail)
step(NAME, torch.ones(4, 8))
""",
    "in its backward pass": """
def fail(_):
    if rank == 1: raise RuntimeError('boom')
out = models[NAME](torch.ones(4, 8))
out.register_hook(fail)
out.sum().backward()
""",
}


@pytest.mark.story
def test_models_meshes_and_groups_are_used_on_after_another_rank_has_failed(world: Ranks) -> None:
    world.ok(MODELS)
    calls = world.ok("halved.calls").results()
    undisturbed = world.ok("second = copy.deepcopy(steps())\nhalved.calls").results()
    names = list(world.pull("first"))
    world.ok(MODELS)
    for failure in FAILURES.values():
        for name in ("ddp", "flat and nested", "flat with the own parameters", "fully_shard"):
            assert "boom" in world.run(f"NAME = {name!r}\n{failure}").error["evalue"]
            world.ok("if 'inner' in dir(): inner.remove()")
    assert world.ok("halved.calls = 0\nassert sums() == before, sums()\nhalved.calls").results() == ["0", "0"]
    world.ok("after = steps()")
    assert int(undisturbed[0]) > int(calls[0])
    assert world.ok("halved.calls").results() != ["0", "0"]
    for rank in (0, 1):
        after = world.pull("after", rank)
        assert [name for name in names if after[name] != world.pull("second", rank)[name]] == []


def test_a_group_of_a_rank_that_is_new_is_told_in_the_failure(new_world: Any) -> None:
    world = new_world()
    world.ok("import os, signal, torch.distributed as dist\npair = dist.new_group([0, 1])")
    world.run("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else dist.barrier()")
    failed = world.run("import torch\ndist.all_reduce(torch.ones(1), group=pair) if rank == 0 else None")
    assert "ended with the ranks that it was made for" in failed.report
    world.ok("import torch.distributed as dist\nagain = dist.new_group([0, 1])\ndist.barrier(again)")


def test_a_group_that_is_made_again_keeps_its_timeout(world: Ranks) -> None:
    made = "datetime.timedelta(seconds=1.5 + rank)"
    world.ok(f"import datetime, torch, torch.distributed as dist\nbrief = dist.new_group([0, 1], timeout={made})")
    assert "boom" in world.run("if rank == 1: raise RuntimeError('boom')\ndist.barrier(brief)").error["evalue"]
    told = world.ok("brief._get_backend(torch.device('cpu')).options._timeout.total_seconds()")
    assert told.results() == ["1.5", "2.5"]


def test_a_rank_that_is_waited_for_in_a_group_that_was_made_again_is_told(world: Ranks) -> None:
    world.ok("import time, torch, torch.distributed as dist\npair = dist.new_group([0, 1])")
    world.ok("for _ in range(5): dist.barrier(pair)")
    world.run("if rank == 1: raise RuntimeError('boom')\ndist.barrier()")
    waits = world.send("dist.barrier(pair) if rank else time.sleep(1000)", hang_after_s=0.6)
    folder = waits.outcome.folder
    hang = until(lambda: folder.exists and folder.read().hang, "the hang is told")
    assert (hang["late"], hang["waiting"]) == ([0], [1])
    assert waits.stop().end().state == "stopped"


class Slots:
    __slots__ = ("group",)


class Group:
    """Stands for one; instances are told apart by identity, as torch's are."""


@pytest.fixture
def pair() -> tuple[Group, Group]:
    return Group(), Group()


def test_what_is_let_go_of_after_the_search_is_freed_at_once(pair: tuple[Group, Group]) -> None:
    batch = Group()
    freed = weakref.ref(batch)
    gc.disable()
    try:
        put_in_place([pair])
        del batch
        assert freed() is None  # the list of all objects that were looked through would hold it until a collection
    finally:
        gc.enable()


def test_whatever_holds_a_former_group_holds_the_new_one(pair: tuple[Group, Group]) -> None:
    former, present = pair
    slots = Slots()
    slots.group = former  # type: ignore[attr-defined]
    instance = SimpleNamespace(group=former, many=(1, [former], (former, 2)))
    mixed: list[Any] = [former, {former: 1, 2: former}, {former, 3}, collections.deque([former])]
    call = functools.partial(id, former)

    def inner() -> Any:
        return former

    keep = [former]
    put_in_place([(former, present)], [keep])
    assert keep != [present]
    assert (slots.group, instance.group, instance.many) == (present, present, (1, [present], (present, 2)))  # type: ignore[attr-defined]
    assert mixed == [present, {present: 1, 2: present}, {present, 3}, collections.deque([present])]
    assert (call.args, inner()) == ((present,), present)


def test_many_groups_at_once_are_found_in_what_holds_them() -> None:
    pairs = [(Group(), Group()) for _ in range(20)]
    holders = [((former,), {"group": former}) for former, _ in pairs]
    put_in_place(pairs)
    assert holders == [((present,), {"group": present}) for _, present in pairs]
