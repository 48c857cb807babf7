"""Tokenizer: training, ordinary against special encoding, bytes, files, and agreement with transformers."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, processors

from twofold.base.records import InputError
from twofold.text.chat import CHAT_TEMPLATE
from twofold.text.tokenizer import ADDED_TOKENS, PRETOKENIZE_REGEX, StreamDecoder, Tokenizer

SAMPLES = ["Hello, world!", "12345", "3.14159", "  two spaces", "a\r\nb", "   \n x", "they'LL go", "cafe\u0301 🙂", ""]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(["the cat and the dog, the cat 12 12 12"] * 3, 300)


def test_train_appends_the_added_tokens_in_order(small: Tokenizer) -> None:
    assert small.vocab_size <= 300
    ids = [small.token_id(text) for text, _ in ADDED_TOKENS]
    assert ids == list(range(small.vocab_size - 26, small.vocab_size))
    assert [small.is_special(i) for i in ids] == [flag for _, flag in ADDED_TOKENS]
    assert sum(flag for _, flag in ADDED_TOKENS) == 14
    assert small.eos_ids == (small.im_end, small.endoftext)
    assert small.think_close == small.vocab_size - 1 and small.think_open == small.vocab_size - 2


def test_train_is_deterministic_and_reaches_its_size(tokenizer: Tokenizer) -> None:
    texts = ["some words to learn, some words to merge 123"] * 5 + [CHAT_TEMPLATE]
    first, second = Tokenizer.train(texts, 400), Tokenizer.train(iter(texts), 400)
    assert first.vocab_size == 400 and first.digest == second.digest != tokenizer.digest


def test_train_refuses_a_size_without_room() -> None:
    with pytest.raises(InputError, match="at least 282"):
        Tokenizer.train(["a"], 281)


def test_digits_are_single_and_pretokens_never_merge_over_borders(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("12345")] == [b"1", b"2", b"3", b"4", b"5"]
    assert PRETOKENIZE_REGEX.count(r"\p{N}") == 3


@pytest.mark.parametrize("text", [text for text, _ in ADDED_TOKENS])
def test_encode_treats_control_spellings_as_text(tokenizer: Tokenizer, text: str) -> None:
    control = tokenizer.token_id(text)
    data = f"a{text}b {text}"
    assert control not in tokenizer.encode(data)
    assert all(i < tokenizer.vocab_size - 26 for i in tokenizer.encode(data))
    assert tokenizer.decode(tokenizer.encode(data)) == data
    assert tokenizer.encode_with_special(data).count(control) == 2


@given(st.text(max_size=60))
@settings(max_examples=80, deadline=None)
def test_round_trip_is_nfc(text: str) -> None:
    tok = _shared()
    ids = tok.encode(text)
    assert tok.decode(ids) == unicodedata.normalize("NFC", text)
    assert b"".join(map(tok.token_bytes, ids)).decode() == tok.decode(ids)
    assert ids == tok.encode_batch([text])[0]
    assert all(i < tok.vocab_size - 26 for i in ids)


@given(st.lists(st.integers(0, 299), max_size=40))
@settings(max_examples=60, deadline=None)
def test_stream_decoder_equals_decode_and_never_splits_characters(ids: list[int]) -> None:
    tok = _shared()
    ids = [i % tok.vocab_size for i in ids]
    decoder = StreamDecoder(tok)
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == tok.decode(ids)


def test_stream_decoder_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    byte_ids = {tokenizer.token_bytes(i): i for i in range(256)}
    pieces = [decoder.feed(byte_ids[bytes([b])]) for b in "é🙂".encode()]
    assert pieces == ["", "é", "", "", "", "🙂"]
    assert decoder.feed(byte_ids[b"\xf0"]) == "" and decoder.flush() == "\ufffd"
    assert decoder.feed(byte_ids[b"a"]) == "a"


def test_offsets_name_the_first_character(tokenizer: Tokenizer) -> None:
    ids, starts = tokenizer.encode_with_offsets("ab 🙂 cd")
    assert ids == tokenizer.encode("ab 🙂 cd")
    assert starts[0] == 0 and starts == sorted(starts) and max(starts) < 7


def test_errors_name_the_fix(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no token"):
        tokenizer.token_id("<nope>")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match="outside the vocabulary"):
            tokenizer.token_bytes(bad)
    with pytest.raises(InputError, match="surrogates"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InputError, match="surrogates"):
        tokenizer.encode_batch(["fine", "\udfff"])
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a readable"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("spelling", ["鲢鱼", "a b", "▁the", "<0xE9>", "\x00"])
def test_a_token_outside_the_byte_alphabet_is_found_when_loaded(
    spelling: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """It decodes as the library decodes it, beside bytes that wait for the rest of a character too."""
    contents = json.loads(tokenizer.to_json())
    model = contents["model"]
    last = "".join(model["merges"].pop())
    model["vocab"][spelling] = row = model["vocab"].pop(last)
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")
    found = Tokenizer.from_folder(tmp_path)
    assert found.foreign == ({} if spelling == "<0xE9>" else {row: spelling})
    first_byte = found.token_id("Ã")
    for ids in ([row], [row, row], [first_byte, row], [*found.encode("é"), row, *found.encode("x")]):
        assert found.decode(ids) == found._full.decode(ids, skip_special_tokens=False)
        decoder = StreamDecoder(found)
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == found.decode(ids)
    assert found.token_text(row) == spelling and row not in found.encode(spelling)


def test_other_kinds_of_tokenizer_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer(models.BPE({"▁a": 0}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    backend.save(str(path))
    with pytest.raises(InputError, match=rf"^{path}: only byte-level BPE .* decoder Sequence, as SentencePiece"):
        Tokenizer.from_folder(tmp_path)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path, CHAT_TEMPLATE)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    }
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded.digest == tokenizer.digest
    for text in SAMPLES:
        assert loaded.encode(text) == tokenizer.encode(text)


def llama_like(tokenizer: Tokenizer, folder: Path, begins: bool = True, **said: object) -> Path:
    """A folder as of Llama 3: a BOS that the post-processor writes, ends of other names, limits of its own."""
    tokenizer.save(folder, "")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for ours, theirs in (("im_start", "begin_of_text"), ("endoftext", "end_of_text"), ("im_end", "eot_id")):
        text = text.replace(f"<|{ours}|>", f"<|{theirs}|>")
    backend, bos = tokenizers.Tokenizer.from_str(text), "<|begin_of_text|>"
    if begins:
        template = processors.TemplateProcessing([bos, "$A"], special_tokens=[(bos, tokenizer.im_start)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": bos}}))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>", "model_max_length": 8192}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | said))
    return folder


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("said", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_a_text_begins_as_transformers_begins_it(
    begins: bool, said: dict[str, object], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    found = Tokenizer.from_folder(llama_like(tokenizer, tmp_path / "a", begins, **said))
    assert found.bos_id == (tokenizer.im_start if begins else None)
    ids = found.encode_prompt("the fox")
    assert ids == [tokenizer.im_start] * begins + tokenizer.encode("the fox")
    assert found.encode("the fox") == ids[begins:]
    assert found.encode_prompt("<|begin_of_text|>the fox") == [tokenizer.im_start, *ids[begins:]]  # never twice
    found.save(tmp_path / "b", "")
    for folder in ("a", "b"):
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert auto("the fox").input_ids == ids
        assert auto.eos_token == "<|eot_id|>" and auto.model_max_length == 8192
    assert auto.bos_token == "<|begin_of_text|>"
    assert Tokenizer.from_folder(tmp_path / "b").bos_id == found.bos_id
    assert tokenizer.bos_id is None and tokenizer.encode_prompt("the fox") == tokenizer.encode("the fox")


def test_a_text_that_would_begin_with_two_tokens_is_refused(tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    named = [(token, tokenizer.token_id(token)) for token in ("<|im_start|>", "<think>")]
    backend.post_processor = processors.TemplateProcessing(["<|im_start|>", "<think>", "$A"], special_tokens=named)
    with pytest.raises(InputError, match="begins texts with 2 tokens"):
        Tokenizer(backend)


def test_what_stands_beside_a_tokenizer_stays_with_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = Tokenizer.from_folder(llama_like(tokenizer, tmp_path / "a"))
    found.add_words(["zyxx"]).add_tokens(["<x>"]).completed(0, 5).save(tmp_path / "b", "")
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|begin_of_text|>", "<|eot_id|>")
    assert (config["model_max_length"], config["add_bos_token"]) == (8192, True)
    tokenizer.completed(tokenizer.endoftext, 77).save(tmp_path / "c", "")
    config = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["model_max_length"]) == ("<|endoftext|>", 77)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no JSON object"),
        ("nul", "not a readable tokenizer_config.json"),
        ('{"bos_token": 5}', "tokenizer_config.json: bos_token must be the spelling of a token, got 5"),
        ('{"model_max_length": "x"}', "model_max_length must be a number of tokens, got 'x'"),
    ],
)
def test_odd_values_beside_a_tokenizer(text: str, message: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path, "")
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_auto_tokenizer_agrees(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, CHAT_TEMPLATE)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(auto) == tokenizer.vocab_size
    assert (auto.eos_token_id, auto.pad_token_id) == tokenizer.eos_ids
    assert auto.bos_token is None and auto.chat_template == CHAT_TEMPLATE
    text = "".join(f"{sample}{token}" for sample, (token, _) in zip(SAMPLES * 3, ADDED_TOKENS, strict=False))
    ids = tokenizer.encode_with_special(text)
    assert auto(text).input_ids == ids
    for skip in (False, True):
        assert auto.decode(ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


_CACHE: list[Tokenizer] = []


def _shared() -> Tokenizer:
    """Hypothesis tests take no function-scoped fixtures; one small tokenizer serves them all."""
    if not _CACHE:
        _CACHE.append(Tokenizer.train(["the cat 你好 café 🙂 and the dog"] * 3, 300))
    return _CACHE[0]


def test_added_words_are_one_token_in_data_too_and_survive_saving(tmp_path: Path) -> None:
    base = Tokenizer.train(["some text for a vocabulary"] * 4, 300)
    grown = base.add_words(["<tool>", "né"])
    first = base.vocab_size
    text = "a<tool>b ne\u0301<|im_end|>"
    ids = grown.encode(text)
    assert ids[1] == first and ids.count(first + 1) == 1 and grown.im_end not in ids
    assert ids == grown.encode_batch([text])[0] == grown.encode_with_offsets(text)[0]
    assert grown.encode_with_special(text)[-1] == grown.im_end
    assert grown.decode(ids, skip_special_tokens=True) == "a<tool>b né<|im_end|>"
    assert first not in base.encode(text) and base.vocab_size == first and grown.vocab_size == first + 2
    assert base.encode("plain text") == grown.encode("plain text")
    grown.save(tmp_path, "")
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode(text) == ids and again.digest == grown.digest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "empty or has white space"),
        (["a b"], "empty or has white space"),
        (["e\u0301"], "not in NFC form"),
        (["a"], "a token already"),
        (["<think>"], "a token already"),
        (["<x>", "<x>"], "given twice"),
        (["x</think>"], "contains the token '</think>'"),
    ],
)
def test_words_that_cannot_be_added(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tokenizer.train(["some text"] * 4, 300).add_words(words)
