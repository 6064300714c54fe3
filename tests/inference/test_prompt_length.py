"""A text that is far too long for a model is refused by its beginning, and nothing that fits ever is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.openai.chat.templates import Templates
from jupyter_llmcloud.inference.openai.prompt_length import MIN_PIECE, check_length, pieces_of
from jupyter_llmcloud.inference.openai.prompts import chat_prompt, completion_prompts
from jupyter_llmcloud.inference.openai.requests import decode_chat, decode_completion
from tests.inference.test_inference_text import TOKENIZERS, wordpiece_tokenizer
from tests.support.tiny_models import CHAT_TEMPLATE, byte_level_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class CountedTokenizer:
    """Notes how many characters are tokenized."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.num_characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.num_characters += len(text)
        return self.tokenizer(text, **options)


def one_piece_bpe() -> Any:
    """As Llama 2's: no word ends before a merge, and a run of one character becomes few tokens."""
    pieces, merges = ["<unk>", "\u2581", *LETTERS], []
    for size in (1, 2, 4, 8, 16):
        for letter in ("\u2581", "a"):
            merges.append((letter * size, letter * size))
            pieces.append(letter * 2 * size)
    raw = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def whole_words() -> Any:
    """Whatever it does not know is one token, however long."""
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def spaces_taken_in() -> Any:
    """As RoBERTa's mask: the white space beside a special token, however much, is part of it."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, special=True)], special_tokens=True)
    return tokenizer


def spaces_removed() -> Any:
    """As T5's: a run of white space counts as one."""
    tokenizer = wordpiece_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    return tokenizer


KINDS = {
    **TOKENIZERS,
    "one-piece": one_piece_bpe(),
    "whole words": whole_words(),
    "spaces taken in": spaces_taken_in(),
    "spaces removed": spaces_removed(),
}
PARTS = [
    "a", "the ", "ing", " ", "\n", "  ", "\t", ".", "!", "x" * 90, "q" * 240, "a" * 500, " " * 700, "\n" * 300,
    "\u5317\u4eac", "\U0001f642", "<mask>", "<|end|>", "def f(x):\n    return x\n", "e\u0301", "\u00a0",
]  # fmt: skip


def loaded_with(tokenizer: Any, context: int) -> LoadedModel:
    return LoadedModel(None, tokenizer, context, 2**20, frozenset(), is_encoder_decoder=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(
    parts=st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from([1, 7, 60, 900, 4000])), min_size=1, max_size=8)
)
def test_whatever_fits_is_never_refused_and_a_refusal_tells_no_more_than_there_is(
    kind: str, parts: list[tuple[str, int]]
) -> None:
    tokenizer = KINDS[kind]
    text = "".join(part * number for part, number in parts)[:60_000]
    num_tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    for context in (16, max(1, num_tokens // 2), num_tokens, num_tokens + 1):
        try:
            check_length(text, loaded_with(tokenizer, context), "prompt")
        except ApiError as error:
            told = int(error.message.partition("at least ")[2].partition(" ")[0])
            assert context < told <= num_tokens, error.message


@pytest.mark.parametrize(
    "text", ["word " * 200_000, "a" * 1_000_000, "\u5317" * 300_000, "!" * 1_000_000, "\n" * 1_000_000]
)
def test_of_a_text_that_is_far_too_long_little_is_tokenized(text: str) -> None:
    tokenizer = CountedTokenizer(byte_level_tokenizer())
    with pytest.raises(ApiError, match="maximum context length is 2048 tokens, but prompt has at least") as caught:
        check_length(text, loaded_with(tokenizer, 2048), "prompt")
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    assert caught.value.code == "context_length_exceeded"
    assert tokenizer.num_characters <= 4 * MIN_PIECE


def test_the_pieces_are_the_text_and_end_where_words_do() -> None:
    text = "".join(f"word{number} " for number in range(5000)) + "x" * 9000
    pieces = list(pieces_of(text, 1000))
    assert "".join(pieces) == text
    assert all(piece[0] == " " for piece in pieces[1:40])
    assert max(map(len, pieces)) <= 1000 + 256


def test_prompts_and_conversations_are_refused_by_their_beginning_and_may_be_counted() -> None:
    tokenizer = CountedTokenizer(byte_level_tokenizer())
    loaded = loaded_with(tokenizer, 64)
    long = "word " * 40_000
    with pytest.raises(ApiError, match="at least"):
        completion_prompts(decode_completion(b'{"model": "m", "prompt": ["a", "%s"]}' % long.encode()), loaded)
    chat = decode_chat(b'{"model": "m", "messages": [{"role": "user", "content": "%s"}]}' % long.encode())
    with pytest.raises(ApiError, match="at least") as caught:
        chat_prompt(chat, loaded)
    assert caught.value.param == "messages"
    assert tokenizer.num_characters < 4 * MIN_PIECE
    assert len(chat_prompt(chat, loaded, must_fit=False).tokens) >= 80_000


class CountedTemplates(Templates):
    """Notes how many messages are rendered."""

    num_rendered = 0

    def render(self, template: str, variables: dict[str, Any], messages: Any) -> str:
        self.num_rendered += len(messages)
        return super().render(template, variables, messages)


def conversation(number: int, said: str = "hi") -> Any:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": said} for place in range(number)]
    return decode_chat(msgspec.json.encode({"model": "m", "messages": messages}))


def test_of_messages_that_are_far_too_many_none_is_rendered_where_a_template_shows_them_all() -> None:
    loaded, templates = loaded_with(byte_level_tokenizer(chat_template=CHAT_TEMPLATE), 256), CountedTemplates()
    try:
        for _ in range(2):
            with pytest.raises(ApiError, match="messages has 10000 entries") as caught:
                chat_prompt(conversation(10_000), loaded, templates)
            assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
        assert templates.num_rendered < 100
        with pytest.raises(ApiError, match="maximum context length is 256 tokens, but messages has at least"):
            chat_prompt(conversation(500, "a few words " * 30), loaded, templates)  # may be as many as that
    finally:
        templates.close()


def test_messages_that_a_template_leaves_out_or_that_say_nothing_do_not_count() -> None:
    last_only = loaded_with(byte_level_tokenizer(chat_template="{{ messages[-1].content }}"), 64)
    skips_empty = "{% for m in messages %}{{ m.content }}{% endfor %}"
    shows_said = loaded_with(byte_level_tokenizer(chat_template=skips_empty), 64)
    templates = Templates()
    try:
        assert chat_prompt(conversation(10_000), last_only, templates).text == "hi"
        empty = conversation(10_000, "")
        empty.messages[0].content = "hi"
        assert chat_prompt(empty, shows_said, templates).text == "hi"
    finally:
        templates.close()
