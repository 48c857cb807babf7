"""A ``tokenizer.json`` put together: ways to split text, the 26 added tokens of Qwen3, and the file's contents.

For checkpoints that hold a vocabulary and merges but not that file: GGUF files, and folders with vocab.json and
merges.txt. Works on plain dictionaries. Not here: reading either (``gguf_tokenizer.py``, ``tokenizer_files.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from twofold.base.records import InputError

PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Official order; the flag says whether decode(skip_special_tokens=True) drops the token.
ADDED_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|object_ref_start|>", True),
    ("<|object_ref_end|>", True),
    ("<|box_start|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<|vision_start|>", True),
    ("<|vision_end|>", True),
    ("<|vision_pad|>", True),
    ("<|image_pad|>", True),
    ("<|video_pad|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
)

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@dataclass(frozen=True, slots=True)
class Split:
    """How text is cut before merging: regular expressions applied in turn, each isolating its matches.

    nfc: normalise first. ignore_merges: a piece that is a token as it stands is not merged.
    """

    regexes: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False


QWEN = Split((PRETOKENIZE_REGEX,), nfc=True)
GPT2 = Split((GPT2_REGEX,))


def specification(
    split: Split,
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: Mapping[int, Mapping[str, Any]],
    begin: tuple[int, str] | None = None,
) -> dict[str, Any]:
    """The contents of tokenizer.json.

    Args:
        vocab: ordinary tokens, in the byte alphabet. merges: pairs. begin: id and spelling of the token that begins
            every text.
        added: id -> content and flags (special, normalized, lstrip, rstrip, single_word; false where not given).
    """
    if sorted(added) != list(range(len(vocab), len(vocab) + len(added))):
        # not simply after the others: they need their ids spelled out
        vocab = {**vocab, **{token["content"]: i for i, token in added.items()}}
    cuts = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in split.regexes
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_FLAGS, **token} for i, token in sorted(added.items())],
        "normalizer": {"type": "NFC"} if split.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, _BYTE_LEVEL]},
        "post_processor": _BYTE_LEVEL if begin is None else _beginning(*begin),
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


def backend_of(contents: Mapping[str, Any], origin: str, remedy: str) -> tokenizers.Tokenizer:
    """The tokenizer of such contents; InputError, with ``remedy``, where vocabulary and merges are no pair."""
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(contents))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{origin}: tokens and merges do not fit together ({error}); {remedy}") from None


def _beginning(bos: int, token: str) -> dict[str, Any]:
    """The post-processor that puts a BOS before every text."""
    first, second = (
        [{"SpecialToken": {"id": token, "type_id": kind}}, {"Sequence": {"id": text, "type_id": kind}}]
        for kind, text in enumerate("AB")
    )
    named = {token: {"id": token, "ids": [bos], "tokens": [token]}}
    template = {"type": "TemplateProcessing", "single": first, "pair": [*first, *second], "special_tokens": named}
    return {"type": "Sequence", "processors": [_BYTE_LEVEL, template]}
