"""Sampling: filters, penalties and masks against the reference, counter-based numbers, and what is drawn from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.ops import reference
from twofold.ops.sample import allow, counter_uniform, filter_logits, penalise, sample, sample_filtered


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    top_p=st.lists(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]), min_size=3, max_size=3),
    min_p=st.none() | st.lists(st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0]), min_size=3, max_size=3),
)
def test_filter_logits_equals_the_reference(
    seed: int, top_k: list[int], top_p: list[float], min_p: list[float] | None
) -> None:
    logits = 3 * torch.randn(3, 11, generator=torch.Generator().manual_seed(seed))
    limits = torch.tensor(top_k), torch.tensor(top_p), None if min_p is None else torch.tensor(min_p)
    fast = filter_logits(logits, *limits)
    assert torch.equal(fast, reference.filter_logits(logits, *limits))
    assert torch.isfinite(fast).any(-1).all()  # something is always left
    kept = torch.isfinite(fast)
    assert torch.equal(fast[kept], logits[kept])


def test_min_p_is_a_share_of_the_largest_probability() -> None:
    probs = torch.tensor([[0.5, 0.26, 0.12, 0.07, 0.05]])
    for share, kept in ((0.0, 5), (0.13, 4), (0.2, 3), (0.5, 2), (1.0, 1)):
        left = filter_logits(probs.log(), torch.tensor([0]), torch.tensor([1.0]), torch.tensor([share]))
        assert int(left.isfinite().sum()) == kept
    # The nucleus is one of what min-p leaves: 0.5 of 0.76 is 0.66.
    left = filter_logits(probs.log(), torch.tensor([0]), torch.tensor([0.6]), torch.tensor([0.4]))
    assert left.isfinite().tolist() == [[True, False, False, False, False]]


def test_filters_that_are_off_change_nothing_even_where_rounding_fills_the_sum() -> None:
    logits = torch.cat((torch.zeros(1, 3000), torch.full((1, 50), -25.0)), dim=1)
    off = torch.tensor([0]), torch.tensor([1.0])
    assert torch.equal(filter_logits(logits, *off), logits)
    assert torch.equal(reference.filter_logits(logits, *off), logits)


def test_ties_keep_the_earlier_token() -> None:
    logits = torch.zeros(1, 5)
    kept = filter_logits(logits, torch.tensor([2]), torch.tensor([1.0]))
    assert torch.isfinite(kept).tolist() == [[True, True, False, False, False]]


def test_counter_uniform_is_uniform_over_seeds_and_over_positions() -> None:
    count, cells = 40_000, 50
    axis = torch.arange(count)
    for seeds, places in ((axis, torch.zeros_like(axis)), (torch.full_like(axis, 12345), axis)):
        numbers = counter_uniform(seeds, places)
        assert numbers.dtype == torch.float64 and float(numbers.min()) >= 0 and float(numbers.max()) < 1
        counts = torch.histc(numbers.float(), cells, 0, 1).double()
        assert chi_square(counts, torch.full_like(counts, count / cells)) < 95  # 49 degrees of freedom, p < 1e-4


def test_counter_uniform_of_neighbours_is_independent_and_a_pure_function() -> None:
    seeds, places = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    grid = counter_uniform(seeds.flatten(), places.flatten()).view(200, 200)
    for first, second in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:]), (grid[:-1, 1:], grid[1:, :-1])):
        correlation = torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1]
        assert abs(float(correlation)) < 0.02  # four standard errors of 40,000 independent pairs
    assert len(grid.flatten().unique()) == grid.numel()
    assert float(counter_uniform(torch.tensor([7]), torch.tensor([9]))) == float(grid[7, 9])


def test_draws_follow_the_softmax_at_each_temperature() -> None:
    logits = torch.tensor([1.5, -0.5, 0.0, 2.0, -3.0, 0.7])
    count = 30_000
    for seed, temperature in ((1, 0.5), (2, 1.0), (3, 1.7)):
        uniform = counter_uniform(torch.full((count,), seed), torch.arange(count))
        drawn = sample(logits.expand(count, -1), torch.full((count,), temperature), uniform)
        expected = (logits / temperature).softmax(-1).double() * count
        likely = expected > 5
        counts = torch.bincount(drawn, minlength=6).double()
        assert chi_square(counts[likely], expected[likely]) < 26  # at most 5 degrees of freedom, p < 1e-4


def test_excluded_tokens_are_never_drawn_even_at_the_ends_of_the_interval() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(3, -1)
    ends = torch.tensor([0.0, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    assert sample(logits, torch.ones(3), ends).tolist() == [1, 3, 3]


def test_temperature_zero_is_greedy_row_by_row() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [3.0, 2.9, 0.0]])
    uniform = torch.tensor([0.999, 0.999], dtype=torch.float64)
    assert sample(logits, torch.zeros(2), uniform).tolist() == [1, 0]
    assert sample(logits, torch.tensor([0.0, 1.0]), uniform).tolist() == [1, 2]


def random_filters(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Temperature, top-k, top-p, min-p and uniform numbers; each is off in some rows."""

    def pick(values: list[float]) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    top_k = pick([0, 0, 1, 2, 5, 20, 63, 64, 90]).long()
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    return pick([0, 0.3, 0.7, 1, 1.5]), top_k, pick([1, 1, 0.95, 0.8, 0.3]), pick([0, 0, 0.05, 0.3]), uniform


@pytest.mark.parametrize("vocabulary", [7, 64, 65, 300])
def test_sample_filtered_equals_the_reference_whatever_the_batch_mates(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(400, vocabulary, generator=generator)
    logits[:200] = logits[:200].round()  # many ties, also at the end of the top-k
    logits[::7, vocabulary // 2 :] = -torch.inf
    filters = random_filters(400, generator)
    tokens = sample_filtered(logits, *filters)
    assert torch.equal(tokens, reference.sample_filtered(logits, *filters))
    assert torch.isfinite(logits.gather(-1, tokens[:, None])).all()
    order = torch.randperm(400, generator=generator)
    assert torch.equal(sample_filtered(logits[order], *(f[order] for f in filters)), tokens[order])
    for row in range(0, 400, 23):
        one = slice(row, row + 1)
        assert torch.equal(sample_filtered(logits[one], *(f[one] for f in filters)), tokens[one])


def test_top_k_of_tied_logits_keeps_the_earliest() -> None:
    """More ties than the few largest that are looked at, so which of those are found is the library's whim."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(0, 2, (200, 400), generator=generator).float()
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    off = torch.ones(200), torch.zeros(200)
    tokens = sample_filtered(logits, torch.full((200,), 50.0), torch.full((200,), 5), *off, uniform)
    for row, token in zip(logits, tokens.tolist(), strict=True):
        assert token in row.nonzero().flatten()[:5].tolist()


@pytest.mark.parametrize("spread", [0.01, 2.0, 8.0])
def test_nuclei_of_large_vocabularies_equal_the_reference(spread: float) -> None:
    """From distributions so flat that nearly every token is needed to those with one."""
    generator = torch.Generator().manual_seed(9)
    logits = spread * torch.randn(40, 9000, generator=generator)
    logits[:10] = logits[:10].round()
    logits[5:15, ::3] = -torch.inf
    temperature, _, _, min_p, uniform = random_filters(40, generator)
    top_p = torch.tensor([0.05, 0.5, 0.9, 0.999, 1.0]).repeat(8)
    filters = temperature, torch.zeros(40, dtype=torch.int64), top_p, min_p, uniform
    assert torch.equal(sample_filtered(logits, *filters), reference.sample_filtered(logits, *filters))


def test_filters_that_are_off_draw_what_sample_draws() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(300, 500, generator=generator)
    temperature, _, _, _, uniform = random_filters(300, generator)
    off = torch.zeros(300, dtype=torch.int64), torch.ones(300), torch.zeros(300)
    assert torch.equal(sample_filtered(logits, temperature, *off, uniform), sample(logits, temperature, uniform))


def test_filtered_draws_follow_the_distribution_at_the_temperature() -> None:
    """Filters apply to the tempered distribution, in the order min-p, top-k, top-p."""
    logits = torch.tensor([1.5, -0.5, 0.0, 2.0, -3.0, 0.7, 0.6])
    count = 20_000
    for top_k, top_p, min_p in ((3, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2), (5, 0.85, 0.05)):
        uniform = counter_uniform(torch.full((count,), 11), torch.arange(count))
        rows = torch.full((count,), 0.5), torch.full((count,), top_k), torch.full((count,), top_p)
        drawn = sample_filtered(logits.expand(count, -1), *rows, torch.full((count,), min_p), uniform)
        probs = (logits / 0.5).softmax(-1)
        order = probs.argsort(descending=True)
        order = order[probs[order] >= min_p * probs.max()]
        order = order[: top_k or len(order)]
        share = probs[order] / probs[order].sum()
        order = order[(share.cumsum(0) - share) < top_p]
        expected = (probs[order] / probs[order].sum()).double() * count
        counts = torch.bincount(drawn, minlength=7).double()
        assert int(counts[order].sum()) == count
        likely = expected > 5
        assert chi_square(counts[order][likely], expected[likely]) < 26


def test_penalties_equal_the_reference() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(6, 30, generator=generator)
    made = torch.randint(-3, 4, (6, 30), generator=generator).clamp(min=0).float()
    prompt = torch.rand(6, 30, generator=generator) < 0.3
    strengths = [4 * torch.rand(6, generator=generator) - 2 for _ in range(2)]
    repetition = torch.tensor([1.0, 1.3, 0.8, 2.0, 1.0, 1.1])
    penalised = penalise(logits, made, prompt, *strengths, repetition)
    torch.testing.assert_close(penalised, reference.penalise(logits, made, prompt, *strengths, repetition))
    untouched = penalise(logits, made, prompt, torch.zeros(6), torch.zeros(6), torch.ones(6))
    assert torch.equal(untouched, logits)


def test_bits_say_what_is_allowed() -> None:
    generator = torch.Generator().manual_seed(4)
    for vocabulary, words in ((64, 2), (70, 3), (90, 2), (33, 2), (5, 1)):
        logits = torch.randn(4, vocabulary, generator=generator)
        bits = torch.randint(-(2**31), 2**31, (4, words), generator=generator).int()
        left = allow(logits, bits)
        assert torch.equal(left, reference.allow(logits, bits))
        kept = left.isfinite()
        assert torch.equal(left[kept], logits[kept]) and 0 < int(kept.sum()) < kept.numel()
