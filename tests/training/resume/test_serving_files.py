"""The checkpoints of a run that saves its model in the end can be served while it trains."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.server.endpoints.follow import newest_model
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.storage.model_folder import check_folder
from jupyter_llmcloud.storage.models import followed_model
from tests.support.worlds import Ranks
from tests.training.test_world_save import TINY, TOKENIZER

LOOP = """
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
data = torch.utils.data.DataLoader(torch.arange(256).reshape(32, 8) % 64, batch_size=4)
{prepare}
for batch in data:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
plain = getattr(model, "module", model)
state = {{name: value.detach().clone() for name, value in plain.state_dict().items()}}
"""
PREPARE = "from accelerate import Accelerator\nmodel, optimizer, data = Accelerator().prepare(model, optimizer, data)"


def test_the_newest_checkpoint_is_a_model_folder_with_the_weights_of_its_step(world: Ranks) -> None:
    code = TINY + TOKENIZER + LOOP.format(prepare=PREPARE)
    outcome = world.ok(code, save=["model", "raw"], checkpoint_every=4)
    newest, _ = CheckpointFolder(outcome.folder.path / "checkpoints").newest()
    assert newest is not None and newest.step == 4
    folder = followed_model.make(outcome.folder.path, newest)
    check_folder(folder)
    loaded, state = AutoModelForCausalLM.from_pretrained(folder).state_dict(), world.pull("state")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())
    assert AutoTokenizer.from_pretrained(folder)("the for")["input_ids"] == [1, 2]
    found = newest_model(outcome.folder)
    assert found is not None and (found.folder, found.step, found.is_final) == (outcome.folder.model, None, True)
    followed_model.retain(outcome.folder.path, set())
    assert not folder.exists()


def test_a_run_that_saves_no_model_cannot_be_followed_and_says_so(world: Ranks) -> None:
    outcome = world.ok(TINY + LOOP.format(prepare=""), checkpoint_every=8)
    with pytest.raises(ModelError, match="--save model,tokenizer"):
        newest_model(outcome.folder)


def test_a_model_that_each_rank_trains_for_itself_cannot_be_followed_and_says_so(world: Ranks) -> None:
    outcome = world.ok(TINY + TOKENIZER + LOOP.format(prepare=""), save=["model", "raw"], checkpoint_every=8)
    newest, _ = CheckpointFolder(outcome.folder.path / "checkpoints").newest()
    assert newest is not None
    with pytest.raises(ModelError, match="each rank for itself"):
        followed_model.make(outcome.folder.path, newest)
