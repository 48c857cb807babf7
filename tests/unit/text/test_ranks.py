"""Rank files: merges are found again for a trained vocabulary; broken files are named."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from twofold.base.records import InputError
from twofold.text.ranks import merges_of, read_ranks
from twofold.text.tokenizer import Tokenizer


def rank_file(path: Path, tokens: list[bytes]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def test_a_trained_tokenizer_comes_back_from_its_ranks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size - 26)]
    loaded = Tokenizer.from_tiktoken(rank_file(tmp_path / "qwen.tiktoken", tokens))
    merges = [json.loads(t.to_json())["model"]["merges"] for t in (tokenizer, loaded)]
    assert merges[0] == merges[1] and loaded.vocab_size == tokenizer.vocab_size
    text = 'The quick <|im_end|> 你好 naïve {"name": 1}\n\n'
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.encode_with_special(text) == tokenizer.encode_with_special(text)
    assert Tokenizer.from_folder(tmp_path).digest == loaded.digest


def test_broken_files_are_named(tmp_path: Path) -> None:
    every = [bytes([byte]) for byte in range(256)]
    with pytest.raises(InputError, match="cannot be read"):
        read_ranks(tmp_path / "none.tiktoken")
    with pytest.raises(InputError, match="not a whole rank file"):
        read_ranks(rank_file(tmp_path / "a", every[:-1]))
    for line in ("!!! 256", "YWI= x", "YWI=", "YWI= 256 3"):
        path = rank_file(tmp_path / "b", every)
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(InputError, match=r"b:257 is not"):
            read_ranks(path)
    ranks = read_ranks(rank_file(tmp_path / "c", [*every, b"ab", b"abc"]))
    assert merges_of(ranks) == [(b"a", b"b"), (b"ab", b"c")]
    with pytest.raises(InputError, match="not a merge"):
        merges_of(read_ranks(rank_file(tmp_path / "d", [*every, b"abc"])))
