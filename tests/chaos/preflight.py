"""Memory that ranks are told they will need, beside what they then take: 30 configurations on this machine.

What is compared is what comes beside the parameters, of the fullest rank: worked out before the first step, and by how
much resident memory grew at most over three steps, or as many as the first exchange of the plan and one more take.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from jupyter_llmcloud.core.parallel.plan import parse_plan
from tests.support.worlds import AgentProcess, Ranks

MOST_S = 600.0  # bf16 is slow on processors that have it by software only
WORST = 1.0  # of what was measured: a prediction further away than this is of no use
ROUNDS = ("local-sgd", "diloco", "async-ps")  # plans whose ranks exchange every so many steps
MODELS = {
    "mlp": """
width = 2048
model = torch.nn.Sequential(*[part for _ in range(4) for part in (torch.nn.Linear(width, width), torch.nn.GELU())])
rows = [torch.randn(width) for _ in range(256)]
ask = lambda batch: model(batch).square().mean()
""",
    "gpt2": """
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_embd=384, n_layer=4, n_head=6, n_positions=128))
rows = list(torch.randint(0, 8192, (256, 128)))
ask = lambda batch: model(input_ids=batch, labels=batch).loss
""",
    "llama": """
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
                                     num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128))
rows = list(torch.randint(0, 8192, (256, 128)))
ask = lambda batch: model(input_ids=batch, labels=batch).loss
""",
    "bert": """
from transformers import BertConfig, BertForSequenceClassification
model = BertForSequenceClassification(BertConfig(vocab_size=8192, hidden_size=384, num_hidden_layers=6,
                                                 num_attention_heads=6, intermediate_size=1536))
rows = list(torch.randint(0, 8192, (256, 128)))
ask = lambda batch: model(input_ids=batch, labels=batch[:, 0] % 2).loss
""",
    "convolutions": """
def block(inner, outer, stride):
    return torch.nn.Sequential(torch.nn.Conv2d(inner, outer, 3, stride, 1, bias=False), torch.nn.BatchNorm2d(outer),
                               torch.nn.ReLU(), torch.nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
                               torch.nn.BatchNorm2d(outer), torch.nn.ReLU())
model = torch.nn.Sequential(block(3, 64, 1), block(64, 128, 2), block(128, 256, 2), block(256, 512, 2),
                            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(512, 10))
rows = [torch.randn(3, 64, 64) for _ in range(64)]
ask = lambda batch: model(batch).square().mean()
""",
}
HEAD = """
import ctypes
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from jupyter_llmcloud.training.preflight import automatic

automatic._MOST_S = 120.0  # a busy machine must not leave anything out
automatic.may_matter = lambda *_: True  # these models are too small to be looked at otherwise
torch.manual_seed(0)
"""
BODY = """
if checkpointing:
    model.gradient_checkpointing_enable()
model.train()
accelerator = Accelerator()
optimizer = eval(f"torch.optim.{optimizer_text}", dict(torch=torch, model=model))
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows * num_steps, batch_size=batch_size))

def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

ctypes.CDLL(None).malloc_trim(0)  # what preparing has given back would be taken again, and not be seen
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = memory("VmRSS")
for step, batch in enumerate(loader, 1):
    accelerator.backward(ask(batch))
    optimizer.step()
    optimizer.zero_grad()
    if step == num_steps:
        break
told, grown = automatic.FORECAST.last, memory("VmHWM") - before
"""


@dataclass(frozen=True)
class Configuration:
    """One training."""

    model: str
    batch: int
    num_ranks: int = 1
    plan: str = "ddp"
    precision: str = "no"
    optimizer: str = "AdamW"
    checkpointing: bool = False

    @property
    def optimizer_text(self) -> str:
        """The expression that makes it."""
        options = {"SGD": "lr=0.01", "SGD+momentum": "lr=0.01, momentum=0.9"}.get(self.optimizer, "lr=1e-4")
        return f"{self.optimizer.partition('+')[0]}(model.parameters(), {options})"

    @property
    def num_steps(self) -> int:
        """How many it takes until everything was held that ever is."""
        return max(3, *(size + 1 for size in parse_plan(self.plan).sizes if self.plan.startswith(ROUNDS)), 0)

    def __str__(self) -> str:
        words = [self.model, f"batch {self.batch}", self.plan if self.num_ranks > 1 else "one process"]
        words += [self.precision] if self.precision != "no" else []
        return ", ".join([*words, self.optimizer, *(["checkpointing"] if self.checkpointing else [])])


C = Configuration
BATCHES = {"mlp": 128, "gpt2": 16, "llama": 16, "bert": 16, "convolutions": 16}
CONFIGURATIONS = (
    *(C(model, batch) for model, batch in BATCHES.items()),
    *(C(model, batch, 2) for model, batch in BATCHES.items()),
    *(C(model, 16, 2, "fsdp") for model in ("gpt2", "llama", "bert")),
    *(C("gpt2", 16, 2, "local-sgd:2"), C("llama", 16, 2, "diloco:2"), C("mlp", 128, 2, "async-ps:2")),
    *(C("gpt2", 4, 2, precision="bf16"), C("llama", 4, 2, precision="bf16"), C("convolutions", 4, precision="bf16")),
    *(C(model, 16, number, checkpointing=True) for model, number in (("gpt2", 1), ("llama", 2), ("bert", 1))),
    *(C("gpt2", 16, 2, optimizer="SGD"), C("mlp", 128, 2, optimizer="SGD+momentum")),
    *(C("convolutions", 16, 2, optimizer="SGD+momentum"), C("llama", 16, optimizer="RMSprop")),
    *(C("gpt2", 4), C("gpt2", 48), C("llama", 4, 2, "fsdp", precision="bf16"), C("mlp", 128, 2, "diloco:2", optimizer="SGD")),
)  # fmt: skip


def main(number: float = len(CONFIGURATIONS), begin: float = 0) -> bool:
    """True when no prediction was further away than WORST; `preflight:30:16` leaves out the first 16."""
    return compare("preflight", MODELS, CONFIGURATIONS[int(begin) : int(number)])


def compare(name: str, models: dict[str, str], configurations: Sequence[Configuration]) -> bool:
    """Print what each was told and took, and how far that was apart."""
    agent = AgentProcess(2)
    errors = []
    try:
        for configuration in configurations:
            told, grown, seconds = _compared(agent, models[configuration.model], configuration)
            errors.append((told - grown) / grown)
            print(f"  {configuration}: {_mib(told)} told, {_mib(grown)} taken ({errors[-1]:+.0%}), in {seconds:.2f} s",
                  flush=True)  # fmt: skip
    finally:
        agent.end()
    sizes = sorted(map(abs, errors))
    print(f"{name}: {len(errors)} configurations, memory beside parameters: median error {statistics.median(sizes):.0%}, "
          f"worst {sizes[-1]:.0%}, median with its sign {statistics.median(errors):+.0%}")  # fmt: skip
    return sizes[-1] <= WORST


def _compared(agent: AgentProcess, model: str, configuration: Configuration) -> tuple[float, float, float]:
    """What was told, what was taken at most by any rank, and the seconds that telling took."""
    world = Ranks(agent, configuration.num_ranks)
    try:
        world.push(
            batch_size=configuration.batch,
            checkpointing=configuration.checkpointing,
            optimizer_text=configuration.optimizer_text,
            num_steps=configuration.num_steps,
        )
        code = HEAD + model + BODY
        outcome = world.send(code, plan=configuration.plan, precision=configuration.precision).end(MOST_S)
        if outcome.state != "finished":
            raise AssertionError("\n".join(outcome.error["traceback"]))
        told = [world.pull("told", rank) for rank in range(configuration.num_ranks)]
        grown = [world.pull("grown", rank) for rank in range(configuration.num_ranks)]
    finally:
        world.end()
    return max(row["needed"] for row in told), max(grown), max(row["seconds"] for row in told)


def _mib(size: float) -> str:
    return f"{size / (1 << 20):.0f} MiB"
