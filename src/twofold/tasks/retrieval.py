"""Long-range retrieval: a text with planted facts that are repeated later, and where each repeat's answer lies.

A fact is a line ``@ K7``: a letter that is unique in the document and a random digit; the same line again, much
later, can be completed only from the earlier one. The texts train long context and, with other seeds, probe it.
Not here: tokenisation, scoring. The digits are random, so a probe cannot be memorised. Imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from twofold.base.records import InputError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_FACTS = len(LETTERS)
MAX_REPEATS = 3


class Answer(NamedTuple):
    """One repeated fact: ``text[span[0]:span[1]]`` is the digit; ``distance`` is in characters back to the same digit
    in the nearest earlier occurrence of the line."""

    span: tuple[int, int]
    distance: int


def make_retrieval_document(
    rng: random.Random, filler: Sequence[str], target_chars: int, n_facts: int, n_questions: int
) -> tuple[str, list[Answer]]:
    """Build one document of about ``target_chars`` characters.

    Args:
        filler: real text lines (with or without line ends); a run from a random line on is used, cyclically.
        n_facts: facts planted, at most 26.
        n_questions: repeats in all, at most 3 a fact, each with filler between it and the planted fact. The
            document ends with one.

    Returns:
        The text and the answers in text order.

    Raises:
        InputError: counts out of range, no usable filler, or a text too short for the lines asked for.
    """
    lines = [line.rstrip("\r\n") for line in filler if not line.lstrip().startswith("@ ")]
    if not any(line.strip() for line in lines):
        raise InputError("the filler has no lines of text; give lines of real documents")
    if not 1 <= n_facts <= MAX_FACTS:
        raise InputError(f"n_facts must be between 1 and {MAX_FACTS}, got {n_facts}")
    if not 1 <= n_questions <= MAX_REPEATS * n_facts:
        raise InputError(f"n_questions must be between 1 and {MAX_REPEATS * n_facts}, got {n_questions}")
    fact_length = len("@ K7\n")
    room = target_chars - (n_facts + n_questions) * fact_length
    if room < 0:
        raise InputError(f"{target_chars} characters are too few for {n_facts} facts and {n_questions} questions")
    body = _filler_run(rng, lines, room)
    gaps: list[list[int]] = [[] for _ in range(len(body) + 1)]
    facts = [f"@ {key}{rng.randrange(10)}\n" for key in rng.sample(LETTERS, n_facts)]
    asked = _allot_questions(rng, n_facts, n_questions)
    last = rng.choice([fact for fact in range(n_facts) if asked[fact]])
    for fact in range(n_facts):
        planted = rng.randrange(len(body))
        gaps[planted].append(fact)
        for _ in range(asked[fact] - (fact == last)):
            gaps[rng.randint(planted + 1, len(body))].append(fact)
    for gap in gaps:
        rng.shuffle(gap)
    gaps[-1].append(last)
    return _write(body, gaps, facts)


def _filler_run(rng: random.Random, lines: list[str], room: int) -> list[str]:
    start, used = rng.randrange(len(lines)), 0
    body: list[str] = []
    while not body or used + len(lines[(start + len(body)) % len(lines)]) + 1 <= room:
        line = lines[(start + len(body)) % len(lines)] + "\n"
        body.append(line)
        used += len(line)
    return body


def _allot_questions(rng: random.Random, n_facts: int, n_questions: int) -> list[int]:
    """Repeats of each fact: spread evenly first, then at random, at most MAX_REPEATS each."""
    asked = [0] * n_facts
    for fact in rng.sample(range(n_facts), min(n_facts, n_questions)):
        asked[fact] = 1
    for _ in range(n_questions - n_facts):
        asked[rng.choice([fact for fact in range(n_facts) if asked[fact] < MAX_REPEATS])] += 1
    return asked


def _write(body: list[str], gaps: list[list[int]], facts: list[str]) -> tuple[str, list[Answer]]:
    pieces: list[str] = []
    answers: list[Answer] = []
    latest: dict[int, int] = {}  # fact -> place of its digit
    length = 0
    for number, gap in enumerate(gaps):
        for fact in gap:
            digit = length + len(facts[fact]) - 2
            if fact in latest:
                answers.append(Answer((digit, digit + 1), digit - latest[fact]))
            latest[fact] = digit
            pieces.append(facts[fact])
            length += len(facts[fact])
        if number < len(body):
            pieces.append(body[number])
            length += len(body[number])
    return "".join(pieces), answers
