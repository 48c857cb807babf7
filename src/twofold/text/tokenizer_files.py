"""The tokenizer of a Hugging Face folder, from tokenizer.json or from vocab.json and merges.txt.

The latter two are what transformers' slow tokenizers save. They hold vocabulary and merges; how text is split follows
from the class that the folder names, and the added tokens stand in tokenizer_config.json or added_tokens.json. What
none of the files says is an error, never a guess. Files of other kinds of tokenizer are refused by name. Not here:
``qwen.tiktoken`` (``ranks.py``), roles of tokens (``roles.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from twofold.base.files import readable
from twofold.base.records import InputError
from twofold.text.roles import Roles, read_roles, read_settings
from twofold.text.specification import ADDED_TOKENS, GPT2, QWEN, Split, backend_of, specification

WHOLE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
# Other kinds of tokenizer, by the file that gives them away.
_OTHERS = {
    "tokenizer.model": "SentencePiece",
    "spiece.model": "SentencePiece",
    "tekken.json": "Mistral's tekken",
    "vocab.txt": "WordPiece",
}
_CLASSES = {"Qwen2Tokenizer": QWEN, "GPT2Tokenizer": GPT2}  # and those with Fast at their end
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
_WAY_OUT = "copy its tokenizer.json, or save it: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"


def read_backend(folder: Path) -> tuple[Path, tokenizers.Tokenizer]:
    """The tokenizer of a folder, and the file that it is mainly made of.

    Raises:
        InputError: no file of a byte-level BPE, or one that cannot be read or does not fit the others. It names the
            file and what to do.
    """
    whole, vocab = folder / WHOLE, folder / VOCAB
    if whole.is_file():
        try:
            return whole, tokenizers.Tokenizer.from_file(str(whole))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{whole} is not a readable tokenizer.json ({error}); copy the file again") from None
    if vocab.is_file() and (folder / MERGES).is_file():
        return vocab, _from_two_files(folder)
    for name, kind in _OTHERS.items():
        if (folder / name).is_file():
            raise InputError(
                f"{folder / name}: a tokenizer of the kind {kind} is not supported, only byte-level BPE (the GPT-2 / "
                f"Qwen kind); if the model has a {WHOLE} of that kind copy it, else choose another model"
            )
    half = [name for name in (VOCAB, MERGES) if (folder / name).is_file()]
    alone = f"; it has {half[0]} alone" if half else ""
    raise InputError(
        f"{whole} does not exist; give a folder that holds {WHOLE}, {VOCAB} and {MERGES}, or qwen.tiktoken{alone}"
    )


def _from_two_files(folder: Path) -> tokenizers.Tokenizer:
    settings, roles = read_settings(folder / _CONFIG), read_roles(folder)
    split = _split(folder, settings)
    vocab = read_settings(folder / VOCAB)
    _check_ids(vocab, folder / VOCAB)
    added = _added(folder, settings, roles, vocab)
    if settings.get("add_prefix_space"):
        raise InputError(f"{folder / _CONFIG}: add_prefix_space is not supported with {VOCAB}; {_WAY_OUT}")
    begin = None
    if settings.get("add_bos_token"):
        begin = next(((i, str(roles.bos)) for i, token in added.items() if token["content"] == roles.bos), None)
        if begin is None:
            raise InputError(f"{folder / _CONFIG}: add_bos_token is true but bos_token {roles.bos!r} has no id")
    ordinary = {token: i for token, i in vocab.items() if i not in added}
    contents = specification(split, ordinary, _read_merges(folder / MERGES), added, begin)
    return backend_of(contents, str(folder / VOCAB), f"copy {VOCAB} and {MERGES} again")


def _split(folder: Path, settings: Mapping[str, Any]) -> Split:
    """How text is split: by the tokenizer's class or, where no file names it, by the family of the model."""
    named = settings.get("tokenizer_class")
    family = read_settings(folder / "config.json").get("model_type")
    if named is None and str(family).startswith("qwen"):
        return QWEN
    found = _CLASSES.get(str(named).removesuffix("Fast"))
    if found is None:
        what = "names no tokenizer_class" if named is None else f"has tokenizer_class {named!r}"
        raise InputError(
            f"{folder} has {VOCAB} and {MERGES} without {WHOLE}, and {_CONFIG} {what}: how text is split is known for "
            f"{', '.join(_CLASSES)} alone; {_WAY_OUT}"
        )
    return found


def _added(
    folder: Path, settings: Mapping[str, Any], roles: Roles, vocab: Mapping[str, int]
) -> dict[int, dict[str, Any]]:
    """Added tokens by id, with their flags.

    Flags that no file gives are those of Qwen3's token of that spelling or, as transformers has it, follow from a role.
    """
    special_map = read_settings(folder / "special_tokens_map.json")
    listed = [*_list(settings.get("additional_special_tokens")), *_list(special_map.get("additional_special_tokens"))]
    special = {*listed, *(t for t in (roles.bos, roles.eos, roles.pad, roles.unk) if t is not None)}
    known = dict(ADDED_TOKENS)
    decoder, plain = settings.get("added_tokens_decoder") or {}, read_settings(folder / _ADDED)
    _check_ids(plain, folder / _ADDED)
    found: dict[int, dict[str, Any]] = {}
    for key, token in decoder.items() if isinstance(decoder, Mapping) else ():
        if not (
            key.isascii() and key.isdigit() and isinstance(token, Mapping) and isinstance(token.get("content"), str)
        ):
            raise InputError(f"{folder / _CONFIG}: added_tokens_decoder has no token at {key!r}; copy the file again")
        found[int(key)] = {"content": token["content"], **{f: bool(token[f]) for f in _FLAGS if f in token}}
    for spelling, i in (*plain.items(), *((t, vocab[t]) for t in sorted(special) if t in vocab)):
        drops = known.get(spelling, spelling in special)
        fresh = {"content": spelling, "special": drops, "normalized": not drops and spelling not in known}
        if found.setdefault(i, fresh)["content"] != spelling:
            raise InputError(f"{folder}: {found[i]['content']!r} and {spelling!r} both have the id {i}; {_WAY_OUT}")
    if not found:
        raise InputError(f"{folder}: neither {_CONFIG} nor {_ADDED} says which ids the added tokens have; {_WAY_OUT}")
    owners: dict[str, int] = {}
    for i, token in found.items():
        if owners.setdefault(token["content"], i) != i or vocab.get(token["content"], i) != i:
            raise InputError(f"{folder}: token {token['content']!r} has two ids, one of them {i}; {_WAY_OUT}")
    if taken := next((t for t, i in vocab.items() if i in found and found[i]["content"] != t), None):
        raise InputError(f"{folder / VOCAB}: {taken!r} has the id of an added token; {_WAY_OUT}")
    return found


def _list(value: Any) -> list[str]:
    """Spellings in a list of strings or of objects with a content; anything else is left out."""
    values = value if isinstance(value, list) else []
    spelled = [token.get("content") if isinstance(token, Mapping) else token for token in values]
    return [token for token in spelled if isinstance(token, str)]


def _check_ids(ids: Mapping[str, Any], path: Path) -> None:
    """Raise InputError unless every value is an id of its own."""
    odd = next((token for token, i in ids.items() if not isinstance(i, int) or isinstance(i, bool) or i < 0), None)
    if odd is not None or len(set(ids.values())) < len(ids):
        what = "two tokens have one id" if odd is None else f"token {odd!r} has the id {ids[odd]!r:.60}"
        raise InputError(f"{path} is damaged: {what}; copy the file again")


def _read_merges(path: Path) -> list[list[str]]:
    """Pairs of merges.txt, one a line; the first line may say which version it is."""
    with readable(path):
        try:
            lines = path.read_bytes().decode().split("\n")  # only there: spellings may hold other line breaks
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is damaged ({error}); copy the file again") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        text = line.removesuffix("\r")
        if not text or (number == 1 and text.startswith("#version")):
            continue
        pair = text.split(" ")
        if len(pair) != 2 or not all(pair):
            raise InputError(f"{path}:{number} is not 'left right'; copy the file again")
        merges.append(pair)
    return merges
