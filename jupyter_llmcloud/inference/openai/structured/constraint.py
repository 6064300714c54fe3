"""Grammars that the tokens of an answer must follow, by llguidance."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.base import TokenConstraint
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.openai.prompt_length import encode
from jupyter_llmcloud.inference.openai.structured.grammars import without_forcing
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary

log = logging.getLogger(__name__)

MAX_GRAMMAR = 1 << 18
# What a text is tokenized after, one after the other, until its own tokens can be told from what is before.
_BEFORE = ("", "\n", "=", "a")


class Constraints:
    """Makes the constraints of a model's answers. What llguidance needs of the vocabulary is made when first used."""

    def __init__(self, loaded: LoadedModel, vocabulary: Vocabulary) -> None:
        self._loaded = loaded
        self._vocabulary = vocabulary

    @cached_property
    def _tokens(self) -> _Tokens:
        return _Tokens(self._loaded, self._vocabulary)

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(self._tokens), eos_token=sorted(self._loaded.eos))

    def new(self, grammar: str, param: str, reasoning_end: str = "") -> Callable[[], TokenConstraint]:
        """What makes the constraint of each answer; raises `ApiError` 400 where the grammar cannot be followed.

        Args:
            grammar: as `structured.grammars` writes it.
            param: where the request says it, for the error.
            reasoning_end: where the answer begins with reasoning, what ends that: up to there it is free.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            message = f"{param} needs the package llguidance where the model runs: pip install llguidance."
            raise ApiError(400, message, param=param, code="unsupported_parameter") from None
        if not self._loaded.eos:
            message = f"{param}: this model has no token that ends an answer, so no format can be enforced."
            raise ApiError(400, message, param=param, code="unsupported_parameter")
        if len(grammar) > MAX_GRAMMAR:
            message = f"{param} has {len(grammar)} characters: at most {MAX_GRAMMAR} are possible."
            raise ApiError(400, message, param=param, code="invalid_value")
        known = grammar if self._tokens.spell_everything else without_forcing(grammar)
        matcher = LLMatcher(self._tokenizer, known, log_level=0)
        if reason := _why_not(matcher):
            raise ApiError(400, f"{param} cannot be enforced: {reason}", param=param, code="invalid_grammar")
        ends = _mask(self._loaded.eos, self._loaded.num_vocabulary)

        def make() -> TokenConstraint:
            constraint = MatcherConstraint(matcher.deep_copy(), ends)
            if not reasoning_end:
                return constraint
            return AfterReasoning(constraint, self._vocabulary, self._loaded.num_vocabulary, ends, reasoning_end)

        return make


def _why_not(matcher: Any) -> str:
    """Why no answer can follow a grammar; "" when one can begin. Some grammars say so only when they are asked."""
    if not matcher.is_error():
        first = matcher.deep_copy()
        first.compute_bitmask()
        if not first.is_error():
            return ""
        matcher = first
    reason = str(matcher.get_error()).strip().partition("\n")[0]
    return "no text that the model can spell follows it" if reason == "NoExtensionBias" else reason


class _Tokens:
    """A vocabulary as llguidance reads one: the bytes of each token.

    Attributes:
        spell_everything: whether each byte has a token of its own, so that every text has its tokens.
    """

    def __init__(self, loaded: LoadedModel, vocabulary: Vocabulary) -> None:
        num_tokens = loaded.num_vocabulary
        self.eos_token_id = min(loaded.eos)
        self.bos_token_id = loaded.tokenizer.bos_token_id
        self.tokens = [vocabulary.spelled(token) for token in range(num_tokens)]
        self.special_token_ids = sorted({token for token in (*vocabulary.special, *loaded.eos) if token < num_tokens})
        self._of_byte = {token[0]: number for number, token in enumerate(self.tokens) if len(token) == 1}
        self.spell_everything = len(self._of_byte) == 256
        self._loaded = loaded

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of a text in the midst of others, byte for byte: llguidance takes them for the only ones possible.

        Many tokenizers put a space before a text, or have one token for all that they do not know.
        """
        spelled = text if isinstance(text, bytes) else text.encode()
        decoded = spelled.decode(errors="replace")
        for before in _BEFORE:
            if found := self._end_of(encode(self._loaded.tokenizer, before + decoded, special=False), spelled):
                return found
        return [self._of_byte[byte] for byte in spelled] if self.spell_everything else []

    def _end_of(self, tokens: list[int], spelled: bytes) -> list[int]:
        """The last of the tokens, which spell just these bytes."""
        found = b""
        for place in range(len(tokens) - 1, -1, -1):
            if len(found := self.tokens[tokens[place]] + found) >= len(spelled):
                return tokens[place:] if found == spelled else []
        return []


class MatcherConstraint:
    """A grammar's state for one answer.

    Attributes:
        error: why the grammar could not be followed to its end; "" as long as it could.
    """

    def __init__(self, matcher: Any, ends: bytes) -> None:
        self.error = ""
        self._matcher = matcher
        self._ends = ends

    def allowed(self) -> bytes:
        """The tokens that may come next; where nothing more may, those that end the answer."""
        if self.error or self._matcher.is_stopped():
            self._note_error()
            return self._ends
        mask: bytes = self._matcher.compute_bitmask()
        self._note_error()
        return self._ends if self.error else mask

    def accept(self, token: int) -> None:
        """A token was chosen."""
        if not self.error and not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._note_error()

    def _note_error(self) -> None:
        if not self.error and self._matcher.is_error():
            self.error = str(self._matcher.get_error()).strip().partition("\n")[0] or "the grammar failed"
            log.error("a grammar could not be followed: %s", self.error)


class AfterReasoning:
    """Leaves an answer free up to the end of its reasoning, and constrains what comes then."""

    def __init__(
        self, constraint: MatcherConstraint, vocabulary: Vocabulary, num_vocabulary: int, ends: bytes, tag: str
    ) -> None:
        self._constraint = constraint
        self._tag = tag.encode()
        self._vocabulary = vocabulary
        everything = _mask(range(num_vocabulary), num_vocabulary)
        self._free = bytes(a & ~b for a, b in zip(everything, ends, strict=True))
        self._tail = b""
        self._is_thinking = True

    @property
    def error(self) -> str:
        """Why the grammar could not be followed."""
        return self._constraint.error

    def allowed(self) -> bytes:
        """The tokens that may come next."""
        return self._free if self._is_thinking else self._constraint.allowed()

    def accept(self, token: int) -> None:
        """A token was chosen."""
        if not self._is_thinking:
            self._constraint.accept(token)
            return
        self._tail = (self._tail + self._vocabulary.spelled(token))[-4 * len(self._tag) :]
        self._is_thinking = self._tag not in self._tail


def _mask(tokens: Any, num_vocabulary: int) -> bytes:
    mask = bytearray(4 * ((num_vocabulary + 31) // 32))
    for token in tokens:
        if token < num_vocabulary:
            mask[token // 8] |= 1 << token % 8
    return bytes(mask)
