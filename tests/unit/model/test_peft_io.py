"""Adapter folders without PEFT: round trips, names on disk, and one line for everything that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from twofold.base.records import InputError
from twofold.model import lora, peft_io
from twofold.model.attn_inputs import AttnInputs
from twofold.model.lora import LoraConfig
from twofold.model.quantised import quantise_base
from twofold.model.qwen3 import Qwen3
from twofold.model.vocab import keep_new_rows, train_new_rows, trained_rows

Make = Callable[..., Qwen3]
TOKENS = torch.arange(13) * 5 % 40
FUSED = LoraConfig(r=2, targets=("v_proj", "gate_up_proj", "down_proj"))
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def logits(model: Qwen3) -> torch.Tensor:
    return model.logits(model(TOKENS, torch.arange(13), AttnInputs.packed([0, 13]))).detach()


def adapted(model: Qwen3, config: LoraConfig | None = None) -> Qwen3:
    lora.attach(model, "a", config or LoraConfig(r=3, alpha=5))
    generator = torch.Generator().manual_seed(1)
    for factor in lora.adapter_factors(model, "a").values():
        torch.nn.init.normal_(factor.lora_B, std=0.3, generator=generator)
    return model


@pytest.mark.parametrize(
    ("moe", "config", "per_expert"),
    [
        (False, LoraConfig(r=3, alpha=2.5, rslora=True), False),
        (True, LoraConfig(r=3, targets=("q_proj", "up_proj", "gate")), False),
        (True, FUSED, False),
        (True, FUSED, True),
    ],
)
def test_round_trip(moe: bool, config: LoraConfig, per_expert: bool, make_model: Make, tmp_path: Path) -> None:
    model = adapted(make_model(moe), config)
    peft_io.save_adapter(model, "a", tmp_path, base="some/base", per_expert=per_expert)
    other = make_model(moe)
    peft_io.load_adapter(other, "b", tmp_path, train=True)
    torch.testing.assert_close(logits(other), logits(model), atol=1e-5, rtol=1e-5)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, _ in other.named_parameters() if ".adapters.b." in n
    }
    if not per_expert:
        peft_io.save_adapter(other, "b", tmp_path / "again", base="some/base")
        for name in (peft_io.CONFIG, peft_io.WEIGHTS):
            assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_names_and_configuration_on_disk(make_model: Make, tmp_path: Path) -> None:
    peft_io.save_adapter(adapted(make_model()), "a", tmp_path, base="Qwen/Qwen3-0.6B")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config | dict(
        peft_type="LORA", task_type="CAUSAL_LM", r=3, lora_alpha=5, lora_dropout=0.0, bias="none",
        base_model_name_or_path="Qwen/Qwen3-0.6B", target_modules=sorted(lora.DEFAULT_TARGETS),
    ) == config  # fmt: skip
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[Q0].shape == (3, 16) and len(tensors) == 28
    peft_io.save_adapter(adapted(make_model(True), FUSED), "a", tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / "adapter_config.json").read_text())["target_parameters"] == [
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
    ]
    peft_io.save_adapter(adapted(make_model(True), FUSED), "a", tmp_path / "each", per_expert=True)
    each = load_file(tmp_path / "each" / "adapter_model.safetensors")
    assert each["base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight"].shape == (10, 2)
    assert "base_model.model.model.layers.1.mlp.experts.lora_A.weight" not in each


def test_a_merged_adapter_is_not_applied_again(make_model: Make, tmp_path: Path) -> None:
    model = adapted(make_model())
    expected = logits(model)
    peft_io.save_adapter(model, "a", tmp_path, base="some/base")
    lora.merge(model, "a")
    with pytest.raises(
        InputError, match=r"safetensors: .*or is merged into these already; load its base \(some/base\)"
    ):
        peft_io.load_adapter(model, "a", tmp_path)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert lora.adapters(model) == []
    peft_io.load_adapter(model, "a", tmp_path, same_base=False)
    with pytest.raises(InputError, match="carries an adapter 'a' already"):
        peft_io.load_adapter(model, "a", tmp_path, same_base=False)


def test_same_base_in_another_dtype_or_quantised_is_no_other_base(make_model: Make, tmp_path: Path) -> None:
    sizes = dict(hidden_size=32, intermediate_size=64, head_dim=8)
    peft_io.save_adapter(adapted(make_model(**sizes)), "a", tmp_path)
    peft_io.load_adapter(make_model(**sizes).to(torch.bfloat16), "a", tmp_path)
    small = make_model(**sizes)
    quantise_base(small, 4, 32)
    peft_io.load_adapter(small, "a", tmp_path)
    peft_io.save_adapter(small, "a", tmp_path / "from_small")
    peft_io.load_adapter(make_model(**sizes), "a", tmp_path / "from_small")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / peft_io.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / peft_io.WEIGHTS)


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / peft_io.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_for_another_base(make_model: Make, tmp_path: Path) -> None:
    peft_io.save_adapter(adapted(make_model()), "a", tmp_path, base="some/base")
    for changes, words in (
        (dict(hidden_size=20), r"tensor '\S+' has shape \(16, 3\), rank 3 on this model needs \(20, 3\); .* some/base"),
        (dict(num_hidden_layers=1), r"layers\.1\.\S+' has no counterpart here; this model can adapt .* in 1 layers"),
        (dict(num_hidden_layers=3), r"no tensors for model\.layers\.2\.mlp\.down_proj"),
        (dict(moe=True), r"layers\.0\.mlp\.\S+' has no counterpart here"),
    ):
        model = make_model(**changes)
        names = list(model.state_dict())
        with pytest.raises(InputError, match=rf"adapter_model\.safetensors: .*{words}"):
            peft_io.load_adapter(model, "a", tmp_path)  # the same words for files of ours and of PEFT
        assert list(model.state_dict()) == names, "a refused adapter leaves the model as it was"
    peft_io.save_adapter(adapted(make_model(True)), "a", tmp_path)
    for experts in (3, 6):
        with pytest.raises(InputError, match=rf"this model has {experts}; wrong base"):
            peft_io.load_adapter(make_model(True, num_experts=experts), "a", tmp_path, same_base=False)


def test_damaged_and_incomplete_folders(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(InputError, match="is not an adapter folder"):
        peft_io.load_adapter(model, "a", tmp_path)
    peft_io.save_adapter(adapted(make_model()), "a", tmp_path)
    for change, words in (
        (lambda t: t.pop(Q0), f"'{Q0}' is missing"),
        (lambda t: [t.pop(Q0), t.pop(Q0.replace("_A", "_B"))], r"no tensors for model\.layers\.0\.self_attn\.q_proj"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(1)}),
            "'base_model.model.lm_head.weight' is",
        ),
        (lambda t: t.update({Q0: torch.ones(4, 16)}), r"has shape \(4, 16\), rank 3"),
    ):
        peft_io.save_adapter(adapted(make_model()), "a", tmp_path)
        rewrite(tmp_path, change)
        with pytest.raises(InputError, match=words):
            peft_io.load_adapter(model, "a", tmp_path)
    whole = (tmp_path / peft_io.WEIGHTS).read_bytes()
    (tmp_path / peft_io.WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is damaged"):
        peft_io.load_adapter(model, "a", tmp_path)
    (tmp_path / peft_io.WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        peft_io.load_adapter(model, "a", tmp_path)
    (tmp_path / peft_io.CONFIG).write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json is damaged"):
        peft_io.load_adapter(model, "a", tmp_path)
    assert lora.adapters(model) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"some_new_feature": 3}, "some_new_feature = 3 is not supported"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base as well"),
        ({"r": None}, "r is missing"),
        ({"target_modules": ["q_proj", "c_attn"]}, "target 'c_attn' is no module of this model"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2 on this model needs"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], words: str, make_model: Make, tmp_path: Path) -> None:
    peft_io.save_adapter(adapted(make_model()), "a", tmp_path)
    change_config(tmp_path, changes)
    with pytest.raises(InputError, match=words):
        peft_io.load_adapter(make_model(), "a", tmp_path)


def test_dropout_is_for_inference_only(make_model: Make, tmp_path: Path) -> None:
    peft_io.save_adapter(adapted(make_model()), "a", tmp_path)
    change_config(tmp_path, {"lora_dropout": 0.05})
    peft_io.load_adapter(make_model(), "a", tmp_path)
    with pytest.raises(InputError, match="lora_dropout is not supported in training"):
        peft_io.load_adapter(make_model(), "a", tmp_path, train=True)


def with_rows(model: Qwen3, first: int = 30, count: int = 3) -> Qwen3:
    """An adapter with rows of tokens in training."""
    train_new_rows(adapted(model), first, count)
    with torch.no_grad():
        for each in trained_rows(model):
            each.own.add_(1.0)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_rows_of_tokens_are_part_of_the_adapter(tied: bool, kept: bool, make_model: Make, tmp_path: Path) -> None:
    plain, model = (make_model(tie_word_embeddings=tied) for _ in range(2))
    with_rows(model)
    if kept:
        keep_new_rows(model)
    peft_io.save_adapter(model, "a", tmp_path)
    other = make_model(tie_word_embeddings=tied)
    peft_io.load_adapter(other, "b", tmp_path)
    lora.attach(other, "c", LoraConfig(r=2))
    assert torch.equal(other.head_weight, plain.head_weight), "another adapter is active"
    peft_io.save_adapter(other, "b", tmp_path / "again")
    peft_io.save_adapter(other, "c", tmp_path / "without")
    assert "trainable_token_indices" not in json.loads((tmp_path / "without" / peft_io.CONFIG).read_text())
    for name in (peft_io.CONFIG, peft_io.WEIGHTS):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    lora.activate(other, "b")
    assert torch.equal(logits(other), logits(model))
    lora.activate(other, None)
    assert torch.equal(logits(other), logits(plain))
    lora.detach(other, "c")
    lora.merge(other, "b")
    torch.testing.assert_close(logits(other), logits(model), atol=1e-4, rtol=1e-4)


def test_rows_are_trained_on_with_their_adapter(make_model: Make, tmp_path: Path) -> None:
    model = with_rows(make_model())
    peft_io.save_adapter(model, "a", tmp_path)
    other = make_model()
    peft_io.load_adapter(other, "a", tmp_path, train=True)
    assert torch.equal(logits(other), logits(model))
    (rows,) = [p for n, p in other.named_parameters() if p.requires_grad and n.endswith(".rows")]
    rows.data += 1.0
    peft_io.save_adapter(other, "a", tmp_path / "more")
    saved = load_file(tmp_path / "more" / peft_io.WEIGHTS)[ROWS]
    torch.testing.assert_close(saved, load_file(tmp_path / peft_io.WEIGHTS)[ROWS] + 1)
    change_config(tmp_path, {"trainable_token_indices": {"embed_tokens": [3, 30, 31]}})
    with pytest.raises(InputError, match=r"rows of tokens that are not one run, .* pass train=False"):
        peft_io.load_adapter(make_model(), "a", tmp_path, train=True)


def test_refused_rows_leave_the_model_as_it_was(make_model: Make, tmp_path: Path) -> None:
    peft_io.save_adapter(with_rows(make_model()), "a", tmp_path)
    model = adapted(make_model())
    before = logits(model)
    with pytest.raises(InputError, match="carries an adapter 'a' already"):
        peft_io.load_adapter(model, "a", tmp_path)
    change_config(tmp_path, {"trainable_token_indices": [30, 31]})
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: rows of shape \(3, 16\) .* do not fit"):
        peft_io.load_adapter(model, "b", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(ROWS))
    for listed in ([30, 31], {"embed_tokens": [30, 31]}):
        change_config(tmp_path, {"trainable_token_indices": listed})
        with pytest.raises(InputError, match=r"no rows for embed_tokens, for which adapter_config\.json lists"):
            peft_io.load_adapter(model, "b", tmp_path)
    assert torch.equal(logits(model), before) and lora.adapters(model) == ["a"]
