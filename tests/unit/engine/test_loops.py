"""Loops: none is seen in natural text, every planted one is found early, and the thought ends with the stop text."""

from __future__ import annotations

import random
import re
from functools import cache

import pytest
import torch

from twofold.base.records import Request, SamplingParams
from twofold.data.corpus import docstring_documents, pydoc_topic_documents, python_stdlib_documents
from twofold.engine.loops import LEAST, PERIODS, LoopDetector
from twofold.engine.sampling import Sampler, ThinkTokens

LONGEST = 900


@cache
def natural_texts() -> list[list[int]]:
    """200 documents of the standard library as words, spaces and runs of marks, numbered."""
    documents = [*docstring_documents(python_stdlib_documents()[::2]), *pydoc_topic_documents()]
    parts = [document.text[start : start + 8000] for document in documents for start in (0, 8000, 16000)]
    pieces = [re.findall(r"\w+|[^\S\n]+|\n+|[^\w\s]+", part) for part in parts]
    long = [words[:LONGEST] for words in pieces if len(words) > 300]
    ids: dict[str, int] = {}
    return [[ids.setdefault(word, len(ids)) for word in words] for words in long[:200]]


def found(texts: list[list[int]]) -> list[int | None]:
    """For each text, read as one thought, the index of the token with which a loop is seen."""
    table = torch.full((len(texts), max(map(len, texts))), -1)
    for row, text in enumerate(texts):
        table[row, : len(text)] = torch.tensor(text)
    detector = LoopDetector(len(texts))
    first: list[int | None] = [None] * len(texts)
    for place in range(table.shape[1]):
        rows = (table[:, place] >= 0).nonzero().flatten()
        made = torch.full_like(rows, place)
        looping = detector.advance(rows, table[rows, place], table, made, made)
        for row in rows[looping].tolist():
            first[row] = place if first[row] is None else first[row]
    return first


def plain_found(text: list[int]) -> int | None:
    """The definition, period by period."""
    scores = [0] * (PERIODS + 1)
    for place, token in enumerate(text):
        for period in range(1, min(place, PERIODS) + 1):
            same = text[place - period] == token
            scores[period] = scores[period] + 1 if same else max(0, scores[period] - 8)
        if any(scores[period] >= max(2 * period, LEAST) for period in range(1, min(place, PERIODS) + 1)):
            return place
    return None


def test_no_loop_is_seen_in_natural_text() -> None:
    texts = natural_texts()
    assert len(texts) == 200 and sum(map(len, texts)) > 120_000
    assert found(texts) == [None] * 200


def test_every_planted_loop_is_found_within_three_periods() -> None:
    rng, texts, starts, periods = random.Random(0), [], [], []
    for text in natural_texts():
        period = rng.choice([1, 2, 3, 7, 20, 40, 80, 150, 250])
        begin, at = rng.randrange(0, 200), rng.randrange(0, len(text) - period)
        texts.append(text[:begin] + text[at : at + period] * (6 + LEAST // period))
        starts.append(begin)
        periods.append(period)
    for place, start, period in zip(found(texts), starts, periods, strict=True):
        assert place is not None
        assert place < start + max(3 * period, period + LEAST), f"period {period}"


def test_a_loop_with_a_slip_in_it_is_found_and_an_enumeration_is_not() -> None:
    line = list(range(100, 140))
    slips = [token for turn in range(12) for token in [*line[:-1], 1000 + turn]]
    lines = [token for turn in range(60) for token in [7, 8, 1000 + turn, 9, 10, 2000 + turn, 11, 12, 13, 14]]
    counting = [token for turn in range(200) for token in [5, 1000 + turn]]
    first, none, neither = found([slips, lines, counting])
    assert first is not None and first < 5 * 40 and none is None and neither is None


def test_scores_equal_the_plain_definition() -> None:
    rng, texts = random.Random(1), []
    for _ in range(12):
        text: list[int] = []
        while len(text) < 260:
            if text and rng.random() < 0.4:
                size = rng.randint(1, min(60, len(text)))
                text += text[-size:] * rng.randint(1, 4)
            text += rng.choices(range(40), k=rng.randint(1, 12))
        texts.append(text[:260])
    expected = [plain_found(text) for text in texts]
    assert found(texts) == expected and None in expected and any(expected)


@pytest.mark.parametrize("watched", [True, False])
def test_a_looping_thought_ends_with_the_stop_text_and_a_looping_answer_does_not(watched: bool) -> None:
    opening, closing, vocabulary = 1, 2, 40
    period = [5, 6, 7, 8, 9]
    offered = [opening, *period * 40]
    sampler = Sampler(2, ThinkTokens(opening, closing, (30, closing, 31)), (0,), vocabulary)
    for slot, after in ((0, False), (1, True)):
        params = SamplingParams(0.0, max_tokens=150, stop_loops=watched)
        sampler.start(slot, Request((5, 6, 7, 8, 9) * 30, params, after_think=after))
    for token in offered[:150]:
        sampler.sample(torch.tensor([0, 1]), torch.eye(vocabulary)[[token, token]])
    thought, answer = sampler.take(0, 0), sampler.take(1, 0)
    assert answer.token_ids == offered[:150] and not answer.looped
    assert thought.looped == watched
    if watched:
        at = thought.forced.index(True)
        assert at == 1 + 5 + LEAST, "the first repetition counts from the thought's sixth token; the prompt does not"
        assert thought.token_ids[at : at + 3] == [30, closing, 31] and sum(thought.forced) == 3
        assert thought.thinking_tokens == at - 1 and thought.token_ids[at + 3 :] == offered[at + 3 : 150]
    else:
        assert thought.token_ids == offered[:150]


def test_only_the_thought_itself_is_compared() -> None:
    """A text that repeats what stood before the thought is no loop yet."""
    table, detector = torch.full((1, 400), 5), LoopDetector(1)
    row = torch.tensor([0])
    for place in range(200, 400):
        assert not detector.advance(row, table[:, place], table, torch.tensor([place]), torch.tensor([0]))
    detector.start(0)
    seen = [
        bool(detector.advance(row, table[:, 200 + n], table, torch.tensor([200 + n]), torch.tensor([n])))
        for n in range(LEAST + 2)
    ]
    assert seen.index(True) == LEAST
