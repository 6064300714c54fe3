"""The pieces of an exported script that stand for what a rank is given: plain text, which the script consists of.

Cells bind names as they like: `rank = 8` of an adapter, `device = "cpu"`, `dist = Normal(0, 1)`, `os = "linux"`. So
what is called while they are executed or behind them looks nothing up among their names; where they bind names of
Python itself, as in `for iter in range(100)`, `with_names_of_python` sees to it.
"""

SETTINGS = """\
import os

os.environ["ACCELERATE_MIXED_PRECISION"] = {precision!r}
"""

PROCESS = '''\
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
        import json

        found = {{str(key): self._number(value) for key, value in {{**(values or {{}}), **metrics}}.items()}}
        found = {{key: value for key, value in found.items() if value is not None}}
        if self.rank == 0 and found:
            print(json.dumps({{**({{}} if step is None else {{"step": step}}), **found}}), flush=True)

    def progress(self, step, total=None, desc=""):
        pass

    def steps(self, total):
        return iter(range(total))

    def checkpoint(self, *, metric=None, mode="min", **objects):
        pass  # saves nothing

    @staticmethod
    def _number(value):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            return None


run = Run()
'''

ACCELERATOR_LOG = """\

# --- what an Accelerator logs is printed, too ------------------------------------------------------------------------
def _print_what_is_logged(run):
    import accelerate

    log = accelerate.Accelerator.log

    def logged(self, values, step=None, log_kwargs={}):
        run.log(values, step=step)
        return log(self, values, step, log_kwargs)

    accelerate.Accelerator.log = logged


_print_what_is_logged(run)
"""

SEEDS = """\

# --- random numbers: alike on all processes while a model is made, apart while it is trained -------------------------
def _seeding(rank, world_size, device):
    import hashlib
    import random

    import numpy
    import torch
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from torch.utils.data import dataloader

    streams = {"seed": None, "begun": True, "order": None}

    def seed_all(value):
        random.seed(value)
        numpy.random.seed(value % 2**32)
        torch.manual_seed(value)
        streams.update(seed=value, begun=world_size == 1, order=None)

    def mixed(seed, number):
        return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little")

    def holds():
        return streams["seed"] is not None and torch.initial_seed() == streams["seed"]

    def begin_training(parameters):
        if streams["begun"]:
            return
        streams["begun"] = True
        if not holds() or any(isinstance(parameter, DTensor) for parameter in parameters):
            return
        streams["order"] = torch.Generator().manual_seed(streams["seed"])
        if rank:
            own = mixed(streams["seed"], rank)
            random.seed(own)
            numpy.random.seed(own % 2**32)
            state = torch.Generator().manual_seed(own).get_state()
            state[:8] = torch.get_rng_state()[:8]  # torch.initial_seed() stays
            torch.set_rng_state(state)
            if device.type == "cuda":
                torch.cuda.manual_seed(own)

    def before_step(optimizer, *_):
        begin_training([value for group in optimizer.param_groups for value in group["params"]])

    wrap, iterate = DistributedDataParallel.__init__, dataloader._BaseDataLoaderIter.__init__

    def wrapped(self, *args, **kwargs):
        wrap(self, *args, **kwargs)
        begin_training(self.parameters())

    def iterating(self, loader):
        if streams["order"] is not None and holds():
            for part in parts(loader):
                if getattr(part, "generator", self) is None and part is not loader:
                    part.generator = streams["order"]
        iterate(self, loader)
        if rank and holds():
            self._base_seed = mixed(self._base_seed, rank) >> 1

    def parts(loader):
        seen, waiting = [], [loader]
        while waiting:
            part = waiting.pop()
            if part is None or any(part is known for known in seen):
                continue
            seen.append(part)
            waiting += [getattr(part, name, None) for name in ("batch_sampler", "sampler", "base_dataloader")]
        return seen

    register_optimizer_step_pre_hook(before_step)
    DistributedDataParallel.__init__ = wrapped
    dataloader._BaseDataLoaderIter.__init__ = iterating
    return seed_all


_begin_with_seed = _seeding(rank, world_size, device)
"""

SAVE = """\

# --- what --save wrote --------------------------------------------------------------------------------------------
def _save(*values):
    import os

    import torch

    for value in values if os.environ["RANK"] == "0" else ():
        while isinstance(value, torch.nn.Module):
            inner = value.module if isinstance(value, torch.nn.parallel.DistributedDataParallel) else value
            inner = getattr(inner, "_orig_mod", inner)  # of torch.compile()
            if inner is value:
                break
            value = inner
        if hasattr(value, "save_pretrained"):
            value.save_pretrained("model")
        else:
            os.makedirs("model", exist_ok=True)
            if isinstance(value, torch.nn.Module):
                torch.save(value.state_dict(), "model/model.pt")
            else:  # a tokenizer of the library tokenizers
                value.save("model/tokenizer.json")
"""

END = """\


def _leave():
    import torch.distributed

    if torch.distributed.is_initialized():  # accelerator.end_training() takes the group down
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


_leave()
"""
