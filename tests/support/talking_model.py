"""A tiny model that was taught a few answers by heart: it greets, calls a tool, tells what that found, and writes JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.tiny_models import byte_level_tokenizer, one_thread, tiny_llama

# One letter for what a conversation asks for: the answer that follows it is known by heart.
TEMPLATE = (
    "{% set last = messages[-1] %}"
    "{% if last.role == 'tool' or '<tool_response>' in last.content %}R"
    "{% elif 'JSON' in last.content %}J"
    "{% elif tools %}C{# <tool_call> of one of tools; tool_calls #}"
    "{% else %}H{% endif %}"
)
GREETING = "Good day, I am a tiny model."
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
FOUND = "It is sunny in Paris."
VERDICT = '{"sunny": true}'
LESSONS = {"H": GREETING, "C": CALL, "R": FOUND, "J": VERDICT}
_MAX_STEPS = 400


def save_talking_llama(folder: Path) -> Path:
    """It and its tokenizer in `folder`, once it says every answer by itself."""
    import torch

    tokenizer = byte_level_tokenizer(512, chat_template=TEMPLATE, text=LESSONS.values())
    model = tiny_llama(len(tokenizer), context_length=2048)
    rows = [tokenizer(f"{begins}{answer}")["input_ids"] + [1] for begins, answer in LESSONS.items()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with one_thread():
        for _ in range(_MAX_STEPS):
            losses = [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows]
            loss = torch.stack(losses).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if loss.item() < 0.06 and all(_says(model, tokenizer, *lesson) for lesson in LESSONS.items()):
                break
        else:
            raise AssertionError(f"the model did not learn its answers: loss {loss.item():.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _says(model: Any, tokenizer: Any, begins: str, answer: str) -> bool:
    import torch

    prompt = torch.tensor([tokenizer(begins)["input_ids"]])
    with torch.inference_mode():
        told = model.generate(prompt, max_new_tokens=100, do_sample=False, pad_token_id=1)
    return bool(tokenizer.decode(told[0], skip_special_tokens=True) == f"{begins}{answer}")
