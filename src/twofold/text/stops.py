"""Stop strings: find where text first completes one, however the text is cut into pieces.

Text that may still become a stop string is held back until that is decided. Not here: which text is searched
(``parse.py`` searches answers, never thoughts) and stop tokens (``engine``).
"""

from __future__ import annotations

from collections.abc import Sequence

from twofold.base.records import InputError


class StopMatcher:
    """Passes text through up to the first stop string; ``matched`` then holds that string."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises InputError for a stop string that is empty or not a string."""
        if isinstance(stops, str) or any(not isinstance(stop, str) or not stop for stop in stops):
            raise InputError("stop must be a list of non-empty strings")
        self.matched: str | None = None
        self._stops = tuple(dict.fromkeys(stops))
        self._beginnings = {stop[:size] for stop in self._stops for size in range(1, len(stop))}
        self._sizes = range(max(map(len, self._beginnings), default=0), 0, -1)
        self._held = ""

    def feed(self, text: str) -> str:
        """Take more text; return what no stop string can claim any more. After a match: nothing."""
        if self.matched is not None:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            # The one completed first is what a reader one character at a time would meet; of two, the longer.
            _, at, self.matched = min(ends)
            self._held = ""
            return text[:at]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """End of the text: what was held back."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for size in self._sizes:
            if text[-size:] in self._beginnings and size <= len(text):
                return size
        return 0
