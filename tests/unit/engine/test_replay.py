"""Recorded decoding gives the very bits of the model it was recorded from, and is dropped when that changes."""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.jit._trace import TracedModule

from twofold.base.records import Completion, InputError, Request, SamplingParams
from twofold.engine.engine import Engine
from twofold.engine.request import EngineOptions
from twofold.model.config import ModelConfig
from twofold.model.lora import LoraConfig, activate, attach
from twofold.model.quantised import KINDS, quantise_base, quantise_model
from twofold.model.qwen3 import Qwen3

BASE: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=256,
    tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip


def model_of(**changes: Any) -> Qwen3:
    model = Qwen3(ModelConfig(**BASE | changes))
    model.init_weights(0)
    return model


def requests(count: int, new: int = 24) -> list[Request]:
    params = SamplingParams(temperature=0.9, max_tokens=new, ignore_eos=True)
    return [
        Request(tuple(range(3 + i, 9 + 2 * i)), replace(params, seed=i, max_tokens=max(1, new - 2 * i)))
        for i in range(count)
    ]


def facts(completions: list[Completion]) -> list[tuple[list[int], list[float]]]:
    return [(completion.token_ids, completion.logprobs) for completion in completions]


def engine(model: Qwen3, after: int | None, block_size: int | None = None) -> Engine:
    return Engine(model, (0,), options=EngineOptions(replay_after=after, block_size=block_size, kv_bytes=2**22))


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": False, "qkv_bias": True}, {"tie_word_embeddings": False}, {"num_key_value_heads": 1}],
    ids=["qwen3", "qwen2.5", "untied", "one key head"],
)
def test_replayed_steps_give_the_same_bits(changes: dict[str, Any], block_size: int | None, count: int) -> None:
    model = model_of(**changes)
    plain, replayed = engine(model, None, block_size), engine(model, 2, block_size)
    for _ in range(2):  # the second time from the recording alone
        assert facts(replayed.generate(requests(count))) == facts(plain.generate(requests(count)))
        replayed.check_integrity()
    assert plain.replayed == 0
    # In blocks of 4, nine rows are more than one group at times; then they are run as ever.
    assert replayed.replayed > (0 if block_size and count > 1 else 20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_packed_weights_are_replayed(kind: str, count: int) -> None:
    model = model_of()
    quantise_model(model, kind)
    plain, replayed = engine(model, None), engine(model, 0)
    assert facts(replayed.generate(requests(count))) == facts(plain.generate(requests(count)))
    assert replayed.replayed == 0 if kind == "float32" else replayed.replayed >= 20


def test_hooks_are_called_at_every_step() -> None:
    model = model_of()
    replayed = engine(model, 0)
    replayed.generate(requests(2))
    calls: list[object] = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    replayed.generate(requests(2, new=8))
    hook.remove()
    assert len(calls) == 8


def test_attention_in_another_dtype_is_recorded_anew() -> None:
    model = model_of()
    replayed = engine(model, 0)
    replayed.generate(requests(2))
    model.set_attention_dtype(torch.float64)
    assert facts(replayed.generate(requests(2))) == facts(engine(model, None).generate(requests(2)))


def test_weights_changed_in_place_are_seen() -> None:
    model = model_of()
    replayed = engine(model, 0)
    before = facts(replayed.generate(requests(2)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    replayed.update_weights()
    after = facts(replayed.generate(requests(2)))
    assert after != before
    assert after == facts(engine(model, None).generate(requests(2)))


def test_other_modules_and_adapters_are_not_answered_from_an_old_recording() -> None:
    model = model_of()
    replayed = engine(model, 0)
    replayed.generate(requests(2))
    quantise_base(model, 8)
    assert facts(replayed.generate(requests(2))) == facts(engine(model, None).generate(requests(2)))
    attach(model, "a", LoraConfig(r=2, alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".a." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    steps = replayed.replayed
    assert facts(replayed.generate(requests(2))) == facts(engine(model, None).generate(requests(2)))
    assert replayed.replayed == steps, "adapters are not recorded"
    activate(model, None)
    assert facts(replayed.generate(requests(2))) == facts(engine(model, None).generate(requests(2)))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        {"sliding_window": 8, "max_window_layers": 1},
    ],
    ids=["experts", "window"],
)
def test_what_python_has_to_choose_is_run_as_ever(changes: dict[str, int]) -> None:
    model = model_of(**changes)
    replayed = engine(model, 0)
    assert facts(replayed.generate(requests(2))) == facts(engine(model, None).generate(requests(2)))
    assert replayed.replayed == 0


def test_a_recording_that_fails_is_said_once_and_decoding_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("this torch records no longer\nmore")

    monkeypatch.setattr(torch.jit, "trace", fail)
    model = model_of()
    replayed = engine(model, 0)
    with caplog.at_level(logging.WARNING, logger="twofold"):
        made = facts(replayed.generate(requests(2)))
        replayed.generate(requests(2))
    assert made == facts(engine(model, None).generate(requests(2)))
    assert [r.message for r in caplog.records] == [
        "decoding goes on unrecorded, and slower: torch.jit.trace: this torch records no longer"
    ]


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(InputError, match="replay_after must be >= 0 or None, got -1"):
        EngineOptions(replay_after=-1)


def test_ctrl_c_while_a_step_is_recorded_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ in torch's tracer asks traced modules for attributes and takes a KeyboardInterrupt for a missing one."""
    real, asked = TracedModule.__getattr__, []

    def pressed(module: TracedModule, name: str) -> Any:
        if not asked and sys._getframe(1).f_code.co_name == "infer_type":  # called by C++ that this one has called
            asked.append(name)
            signal.raise_signal(signal.SIGINT)
        return real(module, name)

    model = model_of()
    expected = facts(engine(model, None).generate(requests(1)))
    recorded = engine(model, 2)
    monkeypatch.setattr(TracedModule, "__getattr__", pressed)
    with pytest.raises(KeyboardInterrupt):
        recorded.generate(requests(1))
    assert asked
    recorded.check_integrity()
    assert not recorded.has_work
    assert facts(recorded.generate(requests(1))) == expected and recorded.replayed > 0
