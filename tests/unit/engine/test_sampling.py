"""The sampler against a plain reference, token by token: everything that shapes the logits, seeds, slots, records."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError, Request, SamplingParams
from twofold.engine.sampling import Sampler, ThinkTokens
from twofold.ops import reference
from twofold.ops.sample import counter_uniform

EOS = (0, 1)
VOCABULARY, PADDED = 30, 37
THINK = ThinkTokens(2, 3, (4, 3))


def random_params(rng: random.Random) -> SamplingParams:
    """Every field that changes what is drawn is on in some and off in most."""
    fields: dict[str, Any] = {"seed": rng.randrange(1000), "max_tokens": rng.randrange(1, 25)}
    choices: dict[str, list[Any]] = {
        "temperature": [0.0, 0.5, 1.0, 1.5],
        "top_k": [0, 0, 1, 4, 20],
        "top_p": [1.0, 1.0, 0.9, 0.4],
        "min_p": [0.0, 0.0, 0.1],
        "presence_penalty": [0.0, 0.0, 1.5, -1.0],
        "frequency_penalty": [0.0, 0.0, 0.7, -0.3],
        "repetition_penalty": [1.0, 1.0, 1.3, 0.7],
        "logit_bias": [(), (), ((5, 100.0),), ((0, -100.0), (7, 2.0), (29, 3.5))],
        "min_tokens": [0, 0, 5],
        "stop_token_ids": [(), (), (9, 11)],
        "ignore_eos": [False, False, True],
    }
    fields |= {name: rng.choice(values) for name, values in choices.items()}
    fields["min_tokens"] = min(fields["min_tokens"], fields["max_tokens"])
    return SamplingParams(**fields)


def plain_logits(logits: list[float], request: Request, made: list[int]) -> list[float]:
    """What the next token is drawn from, by the definitions, in plain Python."""
    params, out = request.params, list(logits)
    for token, bias in params.logit_bias:
        out[token] += bias
    for token in {*request.prompt_ids, *made}:
        if token < VOCABULARY and params.repetition_penalty != 1:
            out[token] *= 1 / params.repetition_penalty if out[token] > 0 else params.repetition_penalty
    for token in set(made):
        out[token] -= params.presence_penalty + params.frequency_penalty * made.count(token)
    if len(made) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else EOS)):
            out[token] = -float("inf")
    return out[:VOCABULARY]


def plain_sample(request: Request, sample_index: int, steps: list[torch.Tensor]) -> list[int]:
    """A whole sample, one token at a time."""
    params, made = request.params, list[int]()
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
    while len(made) < params.max_tokens and not (made and made[-1] in ends):
        logits = torch.tensor([plain_logits(steps[len(made)].tolist(), request, made)])
        uniform = counter_uniform(torch.tensor([params.seed + sample_index]), torch.tensor([len(made)]))
        filters = torch.tensor([params.top_k]), torch.tensor([params.top_p]), torch.tensor([params.min_p])
        temperature = torch.tensor([params.temperature])
        made.append(int(reference.sample_filtered(logits, temperature, *filters, uniform)))
    return made


def run(sampler: Sampler, steps: dict[int, list[torch.Tensor]], rng: random.Random) -> None:
    """Step random subsets of the slots, in random order, until every sample has ended."""
    left = set(steps)
    while left:
        slots = rng.sample(sorted(left), rng.randint(1, len(left)))
        logits = torch.stack([steps[slot][int(sampler.made[slot])] for slot in slots])
        sampled = sampler.sample(torch.tensor(slots), logits)
        left -= {slot for slot, ended in zip(slots, sampled.finished_R.tolist(), strict=True) if ended}


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_samples_equal_a_plain_reference_whatever_runs_beside_them(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sampler = Sampler(6, THINK if seed % 2 else None, EOS, VOCABULARY)
    requests = {}
    for slot in rng.sample(range(6), rng.randint(1, 6)):
        prompt = tuple(rng.choices(range(5, PADDED), k=rng.randint(1, 12)))
        requests[slot] = Request(prompt, random_params(rng), after_think=True)
        sampler.check(requests[slot])
        sampler.start(slot, requests[slot], slot)
    steps = {slot: list(2.5 * torch.randn(25, PADDED, generator=generator)) for slot in requests}
    run(sampler, steps, rng)
    for slot, request in requests.items():
        completion = sampler.take(slot, 0)
        assert completion.token_ids == plain_sample(request, slot, steps[slot])
        raw = torch.stack(steps[slot][: len(completion.token_ids)])
        scores = reference.token_logprobs(raw, torch.tensor(completion.token_ids))
        torch.testing.assert_close(torch.tensor(completion.logprobs), scores)
        torch.testing.assert_close(torch.tensor(completion.entropies), reference.entropy(raw))


def test_greedy_with_penalties_never_repeats_what_is_penalised_enough() -> None:
    sampler = Sampler(1, None, EOS, VOCABULARY)
    logits = torch.linspace(3, 0, VOCABULARY)
    params = SamplingParams(0.0, max_tokens=20, presence_penalty=2.0, logit_bias=((0, -100.0), (1, -100.0)))
    sampler.start(0, Request((5,), params))
    run(sampler, {0: [logits] * 20}, random.Random(0))
    tokens = sampler.take(0, 0).token_ids
    assert tokens[:6] == [2, 3, 4, 5, 6, 7], "the prompt's token 5 is not penalised"
    sampler.start(0, Request((3, 5), SamplingParams(0.0, max_tokens=2, repetition_penalty=9.0, logit_bias=((0, -9),))))
    run(sampler, {0: [logits.clone().index_fill(0, torch.tensor([1]), -9.0)] * 2}, random.Random(0))
    assert sampler.take(0, 0).token_ids == [2, 4], "prompt and generated tokens are"


def test_padded_rows_are_never_drawn_whatever_favours_them() -> None:
    logits = torch.zeros(PADDED).index_fill(0, torch.arange(VOCABULARY, PADDED), 50.0)
    fields: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"logit_bias": tuple((token, -100.0) for token in range(VOCABULARY))},
        {"frequency_penalty": -2.0, "repetition_penalty": 0.5},
    ]
    sampler = Sampler(len(fields), None, (), VOCABULARY)
    for slot, field in enumerate(fields):
        # Padding in the prompt is not known to the tokenizer and penalised by nobody.
        sampler.start(slot, Request((4, PADDED - 1), SamplingParams(**{"temperature": 1.0, "max_tokens": 60} | field)))
    run(sampler, {slot: [logits] * 60 for slot in range(len(fields))}, random.Random(1))
    for slot in range(len(fields)):
        completion = sampler.take(slot, 0)
        assert max(completion.token_ids) < VOCABULARY
        assert max(completion.logprobs) < -40, "log-probabilities are the model's own, padding included"


def test_end_tokens_wait_for_min_tokens() -> None:
    logits = torch.zeros(PADDED).index_fill(0, torch.tensor([0, 9]), 30.0)
    for stop_ids, ignoring, ends in (((), False, [0]), ((9,), False, [0, 9]), ((9,), True, [9])):
        sampler = Sampler(1, None, EOS, VOCABULARY)
        params = SamplingParams(1.0, max_tokens=50, min_tokens=7, stop_token_ids=stop_ids, ignore_eos=ignoring, seed=5)
        sampler.start(0, Request((5,), params))
        run(sampler, {0: [logits] * 50}, random.Random(0))
        tokens = sampler.take(0, 0).token_ids
        assert len(tokens) >= 8 and tokens[-1] in ends and not set(tokens[:7]) & set(ends)


def test_top_logprobs_are_the_models_own_and_only_for_those_who_ask() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [list(torch.randn(4, PADDED, generator=generator)) for _ in range(3)]
    sampler = Sampler(3, None, (), VOCABULARY)
    for slot, count in enumerate((0, 2, 99)):
        params = SamplingParams(1.0, max_tokens=4, top_logprobs=count, logit_bias=((3, 50.0),))
        sampler.start(slot, Request((5,), params))
    for step in range(4):
        sampled = sampler.sample(torch.tensor([2, 0, 1]), torch.stack([steps[slot][step] for slot in (2, 0, 1)]))
        assert sampled.top is not None and [len(top) for top in sampled.top] == [VOCABULARY, 0, 2]
    for slot, count in enumerate((0, 2, VOCABULARY)):
        completion = sampler.take(slot, 0)
        assert set(completion.token_ids) == {3} and len(completion.top_logprobs) == (4 if count else 0)
        for top, raw in zip(completion.top_logprobs, steps[slot], strict=bool(count)):
            expected = raw.log_softmax(-1)[:VOCABULARY].topk(count)
            assert [token for token, _ in top] == expected.indices.tolist()
            assert [value for _, value in top] == expected.values.tolist()
    sampler.start(0, Request((5,), SamplingParams()))
    assert sampler.sample(torch.tensor([0]), torch.zeros(1, PADDED)).top is None


def test_slots_are_reused_grow_and_keep_their_state() -> None:
    """The same samples alone and in a sampler that grows around them, with others started and taken meanwhile."""
    generator = torch.Generator().manual_seed(2)
    steps = list(torch.randn(150, PADDED, generator=generator))
    params = SamplingParams(1.0, max_tokens=150, ignore_eos=True, thinking_budget=10, frequency_penalty=0.2, seed=3)
    request = Request((5, 6), params, in_think=True)
    alone = Sampler(1, THINK, EOS, VOCABULARY)
    alone.start(0, request)
    run(alone, {0: steps}, random.Random(0))
    crowded = Sampler(2, THINK, EOS, VOCABULARY)
    crowded.start(1, request)
    for step in range(150):
        if step == 10:
            crowded.grow(5, 33)
        if step % 3 == 0:
            visitor = Request((9,), SamplingParams(1.0, top_k=3, max_tokens=1, logit_bias=((7, 5.0),), top_logprobs=1))
            crowded.start(0, visitor)
            crowded.sample(torch.tensor([0, 1]), torch.stack((steps[-step], steps[step])))
            crowded.take(0, 0)
        else:
            crowded.sample(torch.tensor([1]), steps[step][None].clone())
    assert crowded.capacity == 5
    whole = crowded.take(1, 0)
    assert whole == alone.take(0, 0) and whole.thinking_tokens == 10


def test_what_the_runner_asks_and_a_sample_that_is_aborted() -> None:
    sampler = Sampler(2, None, EOS, VOCABULARY, entropies=False)
    sampler.start(1, Request((5, 6, 7), SamplingParams(0.0)))
    assert sampler.last_R(torch.tensor([1])).tolist() == [7] and sampler.tokens(1) == [5, 6, 7]
    sampler.sample(torch.tensor([1]), torch.eye(PADDED)[8][None])
    assert sampler.last_R(torch.tensor([1])).tolist() == [8] and sampler.tokens(1) == [5, 6, 7, 8]
    assert sampler.made_tokens(1) == [8] and int(sampler.made[1]) == 1
    completion = sampler.take(1, 2, aborted=True)
    assert completion.finish_reason == "aborted" and completion.token_ids == [8] and completion.entropies == []
    sampler.start(1, Request((5,), SamplingParams()))
    assert sampler.take(1, 2, aborted=True).token_ids == []


def test_what_is_refused() -> None:
    sampler = Sampler(1, None, EOS, VOCABULARY)
    with pytest.raises(InputError, match="logit_bias names token 30, the vocabulary has 30"):
        sampler.check(Request((5,), SamplingParams(logit_bias=((3, 1.0), (30, 1.0)))))


def test_tiny_temperatures_are_greedy_and_huge_ones_uniform() -> None:
    sampler = Sampler(2, None, (), VOCABULARY)
    for slot, temperature in enumerate((1e-30, 1e30)):
        sampler.start(slot, Request((5,), SamplingParams(temperature, max_tokens=200)))
    logits = torch.linspace(0, 9, PADDED)
    run(sampler, {slot: [logits] * 200 for slot in (0, 1)}, random.Random(0))
    assert (
        set(sampler.take(0, 0).token_ids) == {VOCABULARY - 1} and len(set(sampler.take(1, 0).token_ids)) == VOCABULARY
    )


def test_a_slot_forgets_what_its_last_sample_asked_for() -> None:
    """Each field that the sampler keeps by slot, used by a first sample and not by the second in the same slot."""
    logits = torch.zeros(1, PADDED).index_fill(1, torch.tensor([9]), 9.0).index_fill(1, torch.tensor([0]), 8.0)
    every = SamplingParams(
        0.0, max_tokens=70, top_k=1, ignore_eos=True, stop_token_ids=(10,), stop_loops=True, thinking_budget=200,
        frequency_penalty=2.0, logit_bias=((9, -100.0),), min_tokens=70, top_logprobs=2,
    )  # fmt: skip
    plain = SamplingParams(1.0, max_tokens=200, seed=1)
    used, fresh = (Sampler(1, THINK, EOS, VOCABULARY) for _ in range(2))
    used.start(0, Request((5,), every, in_think=True))
    for _ in range(70):
        used.sample(torch.tensor([0]), logits.clone())
    used.take(0, 0)
    completions = []
    for sampler in (used, fresh):
        sampler.start(0, Request((5,), plain, in_think=True))
        run(sampler, {0: [logits[0]] * 200}, random.Random(0))
        completions.append(sampler.take(0, 0))
    assert completions[0] == completions[1] and completions[1].token_ids[-1] in EOS
    for field, tokens in (({"ignore_eos": True}, [0, 0]), ({}, [0])):
        used.start(0, Request((5,), SamplingParams(0.0, max_tokens=2, **field)))  # type: ignore[arg-type]
        run(used, {0: [torch.eye(PADDED)[0]] * 2}, random.Random(0))
        assert used.take(0, 0).token_ids == tokens
