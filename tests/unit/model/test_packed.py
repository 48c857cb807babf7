"""Models packed for inference: what they compute, what stays in full precision, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from twofold.base.records import InputError
from twofold.model.attn_inputs import AttnInputs
from twofold.model.lora import LoraConfig, attach
from twofold.model.quantised import PackedWeight, QuantLinear, load_quantised, quantise_model
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import open_folder, save_weights
from twofold.ops import quant

pytestmark = pytest.mark.skipif(not quant.can_pack("cpu"), reason="needs an x86 processor")

Make = Callable[..., Qwen3]
LENGTHS = (13, 1, 20)


@torch.no_grad()
def logits(model: Qwen3) -> torch.Tensor:
    ids = torch.randint(0, 40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    places = torch.cat([torch.arange(n) for n in LENGTHS])
    hidden = model(ids, places, AttnInputs.packed([0, 13, 14, 34]))
    return model.logits(hidden)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("kind", get_args(quant.Kind))
def test_packed_models_compute_nearly_the_same(kind: str, moe: bool, make_model: Make) -> None:
    model = make_model(moe, tie_word_embeddings=not moe)
    before, router = (
        logits(model),
        [n for n, _ in model.named_parameters() if "norm" in n or n.endswith("mlp.gate.weight")],
    )
    quantise_model(model, kind)
    assert [n for n, p in model.named_parameters() if p.dtype == torch.float32 and "embed" not in n] == router
    assert isinstance(model.packed_head, QuantLinear)
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert len(packed) == 1 + 4 * model.config.num_hidden_layers
    limit = {"float32": 1e-5, "float16": 5e-3, "int8": 0.15}[kind]
    error = (logits(model) - before).abs().max() / before.abs().max()
    assert float(error) < limit and (kind == "float32" or float(error) > 0)


def test_float32_keeps_the_embedding_exact(make_model: Make) -> None:
    odd, released = make_model(), make_model()
    table = odd.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        released.model.embed_tokens.weight.copy_(table.bfloat16())
    quantise_model(odd, "float32")
    quantise_model(released, "float32")
    assert torch.equal(odd.model.embed_tokens.weight, table)
    assert released.model.embed_tokens.weight.dtype == torch.bfloat16  # half the memory, the same values


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("kind", get_args(quant.Kind))
def test_packing_while_reading_gives_the_same(kind: str, moe: bool, make_model: Make, tmp_path: Path) -> None:
    model = make_model(moe)
    save_weights(model, tmp_path)
    quantise_model(model, kind)
    assert torch.equal(logits(load_quantised(*open_folder(tmp_path), kind)), logits(model))


def test_the_head_may_stay(make_model: Make) -> None:
    model = make_model(tie_word_embeddings=True)
    quantise_model(model, head=False)
    assert model.packed_head is None and model.model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("head", [True, False])
def test_a_packed_model_is_not_saved_without_its_matrices(head: bool, make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    quantise_model(model, head=head)
    with pytest.raises(InputError, match="packed for inference cannot be saved"):
        save_weights(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_refusals(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot quantise to 'int3'; use one of int8, float16, float32"):
        quantise_model(make_model(), "int3")
    packed = make_model()
    quantise_model(packed)
    with pytest.raises(InputError, match="quantised already"):
        quantise_model(packed)
    adapted = make_model()
    attach(adapted, "one", LoraConfig(r=2))
    with pytest.raises(InputError, match="carries adapters"):
        quantise_model(adapted)
    weight = PackedWeight(torch.randn(8, 8), "int8")
    with pytest.raises(InputError, match="give no gradient"):
        weight.linear(torch.randn(2, 8, requires_grad=True))
    monkeypatch.setattr(quant, "can_pack", lambda _: False)
    with pytest.raises(InputError, match="x86 processors"):
        quantise_model(make_model(), "float16")
    elsewhere = make_model()
    before = logits(elsewhere)
    quantise_model(elsewhere)  # int8 without kernels: dequantised for each product
    assert float((logits(elsewhere) - before).abs().max() / before.abs().max()) < 0.1
