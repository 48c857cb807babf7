"""A base in few bits: what is swapped and what is not, and that the model is the one of the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from twofold.base.records import InputError
from twofold.model import lora
from twofold.model.attn_inputs import AttnInputs
from twofold.model.quantised import QuantWeight, plain, quantise_base, quantise_model, sites
from twofold.model.qwen3 import Qwen3
from twofold.ops import quant

Make = Callable[..., Qwen3]
WIDE = dict(hidden_size=64, intermediate_size=96, head_dim=16, moe_intermediate_size=32)
TOKENS = torch.arange(19) * 3 % 40


def logits(model: Qwen3) -> torch.Tensor:
    return model.logits(model(TOKENS, torch.arange(19), AttnInputs.packed([0, 12, 19])))


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_model_is_that_of_the_dequantised_weights(bits: int, moe: bool, make_model: Make) -> None:
    model, twin = (make_model(moe, **WIDE) for _ in range(2))
    before = dict(twin.named_parameters())
    names = quantise_base(model, bits, 32)
    original = logits(twin)
    for _, parent, attribute in sites(twin):
        setattr(parent, attribute, None)
    for (_, parent, attribute), (_, small, _) in zip(sites(twin), sites(model), strict=True):
        setattr(parent, attribute, plain(getattr(small, attribute), model.config, torch.float32))
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-4, rtol=1e-4)
    assert not torch.equal(logits(model), original) and len(names) == (6 if moe else 8)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    kept = [name for name, _ in model.named_parameters()]
    assert not any("proj" in name for name in kept) and sum("norm" in name for name in kept) == 9
    assert sum(name.endswith("mlp.gate.weight") for name in kept) == (2 if moe else 0), "routers are never quantised"
    for module in model.modules():
        if isinstance(module, QuantWeight):
            rows = module.dequantised(torch.float32).flatten(0, -2)
            assert bool((rows.abs().amax(-1) > 0).all()), "no zero tensor"


def test_biases_stay_and_count(make_model: Make) -> None:
    biases = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
    model, twin = (make_model(qk_norm=False, **biases, **WIDE) for _ in range(2))
    quantise_base(model, 8)
    bias = model.model.layers[0].self_attn.qkv_proj.bias
    assert torch.equal(bias, twin.model.layers[0].self_attn.qkv_proj.bias)
    error = (logits(model) - logits(twin)).norm() / logits(twin).norm()
    assert error.item() < 0.1
    lora.attach(model, "a", lora.LoraConfig(r=2))
    expected = logits(model)
    lora.merge(model, "a")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.model.layers[0].self_attn.qkv_proj.bias, bias)


def test_memory(make_model: Make) -> None:
    for bits, share in ((8, 0.27), (4, 0.145)):
        model = make_model(**WIDE)
        inside = sum(p.nbytes for n, p in model.named_parameters() if "proj" in n)
        quantise_base(model, bits, 32)
        small = sum(m.values.nbytes + m.scale.nbytes for m in model.modules() if isinstance(m, QuantWeight))
        assert small <= share * inside


def test_casting_the_model_leaves_the_scales_exact(make_model: Make) -> None:
    model = make_model(**WIDE)
    quantise_base(model, 4, 32)
    scales = [m.scale.clone() for m in model.modules() if isinstance(m, QuantWeight)]
    model.to(torch.bfloat16)
    for before, module in zip(scales, (m for m in model.modules() if isinstance(m, QuantWeight)), strict=True):
        assert module.scale.dtype == torch.float16 and torch.equal(module.scale, before)
    assert logits(model).isfinite().all()


def test_state_round_trip(make_model: Make) -> None:
    model, other = make_model(True, **WIDE), make_model(True, seed=5, **WIDE)
    for each in (model, other):
        quantise_base(each, 4, 32)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_what_cannot_be_quantised(make_model: Make) -> None:
    with pytest.raises(InputError, match="use 8, or 4 with 32, 64 or 128"):
        quantise_base(make_model(), 3)
    with pytest.raises(InputError, match="use 8, or 4 with"):
        quantise_base(make_model(), 4, 16)
    narrow = make_model()
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.qkv_proj has 16 inputs"):
        quantise_base(narrow, 4, 32)
    quantise_base(narrow, 8)
    with pytest.raises(InputError, match="quantised already"):
        quantise_base(narrow, 8)
    adapted = make_model()
    lora.attach(adapted, "a", lora.LoraConfig(r=2))
    with pytest.raises(InputError, match="carries adapters"):
        quantise_base(adapted, 8)


@pytest.mark.parametrize("moe", [False, True])
def test_adapters_learn_on_a_quantised_base(moe: bool, make_model: Make) -> None:
    model = make_model(moe, **WIDE)
    quantise_base(model, 4, 32)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "proj" in name}
    lora.attach(model, "a", lora.LoraConfig(r=4, alpha=8))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(logits(model)[:-1], TOKENS[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    state = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    assert base and all(torch.equal(state[name], tensor) for name, tensor in base.items())
    adapted = logits(model).detach()
    lora.merge(model, "a")
    assert not any(isinstance(m, QuantWeight | lora.LoraLinear | lora.LoraExperts) for m in model.modules())
    torch.testing.assert_close(logits(model), adapted, atol=1e-5 * float(adapted.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(("kind", "error"), [("float32", 1e-5), ("float16", 0.01), ("int8", 0.1)])
def test_adapters_on_a_packed_model(kind: quant.Kind, error: float, moe: bool, make_model: Make) -> None:
    whole, packed = (make_model(moe, tie_word_embeddings=moe, **WIDE) for _ in range(2))
    quantise_model(packed, kind)
    without = logits(whole)
    for model in (whole, packed):
        lora.attach(model, "a", lora.LoraConfig(r=4, alpha=8))
        for factor in lora.adapter_factors(model, "a").values():
            torch.nn.init.constant_(factor.lora_B, 0.1)
        lora.activate(model, "a")
    with torch.no_grad():
        adapted = logits(whole)
        assert float((adapted - without).norm() / adapted.norm()) > 0.2
        assert float((logits(packed) - adapted).norm() / adapted.norm()) < error
    with pytest.raises(InputError, match="cannot be merged into a model packed for inference; load it without"):
        lora.merge(packed, "a")
