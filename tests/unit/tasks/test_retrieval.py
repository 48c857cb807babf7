"""Retrieval documents: spans, distances and unambiguous keys."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.tasks.retrieval import MAX_FACTS, make_retrieval_document

FILLER = [f"line {i} of some real text" + " more" * (i % 5) for i in range(60)] + ["", "@ K3"]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 26), st.integers(0, 100))
def test_spans_and_distances(seed: int, n_facts: int, extra: int) -> None:
    n_questions = 1 + extra % (3 * n_facts)
    text, answers = make_retrieval_document(random.Random(seed), FILLER, 4000, n_facts, n_questions)
    assert len(answers) == n_questions and 3500 < len(text) < 4100
    places: dict[str, list[int]] = {}
    for match in re.finditer(r"^@ ([A-Z])(\d)$", text, re.M):
        places.setdefault(match[1], []).append(match.start(2))
    assert len(places) == n_facts
    for found in places.values():
        assert len({text[at] for at in found}) == 1  # a key has one value in the whole document
        assert len(found) <= 4
        if len(found) > 1:  # at least one line of filler lies between a fact and its first repeat
            between = text[found[0] : found[1]].splitlines()[1:-1]
            assert any(not line.startswith("@ ") for line in between)
    expected = sorted((b, b - a) for found in places.values() for a, b in zip(found, found[1:], strict=False))
    assert [(span[0], distance) for span, distance in answers] == expected
    for (start, end), distance in answers:
        assert end == start + 1 and text[start].isdigit() and text[start - distance] == text[start]
    assert answers[-1].span[1] == len(text) - 1  # the document ends with a question


def test_deterministic_and_varied() -> None:
    first = make_retrieval_document(random.Random(4), FILLER, 8000, 20, 40)
    assert first == make_retrieval_document(random.Random(4), FILLER, 8000, 20, 40)
    distances = [distance for _, distance in first[1]]
    assert min(distances) < 1000 and max(distances) > 4000
    digits = {first[0][span[0]] for span, _ in first[1]}
    assert len(digits) > 4


def test_errors() -> None:
    rng = random.Random(0)
    for arguments, message in (
        ((FILLER, 4000, 0, 1), "n_facts"),
        ((FILLER, 4000, MAX_FACTS + 1, 1), "n_facts"),
        ((FILLER, 4000, 2, 7), "n_questions"),
        ((FILLER, 50, 10, 15), "too few"),
        ((["", "@ K1"], 4000, 2, 2), "filler"),
    ):
        with pytest.raises(InputError, match=message):
            make_retrieval_document(rng, *arguments)
