"""The data card adds up and identifies the data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from twofold.base.records import InputError
from twofold.data.card import CardEntry, data_card
from twofold.data.dedup import Dropped

TEXT = CardEntry(
    "stdlib",
    "PSF-2.0",
    documents=10,
    tokens=400,
    bytes=1000,
    share=0.7,
    held_out=2,
    dropped=(Dropped("a", "exact-duplicate: b"), Dropped("c", "near-duplicate: b"), Dropped("d", "near-duplicate: e")),
    sha256="ab" * 32,
)
TASKS = CardEntry("tasks", "CC0-1.0", documents=5, tokens=0, bytes=0, share=0.3)


def test_card() -> None:
    card = data_card([TEXT, TASKS])
    assert card["totals"] == {
        "documents": 15,
        "tokens": 400,
        "bytes": 1000,
        "held_out": 2,
        "dropped": {"exact-duplicate": 1, "near-duplicate": 2},
    }
    assert card["licences"] == ["CC0-1.0", "PSF-2.0"]
    first, second = card["sources"]
    assert first["dropped"] == {"exact-duplicate": 1, "near-duplicate": 2} and first["bytes_per_token"] == 2.5
    assert second["bytes_per_token"] is None and second["dropped"] == {}
    assert json.loads(json.dumps(card)) == card


def test_hash_changes_with_the_data() -> None:
    assert data_card([TEXT])["hash"] == data_card([TEXT])["hash"]
    assert data_card([TEXT])["hash"] != data_card([replace(TEXT, sha256="cd" * 32)])["hash"]


def test_errors() -> None:
    with pytest.raises(InputError, match="at least one"):
        data_card([])
    with pytest.raises(InputError, match="distinct"):
        data_card([TEXT, TEXT])
