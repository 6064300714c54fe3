"""Tokens become text piece by piece, and a stop string is never shown, not even its beginning."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.base import FinishReason, TokenBatch, TokenLogprob
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.openai.detokenize import StopStrings, Transcript
from jupyter_llmcloud.inference.openai.prompts import chat_prompt, completion_prompts, token_ids_of
from jupyter_llmcloud.inference.openai.requests import decode_chat, decode_completion
from jupyter_llmcloud.inference.openai.responses import chat_logprobs, completion_logprobs
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary
from tests.support.tiny_models import TEXT, byte_level_tokenizer, word_tokenizer


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


def feed_all(transcript: Transcript, tokens: list[int], reason: FinishReason = "length") -> list[str]:
    last = len(tokens) - 1
    batches = [TokenBatch([t], [], reason if i == last else None) for i, t in enumerate(tokens)]
    return [transcript.feed(batch).text for batch in batches]


def test_the_pieces_join_to_what_the_tokenizer_decodes(tokenizer: Any) -> None:
    tokens = tokenizer(" 北京 naïveté 🙂 is used")["input_ids"]
    pieces = feed_all(Transcript(Vocabulary(tokenizer), tokenizer("The for")["input_ids"], []), tokens)
    assert "".join(pieces) == " 北京 naïveté 🙂 is used"
    assert not any("\ufffd" in piece for piece in pieces)


def test_random_tokens_give_the_same_text_at_once_and_one_by_one(tokenizer: Any) -> None:
    chance = random.Random(0)
    for _ in range(20):
        tokens = [chance.randrange(2, len(tokenizer)) for _ in range(30)]
        one_by_one = feed_all(Transcript(Vocabulary(tokenizer), [], []), tokens)
        assert "".join(one_by_one) == tokenizer.decode(tokens)


def test_a_space_between_prompt_and_answer_is_kept() -> None:
    tokenizer = metaspace_tokenizer()
    prompt, tokens = tokenizer("The for")["input_ids"], tokenizer("statement is")["input_ids"]
    assert "".join(feed_all(Transcript(Vocabulary(tokenizer), prompt, []), tokens)) == " statement is"


def test_the_end_of_sequence_token_is_counted_and_not_shown(tokenizer: Any) -> None:
    tokens = [*tokenizer("true")["input_ids"], tokenizer.eos_token_id]
    piece = Transcript(Vocabulary(tokenizer), [], []).feed(TokenBatch(tokens, [], "stop"))
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
    piece = Transcript(Vocabulary(tokenizer), [], ["repe"]).feed(TokenBatch(tokens, [], "length"))
    assert (piece.text, piece.finish_reason) == ("used for ", "stop")
    assert piece.num_tokens < len(tokens)


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize(
    ("stops", "min_tokens", "shown"),
    [
        ([" b"], 0, "a"),
        ([" b"], 2, "a b c d"),
        ([" b"], 3, "a b c d"),
        ([" b"], 4, "a b c d"),
        ([" b"], 5, "a b c d b"),
        ([" b", " b c dx"], 3, "a b c d"),
        ([" d b"], 4, "a b c"),  # it begins before, and ends behind
    ],
)
def test_no_stop_string_ends_an_answer_that_has_too_few_tokens(
    stops: list[str], min_tokens: int, shown: str, size: int
) -> None:
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    transcript = Transcript(Vocabulary(tokenizer), tokenizer("a", add_special_tokens=False)["input_ids"], stops,
                            min_tokens=min_tokens)  # fmt: skip
    tokens, text, reason = tokenizer("a b c d b", add_special_tokens=False)["input_ids"], "", None
    for begin in range(0, len(tokens), size):
        piece = transcript.feed(TokenBatch(tokens[begin : begin + size], [], None))
        text, reason = text + piece.text, piece.finish_reason
        if reason is not None:
            break
    else:
        text += transcript.feed(TokenBatch([], [], "length")).text
    assert text.lstrip() == shown
    assert (reason == "stop") == (shown != "a b c d b")


def test_what_only_looked_like_a_stop_string_is_shown_at_the_end(tokenizer: Any) -> None:
    tokens = tokenizer("the name")["input_ids"]
    pieces = feed_all(Transcript(Vocabulary(tokenizer), [], ["name of"]), tokens)
    assert "".join(pieces) == "the name"


def fallback_tokenizer(model: str = "bpe", post: str | None = None) -> Any:
    """As Llama 2 and Gemma: characters outside the vocabulary are spelled in bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    if model == "bpe":
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        kind: Any = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    else:
        kind = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    raw = Tokenizer(kind)
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if post:
        ids = [(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
        raw.post_processor = processors.TemplateProcessing(single=post, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def wordpiece_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[UNK]", *letters, *(f"##{letter}" for letter in letters), ".", "the", "##ing"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", eos_token="[EOS]")


SPECIAL = ["<s>", "</s>", "<|end|>", "<|user|>"]
TOKENIZERS = {
    "byte-level": byte_level_tokenizer(),
    "byte-fallback": fallback_tokenizer(),
    "unigram": fallback_tokenizer("unigram"),
    "metaspace": metaspace_tokenizer(),
    "wordpiece": wordpiece_tokenizer(),
}
VOCABULARIES = {kind: Vocabulary(tokenizer) for kind, tokenizer in TOKENIZERS.items()}


def in_batches(vocabulary: Vocabulary, prompt: list[int], answer: list[int], sizes: list[int]) -> str:
    transcript, text = Transcript(vocabulary, prompt, []), ""
    while answer:
        size = sizes.pop() if sizes else len(answer)
        batch, answer = answer[:size], answer[size:]
        text += transcript.feed(TokenBatch(batch, [], None if answer else "length")).text
    return text


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=600)
@given(data=st.data())
def test_an_answer_is_what_its_tokens_add_to_the_prompt_streamed_and_whole(kind: str, data: st.DataObject) -> None:
    tokenizer, vocabulary = TOKENIZERS[kind], VOCABULARIES[kind]
    tokens = st.lists(st.integers(0, len(tokenizer) - 1), max_size=10)
    texts = st.text("ab cé北🙂.", max_size=8).map(lambda text: tokenizer(text)["input_ids"])
    prompt = data.draw(tokens | texts)
    answer = data.draw((tokens | texts).filter(bool))
    sizes = data.draw(st.lists(st.integers(1, 4), max_size=6))
    before, both = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + answer))
    whole = in_batches(vocabulary, prompt, answer, [])
    assert in_batches(vocabulary, prompt, answer, sizes) == whole
    if kind in ("byte-fallback", "unigram") and "\ufffd" in both:
        # This decoder replaces every byte of a run that has one wrong byte; here each character is judged alone.
        return
    assert whole == both[common_length(before, both) :]


def common_length(first: str, second: str) -> int:
    differ = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def test_a_tokenizer_written_in_python_is_decoded_too() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokens = tokenizer("naïve 北京", add_special_tokens=False)["input_ids"]
    pieces = feed_all(Transcript(Vocabulary(tokenizer), [], []), tokens)
    assert "".join(pieces) == "naïve 北京"


def fallback_bytes(*values: int) -> list[int]:
    return [TOKENIZERS["byte-fallback"].convert_tokens_to_ids(f"<0x{value:02X}>") for value in values]


def test_invalid_bytes_after_valid_ones_are_replaced_alone() -> None:
    tokenizer, vocabulary = TOKENIZERS["byte-fallback"], VOCABULARIES["byte-fallback"]
    answer = [*fallback_bytes(0xE4, 0xBD, 0xA0, 0xFF, 0xFE), tokenizer.convert_tokens_to_ids("a")]
    pieces = feed_all(Transcript(vocabulary, tokenizer("hello")["input_ids"], []), answer)
    assert pieces == ["", "", "你", "\ufffd", "\ufffd", "a"]


def test_nothing_of_a_prompt_that_ends_within_a_character_is_in_the_answer() -> None:
    tokenizer, vocabulary = TOKENIZERS["byte-fallback"], VOCABULARIES["byte-fallback"]
    cut = [*tokenizer("key")["input_ids"], *fallback_bytes(0xE4)]
    a = tokenizer.convert_tokens_to_ids("a")
    assert "".join(feed_all(Transcript(vocabulary, cut, []), [a, a])) == "aa"
    assert "".join(feed_all(Transcript(vocabulary, cut, []), [*fallback_bytes(0xBD, 0xA0), a])) == "你a"
    thai = tokenizer("hello กกกก")["input_ids"]
    assert "".join(feed_all(Transcript(vocabulary, thai, []), [a])) == "a"


@pytest.mark.parametrize(
    ("stop", "answer", "shown", "num_tokens"),
    [
        ("<|user|>", ["a", "<|user|>", "b"], "a", 2),
        ("<|end|>b", ["a", "<|end|>", "b", "c"], "a", 3),
        ("<|end|>b", ["a", "<|end|>", "c"], "ac", 3),
        ("ab", ["a", "<|end|>", "b"], "", 3),
    ],
)
def test_a_stop_string_may_spell_a_special_token(stop: str, answer: list[str], shown: str, num_tokens: int) -> None:
    tokenizer, vocabulary = TOKENIZERS["byte-fallback"], VOCABULARIES["byte-fallback"]
    tokens = tokenizer.convert_tokens_to_ids(answer)
    for sizes in ([len(tokens)], [1] * len(tokens)):
        transcript, text, num, rest = Transcript(vocabulary, [], [stop]), "", 0, list(tokens)
        for size in sizes:
            batch, rest = rest[:size], rest[size:]
            piece = transcript.feed(TokenBatch(batch, [], None if rest else "length"))
            text, num = text + piece.text, num + piece.num_tokens
            if piece.finish_reason:
                break
        assert (text, num, piece.finish_reason) == (shown, num_tokens, "length" if shown == "ac" else "stop")


def test_log_probabilities_name_parts_of_characters_and_keep_the_chosen_one() -> None:
    vocabulary = VOCABULARIES["byte-fallback"]
    first, second, third = fallback_bytes(0xE4, 0xBD, 0xA0)
    letter, its_byte = TOKENIZERS["byte-fallback"].convert_tokens_to_ids("a"), fallback_bytes(0x61)[0]
    top = ((first, -1.0), (second, -2.0), (third, -3.0), (letter, -4.0), (its_byte, -5.0))
    answer = [first, second, third, letter]
    entries = [TokenLogprob(token, dict(top)[token], top) for token in answer]
    whole = Transcript(vocabulary, [], []).feed(TokenBatch(answer, entries, "length"))
    transcript = Transcript(vocabulary, [], [])
    streamed = [transcript.feed(TokenBatch([e.token], [e], None)) for e in entries]
    assert [placed for piece in streamed for placed in piece.logprobs] == whole.logprobs
    legacy = completion_logprobs(vocabulary, whole.logprobs)
    assert legacy["tokens"] == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0", "a"]
    assert legacy["text_offset"] == [0, 0, 0, 1]
    for name, logprob, alternatives in zip(*(legacy[key] for key in KEYS), strict=True):
        assert len(alternatives) == 5
        assert alternatives[name] == logprob
    content = chat_logprobs(vocabulary, whole.logprobs)
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "你a"


KEYS = ("tokens", "token_logprobs", "top_logprobs")


def test_an_end_of_sequence_token_is_not_glued_to_a_prompt_that_shall_go_on() -> None:
    tokenizer = fallback_tokenizer(post="<s> $A </s>")
    request = decode_completion(b'{"model": "m", "prompt": "abc"}')
    loaded = LoadedModel(None, tokenizer, 64, len(tokenizer), frozenset(), is_encoder_decoder=False)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    whole = tokenizer("abc")["input_ids"]
    assert (whole[0], whole[-1]) == (start, end)
    assert completion_prompts(request, loaded) == [whole[:-1]]
    encoder = dataclasses.replace(loaded, is_encoder_decoder=True)
    assert completion_prompts(request, encoder) == [whole]


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_a_text_that_is_embedded_has_all_that_the_tokenizer_puts_around_it(is_encoder_decoder: bool) -> None:
    # Models that are pooled by their last token, such as Qwen's embedders, were taught the one behind the text.
    tokenizer = fallback_tokenizer(post="<s> $A </s>")
    loaded = LoadedModel(None, tokenizer, 64, len(tokenizer), frozenset(), is_encoder_decoder=is_encoder_decoder)
    assert token_ids_of(["abc", "b"], loaded, "input", 8) == [tokenizer(text)["input_ids"] for text in ("abc", "b")]
    assert token_ids_of([[5, 6]], loaded, "input", 8) == [[5, 6]]


class RaisingTemplate:
    chat_template = "x"

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise OverflowError("Range too big")


def test_whatever_a_chat_template_raises_is_a_400_that_names_it() -> None:
    loaded = LoadedModel(None, RaisingTemplate(), 64, 10, frozenset(), is_encoder_decoder=False)
    request = decode_chat(b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(ApiError, match="OverflowError: Range too big") as caught:
        chat_prompt(request, loaded)
    assert (caught.value.status, caught.value.param) == (400, "messages")
