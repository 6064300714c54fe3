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


DDP = "model = torch.nn.parallel.DistributedDataParallel(model)\n"
PREPARED = "from accelerate import Accelerator\nmodel = Accelerator().prepare(model)\n"
COMPILED = "model = torch.compile(model, backend='eager')\n"
COMPILED_PART = "model.model = torch.compile(model.model, backend='eager')\n"
FSDP1 = "from torch.distributed.fsdp import FullyShardedDataParallel as FSDP\ncpu = torch.device('cpu')\n"
FSDP1_ROOT = "model = FSDP(model, device_id=cpu, use_orig_params=True)\n"
FSDP1_NESTED = "model.model.layers[0] = FSDP(model.model.layers[0], device_id=cpu, use_orig_params=True)\n"
MESH = "from torch.distributed.device_mesh import init_device_mesh\nfrom torch.distributed.fsdp import fully_shard\n"
FSDP2 = "fully_shard(model, mesh=init_device_mesh('cpu', (2,)))\n"
WRAPS = {
    "DDP": DDP,
    "Accelerate": PREPARED,
    "compiled": COMPILED,
    "compiled before prepare": COMPILED + PREPARED,
    "compiled after prepare": PREPARED + COMPILED,
    "compiled by Accelerate": "from accelerate import Accelerator\nmodel = Accelerator(dynamo_backend='eager').prepare(model)",
    "compiled in place": "model.compile(backend='eager')\n" + PREPARED,
    "a compiled part": COMPILED_PART,
    "a compiled part before prepare": COMPILED_PART + PREPARED,
    "FSDP1": FSDP1 + FSDP1_ROOT,
    "FSDP1 of flat parameters": FSDP1 + "model = FSDP(model, device_id=cpu)",
    "nested FSDP1": FSDP1 + FSDP1_NESTED + FSDP1_ROOT,
    "FSDP1 of a part": FSDP1 + FSDP1_NESTED,
    "compiled FSDP1": FSDP1 + FSDP1_NESTED + FSDP1_ROOT + COMPILED,
    "fully_shard": MESH + FSDP2,
    "compiled fully_shard": MESH + FSDP2 + COMPILED,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=list(WRAPS))
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_wrapped_model_is_saved_as_the_plain_one(world: Ranks, wrap: str, tied: bool) -> None:
    plain = TINY.replace("vocab_size=64", f"vocab_size=64, tie_word_embeddings={tied}")
    whole = "state = {name: value.clone() for name, value in model.state_dict().items()}\n"
    folder = model_of(world.ok(plain + whole + wrap, save=["model"]))
    loads_like(world, folder)
    names = load_file(folder / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != tied
    assert names == {name for name in world.pull("state") if name != "lm_head.weight" or not tied}


@pytest.mark.parametrize("wrap", ["", PREPARED], ids=["plain", "prepared"])
def test_weights_that_the_configuration_ties_and_the_model_does_not_are_both_saved(world: Ranks, wrap: str) -> None:
    untied = "model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 16))\n"
    tied = TINY.replace("vocab_size=64", "vocab_size=64, tie_word_embeddings=True")
    whole = "state = {name: value.clone() for name, value in model.state_dict().items()}\n"
    loads_like(world, model_of(world.ok(tied + untied + whole + wrap, save=["model"])))


NET = """
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
state = {name: value.clone() for name, value in net.state_dict().items()}
"""


@pytest.mark.parametrize(
    "wrap",
    [
        "net = torch.nn.parallel.DistributedDataParallel(torch.compile(net, backend='eager'))",
        "net[0] = torch.compile(net[0], backend='eager')",
        FSDP1 + "net[0] = FSDP(net[0], device_id=cpu)\nnet = FSDP(net, device_id=cpu)",
        MESH + "fully_shard(net[2], mesh=init_device_mesh('cpu', (2,)))",
    ],
    ids=["DDP of a compiled one", "compiled part", "nested FSDP1", "a sharded part"],
)
def test_a_wrapped_model_of_bare_torch_has_its_own_names_and_values(world: Ranks, wrap: str) -> None:
    saved = load_file(model_of(world.ok(NET + wrap, save=["net"])) / "model.safetensors")
    state = world.pull("state")
    assert saved.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in saved.items())


PIPELINE = """
from torch.distributed.pipelining import PipelineStage
layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
part = torch.nn.Sequential(layers[rank])
stage = PipelineStage(part, rank, 2, torch.device("cpu"))
"""
REFUSED = {
    "stages with names of their own": (
        "net = net[:2] if rank == 0 else net[1:]",
        "rank 0 has 0.weight, rank 1 has not",
    ),
    "stages of the same names": (PIPELINE + "net = part", "stage 0 of 2 of a pipeline"),
    "the whole, of which a stage is trained": (PIPELINE + "net = layers", "stage 0 of 2 of a pipeline"),
    "other shapes": ("net = torch.nn.Linear(2, 2 + rank)", "weight is [2, 2] for rank 0, [3, 2] for rank 1"),
    "other classes": ("net = torch.nn.Linear(2, 2) if rank == 0 else torch.nn.Bilinear(2, 2, 2)", "Bilinear"),
    "one rank has none": ("del net\nif rank == 0: net = torch.nn.Linear(2, 2)", "no variable 'net' on rank 1"),
    "one rank has a number": ("net = net if rank == 0 else 3", "cannot save an int"),
}


@pytest.mark.parametrize(("code", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_not_one_model_on_all_ranks_is_refused_by_name(world: Ranks, code: str, reason: str) -> None:
    outcome = world.run(NET + code, save=["net"])
    assert outcome.state == "failed"
    assert outcome.error["evalue"].startswith("--save net: ")
    assert reason in outcome.error["evalue"]
    assert not outcome.folder.model.exists()
    assert world.ok("rank").results() == ["0", "1"]
    world.run("del stage")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("model.extra = torch.nn.Linear(2, 2)", "the model has extra.weight"),
        ("model.config.num_hidden_layers = 2", "has model.layers.1."),
        ("model.lm_head = torch.nn.Linear(16, 65, bias=False)", "lm_head.weight is [65, 16]"),
    ],
    ids=["more", "less", "another shape"],
)
def test_a_model_that_its_configuration_does_not_describe_is_refused(world: Ranks, change: str, reason: str) -> None:
    outcome = world.run(TINY + change, save=["model"])
    assert outcome.state == "failed"
    assert reason in outcome.error["evalue"]
    assert not list(outcome.folder.path.glob("model*"))
    assert world.ok("type(model).__name__").results() == ["'LlamaForCausalLM'"] * 2


def test_a_folder_that_does_not_load_again_is_no_model(world: Ranks) -> None:
    broken = """
    from transformers import LlamaConfig, LlamaForCausalLM
    class Careless(LlamaForCausalLM):
        def save_pretrained(self, folder, state_dict=None, **options):
            super().save_pretrained(folder, state_dict={n: v for n, v in state_dict.items() if "norm" not in n}, **options)
    model = Careless(config)
    """
    world.ok(TINY)
    outcome = world.run(broken, save=["model"])
    assert outcome.state == "failed"
    assert "could not be loaded again" in outcome.error["evalue"]
    assert "model.norm.weight" in outcome.error["evalue"]
    assert not list(outcome.folder.path.glob("model*"))
    assert outcome.folder.read().artifacts == {}  # the other rank, which writes nothing, told of a model


def test_ranks_that_train_apart_are_told_that_the_first_is_saved(world: Ranks) -> None:
    outcome = world.ok("import torch\ntorch.manual_seed(rank)\nnet = torch.nn.Linear(2, 2)", save=["net"])
    assert "--save net: the ranks hold different values, weight among them; those of rank 0" in outcome.text(
        0, "stderr"
    )
    assert world.ok(NET, save=["net"]).text(kind="stderr") == ""


def test_a_rank_that_fails_does_not_leave_the_others_waiting_to_save(world: Ranks) -> None:
    outcome = world.run(NET + "if rank == 1: raise ValueError('mine')", save=["net"])
    assert (outcome.state, outcome.error["evalue"]) == ("failed", "mine")
    assert not outcome.folder.model.exists()
    assert world.ok("rank").results() == ["0", "1"]


def test_saving_draws_no_random_numbers(world: Ranks) -> None:
    world.ok(TINY + "torch.manual_seed(5)", save=["model"])
    assert world.ok("torch.manual_seed(5) and None\nfirst = torch.rand(1)").state == "finished"
    world.ok(TINY + "torch.manual_seed(5)", save=["model"])
    assert world.ok("bool(torch.rand(1) == first)").results() == ["True"] * 2


def test_a_model_of_bare_torch_is_saved_as_safetensors(world: Ranks) -> None:
    outcome = world.ok("import torch\nnet = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())", save=["net"])
    assert {name: tuple(value.shape) for name, value in load_file(model_of(outcome) / "model.safetensors").items()} == {
        "0.weight": (3, 2),
        "0.bias": (3,),
    }


def test_two_models_or_tokenizers_are_both_kept(world: Ranks) -> None:
    other = "other = Tokenizer(models.WordLevel({'<unk>': 0, 'der': 1}, unk_token='<unk>'))\n"
    made = "import torch\none, two = torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)\n"
    outcome = world.ok(made + TOKENIZER + other, save=["one", "raw", "two", "other"])
    folder = model_of(outcome)
    assert load_file(folder / "model.safetensors")["weight"].shape == (2, 2)
    assert load_file(folder / "two" / "model.safetensors")["weight"].shape == (3, 3)
    assert set(AutoTokenizer.from_pretrained(folder).get_vocab()) >= {"the", "for"}
    assert "der" in AutoTokenizer.from_pretrained(folder / "other").get_vocab()
    assert "two is kept in model/two" in outcome.text(kind="stderr")


def test_a_model_of_an_earlier_cell_can_be_saved_by_some_ranks(world: Ranks) -> None:
    world.ok(TINY + "state = model.state_dict()")
    loads_like(world, model_of(world.ok("pass", save=["model"], ranks=[1])))


@pytest.mark.parametrize(
    ("code", "word"),
    [("thing = 3", "cannot save an int"), ("other = 1", "no variable 'thing'")],
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
