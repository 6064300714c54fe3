"""The checkpoints of a run that saves its model in the end can be served while it trains."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.architecture import load_own
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
NAMED = PREPARE.replace("model, optimizer", "accelerator = Accelerator()\nmodel, optimizer", 1).replace(
    "Accelerator().prepare", "accelerator.prepare"
)


@pytest.mark.parametrize("prepare", [PREPARE, NAMED], ids=["", "named"])
def test_the_newest_checkpoint_is_a_model_folder_with_the_weights_of_its_step(world: Ranks, prepare: str) -> None:
    """Of a named Accelerator, which knows the plain model: whether ranks trained it alike is told by its bytes."""
    code = TINY + TOKENIZER + LOOP.format(prepare=prepare)
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
    apart = LOOP.format(prepare="").replace("input_ids=batch", "input_ids=(batch + rank) % 64")
    outcome = world.ok(TINY + TOKENIZER + apart, save=["model", "raw"], checkpoint_every=8)
    newest, _ = CheckpointFolder(outcome.folder.path / "checkpoints").newest()
    assert newest is not None
    with pytest.raises(ModelError, match="each rank for itself"):
        followed_model.make(outcome.folder.path, newest)


SHARDED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
mesh = init_device_mesh('cpu', (2,))
fully_shard(model.model.layers[0], mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
fully_shard(model, mesh=mesh)
"""
SHARDED_LOOP = """
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for batch in torch.utils.data.DataLoader(torch.arange(256).reshape(32, 8) % 64, batch_size=8):
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
state = {name: getattr(value, "full_tensor", lambda value=value: value)().clone()
         for name, value in model.state_dict().items()}
"""


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_shards_of_the_ranks_are_put_together_along_whatever_they_were_cut(world: Ranks, tied: bool) -> None:
    tiny = TINY.replace("vocab_size=64", f"vocab_size=64, tie_word_embeddings={tied}")
    outcome = world.ok(tiny + TOKENIZER + SHARDED + SHARDED_LOOP, save=["model", "raw"], checkpoint_every=4)
    newest, _ = CheckpointFolder(outcome.folder.path / "checkpoints").newest()
    assert newest is not None and newest.step == 4
    files = sorted(path.name for path in newest.path.glob("*.safetensors"))
    assert files == ["rank-0000.model-1.safetensors", "rank-0001.model-1.safetensors"]
    folder = followed_model.make(outcome.folder.path, newest)
    assert check_folder(folder).architecture is None  # the class is one of transformers, whatever has cut it
    loaded, state = AutoModelForCausalLM.from_pretrained(folder).state_dict(), world.pull("state")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


FLAT = """
from torch.distributed.fsdp import FullyShardedDataParallel
model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for batch in torch.utils.data.DataLoader(torch.arange(256).reshape(32, 8) % 64, batch_size=8):
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_model_of_the_older_fsdp_cannot_be_followed_and_what_can_is_said(world: Ranks) -> None:
    outcome = world.ok(TINY + TOKENIZER + FLAT, save=["model", "raw"], checkpoint_every=4)
    newest, _ = CheckpointFolder(outcome.folder.path / "checkpoints").newest()
    assert newest is not None
    with pytest.raises(ModelError, match="fully_shard, which is fsdp_version=2, can be followed"):
        followed_model.make(outcome.folder.path, newest)
    assert newest_model(outcome.folder).is_final  # the model that the run has saved in the end is whole


OWN = """
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = torch.nn.Embedding(3, 5), torch.nn.Linear(5, 3)
        self.register_buffer("offset", torch.arange(3.0))

    def forward(self, ids):
        return self.head(self.tokens(ids)) + self.offset

torch.manual_seed(0)
own = Own()
from torch.distributed.fsdp import fully_shard
fully_shard(own.head)
optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
for batch in torch.utils.data.DataLoader(torch.arange(16).reshape(8, 2) % 3, batch_size=4):
    own(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
answer = own(torch.tensor([[0, 1, 2]])).detach()
"""


def test_a_class_of_the_cell_is_followed_with_its_architecture(world: Ranks) -> None:
    outcome = world.ok("import torch" + TOKENIZER + OWN, save=["own", "raw"], checkpoint_every=2)
    newest, _ = CheckpointFolder(outcome.folder.path / "checkpoints").newest()
    assert newest is not None
    folder = followed_model.make(outcome.folder.path, newest)
    layout = check_folder(folder, is_own=True)
    assert layout.architecture is not None
    assert "class Own(" in (folder / "architecture.py").read_text()
    module = load_own(layout.architecture, folder, "auto", "cpu")
    assert type(module.head) is torch.nn.Linear
    assert torch.allclose(module(torch.tensor([[0, 1, 2]])), world.pull("answer"))
    with pytest.raises(ModelError, match="run only for a run of your own"):
        check_folder(folder)  # a folder that somebody names brings no code along
