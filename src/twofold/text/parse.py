"""Sampled tokens or text to reasoning, content and tool calls, piece by piece or at once.

With token ids (``StreamParser``), structure is read from control tokens, so an answer that merely spells ``</think>``
stays an answer; tags that a tokenizer has no token for, and all tags of a source that has only text (``TextParser``),
are read from their spelling. ``parse`` and ``parse_text`` are the same run to the end. Not here: what the tags mean
(``turn.py``), sampling, and the checking of call arguments against a tool's schema.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from twofold.text.plain import check_unicode
from twofold.text.tokenizer import StreamDecoder, Tokenizer
from twofold.text.turn import ENDS, STRUCTURE, TURN_START, Delta, Parsed, ParseOptions, Start, State, Turn

__all__ = [
    "Delta",
    "ParseOptions",
    "Parsed",
    "Start",
    "StreamParser",
    "TextParser",
    "parse",
    "parse_text",
    "start_state",
]


class _Scanner:
    """Splits a stream of text at tags; an unfinished tag waits for the next piece."""

    def __init__(self, tags: Sequence[str]) -> None:
        self._tags = tuple(tags)
        self._find = re.compile("|".join(map(re.escape, tags)))
        self._held = ""

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """(is a tag, its text) for what is certain by now."""
        if not self._held and "<" not in text:
            return [(False, text)]
        text, at = self._held + text, 0
        pieces = []
        for match in self._find.finditer(text):
            pieces += [(False, text[at : match.start()]), (True, match.group())]
            at = match.end()
        cut = text.rfind("<", at)
        if cut < 0 or not any(tag.startswith(text[cut:]) for tag in self._tags):
            cut = len(text)
        self._held = text[cut:]
        pieces.append((False, text[at:cut]))
        return [piece for piece in pieces if piece[1]]

    def flush(self) -> str:
        """What waited: no tag after all."""
        held, self._held = self._held, ""
        return held


class _Parser:
    """What both front ends share: the machine, and tags that have to be read from their spelling."""

    def __init__(self, options: ParseOptions | None, spelled_tags: Sequence[str]) -> None:
        self._turn = Turn(options or ParseOptions())
        self._scanner = _Scanner(spelled_tags) if spelled_tags else None

    @property
    def state(self) -> State:
        """Where the next token belongs; "done" after the end of the turn or a stop string."""
        return self._turn.state

    @property
    def in_think(self) -> bool:
        """True while the next token belongs to an open think block."""
        return self._turn.state == "think"

    def end(self) -> list[Delta]:
        """Deltas still due when sampling stops without an end token (half a character, an unfinished call)."""
        return self._flush() + self._turn.end(complete=False)

    def finish(self) -> Parsed:
        """The whole message so far; unfinished calls are resolved. Feeding afterwards changes nothing."""
        self.end()
        return self._turn.parsed()

    def _text(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._scanner is None:
            return self._turn.text(text)
        deltas = []
        for is_tag, piece in self._scanner.feed(text):
            # Tags spelled inside a call are arguments, but for its end.
            is_tag = is_tag and not (self._turn.state == "call" and piece in ("<think>", "</think>"))
            deltas += self._turn.tag(piece) if is_tag else self._turn.text(piece)
        return deltas

    def _decoded(self) -> str:
        """Text still waiting for the rest of a character."""
        return ""

    def _flush(self) -> list[Delta]:
        deltas = self._text(self._decoded())
        if self._scanner is not None and (held := self._scanner.flush()):
            deltas += self._turn.text(held)
        return deltas


class StreamParser(_Parser):
    """Incremental parser of one sampled turn, from token ids."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), options: ParseOptions | None = None
    ) -> None:
        """Start in the state in which the prompt ends: before, inside or after a think block, or inside a call."""
        names = {token: i for i, token in tokenizer.structure.items()}
        super().__init__(options, [tag for tag in STRUCTURE if tag not in names])
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        special = {i: token for token, i in names.items() if tokenizer.is_special(i)}
        self._tags = special | {names[tag]: tag for tag in (*STRUCTURE, *ENDS, TURN_START) if tag in names}
        self._read_prompt(prompt_ids)

    def feed(self, token_id: int) -> list[Delta]:
        """Take one sampled token; return what it adds. Tokens after the end of the turn are ignored.

        Raises:
            InputError: an id outside the vocabulary.
        """
        tag = self._tags.get(token_id)
        if tag is not None:
            return self._flush() + self._turn.tag(tag)
        text = self._decoder.feed(token_id)
        if not text:
            return []
        return self._turn.text(text) if self._scanner is None else self._text(text)

    def feed_many(self, token_ids: Sequence[int]) -> list[Delta]:
        """Take several tokens at once: the same message in fewer, larger deltas."""
        deltas: list[Delta] = []
        begin = 0
        for cut in [index for index, token in enumerate(token_ids) if token in self._tags]:
            deltas += self._text(self._decoder.feed_many(token_ids[begin:cut]))
            deltas += self.feed(token_ids[cut])
            begin = cut + 1
        return deltas + self._text(self._decoder.feed_many(token_ids[begin:]))

    def _decoded(self) -> str:
        return self._decoder.flush()

    def _read_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Run the machine over the assistant turn that the prompt leaves open, if it does."""
        think = len(prompt_ids)
        for index in range(len(prompt_ids) - 1, -1, -1):
            tag = self._tags.get(prompt_ids[index])
            if tag in ENDS:
                break
            if tag == TURN_START:
                self._read_turn(prompt_ids[index + 1 :])
                break
            if tag == "<think>":
                think = min(think, index)
        else:  # no turns at all: a think block may still be open
            self.feed_many(prompt_ids[think:])
        self._turn.begin()

    def _read_turn(self, token_ids: Sequence[int]) -> None:
        cut = next((n for n, token in enumerate(token_ids) if token in self._tags), len(token_ids))
        role, _, written = self._decoder.feed_many(token_ids[:cut]).partition("\n")
        if role == "assistant":
            self._text(written)
            self.feed_many(token_ids[cut:])


class TextParser(_Parser):
    """The same for a source that has only text or UTF-8 bytes, such as another server's output."""

    def __init__(self, start: Start = "before", options: ParseOptions | None = None) -> None:
        """Start in the given state; ``start_state`` reads it from a prompt."""
        super().__init__(options, (*STRUCTURE, *ENDS, TURN_START))
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        if start != "before":
            self._turn.tag("<tool_call>" if start == "call" else "<think>")
        if start == "answer":
            self._turn.tag("</think>")
        self._turn.begin()

    def feed(self, chunk: str | bytes) -> list[Delta]:
        """Take a piece of text, cut anywhere, or of bytes, cut anywhere.

        Raises:
            InputError: text with lone surrogates.
        """
        if isinstance(chunk, str):
            check_unicode(chunk, "text")
            chunk = chunk.encode()
        return self._text(self._bytes.decode(chunk))

    def _decoded(self) -> str:
        return self._bytes.decode(b"", final=True)


def parse(
    tokenizer: Tokenizer, token_ids: Sequence[int], prompt_ids: Sequence[int] = (), options: ParseOptions | None = None
) -> Parsed:
    """Parse a whole sampled turn; the same result as feeding a StreamParser."""
    parser = StreamParser(tokenizer, prompt_ids, options)
    parser.feed_many(token_ids)
    return parser.finish()


def parse_text(text: str | bytes, start: Start = "before", options: ParseOptions | None = None) -> Parsed:
    """Parse a whole turn given as text; the same result as feeding a TextParser."""
    parser = TextParser(start, options)
    parser.feed(text)
    return parser.finish()


def start_state(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> Start:
    """Where a reply to this prompt begins: before, inside or after a think block, or inside a tool call."""
    state = StreamParser(tokenizer, prompt_ids).state
    assert state != "done"
    return state
