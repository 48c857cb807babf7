"""Byte-level BPE tokenizer with the control tokens of Qwen3: train, load, save, encode, decode.

A thin wrapper over ``tokenizers``. It keeps two encoders apart: ``encode`` treats its input as data, so a control
token's spelling inside user text never becomes that control token; ``encode_with_special`` is for text that
the program itself wrote. Other added tokens (``add_words``, and those of a fine-tune) are no structure but vocabulary,
and both encoders read them.
Not here: chat structure (``chat.py``) and the meaning of sampled tokens (``parse.py``).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from twofold.base.files import write_json, write_text
from twofold.base.records import InputError
from twofold.text.plain import check_unicode
from twofold.text.ranks import merges_of, read_ranks
from twofold.text.roles import Roles, beginning, end_ids, read_roles, write_roles
from twofold.text.specification import ADDED_TOKENS, PRETOKENIZE_REGEX
from twofold.text.tokenizer_files import read_backend

_BYTE_TOKENS = 256
# Decoding ignores these flags; with them the official file is met to the letter. The constructor does not take them.
_OFFICIAL_DECODER = b'{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":false,"use_regex":false}'
_TIKTOKEN_FILE = "qwen.tiktoken"


class Tokenizer:
    """Text <-> token ids. Ids of control tokens come from the tokenizer's own table, never from a constant.

    foreign: id -> spelling of ordinary tokens that are not written in the byte alphabet. Somebody put them there by
    hand: no text becomes such a token, and a sampled one stands for its spelling, as in the ``tokenizers`` library.
    """

    def __init__(self, backend: tokenizers.Tokenizer, roles: Roles | None = None) -> None:
        """Wrap a ``tokenizers`` tokenizer and what stands beside it.

        Raises:
            InputError: it is no byte-level BPE, or begins texts with more than one token.
        """
        if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            kind = f"{type(backend.model).__name__} with the decoder {type(backend.decoder).__name__}"
            raise InputError(
                f"only byte-level BPE tokenizers (the GPT-2 / Qwen kind) are supported, this one is {kind}, as "
                "SentencePiece and WordPiece are; choose a model with another tokenizer, as Qwen and Llama 3 have"
            )
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._full = backend
        self._roles = roles or Roles()
        self.bos_id = beginning(backend)
        self._plain = _without_structure(backend, _words(added, {self.bos, *astuple(self._roles)}))
        self._special = {i: bool(token.special) for i, token in added.items()}
        self._added = {token.content: i for i, token in added.items()}
        vocab = backend.get_vocab(with_added_tokens=True)
        self.foreign = _foreign({token: i for token, i in vocab.items() if i not in added})
        texts = {i: content for content, i in self._added.items()} | self.foreign
        self._bytes: dict[int, bytes] = {i: text.encode() for i, text in texts.items()}
        self._whole: dict[int, str] = {}  # tokens met so far that are whole characters
        self._size = max(vocab.values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary from text; the same texts in the same order give the same tokenizer.

        Args:
            texts: documents.
            vocab_size: tokens in all: 256 bytes, the merges, and the 26 added tokens. A corpus too small to fill it
                gives a smaller tokenizer (read ``vocab_size`` of the result).

        Raises:
            InputError: ``vocab_size`` leaves no room for bytes and added tokens.
        """
        least = _BYTE_TOKENS + len(ADDED_TOKENS)
        if vocab_size < least:
            raise InputError(f"vocab_size must be at least {least} (256 bytes + {len(ADDED_TOKENS)} control tokens)")
        backend = _qwen_backend(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(ADDED_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_tokens(_added(ADDED_TOKENS))
        return cls(backend)

    @classmethod
    def from_tiktoken(cls, path: Path) -> Tokenizer:
        """Qwen3's tokenizer from ``qwen.tiktoken``: the ranks of that file and the 26 added tokens after them.

        The result equals the one of the official ``tokenizer.json`` down to the digest.

        Raises:
            InputError: not a rank file.
        """
        ranks = read_ranks(path)
        spelled = {token: "".join(_BYTE_TO_UNICODE[byte] for byte in token) for token in ranks}
        vocab = {spelled[token]: rank for token, rank in ranks.items()}
        merges = [(spelled[left], spelled[right]) for left, right in merges_of(ranks)]
        model = models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="")
        backend = _qwen_backend(model)
        decoder = decoders.ByteLevel()
        decoder.__setstate__(_OFFICIAL_DECODER)
        backend.decoder = decoder
        backend.add_tokens(_added(ADDED_TOKENS))
        return cls(backend)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a model folder: tokenizer.json, or qwen.tiktoken, or vocab.json and merges.txt.

        Raises:
            InputError: none of them is there, a file is unreadable, or it is another kind of tokenizer.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file() and (folder / _TIKTOKEN_FILE).is_file():
            return cls.from_tiktoken(folder / _TIKTOKEN_FILE)
        path, backend = read_backend(folder)
        roles = read_roles(folder)
        try:
            return cls(backend, roles)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def completed(self, eos_id: int, max_length: int) -> Tokenizer:
        """This tokenizer with an end token and a longest text, where nothing beside its file says so."""
        own = self._roles
        return Tokenizer(
            self._full,
            replace(own, eos=own.eos or self._full.id_to_token(eos_id), max_length=own.max_length or max_length),
        )

    def add_tokens(self, tokens: Sequence[str], special: bool = True) -> Tokenizer:
        """A tokenizer with further added tokens at the end of the vocabulary; this one stays as it is.

        Args:
            tokens: spellings that ``encode_with_special`` is to read as one token each; known ones keep their ids.
            special: ``decode(skip_special_tokens=True)`` drops them.

        Raises:
            InputError: an empty spelling, or one that already is an ordinary token.
        """
        backend = tokenizers.Tokenizer.from_str(self._full.to_str())
        for token in tokens:
            if not token or (token not in self._added and backend.token_to_id(token) is not None):
                raise InputError(
                    f"{token!r} cannot be added: it is empty or an ordinary token; choose another spelling"
                )
        backend.add_tokens(_added([(token, special) for token in tokens if token not in self._added]))
        return Tokenizer(backend, self._roles)

    def add_words(self, words: Sequence[str]) -> Tokenizer:
        """A tokenizer with further words at the end of the vocabulary, in the order given; this one stays as it is.

        A word is read as one token wherever it stands, in data too, and ``decode`` always shows it: what
        ``add_tokens`` of transformers does with plain strings, with the same ids.

        Raises:
            InputError: a word that is empty, has white space, is not in NFC form, is a token already or given twice, or
                holds a control token's spelling.
        """
        for place, word in enumerate(words):
            if not word or any(char.isspace() for char in word):
                raise InputError(f"new token {word!r} is empty or has white space; give one without any")
            if not unicodedata.is_normalized("NFC", word):
                raise InputError(f"new token {word!r} is not in NFC form, as all text a model sees is; write it so")
            if word in words[:place] or len(self.encode_with_special(word)) == 1:
                raise InputError(f"new token {word!r} is a token already, or given twice; leave it out")
            if inside := [token for token in self._added if token in word]:
                raise InputError(f"new token {word!r} contains the token {inside[0]!r}; choose another spelling")
        backend = tokenizers.Tokenizer.from_str(self._full.to_str())
        backend.add_tokens([AddedToken(word, normalized=True, special=False) for word in words])
        return Tokenizer(backend, self._roles)

    def to_json(self) -> str:
        """The whole tokenizer as the text of a ``tokenizer.json``."""
        return self._full.to_str(pretty=True)

    def save(self, folder: Path, chat_template: str) -> None:
        """Write the tokenizer files of a Hugging Face folder, loadable by ``AutoTokenizer``."""
        folder = Path(folder)
        text = self.to_json()
        model = json.loads(text)["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        write_text(folder / "tokenizer.json", text)
        write_json(folder / "vocab.json", model["vocab"])
        write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(merge + "\n" for merge in merges))
        roles = replace(self._roles, bos=self.bos)
        write_roles(folder, roles, self._full.get_added_tokens_decoder(), self.bos_id is not None, self._is_qwen())
        write_text(folder / "chat_template.jinja", chat_template)

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer can produce (embedding tables may be padded beyond it)."""
        return self._size

    @cached_property
    def digest(self) -> str:
        """Stable 16-digit hash of the whole tokenizer, for caches and manifests."""
        return hashlib.sha256(json.dumps(json.loads(self.to_json()), sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Encode data. Spellings of control tokens are ordinary characters; added words are one token each."""
        return _encode(self._plain, text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Like ``encode``, and the index in ``text`` of the character with which each token begins."""
        encoding = _encode(self._plain, text)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` for many texts at once (in parallel threads)."""
        try:
            return [e.ids for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            for text in texts:
                _check_text(text)
            raise

    def encode_with_special(self, text: str) -> list[int]:
        """Encode text written by the program itself: spellings of control tokens become those tokens."""
        return _encode(self._full, text).ids

    def encode_prompt(self, text: str, begin: bool = True) -> list[int]:
        """``encode_with_special`` for a text from its beginning: ``bos_id`` comes first, if there is one and ``begin``.

        A text that spells it at its beginning, as chat templates do, gets no second one.
        """
        ids = self.encode_with_special(text)
        return ids if not begin or self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD.

        ``skip_special_tokens`` drops tokens flagged special (``<|im_end|>``) and keeps the others (``<think>``).
        ``decode(encode(text))`` is the NFC form of ``text``.
        """
        kept = (i for i in ids if not (skip_special_tokens and self._special.get(i, False)))
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int:
        """Id of a token by its stored spelling; raises InputError if the vocabulary lacks it."""
        found = self._full.token_to_id(token)
        if found is None:
            raise InputError(f"the tokenizer has no token {token!r}; use a Qwen3-style tokenizer")
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token stands for; raises InputError for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            spelling = self._full.id_to_token(token_id) if 0 <= token_id < self._size else None
            if spelling is None:
                raise InputError(f"token id {token_id} is outside the vocabulary of {self._size} tokens")
            known = bytes(_UNICODE_TO_BYTE[char] for char in spelling)
            self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str | None:
        """Text of a token that is whole characters, None where its bytes are only part of some.

        Raises:
            InputError: an id outside the vocabulary.
        """
        text = self._whole.get(token_id)
        if text is None:
            try:
                text = self._whole[token_id] = self.token_bytes(token_id).decode()
            except UnicodeDecodeError:
                return None
        return text

    @property
    def structure(self) -> dict[int, str]:
        """Id -> spelling of all added tokens."""
        return {i: token for token, i in self._added.items()}

    def is_special(self, token_id: int) -> bool:
        """True for tokens that ``decode(skip_special_tokens=True)`` drops."""
        return self._special.get(token_id, False)

    def control_id(self, token: str) -> int | None:
        """Id of an added token, None when this tokenizer has no such added token."""
        return self._added.get(token)

    @property
    def im_start(self) -> int:
        """Id of ``<|im_start|>``; InputError if absent."""
        return self.token_id("<|im_start|>")

    @property
    def im_end(self) -> int:
        """Id of ``<|im_end|>``; InputError if absent."""
        return self.token_id("<|im_end|>")

    @property
    def endoftext(self) -> int:
        """Id of ``<|endoftext|>``; InputError if absent."""
        return self.token_id("<|endoftext|>")

    @property
    def think_open(self) -> int | None:
        """Id of ``<think>``, None when the tokenizer lacks it."""
        return self.control_id("<think>")

    @property
    def think_close(self) -> int | None:
        """Id of ``</think>``, None when the tokenizer lacks it."""
        return self.control_id("</think>")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: ``<|im_end|>``, then ``<|endoftext|>``; without both, the named end.

        Raises:
            InputError: no end is known.
        """
        usual = [i for token in ("<|im_end|>", "<|endoftext|>") if (i := self.control_id(token)) is not None]
        named = self.role_id("eos")
        if len(usual) < 2 and named is not None:
            return (named,)
        if not usual:
            raise InputError(
                "nothing says which token ends a reply; name it as eos_token_id in generation_config.json or, of a "
                "GGUF file, as tokenizer.ggml.eos_token_id"
            )
        return tuple(usual)

    def ends(self, said: Iterable[tuple[str, Any]], rows: int) -> tuple[int, ...]:
        """The tokens that end a reply of a model with ``rows`` rows: by its files, or else ``eos_ids``.

        Args:
            said: what files say, as (where, value), the weightier first.

        Raises:
            InputError: a value is no id of a token, or no end is known.
        """
        return end_ids(said, rows) or self.eos_ids

    @property
    def bos(self) -> str | None:
        """Spelling of the token that begins a text, also where only templates write it; None without one."""
        return self._roles.bos if self.bos_id is None else self._full.id_to_token(self.bos_id)

    def role_id(self, role: str) -> int | None:
        """Id of the token that what stands beside the tokenizer names as its "bos", "eos" or "pad"; None without."""
        named: str | None = getattr(self._roles, role)
        return None if named is None else self._full.token_to_id(named)

    def _is_qwen(self) -> bool:
        own, qwen = self._full.pre_tokenizer, _qwen_backend(models.BPE()).pre_tokenizer
        return own is not None and own.__getstate__() == qwen.__getstate__()


class StreamDecoder:
    """Decode token by token; bytes of an unfinished character wait for the next token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._whole = tokenizer._whole
        self._waiting = b""

    def feed(self, token_id: int) -> str:
        """Text that this token completes, possibly empty."""
        if not self._waiting:
            text = self._whole.get(token_id) or self._tokenizer.token_text(token_id)
            if text is not None:
                return text
        return self._decode(self._tokenizer.token_bytes(token_id))

    def feed_many(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens complete; the same as feeding them one by one."""
        return self._decode(b"".join(map(self._tokenizer.token_bytes, token_ids)))

    def flush(self) -> str:
        """End of stream: what is still waiting, as U+FFFD. The decoder may then be used again."""
        waiting, self._waiting = self._waiting, b""
        return waiting.decode("utf-8", errors="replace")

    def _decode(self, data: bytes) -> str:
        data = self._waiting + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._waiting = data[used:]
        return text


def _qwen_backend(model: models.BPE) -> tokenizers.Tokenizer:
    """A tokenizer with Qwen's normalisation and pre-tokenisation and no added tokens."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return backend


def _added(tokens: Iterable[tuple[str, bool]]) -> list[AddedToken]:
    return [AddedToken(text, normalized=False, special=flag) for text, flag in tokens]


def _foreign(vocab: dict[str, int]) -> dict[int, str]:
    alphabet = frozenset(_UNICODE_TO_BYTE)
    if alphabet.issuperset("".join(vocab)):
        return {}
    return {i: token for token, i in sorted(vocab.items()) if not alphabet.issuperset(token)}


def _words(added: Mapping[int, AddedToken], named: Collection[Any]) -> dict[int, AddedToken]:
    """Added tokens that are vocabulary, by id: all but the structure, which has names.

    The names are those of the chat families and of Qwen's own vocabulary, and of the tokens with a role. How a token is
    flagged says nothing: fine-tunes add theirs with any flags, as special ones too.
    """
    structure = {*(token for token, _ in ADDED_TOKENS), *named}
    return {i: token for i, token in sorted(added.items()) if token.content not in structure}


def _without_structure(full: tokenizers.Tokenizer, words: Mapping[int, AddedToken]) -> tokenizers.Tokenizer:
    # encode_special_tokens of the library covers only tokens flagged special; <think> and <tool_call> are not.
    if words:
        specification = json.loads(full.to_str()) | {"added_tokens": [], "post_processor": None}
        specification["model"]["vocab"] |= {token.content: i for i, token in words.items()}  # else they get other ids
        plain = tokenizers.Tokenizer.from_str(json.dumps(specification))
        plain.add_tokens(list(words.values()))
        return plain
    plain = tokenizers.Tokenizer(full.model)
    plain.normalizer, plain.pre_tokenizer = full.normalizer, full.pre_tokenizer
    return plain


def _encode(backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        return backend.encode(text, add_special_tokens=False)
    except TypeError:  # all the library says about a string that UTF-8 cannot hold
        _check_text(text)
        raise


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"text to encode must be a string, got {type(text).__name__}")
    check_unicode(text, "text")


def _unicode_to_byte() -> dict[str, int]:
    """Inverse of GPT-2's byte-to-printable-character table, with which vocabularies are written."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_UNICODE_TO_BYTE = _unicode_to_byte()
_BYTE_TO_UNICODE = {byte: char for char, byte in _UNICODE_TO_BYTE.items()}
