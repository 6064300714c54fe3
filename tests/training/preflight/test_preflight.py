"""A cell measured and rehearsed in processes of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jupyter_llmcloud.client.preflight import CellText, check_options, dry_run, rehearse
from jupyter_llmcloud.core.parallel.plan import parse_plan
from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.preflight.measure import largest_block

TRAINS = """\
import torch
model = torch.nn.Linear(256, 256, bias=False)
optimizer = torch.optim.AdamW(model.parameters())
batches = iter(torch.utils.data.DataLoader(torch.randn(64, 256), batch_size=8))
for _ in range(2):
    for batch in [next(batches) for _ in range(4)]:  # more than two before an optimizer steps
        model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
HANGS = """\
import torch.distributed as dist
if rank == 0:
    dist.barrier()
"""


def _cell(code: str) -> CellText:
    return CellText([{"filename": "<cell>", "shown": "Cell In[1]", "line_offset": 1, "code": code}])


def test_a_dry_run_tells_the_exact_sizes_and_that_it_fits() -> None:
    report = dry_run(_cell(TRAINS), "ddp", 1, None)
    table = {line.split()[0]: line for line in report.lines}
    assert report.is_good, report.lines
    assert "256 KiB" in table["parameters"] and "65,536 numbers" in table["parameters"]
    assert "256 KiB" in table["gradients"] and "512 KiB" in table["optimizer"]
    assert "batch of 8" in table["activations"]


def test_a_rehearsal_names_the_line_in_which_a_rank_would_wait_for_ever() -> None:
    report = rehearse(_cell(HANGS), None)
    assert not report.is_good
    assert "Cell In[1], line 4: rank 0 waits in barrier()" in "\n".join(report.lines)


RECEIVES_FIRST = """\
import torch, torch.distributed as dist
there = torch.zeros(2)
dist.isend(torch.ones(2), 1 - rank).wait() if rank else dist.recv(there, 1)
dist.send(there, 1) if rank == 0 else dist.recv(there, 0)
dist.recv(there, 1 - rank)
"""


AGREES = """\
import torch, torch.distributed as dist
from accelerate import Accelerator, PartialState, notebook_launcher
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

def main():
    dist.init_process_group("gloo")
    PartialState()
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters())
    def train(rows):
        for batch in DataLoader(rows, batch_size=2):
            model(batch).sum().backward()
            optimizer.step()
    accelerator = Accelerator()
    right = sum(len(batch) for batch in DataLoader(torch.ones(9 + rank, 4), batch_size=5))  # of its own rows
    right = accelerator.reduce(torch.tensor(right))
    for number, batch in enumerate(DataLoader(torch.ones(8 + rank, 4), batch_size=2)):
        if number == 1: break  # as they have agreed
        dist.all_reduce(batch)
    dist.destroy_process_group()
    dist.barrier()
    Accelerator(mixed_precision="bf16")
    train(torch.ones(6, 4))

notebook_launcher(main, num_processes=2)
"""


def test_a_rehearsal_accuses_nobody_of_what_works_on_ranks() -> None:
    report = rehearse(_cell(AGREES), None)
    assert report.is_good, report.lines


def test_a_dry_run_of_a_script_for_a_launcher_measures_it() -> None:
    code = f"import torch.distributed as dist\ndist.init_process_group('gloo')\n{TRAINS}"
    for num_ranks in (1, 2):
        report = dry_run(_cell(code), "ddp", num_ranks, None)
        assert report.is_good and "65,536 numbers" in report.lines[1], report.lines


def test_a_rehearsal_names_ranks_that_receive_from_each_other_first() -> None:
    said = "\n".join(rehearse(_cell(RECEIVES_FIRST), None).lines)
    assert "Cell In[1], line 6: rank 0 waits in recv(), and rank 1 in recv() at Cell In[1], line 6." in said
    assert rehearse(_cell(RECEIVES_FIRST.rpartition("dist.recv")[0]), None).is_good


def test_what_a_cell_keeps_with_its_run_is_left_nowhere(tmp_path: Path) -> None:
    code = "if rank == 0:\n    (run.folder / 'kept').write_text('x')\n    print((run.folder / 'kept').read_text())"
    text = CellText(_cell(code).parts, folder=str(tmp_path))
    assert rehearse(text, None).is_good
    assert not list(tmp_path.iterdir())


PRECISION = "os.environ['ACCELERATE_MIXED_PRECISION']"


def test_each_cell_finds_the_arguments_and_the_precision_that_it_had() -> None:
    (cell,) = _cell(f"assert sys.argv[1:] == ['--lr', '1'] and {PRECISION} == 'no'").parts
    code = f"import os, sys\nassert sys.argv[1:] == [] and {PRECISION} == 'bf16'"
    earlier = {**cell, "filename": "<earlier>", "code": code, "arguments": [], "precision": "bf16"}
    report = rehearse(CellText([earlier, cell], arguments=["--lr", "1"]), None)
    assert report.is_good, report.lines


GROUPS = """\
import torch, torch.distributed as dist
own = dist.new_group([0])
dist.all_reduce(torch.ones(1), dist.ReduceOp.SUM, own)  # torch lets the others call it, too
if rank == 0:
    dist.barrier(own)
dist.broadcast_object_list([rank if rank else print], 1)
"""


def test_a_group_may_be_given_by_its_place() -> None:
    report = rehearse(_cell(GROUPS), None)
    assert report.is_good, report.lines


@pytest.mark.parametrize(
    ("plan", "num_numbers"), [("fsdp", 210), ("fsdp,wrap=Block", 210), ("fsdp,min-params=100", 165)]
)
def test_what_is_gathered_as_a_whole_is_a_block_and_not_a_parameter(plan: str, num_numbers: int) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(10, 10), torch.nn.Linear(10, 10, bias=False)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.blocks = torch.nn.Linear(10, 15), torch.nn.ModuleList([Block(), Block()])

    assert largest_block(Model(), parse_plan(plan)) == 4 * num_numbers


def test_what_is_left_without_the_blocks_may_be_the_largest_part() -> None:
    model = torch.nn.Module()
    model.tokens, model.blocks = torch.nn.Embedding(50, 10), torch.nn.ModuleList([torch.nn.Linear(10, 10)])
    assert largest_block(model, parse_plan("fsdp")) == 4 * 500


def test_options_without_effect_are_named_for_each_of_the_two() -> None:
    spec = RunSpec(dry_run=True, rehearse=True, plan="fsdp", precision="bf16", seed=1, save=["model"], name="a")
    rehearsal, measuring = check_options(spec)
    assert rehearsal.startswith("--rehearse ignores --plan, --save, --seed: it runs on 2 CPU ranks")
    assert measuring.startswith("--dry-run ignores --save, --seed: ")
    assert check_options(RunSpec(dry_run=True, plan="fsdp", nproc=4)) == []
    with pytest.raises(UsageError, match="leave -b out"):
        check_options(RunSpec(dry_run=True, background=True))
