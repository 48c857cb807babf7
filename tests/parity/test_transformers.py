"""Logits and gradients against transformers, dense and MoE, in fp32; folders load both ways."""

import pytest
import torch

from twofold.model.attn_inputs import AttnInputs
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import load_weights, save_weights

transformers = pytest.importorskip("transformers")


def config(**changes):
    base = dict(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=128,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return ModelConfig(**(base | changes))


MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, tie_word_embeddings=False)
CASES = {
    "dense": config(),
    "untied": config(tie_word_embeddings=False),
    "theta": config(rope_theta=1e6, num_key_value_heads=4),
    "moe": config(**MOE),
    "moe-mixed": config(**MOE, decoder_sparse_step=2, norm_topk_prob=False),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name, tmp_path):
    ours = Qwen3(CASES[name])
    ours.init_weights(seed=3)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    save_weights(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    sequences = [torch.randint(0, 97, (n,)) for n in (5, 23, 17)]
    tokens = torch.cat(sequences)
    lengths = [len(s) for s in sequences]
    cu = [0, lengths[0], sum(lengths[:2]), sum(lengths)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    logits = ours.logits(ours(tokens, positions, AttnInputs.packed(cu)))
    expected = torch.cat([theirs(s[None]).logits[0] for s in sequences])
    scale = float(expected.abs().max())
    assert scale > 1
    torch.testing.assert_close(logits, expected, atol=1e-5 * scale, rtol=1e-5)
    targets = torch.randint(0, 97, (len(tokens),))
    torch.nn.functional.cross_entropy(logits, targets).backward()
    torch.nn.functional.cross_entropy(expected, targets).backward()
    q_ours = ours.model.layers[0].self_attn.qkv_proj.weight.grad[: 4 * 16]
    q_theirs = theirs.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(q_ours, q_theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        ours.model.embed_tokens.weight.grad, theirs.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-4
    )


def test_save_and_load_is_the_identity(tmp_path):
    for name, cfg in CASES.items():
        model = Qwen3(cfg)
        model.init_weights(seed=1)
        save_weights(model, tmp_path / name)
        again = load_weights(tmp_path / name)
        assert again.config == cfg
        for key, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
