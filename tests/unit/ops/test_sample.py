"""Sampling: filters against the reference, counter-based numbers, and the distribution that is drawn from."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.ops import reference
from twofold.ops.sample import counter_uniform, filter_logits, sample


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    top_p=st.lists(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]), min_size=3, max_size=3),
)
def test_filter_logits_equals_the_reference(seed: int, top_k: list[int], top_p: list[float]) -> None:
    logits = 3 * torch.randn(3, 11, generator=torch.Generator().manual_seed(seed))
    limits = torch.tensor(top_k), torch.tensor(top_p)
    fast = filter_logits(logits, *limits)
    assert torch.equal(fast, reference.filter_logits(logits, *limits))
    assert torch.isfinite(fast).any(-1).all()  # something is always left
    kept = torch.isfinite(fast)
    assert torch.equal(fast[kept], logits[kept])


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
