"""What fusion trains on: the sorts of examples, and the cues and flag patterns that are in none of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from twofold.base.split import held_out
from twofold.post.synth import FusionMaker, Response
from twofold.recipes.fusion import FusionConfig, _calls_for, _fusion_examples, _pattern
from twofold.recipes.post import families, hard_families
from twofold.tasks.base import Item, sample_items
from twofold.tasks.families import default_families, easy_families
from twofold.tasks.instruct import ORDERS, STYLES
from twofold.tasks.query import FLAG_PATTERNS, HELD_OUT_PATTERNS, SYSTEM_PATTERNS, TAUGHT_PATTERNS, Mode, turns_of
from twofold.text.chat import CHAT_TEMPLATE, STOP_TEXT, Rendered, Renderer
from twofold.text.tokenizer import Tokenizer
from twofold.train.loop import OptimConfig

CONFIG = FusionConfig(
    optim=OptimConfig(muon_lr=0.0, adam_lr=1e-3, warmup=1, decay="constant"), steps=1,
    think=120, no_think=120, hard_switch=20, cut_thoughts=30, tool_use=20, any_form=40, replay=40,
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """Examples of one seed, what the maker counted, and whole conversations as text."""

    examples: list[Rendered]
    forms: Counter[str]
    texts: list[str]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    items = sample_items(default_families(), 60, 0, "train")
    texts = [text for item in items for text in (item.prompt, *item.traces, item.answer)]
    return Renderer(Tokenizer.train([*texts, CHAT_TEMPLATE, "user assistant calc 0123456789"], 400))


def direct_items(seed: int) -> list[Item]:
    return sample_items(hard_families(), 20, seed, "train") + sample_items(easy_families(), 60, seed + 1, "train")


@pytest.fixture(scope="module", params=range(4))
def made(request: pytest.FixtureRequest, renderer: Renderer) -> Made:
    items = sample_items(default_families(), 80, request.param, "train")
    responses = [Response(item, item.traces[0], item.answer) for item in items]
    maker = FusionMaker(renderer, families(), responses, request.param)
    examples = _fusion_examples(maker, CONFIG, direct_items(request.param + 10))
    return Made(examples, maker.forms, [renderer.tokenizer.decode(example.token_ids) for example in examples])


def turns(text: str) -> list[tuple[str, str]]:
    """Role and content of every turn that is asked; tool results are the calculator's, not the user's."""
    found = re.findall(r"<\|im_start\|>(system|user)\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return [(role, content) for role, content in found if "<tool_response>" not in content]


def signature(text: str) -> tuple[str, ...]:
    """The flags of each turn in the notation of ``FLAG_PATTERNS``."""
    signs = {"think": "+", "no_think": "-"}
    return tuple(
        role[0] + "".join(signs[flag] for flag in re.findall(r"/(no_think|think)\b", content))
        for role, content in turns(text)
        if "<tools>" not in content
    )


def test_every_sort_of_example_is_there(made: Made) -> None:
    total = sum(made.forms.values())
    cut = sum(count for form, count in made.forms.items() if form.endswith("thought cut"))
    assert total == 120 + 120 + 20 + 30 + 20 + 40 + 40 and cut == 30
    assert made.forms["document"] == 40 and made.forms["hard switch"] == 20
    assert made.forms["tool, /think"] == made.forms["tool, /no_think"] == 10
    assert len(made.examples) == total + 20  # a tool query has two assistant turns


def test_held_out_patterns_are_in_no_example(made: Made) -> None:
    shown = {signature(text) for text in made.texts}
    assert not {FLAG_PATTERNS[pattern] for pattern in HELD_OUT_PATTERNS} & shown
    assert not {*HELD_OUT_PATTERNS} & set(made.forms)
    taught = {pattern for pattern in TAUGHT_PATTERNS if pattern not in SYSTEM_PATTERNS}
    assert taught <= set(made.forms) and {FLAG_PATTERNS[pattern] for pattern in taught} <= shown
    assert len(shown) > 25 and max(map(len, shown)) == 5  # random flags over up to four turns, and one of system


def test_two_thirds_of_the_patterns_are_random(made: Made) -> None:
    drawn = CONFIG.think // 2 + CONFIG.no_think * 2 // 3  # the rest has no flag, /think or /no_think
    assert 0.35 < made.forms["random flags"] / drawn < 0.67, made.forms  # some random ones have a name


@pytest.mark.parametrize("mode", ["think", "no_think"])
def test_patterns_call_for_the_mode_wanted_and_are_never_held_out(mode: Mode, renderer: Renderer) -> None:
    maker = FusionMaker(renderer, families(), [], 0)
    drawn = [_pattern(maker, mode) for _ in range(2000)]
    assert not {FLAG_PATTERNS[name] for name in HELD_OUT_PATTERNS} & set(map(turns_of, drawn))
    assert {_calls_for(pattern) for pattern in drawn} == {mode}
    named = Counter(pattern for pattern in drawn if pattern in FLAG_PATTERNS)
    assert set(named) == {name for name in maker.patterns if _calls_for(name) == mode}
    assert 600 < named.total() < 740 and {len(turns_of(pattern)) for pattern in drawn} == {1, 2, 3, 4, 5}


def test_thoughts_are_cut_in_top_alone(made: Made) -> None:
    """What a thought that was stopped knows is worth something there, wherever it stopped."""
    cut = [text for text in made.texts if STOP_TEXT in text]
    assert len(cut) == CONFIG.cut_thoughts and all("<|im_start|>user\ntop: " in text for text in cut)


def test_no_cue_names_a_form(made: Made) -> None:
    asked = [content for text in made.texts for _, content in turns(text)]
    documents = [text for text in made.texts if "<|im_start|>" not in text]
    cued = [text for text in asked + documents if re.search(r" style |\border [A-J]", text)]
    assert len(cued) == CONFIG.any_form + CONFIG.replay
    assert all(re.search(r"(style|:) [a-z]{4,8}( /no_think|\n|$)", text) for text in cued)
    words = {word for text in asked + documents for word in re.findall(r"[a-z]+", text)}
    assert not words & {*STYLES, *ORDERS}


def test_no_held_out_item_is_asked(made: Made, key_of: Callable[[str], str]) -> None:
    for text in made.texts:
        for role, content in turns(text):
            prompt = content.split(" /")[0].split(" style ")[0]
            if role == "user" and not prompt.startswith(("calc", "order")):  # their keys are not their prompts
                assert not held_out(key_of(prompt)), prompt


def test_nothing_with_both_signs_is_added_to_the_responses(made: Made) -> None:
    """The responses given here have one sign; in a run the policy's own thoughts on RL's queries may have both."""
    shown: Counter[bool] = Counter()
    for text in made.texts:
        for match in re.finditer(r"\b(?:run mod 10|least): ((?:[A-Za-z]\d+ ?)+)", text):
            (plus,) = {entry[0].isupper() for entry in match[1].split()}
            shown[plus] += 1
        for thought in re.findall(r"<think>\n(.*?)\n</think>", text, re.DOTALL):
            assert len(set(re.findall(r"\d([+-])\d=", thought))) <= 1, thought
    assert min(shown[True], shown[False]) > 10


def test_one_seed_gives_one_set_of_examples(renderer: Renderer) -> None:
    items = sample_items(default_families(), 40, 1, "train")
    responses = [Response(item, item.traces[0], item.answer) for item in items]
    made = [
        _fusion_examples(FusionMaker(renderer, families(), responses, seed), CONFIG, direct_items(3))
        for seed in (1, 1, 2)
    ]
    ids = [[example.token_ids for example in examples] for examples in made]
    assert ids[0] == ids[1] != ids[2]
