"""Adapters against PEFT: its folders load here and ours there, with the same logits, dense and stacked experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.records import InputError
from twofold.model import lora, peft_io
from twofold.model.attn_inputs import AttnInputs
from twofold.model.config import ModelConfig
from twofold.model.lora import LoraConfig
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import load_weights, save_weights

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about its own conversions

BASE: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
    tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip
MOE: dict[str, Any] = BASE | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
SHAPES = {"dense": BASE, "moe": MOE, "mixed": MOE | dict(mlp_only_layers=(0,))}
SHAPES["untied"] = BASE | dict(tie_word_embeddings=False)
TOKENS = torch.arange(23) * 7 % 61
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model folder of the shape that the test's parameter names."""
    model = Qwen3(ModelConfig(**SHAPES[request.param]))
    model.init_weights(seed=3)
    save_weights(model, tmp_path / "base")
    return tmp_path / "base"


def logits(model: Qwen3) -> torch.Tensor:
    return model.logits(model(TOKENS, torch.arange(23), AttnInputs.packed([0, 23]))).detach()


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def compare(ours: Qwen3, other: Any, plain: torch.Tensor) -> None:
    expected = other(TOKENS[None]).logits[0].detach()
    scale = float(expected.abs().max())
    assert float((expected - plain).abs().max()) > 0.05 * scale, "the adapter changes too little to prove anything"
    torch.testing.assert_close(logits(ours), expected, atol=1e-5 * scale, rtol=1e-5)


OURS = [
    ("dense", LoraConfig(r=3, alpha=5), False),
    ("dense", LoraConfig(r=2, alpha=5, rslora=True, targets=("q_proj", "v_proj", "down_proj")), False),
    ("moe", LoraConfig(r=3, alpha=6), False),
    ("moe", LoraConfig(r=3, alpha=6, targets=("q_proj", "down_proj", "gate")), False),
    ("moe", LoraConfig(r=3, alpha=6, targets=("o_proj", "gate_up_proj", "down_proj")), False),
    ("moe", LoraConfig(r=3, alpha=6, targets=("o_proj", "gate_up_proj", "down_proj")), True),
    ("moe", LoraConfig(r=3, alpha=6, targets=("gate_up_proj",)), False),
    ("mixed", LoraConfig(r=3, alpha=6), False),
    ("mixed", LoraConfig(r=3, alpha=6, targets=("q_proj", "gate_up_proj", "down_proj")), False),
]


@pytest.mark.parametrize(
    ("folder", "config", "per_expert"), OURS, ids=[f"{i}-{case[0]}" for i, case in enumerate(OURS)], indirect=["folder"]
)
def test_peft_loads_ours(folder: Path, config: LoraConfig, per_expert: bool) -> None:
    model = load_weights(folder)
    plain = logits(model)
    lora.attach(model, "mine", config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for factor in lora.adapter_factors(model, "mine").values():
        torch.nn.init.normal_(factor.lora_B, std=0.3, generator=generator)
    peft_io.save_adapter(model, "mine", folder.parent / "adapter", base=str(folder), per_expert=per_expert)
    compare(model, peft.PeftModel.from_pretrained(theirs(folder), folder.parent / "adapter"), plain)


THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("dense", dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])),
    ("dense", dict(target_modules="all-linear", use_rslora=True, lora_dropout=0.1)),
    ("dense", dict(target_modules=r".*\.1\..*(k_proj|up_proj)", init_lora_weights="gaussian")),
    ("dense", dict(target_modules=["q_proj", "o_proj"], layers_to_transform=[1])),
    (
        "dense",
        dict(target_modules=["q_proj", "layers.1.mlp.up_proj"], rank_pattern={r"0\.self_attn\.q_proj": 5},
             alpha_pattern={"up_proj": 3}),
    ),
    ("moe", dict(target_modules=["q_proj", "o_proj"], target_parameters=STACKED)),
    ("moe", dict(target_modules=["v_proj"], target_parameters=STACKED[:1], alpha_pattern={"experts.gate_up_proj": 9})),
    ("moe", dict(target_parameters=STACKED[1:], rank_pattern={"experts.down_proj": 5})),
    ("moe", dict(target_modules="all-linear")),
    ("mixed", dict(target_modules=["k_proj", "gate_proj", "up_proj", "down_proj"])),
    ("untied", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    ("untied", dict(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])),
    (
        "untied",
        dict(target_modules=["lm_head", "v_proj", "embed_tokens"], use_rslora=True, alpha_pattern={"lm_head": 2}),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "options"), THEIRS, ids=[f"{i}-{case[0]}" for i, case in enumerate(THEIRS)], indirect=["folder"]
)
def test_ours_loads_pefts(folder: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(**(dict(r=4, lora_alpha=7, task_type="CAUSAL_LM") | options))
    other = peft.get_peft_model(theirs(folder), settings).eval()
    for name, parameter in other.named_parameters():
        if ".lora_B." in name or "lora_embedding_A" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    other.save_pretrained(folder.parent / "adapter")
    model = load_weights(folder)
    plain = logits(model)
    peft_io.load_adapter(model, "theirs", folder.parent / "adapter")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    compare(model, other, plain)
    if "rank_pattern" in options:  # ranks that differ survive our own writing too
        peft_io.save_adapter(model, "theirs", folder.parent / "again")
        lora.detach(model, "theirs")
        peft_io.load_adapter(model, "again", folder.parent / "again")
        compare(model, other, plain)


@pytest.mark.parametrize("folder", ["dense"], indirect=True)
def test_gradients_of_the_factors_equal_pefts(folder: Path) -> None:
    model = load_weights(folder)
    lora.attach(model, "mine", LoraConfig(r=3, alpha=5), seed=1)
    for factor in lora.adapter_factors(model, "mine").values():
        torch.nn.init.constant_(factor.lora_B, 0.05)
    peft_io.save_adapter(model, "mine", folder.parent / "adapter")
    other = peft.PeftModel.from_pretrained(theirs(folder), folder.parent / "adapter", is_trainable=True)
    targets = TOKENS.roll(-1)
    out = model.logits(model(TOKENS, torch.arange(23), AttnInputs.packed([0, 23])))
    torch.nn.functional.cross_entropy(out, targets).backward()
    torch.nn.functional.cross_entropy(other(TOKENS[None]).logits[0], targets).backward()
    theirs_by_name = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    mine = lora.adapter_factors(model, "mine")
    assert len(theirs_by_name) == 2 * len(mine) == 28
    for path, factor in mine.items():
        for side, parameter in (("A", factor.lora_A), ("B", factor.lora_B)):
            expected = theirs_by_name[f"base_model.model.{path}.lora_{side}.default.weight"]
            torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)


@pytest.mark.parametrize("folder", ["dense"], indirect=True)
def test_what_peft_can_do_and_we_cannot_is_refused(folder: Path) -> None:
    for options, words in (
        (dict(use_dora=True), "use_dora"),
        (dict(bias="lora_only"), "bias 'lora_only'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(init_lora_weights="olora"), "changes the base"),
    ):
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
        peft.get_peft_model(theirs(folder), settings).save_pretrained(folder.parent / "adapter")
        with pytest.raises(InputError, match=words):
            peft_io.load_adapter(load_weights(folder), "theirs", folder.parent / "adapter")
    peft.get_peft_model(theirs(folder), peft.LoHaConfig(target_modules=["q_proj"])).save_pretrained(folder.parent / "x")
    assert json.loads((folder.parent / "x" / "adapter_config.json").read_text())["peft_type"] == "LOHA"
    with pytest.raises(InputError, match="'LOHA' is not supported"):
        peft_io.load_adapter(load_weights(folder), "theirs", folder.parent / "x")
