"""The public face: one small model as a folder and as a GGUF file; parameters, defaults and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import processors

import twofold
from twofold.base.gguf_file import read_metadata
from twofold.base.records import Grammar, InputError, Message, Request, SamplingParams
from twofold.llm import LLM
from twofold.model.config import Context, ModelConfig
from twofold.model.gguf_write import save_gguf
from twofold.model.hf_config import write_generation_config
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import save_weights
from twofold.recipes.folder import save_folder
from twofold.recipes.pretrain import save_model
from twofold.serve.prepare import token_lists
from twofold.text.chat import ChatPolicy
from twofold.text.tokenizer import Tokenizer

ASK = [{"role": "user", "content": "sum mod 10: E1 B5"}]
GREEDY = SamplingParams(0.0, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> Qwen3:
    tokenizer = Tokenizer.train(TEXTS, 330)
    model = Qwen3(
        ModelConfig(
            vocab_size=tokenizer.vocab_size + 6, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4,
            max_position_embeddings=160, tie_word_embeddings=True, initializer_range=0.3,
        )
    )  # fmt: skip
    model.init_weights(4)
    return model


TEXTS = ["sum mod 10: E1 B5 user assistant calc 37*48 0123456789 /think /no_think"] * 4


@pytest.fixture(scope="module")
def folder(model: Qwen3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    save_model(model, Tokenizer.train(TEXTS, 330), folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder)


def test_the_package_offers_it() -> None:
    assert twofold.LLM is LLM and twofold.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="has no attribute 'LMM'"):
        _ = twofold.LMM


def test_chat_keeps_the_budget_and_counts(llm: LLM) -> None:
    out = llm.chat(ASK, thinking_budget=5, max_tokens=80, temperature=1.0, seed=3)
    assert out.usage.prompt_tokens == len(llm.renderer.prompt_ids(ASK))
    assert out.usage.completion_tokens == len(out.token_ids) == len(out.logprobs) == len(out.forced)
    assert out.usage.reasoning_tokens <= 5
    assert out.finish_reason in ("stop", "length")


def test_stream_gives_the_pieces_of_chat(llm: LLM) -> None:
    settings = {"max_tokens": 40, "temperature": 1.0, "seed": 5}
    whole = llm.chat(ASK, **settings)
    pieces = list(llm.stream(ASK, **settings))
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == whole.content


def test_padded_rows_are_never_sampled(llm: LLM) -> None:
    """T31: the embedding has rows that the tokenizer has no token for."""
    out = llm.generate([[5, 6, 7]], SamplingParams(5.0, max_tokens=100, n=4))
    assert max(max(c.token_ids) for c in out) < llm.tokenizer.vocab_size


def test_score_is_generate_looked_back_upon(llm: LLM) -> None:
    prompt = [5, 9, 7]
    [done] = llm.generate([prompt], GREEDY)
    [scores] = llm.score([prompt + done.token_ids])
    torch.testing.assert_close(scores[2:], torch.tensor(done.logprobs), atol=1e-5, rtol=1e-5)


def test_defaults_come_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    save_model(LLM(folder).model, LLM(folder).tokenizer, tmp_path)
    write_generation_config(tmp_path, {"do_sample": False, "eos_token_id": 7})
    llm = LLM(tmp_path)
    assert llm.engine.eos_ids == (7,)
    assert llm.chat(ASK, max_tokens=9).token_ids == llm.chat(ASK, max_tokens=9, seed=99).token_ids  # greedy


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.chat(ASK, temprature=1), "unknown sampling parameter 'temprature'"),
        (lambda llm: llm.chat(ASK, temperature=-1), r"temperature must be in \[0, 1e\+30\]"),
        (lambda llm: llm.chat([]), "messages is empty"),
        (
            lambda llm: llm.chat([{"role": "user", "content": "E1 B5 " * 200}]),
            "this model's maximum context length is 160",
        ),
        (lambda llm: llm.generate([[]]), "empty prompt"),
        (lambda llm: llm.score([[1]]), "at least 2"),
        (lambda llm: llm.score([1, 2, 3]), "must be a list of whole numbers, got '1'"),
        (lambda llm: llm.score(["a text"]), "must be a list of whole numbers, got 'a text'"),
        (lambda llm: llm.score([[1.0, 2.5]]), "must be a list of whole numbers"),
        (lambda llm: llm.generate([1, 2, 3]), "must be a list of whole numbers"),
        (lambda llm: llm.generate([[1.0, 2.5]]), "must be a list of whole numbers"),
        (lambda llm: llm.generate([None]), "must be a list of whole numbers"),
        (lambda llm: llm.generate([b"abc"]), "must be a list of whole numbers"),
        (lambda llm: llm.embed("a text"), "texts must be a list, this is one string"),
        (lambda llm: llm.embed(["a text"], dimensions=2.5), "whole number in 1"),
        (lambda llm: llm.rerank("query", "a document"), "documents must be a list, this is one string"),
        (lambda llm: llm.embed(["sum " * 200]), "shorten it"),
    ],
)
def test_bad_input_is_named(llm: LLM, call: Callable[[LLM], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(llm)


def test_stop_strings_beside_an_open_stream(llm: LLM) -> None:
    settings = {"max_tokens": 12, "temperature": 0.0}
    alone = llm.chat(ASK, **settings, stop=["zzz"])
    expected = list(llm.stream(ASK, **settings))
    pieces = llm.stream(ASK, **settings)
    first = next(pieces)
    assert llm.chat(ASK, **settings, stop=["zzz"]).token_ids == alone.token_ids
    assert [first, *pieces] == expected


def test_arrays_and_tensors_are_token_lists(llm: LLM) -> None:
    ids = [3, 4, 5]
    [expected] = llm.score([ids])
    for given in (torch.tensor(ids), np.array(ids), [np.int64(token) for token in ids]):
        assert torch.equal(llm.score([given])[0], expected)
        assert llm.generate([given], GREEDY)[0].token_ids == llm.generate([ids], GREEDY)[0].token_ids


def test_a_long_text_is_embedded_where_it_may_be_cut(llm: LLM) -> None:
    assert llm.embed(["sum " * 200], truncate=True).shape == (1, llm.model.config.hidden_size)


def test_what_is_no_model_is_said_before_anything_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for call, words in (
        (lambda: LLM(tmp_path / "nothing"), "nothing does not exist; give a model folder"),
        (lambda: LLM(tmp_path), "is an adapter, not a model; load the model it was made for"),
        (lambda: LLM(folder, device="cuda:99"), "device 'cuda:99' is not on this machine; torch finds cpu"),
        (lambda: LLM(folder, device="foo"), "device 'foo' is not on this machine"),
        (lambda: LLM(folder, dtype=torch.int8), "dtype 'int8' is none to compute in"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_a_folder_without_a_template_still_scores(model: Qwen3, tmp_path: Path) -> None:
    save_weights(model, tmp_path)
    Tokenizer.train(TEXTS, 330).save(tmp_path, "")
    (tmp_path / "chat_template.jinja").unlink()
    llm = LLM(tmp_path)
    assert len(llm.score([[3, 4, 5]])[0]) == 2
    with pytest.raises(InputError, match="choose a family"):
        llm.chat(ASK)
    assert LLM(tmp_path, policy=ChatPolicy()).chat(ASK, max_tokens=4).usage.completion_tokens <= 4


def test_a_gguf_file_answers_as_its_folder_does(llm: LLM, model: Qwen3, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    save_gguf(model, llm.tokenizer, path, "f32", llm.renderer.chat_template, "small")
    other = LLM(path)
    assert other.renderer.prompt_ids(ASK) == llm.renderer.prompt_ids(ASK)
    settings = {"max_tokens": 24, "temperature": 0.0, "thinking_budget": 8}
    assert other.chat(ASK, **settings).token_ids == llm.chat(ASK, **settings).token_ids


def test_exact_attention_and_long_context_are_settings(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "twofold"):
        assert LLM(folder, exact=True).model.attention_dtype == torch.float64
    assert "computing in torch.float32 (" in caplog.text


def test_what_cannot_be_honoured_is_refused(llm: LLM) -> None:
    for call, words in (
        (lambda: llm.score([[1, 2, 10**6]]), "token 1000000 is none"),
        (lambda: llm.generate([[-1]]), "token -1 is none"),
        (lambda: llm.score([[1] * 161]), "context length is 160"),
        (lambda: llm.generate([[1] * 160], GREEDY), "the prompt has 160 tokens"),
        (lambda: llm.generate("sum"), "must be a list"),
        (lambda: llm.chat(ASK, n=2), "one reply"),
        (lambda: next(llm.stream(ASK, n=2)), "one reply"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_given_parameters_meet_the_context_and_an_open_think_block(llm: LLM) -> None:
    made = llm.generate([[5] * 150], SamplingParams(0.0, max_tokens=100))[0]
    assert len(made.token_ids) <= 10
    inside = [*llm.renderer.prompt_ids(ASK), *llm.tokenizer.encode_with_special("<think>\n")]
    assert llm.generate([inside], SamplingParams(max_tokens=60, thinking_budget=0))[0].forced[0]


def test_stop_tokens_end_one_request_and_not_its_neighbour(llm: LLM) -> None:
    [whole] = llm.generate([[5, 6, 7]], GREEDY)
    stop = whole.token_ids[3]
    first = whole.token_ids.index(stop)
    requests = [
        Request((5, 6, 7), SamplingParams(0.0, max_tokens=12, stop_token_ids=(stop,))),
        Request((5, 6, 7), GREEDY),
    ]
    cut, other = llm.engine.generate(requests)
    assert cut.token_ids == whole.token_ids[: first + 1] and cut.finish_reason == "stop"
    assert other.token_ids == whole.token_ids


def test_without_a_limit_a_reply_stays_within_the_native_length(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that leaves room for one: a prompt just below the native length must not get a reply of a few tokens."""
    monkeypatch.setattr("twofold.llm.MAX_TOKENS", 20)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 100}')
    llm = LLM(folder)
    llm.model.config = llm.model.config.model_copy(update={"context": Context(native=80, target=160)})
    for length, room, extended in ((40, 41, False), (61, 20, False), (62, 98, True), (80, 80, True), (100, 60, True)):
        request = llm.request([5] * length, {})
        assert request.params.max_tokens == room and llm.engine.extends(request) == extended
    assert llm.engine.extends(llm.request([5] * 40, {"max_tokens": 100}))


def test_embeddings_and_relevance(folder: Path) -> None:
    texts = [*TEXTS, *["yes no yes no Judge whether the Document meets the requirements"] * 9]
    model, tokenizer = LLM(folder).model, Tokenizer.train(texts, 330)
    wide = Qwen3(model.config.model_copy(update={"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 2048}))
    wide.init_weights(1)
    llm = LLM.__new__(LLM)
    llm.model, llm._tokenizer = wide, tokenizer
    vectors = llm.embed(["sum", "calc 37"], dimensions=8)
    assert vectors.shape == (2, 8)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    assert not torch.allclose(vectors[0], llm.embed(["sum"], task="find sums", dimensions=8)[0])
    scores = llm.rerank("sum", ["sum", "calc"])
    assert len(scores) == 2 and all(0 < score < 1 for score in scores)


def test_a_request_refused_beside_others_leaves_none_behind(llm: LLM) -> None:
    with pytest.raises(InputError, match="empty prompt"):
        llm.engine.generate([Request((), SamplingParams())])
    whole = llm.generate([[5, 6]], SamplingParams(0.0, max_tokens=4, stop=("zzz",)))
    with pytest.raises(InputError, match="more kv_bytes"):
        llm._complete(
            [Request((5, 6), SamplingParams(stop=("x",))), Request((5,) * 10**6, SamplingParams(stop=("x",)))],
            lambda _: SimpleNamespace(stops_at=lambda _: False, tokens=0),  # type: ignore[arg-type, return-value]
        )
    assert not llm.engine.has_work
    again = llm.generate([[5, 6]], SamplingParams(0.0, max_tokens=4, stop=("zzz",)))
    assert again[0].token_ids == whole[0].token_ids
    llm.engine.check_integrity()


def test_stop_strings_end_the_answer(llm: LLM) -> None:
    prompts = [[5, 6, 7], [9, 8]]
    free = llm.generate(prompts, SamplingParams(max_tokens=30, n=2, seed=3))
    texts = [llm.text(completion) for completion in free]
    stop = (texts[0][6:8], texts[3][4:6])
    cut = llm.generate(prompts, SamplingParams(max_tokens=30, n=2, seed=3, stop=stop))
    assert [(c.request_index, c.sample_index) for c in cut] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for whole, part, text in zip(free, cut, texts, strict=True):
        assert part.token_ids == whole.token_ids[: len(part.token_ids)]
        ends = [text.index(string) for string in stop if string in text]
        assert llm.text(part, stop) == text[: min(ends, default=len(text))]
        assert part.finish_reason == "stop" if ends else part.finish_reason == whole.finish_reason
        assert len(part.token_ids) == len(part.logprobs) == len(part.forced)
    assert len(cut[0].token_ids) < len(free[0].token_ids) and llm.engine.counters.running == 0
    llm.engine.check_integrity()


def test_a_chat_stops_at_a_string_too(llm: LLM) -> None:
    settings = {"max_tokens": 60, "temperature": 1.0, "seed": 5}
    whole = llm.chat(ASK, **settings)
    stop = whole.content[5:7]
    cut = llm.chat(ASK, stop=[stop], **settings)
    assert cut.content == whole.content[: whole.content.index(stop)] and cut.finish_reason == "stop"
    pieces = list(llm.stream(ASK, stop=[stop], **settings))
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == cut.content
    assert not llm.engine.has_work


def test_the_mode_decides_what_is_not_given(llm: LLM) -> None:
    ids = [5, 6, 7]
    assert llm.request(ids, {}, thinking=True).params.top_p == llm.request(ids, {}).params.top_p == 0.95
    assert llm.request(ids, {}, thinking=False).params.top_p == 0.8
    assert llm.request(ids, {"top_p": 0.5}, thinking=False).params.top_p == 0.5
    inside, after = (llm.tokenizer.encode_with_special(text) for text in ("<think>\n", "<think>\n\n</think>\n\n"))
    assert llm.request(ids + inside, {}).in_think and llm.request(ids + after, {}).after_think


def test_more_than_one_end_token_of_a_gguf_file(
    llm: LLM, model: Qwen3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in one made from a base model, whose eos is not the end of a turn."""
    pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    save_gguf(model, llm.tokenizer, path, "f32", llm.renderer.chat_template, "small")
    end, text = llm.tokenizer.im_end, llm.tokenizer.endoftext
    assert LLM(path).engine.eos_ids == (end, text)
    more = {"tokenizer.ggml.eos_token_id": text, "tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 11}
    monkeypatch.setattr("twofold.model.companions.read_metadata", lambda path: {**read_metadata(path), **more})
    assert LLM(path).engine.eos_ids == (text, 9, 11, end)


@pytest.mark.parametrize("value", ["x", ["x"], 1.5, True, [99999], -1, {"a": 1}])
def test_end_tokens_that_are_none(folder: Path, tmp_path: Path, value: object) -> None:
    for name in ("generation_config.json", "config.json"):
        odd = shutil.copytree(folder, tmp_path / name[:3])
        (odd / "generation_config.json").unlink()
        values = json.loads((odd / name).read_text()) if name == "config.json" else {}
        (odd / name).write_text(json.dumps(values | {"eos_token_id": value}))
        with pytest.raises(InputError, match=rf"{name}: eos_token_id names .*, which is no token; give whole numbers"):
            LLM(odd)


def test_end_tokens_of_a_folder(folder: Path, tmp_path: Path) -> None:
    """generation_config.json, then config.json, then the tokenizer; null and [] say nothing."""
    place = shutil.copytree(folder, tmp_path / "a")
    usual = LLM(folder).tokenizer.eos_ids
    (place / "generation_config.json").write_text('{"eos_token_id": []}')
    assert LLM(place).engine.eos_ids == usual
    values = json.loads((place / "config.json").read_text()) | {"eos_token_id": [65, 66]}
    (place / "config.json").write_text(json.dumps(values))
    llm = LLM(place)
    assert llm.engine.eos_ids == (65, 66)
    save_folder(llm, place, None, tmp_path / "b", "f32")
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"eos_token_id": [65, 66]}
    (place / "generation_config.json").write_text('{"eos_token_id": 67}')
    assert LLM(place).engine.eos_ids == (67,)


def test_texts_begin_with_the_token_that_the_tokenizer_puts_there(folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "a")
    backend, bos = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json")), LLM(folder).tokenizer.endoftext
    named = [("<|endoftext|>", bos)]
    backend.post_processor = processors.TemplateProcessing(["<|endoftext|>", "$A"], special_tokens=named)
    backend.save(str(place / "tokenizer.json"))
    llm = LLM(place)
    want = llm.generate([[bos, *llm.tokenizer.encode("sum 48")]], GREEDY)
    assert llm.generate(["sum 48"], GREEDY) == want != LLM(folder).generate(["sum 48"], GREEDY)
    assert token_lists(llm, "sum 48") == [[bos, *llm.tokenizer.encode("sum 48")]]
    assert token_lists(llm, "sum 48", begin=False) == [llm.tokenizer.encode("sum 48")]
    assert llm.renderer.prompt_ids(ASK)[0] == llm.tokenizer.im_start


def test_keys_without_effect_are_warned_about(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = LLM(folder)
    save_model(source.model, source.tokenizer, tmp_path)
    write_generation_config(tmp_path, {"num_beams": 4, "max_new_tokens": 7, "repetition_penalty": 1.1})
    with caplog.at_level("WARNING", "twofold"):
        llm = LLM(tmp_path)
    assert "num_beams of generation_config.json is not supported" in caplog.text
    params = llm.request([5, 6], {}, thinking=True).params
    assert (params.max_tokens, params.repetition_penalty, params.temperature) == (7, 1.1, 0.6)


def test_a_json_answer(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_pattern": ""}}
    out = llm.chat(ASK, thinking=False, max_tokens=30, grammar=Grammar("json_schema", json.dumps(schema)))
    assert json.loads(out.content).keys() == {"a"} and out.finish_reason == "stop"


def test_packed_weights_say_nearly_the_same(llm: LLM, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    exact = LLM(folder)
    ids = list(range(20, 60))
    save_gguf(exact.model, exact.tokenizer, tmp_path / "small.gguf", "f32", llm.renderer.chat_template, "small")
    for path in (folder, tmp_path / "small.gguf"):
        packed = LLM(path, quantize="int8")
        pair = torch.stack([packed.score([ids])[0], exact.score([ids])[0]])
        assert torch.corrcoef(pair)[0, 1] > 0.9 and not torch.equal(*pair)
        assert packed.model.packed_head is not None
        assert packed.generate([ids], GREEDY)[0].token_ids
    with pytest.raises(InputError, match="int8"):
        LLM(folder, quantize="int3")


def test_a_conversation_with_a_call_that_was_cut_goes_on(llm: LLM) -> None:
    call = {"function": {"name": "f", "arguments": '{"a": "x'}}
    past = [{"role": "user", "content": "E1"}, {"role": "assistant", "content": "", "tool_calls": [call], "id": 7}]
    messages, notes = llm.read_messages([*past, {"role": "user", "content": "B5"}])
    assert messages[1].tool_calls[0].raw == '{"a": "x'  # type: ignore[union-attr]
    assert ["no JSON object" in notes[0], "messages[1].id" in notes[1], len(notes)] == [True, True, 2]
    reply = llm.chat([*past, {"role": "user", "content": "B5"}], max_tokens=1)
    assert reply.warnings[:2] == tuple(notes)
    records = [Message("user", "E1")]
    assert llm.read_messages(records) == (records, [])
