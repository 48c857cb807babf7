"""The tokenizer inside a GGUF file's metadata, to and from ours.

A file holds tokens, their kinds, merges and the *name* of a way to split text (``tokenizer.ggml.pre``); the split
itself is knowledge of the reader and stands here for the byte-level BPEs of Qwen, Llama 3, SmolLM and GPT-2. What is
built equals the official tokenizer.json. Works on plain dictionaries: no gguf package, no torch. Not here: other kinds
of tokenizer (SentencePiece), and the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from twofold.base.records import InputError
from twofold.text.tokenizer import PRETOKENIZE_REGEX, Tokenizer

# Kinds of token. UNUSED rows only pad the embedding and are no tokens.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_MODEL = "gpt2"  # llama.cpp's word for a byte-level BPE
_GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


@dataclass(frozen=True, slots=True)
class _Split:
    """How text is cut before merging: regular expressions applied in turn, each isolating its matches.

    nfc: normalise first. ignore_merges: a piece that is a token as it stands is not merged.
    """

    regexes: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False


_SPLITS = {
    "qwen2": _Split((PRETOKENIZE_REGEX,), nfc=True),
    "llama-bpe": _Split((PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),), ignore_merges=True),
    "smollm": _Split((r"\p{N}", _GPT2_REGEX)),
    "gpt-2": _Split((_GPT2_REGEX,)),
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_REGEX, r"\p{N}+", "[0-9][0-9][0-9]")),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def tokenizer_from_gguf(metadata: Mapping[str, Any], origin: str) -> Tokenizer:
    """Build the tokenizer that a file's metadata describes; ids are the rows of its embedding.

    Args:
        metadata: keys of the file with plain values (``tokenizer.ggml.*``). origin: begins error messages.

    Raises:
        InputError: a key is missing, another kind of tokenizer, an unknown split, or tokens that do not fit together.
    """
    model, pre = _required(metadata, "model", origin), _required(metadata, "pre", origin)
    if model != _MODEL:
        raise InputError(
            f"{origin}: tokenizer.ggml.model {model!r} is not supported, only {_MODEL!r} (byte-level BPE); "
            "give the folder of the tokenizer beside the file"
        )
    split = _SPLITS.get(_ALIASES.get(pre, pre))
    if split is None:
        known = ", ".join([*_SPLITS, *_ALIASES])
        raise InputError(f"{origin}: tokenizer.ggml.pre {pre!r} is not supported; known: {known}")
    tokens, kinds = _required(metadata, "tokens", origin), _required(metadata, "token_type", origin)
    merges = [merge.split(" ", 1) for merge in _required(metadata, "merges", origin)]
    if len(tokens) != len(kinds):
        raise InputError(f"{origin}: {len(tokens)} tokens but {len(kinds)} token types; convert the model again")
    added = {i: token for i, token in enumerate(tokens) if kinds[i] in (CONTROL, USER_DEFINED)}
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] not in (CONTROL, USER_DEFINED, UNUSED)}
    if sorted(added) != list(range(len(vocab), len(vocab) + len(added))):
        vocab |= {
            token: i for i, token in added.items()
        }  # not simply after the others: they need their ids spelled out
    special = {i: kinds[i] == CONTROL for i in added}
    backend = _backend(_specification(split, vocab, merges, {i: (added[i], special[i]) for i in added}), origin)
    for i, token in enumerate(tokens):
        if kinds[i] != UNUSED and backend.token_to_id(token) != i:
            raise InputError(f"{origin}: token {token!r} stands twice in the vocabulary; convert the model again")
    return Tokenizer(backend)


def _required(metadata: Mapping[str, Any], key: str, origin: str) -> Any:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        raise InputError(
            f"{origin}: tokenizer.ggml.{key} is missing; convert the model again with a recent llama.cpp, "
            "or give the folder of the tokenizer beside the file"
        )
    return value


def _specification(
    split: _Split, vocab: dict[str, int], merges: list[list[str]], added: dict[int, tuple[str, bool]]
) -> dict[str, Any]:
    """The contents of tokenizer.json. added: id -> (spelling, special)."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    cuts = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in split.regexes
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": special} for i, (token, special) in sorted(added.items())
        ],
        "normalizer": {"type": "NFC"} if split.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, _BYTE_LEVEL]},
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _backend(specification: dict[str, Any], origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(specification))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{origin}: tokens and merges do not fit together ({error}); convert the model again"
        ) from None


def gguf_vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The ``tokenizer.ggml.*`` metadata of a tokenizer, for an embedding of ``rows`` rows.

    Ids without a token become ``[PAD{id}]`` of kind UNUSED. ``<|im_end|>`` ends a turn and ``<|endoftext|>`` pads,
    where the tokenizer has them.

    Raises:
        InputError: the embedding has too few rows, or llama.cpp has no name for the way the tokenizer splits text.
    """
    specification = json.loads(tokenizer.to_json())
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding {rows} rows; they are not a pair, "
            "give the tokenizer of this model"
        )
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in specification["model"]["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for i, token in tokenizer.structure.items():
        tokens[i], kinds[i] = token, CONTROL if tokenizer.is_special(i) else USER_DEFINED
    values = {
        "model": _MODEL,
        "pre": _name_of(specification),
        "tokens": tokens,
        "token_type": kinds,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in specification["model"]["merges"]],
        "add_bos_token": False,
    }
    end, pad = (tokenizer.control_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    for key, i in (("bos_token_id", pad), ("eos_token_id", end if end is not None else pad), ("padding_token_id", pad)):
        if i is not None:
            values[key] = i
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def _name_of(specification: dict[str, Any]) -> str:
    """llama.cpp's name for the split of a tokenizer.json."""
    normalizer = specification["normalizer"]
    split = _Split(
        tuple(_regexes(specification["pre_tokenizer"])),
        nfc=normalizer == {"type": "NFC"},
        ignore_merges=bool(specification["model"].get("ignore_merges")),
    )
    for name, known in _SPLITS.items():
        if split == known and (normalizer is None or split.nfc):
            return name
    raise InputError(
        "llama.cpp has no name for this tokenizer's way to split text; "
        f"only those of {', '.join(_SPLITS)} can be written"
    )


def _regexes(part: dict[str, Any] | None) -> list[str]:
    """The regular expressions of a pre-tokenizer, those inside ``Digits`` and ``ByteLevel`` included."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [regex for inner in part["pretokenizers"] for regex in _regexes(inner)]
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return [str(part["pattern"].get("Regex"))]
    if part["type"] == "Digits" and part["individual_digits"]:
        return [r"\p{N}"]
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return [_GPT2_REGEX] if part["use_regex"] else []
    return [f"unknown {part['type']}"]
