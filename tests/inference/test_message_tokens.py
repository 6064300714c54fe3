"""Which tokens of an answer are its message and which its reasoning: log probabilities and usage tell them apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from jupyter_llmcloud.inference.engines.base import TokenBatch, TokenLogprob
from jupyter_llmcloud.inference.openai.answers import ChatAnswer, Told
from jupyter_llmcloud.inference.openai.chat.answer_parser import AnswerParser, PlainParser, TaggedParser
from jupyter_llmcloud.inference.openai.chat.harmony import HarmonyParser
from jupyter_llmcloud.inference.openai.chat.tool_formats import HERMES
from jupyter_llmcloud.inference.openai.detokenize import Transcript
from jupyter_llmcloud.inference.openai.responses import Answer, Envelope, TokenUsage
from jupyter_llmcloud.inference.openai.responses_api.answer import ResponseAnswer
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary
from jupyter_llmcloud.protocol.openai.responses import ResponseRequest
from tests.support.tiny_models import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
THINK = ("<think>", "</think>")


def thinking() -> AnswerParser:
    return TaggedParser(HERMES, {"f": {}}, think=THINK, is_thinking=True)


def harmony() -> AnswerParser:
    return HarmonyParser("<|start|>assistant", frozenset())


def chat(parser: AnswerParser) -> Answer:
    return ChatAnswer(VOCABULARY, Envelope("chat_1", 0, "m"), 1, Told(logprobs=True, usage=True), lambda: parser)


def response(parser: AnswerParser) -> Answer:
    request = ResponseRequest(model="m", input="x")
    return ResponseAnswer(VOCABULARY, Envelope("resp_1", 0, "m"), request, parser, lambda *_: None, logprobs=True)


def answered(answer: Answer, text: str, size: int, stops: list[str]) -> tuple[dict[str, Any], list[Any]]:
    """The answer of this text, and the events of its stream, where so many tokens come at once."""
    usage, events = TokenUsage(), b""
    transcript, tokens = Transcript(VOCABULARY, [5], stops), TOKENIZER(text)["input_ids"]
    for begin in range(0, len(tokens), size):
        part = tokens[begin : begin + size]
        entries = [TokenLogprob(token, -1.0, ()) for token in part]
        piece = transcript.feed(TokenBatch(part, entries, "length" if begin + size >= len(tokens) else None))
        events += answer.piece(0, piece, usage)
    lines = (line for line in events.decode().splitlines() if line.startswith("data: "))
    return answer.whole(usage), [json.loads(line[6:]) for line in lines]


CASES: dict[str, tuple[Callable[[], AnswerParser], str, str, str]] = {
    "reasoning": (thinking, "yes, think</think>\n\nof 北京", "yes, think", "of 北京"),
    "a call": (
        thinking, 'a</think>I will.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "a", "I will.",
    ),
    "harmony": (harmony, "<|channel|>analysis<|message|>hm, so<|end|><|start|>assistant<|channel|>final<|message|>Yes",
                "hm, so", "Yes"),
    "cut": (thinking, "let me see, and then", "let me see, and then", ""),
    "plain": (PlainParser, "it is <b>so</b>", "", "it is <b>so</b>"),
}  # fmt: skip


def spelled(logprobs: list[dict[str, Any]]) -> str:
    return b"".join(bytes(entry["bytes"]) for entry in logprobs).decode(errors="replace")


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("stops", [[], ["zz</"]], ids=["", "held back"])
@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_of_a_chat_are_those_of_its_content(case: str, stops: list[str], size: int) -> None:
    new_parser, text, _, content = CASES[case]
    told, events = answered(chat(new_parser()), text, size, stops)
    choice = told["choices"][0]
    assert choice["message"]["content"] == content or not content
    chunks = [event["choices"][0]["logprobs"] for event in events]
    streamed = [entry for chunk in chunks if chunk for entry in chunk["content"]]
    for entries in (choice["logprobs"]["content"], streamed):
        # A token may reach over the border of a text.
        assert spelled(entries).strip(" \n>") == content.strip(" \n>")


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("kind", [chat, response], ids=["chat", "response"])
@pytest.mark.parametrize("case", CASES)
def test_usage_tells_how_many_tokens_were_reasoning(
    case: str, kind: Callable[[AnswerParser], Answer], size: int
) -> None:
    new_parser, text, reasoning, _ = CASES[case]
    usage = answered(kind(new_parser()), text, size, [])[0]["usage"]
    details = usage.get("output_tokens_details") or usage.get("completion_tokens_details")
    if case == "plain":
        assert (details or {"reasoning_tokens": 0}) == {"reasoning_tokens": 0}
        return
    # The first and the last token may reach over the tags.
    assert abs(details["reasoning_tokens"] - len(TOKENIZER(reasoning)["input_ids"])) <= 1
