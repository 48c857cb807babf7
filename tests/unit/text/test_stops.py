"""Stop strings are found at the same place however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.text.stops import StopMatcher

STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = "".join(map(matcher.feed, pieces)) + matcher.flush()
    return shown, matcher.matched


def slow(stops: list[str], text: str) -> tuple[str, str | None]:
    """One character at a time, in the plainest way."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(STOPS, st.lists(st.text("ab\nc", max_size=5), max_size=6))
@settings(max_examples=300, deadline=None)
def test_equals_the_plain_search(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    assert run(stops, pieces) == run(stops, list(text)) == run(stops, [text]) == slow(stops, text)


def test_holds_back_only_what_may_become_a_stop_string() -> None:
    matcher = StopMatcher(["STOP", "\nUser:"])
    assert matcher.feed("say S") == "say " and matcher.feed("TA\n") == "STA" and matcher.feed("Us") == ""
    assert matcher.flush() == "\nUs" and matcher.feed("STOP more") == "" and matcher.matched == "STOP"
    assert matcher.feed("anything") == "" and matcher.flush() == ""


@pytest.mark.parametrize("bad", ["text", [""], [1]])
def test_bad_stop_strings_are_refused(bad: object) -> None:
    with pytest.raises(InputError, match="non-empty strings"):
        StopMatcher(bad)  # type: ignore[arg-type]
