"""Models that generate no text, from a notebook: trained in a cell, defined in a cell, asked by real clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from jupyter_llmcloud.client.rest import ServerClient

pytest_plugins = ["tests.support.server_fixtures"]

TRAIN = """%%distribute -n 1 --name sentiment --save model,tokenizer
import torch
from transformers import BertConfig, BertForSequenceClassification
from tests.support.tiny_models import word_tokenizer
torch.manual_seed(0)
tokenizer = word_tokenizer()
labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=32, **labels)
model = BertForSequenceClassification(config)
texts = ["a good film", "the film is good", "a bad film", "the film was bad"]
batch = tokenizer(texts, padding=True, return_tensors="pt")
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for step in range(40):
    loss = model(**batch, labels=torch.tensor([1, 1, 0, 0])).loss
    loss.backward(); optimizer.step(); optimizer.zero_grad()
loss.item() < 0.1
"""

OWN = """%%distribute -n 1 --name own --save net
import torch

class Doubled(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.line = torch.nn.Linear(size, 1, bias=False)
        self.register_buffer("offset", torch.tensor([7.0]), persistent=False)

    def forward(self, x):
        return self.line(x) * factor + self.offset

factor = 2
net = Doubled(3)
with torch.no_grad():
    net.line.weight.copy_(torch.tensor([[1.0, 10.0, 100.0]]))
"""

CELL = """%%serve shout

import helper_of_notebook

def load():
    global suffix
    suffix = helper_of_notebook.SUFFIX

def predict(inputs):
    if inputs == "fail":
        raise ValueError("no such word")
    return inputs.upper() + suffix

def stream(inputs):
    for letter in inputs:
        yield letter
"""

TRITON = """
import numpy as np
import tritonclient.http as triton
url = ep.base_url.removeprefix("http://").removesuffix("/v1")
client = triton.InferenceServerClient(url)
headers = {"Authorization": f"Bearer {ep.api_key}"}
asked = triton.InferInput("text", [2], "BYTES")
asked.set_data_from_numpy(np.array(["a good film", "the film was bad"], dtype=object))
answer = client.infer("sentiment", [asked], headers=headers)
print(client.is_server_live(headers=headers), client.is_model_ready("sentiment", headers=headers))
print([label.decode() for label in answer.as_numpy("labels")], answer.as_numpy("scores").shape)
"""

CELLS: dict[str, str] = {
    "load": "%load_ext jupyter_llmcloud",
    "train": TRAIN,
    "serve": "ep = %serve sentiment",
    "predict": 'print(ep.kind, [row["label"] for row in ep.predict(["a good film", "the film was bad"])])',
    "triton": TRITON,
    "refused": "try:\n    ep.complete('x')\nexcept Exception as error:\n    print(error)",
    "cell": CELL,
    "ask": 'shout = _\nprint(shout.predict("hello"), list(shout.predict("abc", stream=True)))',
    "fail": 'shout.predict("fail")',
    "lives": 'print(shout.predict("again"))',
    "changed": CELL.replace("inputs.upper()", "inputs.title()"),
    "ask again": 'print(shout.predict("hello"))',
    "broken": CELL.replace("suffix = helper_of_notebook.SUFFIX", "open('/no/such/file')"),
    "still": 'print(shout.predict("hello"))',
    "no predict": "%%serve other\ndef load(): ...",
    "own": OWN,
    "serve own": "net = %serve own",
    "ask own": "print(net.kind, net.predict([[1, 2, 3], [0, 0, 1]]))",
    "table": "%endpoints",
    "object": "import jupyter_llmcloud as lc\nrev = lc.serve(lambda text: text[::-1], name='rev')\nprint(rev.predict('abc'))",
    "stop": "for name in ('sentiment', 'shout', 'own', 'rev'):\n    lc.endpoints.stop(name)",
}
FAILS = ("fail", "broken", "no predict")


@pytest.mark.story
@pytest.mark.slow
def test_classifiers_and_code_are_served_from_a_notebook(shared_server: ServerClient, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient")
    (tmp_path / "helper_of_notebook.py").write_text("SUFFIX = '!'\n")
    cells = [nbformat.v4.new_code_cell(text) for text in CELLS.values()]
    for name, cell in zip(CELLS, cells, strict=True):
        cell.metadata["tags"] = ["raises-exception"] if name in FAILS else []
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources: Any = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=resources).execute()
    said = {name: text_of(cell) for name, cell in zip(CELLS, notebook.cells, strict=True)}

    assert "True" in said["train"]
    assert said["predict"] == "classifier ['positive', 'negative']\n"
    assert said["triton"] == "True True\n['positive', 'negative'] (2, 2)\n"
    assert (
        "classifies texts, it generates no text" in said["refused"] and "/v2/models/sentiment/infer" in said["refused"]
    )
    assert "v2/models/shout/infer" in said["cell"]
    assert said["ask"] == "HELLO! ['a', 'b', 'c']\n"
    assert "ValueError: no such word\nCell In[7], line 11, in predict" in said["fail"]
    assert said["lives"] == "AGAIN!\n" and said["ask again"] == "Hello!\n" and said["still"] == "Hello!\n"
    assert "FileNotFoundError" in said["broken"] and "line 7, in load" in said["broken"]
    assert "defines no predict()" in said["no predict"]
    assert said["ask own"] == "module [[649.0], [207.0]]\n"
    assert "classifier" in said["table"] and "python" in said["table"]
    assert said["object"].endswith("cba\n")


def text_of(cell: Any) -> str:
    """All that a cell has put out, as text."""
    told = []
    for output in cell.outputs:
        if output.output_type == "stream":
            told.append(output.text)
        elif output.output_type == "error":
            told.append(f"{output.ename}: {output.evalue}")
        else:
            told.append(output.data.get("text/html") or output.data.get("text/plain", ""))
    return "".join(told)
