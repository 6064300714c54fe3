"""The quickstart notebook as tests use it: its training cell, with a small text that is the same on every machine.

Run as `python -m tests.support.quickstart OUT` it executes the training cell's body as the plain script it is (one process, no
launcher) and writes the losses to OUT.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "quickstart.ipynb"
SEED = 7
NUM_STEPS = 12
WINDOW = 64


def cell(identity: str) -> str:
    """The source of one cell of the notebook."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return next(str(cell.source) for cell in notebook.cells if cell.get("id") == identity)


def training_cell() -> tuple[str, str]:
    """The `%%distribute` line of the training cell, and its body."""
    line, _, body = cell("train").partition("\n")
    return line, body


def made_up_text(seed: int = SEED, num_sentences: int = 3000) -> list[str]:
    """Sentences of a small grammar, the same for the same seed on every machine."""
    choose = random.Random(seed).choice
    subjects = ["the list", "a function", "the loop", "this module", "an iterator", "the caller"]
    verbs = ["returns", "changes", "raises", "closes", "reads", "yields"]
    objects = ["the first item", "an error", "its argument", "every line", "the open file", "a new value"]
    endings = [".", " when it is called.", " before the end.", " and stops.", " if it can."]
    return [f"{choose(subjects)} {choose(verbs)} {choose(objects)}{choose(endings)}" for _ in range(num_sentences)]


def made_up_data(num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """What the training cell gets by --push: train_tokens, valid_windows, bpe, num_steps."""
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = {"<|end|>": 0, **{character: index + 1 for character, index in characters.items()}}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokens = np.array(bpe.encode(" ".join(made_up_text())).ids)
    valid, train = tokens[: 32 * WINDOW], tokens[32 * WINDOW :]
    return {"train_tokens": train, "valid_windows": valid.reshape(-1, WINDOW), "bpe": bpe, "num_steps": num_steps}


def losses_of(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Training losses by step and validation losses of logged dicts, in their order."""
    return {name: [round(record[name], 6) for record in records if name in record] for name in ("loss", "valid_loss")}


def _train(out: Path) -> None:
    import torch
    from accelerate import Accelerator

    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    Accelerator.log = lambda self, values, step=None, **_: records.append(values)  # type: ignore[method-assign]
    exec(compile(training_cell()[1], "quickstart", "exec"), made_up_data())
    out.write_text(json.dumps(losses_of(records)))


if __name__ == "__main__":
    _train(Path(sys.argv[1]))
