"""Embedding vectors and relevance scores from the same causal model, as Qwen3-Embedding and Qwen3-Reranker define them.

A text's vector is the final hidden state of its last token; a document's relevance is the probability of "yes" against
"no" after a question about it (arXiv 2506.05176). Texts are packed end to end, so nothing is padded, and a text's
result depends on its batch mates by no more than rounding.
Not here: how texts become tokens (``text/retrieval.py``), indexes, training.

Shape legend: S sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from twofold.base.batch import boundaries, positions
from twofold.base.records import InputError
from twofold.model.attn_inputs import AttnInputs
from twofold.model.qwen3 import Qwen3

Tokens = Sequence[Sequence[int]]


@torch.no_grad()
def embed(
    model: Qwen3, token_lists: Tokens, dimensions: int | None = None, tokens_per_batch: int = 16384
) -> torch.Tensor:
    """Vectors of length 1, fp32 [S, dimensions]; dot products are cosines.

    Args:
        token_lists: texts that end with the token at which the model was trained to give its vector.
        dimensions: keep that many leading components (Matryoshka); None keeps all of them.

    Raises:
        InputError: an empty text, or more dimensions than the model has.
    """
    width = model.config.hidden_size
    kept = width if dimensions is None else dimensions
    if not isinstance(kept, int) or not 0 < kept <= width:
        message = f"dimensions must be a whole number in 1..{width} for this model, got {dimensions}"
        raise InputError(message, field="dimensions")
    states = [state_SD[:, :kept].float() for state_SD in _last_states(model, token_lists, tokens_per_batch)]
    return F.normalize(torch.cat(states), dim=-1) if states else torch.zeros(0, kept)


@torch.no_grad()
def relevance(
    model: Qwen3, token_lists: Tokens, yes_id: int, no_id: int, tokens_per_batch: int = 16384
) -> torch.Tensor:
    """Probability of ``yes_id`` against ``no_id`` as the next token of each prompt, fp32 [S].

    Raises:
        InputError: an empty prompt.
    """
    states = list(_last_states(model, token_lists, tokens_per_batch))
    return model.logits(torch.cat(states), [no_id, yes_id]).softmax(-1)[:, 1] if states else torch.zeros(0)


def _last_states(model: Qwen3, token_lists: Tokens, tokens_per_batch: int) -> Iterator[torch.Tensor]:
    """Final hidden states [S, D] of the last tokens, batch after batch in the order given."""
    batch: list[Sequence[int]] = []
    for index, tokens in enumerate(token_lists):
        if not tokens:
            raise InputError(f"text {index} has no tokens; end every text with the tokenizer's end token")
        batch.append(tokens)
        if sum(map(len, batch)) >= tokens_per_batch or index == len(token_lists) - 1:
            lengths = [len(sequence) for sequence in batch]
            device = model.model.embed_tokens.weight.device
            flat_T = torch.tensor([token for sequence in batch for token in sequence], device=device)
            cu = boundaries(lengths)
            hidden_TD = model(flat_T, positions(lengths).to(device), AttnInputs.packed(cu, device))
            yield hidden_TD[torch.tensor(cu[1:], device=device) - 1]
            batch = []
