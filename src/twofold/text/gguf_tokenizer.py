"""The tokenizer inside a GGUF file's metadata, to and from ours.

A file holds tokens, their kinds, merges and the *name* of a way to split text (``tokenizer.ggml.pre``); the split
itself is knowledge of the reader and stands here for the byte-level BPEs of Qwen, Llama 3, SmolLM and GPT-2. What is
built equals the official tokenizer.json. Works on plain dictionaries: no gguf package, no torch. Not here: other kinds
of tokenizer (SentencePiece), and the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from twofold.base.records import InputError
from twofold.text.roles import Roles, token_ids
from twofold.text.tokenizer import PRETOKENIZE_REGEX, Tokenizer

# Kinds of token. UNUSED rows only pad the embedding and are no tokens.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_KEY, _TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
_LISTS = {"tokens": str, "token_type": int, "merges": str}
# What ends a reply: the end of text, of a turn, of a message before a tool runs. Files made from base models name only
# the first, so what a tokenizer calls by these names counts as well, as in llama.cpp.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_KNOWN_ENDS = ("<|im_end|>", "<|endoftext|>")
_OWN_ENDS = "twofold.end_token_ids"  # all of them and no other, where the above would say something else
_OWN_WORDS = (
    "twofold.word_token_ids"  # added words that are matched in normalised text, of which the format has no kind
)
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
            "other kinds cannot be read from any file, choose another model"
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
    roles, begins = _roles(metadata, tokens, origin, split.ignore_merges)
    words = token_ids(metadata.get(_OWN_WORDS), len(tokens), f"{origin}: {_OWN_WORDS}")
    if any(kinds[i] != USER_DEFINED for i in words):
        raise InputError(f"{origin}: {_OWN_WORDS} names a token that is not user-defined; convert the model again")
    specification = _specification(
        split, vocab, merges, {i: (token, kinds[i] == CONTROL, i in words) for i, token in added.items()}
    )
    if begins is not None:
        specification["post_processor"] = _begin(begins, tokens[begins])
    backend = _backend(specification, origin)
    for i, token in enumerate(tokens):
        if kinds[i] != UNUSED and backend.token_to_id(token) != i:
            raise InputError(f"{origin}: token {token!r} stands twice in the vocabulary; convert the model again")
    return Tokenizer(backend, roles)


def gguf_template(metadata: Mapping[str, Any], origin: str) -> str | None:
    """The chat template in a file's metadata, None without one; InputError where it is no text."""
    template = metadata.get(_TEMPLATE)
    if not isinstance(template, str | None):
        raise InputError(f"{origin}: {_TEMPLATE} must be a string, got {template!r:.60}; convert the model again")
    return template


def gguf_ends(metadata: Mapping[str, Any], tokenizer: Tokenizer, origin: str) -> tuple[int, ...]:
    """The tokens that end a reply, as a file's metadata and the tokenizer made of it say; empty if neither does.

    Raises:
        InputError: a key that names no token of the file.
    """
    rows = len(metadata[_KEY + "tokens"])
    if own := token_ids(metadata.get(_OWN_ENDS), rows, f"{origin}: {_OWN_ENDS}"):
        return own
    named = [i for key in _ENDS for i in token_ids(metadata.get(_KEY + key), rows, f"{origin}: {_KEY}{key}")]
    known = [i for token in _KNOWN_ENDS if (i := tokenizer.control_id(token)) is not None]
    return tuple(dict.fromkeys([*named, *known]))


def _roles(metadata: Mapping[str, Any], tokens: list[str], origin: str, usual: bool) -> tuple[Roles, int | None]:
    """Roles of the tokens, and the token that begins texts. usual: llama.cpp adds a BOS unless the file forbids it."""
    ids = {}
    for role, key in (("bos", "bos_token_id"), ("pad", "padding_token_id")):
        for i in token_ids(metadata.get(_KEY + key), len(tokens), f"{origin}: {_KEY}{key}"):
            ids[role] = i
    adds = metadata.get(_KEY + "add_bos_token", usual and "bos" in ids)
    if not isinstance(adds, bool):
        raise InputError(f"{origin}: {_KEY}add_bos_token must be true or false, got {adds!r:.60}")
    if adds and "bos" not in ids:
        raise InputError(f"{origin}: add_bos_token is true but bos_token_id is missing; convert the model again")
    if not adds and ids.get("bos") == ids.get("pad"):
        ids.pop("bos", None)  # Qwen has none; files name the padding so that readers need not guess
    named = {role: tokens[i] for role, i in ids.items()}
    return Roles(bos=named.get("bos"), pad=named.get("pad")), ids["bos"] if adds else None


def _required(metadata: Mapping[str, Any], key: str, origin: str) -> Any:
    value, kind = metadata.get(_KEY + key), _LISTS.get(key)
    if value is None:
        raise InputError(f"{origin}: {_KEY}{key} is missing; convert the model again with a recent llama.cpp")
    if kind is None and not isinstance(value, str):
        raise InputError(f"{origin}: {_KEY}{key} must be a string, got {value!r:.60}; convert the model again")
    if kind and not (isinstance(value, list) and all(isinstance(part, kind) for part in value)):
        words = "strings" if kind is str else "whole numbers"
        raise InputError(f"{origin}: {_KEY}{key} must be a list of {words}, got {value!r:.60}; convert the model again")
    return value


def _specification(
    split: _Split, vocab: dict[str, int], merges: list[list[str]], added: dict[int, tuple[str, bool, bool]]
) -> dict[str, Any]:
    """The contents of tokenizer.json. added: id -> (spelling, special, a word)."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    cuts = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in split.regexes
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "normalized": word, "special": special}
            for i, (token, special, word) in sorted(added.items())
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


def _begin(bos: int, token: str) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that puts a BOS before every text."""
    first, second = (
        [{"SpecialToken": {"id": token, "type_id": kind}}, {"Sequence": {"id": text, "type_id": kind}}]
        for kind, text in enumerate("AB")
    )
    named = {token: {"id": token, "ids": [bos], "tokens": [token]}}
    template = {"type": "TemplateProcessing", "single": first, "pair": [*first, *second], "special_tokens": named}
    return {"type": "Sequence", "processors": [_BYTE_LEVEL, template]}


def _backend(specification: dict[str, Any], origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(specification))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{origin}: tokens and merges do not fit together ({error}); convert the model again"
        ) from None


def gguf_vocabulary(tokenizer: Tokenizer, rows: int, ends: Sequence[int] | None = None) -> dict[str, Any]:
    """The metadata of a tokenizer, ``tokenizer.ggml.*`` and where needed our own, for an embedding of ``rows`` rows.

    Ids without a token become ``[PAD{id}]`` of kind UNUSED. ``<|endoftext|>`` pads where nothing else is named.

    Args:
        ends: the tokens that end a reply; None for those that the tokenizer knows.

    Raises:
        InputError: the embedding has too few rows, llama.cpp has no name for the way the tokenizer splits text or no
            place for so many end tokens, or there is none.
    """
    ends = tuple(ends or tokenizer.eos_ids)
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
        "add_bos_token": tokenizer.bos_id is not None,
        **_role_keys(tokenizer, ends),
    }
    metadata = {_KEY + key: value for key, value in values.items()}
    if words := [t["id"] for t in specification["added_tokens"] if t["normalized"] and not t["special"]]:
        metadata[_OWN_WORDS] = words
    return metadata if gguf_ends(metadata, tokenizer, "") == ends else metadata | {_OWN_ENDS: list(ends)}


def _role_keys(tokenizer: Tokenizer, ends: tuple[int, ...]) -> dict[str, int]:
    """Keys of single tokens. llama.cpp takes token 11 for a BOS or EOS that is not named."""
    text = tokenizer.control_id("<|endoftext|>")
    pad = next((i for i in (tokenizer.role_id("pad"), text) if i is not None), None)
    bos = next((i for i in (tokenizer.bos_id, tokenizer.role_id("bos"), text) if i is not None), None)
    known = [tokenizer.control_id(token) for token in _KNOWN_ENDS]
    named = [ends[0], *(i for i in ends[1:] if i not in known)]
    if len(named) > len(_ENDS):
        raise InputError(f"llama.cpp has room for {len(_ENDS)} end tokens, this model has {len(named)}; name fewer")
    further = dict(zip(_ENDS[1:], named[1:], strict=False))
    keys = {"bos_token_id": bos, "eos_token_id": named[0], "padding_token_id": pad, **further}
    return {key: i for key, i in keys.items() if i is not None}


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
