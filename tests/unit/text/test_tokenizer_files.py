"""Tokenizers from vocab.json and merges.txt: those of tokenizer.json, or an error that names file and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from twofold.base.records import InputError
from twofold.text.chat import CHAT_TEMPLATE
from twofold.text.tokenizer import ADDED_TOKENS, Tokenizer

TEXTS = [
    "they'LL go 12345, naïve cafe\u0301 🙂",
    "  two\r\n\n x",
    "<|im_start|>user\n<think>\n\n</think>Rust<|im_end|>",
]


def halved(tokenizer: Tokenizer, folder: Path, keep: tuple[str, ...] = ("tokenizer_config.json",)) -> Path:
    """A folder as a slow tokenizer saves it; of the files beside vocabulary and merges only ``keep``."""
    tokenizer.save(folder, CHAT_TEMPLATE)
    added = {token: i for i, token in tokenizer.structure.items()}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    for path in folder.iterdir():
        if path.name not in ("vocab.json", "merges.txt", *keep):
            path.unlink()
    return folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def same(found: Tokenizer, wanted: Tokenizer) -> bool:
    flags = [(i, found.is_special(i)) for i in found.structure]
    return (
        found.structure == wanted.structure
        and flags == [(i, wanted.is_special(i)) for i in wanted.structure]
        and (found.vocab_size, found.bos_id) == (wanted.vocab_size, wanted.bos_id)
        and all(found.encode(text) == wanted.encode(text) for text in TEXTS)
        and all(found.encode_with_special(text) == wanted.encode_with_special(text) for text in TEXTS)
    )


@pytest.mark.parametrize(
    "keep",
    [
        ("tokenizer_config.json",),
        ("added_tokens.json", "config.json"),
        ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"),
    ],
)
def test_two_files_are_the_tokenizer(keep: tuple[str, ...], tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = Tokenizer.from_folder(halved(tokenizer, tmp_path, keep))
    assert same(found, tokenizer)
    found.save(tmp_path / "again", CHAT_TEMPLATE)
    assert same(Tokenizer.from_folder(tmp_path / "again"), tokenizer)


def test_added_words_and_line_breaks_of_windows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    longer = tokenizer.add_words(["Rust"])
    folder = halved(longer, tmp_path)
    (folder / "merges.txt").write_bytes((folder / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert same(Tokenizer.from_folder(folder), longer)


def test_tokens_that_no_qwen_has(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Without flags a token is special by its role, and a word otherwise, as in transformers."""
    longer = tokenizer.add_tokens(["<|tool|>", "<answer>"])
    folder = halved(longer, tmp_path, ("added_tokens.json", "special_tokens_map.json", "config.json"))
    change(folder / "special_tokens_map.json", additional_special_tokens=[{"content": "<|tool|>"}])
    found = Tokenizer.from_folder(folder)
    tool, answer = (found.token_id(token) for token in ("<|tool|>", "<answer>"))
    assert found.is_special(tool) and not found.is_special(answer)
    assert found.encode("<|tool|><answer>") == [tool, answer]  # no structure of the chat format: tokens inside contents
    assert found.think_open == tokenizer.think_open and not found.is_special(found.token_id("<think>"))


def test_gpt2_splits_as_gpt2_and_has_its_end_in_the_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = json.loads(tokenizer.to_json())["model"]
    end = "<|endoftext|>"
    vocab = model["vocab"] | {end: len(model["vocab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    settings = {"tokenizer_class": "GPT2TokenizerFast", "bos_token": end, "eos_token": end, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = Tokenizer.from_folder(tmp_path)
    library = tokenizers.Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens([AddedToken(end, special=True)])
    for text in TEXTS:
        assert found.encode_with_special(text + end) == library.encode(text + end).ids
    assert found.bos_id == found.token_id(end) and found.encode_prompt("a")[0] == found.bos_id
    assert found.decode(found.encode("cafe\u0301")) == "cafe\u0301"  # GPT-2 does not normalise


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "tokenizer_config.json",
            {"tokenizer_class": "LlamaTokenizer"},
            "tokenizer_class 'LlamaTokenizer': how text is",
        ),
        ("tokenizer_config.json", {"tokenizer_class": None}, "names no tokenizer_class.*copy its tokenizer.json, or"),
        ("tokenizer_config.json", {"added_tokens_decoder": {}}, "says which ids the added tokens have; copy its token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder has no token at 'x'"),
        ("tokenizer_config.json", {"add_prefix_space": True}, "add_prefix_space is not supported with vocab.json"),
        ("tokenizer_config.json", {"add_bos_token": True}, "add_bos_token is true but bos_token None has no id"),
        ("vocab.json", {"a": "b"}, "vocab.json is damaged: token 'a' has the id 'b'"),
        ("vocab.json", {"qqq": 5}, "vocab.json is damaged: two tokens have one id"),
    ],
)
def test_files_that_say_too_little_or_nonsense(
    file: str, values: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    change(halved(tokenizer, tmp_path) / file, **values)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_contradict_each_other(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keep = ("tokenizer_config.json", "added_tokens.json")
    folder = halved(tokenizer, tmp_path, keep)
    added = {token: tokenizer.token_id(token) for token, _ in ADDED_TOKENS}
    for wrong, message in (
        ({"<new>": added["<think>"]}, "'<think>' and '<new>' both have the id"),
        ({"<think>": tokenizer.vocab_size}, "token '<think>' has two ids"),
        ({"<new>": 5}, "has the id of an added token"),
    ):
        (folder / "added_tokens.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=message):
            Tokenizer.from_folder(folder)


def test_merges_that_are_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = halved(tokenizer, tmp_path)
    for text, message in (
        ("a b\nabc", "merges.txt:2 is not 'left right'"),
        ("zz yy", "vocab.json: tokens and merges do"),
    ):
        (folder / "merges.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            Tokenizer.from_folder(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json does not exist; .*; it has vocab\.json alone"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.txt"])
def test_files_of_other_kinds_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=rf"{name}: a tokenizer of the kind .* is not supported, only byte-level BPE"):
        Tokenizer.from_folder(tmp_path)
