"""Whatever the engine does with its cache, tokens and log-probabilities are those of the plain forward pass.

Chunked prefill beside decoding, prefix hits, preemption, batch mates, samples that share a prompt, abortion, sleep,
prompt lookup: for dense and MoE models, Qwen2.5's bias, sliding windows, YaRN and Dual Chunk Attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from twofold.base.records import Completion, Request, SamplingParams
from twofold.engine.engine import Engine, EngineOptions
from twofold.engine.sampling import ThinkTokens
from twofold.model import lora
from twofold.model.attn_inputs import AttnInputs
from twofold.model.config import Context, ModelConfig
from twofold.model.qwen3 import Qwen3

EOS = 0
THINK = ThinkTokens(1, 2, (5, 6, 2, 7))
BASE: dict[str, Any] = dict(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=256,
    tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "qwen2.5": dict(qk_norm=False, qkv_bias=True),
    "window": dict(sliding_window=6, max_window_layers=1),
    "yarn": dict(context=Context(native=40, target=160)),
    "dca": dict(context=Context(native=40, target=160, method="dca")),
}


def make_model(kind: str) -> Qwen3:
    model = Qwen3(ModelConfig(**BASE | KINDS[kind]))
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.3, 1.2, generator=generator)
    return model.requires_grad_(False)


def small_engine(model: Qwen3, blocks: int = 200, size: int = 4, rows: int = 6, **options: Any) -> Engine:
    """An engine of few blocks, which cuts prompts into chunks of at most 9 tokens, 5 beside decoding, and which records
    decoding as soon as it has seen it."""
    kv_bytes = blocks * size * model.config.kv_bytes_per_token(model.attention_dtype.itemsize)
    chosen = EngineOptions(block_size=size, kv_bytes=kv_bytes, step_tokens=9, mixed_tokens=5, replay_after=2)
    return Engine(model, (EOS,), max_rows=rows, options=chosen, **options)


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[tuple[int, ...]]:
    """Random ones of many lengths; the even ones begin with the same 14 tokens."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for number in range(count):
        length = int(torch.randint(1, longest, (1,), generator=generator))
        own = tuple(torch.randint(1, 48, (length,), generator=generator).tolist())
        out.append(tuple(range(3, 17)) + own if number % 2 == 0 else own)
    return out


def greedy(prompt: Sequence[int], max_tokens: int = 14, **params: Any) -> Request:
    return Request(tuple(prompt), SamplingParams(temperature=0, max_tokens=max_tokens, **params))


def drawn(prompt: Sequence[int], seed: int, max_tokens: int = 14, **params: Any) -> Request:
    return Request(tuple(prompt), SamplingParams(temperature=1, max_tokens=max_tokens, seed=seed, **params))


def run(engine: Engine, requests: Sequence[Request], abort: Sequence[int] = ()) -> dict[tuple[int, int], Completion]:
    """Add everything and step to the end, aborting those numbers after six steps. By (request number, sample)."""
    ids = [engine.add(request) for request in requests]
    done, steps = {}, 0
    while engine.has_work:
        for event in engine.step():
            if event.completion is not None:
                done[ids.index(event.request_id), event.sample_index] = event.completion
        engine.check_integrity()
        steps += 1
        if steps == 6:
            for number in abort:
                engine.abort(ids[number])
                engine.check_integrity()
    assert engine.counters.blocks_used == 0 and len(done) == sum(request.params.n for request in requests)
    return done


@torch.no_grad()
def check(model: Qwen3, engine: Engine, requests: Sequence[Request], done: dict[tuple[int, int], Completion]) -> None:
    """Greedy tokens are the plain forward pass's choice, log-probabilities its log-probabilities."""
    for (number, _), completion in done.items():
        request, made = requests[number], len(completion.token_ids)
        if completion.finish_reason == "aborted" and not made:
            continue
        tokens = torch.tensor([*request.prompt_ids, *completion.token_ids])
        attn = AttnInputs.packed([0, len(tokens)], extended_S=[engine.extends(request)])
        logits = model.logits(model(tokens, torch.arange(len(tokens)), attn))[-made - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, tokens[-made:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
        if request.params.temperature == 0:
            assert completion.token_ids == logits.argmax(-1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_everything_at_once_equals_the_plain_forward_pass(kind: str) -> None:
    """Few blocks, few rows, small chunks, shared beginnings, several samples, guesses, an abortion, in two waves."""
    model = make_model(kind)
    engine = small_engine(model, blocks=27)
    greedy_ones = [greedy(prompt, 25 if number % 3 else 9) for number, prompt in enumerate(prompts(9))]
    drawn_ones = [drawn(prompt, seed=number, n=3) for number, prompt in enumerate(prompts(5, seed=1, longest=24))]
    guessed = [greedy(prompt * 2, 12, speculate=3) for prompt in prompts(4, seed=2, longest=12)]
    requests = [request for three in zip(greedy_ones, drawn_ones, guessed, strict=False) for request in three]
    requests += greedy_ones[4:]
    first = run(engine, requests, abort=[1, 7])
    check(model, engine, requests, first)
    assert {done.finish_reason for (number, _), done in first.items() if number in (1, 7)} == {"aborted"}
    stats = engine.counters
    assert stats.preemptions > 0 and stats.prefix_hits > 0 and stats.drafted > 0
    second = run(engine, requests)
    check(model, engine, requests, second)
    for place, completion in second.items():
        if place[0] not in (1, 7):
            assert completion.token_ids == first[place].token_ids


@pytest.mark.parametrize("kind", ["dense", "moe", "yarn"])
def test_a_prefix_hit_changes_nothing(kind: str) -> None:
    model = make_model(kind)
    prompt = prompts(3, longest=30)[2]
    requests = [greedy(prompt), greedy(prompt), drawn((*prompt[:14], 5, 6, 7), 3)]
    engine = small_engine(model)
    alone = [run(small_engine(model), [request])[0, 0] for request in requests]
    together = [run(engine, [request])[0, 0] for request in requests]
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=0)
    assert [completion.cached_tokens for completion in together] == [0, (len(prompt) - 1) // 4 * 4, 12]
    assert engine.counters.prompt_tokens == sum(len(request.prompt_ids) for request in requests)
    assert engine.counters.cached_tokens == sum(completion.cached_tokens for completion in together)


def test_what_was_made_is_found_again_in_the_next_turn() -> None:
    model = make_model("dense")
    engine = small_engine(model)
    first = run(engine, [greedy(range(3, 12), 20)])[0, 0]
    longer = greedy((*range(3, 12), *first.token_ids, 7, 8), 6)
    done = run(engine, [longer])
    fed = 9 + len(first.token_ids) - 1  # the last token was never fed
    assert done[0, 0].cached_tokens == fed // 4 * 4
    check(model, engine, [longer], done)


def test_codings_never_share_blocks() -> None:
    """The same prompt with room for the native length and without: cached keys are rotated otherwise."""
    model = make_model("yarn")
    engine = small_engine(model)
    requests = [greedy(range(3, 30), 10), greedy(range(3, 30), 30)]
    assert [engine.extends(request) for request in requests] == [False, True]
    for request in requests:
        done = run(engine, [request])
        assert done[0, 0].cached_tokens == 0
        check(model, engine, [request], done)


def test_adapters_never_share_blocks() -> None:
    model = make_model("dense")
    lora.attach(model, "one", lora.LoraConfig(r=4, alpha=64.0), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    engine, request = small_engine(model), greedy(range(3, 20), 12)
    cached, tokens = [], []
    for adapter in ("one", None, "one", None):
        lora.activate(model, adapter)
        done = run(engine, [request])
        check(model, engine, [request], done)
        cached.append(done[0, 0].cached_tokens)
        tokens.append(done[0, 0].token_ids)
    assert cached == [0, 0, 16, 16] and tokens[0] == tokens[2] != tokens[1] == tokens[3]
    engine.add(request)
    lora.activate(model, "one")
    with pytest.raises(RuntimeError, match="another adapter was activated"):
        engine.add(request)


def test_new_weights_forget_old_blocks() -> None:
    model = make_model("dense")
    engine, request = small_engine(model), greedy(range(3, 20), 12)
    before = run(engine, [request])[0, 0]
    with torch.no_grad():
        model.model.layers[0].self_attn.qkv_proj.weight.mul_(-1.5)
    engine.update_weights()
    assert engine.counters.blocks_used == 0
    done = run(engine, [request])
    check(model, engine, [request], done)
    assert done[0, 0].cached_tokens == 0 and done[0, 0].policy_version == 1
    assert done[0, 0].token_ids != before.token_ids
    engine.add(request)
    engine.step()
    with pytest.raises(RuntimeError, match="weights change under 1 samples"):
        engine.update_weights()


def test_sleep_in_the_middle_changes_nothing() -> None:
    model = make_model("dense")
    engine, requests = small_engine(model), [drawn(prompt, seed=i, n=2) for i, prompt in enumerate(prompts(5))]
    expected = run(small_engine(model), requests)
    ids = [engine.add(request) for request in requests]
    done = {}
    for step in range(1000):
        if not engine.has_work:
            break
        for event in engine.step():
            if event.completion is not None:
                done[ids.index(event.request_id), event.sample_index] = event.completion
        if step in (3, 9):
            engine.sleep()
            assert engine.counters.blocks_total == 0
            for call in (engine.step, lambda: engine.add(requests[0])):
                with pytest.raises(RuntimeError, match="asleep"):
                    call()
            engine.wake()
        engine.check_integrity()
    assert {place: c.token_ids for place, c in done.items()} == {p: c.token_ids for p, c in expected.items()}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_tokens_and_logprobs_do_not_depend_on_batch_mates(kind: str) -> None:
    """Strict mode, fp64 attention and at least 16 rows: alone, in a crowd, in chunks, after preemption, offline.

    The same bits for dense models; an expert's matrix products have as many rows as it has tokens.
    """
    model = make_model(kind)
    model.set_attention_dtype(torch.float64)
    requests = [drawn(prompt, seed=number, n=2) for number, prompt in enumerate(prompts(6))]
    crowd = run(small_engine(model, blocks=24, min_rows=16), requests)
    offline = Engine(model, (EOS,), min_rows=16).generate(requests)
    for number, request in enumerate(requests):
        alone = run(small_engine(model, min_rows=16), [request])
        for sample in range(2):
            here, there = alone[0, sample], (crowd[number, sample], offline[2 * number + sample])
            for other in there:
                assert here.token_ids == other.token_ids
                if kind == "dense":
                    assert here.logprobs == other.logprobs
                else:
                    torch.testing.assert_close(*map(torch.tensor, (here.logprobs, other.logprobs)), atol=3e-6, rtol=0)


@pytest.mark.parametrize("kind", ["dense", "window", "dca"])
def test_guessing_makes_the_same_tokens_with_fewer_steps(kind: str) -> None:
    """Greedy and sampled, with a budget that forces text: prompt lookup is exact, and repetitive text is guessed."""
    model = make_model(kind)
    loop = (5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7)
    requests = [
        *(greedy(loop * k, 40) for k in (1, 2)),
        *(drawn(prompt, seed=i, max_tokens=40, top_k=3) for i, prompt in enumerate(prompts(3))),
        Request(
            (*loop, 1), SamplingParams(0.8, max_tokens=40, thinking_budget=6, repetition_penalty=1.1), in_think=True
        ),
    ]
    plain = run(small_engine(model, think=THINK), requests)
    guessing = [replace(r, params=replace(r.params, speculate=4)) for r in requests]
    engine = small_engine(model, think=THINK)
    guessed = run(engine, guessing)
    for place, completion in plain.items():
        assert guessed[place].token_ids == completion.token_ids and guessed[place].forced == completion.forced
        torch.testing.assert_close(
            torch.tensor(guessed[place].logprobs), torch.tensor(completion.logprobs), atol=1e-5, rtol=0
        )
    assert any(plain[5, 0].forced)
    stats = engine.counters
    assert 0 < stats.accepted <= stats.drafted
    assert stats.generated_tokens == sum(len(completion.token_ids) for completion in plain.values())
