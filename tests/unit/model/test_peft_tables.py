"""Embedding and head in adapter files: saved whole or with LoRA, applied, given back, merged, or refused by name."""

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
from twofold.model.qwen3 import Qwen3

Make = Callable[..., Qwen3]
TOKENS = torch.arange(13) * 5 % 40
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


def logits(model: Qwen3) -> torch.Tensor:
    return model.logits(model(TOKENS, torch.arange(13), AttnInputs.packed([0, 13]))).detach()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.2


def written(model: Qwen3, folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter of rank 2 on q_proj, and further tensors and keys as PEFT writes them."""
    lora.attach(model, "a", LoraConfig(r=2, alpha=3, targets=("q_proj",)))
    peft_io.save_adapter(model, "a", folder)
    lora.detach(model, "a")
    save_file(load_file(folder / peft_io.WEIGHTS) | tensors, folder / peft_io.WEIGHTS)
    path = folder / peft_io.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize("factored", [False, True])
def test_tables_come_and_go_with_their_adapter(factored: bool, make_model: Make, tmp_path: Path) -> None:
    model, expected = (make_model(tie_word_embeddings=False) for _ in range(2))
    if factored:
        pairs = {"A": drawn(2, 40), "B": drawn(16, 2)}, {"A": drawn(2, 16), "B": drawn(40, 2)}
        tensors = {f"{EMBEDDING}.lora_embedding_{side}": t for side, t in pairs[0].items()}
        tensors |= {f"{HEAD}.lora_{side}.weight": t for side, t in pairs[1].items()}
        tensors[f"{EMBEDDING}.base_layer.weight"] = model.model.embed_tokens.weight.detach().clone()
        config: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
        with torch.no_grad():
            expected.model.embed_tokens.weight += (pairs[0]["B"] @ pairs[0]["A"]).T * 1.5
            expected.lm_head.weight += pairs[1]["B"] @ pairs[1]["A"] * 1.5
    else:
        tensors = {f"{EMBEDDING}.weight": drawn(40, 16), f"{HEAD}.weight": drawn(16, 40).T.contiguous()}
        config = {"modules_to_save": ["embed_tokens", "lm_head"]}
        with torch.no_grad():
            expected.model.embed_tokens.weight.copy_(tensors[f"{EMBEDDING}.weight"])
            expected.lm_head.weight.copy_(tensors[f"{HEAD}.weight"])
    plain = logits(model)
    peft_io.load_adapter(model, "b", written(model, tmp_path, tensors, **config))
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model), plain, atol=0.1)
    lora.activate(model, None)
    assert torch.equal(logits(model), plain)
    lora.activate(model, "b")
    peft_io.save_adapter(model, "b", tmp_path / "again")
    other = make_model(tie_word_embeddings=False)
    peft_io.load_adapter(other, "b", tmp_path / "again")
    assert torch.equal(logits(other), logits(model))
    lora.merge(model, "b")
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)


def test_tied_tables_are_one(make_model: Make, tmp_path: Path) -> None:
    """Both the same, tied by PEFT, or saved because the vocabulary grew: one table; else the model would be untied."""
    table, config = drawn(40, 16), {"modules_to_save": ["embed_tokens", "lm_head"]}
    both = {f"{EMBEDDING}.weight": table, f"{HEAD}.weight": table.clone()}
    alone = {f"{EMBEDDING}.weight": table}
    tied_by_peft = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    fine: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = [(both, config), (alone, {}), (alone, tied_by_peft)]
    for tensors, keys in fine:
        model = make_model()
        peft_io.load_adapter(model, "b", written(model, tmp_path, tensors, **keys))
        assert torch.equal(model.head_weight, table)
    apart = both | {f"{HEAD}.weight": table + 1}
    factors = {f"{EMBEDDING}.lora_embedding_A": drawn(2, 40), f"{EMBEDDING}.lora_embedding_B": drawn(16, 2)}
    wrong: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = [
        (apart, config),
        (alone, {"modules_to_save": ["embed_tokens"]}),
        ({f"{HEAD}.weight": table}, {"modules_to_save": ["lm_head"]}),
        (factors, {"target_modules": ["q_proj", "embed_tokens"]}),
    ]
    for tensors, keys in wrong:
        model = make_model()
        with pytest.raises(
            InputError, match=r"modules_to_save or LoRA factors .* one table; merge the adapter with PEFT"
        ):
            peft_io.load_adapter(model, "b", written(model, tmp_path, tensors, **keys))
        assert lora.adapters(model) == []


@pytest.mark.parametrize(
    ("tensors", "config", "train", "words"),
    [
        (
            {},
            {"modules_to_save": ["model.norm"]},
            False,
            "modules_to_save 'norm' is not supported, only embed_tokens and",
        ),
        (
            {},
            {"modules_to_save": ["lm_head"]},
            False,
            "no tensors for lm_head, which the adapter's configuration lists",
        ),
        ({}, {"target_modules": ["q_proj", "embed_tokens"]}, False, "no tensors for embed_tokens, which the adapter"),
        ({f"{HEAD}.weight": (41, 16)}, {}, False, r"rows of shape \(41, 16\) .* load the base that has these tokens"),
        ({f"{HEAD}.lora_A.weight": (2, 16)}, {}, False, "lm_head.lora_B.weight' is missing"),
        ({f"{HEAD}.lora_A.weight": (3, 16), f"{HEAD}.lora_B.weight": (40, 3)}, {}, False, "rank 2 on this model needs"),
        (
            {f"{HEAD}.lora_A.weight": (2, 16), f"{HEAD}.lora_B.weight": (40, 2)},
            {},
            True,
            "cannot be trained on; pass tr",
        ),
        ({f"{HEAD}.lora_magnitude_vector": (40,)}, {"use_dora": True}, False, "use_dora = True is not supported"),
    ],
)
def test_what_does_not_fit_is_named(
    tensors: dict[str, tuple[int, ...]],
    config: dict[str, Any],
    train: bool,
    words: str,
    make_model: Make,
    tmp_path: Path,
) -> None:
    model = make_model(tie_word_embeddings=False)
    written(model, tmp_path, {name: drawn(*shape) for name, shape in tensors.items()}, **config)
    with pytest.raises(InputError, match=words):
        peft_io.load_adapter(model, "b", tmp_path, train=train)
    assert lora.adapters(model) == []


def test_tables_can_be_trained_on(make_model: Make, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=False)
    tensors = {f"{EMBEDDING}.weight": drawn(40, 16), f"{HEAD}.weight": drawn(16, 40).T.contiguous()}
    written(model, tmp_path, tensors, modules_to_save=["embed_tokens", "lm_head"])
    peft_io.load_adapter(model, "b", tmp_path, train=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".rows")}
    assert len(trained) == 2
