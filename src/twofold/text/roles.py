"""What stands beside a tokenizer: which tokens begin a text, end a reply or pad, and how long a text may be.

Hugging Face folders say it in tokenizer_config.json and special_tokens_map.json, for ends of replies also in
generation_config.json and config.json. Every value is checked here, because files say strange things. Not here: the
keys of GGUF files (``gguf_tokenizer.py``), what the tokens do to text (``tokenizer.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers

from twofold.base.files import read_json_object, write_json
from twofold.base.records import InputError

_NAMED = ("bos", "eos", "pad", "unk")
_USUAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_MAX_LENGTH = 131072  # of Qwen3


@dataclass(frozen=True, slots=True)
class Roles:
    """Spellings of the tokens with a role, and the longest text in tokens; None where nothing is said."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    max_length: int | None = None


def read_roles(folder: Path) -> Roles:
    """What the files of a Hugging Face folder say; tokenizer_config.json counts more than special_tokens_map.json.

    Raises:
        InputError: a file is damaged, or a value is of the wrong kind.
    """
    roles: dict[str, Any] = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        said = read_settings(path)
        given: dict[str, Any] = {role: _spelling(said.get(f"{role}_token"), f"{path}: {role}_token") for role in _NAMED}
        longest = said.get("model_max_length")
        if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float) or longest < 1):
            raise InputError(f"{path}: model_max_length must be a number of tokens, got {longest!r:.60}")
        given["max_length"] = longest
        roles |= {name: value for name, value in given.items() if value is not None}
    return Roles(**roles)


def write_roles(
    folder: Path, roles: Roles, added: Mapping[int, tokenizers.AddedToken], begins: bool, qwen: bool
) -> None:
    """Write the two files, so that ``AutoTokenizer`` finds what is known here.

    Args:
        roles: an end and a padding that are not named are Qwen's where they exist. added: the added tokens by id.
            begins: texts begin with ``roles.bos``. qwen: text is split as Qwen does.
    """
    known = {token.content for token in added.values()}
    named = {role: token for role, token in _USUAL.items() if token in known}
    named |= {f"{role}_token": token for role in _NAMED if (token := getattr(roles, role)) is not None}
    further = [t.content for _, t in sorted(added.items()) if t.special and t.content != "<|endoftext|>"]
    special = {**named, "additional_special_tokens": further}
    flags = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    config = {
        "add_bos_token": begins,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {flag: getattr(t, flag) for flag in flags} for i, t in sorted(added.items())},
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": roles.max_length or _MAX_LENGTH,
        "split_special_tokens": False,
        # The library's Qwen2Tokenizer brings Qwen's own pre-tokenisation, whatever tokenizer.json says.
        "tokenizer_class": "Qwen2Tokenizer" if qwen else "PreTrainedTokenizerFast",
        "unk_token": None,
        **special,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file; InputError where it cannot be read."""
    broken = f"is not a readable {path.name} ({{}}); copy the file again"
    return read_json_object(path, broken) if path.is_file() else {}


def end_ids(said: Iterable[tuple[str, Any]], rows: int) -> tuple[int, ...]:
    """The tokens that end a reply, by the first of (where, value) that names any; empty if none does.

    Raises:
        InputError: a value is no id of a token, or no list of them.
    """
    return next((ids for where, value in said if (ids := token_ids(value, rows, where))), ())


def token_ids(value: Any, rows: int, where: str) -> tuple[int, ...]:
    """The id or ids that a value names, each once; empty for None. ``where`` begins the InputError for other values."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < rows:
            raise InputError(f"{where} names {i!r:.60}, which is no token; give whole numbers from 0 to {rows - 1}")
    return tuple(dict.fromkeys(ids))


def beginning(backend: tokenizers.Tokenizer) -> int | None:
    """The token that the post-processor puts before a text, the one place where transformers looks for it as well.

    What it appends is left to those who know what the text is for.

    Raises:
        InputError: there are several.
    """
    encoding = backend.encode("a")
    found = encoding.ids[: len(list(takewhile(bool, encoding.special_tokens_mask)))]
    if len(found) > 1:
        raise InputError(f"tokenizer.json begins texts with {len(found)} tokens; only one is supported")
    return found[0] if found else None


def _spelling(value: Any, where: str) -> str | None:
    """A token as a string or, as transformers 4 writes it, as an object with its content."""
    spelled = value.get("content") if isinstance(value, dict) else value
    if not isinstance(spelled, str) and value is not None:
        raise InputError(f"{where} must be the spelling of a token, got {value!r:.60}")
    return spelled or None
