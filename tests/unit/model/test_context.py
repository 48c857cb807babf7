"""Shares of a packed stream: every token once, documents apart, the attention of the whole stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.dist import Ranks
from twofold.base.records import InputError
from twofold.model import context
from twofold.model.attn_inputs import AttnInputs
from twofold.model.config import Context
from twofold.model.context import ContextInputs, chunk_places
from twofold.ops import reference


@settings(max_examples=40)
@given(tokens=st.integers(2, 60), ranks=st.integers(1, 6))
def test_every_token_has_one_rank_and_shares_are_even(tokens: int, ranks: int) -> None:
    if tokens < 2 * ranks:
        with pytest.raises(InputError, match=f"of {tokens} tokens cannot be shared among context={ranks}"):
            chunk_places(tokens, Ranks(0, ranks))
        return
    shares = [chunk_places(tokens, Ranks(rank, ranks)) for rank in range(ranks)]
    assert sorted(torch.cat(shares).tolist()) == list(range(tokens))
    assert max(map(len, shares)) - min(map(len, shares)) <= 2
    pairs = [int((share + 1).sum()) for share in shares]  # keys seen, in one long document
    assert max(pairs) - min(pairs) <= 2 * tokens


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    ranks=st.integers(1, 4),
    window=st.sampled_from([None, 3]),
)
def test_ranks_together_are_attention_of_the_whole_stream(lengths: list[int], ranks: int, window: int | None) -> None:
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    if edges[-1] < 2 * ranks:
        return
    generator = torch.Generator().manual_seed(len(lengths))
    q, k, v = (torch.randn(edges[-1], heads, 8, generator=generator) for heads in (4, 2, 2))
    expected = reference.packed_attention(q, k, v, edges, window)
    shares = [chunk_places(edges[-1], Ranks(rank, ranks)) for rank in range(ranks)]
    rows = max(map(len, shares))
    both = torch.cat((k, v), dim=1)

    def gathered(x: torch.Tensor, padded: int, group: Ranks) -> torch.Tensor:
        assert padded == rows and torch.equal(x, both[shares[group.rank]])
        out = torch.full((group.size * rows, *x.shape[1:]), float("nan"))  # padding must not be looked at
        for rank, share in enumerate(shares):
            out[rank * rows : rank * rows + len(share)] = both[share]
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "gathered", gathered)
        for rank, mine in enumerate(shares):
            inputs = ContextInputs.of(AttnInputs.packed(edges), mine, Ranks(rank, ranks))
            assert len(inputs.late) <= 2
            out = inputs.attend(0, q[mine], k[mine], v[mine], window)
            torch.testing.assert_close(out, expected[mine], atol=1e-5, rtol=1e-5)


def test_documents_are_coded_by_their_whole_length() -> None:
    def share(method: Any) -> ContextInputs:
        whole = AttnInputs.packed([0, 4, 24])
        coded = Context(native=8, target=32, method=method)
        return ContextInputs.of(whole, chunk_places(24, Ranks(1, 2)), Ranks(1, 2)).coded(coded, torch.ones(4))

    assert share("yarn").extended_T.tolist() == [True] * 12  # type: ignore[union-attr]
    with pytest.raises(InputError, match="Dual Chunk Attention do not go together"):
        share("dca")
