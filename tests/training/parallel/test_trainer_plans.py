"""A Trainer under a plan: it trains what one process trains, and is refused where it would save a part for the whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.worlds import AgentProcess, Ranks

TRAINING = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
ids = torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(1))
data = [dict(input_ids=row, labels=row) for row in ids]
args = TrainingArguments(
    "{folder}", max_steps=4, per_device_train_batch_size={batch}, learning_rate=0.5, lr_scheduler_type="constant",
    optim="sgd", max_grad_norm=0.0, logging_steps=1, save_strategy="{saves}", save_steps=2, report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
"""
GLOBAL_BATCH = 4


PREDICTION = """
predicted = trainer.predict(data[:8])
evaluated = [predicted.metrics["test_loss"], len(predicted.predictions), float(abs(predicted.predictions).sum())]
"""


@pytest.fixture(scope="module")
def two(node_agent: AgentProcess) -> Iterator[Ranks]:
    ranks = Ranks(node_agent, 2)
    yield ranks
    ranks.end()


def training(folder: Path, batch: int, saves: str = "no") -> str:
    return TRAINING.format(folder=folder, batch=batch, saves=saves)


@pytest.fixture(scope="module")
def alone(node_agent: AgentProcess, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Losses of one process with the same global batches, and what it predicts then for eight rows."""
    ranks = Ranks(node_agent, 1)
    ranks.ok(training(tmp_path_factory.mktemp("alone"), GLOBAL_BATCH) + PREDICTION)
    found = ranks.pull("losses"), ranks.pull("evaluated")
    ranks.end()
    return found


@pytest.mark.parametrize(("plan", "data_ranks"), [("ddp", 2), ("fsdp", 2), ("tp:2", 1)])
def test_a_trainer_trains_and_predicts_what_one_process_does(
    two: Ranks, alone: Any, plan: str, data_ranks: int, tmp_path: Path
) -> None:
    two.ok(training(tmp_path, GLOBAL_BATCH // data_ranks) + PREDICTION, plan=plan)
    losses, evaluated = alone
    assert two.pull("losses") == pytest.approx(losses, rel=1e-4)
    assert two.pull("evaluated") == pytest.approx(evaluated, rel=1e-3)


def test_a_trainer_of_stages_trains_alike_and_says_that_it_cannot_predict(
    two: Ranks, alone: Any, tmp_path: Path
) -> None:
    two.ok(training(tmp_path, GLOBAL_BATCH), plan="pipeline:2")
    assert two.pull("losses") == pytest.approx(alone[0], rel=1e-4)
    assert "a Trainer cannot evaluate or predict" in two.run(PREDICTION).error["evalue"]
    evaluates = training(tmp_path, GLOBAL_BATCH)
    evaluates = evaluates.replace("optim=", 'eval_strategy="steps", optim=').replace(
        "train_data", "eval_dataset=data, train_data"
    )
    assert "a Trainer cannot evaluate or predict" in two.run(evaluates, plan="pipeline:2").error["evalue"]


@pytest.mark.parametrize("plan", ["fsdp", "tp:2", "pipeline:2"])
def test_a_trainer_that_would_save_parts_is_refused_before_it_trains(two: Ranks, plan: str, tmp_path: Path) -> None:
    outcome = two.run(training(tmp_path / "out", 2, saves="steps"), plan=plan)
    assert outcome.error["ename"] == "UsageError"
    assert re.search('save_strategy="no".*--checkpoint-every', outcome.error["evalue"])
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("plan", ["fsdp", "pipeline:2"])
def test_a_part_of_a_model_is_not_saved_for_the_whole(two: Ranks, plan: str, tmp_path: Path) -> None:
    two.ok(training(tmp_path, 2), plan=plan)
    for saves in ("trainer.save_model()", f"model.save_pretrained({str(tmp_path / 'model')!r})"):
        outcome = two.run(saves)
        assert "its part alone" in outcome.error["evalue"], saves
    assert not list(tmp_path.rglob("*.safetensors"))


def test_replicas_of_local_sgd_save_their_checkpoints(two: Ranks, tmp_path: Path) -> None:
    two.ok(training(tmp_path, 2, saves="steps"), plan="local-sgd:2")
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
