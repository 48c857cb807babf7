"""New tokens in fine-tuning: one id each in rows and replies, the same in transformers and PEFT; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from twofold import cli
from twofold.base.files import read_json, read_jsonl
from twofold.llm import LLM
from twofold.model.config import ModelConfig
from twofold.model.peft_io import load_adapter
from twofold.model.qwen3 import Qwen3
from twofold.post.sft import StoredExamples
from twofold.recipes.pretrain import save_model
from twofold.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # both warn about what they are about to do

WORDS = ["<ask>", "<say>"]
LETTERS = "abcdefgh"
ASKED = [{"role": "user", "content": "<ask> which letter comes after a 3"}]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def init(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train(["which letter comes after a b c d e f g h user assistant 0123456789"] * 4, 330)
    model = Qwen3(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4,
            max_position_embeddings=256, tie_word_embeddings=request.param, initializer_range=0.1,
        )
    )  # fmt: skip
    model.init_weights(2)
    folder = tmp_path_factory.mktemp("init") / "model"
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<ask> which letter comes after {letter} {number}"},
                {"role": "assistant", "content": f"<say>{LETTERS[(place + 1) % 8]}"},
            ]
        }
        for place, letter in enumerate(LETTERS)
        for number in range(4)
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    return path


def run(init: Path, data: Path, out: Path, *, code: int = 0, words: list[str] = WORDS, **more: object) -> str:
    values = {"init": init, "data": data, "new_tokens": json.dumps(words), "rows.held_out": 0.2, **more}
    given = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(cli.app, ["run", "sft", *given, "--out", str(out)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def train(init: Path, data: Path, out: Path, method: str) -> LLM:
    settings = {"train.method": method, "train.epochs": 4, "train.batch_size": 8, "train.learning_rate": 0.01}
    run(init, data, out, **settings, **{"train.save_type": "f32", "train.sample_tokens": 4})
    return LLM(out / "sft")


def their_scores(model: object, ids: list[int]) -> torch.Tensor:
    logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)  # type: ignore[operator]
    return logp[:-1].gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1).detach()


def test_rows_carry_one_id_a_token_and_an_adapter_carries_its_rows(init: Path, data: Path, tmp_path: Path) -> None:
    ours = train(init, data, tmp_path, "lora")
    old = Tokenizer.from_folder(init)
    first = old.vocab_size
    ids = ours.renderer.prompt_ids(ASKED)
    assert [ours.tokenizer.token_id(word) for word in WORDS] == [first, first + 1] and ids.count(first) == 1
    stored = list(StoredExamples(tmp_path / "rows" / "train.safetensors"))
    assert all(e.token_ids.count(first) == 1 and e.weights[e.token_ids.index(first + 1)] > 0 for e in stored)
    result = read_json(tmp_path / "sft" / "result.json")
    assert result["after"]["loss"] < result["before"]["loss"]
    assert "<say>" in result["after"]["samples"][0]["reference"]
    # transformers: the same ids, the same numbers
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "sft")
    theirs = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]
    assert theirs == ids and tokenizer.convert_tokens_to_ids(WORDS) == [first, first + 1]
    by_them = transformers.AutoTokenizer.from_pretrained(init)
    by_them.add_tokens(WORDS)
    assert by_them.convert_tokens_to_ids(WORDS) == [first, first + 1] and len(by_them) == len(tokenizer)
    scores = ours.score([ids])[0]
    load = transformers.AutoModelForCausalLM.from_pretrained
    torch.testing.assert_close(their_scores(load(tmp_path / "sft"), ids), scores, atol=1e-4, rtol=1e-4)
    # PEFT: on the extended base, and on the one that was given once it has room for the tokens
    bases = [load(tmp_path / "extend", dtype=torch.float32), load(init, dtype=torch.float32)]
    bases[1].resize_token_embeddings(len(tokenizer))
    for base in bases:
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "sft" / "adapter")
        torch.testing.assert_close(their_scores(adapted, ids), scores, atol=1e-4, rtol=1e-4)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "sft" / "adapter")) == len(tokenizer)
    # and here
    based = LLM(tmp_path / "extend")
    load_adapter(based.model, "a", tmp_path / "sft" / "adapter")
    torch.testing.assert_close(based.score([ids])[0], scores, atol=1e-4, rtol=1e-4)


def test_only_the_rows_of_new_tokens_are_trained(init: Path, data: Path, tmp_path: Path) -> None:
    ours = train(init, data, tmp_path, "rows")
    before = LLM(tmp_path / "extend").model.state_dict()
    first, tables = Tokenizer.from_folder(init).vocab_size, 0
    for name, tensor in ours.model.state_dict().items():
        rows = (tensor != before[name]).reshape(len(tensor), -1).any(1).nonzero().flatten().tolist()
        assert rows in ([], [first, first + 1]), name
        tables += bool(rows)
    assert tables == (1 if ours.model.config.tie_word_embeddings else 2)
    width = ours.model.config.hidden_size
    assert read_json(tmp_path / "sft" / "result.json")["trained_parameters"] == 2 * width * tables


def test_all_weights_with_new_tokens(init: Path, data: Path, tmp_path: Path) -> None:
    ours = train(init, data, tmp_path, "full")
    result = read_json(tmp_path / "sft" / "result.json")
    assert result["after"]["loss"] < result["before"]["loss"]
    assert result["trained_parameters"] == sum(p.numel() for p in ours.model.parameters())
    assert not read_jsonl(tmp_path / "rows" / "dropped.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["<think>"], "'<think>' is a token already"),
        (["a"], "'a' is a token already"),
        (["<x>", "<x>"], "given twice"),
        ([""], "is empty or has white space"),
        (["<a b>"], "is empty or has white space"),
        ([" <x>"], "is empty or has white space"),
        (["e\u0301!"], "not in NFC form"),
        (["<|im_end|>!"], "contains the token '<|im_end|>'"),
    ],
)
def test_what_cannot_be_a_token_is_one_line(
    words: list[str], message: str, init: Path, data: Path, tmp_path: Path
) -> None:
    assert message in run(init, data, tmp_path, code=1, words=words)
