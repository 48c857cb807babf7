"""Adapters: nothing changes at first, only factors train, several on one base, merging equals applying."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from twofold.base.records import InputError
from twofold.model import lora
from twofold.model.attn_inputs import AttnInputs
from twofold.model.lora import LoraConfig
from twofold.model.qwen3 import Qwen3
from twofold.ops import reference

Make = Callable[..., Qwen3]
TOKENS = torch.arange(21) * 5 % 40


def logits(model: Qwen3) -> torch.Tensor:
    return model.logits(model(TOKENS, torch.arange(21), AttnInputs.packed([0, 8, 21])))


def fill(model: Qwen3, name: str, seed: int = 1) -> None:
    """Give the factors B values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for factor in lora.adapter_factors(model, name).values():
        torch.nn.init.normal_(factor.lora_B, std=0.3, generator=generator)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5 * other.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("moe", [False, True])
def test_a_new_adapter_changes_nothing_and_alone_is_trained(moe: bool, make_model: Make) -> None:
    model = make_model(moe, tie_word_embeddings=False)
    before = logits(model)
    lora.attach(model, "a", LoraConfig(r=3))
    close(logits(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".adapters.a." in name
    }
    logits(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".adapters." not in name), name
    factors = lora.adapter_factors(model, "a")
    assert len(factors) == 14 and not any(path.endswith("mlp.gate") for path in factors)
    for path, factor in factors.items():
        bound = factor.lora_A.shape[-1] ** -0.5
        assert bool((factor.lora_A.abs() <= bound).all()) and factor.lora_A.abs().max().item() > 0.8 * bound, path
        assert not factor.lora_B.any() and factor.lora_B.grad is not None and factor.lora_B.grad.any(), path


@pytest.mark.parametrize(
    ("moe", "config"),
    [
        (False, LoraConfig(r=3, alpha=5)),
        (False, LoraConfig(r=4, alpha=2, rslora=True, targets=("k_proj", "up_proj"))),
        (True, LoraConfig(r=2, alpha=4)),
        (True, LoraConfig(r=2, alpha=4, targets=("gate", "up_proj"))),
        (True, LoraConfig(r=2, alpha=4, targets=("gate_up_proj", "down_proj"))),
    ],
)
def test_merging_equals_applying_and_leaves_a_plain_model(moe: bool, config: LoraConfig, make_model: Make) -> None:
    model = make_model(moe)
    names, before = list(model.state_dict()), logits(model).detach()
    lora.attach(model, "a", config)
    fill(model, "a")
    adapted = logits(model).detach()
    assert float((adapted - before).abs().max()) > 0.05 * float(before.abs().max())
    lora.merge(model, "a")
    close(logits(model), adapted)
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match="no adapter 'a' is attached; attached are: none"):
        lora.merge(model, "a")


def test_alpha_is_a_number() -> None:
    with pytest.raises(ValueError, match="finite number"):
        LoraConfig(alpha=float("nan"))


def test_the_update_is_alpha_over_r_times_B_A_on_the_rows_of_its_part(make_model: Make) -> None:
    model, twin = make_model(), make_model()
    lora.attach(model, "a", LoraConfig(r=2, alpha=6, targets=("v_proj",)))
    fill(model, "a")
    for index, layer in enumerate(twin.model.layers):
        factor = lora.adapter_factors(model, "a")[f"model.layers.{index}.self_attn.v_proj"]
        layer.self_attn.qkv_proj.weight.data[24 + 12 :] += 3 * factor.lora_B.data @ factor.lora_A.data
    close(logits(model), logits(twin))
    assert lora.LowRank(torch.ones(4, 2), torch.ones(2, 4), 6, True).scale == 3


def test_experts_against_merged_weights_and_the_reference_forward_and_backward(make_model: Make) -> None:
    model = make_model(True)
    lora.attach(model, "a", LoraConfig(r=3, alpha=6, targets=("gate_proj", "up_proj", "down_proj")))
    fill(model, "a")
    experts = model.model.layers[0].mlp.experts
    f = {path.rpartition(".")[2]: x for path, x in lora.adapter_factors(model, "a").items() if "layers.0" in path}
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _, weights_Tk, ids_Tk = reference.route(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)), 2, True)
    halves = [f[part].lora_B @ f[part].lora_A * f[part].scale for part in ("gate_proj", "up_proj", "down_proj")]
    merged = experts.base.gate_up_proj + torch.cat(halves[:2], 1), experts.base.down_proj + halves[2]
    inputs = [x, *(p for part in f.values() for p in (part.lora_A, part.lora_B))]
    results = [
        (out, *torch.autograd.grad(out.square().sum(), inputs))
        for out in (experts(x, weights_Tk, ids_Tk), reference.moe(x, weights_Tk, ids_Tk, *merged))
    ]
    for ours, expected in zip(*results, strict=True):
        close(ours, expected)


@pytest.mark.parametrize("moe", [False, True])
def test_several_adapters_on_one_base_one_active_at_a_time(moe: bool, make_model: Make) -> None:
    model = make_model(moe)
    before = logits(model).detach()
    alone = {}
    for name, config in (("a", LoraConfig(r=2)), ("b", LoraConfig(r=3, targets=("q_proj",)))):
        single = make_model(moe)
        lora.attach(single, name, config)
        fill(single, name)
        alone[name] = logits(single).detach()
        lora.attach(model, name, config)
        fill(model, name)
    assert lora.adapters(model) == ["a", "b"]
    for name in ("a", "b", "a"):
        lora.activate(model, name, train=name == "b")
        close(logits(model), alone[name])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in model.named_parameters() if ".adapters.b." in n and name == "b"}
    lora.activate(model, None)
    assert torch.equal(logits(model), before)
    lora.activate(model, "a")
    with pytest.raises(InputError, match="detach b before merging 'a'"):
        lora.merge(model, "a")
    lora.detach(model, "b")
    close(logits(model), alone["a"])
    lora.detach(model, "a")
    assert torch.equal(logits(model), before) and all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(make_model(moe).state_dict())


def test_a_detached_adapter_is_no_longer_active_anywhere(make_model: Make) -> None:
    model = make_model()
    lora.attach(model, "a", LoraConfig(r=2, targets=("down_proj",)))
    fill(model, "a")
    alone = logits(model)
    lora.attach(model, "b", LoraConfig(r=2, targets=("q_proj",)))
    assert model.adapters.active is model.adapters.named["b"]
    lora.detach(model, "b")
    assert model.adapters.active is None and lora.adapters(model) == ["a"]
    lora.activate(model, "a")
    close(logits(model), alone)
    lora.merge(model, "a")
    assert model.adapters.active is None and lora.adapters(model) == []


def test_a_resumed_state_applies_the_adapter_once(make_model: Make) -> None:
    model = make_model()
    lora.attach(model, "a", LoraConfig(r=2))
    fill(model, "a")
    expected = logits(model).detach()
    resumed = make_model(seed=4)
    lora.attach(resumed, "a", LoraConfig(r=2), seed=9)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(logits(resumed), expected)
    with pytest.raises(InputError, match="carries an adapter 'a' already"):
        lora.attach(resumed, "a", LoraConfig(r=2))
    assert torch.equal(logits(resumed), expected)


def test_bf16_base_keeps_fp32_factors(make_model: Make) -> None:
    model = make_model(True).to(torch.bfloat16)
    lora.attach(model, "a", LoraConfig(r=2))
    fill(model, "a")
    assert all(f.lora_A.dtype == torch.float32 for f in lora.adapter_factors(model, "a").values())
    out = logits(model).detach()
    lora.merge(model, "a")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert F.cosine_similarity(logits(model), out).min().item() > 0.98


def test_same_seed_same_factors(make_model: Make) -> None:
    states = []
    for seed in (3, 3, 4):
        model = make_model()
        lora.attach(model, "a", LoraConfig(r=2), seed=seed)
        states.append([f.lora_A for f in lora.adapter_factors(model, "a").values()])
    assert all(map(torch.equal, states[0], states[1])) and not torch.equal(states[0][0], states[2][0])


def test_what_is_refused(make_model: Make) -> None:
    model = make_model()
    with pytest.raises(InputError, match="cannot name an adapter"):
        lora.attach(model, "a.b", LoraConfig(r=2))
    with pytest.raises(InputError, match="the model has none of the targets gate_up_proj"):
        lora.attach(model, "a", LoraConfig(r=2, targets=("gate_up_proj",)))
    for call in (lora.detach, lora.activate, lora.merge, lora.adapter_factors):
        with pytest.raises(InputError, match="no adapter 'x' is attached; attached are: none"):
            call(model, "x")
    with pytest.raises(InputError, match="needs the name"):
        lora.activate(model, None, train=True)
    for wrong in (dict(r=0), dict(targets=()), dict(targets=("lm_head",)), dict(targets=("gate_up_proj", "up_proj"))):
        with pytest.raises(ValidationError):
            LoraConfig(**wrong)
