"""No leak through task text: no document has both signs, with steps or without, and no cue names a form."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from twofold.base.split import held_out
from twofold.data.tasktext import item_text, task_documents
from twofold.recipes.corpus import DataConfig, _copying, _notes, _task_texts
from twofold.recipes.pretrain import items_seed
from twofold.recipes.tiny import TinyConfig
from twofold.tasks.base import sample_items
from twofold.tasks.families import REACHES, Pick, Reach, Top, default_families, easy_families, signed_families
from twofold.tasks.gym import gym_families
from twofold.tasks.instruct import ORDERS, STYLES, asked_tasks, shown_tasks
from twofold.text.tokenizer import Tokenizer

COUNT = 2000


@pytest.fixture(scope="module", params=[True, False], ids=["curriculum", "all sizes"])
def texts(request: pytest.FixtureRequest) -> list[str]:
    return list(_task_texts(COUNT, 5, DataConfig(), curriculum=request.param))


SIGNED_PROMPT = re.compile(r"\b(run|least)\b[^:\n]*: (.*)")
STEP = re.compile(r"([A-Za-z])\d([+-])\d=\d")


def signs_asked(line: str) -> set[str]:
    """Signs of the entries if the line asks a `run` or `least` item anywhere, by the case of their letters."""
    found = SIGNED_PROMPT.search(line)
    return {"+" if letter.isupper() else "-" for letter in re.findall(r"\b([A-Za-z])\d", found[2])} if found else set()


def signs_stepped(text: str) -> set[str]:
    """Signs of all steps that a document shows, whatever it asks."""
    return {sign for _, sign in STEP.findall(text)}


def leaks(text: str) -> bool:
    """Whether a document shows an item with both signs, or steps with both."""
    return len(signs_stepped(text)) > 1 or any(len(signs_asked(line)) > 1 for line in text.split("\n"))


@pytest.mark.parametrize("reach", ["mixed", "beyond"])
def test_the_search_for_leaks_finds_them(reach: Reach) -> None:
    for item in sample_items(signed_families(reach), 200, 0, "train"):
        assert leaks(item_text(item, None)) and leaks(item_text(item, item.traces[0]))
        assert leaks(item.traces[0])
        assert leaks(f"order A: {item.prompt} style any\n{item.answer}")
    assert not any(leaks(item_text(item, item.traces[0])) for item in sample_items(default_families(), 400, 0, "train"))


def test_no_document_shows_both_signs(texts: list[str]) -> None:
    assert not [text for text in texts if leaks(text)]


def test_no_other_document_asks_for_signed_items() -> None:
    others = [*_copying(400, "copying:5"), *_notes(["a line of text"] * 20, 50, 450, "short:5")]
    others += task_documents(shown_tasks(easy_families()), 400, 5, 0.0, curriculum=False)
    assert not [text for text in others if leaks(text) or SIGNED_PROMPT.search(text)]


def test_the_gym_asks_for_no_signed_items() -> None:
    pytest.importorskip("reasoning_gym")
    for text in task_documents(gym_families(), 60, 5, 0.0, curriculum=False):
        assert not re.search(r"^(run mod 10|least): ", text, re.MULTILINE) and not signs_stepped(text), text


def test_either_sign_is_shown_at_every_size_with_steps_and_without(texts: list[str]) -> None:
    """Both parts are known well; only their combination is not."""
    names = {text.split()[0].rstrip(":") for text in texts}
    assert {"run", "least"} == set(REACHES["pure"]) <= names
    shown: Counter[tuple[str, str, bool, int]] = Counter()
    for text in texts:
        prompt, *rest = text.split("\n")
        if (name := prompt.split()[0].rstrip(":")) in REACHES["pure"]:
            (sign,), thought = signs_asked(prompt), len(rest) > 1
            assert signs_stepped(text) == ({sign} if thought else set()), text
            assert not {"+": re.search(r"\b[k-t]\d", prompt), "-": re.search(r"\b[A-J]\d", prompt)}[sign], text
            shown[name, sign, thought, len(prompt.split(": ")[1].split())] += 1
    for name, (low, high) in REACHES["pure"].items():
        with_steps = {
            sign: Counter({k[3]: n for k, n in shown.items() if k[:3] == (name, sign, True)}) for sign in "+-"
        }
        for sizes in with_steps.values():
            assert set(sizes) == set(range(low, high + 1)) and sizes.total() > 60, (name, sizes)
        plus, minus = (with_steps[sign].total() for sign in "+-")
        assert 0.7 < plus / minus < 1.4, (name, plus, minus)
        assert all(any(k[:3] == (name, sign, False) for k in shown) for sign in "+-")


def test_only_run_and_least_have_small_letters_and_differences(texts: list[str]) -> None:
    """`top` and `sum` add alone, so nothing but pure items says what a small letter stands for."""
    others = [text for text in texts if text.split()[0].rstrip(":") not in REACHES["pure"]]
    assert any(text.startswith("top: ") for text in others)
    for text in others:
        assert "-" not in signs_stepped(text) and not re.search(r"\b[k-t]\d", text), text


def test_thoughts_of_top_cost_tokens_by_the_number_of_entries_alone() -> None:
    """Where a budget stops one then says nothing of the answer."""
    texts = list(_task_texts(4000, 7, DataConfig(), curriculum=False))
    tokenizer, costs = Tokenizer.train(texts, DataConfig().vocab_size), defaultdict[int, set[int]](set)
    for item in sample_items([Top()], 600, 0, "train"):
        costs[item.meta["n"]].add(len(tokenizer.encode(item.traces[0])))
    assert set(costs) == {4, 5, 6} and all(len(found) == 1 for found in costs.values()), costs
    assert len(set.union(*costs.values())) == 3


def test_no_cue_names_a_form(texts: list[str]) -> None:
    words = {word for text in texts for word in re.findall(r"[a-z]+", text)}
    assert not words & {*STYLES, *ORDERS}
    cues = {text.split("\n")[0].split()[-1] for text in texts if re.search(r" style |^order ", text)}
    assert len(cues) > 50 and all(re.fullmatch("[a-z]{4,8}", cue) for cue in cues)  # made up, one each
    names = {task.name for task in asked_tasks(easy_families())}
    assert not any(name in text for name in names for text in texts)


def test_every_form_is_shown_in_equal_shares() -> None:
    texts = list(_task_texts(6000, 6, DataConfig(shown_share=1.0, easy_share=0.0, lookup_share=0.0), curriculum=True))
    replies = [text.split("\n")[1] for text in texts if " style " in text]
    shown = Counter(re.sub(r"\d", "0", reply) for reply in replies)
    assert set(shown) == {style.format(0) for style in STYLES.values()}
    even = len(replies) / len(STYLES)
    assert len(replies) == 3000 and all(abs(count - even) < 0.15 * even for count in shown.values()), shown


def test_which_families_are_shown_and_how_often_with_steps(texts: list[str]) -> None:
    names = Counter(text.split()[0].rstrip(":") for text in texts if " style " not in text and text[:5] != "order")
    assert set(names) == {task.name for task in [*default_families(), Pick()]}
    steps = {task.name for task in default_families() if task.step_by_step}
    hard = [text for text in texts if text.split()[0].rstrip(":") in steps]
    assert sum("\n\n" in text for text in hard) / len(hard) == pytest.approx(DataConfig().think_share, abs=0.03)
    for name in ("swap", "run", "least"):
        assert names[name] / names["sum"] == pytest.approx(2, rel=0.35)


def test_the_recipe_asks_for_no_more_held_out_items_than_there_are() -> None:
    """The data stage keeps 400 out of text, every measurement wants as many of a family as its settings say."""
    sample_items(default_families(), 400, 0, "test")
    battery = TinyConfig().measure
    for seed in range(3):
        for tasks, wanted in (
            (default_families(), battery.items_per_family),
            (signed_families("mixed"), battery.mixed_items),
            (signed_families("beyond"), battery.items_per_family),
        ):
            items = sample_items(tasks, wanted * len(tasks), items_seed(seed), "test")
            assert Counter(item.family for item in items) == {task.name: wanted for task in tasks}
            assert len({(item.family, item.key) for item in items}) == len(items)
            assert all(held_out(item.key) for item in items)
