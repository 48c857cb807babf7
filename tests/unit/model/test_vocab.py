"""New rows: where they come from, that nothing else moves, and that only they are trained when asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from twofold.base.records import InputError
from twofold.model import lora, vocab
from twofold.model.attn_inputs import AttnInputs
from twofold.model.quantised import quantise_model
from twofold.model.qwen3 import Adapter, Qwen3

Make = Callable[..., Qwen3]
TOKENS = torch.tensor([3, 40, 7, 41, 42, 9, 40, 11])


def logits(model: Qwen3, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model.logits(model(tokens, torch.arange(len(tokens)), AttnInputs.packed([0, len(tokens)])))


def train(model: Qwen3, steps: int = 5) -> None:
    """AdamW over everything, with a weight decay that would be seen at once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(model)[:-1], TOKENS[1:]).backward()
        optimizer.step()


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_about_the_mean_and_old_logits_stay(tied: bool, make_model: Make) -> None:
    model, old = (make_model(tie_word_embeddings=tied) for _ in range(2))
    vocab.add_tokens(model, 40, 3, noise=0.0, multiple=8)
    assert model.config.vocab_size == 48 and old.config.vocab_size == 40
    for after, before in zip(vocab._tables(model), vocab._tables(old), strict=True):
        assert after.weight.shape == (48, 16) and torch.equal(after.weight[:40], before.weight)
        torch.testing.assert_close(after.weight[40:], before.weight.mean(0).expand(8, -1))
    known = TOKENS[TOKENS < 40]
    torch.testing.assert_close(logits(model, known)[:, :40], logits(old, known))
    fresh = Qwen3(model.config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def test_noise_is_reproducible_and_in_proportion(make_model: Make) -> None:
    tables = []
    for seed in (1, 1, 2):
        model = make_model()
        vocab.add_tokens(model, 40, 200, noise=0.5, seed=seed)
        tables.append(model.head_weight.detach())
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    spread = (tables[0][40:].std(0) / tables[0][:40].std(0, correction=0)).mean()
    assert 0.4 < float(spread) < 0.6


def test_padding_rows_are_used_before_the_table_grows(make_model: Make) -> None:
    model = make_model()
    model.model.embed_tokens.weight.data[30:] = 9.0
    before = model.head_weight.detach().clone()
    vocab.add_tokens(model, 30, 4)
    after = model.head_weight.detach()
    changed = (after != before).any(1).nonzero().flatten().tolist()
    assert model.config.vocab_size == 40 and changed == [30, 31, 32, 33]
    mean, spread = before[:30].mean(0), before[:30].std(0)
    assert bool(((after[30:34] - mean).abs() < 0.5 * spread).all()), "padding rows take no part in the mean"


@pytest.mark.parametrize("tied", [True, False])
def test_only_new_rows_are_trained_and_decay_leaves_the_others_identical(tied: bool, make_model: Make) -> None:
    model = make_model(tie_word_embeddings=tied)
    vocab.add_tokens(model, 40, 3, multiple=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    vocab.train_new_rows(model, 40, 3)
    assert torch.equal(logits(model), expected)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 16 * (1 if tied else 2)
    with pytest.raises(InputError, match="call keep_new_rows"):
        vocab.add_tokens(model, 43, 1)
    with pytest.raises(InputError, match="already"):
        vocab.train_new_rows(model, 40, 3)
    train(model)
    trained = logits(model)
    vocab.keep_new_rows(model)
    assert torch.equal(logits(model), trained) and all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        rows = (tensor != before[name]).reshape(len(tensor), -1).any(1).nonzero().flatten().tolist()
        is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert rows == ([40, 41, 42] if is_table else []), name


def test_the_gradient_of_new_rows_is_that_of_the_whole_table(make_model: Make) -> None:
    model, whole = (make_model() for _ in range(2))
    for each in (model, whole):
        vocab.add_tokens(each, 40, 3)
    vocab.train_new_rows(model, 40, 3)
    for each in (model, whole):
        logits(each).square().mean().backward()
    (rows,) = [p.grad for p in model.parameters() if p.requires_grad]
    full = whole.model.embed_tokens.weight.grad
    assert rows is not None and full is not None
    torch.testing.assert_close(rows, full[40:43])


@pytest.mark.parametrize("adapter_first", [True, False])
def test_together_with_an_adapter(adapter_first: bool, make_model: Make) -> None:
    model = make_model()
    vocab.add_tokens(model, 40, 3)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    calls = [lambda: lora.attach(model, "a", lora.LoraConfig(r=2)), lambda: vocab.train_new_rows(model, 40, 3)]
    for call in calls if adapter_first else calls[::-1]:
        call()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 29 and all(".adapters." in name or name.endswith(".rows") for name in trained)
    train(model, 2)
    expected = logits(model).detach()
    vocab.keep_new_rows(model)
    assert all(p.requires_grad == (".adapters." in name) for name, p in model.named_parameters())
    lora.merge(model, "a")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    after = dict(model.named_parameters())
    assert torch.equal(after["model.embed_tokens.weight"][:40], before["model.embed_tokens.weight"][:40])
    assert not torch.equal(after["model.embed_tokens.weight"][40:], before["model.embed_tokens.weight"][40:])


def test_detaching_keeps_new_rows_alone_in_training(make_model: Make) -> None:
    model = make_model()
    vocab.train_new_rows(model, 30, 4)
    lora.attach(model, "a", lora.LoraConfig(r=2))
    lora.detach(model, "a")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "model.embed_tokens.parametrizations.weight.0.rows"
    ]


def test_numbers_that_cannot_be(make_model: Make) -> None:
    model = make_model()
    for first, count in ((41, 1), (0, 2), (40, 0)):
        with pytest.raises(InputError, match=f"cannot add {count} tokens from {first} on to a table of 40 rows"):
            vocab.add_tokens(model, first, count)
    for first, count in ((39, 2), (-1, 2), (3, 0)):
        with pytest.raises(InputError, match="the table has 40 rows"):
            vocab.train_new_rows(model, first, count)


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_has_no_rows_to_change(tied: bool, make_model: Make) -> None:
    model = make_model(tie_word_embeddings=tied)
    quantise_model(model)
    for call in (vocab.add_tokens, vocab.train_new_rows):
        with pytest.raises(InputError, match="packed for inference; load it without quantize"):
            call(model, 30, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_can_be_carried_to_another_model(tied: bool, make_model: Make) -> None:
    model, other = (make_model(tie_word_embeddings=tied) for _ in range(2))
    assert vocab.trained_rows(model) == []
    for each in (model, other):
        vocab.add_tokens(each, 40, 3)
    vocab.train_new_rows(model, 40, 3)
    train(model)
    rows = vocab.trained_rows(model)
    assert [each.path for each in rows] == (["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"])
    assert all(each.ids == [40, 41, 42] and not each.own.requires_grad for each in rows)
    before, adapter = logits(other), Adapter("a", rows)
    vocab.check_rows(other, rows, "file")
    vocab.put_rows(other, adapter)
    assert torch.equal(logits(other), logits(model))
    vocab.take_rows(other, adapter)
    assert torch.equal(logits(other), before)
    with pytest.raises(InputError, match=r"file: rows .* do not fit .* load the base that has these tokens"):
        vocab.check_rows(other, [replace(rows[0], ids=[41, 42, 43])], "file")
    with pytest.raises(InputError, match=r"file: rows for model\.head, which this model has not"):
        vocab.check_rows(other, [replace(rows[0], path="model.head")], "file")
    with pytest.raises(InputError, match=r"file has rows of tokens, and such are being trained here; call keep_new"):
        vocab.check_rows(model, rows, "file")


@pytest.mark.parametrize("kept", [True, False])
def test_rows_kept_with_an_adapter_come_and_go_with_it(kept: bool, make_model: Make) -> None:
    """Also while other rows are in training over them."""
    model = make_model()
    vocab.add_tokens(model, 40, 3)
    before = model.head_weight.detach().clone()
    lora.attach(model, "a", lora.LoraConfig(r=2))
    for first in (40, 41):  # the second time over rows that are the adapter's already
        vocab.train_new_rows(model, first, 2)
        train(model, 1)
        vocab.keep_new_rows(model)
    trained = model.head_weight.detach().clone()
    assert (trained != before).any(1).nonzero().flatten().tolist() == [40, 41, 42]
    with pytest.raises(InputError, match="adapter 'a' brings rows of tokens; merge or detach it"):
        vocab.add_tokens(model, 43, 1)
    if not kept:
        vocab.train_new_rows(model, 30, 2)
    for name, expected in ((None, before), ("a", trained)):
        lora.activate(model, name)
        assert torch.equal(model.head_weight, expected)
    lora.detach(model, "a")
    assert torch.equal(model.head_weight, before)
