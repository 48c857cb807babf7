"""The text of one tool call to a ``ToolCall``, read as it arrives; JSON that has only one reading is mended.

Mended: trailing commas, single quotes, line breaks inside strings, Python's True / False / None, brackets missing or
left over at a closed end. Everything else is a fault with its reason; nothing is guessed. Not here: where calls begin
and end in a reply (``parse.py``), calls in the XML form of Qwen3-Coder (``xml_calls.py``), and tool schemas.
"""

from __future__ import annotations

import json
import math
import re

from twofold.base.records import ToolCall

MAX_DEPTH = 100
_MAX_SCALAR = 400

_SPACE = re.compile(r"[ \t\r\n]+")
_SCALAR = re.compile(r"[-+.\w]+")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII)
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_PLAIN = {'"': re.compile(r'[^"\\\x00-\x1f]+'), "'": re.compile(r"[^'\"\\\x00-\x1f]+")}
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_CLOSERS = {"{": "}", "[": "]"}


class CallReader:
    """Incremental reader of one call's JSON object; how the text is cut into pieces makes no difference.

    ``name`` is known once its string has been read. ``take`` gives further argument text, in canonical spacing.
    """

    def __init__(self) -> None:
        self.name = ""
        self.fault = ""
        self.repairs: dict[str, None] = {}
        self._rest = ""
        self._stack: list[str] = []
        self._expect = "value"  # value, key, colon, next, nothing
        self._opened = self._comma = False
        self._quote = self._key = ""
        self._word: list[str] = []
        self._in_arguments = False
        self._arguments: list[str] = []
        self._taken = 0

    def feed(self, text: str) -> None:
        """Read more of the call."""
        text, at = self._rest + text, 0
        while at < len(text) and not self.fault:
            step = self._string(text, at) if self._quote else self._structure(text, at)
            if step == at:  # a word or an escape that may go on in the next piece
                break
            at = step
        self._rest = "" if self.fault else text[at:]

    def take(self) -> str:
        """Argument text not yet taken; empty before the name is known."""
        if not self.name or self.fault:
            return ""
        text = "".join(self._arguments[self._taken :])
        self._taken = len(self._arguments)
        return text

    def close(self, tagged: bool) -> ToolCall | None:
        """The call, or None with ``fault`` set. ``tagged``: the end was marked, so missing brackets can be added."""
        if not self._quote:
            self.feed(" ")  # ends a number or word
        self._close_brackets(tagged)
        if not self.fault and not self.name:
            self.fault = "no function name"
        if not self.fault and not self._arguments:
            self.fault = "arguments is not an object"
        if self.fault:
            return None
        arguments = json.loads("".join(self._arguments))
        if not _is_text(json.dumps(arguments, ensure_ascii=False)):
            self.fault = "half a character (a lone surrogate)"
            return None
        return ToolCall(self.name, arguments)

    def _close_brackets(self, tagged: bool) -> None:
        if self.fault or self._expect == "nothing":
            return
        if self._quote or self._rest:
            self.fault = "not JSON (a string is not closed)"
        elif not self._stack or (self._expect in ("colon", "value") and not (self._opened or self._comma)):
            self.fault = "not JSON (it breaks off)"
        elif not tagged:
            self.fault = "not JSON (brackets are not closed)"
        else:
            self._mended("missing bracket")
            while self._stack and not self.fault:
                self._close(_CLOSERS[self._stack[-1]])

    def _mended(self, what: str) -> None:
        self.repairs[what] = None

    def _emit(self, text: str) -> None:
        if self._in_arguments:
            self._arguments.append(text)

    def _structure(self, text: str, at: int) -> int:
        """Read one lexeme outside strings; the index after it, or ``at`` if it may not be whole."""
        if space := _SPACE.match(text, at):
            return space.end()
        char = text[at]
        if self._expect == "nothing":
            if char in "}]":
                self._mended("extra bracket")
            else:
                self.fault = "not JSON (text after the object)"
        elif char in "}]":
            self._close(char)
        elif self._expect == "next":
            self._separate(char)
        elif self._expect == "colon":
            if char != ":":
                self.fault = "not JSON (no colon after a key)"
            self._emit(": ")
            self._expect = "value"
        else:
            return self._value(text, at)
        return at + 1

    def _separate(self, char: str) -> None:
        if char != ",":
            self.fault = f"not JSON (unexpected {char!r})"
        self._comma = True
        self._expect = "key" if self._stack[-1] == "{" else "value"

    def _value(self, text: str, at: int) -> int:
        """Begin a key, string or container, or read a whole number or word."""
        char = text[at]
        if not self._stack and char != "{":
            self.fault = "not an object" if char in "[\"'" or char.isalnum() else f"not JSON (unexpected {char!r})"
            return at
        if self._expect == "key" and char not in "\"'":
            self.fault = "not JSON (a key is not in quotes)"
            return at
        scalar = None
        if char not in "{[\"'":
            scalar = _SCALAR.match(text, at)
            if scalar is not None and scalar.end() == len(text) and len(text) - at <= _MAX_SCALAR:
                return at
        if self._comma:
            self._emit(", ")
        self._comma = self._opened = False
        if self._expect == "value" and len(self._stack) == 1 and not self._begin_field(char):
            return at
        if char in "{[":
            self._open(char)
        elif char in "\"'":
            self._quote, self._word = char, []
            if char == "'":
                self._mended("single quotes")
            self._put('"')
        else:
            return self._scalar(text, at, scalar)
        return at + 1

    def _begin_field(self, char: str) -> bool:
        """A value of the outermost object begins; False on a fault."""
        if (self._key == "name" and self.name) or (self._key == "arguments" and self._arguments):
            self.fault = f"{self._key} is given twice"
        elif self._key == "arguments" and char != "{":
            self.fault = "arguments is not an object"
        elif self._key == "name" and char not in "\"'":
            self.fault = "no function name"
        self._in_arguments = self._key == "arguments"
        return not self.fault

    def _open(self, char: str) -> None:
        self._emit(char)
        self._stack.append(char)
        self._opened = True
        self._expect = "key" if char == "{" else "value"
        if len(self._stack) > MAX_DEPTH:
            self.fault = f"nested too deeply (more than {MAX_DEPTH} levels)"

    def _close(self, char: str) -> None:
        ready = self._expect == "next" or self._opened or self._comma
        if not self._stack or _CLOSERS[self._stack[-1]] != char or not ready:
            self.fault = f"not JSON (unexpected {char!r})"
            return
        if self._comma:
            self._mended("trailing comma")
        self._comma = self._opened = False
        self._stack.pop()
        self._emit(char)
        self._value_done()

    def _value_done(self) -> None:
        self._expect = "next" if self._stack else "nothing"
        if len(self._stack) <= 1:
            self._in_arguments = False

    def _scalar(self, text: str, at: int, match: re.Match[str] | None) -> int:
        word = match.group() if match else text[at]
        known = _WORDS.get(word)
        if known is None and len(word) <= _MAX_SCALAR and _NUMBER.fullmatch(word) and math.isfinite(float(word)):
            known = word
        if known is None:
            self.fault = f"not JSON (unexpected {word[:20]!r})"
            return at
        if known != word:
            self._mended("Python constant")
        self._emit(known)
        self._value_done()
        return at + len(word)

    def _put(self, text: str) -> None:
        """Text of a string: kept apart too where it may be a key or the name."""
        if len(self._stack) == 1:
            self._word.append(text)
        self._emit(text)

    def _string(self, text: str, at: int) -> int:
        """Read part of a string; the index after it, or ``at`` if an escape may not be whole."""
        if plain := _PLAIN[self._quote].match(text, at):
            self._put(plain.group())
            return plain.end()
        char = text[at]
        if char == self._quote:
            self._put('"')
            self._string_done()
        elif char == "\\":
            return self._escape(text, at)
        elif char == '"':  # inside single quotes
            self._put('\\"')
        else:
            self._mended("line break in a string" if char in "\r\n" else "control character in a string")
            self._put(json.dumps(char)[1:-1])
        return at + 1

    def _escape(self, text: str, at: int) -> int:
        size = 6 if text[at + 1 : at + 2] == "u" else 2
        piece = text[at : at + size]
        if len(piece) < size:
            return at
        if piece == "\\'":
            self._mended("escaped single quote")
            self._put("'")
        elif _ESCAPE.fullmatch(piece):
            self._put(piece)
        else:
            self.fault = f"not JSON (unknown escape {piece!r})"
        return at + size

    def _string_done(self) -> None:
        self._quote = ""
        if self._expect == "key":
            self._expect = "colon"
            if len(self._stack) == 1:
                self._key = json.loads("".join(self._word))
            return
        if len(self._stack) == 1 and self._key == "name":
            self.name = json.loads("".join(self._word))
            self.fault = name_fault(self.name)
        self._value_done()


def name_fault(name: str) -> str:
    """Why no renderer could write this name, which stands between quotes as it is; empty if it can."""
    if not name:
        return "no function name"
    plain = _is_text(name) and json.dumps(name, ensure_ascii=False) == f'"{name}"'
    return "" if plain else "the function name has quotes, control characters or half a character"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
