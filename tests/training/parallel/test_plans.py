"""Every plan trains what one process trains, is what it says, and goes on under another plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.planned_cells import training
from tests.support.worlds import AgentProcess, Ranks

# By plan, the batch of each rank: the global batch is that of the process alone.
SGD = "SGD(model.parameters(), lr=0.5)"
CLIP, NO_CLIP = 1.0, 1e9
APART = ("local-sgd:1", "diloco:1,outer-lr=1,momentum=0")
EXACT = {"ddp": 2, "fsdp": 2, "hsdp:2x2": 2, **dict.fromkeys(APART, 2), "tp:4": 8, "tp+fsdp": 4, "pipeline:4": 8}


@pytest.fixture(scope="module")
def four(node_agent: AgentProcess) -> Iterator[Ranks]:
    ranks = Ranks(node_agent, 4)
    yield ranks
    ranks.end()


@pytest.fixture(scope="module")
def alone(node_agent: AgentProcess) -> dict[str, Any]:
    """What one process gets of the same global batches."""
    ranks = Ranks(node_agent, 1)
    found = {}
    for name, clip, layers in (("clip", CLIP, 2), ("no clip", NO_CLIP, 2), ("deep clip", CLIP, 4)):
        ranks.ok(training(batch=8, clip=clip, layers=layers, optimizer=SGD))
        found[name] = {what: ranks.pull(what) for what in ("losses", "norms", "state")}
    ranks.end()
    return found


def close(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(state[name], value, atol=atol), (name, (state[name] - value).abs().max())


@pytest.mark.parametrize("plan", EXACT)
def test_a_plan_trains_what_one_process_trains(four: Ranks, alone: dict[str, Any], plan: str) -> None:
    # Ranks that train apart clip their own gradients.
    wanted = alone[("deep " if plan.startswith("pipeline") else "") + ("no clip" if plan in APART else "clip")]
    clip = NO_CLIP if plan in APART else CLIP
    layers = 4 if plan.startswith("pipeline") else 2
    cell = training(batch=EXACT[plan], layers=layers, clip=clip, seed="rank" if plan != "ddp" else "0", optimizer=SGD)
    if plan == "tp:4":  # by torch itself, of gradients some of which are cut
        cell = cell.replace("accelerator.clip_grad_norm_", "torch.nn.utils.clip_grad_norm_")
    four.ok(f"{cell}\nwith model.no_sync():  # loops that accumulate by hand ask for it\n    pass", plan=plan)
    assert four.pull("losses") == pytest.approx(wanted["losses"], abs=1e-5)
    if plan not in APART:  # on every rank the norm of the whole, not of what the rank has of it
        assert four.pull("norms", 1) == pytest.approx(wanted["norms"], rel=1e-4)
    for rank in range(4):
        close(four.pull("state", rank), wanted["state"])


# --- checkpoints -----------------------------------------------------------------------------------------------------

ADAM = "AdamW(model.parameters(), lr=1e-2)"
CHECKPOINT_AND_FAIL = "run.checkpoint() if step % 4 == 0 else None; assert step != fails_at"


def resumed(world: Ranks, legs: dict[str, int], cell: Any) -> list[float]:
    """Train under one plan until a step, then go on from the newest checkpoint under the next one, and so on."""
    resume: dict[str, Any] = {}
    for plan, fails_at in legs.items():
        world.push(fails_at=fails_at)
        outcome = world.run(cell(plan), plan=plan.rstrip(), resume=resume)
        if fails_at:
            assert outcome.error["ename"] == "AssertionError", "\n".join(outcome.error["traceback"])
            newest = max(int(path.name.split("-")[1]) for path in (outcome.folder.path / "checkpoints").glob("step-*"))
            resume = {"folder": str(outcome.folder.path / f"checkpoints/step-{newest}"), "step": newest}
        else:
            assert outcome.state == "finished", "\n".join(outcome.error["traceback"])
    losses: list[float] = world.pull("losses")
    return losses


@pytest.mark.story
def test_a_run_goes_on_under_other_plans_as_if_nothing_had_been(four: Ranks) -> None:
    def cell(plan: str) -> str:
        return training(batch=EXACT[plan.rstrip()], epochs=3, optimizer=ADAM, after=CHECKPOINT_AND_FAIL, tied=True)

    undisturbed = resumed(four, {"ddp": 0}, cell)
    state = four.pull("state")
    legs = {"ddp": 5, "fsdp": 9, "tp+fsdp": 13, "hsdp:2x2": 17, "tp:4": 21, "ddp ": 0}
    losses = resumed(four, legs, cell)
    assert losses == pytest.approx(undisturbed, abs=1e-4)
    close(four.pull("state"), state, 1e-3)


@pytest.mark.parametrize(
    "plan", ["pipeline:4", *(pytest.param(plan, marks=pytest.mark.story) for plan in ("tp:4", "tp+fsdp"))]
)
def test_ranks_that_share_a_batch_shuffle_alike_whatever_they_have_drawn(four: Ranks, plan: str) -> None:
    cell = training(batch=EXACT[plan], layers=4, shuffle=True, weights=False)
    drawn = "optimizer = torch.optim"  # before the loader is made
    four.ok(
        cell.replace(drawn, f"torch.manual_seed(100 + rank)\n{drawn}")
        .replace("losses.append(", "seen.append(batch); losses.append(")
        .replace("losses, step = []", "seen, losses, step = [], []"),
        plan=plan,
    )
    orders = [torch.cat(four.pull("seen", rank)) for rank in range(4)]
    for rank in range(1, 4):
        assert torch.equal(orders[rank], orders[0]) == (plan != "tp+fsdp" or rank < 2)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param("pipeline:4", marks=pytest.mark.story),
        pytest.param("local-sgd:3", marks=pytest.mark.soak),
        pytest.param("diloco:6,fragments=3,delay=1,bits=8", marks=pytest.mark.story),
    ],
)
def test_a_run_goes_on_under_its_own_plan_exactly(four: Ranks, plan: str) -> None:
    def cell(_: str) -> str:
        layers = 4 if plan.startswith("pipeline") else 2
        text = training(batch=EXACT.get(plan, 2), layers=layers, epochs=2, optimizer=ADAM, after=CHECKPOINT_AND_FAIL)
        return text.replace("accelerator = Accelerator()", "torch.manual_seed(rank)\naccelerator = Accelerator()")

    undisturbed, states = resumed(four, {plan: 0}, cell), [four.pull("state", rank) for rank in range(4)]
    assert resumed(four, {plan: 10, plan + " ": 0}, cell) == undisturbed
    for rank, state in enumerate(states):
        close(four.pull("state", rank), state, 0)


@pytest.mark.story
def test_a_checkpoint_of_replicas_becomes_one_model_and_one_of_stages_is_refused(four: Ranks) -> None:
    def cell(plan: str) -> str:
        return training(batch=EXACT.get(plan, 2), layers=4, epochs=2, optimizer=ADAM, after=CHECKPOINT_AND_FAIL)

    resumed(four, {"diloco:3": 6, "ddp": 0}, cell)
    state = four.pull("state")
    for rank in range(1, 4):
        close(four.pull("state", rank), state, 0)
    with pytest.raises(AssertionError, match=r"knows its own stage alone\. Resume it with --plan pipeline:4"):
        resumed(four, {"pipeline:4": 6, "fsdp": 0}, cell)


# --- what a plan says of itself is true -------------------------------------------------------------------------------

SEEN = """
import json
from torch._C import _distributed_c10d as recorder

def entries():
    # The recorder is a ring: what is new is told by its number, not by its place.
    found = json.loads(recorder._dump_fr_trace_json(includeCollectives=True)).get("entries", [])
    return {e["record_id"]: (e["profiling_name"].split(":")[-1], [list(s) for s in e["input_sizes"]], e["input_dtypes"])
            for e in found if "profiling_name" in e}

before = max(entries(), default=-1)
"""
COUNTED = """
held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
whole = sum(p.numel() for p in model.parameters())
seen = [row for number, row in sorted(entries().items()) if number > before]
kinds = {name for name, *_ in seen}
bits = {kind for _, _, kinds in seen for kind in kinds}
"""


def traced(batch: int, **options: Any) -> str:
    """A short training, and the collectives that it made."""
    text = training(batch=batch, weights=False, **options)
    return SEEN + text + COUNTED


@pytest.mark.parametrize(
    ("plan", "share", "expected"),
    [
        ("ddp", 1, {"all_reduce"}),
        ("fsdp", 4, {"all_gather", "all_reduce"}),  # by which gloo scatters what it reduces
        ("hsdp:2x2", 2, {"all_gather", "all_reduce"}),
        ("tp:4", 3.3, {"all_reduce"}),
    ],
)
def test_a_plan_is_what_it_says(four: Ranks, plan: str, share: float, expected: set[str]) -> None:
    four.ok(traced(EXACT[plan]), plan=plan)
    held, whole, kinds = (four.pull(name, 1) for name in ("held", "whole", "kinds"))
    assert held <= 1.03 * whole / share
    assert all(any(name in kind for kind in kinds) for name in expected), kinds


@pytest.mark.parametrize(("name", "kind"), [("fp16", "Half"), ("bf16", "BFloat16"), ("powersgd", "Float")])
def test_gradients_travel_compressed(four: Ranks, alone: dict[str, Any], name: str, kind: str) -> None:
    four.ok(traced(2, epochs=2, optimizer=SGD), compress_gradients=name)
    seen = [row for row in four.pull("seen") if row[0] == "all_reduce"]
    sizes = [sum(map(math.prod, shapes)) for _, shapes, kinds in seen if kind in kinds]
    largest = four.pull("whole")
    assert four.pull("losses")[:8] == pytest.approx(alone["clip"]["losses"], abs=2e-3)
    if name == "powersgd":
        assert largest in sizes  # the first steps
        assert max(sizes[-8:]) < largest / 2
    else:
        assert largest in sizes


LOW_RANK = """
import torch
torch.manual_seed(3)
wrapped = torch.nn.parallel.DistributedDataParallel(
    torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
for step in range(14):
    (wrapped(torch.ones(2, 32) * (rank + 1)) * (step % 2)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
is_finite = all(bool(p.isfinite().all()) for p in wrapped.parameters())
"""


def test_gradients_of_low_rank_and_of_zeros_stay_numbers_when_compressed(four: Ranks) -> None:
    four.ok(LOW_RANK, compress_gradients="powersgd")
    assert four.pull("is_finite")


# --- between cells ---------------------------------------------------------------------------------------------------

ENDLESS = """
print("trains", flush=True)
while True:
    loss = model(input_ids=rows[:2], labels=rows[:2]).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
"""
ONE_MORE = """
before = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
loss = model(input_ids=rows[:2], labels=rows[:2]).loss
accelerator.backward(loss)
optimizer.step()
after = accelerator.get_state_dict(model)
moved = any(not torch.equal(before[name], after[name]) for name in after)
"""


@pytest.mark.parametrize("plan", ["fsdp", pytest.param("tp+fsdp", marks=pytest.mark.story), "diloco:2,fragments=2"])
def test_a_spread_model_outlives_a_rank_that_fails(four: Ranks, plan: str) -> None:
    four.ok(training(batch=EXACT.get(plan, 2), optimizer=SGD), plan=plan)
    four.ok("kept = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}")
    kept = four.pull("kept")
    broken = four.run(
        "loss = model(input_ids=rows[:2], labels=rows[:2]).loss\nassert rank != 2\nloss.backward()", plan=plan
    )
    assert broken.state == "failed" and broken.error["rank"] == 2
    four.ok(ONE_MORE, plan=plan)
    assert four.pull("moved")
    close(four.pull("before"), kept)


@pytest.mark.parametrize("plan", ["fsdp", pytest.param("tp+fsdp", marks=pytest.mark.story), "local-sgd:3"])
def test_a_spread_model_is_saved_as_the_plain_one_and_loads(four: Ranks, plan: str) -> None:
    from transformers import LlamaForCausalLM

    outcome = four.ok(training(batch=EXACT.get(plan, 2), tied=True), plan=plan, save=["model"])
    model, info = LlamaForCausalLM.from_pretrained(outcome.folder.path / "model", output_loading_info=True)
    assert not any(info.values())
    # What is saved is what the ranks hold, also where they were averaged at the end of the cell.
    four.ok("state = accelerator.get_state_dict(model)")
    close(model.state_dict(), {name: value.detach() for name, value in four.pull("state", 3).items()})


ADAPTER = (
    "from peft import LoraConfig, get_peft_model\n"
    "model = get_peft_model(model, LoraConfig(r=2, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM'))\n"
    "accelerator = Accelerator()"
)


def test_an_adapter_is_trained_and_saved_as_without_a_plan(four: Ranks) -> None:
    text = training(batch=2, weights=False).replace("accelerator = Accelerator()", ADAPTER)
    saved = {}
    for plan in ("ddp", "fsdp", "local-sgd:2"):
        outcome = four.ok(text, plan=plan, save=["model"])
        saved[plan] = load_file(outcome.folder.path / "model/adapter_model.safetensors")
        assert any(value.abs().max() > 0 for name, value in saved[plan].items() if "lora_B" in name)  # it has learned
    close(saved["fsdp"], saved["ddp"])
    assert saved["local-sgd:2"].keys() == saved["ddp"].keys()
    refused = four.run(text, plan="tp:4")
    assert refused.error["ename"] == "UsageError" and "--plan fsdp, or ddp" in refused.error["evalue"]
    by_hand = four.run(f"{text}\naccelerator.unwrap_model(model).save_pretrained(run.folder)", plan="fsdp")
    assert by_hand.error["ename"] == "UsageError" and "its part alone" in by_hand.error["evalue"]


# --- Accelerate's own checkpoints ------------------------------------------------------------------------------------

SAVED_AND_LOADED = """
folder = {folder!r}
if {loads}:
    accelerator.load_state(folder)
else:
    accelerator.save_state(folder)
losses = []
for batch in loader:
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
"""


@pytest.mark.parametrize("plan", ["fsdp", "tp:4", pytest.param("tp+fsdp", marks=pytest.mark.story)])
def test_accelerates_checkpoints_are_those_of_one_process(four: Ranks, plan: str, tmp_path: Path) -> None:
    cell = training(batch=EXACT[plan], optimizer=ADAM, tied=True)
    folder = str(tmp_path / "state")
    four.ok(cell + SAVED_AND_LOADED.format(folder=folder, loads=False), plan=plan)
    losses = four.pull("losses")
    # What goes on from it is another training until then.
    other = training(batch=EXACT[plan], optimizer=ADAM, tied=True, epochs=2, seed="5")
    four.ok(other + SAVED_AND_LOADED.format(folder=folder, loads=True), plan=plan)
    assert four.pull("losses") == pytest.approx(losses, abs=1e-6)
    state = torch.load(tmp_path / "state/optimizer.bin", weights_only=True)["state"]
    model = load_file(tmp_path / "state/model.safetensors")
    moments = [tuple(row["exp_avg"].shape) for row in state.values()]
    assert sorted(moments) == sorted(tuple(value.shape) for value in model.values())


def test_ranks_that_share_a_batch_are_told_when_they_are_given_different_ones(four: Ranks) -> None:
    cell = training(batch=2, layers=4, weights=False)
    by_rank = cell.replace("in loader:", "in [rows[rank * 2 : rank * 2 + 2]]:")
    for plan in ("tp:4", "pipeline:4"):
        outcome = four.run(by_rank, plan=plan)
        assert outcome.error["ename"] == "UsageError", outcome.error
        assert "another input_ids on rank 1 than on rank 0" in outcome.error["evalue"]
