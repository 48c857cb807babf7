"""The engine against the plain forward pass: cached = uncached, batch mates do not matter, budgets hold."""

import copy
import importlib
import itertools
import math
import signal
from dataclasses import replace

import pytest
import torch

from twofold.base.records import InputError, Request, SamplingParams
from twofold.engine.engine import Engine, EngineOptions
from twofold.engine.sampling import ThinkTokens
from twofold.model import lora
from twofold.model.attn_inputs import AttnInputs, PagedKV, Rows, Span
from twofold.model.config import Context, ModelConfig
from twofold.model.qwen3 import Qwen3

EOS, OPEN, CLOSE = 0, 1, 2
STOP_TEXT = (5, 6, CLOSE, 7)


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request):
    moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24) if request.param == "moe" else {}
    built = Qwen3(
        ModelConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
            **moe,
        )
    )
    built.init_weights(seed=0)
    return built.requires_grad_(False)


def engine(model, **options):
    return Engine(model, (EOS,), ThinkTokens(OPEN, CLOSE, STOP_TEXT), **options)


def prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, 40, (n,), generator=generator).tolist()) for n in lengths]


def plain_greedy(model, prompt, max_tokens):
    tokens = list(prompt)
    for _ in range(max_tokens):
        ids = torch.tensor(tokens)
        hidden = model(ids, torch.arange(len(ids)), AttnInputs.packed([0, len(ids)]))
        tokens.append(int(model.logits(hidden[-1:]).argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def test_greedy_equals_the_plain_forward_pass_with_few_rows_and_many_requests(model):
    requests = [Request(p, SamplingParams(temperature=0, max_tokens=12)) for p in prompts(11)]
    completions = engine(model, max_rows=4).generate(requests)
    assert [c.request_index for c in completions] == list(range(11))
    for request, completion in zip(requests, completions, strict=True):
        assert completion.token_ids == plain_greedy(model, request.prompt_ids, 12)


def test_rollout_logprobs_equal_scores(model):
    requests = [Request(p, SamplingParams(temperature=1, max_tokens=30, n=5, seed=9)) for p in prompts(6)]
    runner = engine(model)
    completions = runner.generate(requests)
    assert len(completions) == 30
    full = [list(requests[c.request_index].prompt_ids) + c.token_ids for c in completions]
    for completion, scores in zip(completions, runner.score(full), strict=True):
        expected = scores[-len(completion.token_ids) :]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_tokens_do_not_depend_on_batch_mates(model):
    requests = [
        Request(p, SamplingParams(temperature=1, top_p=0.9, top_k=12, max_tokens=25, seed=100 + i))
        for i, p in enumerate(prompts(9))
    ]
    together = engine(model, max_rows=5).generate(requests)
    for request, completion in zip(requests, together, strict=True):
        alone = engine(model).generate([request])[0]
        assert alone.token_ids == completion.token_ids


def test_stream_equals_generate(model):
    request = Request(prompts(1)[0], SamplingParams(temperature=1, max_tokens=20, seed=4, thinking_budget=3))
    streamed = list(engine(model).stream(request))
    completion = engine(model).generate([request])[0]
    assert streamed == list(zip(completion.token_ids, completion.forced, strict=True))


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_budget_is_kept_to_the_token_and_forced_tokens_are_marked(model, budget):
    params = SamplingParams(temperature=1, max_tokens=40, thinking_budget=budget, n=8, seed=3)
    completions = engine(model).generate([Request((*p, OPEN), params, in_think=True) for p in prompts(4)])
    forced_some = 0
    for completion in completions:
        assert completion.thinking_tokens <= budget
        forced = [t for t, f in zip(completion.token_ids, completion.forced, strict=True) if f]
        assert tuple(forced) in ((), STOP_TEXT)
        if forced:
            forced_some += 1
            at = completion.forced.index(True)
            assert at == budget == completion.thinking_tokens
            assert CLOSE not in completion.token_ids[:at]
    assert forced_some > 0


def test_a_think_block_opened_by_the_model_is_counted(model):
    closed = Request((3, 4), SamplingParams(temperature=1, max_tokens=60, n=64, seed=1, thinking_budget=4))
    for completion in engine(model).generate([closed]):
        tokens = completion.token_ids
        if OPEN in tokens:
            start = tokens.index(OPEN) + 1
            inside = next((i for i, t in enumerate(tokens[start:]) if t == CLOSE or completion.forced[start + i]), None)
            assert len(tokens) - start <= 4 if inside is None else inside <= 4


def test_padded_vocabulary_is_never_sampled_and_bad_requests_are_refused(model):
    params = SamplingParams(temperature=1, max_tokens=20, n=50)
    for completion in engine(model, vocab_limit=10).generate([Request((3,), params)]):
        assert max(completion.token_ids) < 10
        assert all(math.isfinite(e) and e >= 0 for e in completion.entropies)
    with pytest.raises(InputError, match="empty prompt"):
        engine(model).generate([Request(())])
    with pytest.raises(InputError, match="think"):
        Engine(model, (EOS,)).generate([Request((3,), SamplingParams(thinking_budget=4))])


def test_chunked_prefill_equals_whole_prefill(model):
    tokens = torch.tensor(prompts(1, seed=5)[0] * 3)
    whole = model(tokens, torch.arange(len(tokens)), AttnInputs.packed([0, len(tokens)]))
    cache, blocks, nothing = PagedKV(model.config, blocks=12, block_size=8), [7, 2, 3, 9, 0, 1, 11, 4], Rows([], [], [])
    cut = len(tokens) // 3
    first = model(tokens[:cut], torch.arange(cut), AttnInputs.paged(nothing, [Span(blocks, 0, cut, False)], cache))
    attn = AttnInputs.paged(nothing, [Span(blocks, cut, len(tokens), False)], cache)
    second = model(tokens[cut:], torch.arange(cut, len(tokens)), attn)
    torch.testing.assert_close(torch.cat((first, second)), whole, atol=1e-5, rtol=1e-5)


def test_idle_rows_change_nothing(model):
    requests = [Request(p, SamplingParams(temperature=1, max_tokens=15, n=3, seed=7)) for p in prompts(3)]
    plain = engine(model).generate(requests)
    padded = engine(model, min_rows=16).generate(requests)
    assert [c.token_ids for c in plain] == [c.token_ids for c in padded]
    assert engine(model, max_rows=2, min_rows=4).generate(requests[:1])[0].token_ids == plain[0].token_ids


# Native length 16. A window of 6 in the upper layers goes with the first two.
CONTEXTS = {
    "yarn": dict(context=Context(native=16, target=64), sliding_window=6, max_window_layers=1),
    "yarn, static": dict(context=Context(native=16, target=64, static=True), sliding_window=6, max_window_layers=1),
    "dca": dict(context=Context(native=16, target=64, method="dca")),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_requests_of_either_coding_run_together(model, name):
    """The same prompt with room to fit the native length and without; few rows, so rows are re-used and squeezed."""
    long = Qwen3(model.config.model_copy(update=CONTEXTS[name])).requires_grad_(False)
    long.load_state_dict(model.state_dict())
    short_prompt, long_prompt = tuple(range(3, 11)), tuple(range(3, 33))
    requests = [
        Request(short_prompt, SamplingParams(temperature=0, max_tokens=9)),  # 16 positions are used: fits
        Request(short_prompt, SamplingParams(temperature=0, max_tokens=10)),
        Request(short_prompt, SamplingParams(temperature=0, max_tokens=30)),
        Request(long_prompt, SamplingParams(temperature=0, max_tokens=12)),
        *(Request(p, SamplingParams(temperature=1, max_tokens=25, seed=i, n=2)) for i, p in enumerate(prompts(5))),
    ]
    runner = engine(long, max_rows=4)
    extends = [runner.extends(request) for request in requests]
    assert extends[:4] == [CONTEXTS[name]["context"].static, True, True, True]
    completions = runner.generate(requests)
    full = [list(requests[c.request_index].prompt_ids) + c.token_ids for c in completions]
    scores = runner.score(full, 40, [extends[c.request_index] for c in completions])
    for completion, expected in zip(completions, scores, strict=True):
        expected = expected[-len(completion.token_ids) :]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
        if completion.request_index < 4:
            tokens = torch.tensor(full[completions.index(completion)])
            attn = AttnInputs.packed([0, len(tokens)], extended_S=[extends[completion.request_index]])
            choice = long.logits(long(tokens, torch.arange(len(tokens)), attn)).argmax(-1)
            assert choice[len(tokens) - len(completion.token_ids) - 1 : -1].tolist() == completion.token_ids
    plain = Qwen3(long.config.model_copy(update={"context": None})).requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    for request, extended, completion in zip(requests[:4], extends[:4], completions[:4], strict=True):
        same = engine(plain).generate([request])[0].token_ids == completion.token_ids
        assert same or extended  # a request that fits is answered as if there were no long context


def test_scores_decide_by_length_as_training_does(model):
    long = Qwen3(model.config.model_copy(update={"context": Context(native=16, target=64)})).requires_grad_(False)
    long.load_state_dict(model.state_dict())
    short, beyond = list(range(3, 20)), list(range(3, 21))  # 16 and 17 positions are used
    plain, stretched = engine(model), engine(long)
    scores = stretched.score([short, beyond])
    assert torch.equal(scores[0], stretched.score([short, beyond], extended=[False, True])[0])
    torch.testing.assert_close(scores[0], plain.score([short])[0])
    torch.testing.assert_close(scores[1], stretched.score([beyond], extended=[True])[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[1], plain.score([beyond])[0], atol=1e-3)


def run(runner, *requests):
    """Add and step to the end. Returns events and completions by (request id, sample)."""
    for request in requests:
        runner.add(request)
    events = []
    while runner.has_work:
        events += runner.step()
        runner.check_integrity()
    return events, {(e.request_id, e.sample_index): e.completion for e in events if e.completion is not None}


def test_events_spell_the_completions(model):
    requests = [
        Request(p, SamplingParams(temperature=1, max_tokens=12, n=2, seed=5 * i, top_logprobs=i, thinking_budget=2))
        for i, p in enumerate(prompts(4))
    ]
    runner = engine(model, max_rows=3)
    events, done = run(runner, *requests)
    assert done.keys() == {(i, s) for i in range(4) for s in range(2)}
    for (number, sample), completion in done.items():
        mine = [e for e in events if (e.request_id, e.sample_index) == (number, sample)]
        assert [e.token_id for e in mine] == completion.token_ids
        assert [e.forced for e in mine] == completion.forced
        assert [e.logprob for e in mine] == completion.logprobs
        assert [e.completion for e in mine[:-1]] == [None] * (len(mine) - 1)
        assert all(len(e.top) == number for e in mine)
        assert [list(e.top) for e in mine] == (completion.top_logprobs or [[]] * len(mine))
    offline = engine(model).generate(requests)
    assert [c.token_ids for c in offline] == [done[c.request_index, c.sample_index].token_ids for c in offline]
    stats = runner.counters
    assert stats.generated_tokens == len(events) and stats.prompt_tokens == sum(len(r.prompt_ids) for r in requests)
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0) and stats.blocks_total > 0
    assert stats.forced_stops == sum(any(c.forced) for c in done.values())


def test_an_abort_is_felt_at_once_and_delivered(model):
    runner = engine(model, max_rows=3)
    long, waiting, other = (
        runner.add(Request(p, SamplingParams(temperature=1, max_tokens=80, n=n, ignore_eos=True)))
        for p, n in zip(prompts(3), (2, 2, 1), strict=True)
    )
    runner.step()
    made = runner.step()
    assert {e.request_id for e in made} == {long, waiting}
    assert runner.counters.running == 3 and runner.counters.waiting == 2
    runner.abort(long)
    runner.abort(long)  # once is enough
    runner.check_integrity()
    assert runner.counters.running == 1 and runner.counters.waiting == 2
    runner.abort(waiting)
    assert runner.counters.running == 0 and runner.counters.blocks_used == 0
    events = runner.step()
    last = {(e.request_id, e.sample_index): e.completion for e in events if e.completion is not None}
    assert last.keys() == {(long, 0), (long, 1), (waiting, 0), (waiting, 1)}
    assert {c.finish_reason for c in last.values()} == {"aborted"}
    assert [len(last[place].token_ids) for place in sorted(last)] == [2, 2, 2, 0]
    assert {e.request_id for e in events if e.token_id is not None} == {other}
    runner.abort(other)
    runner.abort(12345)
    assert runner.has_work and len(runner.step()) == 1 and not runner.has_work


def test_a_stream_that_is_left_frees_its_place(model):
    runner, request = engine(model), Request((3, 4, 5), SamplingParams(temperature=1, max_tokens=90, ignore_eos=True))
    stream = runner.stream(request)
    first = [next(stream) for _ in range(3)]
    assert runner.counters.running == 1
    beside = runner.stream(request)  # two at once
    assert [next(beside) for _ in range(3)] == first
    assert runner.generate([request])[0].token_ids[:3] == [token for token, _ in first]
    stream.close()
    beside.close()
    runner.check_integrity()
    assert not runner.has_work and runner.counters.blocks_used == 0
    with pytest.raises(InputError, match="a stream has one sample, n = 2"):
        next(runner.stream(Request((3,), SamplingParams(n=2))))


def owner_of(name):
    """The class of the engine that has a method, and the method's name, from "module.Class.method"."""
    module, part, method = name.split(".")
    return getattr(importlib.import_module(f"twofold.engine.{module}"), part), method


PLACES = ["runner.Runner.run", "scheduler.Scheduler.schedule", "sampling.Sampler.sample", "engine.Engine._report"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_an_interruption_anywhere_leaves_nothing_behind(model, monkeypatch, name, before):
    """Ctrl-C in the third step, before or after what it interrupts; another stream goes on as if nothing had been."""
    request = Request((3, 4, 5), SamplingParams(temperature=1, max_tokens=6, n=3, ignore_eos=True))
    other = Request((9, 8, 7, 6), SamplingParams(temperature=1, max_tokens=20, seed=5, ignore_eos=True))
    runner = engine(model)
    expected, undisturbed = runner.generate([request]), list(runner.stream(other))
    beside = runner.stream(other)
    begun = [next(beside) for _ in range(2)]
    owner, method = owner_of(name)
    real, calls = getattr(owner, method), itertools.count()

    def interrupted(*args):
        third = next(calls) == 2
        if third and before:
            raise KeyboardInterrupt
        result = real(*args)
        if third:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.generate([request])
    runner.check_integrity()
    assert runner.counters.running + runner.counters.waiting == 1
    assert [c.token_ids for c in runner.generate([request])] == [c.token_ids for c in expected]
    rest = list(beside)
    if name != "engine.Engine._report":  # there the other stream's events of that step may be lost, its tokens are not
        assert len(begun + rest) >= 19
    assert (begun + rest)[:2] == undisturbed[:2] and (begun + rest)[-8:] == undisturbed[-8:]
    runner.check_integrity()
    assert not runner.has_work and runner.counters.blocks_used == 0


@pytest.mark.parametrize("name", ["sampling.Sampler._free", "sampling.Sampler.start", "scheduler.Scheduler.end"])
def test_ctrl_c_between_the_books_of_engine_and_sampler_waits(model, monkeypatch, name):
    """A sample that one of them has and the other has not could not be aborted: the chat ended with a traceback."""
    request = Request((3, 4, 5), SamplingParams(temperature=1, max_tokens=6, n=2, ignore_eos=True))
    runner = engine(model)
    expected = [c.token_ids for c in runner.generate([request])]
    owner, method = owner_of(name)
    real, pressed = getattr(owner, method), []

    def then_ctrl_c(*args, **kwargs):
        result = real(*args, **kwargs)
        if not pressed:
            pressed.append(1)
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, then_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            runner.generate([request])
    runner.check_integrity()
    assert not runner.has_work and runner.counters.blocks_used == 0
    assert [c.token_ids for c in runner.generate([request])] == expected


def test_what_can_never_fit_is_refused_before_anything_runs(model):
    token = model.config.kv_bytes_per_token(4)
    runner = engine(model, options=EngineOptions(block_size=4, kv_bytes=8 * 4 * token))
    fits, large = (Request((3, 4), SamplingParams(max_tokens=n)) for n in (31, 32))
    with pytest.raises(InputError, match="33 tokens, 9 blocks of 4; the cache has 8"):
        runner.generate([fits, large])
    with pytest.raises(InputError, match="kv_bytes"):
        runner.add(large)
    assert not runner.has_work
    assert len(runner.generate([fits])) == 1
    for field in ("block_size", "kv_bytes", "step_tokens", "mixed_tokens"):
        with pytest.raises(InputError, match=f"{field} must be >= 1"):
            EngineOptions(**{field: 0})


def test_many_short_samples_get_a_block_each_and_a_server_gets_blocks_of_32(model):
    runner = engine(model)
    offline = [Request((3, 4, 5), SamplingParams(max_tokens=20, n=10))]
    assert runner.generate(offline)[0].cached_tokens == 0
    assert (runner.counters.blocks_total, runner.counters.prefix_queries) == (10, 0)
    runner.generate([Request((3, 4, 5), SamplingParams(max_tokens=20, n=8))])
    assert runner.counters.blocks_total == 10, "a cache that is large enough is kept"
    request = Request(tuple(range(3, 40)), SamplingParams(max_tokens=5))
    assert [run(runner, request)[1][place].cached_tokens for place in ((2, 0), (3, 0))] == [0, 32]
    assert runner.counters.blocks_total > 10 and runner.generate([request])[0].cached_tokens == 32


def test_a_request_with_its_own_sink_runs_beside_others(model):
    params = SamplingParams(temperature=1, max_tokens=6, n=2, ignore_eos=True)
    request, other = Request((3, 4, 5), params), Request((9, 8), replace(params, n=1))
    (alone, *_), runner, sink = engine(model).generate([other]), engine(model), []
    stream = runner.stream(other)
    begun = [next(stream)]
    added = runner.add(other)
    mine = runner.add(request, sink=sink)
    while sum(event.completion is not None for event in sink) < 2:
        runner.advance()
    assert {event.request_id for event in sink} == {mine} and len(sink) == 12
    theirs = runner.step()
    assert {event.request_id for event in theirs} == {added} and len(theirs) == 6, "advance delivers nothing of others"
    assert [token for token, _ in (*begun, *stream)] == alone.token_ids
    sink.clear()
    runner.abort(runner.add(request, sink=sink))
    assert [event.completion.finish_reason for event in sink] == ["aborted"] * 2 and not runner.has_work


def test_keys_keep_prefixes_apart(model):
    runner, request = engine(model), Request(tuple(range(3, 40)), SamplingParams(max_tokens=2))
    cached = []
    for key in ("a", "b", None, "a", None):
        runner.add(request, key)
        while runner.has_work:
            cached += [e.completion.cached_tokens for e in runner.step() if e.completion is not None]
    assert cached == [0, 0, 0, 32, 32]


def replace_adapter(model):
    lora.detach(model, "x")
    attach(model, seed=2)


def write_in_place(model):
    with torch.no_grad():
        next(model.model.layers[0].mlp.parameters()).mul_(-1)


@pytest.mark.parametrize(
    ("active", "change"),
    [("x", replace_adapter), ("x", write_in_place), (None, lambda changed: lora.merge(changed, "x"))],
)
def test_nothing_computed_with_other_weights_is_used_again(model, active, change):
    changed = copy.deepcopy(model)
    attach(changed, seed=1)
    lora.activate(changed, active)
    runner, request = engine(changed), Request(tuple(range(3, 40)), SamplingParams(max_tokens=4, temperature=0))
    assert [run(runner, request)[1][place].cached_tokens for place in ((0, 0), (1, 0))] == [0, 32]
    change(changed)
    after, fresh = run(runner, request)[1][2, 0], run(engine(changed), request)[1][0, 0]
    assert after.cached_tokens == 0
    assert (after.token_ids, after.logprobs) == (fresh.token_ids, fresh.logprobs)
    assert run(runner, request)[1][3, 0].cached_tokens == 32


def attach(model, seed, name="x"):
    lora.attach(model, name, lora.LoraConfig(r=2, targets=("q_proj", "o_proj")), seed)
    for factor in lora.adapter_factors(model, name).values():
        torch.nn.init.normal_(factor.lora_B, std=0.3, generator=torch.Generator().manual_seed(seed))
    model.requires_grad_(False)


def test_switching_adapters_keeps_what_each_computed(model):
    model, request = copy.deepcopy(model), Request(tuple(range(3, 40)), SamplingParams(max_tokens=2))
    attach(model, 1, "x")
    attach(model, 2, "y")
    runner, cached = engine(model), []
    for number, name in enumerate(("x", "y", None, "x", "y", None)):
        lora.activate(model, name)
        cached.append(run(runner, request)[1][number, 0].cached_tokens)
    assert cached == [0, 0, 0, 32, 32, 32]


def test_an_adapter_is_not_switched_under_running_samples(model):
    model, request = copy.deepcopy(model), Request((3, 4, 5), SamplingParams(max_tokens=8, ignore_eos=True, seed=1))
    attach(model, seed=1)
    runner = engine(model)
    expected = list(runner.stream(request))
    for change in (lambda: lora.activate(model, None), lambda: replace_adapter(model)):
        stream = runner.stream(request)
        assert [next(stream) for _ in range(4)] == expected[:4]
        change()
        with pytest.raises(RuntimeError, match="another adapter was activated under running samples"):
            next(stream)
        runner.check_integrity()
        assert not runner.has_work, "the stream has ended"
        lora.activate(model, "x")
    request_id = runner.add(request)
    events = runner.step()
    lora.activate(model, None)
    with pytest.raises(RuntimeError, match="finish or abort them first"):
        runner.step()
    lora.activate(model, "x")
    while runner.has_work:
        events += runner.step()
    assert {event.request_id for event in events} == {request_id} and len(events) == 8


def test_entropies_only_where_they_are_wanted(model):
    request = Request((3, 4), SamplingParams(max_tokens=4))
    assert len(engine(model).generate([request])[0].entropies) > 0
    assert engine(model, options=EngineOptions(entropies=False)).generate([request])[0].entropies == []
