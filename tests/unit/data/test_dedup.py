"""De-duplication and decontamination, each drop with its reason."""

from __future__ import annotations

import random

import pytest

from twofold.base.records import InputError
from twofold.data.corpus import Document
from twofold.data.dedup import Dropped, decontaminate, deduplicate, word_runs
from twofold.tasks.base import canonical_key, sample_items
from twofold.tasks.families import default_families

RNG = random.Random(0)
WORDS = [f"word{i}" for i in range(3000)]


def words(count: int) -> list[str]:
    return RNG.choices(WORDS, k=count)


def doc(name: str, text: str) -> Document:
    return Document(name, text, "test", "CC0-1.0")


def test_exact_copies_go_whatever_their_case_and_space() -> None:
    kept, dropped = deduplicate([doc("a", "Some  text here"), doc("b", "some text\nhere"), doc("c", "other")])
    assert [d.id for d in kept] == ["a", "c"]
    assert dropped == [Dropped("b", "exact-duplicate: a")]


def test_near_copies_go_and_related_texts_stay() -> None:
    base = words(400)
    near, related = list(base), list(base)
    near[200] = "changed"  # 5 of ~396 shingles differ
    related[0::25] = words(16)  # a fifth of the shingles differ: similarity about 0.66
    others = [doc(f"o{i}", " ".join(words(300))) for i in range(30)]
    documents = [doc("base", " ".join(base)), *others, doc("near", " ".join(near)), doc("related", " ".join(related))]
    kept, dropped = deduplicate(documents)
    assert dropped == [Dropped("near", "near-duplicate: base")]
    assert [d.id for d in kept] == [d.id for d in documents if d.id != "near"]
    assert deduplicate(documents) == (kept, dropped)
    assert [d.id for d in deduplicate(documents, threshold=0.6)[1]] == ["near", "related"]


def test_nothing_is_lost_without_a_reason() -> None:
    pool = [" ".join(words(30)) for _ in range(20)]
    documents = [doc(str(i), RNG.choice(pool)) for i in range(60)] + [doc("empty", ""), doc("empty2", " ")]
    kept, dropped = deduplicate(documents)
    assert sorted([d.id for d in kept] + [d.id for d in dropped]) == sorted(d.id for d in documents)
    assert len({d.text for d in kept}) == len(kept)


def test_overlap_with_held_out_text_is_dropped() -> None:
    secret = words(100)
    twelve, thirteen = words(50) + secret[20:32] + words(50), words(50) + secret[20:33] + words(50)
    train = [doc("clean", " ".join(words(100))), doc("12", " ".join(twelve)), doc("13", ", ".join(thirteen).upper())]
    kept, dropped = decontaminate(train, [doc("held", " ".join(secret)), doc("tiny", "word1 word2")])
    assert [d.id for d in kept] == ["clean", "12"]
    assert dropped == [Dropped("13", "held-out-overlap: 1 of 101 13-word runs")]
    assert decontaminate(train, [doc("held", " ".join(secret))], max_share=0.05)[1] == []
    assert decontaminate(train, [])[1] == []


def test_held_out_prompts_are_found_under_other_letters() -> None:
    item = sample_items(default_families(), 1, seed=0, split="test")[0]
    renamed = item.prompt.translate(str.maketrans("ABCDEFGHIJ", "BCDEFGHIJA"))
    train = [doc("a", f"A text.\n  {renamed} \nand more"), doc("b", "A text without it")]
    kept, dropped = decontaminate(train, [], held_out_keys={item.key}, line_key=canonical_key)
    assert [d.id for d in kept] == ["b"] and dropped[0].reason == f"held-out-prompt: {renamed}"


def test_word_runs_match_python_sets() -> None:
    text = words(200) * 2
    assert len(word_runs(" ".join(text), 5)) == len({tuple(text[i : i + 5]) for i in range(len(text) - 4)})
    assert len(word_runs("a b", 5)) == 1 and word_runs("a b", 5) != word_runs("b a", 5)
    assert len(word_runs("", 5)) == 1


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="threshold"):
        deduplicate([], threshold=0.5)
    with pytest.raises(InputError, match="ngram"):
        decontaminate([], [], ngram=0)
