"""Tokens become text piece by piece, and a stop string is never shown, not even its beginning."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jupyter_llmcloud.inference.engines.base import FinishReason, TokenBatch
from jupyter_llmcloud.inference.openai.detokenize import StopStrings, Transcript, detokenizer
from tests.support.tiny_models import TEXT, byte_level_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_tokenizer()


def metaspace_tokenizer() -> Any:
    """As SentencePiece models do it: a word begins with its space, and a decoder drops the first one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


class SlowTokenizer:
    """A tokenizer without a backend in Rust."""

    def __init__(self, tokenizer: Any) -> None:
        self.decode = tokenizer.decode


def feed_all(transcript: Transcript, tokens: list[int], reason: FinishReason = "length") -> list[str]:
    last = len(tokens) - 1
    batches = [TokenBatch([t], [], reason if i == last else None) for i, t in enumerate(tokens)]
    return [transcript.feed(batch).text for batch in batches]


@pytest.mark.parametrize("slow", [False, True])
def test_the_pieces_join_to_what_the_tokenizer_decodes(tokenizer: Any, slow: bool) -> None:
    tokens = tokenizer(" 北京 naïveté 🙂 is used")["input_ids"]
    decoder = detokenizer(SlowTokenizer(tokenizer) if slow else tokenizer, tokenizer("The for")["input_ids"])
    pieces = feed_all(Transcript(decoder, []), tokens)
    assert "".join(pieces) == " 北京 naïveté 🙂 is used"
    assert not any("\ufffd" in piece for piece in pieces)


def test_random_tokens_give_the_same_text_at_once_and_one_by_one(tokenizer: Any) -> None:
    chance = random.Random(0)
    for _ in range(20):
        tokens = [chance.randrange(2, len(tokenizer)) for _ in range(30)]
        one_by_one = feed_all(Transcript(detokenizer(tokenizer, []), []), tokens)
        assert "".join(one_by_one) == tokenizer.decode(tokens)


def test_a_space_between_prompt_and_answer_is_kept() -> None:
    tokenizer = metaspace_tokenizer()
    prompt, tokens = tokenizer("The for")["input_ids"], tokenizer("statement is")["input_ids"]
    assert "".join(feed_all(Transcript(detokenizer(tokenizer, prompt), []), tokens)) == " statement is"


def test_the_end_of_sequence_token_is_counted_and_not_shown(tokenizer: Any) -> None:
    tokens = [*tokenizer("true")["input_ids"], tokenizer.eos_token_id]
    piece = Transcript(detokenizer(tokenizer, []), []).feed(TokenBatch(tokens, [], "stop"))
    assert (piece.text, piece.num_tokens, piece.finish_reason) == ("true", len(tokens), "stop")


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["ab", "cd"], ["zz"], "abcd"),
        (["a", "b", "STO", "P", "never"], ["STOP"], "ab"),
        (["aS", "TOx"], ["STOP"], "aSTOx"),
        (["aabaabaac"], ["abaac"], "aaba"),
        (["x", "\n", "\n"], ["\n\n"], "x"),
        (["one two three"], ["three", "two"], "one "),
        (["aa", "aab"], ["aaab"], "a"),
    ],
)
def test_nothing_of_a_stop_string_is_shown(pieces: list[str], stops: list[str], shown: str) -> None:
    stop = StopStrings(stops)
    text = ""
    for piece in pieces:
        new, met = stop.feed(piece)
        text += new
        assert not any(end in text for end in stops)
        if met:
            assert text == shown
            return
    assert text + stop.rest() == shown


def test_a_stop_string_ends_the_text_within_a_batch_of_many_tokens(tokenizer: Any) -> None:
    tokens = tokenizer("used for repeated execution")["input_ids"]
    piece = Transcript(detokenizer(tokenizer, []), ["repe"]).feed(TokenBatch(tokens, [], "length"))
    assert (piece.text, piece.finish_reason) == ("used for ", "stop")
    assert piece.num_tokens < len(tokens)


def test_what_only_looked_like_a_stop_string_is_shown_at_the_end(tokenizer: Any) -> None:
    tokens = tokenizer("the name")["input_ids"]
    pieces = feed_all(Transcript(detokenizer(tokenizer, []), ["name of"]), tokens)
    assert "".join(pieces) == "the name"
