"""Long-range retrieval: a note of random letters in real text, repeated later, and where the repeats' answers lie.

A note is a line ``@ E B I F A``, distinct letters in random order, once in a document and later again word for word.
From the second letter on, a repeat can be completed only from an earlier copy, by looking up what followed the same
letter there. Without text in between such documents teach copying; with much of it, and other seeds, they probe a long
context.
Not here: tokenisation, scoring. The letters are random, so a probe cannot be memorised. Imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from twofold.base.records import InputError
from twofold.tasks.families import LETTERS

MARK = "@"


class Answer(NamedTuple):
    """One repeated letter: ``text[span[0]:span[1]]`` is the letter with the space before it; ``distance`` is in
    characters back to the same letter in the copy before."""

    span: tuple[int, int]
    distance: int


def make_note_document(
    rng: random.Random, filler: Sequence[str], n_letters: int, gaps: Sequence[int]
) -> tuple[str, list[Answer]]:
    """Build one document: a note, then for each of ``gaps`` about that many characters of filler and the note again.

    Args:
        filler: real text lines (with or without line ends), used in a row from a random line on, cyclically; lines that
            look like notes are left out.
        n_letters: letters of the note, 2 to 10.

    Returns:
        The text and the answers in text order.

    Raises:
        InputError: counts out of range, or filler is asked for and there is none.
    """
    lines = [line.rstrip("\r\n") for line in filler if line.strip() and not line.lstrip().startswith(MARK)]
    if not 2 <= n_letters <= len(LETTERS):
        raise InputError(f"n_letters must be between 2 and {len(LETTERS)}, got {n_letters}")
    if not gaps or min(gaps) < 0:
        raise InputError(f"gaps must name at least one repeat, in characters from 0 up, got {list(gaps)}")
    if max(gaps) > 0 and not lines:
        raise InputError("the filler has no lines of text; give lines of real documents")
    note = MARK + "".join(f" {letter}" for letter in rng.sample(LETTERS, n_letters)) + "\n"
    text, answers = note, []
    place, latest = rng.randrange(max(1, len(lines))), 0
    for gap in gaps:
        target = len(text) + gap
        while len(text) < target:
            text += lines[place % len(lines)] + "\n"
            place += 1
        distance = len(text) - latest
        latest = len(text)
        text += note
        starts = range(latest + len(MARK) + 2, latest + len(note) - 1, 2)
        answers += [Answer((start, start + 2), distance) for start in starts]
    return text, answers
