"""Retrieval documents: spans, distances and notes that only the past determines."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.tasks.retrieval import make_note_document

FILLER = [f"line {i} of some real text" + " more" * (i % 5) for i in range(60)] + ["", "@ K3", "  @property"]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 10), st.lists(st.integers(0, 900), min_size=1, max_size=4))
def test_spans_and_distances(seed: int, n_letters: int, gaps: list[int]) -> None:
    text, answers = make_note_document(random.Random(seed), FILLER, n_letters, gaps)
    notes = list(re.finditer(r"^@((?: [A-J])+)\n", text, re.M))
    assert len(notes) == text.count("@") == len(gaps) + 1
    assert len({note[0] for note in notes}) == 1  # one note, word for word
    letters = notes[0][1].split()
    assert len(set(letters)) == len(letters) == n_letters
    for earlier, later, gap in zip(notes, notes[1:], gaps, strict=False):
        assert gap <= later.start() - earlier.end() < gap + 60
    expected = [
        (note.start(1) + 2 * i, note.start() - before.start())
        for before, note in zip(notes, notes[1:], strict=False)
        for i in range(1, n_letters)
    ]
    assert [(span[0], distance) for span, distance in answers] == expected
    for (start, end), distance in answers:
        assert text[start:end] == text[start - distance : end - distance] and re.fullmatch(" [A-J]", text[start:end])
    assert answers[-1].span[1] == len(text) - 1  # the document ends with an answer


def test_deterministic_and_varied() -> None:
    first = make_note_document(random.Random(4), FILLER, 6, [500, 2000])
    assert first == make_note_document(random.Random(4), FILLER, 6, [500, 2000])
    notes = {make_note_document(random.Random(seed), FILLER, 6, [0])[0] for seed in range(30)}
    assert len(notes) == 30


def test_errors() -> None:
    rng = random.Random(0)
    for arguments, message in (
        ((FILLER, 1, [10]), "n_letters"),
        ((FILLER, 11, [10]), "n_letters"),
        ((FILLER, 4, []), "gaps"),
        ((FILLER, 4, [5, -1]), "gaps"),
        ((["", "@ K1"], 4, [10]), "filler"),
    ):
        with pytest.raises(InputError, match=message):
            make_note_document(rng, *arguments)
    assert make_note_document(rng, [], 3, [0, 0])[0].count("@") == 3  # no filler asked for, none needed
