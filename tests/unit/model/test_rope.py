"""Position codes: YaRN's and Llama 3's published numbers, what they depend on and what they do not."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from twofold.model import rope
from twofold.model.config import Context

QWEN3 = Context(native=32768, target=131072)
CPU = torch.device("cpu")


def test_yarn_has_the_published_values_of_qwen3() -> None:
    coding = rope.frequencies(1e6, 128, QWEN3, CPU)
    assert rope.yarn_range(1e6, 128, QWEN3) == (23, 40)
    assert coding.factor == pytest.approx(1.1386294361, abs=1e-10)
    assert coding.factor**2 == pytest.approx(1.2964769928, abs=1e-9)
    values = {24: 0.005375321491, 31: 0.0008029597275, 40: 4.445698525e-05, 63: 3.102344402e-07}
    for pair, value in values.items():
        assert float(coding.extended[pair]) == pytest.approx(value, rel=1e-6)
    assert float(coding.native[24]) == pytest.approx(0.005623413252, rel=1e-6)
    assert torch.equal(coding.native[:24], coding.extended[:24])
    assert torch.equal(coding.native[40:] / 4, coding.extended[40:])


def test_a_given_attention_factor_and_betas_are_used() -> None:
    assert rope.attention_factor(Context(native=8, target=32, attention_factor=1.25)) == 1.25
    assert rope.attention_factor(Context(native=8, target=8)) == 1.0
    other = Context(native=32768, target=131072, beta_fast=16.0, beta_slow=2.0)
    low, high = rope.yarn_range(1e6, 128, other)
    assert low > 23 and high < 40
    assert not torch.equal(rope.frequencies(1e6, 128, other, CPU).extended, rope.yarn(_native(), 1e6, QWEN3))


def _native() -> torch.Tensor:
    return rope.inverse_frequencies(1e6, 128)


def test_a_ramp_of_no_width_is_a_step() -> None:
    narrow = Context(native=100, target=400)
    assert rope.yarn_range(1e6, 2, narrow) == (0, 1)
    flat = Context(native=6, target=24, beta_fast=1.0, beta_slow=1.0)
    assert rope.yarn_range(1e6, 8, flat) == (0, 0)
    native = rope.inverse_frequencies(1e6, 8)
    torch.testing.assert_close(rope.yarn(native, 1e6, flat), native / torch.tensor([1.0, 4, 4, 4]))


def test_llama3_keeps_short_waves_and_divides_long_ones() -> None:
    context = Context(native=8192, target=65536, method="llama3")  # Llama 3.1: factor 8
    coding = rope.frequencies(5e5, 128, context, CPU)
    rotations = 8192 * coding.native / (2 * torch.pi)
    fast, slow = rotations > 4, rotations < 1
    middle = ~(fast | slow)
    assert coding.factor == 1.0 and 0 < int(middle.sum()) < 64
    assert torch.equal(coding.extended[fast], coding.native[fast])
    assert torch.equal(coding.extended[slow], coding.native[slow] / 8)
    share = (rotations - 1) / 3
    between = share * coding.native + (1 - share) * coding.native / 8
    torch.testing.assert_close(coding.extended[middle], between[middle])


@pytest.mark.parametrize("method", ["yarn", "dca", "llama3"])
def test_memory_of_the_code_does_not_grow_with_the_target(method: str) -> None:
    for target in (2**15, 2**17, 2**20, 2**30):
        context = Context(native=2**15, target=target, method=method)
        coding = rope.frequencies(1e6, 128, context, CPU)
        assert coding.native.shape == coding.extended.shape == (64,)
        assert coding.native.dtype == coding.extended.dtype == torch.float32


def test_mixed_angles_give_native_tokens_the_very_numbers_of_plain_rope() -> None:
    coding = rope.frequencies(1e6, 128, QWEN3, CPU)
    positions = torch.tensor([0, 5, 70000, 32767, 5])
    extended = torch.tensor([False, False, True, False, True])
    mixed = rope.mixed_angles(positions, coding, extended, torch.float32)
    plain = rope.angles(positions, coding.native, torch.float32)
    stretched = rope.angles(positions, coding.extended, torch.float32)
    for got, short, long in zip(mixed, plain, stretched, strict=True):
        assert torch.equal(got[~extended], short[~extended])
        torch.testing.assert_close(got[extended], coding.factor * long[extended])
    half = rope.mixed_angles(positions, coding, extended, torch.bfloat16)
    assert torch.equal(half[0], mixed[0].bfloat16())  # angles are fp32 up to the cosine


def test_dual_chunk_sizes_and_what_is_refused() -> None:
    context = Context(native=32768, target=131072, method="dca")
    assert (context.dca_chunk_size, context.chunk_len) == (24576, 22528)
    given = Context(native=262144, target=1048576, method="dca", chunk_size=262144, local_window=8192)
    assert (given.dca_chunk_size, given.chunk_len) == (262144, 253952)
    for wrong in (dict(chunk_size=16, local_window=16), dict(chunk_size=65), dict(local_window=-1)):
        with pytest.raises(ValidationError, match="local_window < chunk_size <= native"):
            Context(native=64, target=128, method="dca", **wrong)
    with pytest.raises(ValidationError, match="low_freq_factor must be below"):
        Context(native=64, target=128, method="llama3", low_freq_factor=4.0)
    with pytest.raises(ValidationError, match="0 < native <= target"):
        Context(native=64, target=32)


def test_which_sequences_are_extended() -> None:
    assert [QWEN3.extends(n) for n in (1, 32768, 32769)] == [False, False, True]
    assert Context(native=8, target=16, static=True).extends(1)
    assert Context(native=8, target=16, method="llama3").extends(1)
