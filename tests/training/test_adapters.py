"""Adapters are trained on ranks as one process trains them, saved as adapters, and served on their base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jupyter_llmcloud.inference.engines.adapters import attached
from jupyter_llmcloud.inference.engines.loading import load_model
from tests.support.tiny_models import save_tiny_llama
from tests.support.worlds import AgentProcess, Ranks

ADALORA = "AdaLoraConfig(init_r=6, target_r=2, tinit=2, tfinal=4, deltaT=1, total_step=12, lora_alpha=16"
LORA = "LoraConfig(r=4, lora_alpha=16"
CELL = """
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base!r}
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
model = get_peft_model(model, {config}, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
rows = torch.randint(2, len(tokenizer), (48, 12), generator=torch.Generator().manual_seed(1))
accelerator = Accelerator()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(rows, batch_size={batch})
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
adapted = accelerator.unwrap_model(model)
losses, step = [], 0
for epoch in range(2):
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        step += 1
        if hasattr(adapted.base_model, "update_and_allocate"):
            adapted.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
state = {{name: value.detach().clone() for name, value in adapted.named_parameters() if "lora_" in name}}
adapted.eval()
with torch.no_grad():
    expected = adapted(input_ids=rows[:2]).logits
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def one(node_agent: AgentProcess) -> Iterator[Ranks]:
    ranks = Ranks(node_agent, 1)
    yield ranks
    ranks.end()


def cell(base: Path, config: str, batch: int) -> str:
    return CELL.format(base=str(base), config=config, batch=batch)


def num_ranks_left(state: dict[str, torch.Tensor]) -> int:
    """Directions that are not masked, over all layers."""
    return sum(int((value != 0).sum()) for name, value in state.items() if "lora_E" in name)


@pytest.mark.parametrize("config", [pytest.param(LORA, marks=pytest.mark.soak), ADALORA])
def test_an_adapter_learns_on_two_ranks_what_it_learns_on_one(
    world: Ranks, one: Ranks, base: Path, config: str
) -> None:
    one.ok(cell(base, config, 8))
    done = world.ok(cell(base, config, 4), save=["model", "tokenizer"])
    assert world.pull("losses") == pytest.approx(one.pull("losses"), abs=1e-4)
    wanted, found = one.pull("state"), [world.pull("state", rank) for rank in range(2)]
    for name, value in wanted.items():
        assert torch.equal(found[0][name], found[1][name]), name  # the same directions on every rank
        assert torch.allclose(found[0][name], value, atol=1e-4), name
    if config is ADALORA:
        assert num_ranks_left(found[0]) == num_ranks_left(wanted) == 2 * 4  # target_r, on average, of four layers
    model = done.folder.path / "model"
    kept = json.loads((model / "adapter_config.json").read_bytes())
    assert kept["peft_type"] == ("ADALORA" if config is ADALORA else "LORA") and kept["base_model_name_or_path"] == str(
        base
    )
    served = load_model(model)
    rows = torch.randint(2, served.num_vocabulary, (48, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        beside = attached(load_model(base).model, model)  # as `%endpoints adapters NAME add RUN` has it
        for one_way in (served.model, beside):
            assert torch.allclose(one_way(input_ids=rows[:2]).logits, world.pull("expected"), atol=1e-3)


@pytest.mark.parametrize("plan", ["local-sgd:2", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_plan_whose_ranks_see_no_whole_gradient_refuses_adalora(world: Ranks, base: Path, plan: str) -> None:
    refused: Any = world.run(cell(base, ADALORA, 4), plan=plan)
    assert refused.error["ename"] == "UsageError"
    assert "AdaLoRA" in refused.error["evalue"] and "--plan ddp" in refused.error["evalue"]
