"""Models of a cell's own and variables, served from a real notebook: trained on two ranks, asked while they train and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from jupyter_llmcloud.client.rest import ServerClient
from tests.notebook.test_serve_code_notebook import text_of

pytest_plugins = ["tests.support.server_fixtures"]

# A causal language model without generate, cache or config: its forward gives the scores of the last token alone when
# there are no targets, as many a tutorial's does.
MODULE = """%%distribute -n 2 -b --name nano --save net,tokenizer --checkpoint-every 8
import time, torch
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tests.support.tiny_models import word_tokenizer

class Block(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(size, 3 * size), torch.nn.Linear(size, size)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True))

class Nano(torch.nn.Module):
    def __init__(self, num_tokens, size=32, block_size=24):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(num_tokens, size), torch.nn.Embedding(block_size, size)
        self.block, self.head = Block(size), torch.nn.Linear(size, num_tokens, bias=False)

    def forward(self, ids, targets=None):
        x = self.block(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        if targets is None:
            return self.head(x[:, [-1]]), None
        scores = self.head(x)
        return scores, cross_entropy(scores.flatten(0, 1), targets.flatten())

torch.manual_seed(0)
tokenizer = word_tokenizer()
net = Nano(len(tokenizer))
for part in (net.block, net):
    fully_shard(part)
optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
text = torch.tensor([tokenizer("the film is good and the film was bad")["input_ids"]])

def greedy(prompt, number):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][:, :-1]  # without the end that BERT's tokenizers add
    for _ in range(number):
        ids = torch.cat([ids, net(ids)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(ids[0, -number:], skip_special_tokens=True)

for step, batch in enumerate(torch.utils.data.DataLoader(text.repeat(24, 1), batch_size=2), 1):
    loss = net(batch[:, :-1], batch[:, 1:])[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    expected = greedy("the film", 5)
    if step == 8:  # a checkpoint is saved of it; the notebook talks to that before the training goes on
        Path(f"said-{rank}").write_text(expected)
    while step == 9 and not Path("go-on").exists() and not run.should_stop:
        time.sleep(0.05)
"""

FOLLOW = """import time
from pathlib import Path
ep = %serve nano --follow
while_it_trains = ep.complete('the film', max_tokens=5, temperature=0)
print(ep.kind, lc.runs.get('nano').state, while_it_trains.strip() == Path('said-0').read_text().strip(), len(ep.revisions))
Path('go-on').touch()
lc.runs.get('nano').result(timeout=100)
until = time.monotonic() + 100
while ep._client.endpoint('nano')['follows'] and time.monotonic() < until:
    time.sleep(0.2)
"""

HERE = """import torch
from transformers import LlamaConfig, LlamaForCausalLM
from tests.support.tiny_models import word_tokenizer
torch.manual_seed(2)
words, other_words = word_tokenizer(), word_tokenizer()
llama = LlamaForCausalLM(LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=32)).eval()
ids = words("the film", return_tensors="pt")["input_ids"][:, :-1]
def greedy():
    made = llama.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1]:]
    return words.decode(made, skip_special_tokens=True)
expected_here = greedy()
class Doubles:
    def predict(self, inputs):
        return [2 * value for value in inputs]
doubles, number = Doubles(), 3
"""

ASK = "{name} = %serve {line}\nprint({name}.kind, {name}.complete('the film', max_tokens=5, temperature=0))"
CELLS: dict[str, str] = {
    "load": "%load_ext jupyter_llmcloud\nimport jupyter_llmcloud as lc",
    "module": MODULE,
    "follow": FOLLOW,
    "pull": "%pull expected\nprint(expected)",
    "served": ASK.format(name="nano", line="nano"),
    "variable": ASK.format(name="net_ep", line="net"),
    "here": HERE + "print(expected_here)",
    "which tokenizer": "%serve llama",
    "serve here": ASK.format(name="llama_ep", line="llama --tokenizer words"),
    "train on": "with torch.no_grad():\n    llama.lm_head.weight.mul_(-1)\nprint(greedy())",
    "serve again": ASK.format(name="llama_ep", line="llama --tokenizer words") + "\nprint(len(llama_ep.revisions))",
    "object": "doubled = %serve doubles\nprint(doubled.kind, doubled.predict([1, 2]))",
    "number": "%serve number",
    "tokenizer alone": "%serve words",
    "nothing": "%serve no_such_thing",
    "of a run": "%serve nano --tokenizer words",
}
FAILS = ("which tokenizer", "number", "tokenizer alone", "nothing", "of a run")


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(600)  # five replicas load torch, one after the other
def test_models_of_a_cell_and_variables_answer_as_they_do_in_the_notebook(
    shared_server: ServerClient, tmp_path: Path
) -> None:
    cells = [nbformat.v4.new_code_cell(text) for text in CELLS.values()]
    for name, cell in zip(CELLS, cells, strict=True):
        cell.metadata["tags"] = ["raises-exception"] if name in FAILS else []
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources: Any = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=resources).execute()
    said = {name: text_of(cell).strip() for name, cell in zip(CELLS, notebook.cells, strict=True)}

    assert "generator running True 1" in said["follow"]
    for told, served in (("pull", "served"), ("pull", "variable"), ("here", "serve here")):
        assert said[told] and said[served].split("generator")[-1].strip() == said[told], (said[told], said[served])
    assert said["train on"] != said["here"]
    assert said["serve again"].split("generator")[-1].split() == [*said["train on"].split(), "2"]
    assert "could have any of other_words, words" in said["which tokenizer"]
    assert said["object"].endswith("python [2, 4]")
    assert "number in this notebook is of type int, which cannot be served" in said["number"]
    assert "words is a tokenizer" in said["tokenizer alone"]
    assert "no run" in said["nothing"] and "variable" in said["nothing"]
    assert "--tokenizer is for a TARGET that is a variable" in said["of a run"]
