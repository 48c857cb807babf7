"""Small models behind a really running server, for tests of the API: uvicorn in a thread of this process.

Not here: tests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from twofold.engine.engine import EngineOptions
from twofold.llm import LLM
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.recipes.pretrain import save_model
from twofold.serve.config import ServeConfig
from twofold.serve.server import Server
from twofold.serve.service import Service
from twofold.text.chat import CHAT_TEMPLATE, ChatPolicy
from twofold.text.tokenizer import Tokenizer

WORDS = "sum mod 10: E1 B5 user assistant calc 37*48 0123456789 /think /no_think weather city Rome Oslo true false"
TEXTS = [WORDS, CHAT_TEMPLATE] * 4
STOP_TEXT = "\nenough\n</think>\n\n"


def small_folder(folder: Path, seed: int = 4, context: int = 1024) -> Path:
    """A tiny random model with a trained tokenizer, as a Hugging Face folder."""
    tokenizer = Tokenizer.train(TEXTS, 700)
    model = Qwen3(
        ModelConfig(
            vocab_size=tokenizer.vocab_size + 6, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4,
            max_position_embeddings=context, tie_word_embeddings=True, initializer_range=0.3,
        )
    )  # fmt: skip
    model.init_weights(seed)
    save_model(model, tokenizer, folder)
    return folder


class Running:
    """A server that runs: its address, its parts, and an OpenAI client for it."""

    def __init__(self, server: Server, thread: threading.Thread, key: str) -> None:
        self.server, self.thread, self.service = server, thread, server.service
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.base}/v1", api_key=key, max_retries=0, timeout=60)

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.service.name

    def chat(self, text: str = "sum E1", **options: Any) -> Any:
        """One chat by the official client; unknown options go into its ``extra_body``."""
        options.setdefault("messages", [{"role": "user", "content": text}])
        options.setdefault("max_tokens", 24)
        return self.client.chat.completions.create(model=self.name, **options)

    def idle(self) -> bool:
        """Nothing runs, nothing waits, no block is held."""
        engine = self.service.llm.engine
        counters = engine.counters
        return not engine.has_work and counters.running == counters.waiting == counters.blocks_used == 0

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        """Raise AssertionError if the engine is not idle and whole by then; until then it may be in mid-step."""
        end, engine = time.monotonic() + seconds, self.service.llm.engine
        while True:
            try:
                assert self.idle(), f"still busy: {engine.counters}"
                engine.check_integrity()
                return
            except AssertionError:
                if time.monotonic() >= end:
                    raise
            time.sleep(0.01)


@contextmanager
def running(
    folder: Path, family: str = "hybrid", key: str = "unused", max_rows: int = 16, **settings: Any
) -> Iterator[Running]:
    """A server for a model folder; ``settings`` are fields of ``ServeConfig``."""
    policy = ChatPolicy(family=family, stop_text=STOP_TEXT)
    llm = LLM(folder, policy=policy, max_rows=max_rows, options=EngineOptions(kv_bytes=2**22, entropies=False))
    server = Server(Service(llm, ServeConfig(**settings)), port=0, log_level="warning")
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield Running(server, thread, key)
    finally:
        server.begin_shutdown()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return small_folder(tmp_path_factory.mktemp("served") / "tiny-model")


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[Running]]:
    """``running``, for tests."""
    return running


@pytest.fixture(scope="module")
def hybrid(served_folder: Path, serving: Any) -> Iterator[Running]:
    with serving(served_folder) as server:
        yield server
        server.wait_until_idle()


@pytest.fixture(scope="module")
def thinker(served_folder: Path, serving: Any) -> Iterator[Running]:
    """A model that always thinks: its prompts end inside a think block."""
    with serving(served_folder, family="thinking") as server:
        yield server
        server.wait_until_idle()
