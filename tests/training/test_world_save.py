"""`--save` leaves a model in the Hugging Face layout, or says why it cannot, and breaks nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.worlds import Outcome, Ranks

TINY = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    bos_token_id=0, eos_token_id=0, pad_token_id=0,
)
model = LlamaForCausalLM(config)
"""
TOKENIZER = """
from tokenizers import Tokenizer, models, pre_tokenizers
raw = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "for": 2}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
"""


def model_of(outcome: Outcome) -> Path:
    assert outcome.ended.artifacts == {"model": "model"}
    assert outcome.record.artifacts == {"model": "model"}
    return outcome.folder.model


def loads_like(world: Ranks, folder: Path) -> None:
    """Transformers reads the folder back, with the weights of the rank."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    state = world.pull("state")
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_a_model_and_its_tokenizer_are_saved_together(world: Ranks) -> None:
    outcome = world.ok(TINY + TOKENIZER + "state = model.state_dict()", save=["model", "raw"])
    folder = model_of(outcome)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    loads_like(world, folder)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 16
    assert AutoTokenizer.from_pretrained(folder)("the for")["input_ids"] == [1, 2]


@pytest.mark.parametrize(
    "wrap",
    [
        "model = torch.nn.parallel.DistributedDataParallel(model)",
        "from accelerate import Accelerator\nmodel = Accelerator().prepare(model)",
        "model = torch.compile(model)",
    ],
    ids=["DDP", "Accelerate", "compiled"],
)
def test_a_wrapped_model_is_saved_without_its_wrapper(world: Ranks, wrap: str) -> None:
    outcome = world.ok(TINY + "state = model.state_dict()\n" + wrap, save=["model"])
    loads_like(world, model_of(outcome))


def test_a_model_of_bare_torch_is_saved_as_safetensors(world: Ranks) -> None:
    outcome = world.ok("import torch\nnet = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())", save=["net"])
    assert {name: tuple(value.shape) for name, value in load_file(model_of(outcome) / "model.safetensors").items()} == {
        "0.weight": (3, 2),
        "0.bias": (3,),
    }


def test_a_model_of_an_earlier_cell_can_be_saved_by_some_ranks(world: Ranks) -> None:
    world.ok(TINY + "state = model.state_dict()")
    loads_like(world, model_of(world.ok("pass", save=["model"], ranks=[1])))


@pytest.mark.parametrize(
    ("code", "word"),
    [("thing = 3", "cannot save a int"), ("other = 1", "no variable 'thing'")],
    ids=["no model", "no variable"],
)
def test_what_cannot_be_saved_is_said_and_leaves_nothing(world: Ranks, code: str, word: str) -> None:
    world.run("del thing")
    outcome = world.run(code, save=["thing"])
    assert outcome.state == "failed"
    assert word in outcome.error["evalue"]
    assert not outcome.folder.model.exists()
    assert world.ok("rank").results() == ["0", "1"]


def test_a_run_that_fails_saves_nothing(world: Ranks) -> None:
    outcome = world.run(TINY + "raise ValueError", save=["model"])
    assert outcome.state == "failed"
    assert outcome.ended.artifacts == {}
    assert not outcome.folder.model.exists()
