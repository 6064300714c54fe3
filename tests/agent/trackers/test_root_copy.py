"""A root at a URL: a run is copied there by a process beside it, and goes on from the copy where the run is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jupyter_llmcloud.agent.trackers.root_copy import TOLD, RootCopy
from jupyter_llmcloud.storage.resume import resume
from jupyter_llmcloud.storage.runs import ROOT_TOLD, RunFolder, RunRecord, RunStore
from tests.support.worlds import AgentProcess, Ranks, until

TRAINS = """
import torch
from accelerate import Accelerator
torch.manual_seed(0)
accelerator = Accelerator()
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
data = torch.utils.data.DataLoader(torch.randn(48, 4), batch_size=2, shuffle=True)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
for rows in data:
    loss = (model(rows) - rows.sum(1, keepdim=True)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    run.log(loss=loss.item())
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
"""


def store_at(root: Path, url: str) -> RunStore:
    """As another machine has it, whose LLMCLOUD_ROOT is this URL."""
    (root / "runs").mkdir(parents=True)
    (root / ROOT_TOLD).write_text(json.dumps({"url": url}))
    return RunStore(root)


@pytest.mark.slow
def test_a_run_that_was_copied_goes_on_elsewhere(node_agent: AgentProcess, tmp_path: Path) -> None:
    url = (tmp_path / "there").as_uri()
    here = store_at(tmp_path / "here", url)
    ranks = Ranks(node_agent, 2)
    outcome = ranks.ok(TRAINS, run_id="copied", folder=str(here.path / "copied"), checkpoint_every=5)
    wanted = ranks.pull("weights")
    copied = RunFolder(tmp_path / "there/runs/copied")
    until(lambda: copied.exists and copied.read().state == "finished", "the end is copied")
    assert outcome.folder.path == here.path / "copied"
    assert (copied.path / "cell.py").read_text() == (outcome.folder.path / "cell.py").read_text()

    there = store_at(tmp_path / "elsewhere", url)
    found = resume(there, "copied", {})
    assert found.checkpoint.step == 10 and found.checkpoint.path.is_relative_to(tmp_path / "elsewhere")
    ranks.ok(TRAINS, checkpoint_every=5, resume={"folder": str(found.checkpoint.path), "step": 10})
    assert torch.equal(ranks.pull("weights"), wanted)
    ranks.end()


def test_what_cannot_be_copied_is_said_once_and_tried_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "gpt")
    folder.create(RunRecord("gpt", "gpt", "running"), "pass")
    (tmp_path / "there").write_text("a file is in the way")
    copy = RootCopy(folder, (tmp_path / "there/gpt").as_uri())
    assert not copy.send(is_last=False)
    copy._tries_at = 0.0
    assert not copy.send(is_last=True)
    said = capfd.readouterr().out
    assert said.count("it cannot be copied now") == 1 and str(tmp_path) in said
    (tmp_path / "there").unlink()
    assert not copy.send(is_last=True), "not at once"
    copy._tries_at = 0.0
    assert copy.send(is_last=True)
    assert RunFolder(tmp_path / "there/gpt").read().name == "gpt"
    assert json.loads((folder.path / TOLD).read_text())["problem"] == ""
