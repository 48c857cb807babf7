"""The thinking state machine through the sampler: budgets, ends, what is forced, what is counted."""

from __future__ import annotations

import pytest
import torch

from twofold.base.records import AnswerSampling, Completion, InputError, Request, SamplingParams
from twofold.engine.sampling import Sampler, ThinkTokens

EOS, OPEN, CLOSE = 0, 1, 2
THINK = ThinkTokens(OPEN, CLOSE, (8, CLOSE, 9))
VOCABULARY = 12


def logits_for(token: int) -> torch.Tensor:
    """Logits under which only this token is drawn."""
    return torch.full((1, VOCABULARY), -1e4).index_fill(1, torch.tensor([token]), 0.0)


def offered(wanted: list[int], params: SamplingParams, in_think: bool = False, after: bool = False) -> Completion:
    """Offer sampled tokens to one sample until it ends; other slots hold samples that do not move."""
    sampler = Sampler(3, THINK, (EOS,), VOCABULARY)
    for slot in (0, 2):
        sampler.start(slot, Request((5,), SamplingParams(thinking_budget=1)))
    sampler.start(1, Request((5, 6), params, in_think, after), sample_index=4, request_index=7)
    finished = False
    for token in wanted:
        if finished:
            break
        finished = bool(sampler.sample(torch.tensor([1]), logits_for(token)).finished_R)
    assert finished
    assert sampler.made.tolist()[::2] == [0, 0]
    return sampler.take(1, version=3)


@pytest.mark.parametrize(
    ("budget", "wanted", "recorded", "thought"),
    [
        (2, [OPEN, 5, 6, 7, 7, 7, 4, EOS], [OPEN, 5, 6, 8, CLOSE, 9, 4, EOS], 2),
        (0, [OPEN, 5, 5, 5, 4, EOS], [OPEN, 8, CLOSE, 9, 4, EOS], 0),
        (2, [OPEN, 5, CLOSE, 6, 6, 6, EOS], [OPEN, 5, CLOSE, 6, 6, 6, EOS], 1),
        (1, [5, 6, 7, EOS], [5, 6, 7, EOS], 0),
        (1, [CLOSE, 6, 7, EOS], [CLOSE, 6, 7, EOS], 0),
        (1, [OPEN, 5, 7, 7, 7, OPEN, 6, 6, EOS], [OPEN, 5, 8, CLOSE, 9, OPEN, 6, 6, EOS], 1),
        (None, [OPEN, *[5] * 12, CLOSE, EOS], [OPEN, *[5] * 12, CLOSE, EOS], 12),
    ],
)
def test_the_budget_state_machine(budget: int | None, wanted: list[int], recorded: list[int], thought: int) -> None:
    completion = offered(wanted, SamplingParams(max_tokens=20, thinking_budget=budget))
    assert completion.token_ids == recorded and completion.finish_reason == "stop"
    forced = [t for t, f in zip(completion.token_ids, completion.forced, strict=True) if f]
    assert forced in ([], list(THINK.stop_ids))
    assert completion.thinking_tokens == thought and completion.policy_version == 3
    assert (completion.request_index, completion.sample_index) == (7, 4) and not completion.looped


def test_a_prompt_that_ends_inside_a_block_or_after_it() -> None:
    for budget, wanted, recorded in ((0, [5, 5, 5, 4, EOS], [8, CLOSE, 9, 4, EOS]), (1, [5] * 4, [5, 8, CLOSE, 9])):
        params = SamplingParams(max_tokens=len(recorded), thinking_budget=budget)
        assert offered(wanted, params, in_think=True).token_ids == recorded
    params = SamplingParams(max_tokens=5, thinking_budget=0)
    assert offered([OPEN, 5, 5, 5, EOS], params, after=True).token_ids == [OPEN, 5, 5, 5, EOS]


def test_lengths_and_end_tokens() -> None:
    assert offered([5, 6, 7, 8], SamplingParams(max_tokens=3)).finish_reason == "length"
    assert offered([5, 6, EOS], SamplingParams(max_tokens=3)).finish_reason == "stop"
    assert offered([5, 6, 7, 6], SamplingParams(max_tokens=9, stop_token_ids=(7,))).token_ids == [5, 6, 7]
    ignoring = offered([5, EOS, 6, EOS, 7], SamplingParams(max_tokens=5, ignore_eos=True, stop_token_ids=(7,)))
    assert ignoring.token_ids == [5, EOS, 6, EOS, 7] and ignoring.finish_reason == "stop"
    assert offered([5, EOS], SamplingParams(max_tokens=2, ignore_eos=True)).finish_reason == "length"


def test_forced_stop_text_does_not_end_a_completion() -> None:
    sampler = Sampler(1, ThinkTokens(OPEN, CLOSE, (EOS, CLOSE)), (EOS, CLOSE), VOCABULARY)
    sampler.start(0, Request((5,), SamplingParams(max_tokens=3, thinking_budget=0), in_think=True))
    ends = [bool(sampler.sample(torch.tensor([0]), logits_for(5)).finished_R) for _ in range(3)]
    assert ends == [False, False, True] and sampler.take(0, 0).token_ids == [EOS, CLOSE, 5]
    sampler.start(0, Request((5,), SamplingParams(max_tokens=2, thinking_budget=0), in_think=True))
    for _ in range(2):
        sampler.sample(torch.tensor([0]), logits_for(5))
    assert sampler.take(0, 0).finish_reason == "length"


def test_answers_have_their_own_sampling_from_the_token_after_the_block() -> None:
    """Thoughts are greedy here, answers hot: which distribution drew a token shows in whether it varies."""
    logits = torch.zeros(1, VOCABULARY).index_fill(1, torch.tensor([5]), 0.5)
    hot = AnswerSampling(temperature=1.0, top_k=3)
    for budget, in_think, after, changes in ((2, True, False, 5), (None, False, False, 99), (None, False, True, 0)):
        drawn = []
        for seed in range(40):
            sampler = Sampler(1, THINK, (EOS,), VOCABULARY)
            params = SamplingParams(0.0, max_tokens=8, seed=seed, thinking_budget=budget, post_thinking=hot)
            sampler.start(0, Request((5,), params, in_think, after))
            tokens = [int(sampler.sample(torch.tensor([0]), logits.clone()).tokens_R) for _ in range(8)]
            drawn.append(tokens)
        for place, tokens in enumerate(zip(*drawn, strict=True)):
            assert len(set(tokens)) == (3 if place >= changes else 1), (budget, place)
        if budget == 2:
            assert drawn[0][:5] == [5, 5, 8, CLOSE, 9]


@pytest.mark.parametrize(
    "field",
    [{"thinking_budget": 4}, {"stop_loops": True}, {"post_thinking": AnswerSampling()}],
    ids=lambda f: next(iter(f)),
)
def test_thinking_controls_need_think_tokens(field: dict[str, object]) -> None:
    request = Request((5,), SamplingParams(**field))  # type: ignore[arg-type]
    Sampler(1, THINK, (EOS,), VOCABULARY).check(request)
    with pytest.raises(InputError, match=f"{next(iter(field))} needs a tokenizer with <think>"):
        Sampler(1, None, (EOS,), VOCABULARY).check(request)
