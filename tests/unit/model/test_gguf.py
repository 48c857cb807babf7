"""GGUF in and out: round trips of every family, every readable type, misfits as one-line errors, llama.cpp itself."""

from __future__ import annotations

import enum
import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.gguf_file import BLOCKS, TYPES, read_gguf, read_metadata
from twofold.base.records import InputError, Request, SamplingParams
from twofold.engine.engine import Engine
from twofold.model import gguf_read, gguf_write
from twofold.model.config import Context, ModelConfig
from twofold.model.gguf_config import describe_gguf, rope_factors
from twofold.model.hf_config import config_from_hf, config_to_hf
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import to_hf
from twofold.text.gguf_tokenizer import tokenizer_from_gguf
from twofold.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

ROWS = 352
BASE: dict[str, Any] = dict(
    vocab_size=ROWS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=256,
    tie_word_embeddings=True, initializer_range=0.02,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3moe": dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, tie_word_embeddings=False),
    "qwen2": dict(qk_norm=False, qkv_bias=True, head_dim=16),
    "llama": dict(qk_norm=False),
}

BIASED: dict[str, Any] = dict(qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True)  # some Llamas


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat and the dog, the cat 12 12 12 sat on the mat and then they left"] * 3, 320)


def make(tokenizer: Tokenizer, seed: int = 0, **changes: Any) -> Qwen3:
    """A random model whose greedy text varies and never holds a control token."""
    model = Qwen3(ModelConfig(**(BASE | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith("bias"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.2, generator=generator)
        model.head_weight[tokenizer.vocab_size - 26 :] = 0
    return model


def altered(source: Path, target: Path, metadata: Mapping[str, Any] | None = None, **names: str | None) -> Path:
    """A copy with metadata replaced (None: left out) and tensors renamed (None: left out; ``__`` for a dot)."""
    file = read_gguf(source)
    renamed = {old.replace("__", "."): new for old, new in names.items()}
    values = {key: v for key, v in (file.metadata | dict(metadata or {})).items() if v is not None}
    writer = gguf.GGUFWriter(target, values.pop("general.architecture"))
    for key, value in values.items():
        gguf_write._add(writer, key, value)
    for info in file.tensors.values():
        name = renamed.get(info.name, info.name)
        if name is not None:
            data = np.fromfile(source, np.uint8, info.bytes, offset=info.offset)
            shape = (*info.shape[:-1], info.shape[-1] // BLOCKS[info.type][0] * BLOCKS[info.type][1])
            writer.add_tensor(name, data.reshape(shape), raw_dtype=gguf.GGMLQuantizationType[info.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_f32_round_trip_is_exact(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make(tokenizer, **FAMILIES[family])
    path = tmp_path / "model.gguf"
    assert gguf_write.save_gguf(model, tokenizer, path, "f32", "{{ messages }}", "tiny") == []
    loaded = gguf_read.load_gguf(path)
    assert loaded.config == model.config
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    metadata = read_metadata(path)
    assert metadata["general.architecture"] == family and metadata["general.name"] == "tiny"
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert tokenizer_from_gguf(metadata, "x").encode("the cat 12") == tokenizer.encode("the cat 12")


def test_biases_of_a_llama_come_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Those of query and key are permuted as their rows are."""
    model = make(tokenizer, **BIASED)
    gguf_write.save_gguf(model, tokenizer, tmp_path / "model.gguf", "f32", "", "tiny")
    loaded = gguf_read.load_gguf(tmp_path / "model.gguf")
    assert loaded.config == model.config and "blk.1.ffn_gate.bias" in read_gguf(tmp_path / "model.gguf").tensors
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


# Largest error as a share of the largest weight: half a step of 11, 8, 8 (of 127) and 4 bits (of 8, one-sided).
@pytest.mark.parametrize(("kind", "limit"), [("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 5e-3), ("q4_0", 0.13)])
@pytest.mark.parametrize("family", ["qwen3moe", "llama"])
def test_smaller_kinds_are_close(kind: str, limit: float, family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make(tokenizer, **FAMILIES[family])
    path = tmp_path / "model.gguf"
    assert gguf_write.save_gguf(model, tokenizer, path, kind, "", "tiny") == []
    loaded, types = gguf_read.load_gguf(path), {info.name: info.type for info in read_gguf(path).tensors.values()}
    assert types["blk.1.attn_v.weight"] == kind.upper() and types["blk.0.attn_norm.weight"] == "F32"
    assert types["token_embd.weight"] == ("Q8_0" if kind == "q4_0" else kind.upper())
    assert types.get("blk.0.ffn_gate_inp.weight", "F32") == "F32"
    worst = 0.0
    for (name, a), (_, b) in zip(to_hf(model).items(), to_hf(loaded).items(), strict=True):
        error = float((a - b).abs().max() / a.abs().max())
        assert error <= (0 if a.dim() == 1 else limit), name
        worst = max(worst, error)
    assert worst > limit / 50  # something was rounded


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([2, 6, 16]))
@settings(max_examples=12)
def test_any_shape_comes_back(family: str, layers: int, kv: int, head_dim: int) -> None:
    tokenizer, path = _shared()
    shape = dict(num_hidden_layers=layers, num_key_value_heads=kv, head_dim=head_dim, hidden_size=24)
    model = make(tokenizer, seed=layers, **(FAMILIES[family] | shape))
    gguf_write.save_gguf(model, tokenizer, path, "f32", "", "tiny")
    loaded = gguf_read.load_gguf(path, dtype=torch.float64)
    assert loaded.config == model.config and loaded.head_weight.dtype == torch.float64
    assert all(torch.equal(a.double(), b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_rows_without_whole_blocks_stay_f16_and_are_reported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make(tokenizer, intermediate_size=40, num_hidden_layers=1)
    path = tmp_path / "model.gguf"
    assert gguf_write.save_gguf(model, tokenizer, path, "q4_0", "", "tiny") == ["blk.0.ffn_down.weight"]
    tensors = read_gguf(path).tensors
    assert (tensors["blk.0.ffn_down.weight"].type, tensors["blk.0.ffn_up.weight"].type) == ("F16", "Q4_0")
    gguf_read.load_gguf(path)


def test_llama_rows_are_permuted_as_llama_cpp_wants_them() -> None:
    rows = torch.arange(8.0)[:, None]  # two heads of four
    stored = gguf_write.halves_to_neighbours(rows, 4)
    assert stored.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(gguf_read.neighbours_to_halves(stored, 4), rows)


def test_the_table_of_types_is_ggmls() -> None:
    for number, (name, elements, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (elements, size))


# The bytes that hold the upper halves of floats, which random bits make infinite.
FLOATS: dict[str, list[int]] = {
    **{kind: [1, 3] for kind in ("Q4_K", "Q5_K", "Q4_1", "Q5_1")}, "F32": [3], "Q6_K": [209], "Q2_K": [81, 83],
    "Q3_K": [109], "TQ1_0": [53], "TQ2_0": [65], "IQ1_M": [49, 51, 53, 55], "MXFP4": [0],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_every_type_is_dequantised_slice_by_slice(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random blocks of each type; the gguf package's answer for the whole matrix at once is the truth."""
    elements, size = BLOCKS[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (128, 256 // elements, size), dtype=np.uint8)
    for place in FLOATS.get(kind, [1]):
        blocks[..., place] &= 0x3B  # high bytes of floats: finite and positive
    blocks = blocks.reshape(128, -1)
    truth = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(128, 256))
    writer = gguf.GGUFWriter(tmp_path / "mixed.gguf", "llama")
    for name in ("q", "k"):
        writer.add_tensor(f"blk.0.attn_{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_read, "SLICE", 256 * 40)  # no whole number of slices, one head of 32 rows each
    source = gguf_read.GGUFSource(read_gguf(tmp_path / "mixed.gguf"), 32)
    out = torch.empty(128, 256)
    source.read_into("model.layers.0.self_attn.q_proj.weight", out)
    expected = gguf_read.neighbours_to_halves(truth, 32)
    assert torch.equal(out, expected) and out.isfinite().all() and out.unique().numel() > 10


def test_context_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    yarn = Context(native=64, target=256, static=True, attention_factor=1.25, beta_fast=16.0)
    llama3 = Context(method="llama3", native=8192, target=65536)
    cases = [("qwen3", yarn), ("qwen3", Context(native=64, target=160)), ("llama", llama3)]
    for family, context in cases:
        model = make(tokenizer, context=context, **FAMILIES[family])
        gguf_write.save_gguf(model, tokenizer, path, "f16", "", "tiny")
        found = gguf_read.load_gguf(path).config.context
        assert found is not None and found.attention_factor == pytest.approx(context.attention_factor)
        assert found.model_copy(update={"attention_factor": context.attention_factor}) == context
    assert describe_gguf(path).config.context == llama3
    info = read_gguf(path).tensors["rope_freqs.weight"]
    data = path.read_bytes()
    other = np.linspace(1, 8, 16, dtype=np.float32).tobytes()
    path.write_bytes(data[: info.offset] + other + data[info.offset + info.bytes :])
    with pytest.raises(InputError, match=r"rope_freqs\.weight is not Llama 3\.1's scaling"):
        describe_gguf(path)
    factors = rope_factors(5e5, 128, llama3)
    assert factors[0] == 1 and factors[-1] == 8 and 1 < factors[32] < 8  # Llama 3.1's own shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sliding_window=8), "no sliding_window"),
        (dict(context=Context(native=64, target=256, method="dca")), "Dual Chunk Attention"),
        (dict(context=Context(native=64, target=256, method="llama3")), "for Llama only"),
        (FAMILIES["qwen3moe"] | dict(mlp_only_layers=(0,)), "dense layers too"),
        (FAMILIES["qwen3moe"] | dict(norm_topk_prob=False), "norm_topk_prob false"),
        (dict(vocab_size=300), "not a pair"),
    ],
)
def test_what_llama_cpp_lacks_is_not_written(
    changes: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        gguf_write.save_gguf(make(tokenizer, **changes), tokenizer, tmp_path / "x.gguf", "f16", "", "x")
    assert not list(tmp_path.iterdir())


def test_dense_layers_among_sparse_ones_are_read(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp refuses such a file, so it takes a careless writer to make one."""
    monkeypatch.setattr(gguf_write, "_refuse", lambda config, path: None)
    model = make(tokenizer, **(FAMILIES["qwen3moe"] | dict(mlp_only_layers=(0,))))
    gguf_write.save_gguf(model, tokenizer, tmp_path / "model.gguf", "f32", "", "x")
    loaded = gguf_read.load_gguf(tmp_path / "model.gguf")
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_failed_write_leaves_the_old_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = make(tokenizer), tmp_path / "model.gguf"
    with pytest.raises(InputError, match=r"kind 'q2_k' is unknown; use one of f32, f16"):
        gguf_write.save_gguf(model, tokenizer, path, "q2_k", "", "x")
    gguf_write.save_gguf(model, tokenizer, path, "bf16", "", "x")
    before = path.read_bytes()
    for value in (1e5, float("nan")):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[3, 5] = value
        with pytest.raises(InputError, match=r"'blk.1.ffn_down.weight' has values that \w+ cannot hold; use kind bf16"):
            gguf_write.save_gguf(model, tokenizer, path, "f16", "", "x")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_whole_gguf(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match=r"model\.gguf cannot be read: No such file"):
        read_gguf(path)
    gguf_write.save_gguf(make(tokenizer), tokenizer, path, "q8_0", "", "x")
    whole = path.read_bytes()
    for size in (5, 20, 100, 2000):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"model\.gguf is damaged: its header does not end .* copy or download"):
            read_gguf(path)
    path.write_bytes(whole[:-40000])
    with pytest.raises(InputError, match=r"is damaged: 40000 bytes are missing at its end; copy or download"):
        read_gguf(path)
    for text in (b"", b"PK\x03\x04" + whole[4:], b"ggml" + whole[4:]):
        path.write_bytes(text)
        with pytest.raises(InputError, match=r"is not a GGUF file; give a \.gguf file"):
            read_gguf(path)
    path.write_bytes(whole[:4] + (1).to_bytes(4, "little") + whole[8:])
    with pytest.raises(InputError, match="of version 1; convert it"):
        read_gguf(path)
    path.write_bytes(whole[:4] + (3).to_bytes(4, "big") + whole[8:])
    with pytest.raises(InputError, match="big-endian"):
        read_gguf(path)


@given(st.integers(4, 6000), st.integers(0, 255))
@settings(max_examples=60)
def test_a_flipped_byte_of_the_header_is_harmless_or_an_input_error(place: int, byte: int) -> None:
    tokenizer, path = _shared()
    if not _WHOLE:
        gguf_write.save_gguf(make(tokenizer), tokenizer, path, "f16", "", "x")
        _WHOLE.append(path.read_bytes())
    path.write_bytes(_WHOLE[0][:place] + bytes([byte]) + _WHOLE[0][place + 1 :])
    try:
        describe_gguf(path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_models_that_are_not_ours_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, bad = tmp_path / "model.gguf", tmp_path / "bad.gguf"
    gguf_write.save_gguf(make(tokenizer), tokenizer, path, "f16", "", "x")

    def fails(match: str, metadata: Mapping[str, Any] | None = None, **names: str | None) -> None:
        altered(path, bad, metadata, **names)
        with pytest.raises(InputError, match=match) as caught:
            gguf_read.load_gguf(bad)
        assert str(bad) in str(caught.value) and "\n" not in str(caught.value)

    fails("architecture 'gemma' is not supported; give a model of one of: qwen3,", {"general.architecture": "gemma"})
    for key in ("attention.key_length", "rope.freq_base", "context_length", "attention.layer_norm_rms_epsilon"):
        fails(rf"qwen3\.{key} is missing, and llama\.cpp's default", {f"qwen3.{key}": None})
    fails("must equal the head dimension 32", {"qwen3.rope.dimension_count": 16})
    fails("differs between layers", {"qwen3.attention.head_count": [4, 4]})
    fails(r"attention\.sliding_window = 64 is not supported", {"qwen3.attention.sliding_window": 64})
    fails("'longrope' is not supported; this model knows none and yarn", {"qwen3.rope.scaling.type": "longrope"})
    yarn = {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.original_context_length": 64}
    fails(r"rope\.scaling\.factor is missing", yarn)
    fails("0 < native <= target, got 64 and 32; the file", yarn | {"qwen3.rope.scaling.factor": 0.5})
    for value in (float("inf"), float("nan")):
        fails(rf"rope\.scaling\.factor = {value} is no finite number", yarn | {"qwen3.rope.scaling.factor": value})
    fails("target must be <= 2147483648", yarn | {"qwen3.rope.scaling.factor": 1e30})
    for key in ("attn_factor", "yarn_attn_factor", "yarn_beta_fast"):
        changes = {"qwen3.rope.scaling.factor": 2.0, f"qwen3.rope.scaling.{key}": "x"}
        fails(rf"rope\.scaling\.{key} = 'x' is no finite number", yarn | changes)
    fails("hidden_size must be <= 2147483648", {"qwen3.embedding_length": 2**32 - 1})
    fails("experts of architecture 'qwen3' are not supported", {"qwen3.expert_count": 4})
    fails("one of 3 parts; join them", {"split.count": 3})
    fails("general.alignment is 0", {"general.alignment": 0})
    fails(r"'blk\.0\.ssm_in\.weight' has no place in a qwen3 model", blk__0__ffn_up__weight="blk.0.ssm_in.weight")
    fails(
        r"for 'model\.layers\.1\.mlp\.up_proj\.weight' \(Hugging Face's name\) is missing", blk__1__ffn_up__weight=None
    )
    fails(r"unexpected tensor 'blk\.1\..*; .*, convert the model again", {"qwen3.block_count": 1})
    fails("'token_embd.weight' is missing", token_embd__weight=None)
    fails("num_attention_heads .4. must be a multiple", {"qwen3.attention.head_count_kv": 3})


@pytest.mark.parametrize("template", [5, ["a"]])
def test_a_template_that_is_no_text_is_refused(tokenizer: Tokenizer, tmp_path: Path, template: Any) -> None:
    gguf_write.save_gguf(make(tokenizer), tokenizer, tmp_path / "model.gguf", "f16", "", "x")
    altered(tmp_path / "model.gguf", tmp_path / "odd.gguf", {"tokenizer.chat_template": template})
    with pytest.raises(InputError, match=r"odd.gguf: tokenizer.chat_template must be a string"):
        describe_gguf(tmp_path / "odd.gguf")


def test_types_that_cannot_be_read_are_named_but_described(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All types of the table can be read, unless the package is older than one of them."""
    path = tmp_path / "model.gguf"
    gguf_write.save_gguf(make(tokenizer, hidden_size=256), tokenizer, path, "f32", "{{ x }}", "x")
    writer = gguf.GGUFWriter(tmp_path / "bad.gguf", "qwen3")
    for key, value in read_metadata(path).items():
        if key != "general.architecture":
            gguf_write._add(writer, key, value)
    blocks = np.zeros((352, 84), dtype=np.uint8)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    known = {name: kind for name, kind in gguf.GGMLQuantizationType.__members__.items() if name != "Q2_K"}
    monkeypatch.setattr(gguf_read.gguf, "GGMLQuantizationType", enum.Enum("Old", known))
    with pytest.raises(InputError, match=r"'token_embd\.weight' is Q2_K, which cannot be read: .* pip install -U gguf"):
        gguf_read.load_gguf(tmp_path / "bad.gguf")
    monkeypatch.setattr(gguf_read, "gguf", None)
    found = describe_gguf(tmp_path / "bad.gguf")
    assert found.tensors == [("token_embd.weight", "Q2_K", 352 * 84)] and found.chat_template == "{{ x }}"
    assert found.architecture == "qwen3" and found.config.hidden_size == 256
    data = bytearray((tmp_path / "bad.gguf").read_bytes())
    place = data.index(b"token_embd.weight") + 17 + 4 + 16
    data[place : place + 4] = (99).to_bytes(4, "little")
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(InputError, match=r"'token_embd\.weight' has the unknown type 99"):
        read_gguf(tmp_path / "bad.gguf")


def test_without_the_package_the_fix_is_named(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = make(tokenizer), tmp_path / "model.gguf"
    gguf_write.save_gguf(model, tokenizer, path, "f16", "", "x")
    monkeypatch.setattr(gguf_read, "gguf", None)
    for call in (
        lambda: gguf_read.load_gguf(path),
        lambda: gguf_write.save_gguf(model, tokenizer, path, "f16", "", "x"),
    ):
        with pytest.raises(
            InputError, match=r"model\.gguf: .* need the gguf package; run: pip install 'twofold\[gguf\]'"
        ):
            call()


def test_the_configuration_is_the_one_of_the_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Through config.json and through GGUF a model has one configuration, fp32 rounding of the metadata included."""
    config = ModelConfig(**(BASE | dict(rms_norm_eps=1e-5, rope_theta=5e6, context=Context(native=64, target=256))))
    model = Qwen3(config)
    model.init_weights(0)
    gguf_write.save_gguf(model, tokenizer, tmp_path / "model.gguf", "f16", "", "x")
    assert describe_gguf(tmp_path / "model.gguf").config == config_from_hf(config_to_hf(config), "x") == config


class LlamaCpp:
    """llama.cpp's own server on a file, one thread, with fp32 keys and values."""

    def __init__(self, path: Path) -> None:
        llama = pytest.importorskip("xllamacpp")
        params = llama.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
        params.warmup, params.fit_params, params.verbosity = False, False, -1
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        self.server = llama.Server(params)

    def post(self, route: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        return list(self.post("/completion", body | {"cache_prompt": False})["tokens"])


YARN = dict(context=Context(native=16, target=64, static=True, attention_factor=1.3))
LLAMA3 = dict(context=Context(method="llama3", native=8192, target=65536), rope_theta=5e5)
RUN = [(family, family, {}) for family in FAMILIES] + [("yarn", "qwen3", YARN), ("llama3", "llama", LLAMA3)]
RUN.append(("biased", "llama", BIASED))


@pytest.mark.parametrize(("name", "family", "changes"), RUN, ids=[name for name, _, _ in RUN])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_says_the_same(
    name: str, family: str, changes: dict[str, Any], kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The same greedy tokens as ours from the weights in the file; with F16 it rounds activations, so ties may part."""
    path = tmp_path / "model.gguf"
    gguf_write.save_gguf(make(tokenizer, seed=1, **(FAMILIES[family] | changes)), tokenizer, path, kind, "", "tiny")
    model = gguf_read.load_gguf(path)
    prompts = [tokenizer.encode(text) for text in ("the cat", "dog 12 and", "mat")]
    requests = [Request(tuple(prompt), SamplingParams(temperature=0, max_tokens=40)) for prompt in prompts]
    ours = [completion.token_ids for completion in Engine(model, []).generate(requests)]
    llama = LlamaCpp(path)
    theirs = [llama.greedy(prompt, 40) for prompt in prompts]
    assert len({token for text in theirs for token in text}) > 8, "the text should vary"
    parted = [first_gap(model, p, a, b) for p, a, b in zip(prompts, ours, theirs, strict=True) if a != b]
    assert len(parted) <= (1 if kind == "f16" else 0) and all(gap < 0.02 for gap in parted), parted
    text = "the cat 12 <|im_end|> sat\n\n  on"
    assert llama.post("/tokenize", {"content": text, "parse_special": True})["tokens"] == tokenizer.encode_with_special(
        text
    )


@torch.no_grad()
def first_gap(model: Qwen3, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """Our log-probability of our token above theirs, where two greedy texts part."""
    same = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    lists = [prompt + ours[: same + 1], prompt + theirs[: same + 1]]
    a, b = (float(scores[-1]) for scores in Engine(model, []).score(lists))
    return a - b


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3moe", "llama"])
def test_llama_cpp_runs_quantised_files(kind: str, family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It computes with rounded activations too, so only the distribution of the first token is compared."""
    path = tmp_path / "model.gguf"
    gguf_write.save_gguf(make(tokenizer, seed=1, **FAMILIES[family]), tokenizer, path, kind, "", "tiny")
    prompt = tokenizer.encode("the cat")
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 5, "cache_prompt": False}
    answer = LlamaCpp(path).post("/completion", body)
    theirs = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
    ours = Engine(gguf_read.load_gguf(path), []).score([[*prompt, token] for token in theirs])
    for logprob, scores in zip(theirs.values(), ours, strict=True):
        assert float(scores[-1]) == pytest.approx(logprob, abs=0.35)


_WHOLE: list[bytes] = []
_CACHE: list[tuple[Tokenizer, Path]] = []


@pytest.fixture(scope="module", autouse=True)
def _share(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> None:
    _CACHE.append((tokenizer, tmp_path_factory.mktemp("gguf") / "any.gguf"))


def _shared() -> tuple[Tokenizer, Path]:
    return _CACHE[0]
