"""Training on a GPU: precision, FSDP2 on one device, and a run that loses its rank and goes on as if nothing had been."""

from __future__ import annotations

import pytest

from tests.support.resuming import resumed
from tests.support.worlds import Outcome, Ranks


def test_bf16_computes_in_bf16_on_the_device(world: Ranks) -> None:
    outcome = world.ok(
        """
        import torch
        from accelerate import Accelerator
        accelerator = Accelerator()
        net = accelerator.prepare(torch.nn.Linear(64, 64))
        with accelerator.autocast():
            # Accelerate gives what a model returns back as float32: the layer inside shows what was computed in.
            out = accelerator.unwrap_model(net, keep_fp32_wrapper=False)(torch.randn(8, 64, device=accelerator.device))
        (accelerator.mixed_precision, str(out.dtype), str(out.device), str(next(net.parameters()).dtype))
        """,
        precision="bf16",
    )
    assert outcome.results() == ["('bf16', 'torch.bfloat16', 'cuda:0', 'torch.float32')"]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_model_learns_in_every_precision(world: Ranks, precision: str) -> None:
    outcome = world.ok(
        """
        import torch
        from accelerate import Accelerator
        torch.manual_seed(0)
        accelerator = Accelerator()
        net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
        x = torch.randn(256, 8, device=accelerator.device)
        y = x.sum(1, keepdim=True)
        for step in range(60):
            optimizer.zero_grad()
            with accelerator.autocast():
                loss = torch.nn.functional.mse_loss(net(x).float(), y)
            accelerator.backward(loss)
            optimizer.step()
            accelerator.log(dict(loss=loss.item()), step=step)
        """,
        precision=precision,
    )
    losses = outcome.values("loss")
    assert losses[-1] < 0.2 * losses[0]


FSDP2 = """
import os, signal, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

torch.manual_seed(0)
mesh = init_device_mesh("cuda", (world_size,))
net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(64, 1)).to(device)
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for layer in (net[0], net[3]):
    fully_shard(layer, mesh=mesh, mp_policy=policy)
fully_shard(net, mesh=mesh, mp_policy=policy)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
losses = []
for step in run.steps(12):
    x = torch.randn(32, 16, device=device)
    loss = (net(x).float() - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step == 8 and DIES and not os.path.exists(DIED):
        open(DIED, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
weights = [parameter.full_tensor().double().sum().item() for parameter in net.parameters()]
(losses, weights)
"""


def test_fsdp2_shards_over_one_device_and_computes_in_bf16(world: Ranks) -> None:
    world.ok(f"DIES, DIED = False, ''\n{FSDP2}")
    kinds = "from torch.distributed.tensor import DTensor\n[isinstance(p, DTensor) and p.device.type for p in net.parameters()]"
    assert world.ok(kinds).results() == ["['cuda', 'cuda', 'cuda', 'cuda']"]
    assert world.ok("losses[-1] < losses[0]").results() == ["True"]


def test_an_fsdp2_run_whose_rank_is_killed_ends_as_an_undisturbed_one(
    world: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def train(dies: bool) -> Outcome:
        died = tmp_path_factory.mktemp("died") / "yes"
        return world.ok(f"DIES, DIED = {dies}, {str(died)!r}\n{FSDP2}", checkpoint_every=3, max_restarts=1)

    undisturbed, disturbed = train(False), train(True)
    assert disturbed.results() == undisturbed.results()
    assert (len(resumed(undisturbed)), len(resumed(disturbed))) == (0, 1)


SAVED = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, max_position_embeddings=64)
model = LlamaForCausalLM(config).to(device)
"""


def test_a_model_on_the_device_is_saved_for_any_machine(world: Ranks) -> None:
    from safetensors.torch import load_file

    outcome = world.ok(SAVED, save=["model"])
    (path,) = outcome.folder.path.rglob("model.safetensors")
    tensors = load_file(path)
    assert tensors
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
