"""The pieces of an exported script that stand for what a rank is given: plain text, which the script consists of."""

SETTINGS = """\
os.environ["ACCELERATE_MIXED_PRECISION"] = {precision!r}
"""

PROCESS = '''\
import json
import pathlib
import sys

import torch
import torch.distributed as dist

# --- one process of several: torchrun and accelerate launch say which ------------------------------------------------
rank = int(os.environ.get("RANK", "0"))
local_rank = int(os.environ.get("LOCAL_RANK", "0"))
world_size = int(os.environ.get("WORLD_SIZE", "1"))
if world_size != {num_ranks} and rank == 0:
    print(f"The run had {num_ranks} processes, this has {{world_size}}: its losses are others.", file=sys.stderr)
if torch.cuda.is_available():
    torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank)
else:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    device = torch.device("cpu")
torch.set_num_threads({num_threads})
if "RANK" in os.environ:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
else:
    os.environ |= {{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)


class Run:
    """In place of the object of a rank: prints what is logged, as one line of JSON each."""

    id, name = {run_id!r}, {name!r}
    rank, world_size, is_on_all_ranks = rank, world_size, True
    should_stop, resumed_step = False, 0
    folder = pathlib.Path.cwd()

    def log(self, values=None, /, *, step=None, **metrics):
        found = {{str(key): _number(value) for key, value in {{**(values or {{}}), **metrics}}.items()}}
        found = {{key: value for key, value in found.items() if value is not None}}
        if rank == 0 and found:
            print(json.dumps({{**({{}} if step is None else {{"step": step}}), **found}}), flush=True)

    def progress(self, step, total=None, desc=""):
        pass

    def steps(self, total):
        return iter(range(total))

    def checkpoint(self, *, metric=None, mode="min", **objects):
        pass  # saves nothing


def _number(value):
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


run = Run()
'''

ACCELERATOR_LOG = """\

# --- what an Accelerator logs is printed, too ------------------------------------------------------------------------
import accelerate

_accelerator_log = accelerate.Accelerator.log


def _log(self, values, step=None, log_kwargs={}):
    run.log(values, step=step)
    return _accelerator_log(self, values, step, log_kwargs)


accelerate.Accelerator.log = _log
"""

SEEDS = """\

# --- random numbers: alike on all processes while a model is made, apart while it is trained -------------------------
import hashlib
import random

import numpy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import dataloader as _dataloader

_streams = {"seed": None, "begun": True, "order": None}


def _seed(value):
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)
    _streams.update(seed=value, begun=world_size == 1, order=None)


def _mixed(seed, number):
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little")


def _holds():
    return _streams["seed"] is not None and torch.initial_seed() == _streams["seed"]


def _begin_training(parameters):
    if _streams["begun"]:
        return
    _streams["begun"] = True
    if not _holds() or any(isinstance(parameter, DTensor) for parameter in parameters):
        return
    _streams["order"] = torch.Generator().manual_seed(_streams["seed"])
    if rank:
        own = _mixed(_streams["seed"], rank)
        random.seed(own)
        numpy.random.seed(own % 2**32)
        state = torch.Generator().manual_seed(own).get_state()
        state[:8] = torch.get_rng_state()[:8]  # torch.initial_seed() stays
        torch.set_rng_state(state)
        if device.type == "cuda":
            torch.cuda.manual_seed(own)


def _before_step(optimizer, *_):
    _begin_training([value for group in optimizer.param_groups for value in group["params"]])


_wrap, _iterate = DistributedDataParallel.__init__, _dataloader._BaseDataLoaderIter.__init__


def _wrapped(self, *args, **kwargs):
    _wrap(self, *args, **kwargs)
    _begin_training(self.parameters())


def _iterating(self, loader):
    if _streams["order"] is not None and _holds():
        for part in _parts(loader):
            if getattr(part, "generator", self) is None and part is not loader:
                part.generator = _streams["order"]
    _iterate(self, loader)
    if rank and _holds():
        self._base_seed = _mixed(self._base_seed, rank) >> 1


def _parts(loader):
    seen, waiting = [], [loader]
    while waiting:
        part = waiting.pop()
        if part is None or any(part is known for known in seen):
            continue
        seen.append(part)
        waiting += [getattr(part, name, None) for name in ("batch_sampler", "sampler", "base_dataloader")]
    return seen


register_optimizer_step_pre_hook(_before_step)
DistributedDataParallel.__init__ = _wrapped
_dataloader._BaseDataLoaderIter.__init__ = _iterating
"""

SAVE = """\

# --- what --save wrote --------------------------------------------------------------------------------------------
for _value in ({names},):
    _plain = getattr(_value, "module", _value) if isinstance(_value, torch.nn.Module) else _value
    if rank == 0:
        if hasattr(_plain, "save_pretrained"):
            _plain.save_pretrained("model")
        else:
            os.makedirs("model", exist_ok=True)
            torch.save(_plain.state_dict(), "model/model.pt")
"""

END = """\

if dist.is_initialized():  # accelerator.end_training() takes the group down
    dist.barrier()
    dist.destroy_process_group()
"""
