"""Tokens per second and core of preparing a text, beside `datasets.map(num_proc=2)` on the same text.

Ours is the whole of it: the request, the processes, packing, Parquet shards and the manifest; theirs are the two maps of
transformers' examples (tokenize, group), without reading the source and without writing Parquet.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from jupyter_llmcloud.storage.runs import RunStore
from tests.bench import launch, peers
from tests.bench.measured import Row
from tests.bench.shell import REPOSITORY, Shell, product

ROUNDS = 3
NUM_PROCESSES = 2
NUM_BYTES = 16 << 20
SEQ_LEN = 512
BODY = launch.BODIES / "map_texts.py"
TIMEOUT_S = 600
QUICKSTART = REPOSITORY / "notebooks" / "quickstart.ipynb"
QUICKSTART_STEPS = 120
_WORDS = 4000

PREPARE = """
import jupyter_llmcloud as lc
prepared = lc.data.prepare({source!r}, tokenizer={tokenizer!r}, seq_len={seq_len}, out={out!r}, partition_size="3MiB", processes={num})
"""


def measure(folder: Path) -> list[Row]:
    """Rounds of both in turn, on the same text, which gives the same number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _make(folder / "in")
    ours: list[float] = []
    theirs: list[float] = []
    missing = ""
    try:
        python = peers.python_with("datasets")
    except peers.PeerMissing as error:
        python, missing = Path(sys.executable), str(error)
    with product(folder / "ours") as shell:
        shell.run("%load_ext jupyter_llmcloud")
        shell.run("%cluster start local")
        for number in range(ROUNDS):
            out = folder / f"out-{number}"
            cell = PREPARE.format(
                source=str(folder / "in" / "*.jsonl"),
                tokenizer=tokenizer,
                seq_len=SEQ_LEN,
                out=str(out),
                num=NUM_PROCESSES,
            )
            (seconds,) = shell.run(cell)
            tokens = sum(s["tokens"] for s in json.loads((out / "manifest.json").read_text())["shards"])
            ours.append(tokens / seconds / NUM_PROCESSES)
            if not missing:
                told = _map(python, folder / "in", tokenizer)
                assert told["tokens"] == tokens, (told, tokens)
                theirs.append(tokens / told["seconds"] / NUM_PROCESSES)
        waits = _quickstart_waits(shell, folder / "ours" / "root")
    what = "text to packed tokens on two cores, tokens/s and core"
    return [
        Row("data", what, "tokens/s", "datasets.map", ours, theirs, 1.0, at_least=True, missing=missing),
        Row("data", "the quickstart: time that a rank waits for data", "%", "", waits, limit=2.0),
    ]


def _quickstart_waits(shell: Shell, root: Path) -> list[float]:
    """Of each rank, of the whole training of the quickstart."""
    cells = json.loads(QUICKSTART.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    last = next(number for number, source in enumerate(sources) if source.startswith("%%distribute"))
    for source in sources[: last + 1]:
        shell.run(source.replace("num_steps = 380", f"num_steps = {QUICKSTART_STEPS}"))
    spent = RunStore(root).find("pydoc-gpt").read().times.values()
    return [100 * parts["data"] / sum(parts.values()) for parts in spent]


def _map(python: Path, folder: Path, tokenizer: str) -> dict[str, Any]:
    command = [str(python), str(BODY), str(folder), tokenizer, str(SEQ_LEN)]
    env = {**os.environ, "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True, env=env)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _make(folder: Path) -> str:
    """Texts, and the file of a tokenizer that was trained on some of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir()
    chance = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(chance.choices(letters, range(22, 0, -1), k=chance.randint(2, 9))) for _ in range(_WORDS)]
    weights = [1 / (rank + 2) for rank in range(_WORDS)]
    texts: list[str] = []
    for number in range(8):
        size, rows = 0, []
        while size < NUM_BYTES // 8:
            texts.append(" ".join(chance.choices(words, weights, k=chance.randint(50, 400))))
            rows.append(json.dumps({"text": texts[-1]}))
            size += len(rows[-1])
        (folder / f"{number}.jsonl").write_text("\n".join(rows) + "\n")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(texts[:500], trainers.BpeTrainer(vocab_size=2000, special_tokens=["<|endoftext|>"]))
    path = folder.parent / "tokenizer.json"
    made.save(str(path))
    return str(path)
