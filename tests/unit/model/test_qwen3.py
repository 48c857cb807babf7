"""The model: packed = alone in logits and gradients, causality, seeds, routing records, families, long context."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from twofold.base.batch import boundaries, positions
from twofold.model import rope
from twofold.model.attn_inputs import AttnInputs
from twofold.model.config import Context, ModelConfig
from twofold.model.qwen3 import Qwen3, Routing
from twofold.ops import reference


def sequences(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (n,), generator=generator) for n in lengths]


def logits(model: Qwen3, parts: list[torch.Tensor], routing: Routing | None = None) -> torch.Tensor:
    lengths = [len(part) for part in parts]
    hidden = model(torch.cat(parts), positions(lengths), AttnInputs.packed(boundaries(lengths)), routing)
    return model.logits(hidden)


@pytest.mark.parametrize("moe", [False, True])
def test_packed_equals_alone_in_logits_and_gradients(moe: bool, make_model: Callable[..., Qwen3]) -> None:
    model = make_model(moe)
    parts = sequences([5, 12, 1, 12, 7])
    targets = sequences([37], seed=1)[0]
    parameters = list(model.parameters())
    packed = logits(model, parts)
    alone = torch.cat([logits(model, [part]) for part in parts])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    grads = [
        torch.autograd.grad(torch.nn.functional.cross_entropy(out, targets), parameters) for out in (packed, alone)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_later_tokens_do_not_change_earlier_logits(make_model: Callable[..., Qwen3]) -> None:
    model, (tokens,) = make_model(), sequences([9])
    changed = tokens.clone()
    changed[6:] = (changed[6:] + 1) % 40
    before, after = logits(model, [tokens]), logits(model, [changed])
    torch.testing.assert_close(before[:6], after[:6], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[6:], after[6:])


def test_positions_matter(make_model: Callable[..., Qwen3]) -> None:
    model, (tokens,) = make_model(), sequences([8])
    attn = AttnInputs.packed([0, 8])
    plain, stretched = (model(tokens, p, attn) for p in (torch.arange(8), 3 * torch.arange(8)))
    assert not torch.allclose(plain, stretched, atol=1e-3)


def test_initial_weights_are_a_function_of_the_seed(make_model: Callable[..., Qwen3]) -> None:
    a, b, c = make_model(seed=4), make_model(seed=4), make_model(seed=5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head_weight, c.head_weight)
    assert float(a.head_weight.detach().std()) == pytest.approx(0.2, rel=0.1)


def test_tied_and_untied_heads(make_model: Callable[..., Qwen3]) -> None:
    tied, untied = make_model(), make_model(tie_word_embeddings=False)
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert untied.head_weight is untied.lm_head.weight
    assert "lm_head.weight" not in tied.state_dict() and "inv_freq" not in tied.state_dict()


def test_routing_is_recorded_for_every_moe_layer(make_model: Callable[..., Qwen3]) -> None:
    model, routing = make_model(True, num_hidden_layers=3, mlp_only_layers=(1,)), Routing()
    logits(model, sequences([6, 4]), routing)
    assert [p.shape for p in routing.probs] == [(10, 4)] * 2 and [i.shape for i in routing.ids] == [(10, 2)] * 2
    for probs, ids in zip(routing.probs, routing.ids, strict=True):
        torch.testing.assert_close(probs.sum(-1), torch.ones(10))
        assert probs.requires_grad and torch.equal(probs.topk(2).indices, ids)


def test_a_teacher_and_a_student_live_in_one_process(make_model: Callable[..., Qwen3]) -> None:
    student, teacher, parts = make_model(), make_model(True, seed=3, hidden_size=20), sequences([5])
    before = logits(student, parts)
    logits(teacher, parts)
    assert torch.equal(before, logits(student, parts))


@pytest.mark.parametrize(("qk_norm", "qkv_bias"), [(True, False), (False, True), (False, False), (True, True)])
def test_families_have_the_parameters_they_need(
    qk_norm: bool, qkv_bias: bool, make_config: Callable[..., ModelConfig]
) -> None:
    config = make_config(qk_norm=qk_norm, qkv_bias=qkv_bias)
    model = Qwen3(config)
    model.init_weights(0)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    parameters = {name: p for name, p in model.named_parameters() if "layers.1.self_attn" in name}
    assert any("q_norm" in name for name in parameters) == any("k_norm" in name for name in parameters) == qk_norm
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            assert qkv_bias and name.endswith("qkv_proj.bias") and not parameter.any()
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))


def test_a_window_acts_only_in_its_layers(make_model: Callable[..., Qwen3]) -> None:
    (tokens,) = sequences([20])
    plain = logits(make_model(), [tokens])
    for changes in ({"sliding_window": 20}, {"sliding_window": 3, "max_window_layers": 2}):
        assert torch.equal(logits(make_model(**changes), [tokens]), plain)
    narrow = logits(make_model(sliding_window=3, max_window_layers=1), [tokens])
    torch.testing.assert_close(narrow[:3], plain[:3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(narrow[3:], plain[3:], atol=1e-3)


@pytest.mark.parametrize("method", ["yarn", "dca"])
def test_short_text_is_untouched_by_a_long_context_that_is_there(method: str, make_model: Callable[..., Qwen3]) -> None:
    """To the bit, in logits and gradients, alone and beside a long sequence; beyond the native length it acts."""
    plain, long = make_model(), make_model(context=Context(native=16, target=64, method=method))
    short = sequences([16, 9, 3])
    targets = sequences([28], seed=1)[0]
    grads = []
    for model in (plain, long):
        out = logits(model, short)
        grads.append(torch.autograd.grad(torch.nn.functional.cross_entropy(out, targets), list(model.parameters())))
    assert torch.equal(logits(plain, short), logits(long, short))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    mixed = [*short, sequences([30], seed=2)[0]]
    before, after = logits(plain, mixed), logits(long, mixed)
    torch.testing.assert_close(before[:28], after[:28], atol=1e-5, rtol=1e-5)
    assert method != "yarn" or torch.equal(before[:28], after[:28])
    assert not torch.allclose(before[28:], after[28:], atol=1e-3)


def test_yarn_depends_on_the_factor_given_and_not_on_max_position_embeddings(make_model: Callable[..., Qwen3]) -> None:
    parts = sequences([40])
    context = Context(native=16, target=64)
    values = [logits(make_model(context=context, max_position_embeddings=m), parts) for m in (16, 64, 4096)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert not torch.allclose(values[0], logits(make_model(context=Context(native=16, target=32)), parts), atol=1e-3)


def test_dual_chunk_attention_in_the_model_equals_the_reference(make_model: Callable[..., Qwen3]) -> None:
    context = Context(native=16, target=64, method="dca", static=True)
    model, (tokens,) = make_model(num_hidden_layers=1, context=context), sequences([40])
    layer, eps = model.model.layers[0], model.config.rms_norm_eps
    x = model.model.embed_tokens(tokens)
    q, k, v = layer.self_attn.qkv_proj(layer.input_layernorm(x)).view(40, 8, 6).split([4, 2, 2], dim=1)
    q = reference.rms_norm(q, layer.self_attn.q_norm.weight, eps)
    k = reference.rms_norm(k, layer.self_attn.k_norm.weight, eps)
    inv_freq = rope.inverse_frequencies(1e4, 6)
    out = reference.dual_chunk_attention(q, k, v, inv_freq, context.chunk_len, context.dca_chunk_size)
    x = x + layer.self_attn.o_proj(out.flatten(1))
    expected = model.logits(model.model.norm(x + layer.mlp(layer.post_attention_layernorm(x), None)))
    torch.testing.assert_close(logits(model, [tokens]), expected, atol=1e-5, rtol=1e-5)
    chunk = context.chunk_len
    plain = logits(make_model(num_hidden_layers=1), [tokens[:chunk]])
    assert torch.equal(logits(model, [tokens[:chunk]]), plain)
    assert not torch.allclose(logits(model, [tokens]), logits(make_model(num_hidden_layers=1), [tokens]), atol=1e-3)


def test_a_window_and_dual_chunk_attention_exclude_each_other(make_config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        make_config(sliding_window=8, context=Context(native=16, target=64, method="dca"))


def test_frequencies_stay_fp32_in_a_bf16_model(make_model: Callable[..., Qwen3]) -> None:
    model = make_model(rope_theta=1e6).to(torch.bfloat16)
    attn, tokens = AttnInputs.packed([0, 3]), torch.tensor([3, 8, 21])
    at_256, at_257 = (model(tokens, torch.tensor([0, 100, p]), attn) for p in (256, 257))
    assert at_256.dtype == torch.bfloat16
    assert not torch.equal(at_256, at_257)  # in bf16 these are one position


def test_routers_compute_in_fp32_whatever_their_weights_are(make_model: Callable[..., Qwen3]) -> None:
    model = make_model(True).to(torch.bfloat16)
    mlp = model.model.layers[0].mlp
    x_TD = torch.randn(40, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = Routing()
    assert mlp(x_TD, routing).dtype == torch.bfloat16
    expected = (x_TD.float() @ mlp.gate.weight.float().T).softmax(-1)
    torch.testing.assert_close(routing.probs[0], expected, atol=1e-6, rtol=1e-5)
