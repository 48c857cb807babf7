"""The tiny recipe's data stage: real text and task text, cleaned, split, tokenised and sharded.

Everything comes from the running interpreter and from generators, so it is there without a network. The split is by
hash, and held-out prompts, near-copies and overlaps are removed from training text with a reason on record.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twofold.base.config import Config
from twofold.base.files import write_json, write_jsonl
from twofold.data import corpus, dedup
from twofold.data.card import CardEntry, data_card
from twofold.data.shards import Shard, write_shard
from twofold.data.tasktext import task_documents
from twofold.eval.language import ProbeDocument
from twofold.recipes.chain import StageContext
from twofold.tasks.base import Task, canonical_key, sample_items
from twofold.tasks.families import (
    LETTERS,
    Least,
    Pick,
    Run,
    Swap,
    default_families,
    easy_families,
)
from twofold.tasks.gym import gym_families
from twofold.tasks.instruct import shown_tasks
from twofold.tasks.retrieval import MARK, Answer, make_note_document
from twofold.tasks.tools import CALC_TOOL
from twofold.text.chat import CHAT_TEMPLATE, STOP_TEXT
from twofold.text.tokenizer import Tokenizer

_PASSAGE_LINES = 400  # real lines that a retrieval document is drawn from


class DataConfig(Config):
    """Sizes of the data stage, in documents unless named otherwise."""

    vocab_size: int = 1024
    general_tasks: int = 8000
    reasoning_tasks: int = 56000
    easy_share: float = 0.15
    lookup_share: float = 0.08
    easy_think_share: float = 0.3
    shown_share: float = 0.06
    gym_documents: int = 3000
    copying_documents: int = 12000
    short_notes: int = 3000
    short_gap: int = 450
    long_notes: int = 300
    long_gap: int = 2400
    probe_documents: int = 150
    probe_letters: int = 6
    think_share: float = 0.9
    tokenizer_chars: int = 3000


def build_data(context: StageContext) -> None:
    """Write tokenizer, shards, probes and the data card into the stage's artefact."""
    config: DataConfig = context.config
    context.progress.start(5, "part")
    train, held_out, dropped = _text_documents(context.seed)
    context.progress.update(1)
    general = list(_task_texts(config.general_tasks, context.seed, config, curriculum=True))
    reasoning = list(_task_texts(config.reasoning_tasks, context.seed + 1, config, curriculum=True))
    gym = list(task_documents(gym_families(), config.gym_documents, context.seed + 2, 0.0, curriculum=False))
    context.progress.update(2)
    tokenizer = _train_tokenizer(train, general, config)
    tokenizer.save(context.out / "tokenizer", CHAT_TEMPLATE)
    context.progress.update(3)
    filler = [line for document in train for line in document.text.splitlines()]
    texts = {
        "text": [document.text for document in train],
        "held_out": [document.text for document in held_out],
        "tasks_general": general,
        "tasks_reasoning": reasoning,
        "gym": gym,
        "copying": _copying(config.copying_documents, f"copying:{context.seed}"),
        "notes_short": _notes(filler, config.short_notes, config.short_gap, f"short:{context.seed}", ramp=True),
        "notes_long": _notes(filler, config.long_notes, config.long_gap, f"long:{context.seed}"),
    }
    shards = {name: _write(context.out / name, tokenizer, rows) for name, rows in texts.items()}
    context.progress.update(4)
    held_filler = [line for document in held_out for line in document.text.splitlines()]
    write_jsonl(context.out / "probes.jsonl", _probes(tokenizer, held_filler, config, context.seed))
    write_jsonl(context.out / "dropped.jsonl", [d._asdict() for d in dropped])
    write_json(context.out / "card.json", _card(shards, texts, dropped))
    context.progress.finish()


def _text_documents(seed: int) -> tuple[list[corpus.Document], list[corpus.Document], list[dedup.Dropped]]:
    sources = corpus.python_stdlib_documents()
    documents = [*sources, *corpus.docstring_documents(sources), *corpus.pydoc_topic_documents()]
    train, held_out = corpus.split_documents(documents, str(seed))
    train, duplicates = dedup.deduplicate(train)
    keys = {item.key for item in sample_items(default_families(), 400, seed, "test")}
    train, leaks = dedup.decontaminate(train, held_out, keys, canonical_key, max_share=0.1)
    return train, held_out, [*duplicates, *leaks]


def _task_texts(count: int, seed: int, config: DataConfig, curriculum: bool) -> Iterable[str]:
    """Items of the pure reach: those that need steps mostly with them, easy ones mostly without, and some whose reply
    may have any form."""
    hard = [task for task in default_families() if task.step_by_step]
    hard += [Swap(), Run(), Least()]  # twice as often as the others: they are learnt last
    easy = easy_families()
    lookup: list[Task] = [Pick()]
    shown = shown_tasks(easy)
    rng = random.Random(f"mix:{seed}")
    kinds = {
        "hard": task_documents(hard, count, seed, config.think_share, curriculum),
        "easy": task_documents(easy, count, seed + 1, config.easy_think_share, curriculum),
        "lookup": task_documents(lookup, count, seed + 3, 1.0, curriculum),
        "shown": task_documents(shown, count, seed + 2, 0.0, curriculum=False),
    }
    rest = 1 - config.easy_share - config.lookup_share - config.shown_share
    weights = [rest, config.easy_share, config.lookup_share, config.shown_share]
    for _ in range(count):
        yield next(kinds[rng.choices(list(kinds), weights)[0]])


def _train_tokenizer(train: Sequence[corpus.Document], tasks: Sequence[str], config: DataConfig) -> Tokenizer:
    """Text, task text and the fixed strings of the chat format, so that those are short."""
    fixed = [STOP_TEXT, "user\n", "assistant\n", "system\n", " /think", " /no_think", str(CALC_TOOL).replace("'", '"')]
    fixed += [piece for piece in CHAT_TEMPLATE.split("'") if len(piece) > 60]
    pieces = [document.text[: config.tokenizer_chars] for document in train]
    return Tokenizer.train([*pieces, *tasks[:4000], *(fixed * 400)], config.vocab_size)


def _notes(filler: Sequence[str], count: int, longest_gap: int, seed: str, ramp: bool = False) -> list[str]:
    """Documents of one note, repeated up to three times after at most ``longest_gap`` characters of text in all.

    With ``ramp`` the gaps grow from nothing over the first half, in order: near repeats are learnt first.
    """
    rng = random.Random(seed)
    texts = []
    for number in range(count):
        level = min(1.0, 2 * number / count) if ramp else 1.0
        repeats = rng.randint(1, 3)
        gaps = [round(level * rng.random() * longest_gap / repeats) for _ in range(repeats)]
        texts.append(make_note_document(rng, _passage(rng, filler), rng.randint(4, len(LETTERS)), gaps)[0])
    return texts


def _copying(count: int, seed: str) -> list[str]:
    """Notes repeated at once; in every fourth document a run of digits takes the letters' place."""
    rng = random.Random(seed)
    notes = _notes([], count, 0, seed)
    for number in range(0, count, 4):
        digits = "".join(rng.sample("0123456789", rng.randint(3, 8)))
        notes[number] = f"{MARK} {digits}\n" * rng.randint(2, 4)
    return notes


def _passage(rng: random.Random, filler: Sequence[str]) -> Sequence[str]:
    start = rng.randrange(max(1, len(filler) - _PASSAGE_LINES))
    return filler[start : start + _PASSAGE_LINES]


def _probes(tokenizer: Tokenizer, filler: Sequence[str], config: DataConfig, seed: int) -> list[dict[str, Any]]:
    """Held-out text with a note and one repeat after a third to the whole of the long gap.

    Only the second letter of the repeat is asked for: one question a document, so that questions are independent, and
    the one for which elimination helps least (chance is 1 in 9).
    """
    rng = random.Random(f"probe:{seed}")
    made = []
    for _ in range(config.probe_documents):
        gap = round(config.long_gap * rng.uniform(1 / 3, 1.0))
        text, answers = make_note_document(rng, _passage(rng, filler), config.probe_letters, [gap])
        made.append(_probe(tokenizer, text, answers[:1]))
    return made


def _probe(tokenizer: Tokenizer, text: str, answers: Sequence[Answer]) -> dict[str, Any]:
    ids, starts = tokenizer.encode_with_offsets(text)
    place_of = {start: place for place, start in enumerate(starts)}
    places, distances = [], []
    for answer in answers:
        place = place_of[answer.span[0]]
        places.append(place)
        distances.append(place - place_of[answer.span[0] - answer.distance])
    return asdict(ProbeDocument(ids, places, distances))


def _write(folder: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> Shard:
    ids = [[*tokens, tokenizer.endoftext] for tokens in tokenizer.encode_batch(texts)]
    size = sum(len(text.encode()) for text in texts)
    write_shard(folder, ids, {"documents": len(texts)}, vocab_size=tokenizer.vocab_size, text_bytes=size)
    return Shard.open(folder)


def _card(shards: dict[str, Shard], texts: dict[str, list[str]], dropped: list[dedup.Dropped]) -> dict:
    licences = {name: corpus.LICENCE for name in ("text", "held_out", "notes_short", "notes_long")} | {
        "gym": "Apache-2.0"
    }
    entries = [
        CardEntry(
            name=name,
            licence=licences.get(name, "CC0-1.0"),
            documents=len(shard),
            tokens=shard.num_tokens,
            bytes=sum(len(text.encode()) for text in texts[name]),
            share=0.0,
            held_out=len(texts["held_out"]) if name == "text" else 0,
            dropped=tuple(dropped) if name == "text" else (),
            sha256=shard.sha256,
        )
        for name, shard in shards.items()
    ]
    return data_card(entries)
