"""Log probabilities of a response are those of its message: not of its reasoning, of tags, or of calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from jupyter_llmcloud.inference.engines.base import TokenBatch, TokenLogprob
from jupyter_llmcloud.inference.openai.chat.answer_parser import AnswerParser, PlainParser, TaggedParser
from jupyter_llmcloud.inference.openai.chat.tool_formats import HERMES
from jupyter_llmcloud.inference.openai.detokenize import Transcript
from jupyter_llmcloud.inference.openai.responses import Envelope, TokenUsage
from jupyter_llmcloud.inference.openai.responses_api.answer import ResponseAnswer
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary
from jupyter_llmcloud.protocol.openai.responses import ResponseRequest
from tests.support.tiny_models import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
THINK = ("<think>", "</think>")


def thinking() -> AnswerParser:
    return TaggedParser(HERMES, {"f": {}}, think=THINK, is_thinking=True)


def answered(parser: AnswerParser, text: str, size: int, stops: list[str]) -> tuple[dict[str, Any], list[Any]]:
    """The response to this text, and the events of its stream, where so many tokens come at once."""
    request = ResponseRequest(model="m", input="x")
    answer = ResponseAnswer(VOCABULARY, Envelope("resp_1", 0, "m"), request, parser, lambda *_: None, logprobs=True)
    transcript, tokens, events = Transcript(VOCABULARY, [5], stops), TOKENIZER(text)["input_ids"], b""
    for begin in range(0, len(tokens), size):
        part = tokens[begin : begin + size]
        entries = [TokenLogprob(token, -1.0, ()) for token in part]
        piece = transcript.feed(TokenBatch(part, entries, "length" if begin + size >= len(tokens) else None))
        events += answer.piece(0, piece, TokenUsage())
    lines = (line for line in events.decode().splitlines() if line.startswith("data: "))
    return answer.whole(TokenUsage()), [json.loads(line[6:]) for line in lines]


def spelled(logprobs: Iterable[dict[str, Any]]) -> str:
    return b"".join(bytes(entry["bytes"]) for entry in logprobs).decode()


CASES: dict[str, tuple[Callable[[], AnswerParser], str, str]] = {
    "reasoning": (thinking, "yes, think</think>\n\nthink of 北京", "think of 北京"),
    "a call": (thinking, 'a</think>I will.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "I will."),
    "plain": (PlainParser, "it is <b>so</b>", "it is <b>so</b>"),
}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("stops", [[], ["zz</"]], ids=["", "held back"])
@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_message(case: str, stops: list[str], size: int) -> None:
    new_parser, text, content = CASES[case]
    response, events = answered(new_parser(), text, size, stops)
    [part] = [item["content"][0] for item in response["output"] if item["type"] == "message"]
    assert part["text"] == content
    deltas = [entry for event in events if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    for told in (part["logprobs"], deltas):
        # A token may reach over the border of a text.
        assert spelled(told).strip(" \n>") == content.strip(" \n>")
