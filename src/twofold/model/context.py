"""Context parallel attention: ranks share the tokens of a packed stream, keys and values are gathered for each layer.

The stream is cut into 2 R chunks; rank r has chunk r and chunk 2 R - 1 - r, so that early and late queries, which see
few and many keys, are spread evenly. Documents stay apart as in ``AttnInputs``. Memory for activations falls with the
ranks, that for one layer's keys and values does not. Not here: Dual Chunk Attention, rings.

Shape legend: T tokens of the stream, U those of this rank, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from twofold.base.dist import Ranks
from twofold.base.records import InputError
from twofold.model.attn_inputs import AttnInputs
from twofold.model.config import Context
from twofold.model.exchange import gathered
from twofold.ops import attention as ops


def chunk_places(tokens: int, ranks: Ranks, rank: int | None = None) -> torch.Tensor:
    """Places in the stream that a rank has (by default this one), ascending, int64 [U].

    Raises:
        InputError: fewer tokens than chunks.
    """
    rank, chunks = ranks.rank if rank is None else rank, 2 * ranks.size
    if tokens < chunks:
        raise InputError(
            f"a micro-batch of {tokens} tokens cannot be shared among context={ranks.size} ranks; lower context"
        )
    edges = [tokens * chunk // chunks for chunk in range(chunks + 1)]
    return torch.cat([torch.arange(edges[c], edges[c + 1]) for c in (rank, chunks - 1 - rank)])


@dataclass(frozen=True)
class _Late:
    """A run of own tokens, ``first`` to ``last``, that begins inside a document: keys ``begin`` to ``end`` are seen."""

    first: int
    last: int
    begin: int
    end: int


@dataclass(frozen=True)
class ContextInputs:
    """AttnInputs of a rank's share of a packed stream.

    whole: of the stream. mine_U: places of own tokens. place_T: where a token of the stream lies among gathered rows.
    plan: of runs that begin with their document (``early_U``); late: of the others, two at most.
    """

    whole: AttnInputs
    mine_U: torch.Tensor
    place_T: torch.Tensor
    rows: int
    ranks: Ranks
    early_U: torch.Tensor
    plan: ops.PackedPlan | None
    late: tuple[_Late, ...]

    @classmethod
    def of(cls, whole: AttnInputs, mine_U: torch.Tensor, ranks: Ranks) -> ContextInputs:
        """The share of ``whole``, an AttnInputs without a cache, that has the places ``mine_U``."""
        tokens, device = whole.cu_seqlens[-1], mine_U.device
        shares = [chunk_places(tokens, ranks, rank) for rank in range(ranks.size)]
        rows = max(len(share) for share in shares)
        place_T = torch.empty(tokens, dtype=torch.int64)
        for rank, share in enumerate(shares):
            place_T[share] = rank * rows + torch.arange(len(share))
        early, lengths, late = _runs(mine_U.tolist(), whole.cu_seqlens)
        edges = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
        plan = ops.plan_packed(edges, device) if lengths else None
        early_U = torch.tensor(early, dtype=torch.int64, device=device)
        return cls(whole, mine_U, place_T.to(device), rows, ranks, early_U, plan, tuple(late))

    def coded(self, context: Context, inv_freq: torch.Tensor) -> ContextInputs:
        """As ``AttnInputs.coded``: documents decide by their whole length.

        Raises:
            InputError: Dual Chunk Attention.
        """
        whole = self.whole.coded(context, inv_freq)
        if whole.chunks is not None:
            raise InputError("context parallelism and Dual Chunk Attention do not go together; use context=1 or YaRN")
        return replace(self, whole=whole)

    @property
    def chunks(self) -> None:
        return None

    @property
    def extended_T(self) -> torch.Tensor | None:
        """Which own tokens are coded beyond the native length."""
        flags_T = self.whole.extended_T
        return None if flags_T is None else flags_T[self.mine_U]

    def attend(
        self, layer: int, q_UNH: torch.Tensor, k_UKH: torch.Tensor, v_UKH: torch.Tensor, window: int | None = None
    ) -> torch.Tensor:
        """Own queries against the keys of all ranks, [U, N, H]."""
        both = gathered(torch.cat((k_UKH, v_UKH), dim=1), self.rows, self.ranks)
        k_TKH, v_TKH = both.index_select(0, self.place_T).chunk(2, dim=1)
        out_UNH = torch.zeros_like(q_UNH)
        if self.plan is not None:
            stream = self.mine_U[self.early_U]
            early = ops.packed_attention(q_UNH[self.early_U], k_TKH[stream], v_TKH[stream], self.plan, window)
            out_UNH = out_UNH.index_copy(0, self.early_U, early)
        for run in self.late:
            place = torch.arange(run.first, run.last, device=q_UNH.device)
            out = _late(q_UNH[place], k_TKH[run.begin : run.end], v_TKH[run.begin : run.end], window)
            out_UNH = out_UNH.index_copy(0, place, out)
        return out_UNH


def _runs(mine: list[int], cu_seqlens: list[int]) -> tuple[list[int], list[int], list[_Late]]:
    """Own tokens of runs that begin with their document, the lengths of those runs, and the other runs."""
    early: list[int] = []
    lengths: list[int] = []
    late: list[_Late] = []
    first = 0
    document = 0
    while first < len(mine):
        while cu_seqlens[document + 1] <= mine[first]:
            document += 1
        begin, end = cu_seqlens[document], cu_seqlens[document + 1]
        last = first + 1
        while last < len(mine) and mine[last] == mine[last - 1] + 1 and mine[last] < end:
            last += 1
        if mine[first] == begin:
            early += range(first, last)
            lengths.append(last - first)
        else:
            late.append(_Late(first, last, begin, mine[last - 1] + 1))
        first = last
    return early, lengths, late


def _late(q_QNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor, window: int | None) -> torch.Tensor:
    """The last Q of L positions of one document."""
    queries, keys = len(q_QNH), len(k_LKH)
    at_Q = torch.arange(keys - queries, keys, device=q_QNH.device)
    distance_QL = at_Q[:, None] - torch.arange(keys, device=q_QNH.device)[None]
    visible = distance_QL >= 0 if window is None else (distance_QL >= 0) & (distance_QL < window)
    q, k, v = (t.transpose(0, 1)[None] for t in (q_QNH, k_LKH, v_LKH))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out[0].transpose(0, 1)
