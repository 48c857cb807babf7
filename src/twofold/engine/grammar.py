"""Answers that must have a form: JSON schema, JSON, regular expression or Lark grammar, by the llguidance library.

A grammar is compiled once for a tokenizer; each sample walks its own copy and asks it, token by token, which tokens may
come next. The library sees the exact bytes of every token. Added tokens are symbols of their own: text never contains
them, a grammar names them (``<tool_call>``). Thoughts are free; only what would end one otherwise than by its closing
tag is kept out of it. Not here: drawing tokens, and what a tool's schema is.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from twofold.base.records import Grammar, InputError
from twofold.text.tokenizer import Tokenizer

Place = Literal["before", "thought", "answer", "forced"]

_GAP = b"\n\n"  # what the chat format writes between a think block and the answer; no grammar need know it
_CACHED = 64  # compiled grammars that are kept
# White space in JSON is wanted, but small models could go on with it for ever.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{1,32}"}


class Grammars:
    """Compiles grammars for one tokenizer. Nothing is loaded before the first grammar comes.

    Args:
        tokenizer: whose ids are drawn. eos_ids: tokens that may be drawn where a grammar allows the end.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> None:
        self._tokenizer, self.eos_ids = tokenizer, tuple(eos_ids)
        self.opening, self.closing = tokenizer.think_open, tokenizer.think_close
        self.words = -(-tokenizer.vocab_size // 32)
        self._compiled: dict[Grammar, Any] = {}

    def check(self, grammar: Grammar) -> None:
        """Compile a grammar.

        Raises:
            InputError: the library is missing or does not accept the grammar.
        """
        if grammar in self._compiled:
            return
        try:
            matcher = self._library.LLMatcher(self._vocabulary, self._source(grammar), log_level=0)
        except ValueError as error:
            raise _unusable(grammar, str(error)) from None
        if matcher.is_error():
            raise _unusable(grammar, matcher.get_error())
        while len(self._compiled) >= _CACHED:
            del self._compiled[next(iter(self._compiled))]
        self._compiled[grammar] = matcher

    def start(self, grammar: Grammar) -> AnswerGrammar:
        """A sample's own walk through a grammar."""
        self.check(grammar)
        return AnswerGrammar(self, self._compiled[grammar].deep_copy())

    @cached_property
    def gap_tokens(self) -> dict[int, bytes]:
        """Tokens that are a beginning of what separates a block from its answer."""
        found = {}
        for text in ("\n", "\n\n"):
            ids = self._tokenizer.encode(text)
            if len(ids) == 1:
                found[ids[0]] = text.encode()
        return found

    @cached_property
    def in_thought(self) -> np.ndarray:
        """int32 words, a bit for each token: set but for added tokens other than the closing tag."""
        banned = [token for token in self._tokenizer.structure if token != self.closing]
        bits = np.ones(self.words * 32, dtype=np.uint8)
        bits[[*banned, *self.eos_ids]] = 0
        return np.packbits(bits, bitorder="little").view(np.int32)

    @cached_property
    def _library(self) -> Any:
        try:
            return importlib.import_module("llguidance")
        except ImportError as error:
            raise InputError("grammars need llguidance; install it with: pip install 'twofold[grammar]'") from error

    @cached_property
    def _vocabulary(self) -> Any:
        wrapper = self._library.TokenizerWrapper(_Vocabulary(self._tokenizer, self.eos_ids[0]))
        size = self._tokenizer.vocab_size
        return self._library.LLTokenizer(wrapper, n_vocab=size, eos_token=list(self.eos_ids))

    def _source(self, grammar: Grammar) -> str:
        matcher = self._library.LLMatcher
        if grammar.kind == "regex":
            return matcher.grammar_from_regex(grammar.text)
        if grammar.kind == "lark":
            return matcher.grammar_from_lark(grammar.text)
        schema = grammar.text or json.dumps({"type": "object"})
        return matcher.grammar_from_json_schema(schema, defaults=_JSON_OPTIONS)


class AnswerGrammar:
    """One sample on its way through a grammar. ``error`` says why it could not go on, if so."""

    def __init__(self, grammars: Grammars, matcher: Any) -> None:
        self._grammars, self._matcher = grammars, matcher
        self._gap = b""  # what of it may still come
        self._begun = False
        self.error = ""

    def fill(self, words_W: np.ndarray, place: Place) -> None:
        """Set the bits (int32 words, zeros when given) of the tokens that may come next."""
        if place == "thought":
            words_W[:] = self._grammars.in_thought
            return
        self._matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
        if self._matcher.is_error() or not words_W.any():
            self.error = _one_line(self._matcher.get_error()) or "no token fits the grammar"
            for token in self._grammars.eos_ids:  # the sample ends here
                _set_bit(words_W, token)
        elif place == "before" and not self._begun and self._grammars.opening is not None:
            _set_bit(words_W, self._grammars.opening)
        elif place == "answer" and not self._begun:
            for token, text in self._grammars.gap_tokens.items():
                if self._gap.startswith(text):
                    _set_bit(words_W, token)

    def accept(self, token: int, place: Place) -> None:
        """Take the token that was written."""
        text = self._grammars.gap_tokens.get(token, b"")
        if place in ("thought", "forced"):
            self._gap = _GAP if token == self._grammars.closing else self._gap.removeprefix(text)
        elif place == "answer" and not self._begun and text and self._gap.startswith(text):
            self._gap = self._gap.removeprefix(text)
        elif not self.error and not (place == "before" and token == self._grammars.opening):
            self._begun = True
            if not self._matcher.consume_token(token):
                self.error = _one_line(self._matcher.get_error())


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_id, None
        self.tokens = [_bytes(tokenizer, token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.structure)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        return tokenizer.token_bytes(token)
    except InputError:  # an id that the vocabulary leaves out
        return b""


def _set_bit(words_W: np.ndarray, token: int) -> None:
    words_W.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)


def _unusable(grammar: Grammar, why: str) -> InputError:
    return InputError(f"this {grammar.kind} grammar cannot be used: {_one_line(why)}", field="grammar")


def _one_line(message: str) -> str:
    """The library's message without its dump of parser state and the arrows of its drawings."""
    lines = [line.strip() for line in message.split("<state>")[0].splitlines()]
    return "; ".join(line for line in lines if not set(line) <= set("^| "))
