"""Tokenize and group texts as the examples of transformers do, by `datasets.map(num_proc=2)`; tells how long that took.

python map_texts.py FOLDER TOKENIZER SEQ_LEN      FOLDER with *.jsonl
"""

from __future__ import annotations

import glob
import json
import os
import resource
import sys
import time
from itertools import chain
from typing import Any


def main() -> None:
    """One JSON line: seconds, cpu_seconds, tokens."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    folder, definition, seq_len = sys.argv[1], sys.argv[2], int(sys.argv[3])
    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(definition), eos_token="<|endoftext|>")
    files = sorted(glob.glob(f"{folder}/*.jsonl"))
    texts = datasets.load_dataset("json", data_files=files, split="train", cache_dir=f"{folder}/cache")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer(batch["text"], return_attention_mask=False, add_special_tokens=False)["input_ids"]
        return {"input_ids": [[*row, tokenizer.eos_token_id] for row in ids]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        flat = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [flat[at : at + seq_len] for at in range(0, len(flat), seq_len)]}

    began, cpu = time.perf_counter(), _cpu()
    options: dict[str, Any] = {"batched": True, "num_proc": 2, "load_from_cache_file": False}
    tokens = texts.map(tokenize, remove_columns=texts.column_names, **options)
    rows = tokens.map(group, **options)
    took, cpu = time.perf_counter() - began, _cpu() - cpu
    num_tokens = sum(len(row) for row in rows.with_format("numpy")["input_ids"])
    print(json.dumps({"seconds": took, "cpu_seconds": cpu, "tokens": num_tokens}))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
