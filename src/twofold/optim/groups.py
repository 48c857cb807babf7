"""Which parameters weight decay shrinks: matrices, and others where they are asked for by name.

A norm's scale or a bias that is pulled to zero is not regularised but wrong, and rows of an embedding that no text of a
batch touches would only fade. Not here: rates, which are a matter of the optimiser.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from twofold.base.config import Config

Group = Literal["matrices", "embeddings", "vectors"]
GROUPS: tuple[Group, ...] = ("matrices", "embeddings", "vectors")


class WeightDecay(Config):
    """Weight decay of each group of parameters; what is not named has none."""

    matrices: float = Field(default=0.0, ge=0)
    embeddings: float = Field(default=0.0, ge=0)
    vectors: float = Field(default=0.0, ge=0)


def group_of(name: str, dimensions: int) -> Group:
    """The group of a parameter by its name in Hugging Face's style and its number of dimensions.

    "vectors" are scales of norms (QK-norm too) and biases; "embeddings" the input table, tied to a head or not, and
    rows of new tokens; "matrices" all else: projections, experts, routers, factors of adapters, a head of its own.
    """
    if dimensions < 2:
        return "vectors"
    return "embeddings" if "embed_tokens" in name else "matrices"
