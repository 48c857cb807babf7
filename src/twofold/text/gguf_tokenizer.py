"""The tokenizer inside a GGUF file's metadata, to and from ours.

A file holds tokens, their kinds, merges and the *name* of a way to split text (``tokenizer.ggml.pre``); the split
itself is knowledge of the reader and stands here for the byte-level BPEs of Qwen, Llama 3, SmolLM and GPT-2. What is
built equals the official tokenizer.json. Works on plain dictionaries: no gguf package, no torch. Not here: other kinds
of tokenizer (SentencePiece), and the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from twofold.base.records import InputError
from twofold.text.roles import Roles, token_ids
from twofold.text.specification import GPT2, GPT2_REGEX, PRETOKENIZE_REGEX, QWEN, Split, backend_of, specification
from twofold.text.tokenizer import Tokenizer

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
_OTHER_MODELS = {"llama": "SentencePiece", "t5": "SentencePiece unigram", "bert": "WordPiece"}

_SPLITS = {
    "qwen2": QWEN,
    "llama-bpe": Split((PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),), ignore_merges=True),
    "smollm": Split((r"\p{N}", GPT2_REGEX)),
    "gpt-2": GPT2,
    "default": Split((r"[\p{P}\$\+<=>\^~\|]+", GPT2_REGEX, r"\p{N}+", "[0-9][0-9][0-9]")),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def tokenizer_from_gguf(metadata: Mapping[str, Any], origin: str) -> Tokenizer:
    """Build the tokenizer that a file's metadata describes; ids are the rows of its embedding.

    Args:
        metadata: keys of the file with plain values (``tokenizer.ggml.*``). origin: begins error messages.

    Raises:
        InputError: a key is missing, another kind of tokenizer, an unknown split, or tokens that do not fit together.
    """
    model = _required(metadata, "model", origin)
    if model != _MODEL:
        kind = _OTHER_MODELS.get(model, "this kind")
        raise InputError(
            f"{origin}: tokenizer.ggml.model {model!r} is not supported, only {_MODEL!r} (byte-level BPE); {kind} "
            "cannot be read from any file, choose a model with another tokenizer, as Qwen and Llama 3 have"
        )
    pre = _required(metadata, "pre", origin)
    split = _SPLITS.get(_ALIASES.get(pre, pre))
    if split is None:
        known = ", ".join([*_SPLITS, *_ALIASES])
        raise InputError(f"{origin}: tokenizer.ggml.pre {pre!r} is not supported; known: {known}")
    tokens, kinds = _required(metadata, "tokens", origin), _required(metadata, "token_type", origin)
    merges = [merge.split(" ", 1) for merge in _required(metadata, "merges", origin)]
    if len(tokens) != len(kinds):
        raise InputError(f"{origin}: {len(tokens)} tokens but {len(kinds)} token types; convert the model again")
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] not in (CONTROL, USER_DEFINED, UNUSED)}
    roles, begins = _roles(metadata, tokens, origin, split.ignore_merges)
    words = token_ids(metadata.get(_OWN_WORDS), len(tokens), f"{origin}: {_OWN_WORDS}")
    if any(kinds[i] != USER_DEFINED for i in words):
        raise InputError(f"{origin}: {_OWN_WORDS} names a token that is not user-defined; convert the model again")
    added = {
        i: {"content": token, "special": kinds[i] == CONTROL, "normalized": i in words}
        for i, token in enumerate(tokens)
        if kinds[i] in (CONTROL, USER_DEFINED)
    }
    whole = specification(split, vocab, merges, added, None if begins is None else (begins, tokens[begins]))
    backend = backend_of(whole, origin, "convert the model again")
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
    contents = json.loads(tokenizer.to_json())
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding {rows} rows; they are not a pair, "
            "give the tokenizer of this model"
        )
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in contents["model"]["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for i, token in tokenizer.structure.items():
        tokens[i], kinds[i] = token, CONTROL if tokenizer.is_special(i) else USER_DEFINED
    values = {
        "model": _MODEL,
        "pre": _name_of(contents),
        "tokens": tokens,
        "token_type": kinds,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in contents["model"]["merges"]],
        "add_bos_token": tokenizer.bos_id is not None,
        **_role_keys(tokenizer, ends),
    }
    metadata = {_KEY + key: value for key, value in values.items()}
    if words := [t["id"] for t in contents["added_tokens"] if t["normalized"] and not t["special"]]:
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


def _name_of(contents: dict[str, Any]) -> str:
    """llama.cpp's name for the split of a tokenizer.json."""
    normalizer = contents["normalizer"]
    split = Split(
        tuple(_regexes(contents["pre_tokenizer"])),
        nfc=normalizer == {"type": "NFC"},
        ignore_merges=bool(contents["model"].get("ignore_merges")),
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
        return [GPT2_REGEX] if part["use_regex"] else []
    return [f"unknown {part['type']}"]
