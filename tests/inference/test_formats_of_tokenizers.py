"""Formats of answers with tokenizers of every kind: those that put a space before a text, and those that cannot spell all."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.openai.structured.constraint import Constraints
from jupyter_llmcloud.inference.openai.structured.grammars import json_grammar, regex_grammar
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary
from tests.inference.test_inference_text import TOKENIZERS, VOCABULARIES

SCHEMA = {
    "type": "object", "properties": {"name": {"const": "the weather"}, "sunny": {"type": "boolean"}},
    "required": ["name", "sunny"], "additionalProperties": False,
}  # fmt: skip
PATTERN = r"[a-c]{2,3} (the|for)\."
GRAMMARS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "schema": (json_grammar(SCHEMA), lambda text: json.loads(text).keys() == {"name", "sunny"}),
    "regex": (regex_grammar(PATTERN), lambda text: bool(re.fullmatch(PATTERN, text))),
}
CANNOT_SPELL = {("metaspace", "schema"), ("wordpiece", "schema")}  # no token has a brace


def end_of(kind: str) -> int:
    """The token that ends an answer."""
    return int(TOKENIZERS[kind].convert_tokens_to_ids("[UNK]" if kind == "wordpiece" else "</s>"))


def constraints(kind: str) -> Constraints:
    tokenizer: Any = TOKENIZERS[kind]
    loaded = LoadedModel(None, tokenizer, 64, len(tokenizer), frozenset({end_of(kind)}), is_encoder_decoder=False)
    return Constraints(loaded, Vocabulary(tokenizer))


def random_answer(kind: str, grammar: str, chance: random.Random) -> str:
    """Tokens that are allowed, one after the other, to the end of the answer, as text after other text."""
    constraint, vocabulary, text = constraints(kind).new(grammar, "response_format")(), VOCABULARIES[kind], b""
    while True:  # an answer of each of the grammars has an end
        mask = constraint.allowed()
        allowed = [token for token in range(len(TOKENIZERS[kind])) if mask[token // 8] >> token % 8 & 1]
        token = chance.choice(allowed)
        constraint.accept(token)
        assert not constraint.error, (constraint.error, text, token)
        if token == end_of(kind):
            return text.decode()
        text += vocabulary.spelled(token)


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_whatever_allowed_tokens_an_answer_takes_it_has_its_format(kind: str, name: str) -> None:
    grammar, is_right = GRAMMARS[name]
    if (kind, name) in CANNOT_SPELL:
        with pytest.raises(ApiError, match="no text that the model can spell follows it"):
            constraints(kind).new(grammar, "response_format")
        return
    chance = random.Random(0)
    for _ in range(5):
        assert is_right(random_answer(kind, grammar, chance))
