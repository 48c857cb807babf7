"""The model: packed = alone in logits and gradients, causality, seeds, routing records."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from twofold.base.batch import boundaries, positions
from twofold.model.attn_inputs import AttnInputs
from twofold.model.qwen3 import Qwen3, Routing


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
