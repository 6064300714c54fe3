"""A cell measured and rehearsed in processes of its own."""

from __future__ import annotations

from jupyter_llmcloud.client.preflight import CellText, dry_run, rehearse

TRAINS = """\
import torch
model = torch.nn.Linear(256, 256, bias=False)
optimizer = torch.optim.AdamW(model.parameters())
for batch in torch.utils.data.DataLoader(torch.randn(64, 256), batch_size=8):
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
