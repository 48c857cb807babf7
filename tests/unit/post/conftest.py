"""A tiny policy with a real engine. A random model hardly ever ends its turn, so many tokens may end it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from twofold.engine.engine import Engine
from twofold.engine.sampling import ThinkTokens
from twofold.episodes.play import Trajectory
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.tasks.base import sample_items
from twofold.tasks.families import SumMod, default_families
from twofold.tasks.query import Query, single
from twofold.text.chat import Renderer
from twofold.text.parse import parse
from twofold.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    items = sample_items(default_families(), 60, 0, "train")
    texts = [text for item in items for text in (item.prompt, *item.traces, item.answer)]
    return Tokenizer.train([*texts, "user assistant calc 0123456789"], 384)


@pytest.fixture(scope="session")
def renderer(tokenizer: Tokenizer) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture
def make_engine(tokenizer: Tokenizer, renderer: Renderer) -> Callable[..., Engine]:
    """(seed=0, many_ends=True) -> an engine on a fresh random model; with many_ends=False no token ends a turn."""

    def make(seed: int = 0, many_ends: bool = True) -> Engine:
        model = Qwen3(
            ModelConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                rms_norm_eps=1e-6,
                rope_theta=1e4,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                initializer_range=0.1,
            )
        )
        model.init_weights(seed)
        assert tokenizer.think_open is not None and tokenizer.think_close is not None
        think = ThinkTokens(tokenizer.think_open, tokenizer.think_close, tuple(renderer.stop_ids))
        ends: Sequence[int] = range(0, tokenizer.vocab_size, 4) if many_ends else ()
        return Engine(model, ends, think)

    return make


@pytest.fixture(scope="session")
def queries() -> list[Query]:
    task = SumMod()
    return [single(item, task) for item in sample_items([task], 8, 1, "train")]


@pytest.fixture(scope="session")
def make_trajectory(renderer: Renderer) -> Callable[..., Trajectory]:
    """(query, reply text in the program's own spelling, truncated=False, **fields) -> a finished episode."""

    def make(query: Query, reply: str, truncated: bool = False, **fields: object) -> Trajectory:
        tools = query.tools.tools if query.tools else None
        prompt = renderer.prompt_ids(query.messages, tools, thinking=not query.hard_switch)
        ids = renderer.tokenizer.encode_with_special(reply)
        parsed = parse(renderer.tokenizer, ids, prompt)
        trajectory = Trajectory(
            query, len(prompt), prompt + ids, [False] * len(prompt) + [True] * len(ids),
            [0.0] * len(prompt) + [-1.0] * len(ids), [0.0] * len(prompt) + [0.5] * len(ids), parsed, parsed, truncated,
        )  # fmt: skip
        for name, value in fields.items():
            setattr(trajectory, name, value)
        return trajectory

    return make
