"""Tokenizers through GGUF metadata: the official one to the letter, added tokens and padding, every named split."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from twofold.base.gguf_file import read_metadata
from twofold.base.records import InputError
from twofold.text import gguf_tokenizer
from twofold.text.chat import ChatPolicy, Renderer
from twofold.text.gguf_tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    gguf_ends,
    gguf_template,
    gguf_vocabulary,
    tokenizer_from_gguf,
)
from twofold.text.tokenizer import Tokenizer

TEXTS = [
    "Hello, world! they'LL go 12345 3.14159",
    "你好，世界 naïve cafe\u0301 🙂 Привет мир مرحبا שלום 안녕하세요 नमस्ते",
    "def f(x):\n    return {'a': x**2}\r\n\r\n\t# end  \n \n",
    "  two   spaces \n\n$a+b=<c>^d~|e| ½ Ⅷ <|im_end|><think>",
]


def asset(name: str) -> Path:
    """A file of the folder that TWOFOLD_ASSETS names; the test skips without it."""
    path = Path(os.environ.get("TWOFOLD_ASSETS", "/nonexistent")) / name
    if not path.is_file():
        pytest.skip(f"needs {name} in the folder named by TWOFOLD_ASSETS")
    return path


def test_ours_comes_back_to_the_letter(tokenizer: Tokenizer) -> None:
    metadata = gguf_vocabulary(tokenizer, tokenizer.vocab_size + 5)
    back = tokenizer_from_gguf(metadata, "x")
    assert back.vocab_size == tokenizer.vocab_size and back.structure == tokenizer.structure
    assert [back.is_special(i) for i in back.structure] == [tokenizer.is_special(i) for i in tokenizer.structure]
    for text in TEXTS:
        assert back.encode(text) == tokenizer.encode(text)
        assert back.encode_with_special(text) == tokenizer.encode_with_special(text)
    assert gguf_vocabulary(back, tokenizer.vocab_size + 5) == metadata


def test_metadata_is_what_llama_cpp_expects(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    metadata = gguf_vocabulary(tokenizer, size + 2)
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    assert (values["model"], values["pre"], values["add_bos_token"]) == ("gpt2", "qwen2", False)
    assert values["tokens"][-3:] == ["</think>", f"[PAD{size}]", f"[PAD{size + 1}]"]
    kinds = values["token_type"]
    assert kinds[-3:] == [USER_DEFINED, UNUSED, UNUSED] and kinds[0] == NORMAL
    assert kinds[tokenizer.im_end] == CONTROL and len(kinds) == size + 2
    assert values["eos_token_id"] == tokenizer.im_end
    assert values["bos_token_id"] == values["padding_token_id"] == tokenizer.endoftext
    with pytest.raises(InputError, match=f"{size} tokens and the embedding {size - 1} rows; they are not a pair"):
        gguf_vocabulary(tokenizer, size - 1)


def test_begin_and_end_tokens_come_back(tokenizer: Tokenizer) -> None:
    """Ends that are not Qwen's, a BOS that begins every text, more ends than llama.cpp has keys for."""
    text = tokenizer.to_json()
    for ours, theirs in (("im_start", "begin_of_text"), ("endoftext", "end_of_text"), ("im_end", "eot_id")):
        text = text.replace(f"<|{ours}|>", f"<|{theirs}|>")
    backend, bos = tokenizers.Tokenizer.from_str(text), "<|begin_of_text|>"
    begin, end, turn = (backend.token_to_id(f"<|{name}|>") for name in ("begin_of_text", "end_of_text", "eot_id"))
    template = processors.TemplateProcessing([bos, "$A"], special_tokens=[(bos, begin)])
    backend.post_processor = processors.Sequence([backend.post_processor, template])
    llama = Tokenizer(backend)
    metadata = gguf_vocabulary(llama, llama.vocab_size, [end, turn])
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if "token_id" in key}
    assert values == {"bos_token_id": begin, "eos_token_id": end, "eot_token_id": turn}
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    back = tokenizer_from_gguf(metadata, "x")
    assert gguf_ends(metadata, back, "x") == (end, turn)
    assert back.bos_id == begin and back.encode_prompt("a") == llama.encode_prompt("a")
    assert tokenizer_from_gguf(gguf_vocabulary(back, back.vocab_size, [end]), "x").digest == back.digest
    assert gguf_vocabulary(back, llama.vocab_size, [end, turn]) == metadata
    silent = metadata | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": None}
    del silent["tokenizer.ggml.add_bos_token"]
    assert tokenizer_from_gguf(silent, "x").bos_id == begin  # what llama.cpp does unless told otherwise
    with pytest.raises(InputError, match="add_bos_token is true but bos_token_id is missing"):
        tokenizer_from_gguf({key: v for key, v in metadata.items() if "bos_token_id" not in key}, "x")
    with pytest.raises(InputError, match="nothing says which token ends a reply"):
        gguf_vocabulary(llama, llama.vocab_size)
    with pytest.raises(InputError, match="room for 3 end tokens, this model has 4"):
        gguf_vocabulary(llama, llama.vocab_size, [1, 2, 3, 4])


def test_ends_of_a_tokenizer_that_has_qwen_s_tokens_too(tokenizer: Tokenizer) -> None:
    """What Qwen's own end tokens would wrongly add is kept out by a key of ours; Qwen needs none."""
    usual = gguf_vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    assert usual == gguf_vocabulary(tokenizer, tokenizer.vocab_size) and not any("twofold" in key for key in usual)
    assert "tokenizer.ggml.eot_token_id" not in usual
    for ends in ([9], [tokenizer.endoftext], [7, 8, 9, tokenizer.im_end]):
        metadata = gguf_vocabulary(tokenizer, tokenizer.vocab_size, ends)
        assert metadata["tokenizer.ggml.eos_token_id"] == ends[0]
        assert gguf_ends(metadata, tokenizer_from_gguf(metadata, "x"), "x") == tuple(ends)


def test_added_words_are_read_in_data_as_before(tokenizer: Tokenizer) -> None:
    grown = tokenizer.add_words(["zyxx", "né"])
    metadata = gguf_vocabulary(grown, grown.vocab_size)
    back = tokenizer_from_gguf(metadata, "x")
    text = "a zyxx and né<think>"
    assert back.encode(text) == grown.encode(text) and grown.token_id("zyxx") in back.encode(text)
    assert back.encode_with_special(text) == grown.encode_with_special(text)
    assert gguf_vocabulary(back, grown.vocab_size) == metadata
    for ids, message in (([0], "names a token that is not user-defined"), (["x"], "names 'x', which is no token")):
        with pytest.raises(InputError, match=message):
            tokenizer_from_gguf(metadata | {"twofold.word_token_ids": ids}, "x")


def test_added_tokens_anywhere_keep_their_ids(tokenizer: Tokenizer) -> None:
    """As in SmolLM, whose control tokens come first, and with unused rows in between."""
    metadata = gguf_vocabulary(tokenizer, tokenizer.vocab_size)
    front, padding = ["<|im_start|>", "<|im_end|>", "<pad"], ["[PAD3]", "[PAD4]"]
    rest = [t for t in metadata["tokenizer.ggml.tokens"] if t not in front]
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    metadata["tokenizer.ggml.tokens"] = front + padding + rest
    metadata["tokenizer.ggml.token_type"] = [CONTROL, CONTROL, USER_DEFINED, UNUSED, UNUSED, *map(kinds.get, rest)]
    found = tokenizer_from_gguf(metadata, "x")
    assert (found.token_id("<|im_end|>"), found.token_id("<pad"), found.control_id("<pad")) == (1, 2, 2)
    assert found.is_special(1) and not found.is_special(2) and found.control_id("[PAD3]") is None
    ids = found.encode_with_special("the<|im_end|><pad fox")
    assert 1 in ids and 2 in ids and found.decode(ids) == "the<|im_end|><pad fox"
    data = found.encode("the<|im_end|><pad fox")
    assert 2 in data and not {0, 1} & set(data)  # the chat format is structure, other added tokens are vocabulary
    shift = {found.token_bytes(i) for i in found.encode(TEXTS[0])}
    assert shift == {tokenizer.token_bytes(i) for i in tokenizer.encode(TEXTS[0])}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("qwen2", "they'LL  1234 a.b", ["they", "'LL", " ", " ", "1", "2", "3", "4", " a", ".b"]),
        ("deepseek-r1-qwen", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "they'LL  1234 a.b", ["they", "'LL", " ", " ", "123", "4", " a", ".b"]),
        ("llama3", "1234", ["123", "4"]),
        ("smollm", "they'll  1234 a.b", ["they", "'ll", "  ", "1", "2", "3", "4", " a", ".", "b"]),
        ("gpt-2", "they'll  1234 a.b", ["they", "'ll", " ", " 1234", " a", ".", "b"]),
        ("default", "they'll  1234 a.b", ["they", "'", "ll", " ", " ", "123", "4", " a", ".", "b"]),
    ],
)
def test_splits(pre: str, text: str, pieces: list[str], tokenizer: Tokenizer) -> None:
    metadata = gguf_vocabulary(tokenizer, tokenizer.vocab_size) | {"tokenizer.ggml.pre": pre}
    backend = tokenizer_from_gguf(metadata, "x")._full
    cut = [piece.replace("Ġ", " ") for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces
    name = gguf_vocabulary(tokenizer_from_gguf(metadata, "x"), tokenizer.vocab_size)["tokenizer.ggml.pre"]
    assert name == gguf_tokenizer._ALIASES.get(pre, pre)


def test_the_library_s_own_spellings_of_a_split_are_recognised() -> None:
    def named(*parts: Any, ignore_merges: bool = False) -> str:
        alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[], ignore_merges=ignore_merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
        backend.decoder = decoders.ByteLevel()
        return str(gguf_vocabulary(Tokenizer(backend), 256, [0])["tokenizer.ggml.pre"])

    assert named(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)) == "smollm"
    assert named(pre_tokenizers.ByteLevel(add_prefix_space=False)) == "gpt-2"
    for parts in ([pre_tokenizers.Whitespace()], [pre_tokenizers.ByteLevel(add_prefix_space=True)]):
        with pytest.raises(
            InputError, match=r"llama\.cpp has no name for this tokenizer's way to split text; only those of"
        ):
            named(*parts)
    with pytest.raises(InputError, match="no name"):
        named(pre_tokenizers.ByteLevel(add_prefix_space=False), ignore_merges=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="llama"), "tokenizer.ggml.model 'llama' is not supported, only 'gpt2'"),
        (dict(model="llama", pre=None), "SentencePiece cannot be read from any file, choose a model with another"),
        (dict(pre="viking"), "'viking' is not supported; known: qwen2, llama-bpe, smollm, gpt-2, default, llama3"),
        (dict(pre=None), "tokenizer.ggml.pre is missing"),
        (dict(merges=None), "tokenizer.ggml.merges is missing"),
        (dict(model=["gpt2"]), "tokenizer.ggml.model must be a string, got ['gpt2']"),
        (dict(pre=[5, 6]), "tokenizer.ggml.pre must be a string, got [5, 6]; convert the model again"),
        (dict(merges=[1, 2]), "tokenizer.ggml.merges must be a list of strings, got [1, 2]"),
        (dict(merges="abc"), "tokenizer.ggml.merges must be a list of strings, got 'abc'"),
        (dict(tokens=[1, 2]), "tokenizer.ggml.tokens must be a list of strings"),
        (dict(token_type=["a"]), "tokenizer.ggml.token_type must be a list of whole numbers"),
        (dict(bos_token_id="x"), "tokenizer.ggml.bos_token_id names 'x', which is no token"),
        (dict(add_bos_token=2), "tokenizer.ggml.add_bos_token must be true or false, got 2"),
        (dict(token_type=[1, 1]), "tokens but 2 token types"),
        (dict(merges=["a zzz"]), "tokens and merges do not fit together"),
        (dict(merges=["azzz"]), "tokens and merges do not fit together"),
    ],
)
def test_metadata_that_does_not_fit(change: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    metadata = gguf_vocabulary(tokenizer, tokenizer.vocab_size)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(InputError) as caught:
        tokenizer_from_gguf(metadata, "model.gguf")
    assert str(caught.value).startswith("model.gguf: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_outside_the_byte_alphabet_stands_for_its_spelling(tokenizer: Tokenizer) -> None:
    """Converters leave control tokens and words of other languages as NORMAL."""
    metadata = gguf_vocabulary(tokenizer, tokenizer.vocab_size + 2)
    rows = [tokenizer.vocab_size, tokenizer.vocab_size + 1]
    for row, spelling in zip(rows, ("鲢", "▁x y"), strict=True):
        metadata["tokenizer.ggml.tokens"][row], metadata["tokenizer.ggml.token_type"][row] = spelling, NORMAL
    found = tokenizer_from_gguf(metadata, "x")
    assert found.foreign == dict(zip(rows, ("鲢", "▁x y"), strict=True))
    assert found.decode([*rows, *found.encode("a")]) == "鲢▁x ya" and not {*found.encode("鲢▁x y")} & {*rows}


def test_a_token_that_stands_twice_is_refused(tokenizer: Tokenizer) -> None:
    metadata = gguf_vocabulary(tokenizer, tokenizer.vocab_size)
    metadata["tokenizer.ggml.tokens"][3] = metadata["tokenizer.ggml.tokens"][4]
    with pytest.raises(InputError, match=r"twice in the vocabulary|do not fit together"):
        tokenizer_from_gguf(metadata, "x")


@pytest.fixture(scope="module")
def official() -> Tokenizer:
    return Tokenizer.from_folder(asset("package/models/tokenizer.json").parent)


@pytest.mark.slow
def test_the_official_tokenizer_comes_back_to_the_letter(official: Tokenizer) -> None:
    metadata = gguf_vocabulary(official, 151936)
    assert len(metadata["tokenizer.ggml.merges"]) == 151387
    assert tokenizer_from_gguf(json.loads(json.dumps(metadata)), "x").digest == official.digest


@pytest.mark.slow
def test_the_coder_file_has_the_official_ids(official: Tokenizer) -> None:
    """Qwen2.5's vocabulary is Qwen3's but for four added tokens, and its fill-in-the-middle tokens are special."""
    metadata = read_metadata(asset("qwen2.5-coder-0.5b-q4_k_m.gguf"))
    found = tokenizer_from_gguf(metadata, "coder")
    assert found.vocab_size == 151665
    missing = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
    assert found.structure == {i: t for i, t in official.structure.items() if t not in missing}
    texts = TEXTS + list(pydoc_data.topics.topics.values()) + [Path(json.__file__).read_text(encoding="utf-8")]
    assert found.encode_batch(texts) == official.encode_batch(texts)
    chat = "<|im_start|>user\nhi 12<|im_end|>\n<|im_start|>assistant\n"
    assert found.encode_with_special(chat) == official.encode_with_special(chat)


def test_a_gguf_file_has_a_renderer(tmp_path: Path) -> None:
    """``Renderer.from_pretrained`` reads tokenizer and template from the header; no weights are needed."""
    gguf = pytest.importorskip("gguf")
    tokenizer = Tokenizer.train(["user assistant system hello there"] * 4, 320)
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    for key, value in gguf_vocabulary(tokenizer, tokenizer.vocab_size).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_chat_template(ChatPolicy().template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ask = [{"role": "user", "content": "hello"}]
    assert Renderer.from_pretrained(path).prompt_ids(ask) == Renderer(tokenizer).prompt_ids(ask)


@pytest.mark.parametrize("template", [5, ["a"]])
def test_a_template_that_is_no_text(template: Any) -> None:
    with pytest.raises(InputError, match=r"^x: tokenizer\.chat_template must be a string, got "):
        gguf_template({"tokenizer.chat_template": template}, "x")
