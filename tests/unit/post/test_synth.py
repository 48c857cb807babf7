"""Synthetic data: one case for each filter, and what fusion examples train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from twofold.base.records import Completion, Request, SamplingParams
from twofold.engine.engine import Engine
from twofold.post import synth
from twofold.post.synth import FusionMaker, Response
from twofold.tasks.base import Item, Task, sample_items
from twofold.tasks.families import Direct, SumMod, default_families, signed_families
from twofold.tasks.query import (
    FLAG_PATTERNS,
    HELD_OUT_PATTERNS,
    SYSTEM_PATTERNS,
    TAUGHT_PATTERNS,
    flagged,
    single,
    user_turns,
)
from twofold.tasks.tools import Calc
from twofold.text.chat import Rendered, Renderer
from twofold.text.parse import parse
from twofold.text.tokenizer import Tokenizer

TASKS: dict[str, Task] = {task.name: task for task in default_families()}
ITEMS = sample_items([SumMod()], 12, 5, "train")
EASY = sample_items([Direct("max")], 12, 6, "train")
RESPONSES = [Response(item, item.traces[0], item.answer) for item in ITEMS]
GOOD = RESPONSES[0]


@pytest.mark.parametrize("task", [*default_families(), *signed_families("mixed"), *signed_families("beyond")], ids=repr)
def test_solver_traces_pass_every_filter(task: Task) -> None:
    for item in sample_items([task], 60, 2, "train"):
        for trace in item.traces:
            assert synth.reject_reason(Response(item, trace, item.answer), task) is None, trace
        trace = item.traces[0]
        assert len(trace.split()) >= synth._MIN_STEPS and synth._ALLOWED.fullmatch(trace)
        first = " " + trace.split()[0]
        reasons = {first: "guess", trace + "!": "mixed style", trace + ",": "contradiction"}
        for thought, reason in reasons.items():
            assert synth.reject_reason(Response(item, thought, item.answer), task) == reason, thought


@pytest.mark.parametrize("task", signed_families("mixed"), ids=repr)
def test_thoughts_about_mixed_signs_are_judged_like_any(task: Task) -> None:
    """Rejection sampling keeps right thoughts of these; their letters and both signs are no other style."""
    letters, signs = set(), set()
    for item in sample_items([task], 200, 3, "train"):
        (trace,) = item.traces
        assert {"+", "-"} <= set(trace)
        signs |= set(trace) & {"+", "-"}
        letters |= set("".join(trace.split())) - set("0123456789+-=;")
        steps = trace.split()
        again = " " + " ".join([steps[0]] * 3 + steps[1:])
        assert synth.reject_reason(Response(item, trace, item.answer), TASKS[task.name]) is None, trace
        assert synth.reject_reason(Response(item, again, item.answer), task) == "repetition"
        assert synth.reject_reason(Response(item, trace, item.answer.swapcase() + "x"), task) == "wrong answer"
    assert letters == set("ABCDEFGHIJklmnopqrst") and signs == {"+", "-"}


HELD_OUT = sample_items([SumMod()], 1, 0, "test")[0]
STEPS = GOOD.reasoning.split()


@pytest.mark.parametrize(
    ("reason", "response"),
    [
        ("held-out", Response(HELD_OUT, HELD_OUT.traces[0], HELD_OUT.answer)),
        ("wrong answer", Response(GOOD.item, GOOD.reasoning, str((int(GOOD.answer) + 1) % 10))),
        ("mixed style", Response(GOOD.item, "First we add: " + GOOD.reasoning, GOOD.answer)),
        ("guess", Response(GOOD.item, " " + STEPS[-1], GOOD.answer)),
        ("guess", Response(GOOD.item, "", GOOD.answer)),
        ("repetition", Response(GOOD.item, " " + " ".join([STEPS[0]] * 3 + STEPS), GOOD.answer)),
        (
            "contradiction",
            Response(GOOD.item, GOOD.reasoning + " A0+0=" + str((int(GOOD.answer) + 3) % 10), GOOD.answer),
        ),
    ],
)
def test_each_filter(reason: str, response: Response) -> None:
    assert synth.reject_reason(response, SumMod()) == reason


def test_filtering_counts_every_drop_by_reason() -> None:
    wrong = Response(GOOD.item, GOOD.reasoning, "x")
    kept, reasons = synth.filter_responses([GOOD, wrong, RESPONSES[1], wrong], TASKS)
    assert kept == [GOOD, RESPONSES[1]] and reasons == Counter({"wrong answer": 2})


def test_balance_keeps_the_first_of_each_family() -> None:
    assert synth.balance([*ITEMS, *EASY[:2]], 3) == [*ITEMS[:3], *EASY[:2]]


class Replies:
    """An engine that answers request i with texts[i], one text a sample."""

    def __init__(self, tokenizer: Tokenizer, texts: list[list[str]]) -> None:
        self.tokenizer, self.texts = tokenizer, texts

    def generate(self, requests: list[Request]) -> list[Completion]:
        out = []
        for index, request in enumerate(requests):
            for sample, text in zip(range(request.params.n), self.texts[index], strict=True):
                ids = self.tokenizer.encode_with_special(text)
                zeros = [0.0] * len(ids)
                reason: Any = "stop" if text.endswith("<|im_end|>") else "length"
                out.append(Completion(index, sample, ids, zeros, [False] * len(ids), zeros, reason))
        return out


def thinking(response: Response) -> str:
    return f"<think>\n{response.reasoning}\n</think>\n\n{response.answer}<|im_end|>"


def test_answered_directly_uses_the_document_format(renderer: Renderer) -> None:
    item, easy = ITEMS[0], EASY[0]
    replies = [[item.answer + "\nmore"], [" " + easy.answer], ["zz"], [easy.answer]]
    engine: Any = Replies(renderer.tokenizer, replies)
    known = synth.answered_directly(engine, renderer, [item, easy, item, easy], TASKS)
    assert known == [True, False, False, True]  # a leading space begins a trace, not an answer


def test_rejection_sampling_takes_at_most_one_response_an_item(renderer: Renderer) -> None:
    first, second, third = RESPONSES[:3]
    wrong = Response(second.item, second.reasoning, "x")
    texts = [
        [thinking(first), thinking(first)],
        [thinking(wrong), thinking(second)],
        ["<think>\n" + third.reasoning, third.answer + "<|im_end|>"],  # cut off; no thought at all
    ]
    engine: Any = Replies(renderer.tokenizer, texts)
    params = SamplingParams(n=2)
    kept, reasons = synth.rejection_sample(engine, renderer, ITEMS[:3], TASKS, params)
    assert kept == [first, second] and reasons == Counter({"malformed": 2, "wrong answer": 1})


def test_most_natural_keeps_the_likeliest_trace_of_each_item(
    renderer: Renderer, make_engine: Callable[..., Engine]
) -> None:
    responses = [Response(item, trace, item.answer) for item in ITEMS[:4] for trace in item.traces]
    engine = make_engine()
    one = synth.most_natural(engine, renderer, responses, 1)
    assert [r.item for r in one] == ITEMS[:4]
    assert sorted(map(str, synth.most_natural(engine, renderer, responses, 9))) == sorted(map(str, responses))
    assert set(map(str, one)) <= set(map(str, responses))


def test_learnable_queries_are_neither_hopeless_nor_mastered(renderer: Renderer) -> None:
    queries = [single(item, SumMod()) for item in ITEMS[:3]]
    right, wrong = [thinking(r) for r in RESPONSES[:3]], "<think>\n a\n</think>\n\nx<|im_end|>"
    engine: Any = Replies(renderer.tokenizer, [[right[0]] * 2, [right[1], wrong], [wrong] * 2])
    kept, rates = synth.learnable(engine, renderer, queries, SamplingParams(n=2), 0.1, 0.9)
    assert kept == [queries[1]] and rates == [1.0, 0.5, 0.0]


@pytest.fixture
def maker(renderer: Renderer) -> FusionMaker:
    return FusionMaker(renderer, TASKS, RESPONSES, seed=0)


def split(rendered: Rendered, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """Prompt ids (up to the first trained token) and the trained text; weights must be one closed block."""
    first = next(i for i, w in enumerate(rendered.weights) if w)
    assert set(rendered.weights[:first]) <= {0.0} and set(rendered.weights[first:]) == {1.0}
    return rendered.token_ids[:first], tokenizer.decode(rendered.token_ids[first:])


def test_fusion_leaves_system_flags_to_general_rl_and_some_patterns_to_nobody(maker: FusionMaker) -> None:
    assert set(maker.patterns) == set(FLAG_PATTERNS) - set(SYSTEM_PATTERNS) - set(HELD_OUT_PATTERNS)
    for pattern in maker.patterns:
        for rendered in maker.conversation(pattern, EASY):
            assert "<|im_start|>system" not in rendered.text
    assert maker.forms == Counter(dict.fromkeys(maker.patterns, 1))


SPELLED = ("u", "u u u u", "u- u u+", "u+ u- u u", "u-+ u+-")


@pytest.mark.parametrize("pattern", [name for name in TAUGHT_PATTERNS if name not in SYSTEM_PATTERNS] + [*SPELLED])
def test_the_last_flag_decides_how_the_reply_looks(pattern: str, maker: FusionMaker) -> None:
    items = [(item, SumMod()) for item in ITEMS[: user_turns(pattern)]]
    mode = flagged(items, pattern).mode
    for _ in range(5):
        (rendered,) = maker.conversation(pattern, EASY)
        prompt, reply = split(rendered, maker.renderer.tokenizer)
        asked = maker.renderer.tokenizer.decode(prompt)
        assert asked.endswith("<|im_start|>assistant\n") and reply.endswith("<|im_end|>")
        parsed = parse(maker.renderer.tokenizer, rendered.token_ids[len(prompt) :], prompt)
        assert parsed.closed and parsed.complete and not parsed.errors
        if mode == "no_think":
            assert reply.startswith("<think>\n\n</think>\n\n") and parsed.reasoning == ""
            item = next(p for p in EASY if p.prompt in asked)
            assert parsed.content == item.answer
        else:
            response = next(r for r in RESPONSES if r.reasoning == parsed.reasoning)
            assert response.item.prompt in asked and parsed.content == response.answer
        assert asked.count("<|im_start|>user") == user_turns(pattern)


def test_hard_switch_examples_have_the_block_in_the_prompt(maker: FusionMaker) -> None:
    prompts = set()
    for item in EASY:
        prompt, reply = split(maker.hard_switch(item), maker.renderer.tokenizer)
        text = maker.renderer.tokenizer.decode(prompt)
        assert text.endswith("assistant\n<think>\n\n</think>\n\n") and reply == item.answer + "<|im_end|>"
        prompts.add(" /think" in text)
    assert prompts == {True, False}


def test_a_cut_thought_trains_only_what_follows_the_stop_text(maker: FusionMaker) -> None:
    tokenizer, stop = maker.renderer.tokenizer, maker.renderer.stop_ids
    kept = set()
    for _ in range(30):
        response = maker.rng.choice(RESPONSES)
        rendered = maker.cut_thought(response)
        before, reply = split(rendered, tokenizer)
        assert before[-len(stop) :] == stop and reply == response.answer + "<|im_end|>"
        opening = tokenizer.encode_with_special("<think>\n")
        start = next(i for i in range(len(before)) if before[i : i + len(opening)] == opening) + len(opening)
        shown, whole = before[start : -len(stop)], tokenizer.encode(response.reasoning)
        assert shown == whole[: len(shown)] and len(shown) < len(whole)
        kept.add(len(shown))
    assert len(kept) > 3


@pytest.mark.parametrize("with_thought", [True, False])
def test_tool_use_trains_the_call_and_the_answer(with_thought: bool, maker: FusionMaker) -> None:
    item = Item("calc", "calc 37*48", "1776", (), "calc", {"expression": "37*48"})
    views = maker.tool_use(item, Calc(), with_thought)
    tokenizer = maker.renderer.tokenizer
    parts = [split(view, tokenizer) for view in views]
    replies = [parse(tokenizer, v.token_ids[len(p) :], p) for v, (p, _) in zip(views, parts, strict=True)]
    assert [r.errors for r in replies] == [(), ()] and len(replies) == 2
    assert Calc().execute(replies[0].tool_calls[0]) == "1776" == replies[1].content
    assert [bool(r.reasoning) for r in replies] == [with_thought] * 2
    assert "1776" not in parts[0][1] and "<tool_response>\n1776" in tokenizer.decode(parts[1][0])


def test_direct_answers_follow_an_empty_block_that_the_model_writes(maker: FusionMaker) -> None:
    prompt, reply = split(maker.direct(EASY[0], Direct("max")), maker.renderer.tokenizer)
    assert maker.renderer.tokenizer.decode(prompt).endswith(
        f"{EASY[0].prompt} /no_think<|im_end|>\n<|im_start|>assistant\n"
    )
    assert reply == f"<think>\n\n</think>\n\n{EASY[0].answer}<|im_end|>"


def test_forms_count_what_was_made(maker: FusionMaker) -> None:
    calc = Item("calc", "calc 37*48", "1776", (), "calc", {"expression": "37*48"})
    maker.conversation("/think", EASY)
    maker.conversation("three flags", EASY)
    maker.conversation("u- u u-", EASY)
    maker.hard_switch(EASY[0])
    maker.direct(EASY[0], Direct("max"))
    maker.document("x")
    maker.tool_use(calc, Calc(), thinking=True)
    maker.tool_use(calc, Calc(), thinking=False)
    cut = [maker.cut_thought(GOOD) for _ in range(20)]
    once = ("/think", "three flags", "random flags", "hard switch", "/no_think", "document")
    once += ("tool, /think", "tool, /no_think")
    thoughts = {name: maker.forms.pop(f"{name}, thought cut") for name in ("/think", "no flag")}
    assert maker.forms == Counter(dict.fromkeys(once, 1))
    assert sum(thoughts.values()) == len(cut) and min(thoughts.values()) > 0


def test_documents_are_trained_whole_and_without_markup(maker: FusionMaker) -> None:
    rendered = maker.document("sum mod 10: A1\n1")
    assert maker.renderer.tokenizer.decode(rendered.token_ids) == "sum mod 10: A1\n1<|endoftext|>"
    assert rendered.weights == [1.0] * len(rendered.token_ids)


def test_makers_with_one_seed_agree(renderer: Renderer) -> None:
    makers = [FusionMaker(renderer, TASKS, RESPONSES, seed) for seed in (1, 1, 2)]
    made = [[m.conversation(p, EASY)[0].token_ids for p in m.patterns] for m in makers]
    assert made[0] == made[1] != made[2]
