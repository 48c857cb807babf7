"""Grammars at the sampler: whatever a random model wants, the answer has its form, and the thought is left alone."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twofold.base.records import Completion, Grammar, InputError, Request, SamplingParams
from twofold.engine import grammar as module
from twofold.engine.grammar import Grammars
from twofold.engine.sampling import Sampler, ThinkTokens
from twofold.text.parse import parse
from twofold.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="needs the extra 'grammar'")

TEXTS = ['{"name": "value", "a": [1, 2, 3], "true": false}\n\n<tool_call>\n', "and some words: the cat sat, naïve 漢字"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, 330)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.eos_ids)


def think_tokens(tokenizer: Tokenizer, stop_text: str = "\n\nEnough.\n</think>\n\n") -> ThinkTokens:
    assert tokenizer.think_open is not None and tokenizer.think_close is not None
    return ThinkTokens(tokenizer.think_open, tokenizer.think_close, tuple(tokenizer.encode_with_special(stop_text)))


def answers(
    tokenizer: Tokenizer,
    grammars: Grammars,
    requests: list[Request],
    think: ThinkTokens | None = None,
    wishes: dict[int, float] | None = None,
) -> list[Completion]:
    """What a model with random logits makes of the requests; it wants to come to an end more and more.

    ``wishes``: what is added to the logits of some tokens.
    """
    padded = tokenizer.vocab_size + 11
    sampler = Sampler(len(requests), think, tokenizer.eos_ids, tokenizer.vocab_size, grammars=grammars)
    generator = torch.Generator().manual_seed(len(requests))
    closers = [tokenizer.encode(mark)[0] for mark in '"}],:'] + list(tokenizer.eos_ids)
    for slot, request in enumerate(requests):
        sampler.check(request)
        sampler.start(slot, request, request_index=slot)
    live, done, step = torch.arange(len(requests)), [], 0
    while len(live):
        logits = 2 * torch.randn(len(live), padded, generator=generator)
        logits[:, closers] += min(step * 0.05, 30)
        logits[:, tokenizer.vocab_size :] += 9
        for token, wish in (wishes or {}).items():
            logits[:, token] += wish
        finished = sampler.sample(live, logits).finished_R
        done += [sampler.take(slot, 0) for slot in live[finished].tolist()]
        live, step = live[~finished], step + 1
    assert all(not completion.error and max(completion.token_ids) < tokenizer.vocab_size for completion in done)
    return sorted(done, key=lambda completion: completion.request_index)


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "anyOf"]
    kind = rng.choice(kinds + ["array", "object", "object"] * (depth > 0))
    if kind == "enum":
        return {"enum": rng.sample(["red", "grün", 3, None, True, 2.5], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["a b", 7, False])}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, 0) for _ in range(rng.randint(1, 3))]}
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(0, 500)}
    if kind == "array":
        few = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": few, "maxItems": few + 2}
    if kind == "object":
        names = rng.sample(["a", "name", "ключ", "x y", "true"], rng.randint(0, 4))
        fields = {name: random_schema(rng, depth - 1) for name in names}
        required = [name for name in names if rng.random() < 0.6]
        return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}
    return {"type": kind}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema's rules for what ``random_schema`` uses."""
    if "enum" in schema:
        return any(value == option and type(value) is type(option) for option in schema["enum"])
    if "const" in schema:
        return value == schema["const"] and type(value) is type(schema["const"])
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    kind = schema["type"]
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "number":
        return type(value) in (int, float)
    if kind == "array":
        right_size = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return right_size and all(fits(item, schema["items"]) for item in value)
    if kind == "object":
        fields = schema["properties"]
        known = isinstance(value, dict) and set(schema["required"]) <= value.keys() <= fields.keys()
        return known and all(fits(item, fields[name]) for name, item in value.items())
    return {"boolean": bool, "null": type(None)}[kind] is type(value)


def test_200_random_schemas_are_always_met(tokenizer: Tokenizer, grammars: Grammars) -> None:
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(200)]
    requests = [
        Request((5,), SamplingParams(1.0, max_tokens=500, seed=i, grammar=Grammar("json_schema", json.dumps(schema))))
        for i, schema in enumerate(schemas)
    ]
    complete = 0
    for start in range(0, 200, 50):
        part = answers(tokenizer, grammars, requests[start : start + 50])
        for schema, completion in zip(schemas[start : start + 50], part, strict=True):
            if completion.finish_reason == "stop":
                assert completion.token_ids[-1] in tokenizer.eos_ids
                assert not set(completion.token_ids[:-1]) & tokenizer.structure.keys()
                value = json.loads(tokenizer.decode(completion.token_ids[:-1]))
                assert fits(value, schema), (value, schema)
                complete += 1
    assert complete >= 190, "nearly all come to their end"


def test_any_json_is_an_object(tokenizer: Tokenizer, grammars: Grammars) -> None:
    requests = [Request((5,), SamplingParams(1.0, max_tokens=900, seed=i, grammar=Grammar("json"))) for i in range(20)]
    for completion in answers(tokenizer, grammars, requests):
        assert completion.finish_reason == "stop"
        assert isinstance(json.loads(tokenizer.decode(completion.token_ids[:-1])), dict)


@pytest.mark.parametrize(
    "pattern", ["[éß漢]{3,6}", "(yes|no|naïve)", "[0-9]{4}-[0-9]{2}", "a*", r"<tool_call>\{\}</think>"]
)
def test_regular_expressions_are_met_to_the_byte(tokenizer: Tokenizer, grammars: Grammars, pattern: str) -> None:
    params = SamplingParams(1.0, max_tokens=80, grammar=Grammar("regex", pattern))
    for completion in answers(tokenizer, grammars, [Request((5,), params)] * 12):
        assert completion.finish_reason == "stop"
        data = b"".join(map(tokenizer.token_bytes, completion.token_ids[:-1]))
        assert re.fullmatch(pattern, data.decode())
        assert not set(completion.token_ids[:-1]) & tokenizer.structure.keys(), "text never has control tokens"


WORDS = ["naïve", "na", "漢字", "漢", "cat\n\n", "cats", "<think>", "🙂🙃", "x" * 40]


def check_masks(tokenizer: Tokenizer, grammars: Grammars, walks: int) -> None:
    """Along random walks through a finite language the bits set are exactly those of the tokens that lead on."""
    grammar = Grammar("lark", "start: " + " | ".join(json.dumps(word, ensure_ascii=False) for word in WORDS))
    rows = range(tokenizer.vocab_size)
    table = {token: tokenizer.token_bytes(token) for token in rows if token not in tokenizer.structure}
    rng, words = random.Random(3), [word.encode() for word in WORDS]
    for _ in range(walks):
        walk, prefix, ended = grammars.start(grammar), b"", False
        while not ended:
            bits = np.zeros(grammars.words, dtype=np.int32)
            walk.fill(bits, "answer")
            allowed = set(np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0].tolist())
            longer = [word for word in words if word.startswith(prefix)]
            leading = {t for t, data in table.items() if any(w.startswith(prefix + data) for w in longer)}
            fitting = leading | (set(tokenizer.eos_ids) if prefix in words else set())
            next_bytes = {word[len(prefix) : len(prefix) + 1] for word in longer}
            # Where only one text can follow, the library keeps to the tokens with which it is usually written.
            assert allowed == fitting if len(next_bytes) > 1 else allowed and allowed <= fitting
            token = rng.choice(sorted(allowed))
            walk.accept(token, "answer")
            ended = token in tokenizer.eos_ids
            prefix += b"" if ended else table[token]
        assert prefix in words and not walk.error


def test_masks_are_exact_to_the_byte(tokenizer: Tokenizer, grammars: Grammars) -> None:
    check_masks(tokenizer, grammars, 12)


@pytest.mark.slow
def test_masks_are_exact_for_the_official_tokenizer() -> None:
    folder = Path(os.environ.get("TWOFOLD_ASSETS", "/nonexistent")) / "package" / "models"
    if not folder.is_dir():
        pytest.skip("needs package/models in the folder named by TWOFOLD_ASSETS")
    official = Tokenizer.from_folder(folder)
    grammars = Grammars(official, official.eos_ids)
    check_masks(official, grammars, 2)
    assert grammars.gap_tokens == {198: b"\n", 271: b"\n\n"}
    rng = random.Random(5)
    forms = [Grammar("json_schema", json.dumps(random_schema(rng))) for _ in range(10)]
    requests = [
        Request((5,), SamplingParams(1.0, max_tokens=300, seed=i, grammar=form)) for i, form in enumerate(forms)
    ]
    for form, completion in zip(forms, answers(official, grammars, requests), strict=True):
        if completion.finish_reason == "stop":
            assert fits(json.loads(official.decode(completion.token_ids[:-1])), json.loads(form.text))


LARK = """
start: (<tool_call> "\\n" call "\\n" </tool_call>)+
call: %json {"type": "object", "properties": {"name": {"const": "add"}, "arguments": {"type": "object",
  "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"],
  "additionalProperties": false}}, "required": ["name", "arguments"], "additionalProperties": false}
"""


@pytest.mark.parametrize("budget", [0, 7, None])
def test_thought_budget_gap_and_calls_together(tokenizer: Tokenizer, grammars: Grammars, budget: int | None) -> None:
    """The thought is free but for what would end it otherwise, forced text passes, then come calls and nothing else."""
    think = think_tokens(tokenizer)
    params = SamplingParams(1.0, max_tokens=400, thinking_budget=budget, grammar=Grammar("lark", LARK), seed=1)
    wishes = {think.opening: 20.0, think.closing: 6.0, tokenizer.im_end: 4.0, tokenizer.encode("\n\n")[0]: 4.0}
    natural = 0
    for completion in answers(tokenizer, grammars, [Request((5,), params)] * 16, think, wishes):
        tokens = completion.token_ids
        assert completion.finish_reason == "stop" and tokens[0] == think.opening
        end = tokens.index(think.closing)
        thought = [t for t, forced in zip(tokens[1:end], completion.forced[1:end], strict=True) if not forced]
        assert completion.thinking_tokens == len(thought) <= (400 if budget is None else budget)
        assert not set(thought) & tokenizer.structure.keys()
        forced = [t for t, f in zip(tokens, completion.forced, strict=True) if f]
        assert forced in ([], list(think.stop_ids))
        natural += not forced
        reply = parse(tokenizer, tokens)
        assert reply.closed and not reply.content.strip() and reply.tool_calls and not reply.errors
        assert all(call.name == "add" and 0 <= call.arguments["a"] <= 99 for call in reply.tool_calls)
        after = tokenizer.decode(tokens[end + 1 :])
        assert re.match("\n{0,2}<tool_call>", after)
    assert natural == (0 if budget == 0 else 16 if budget is None else natural)


def test_a_model_may_answer_without_a_thought_but_not_think_later(tokenizer: Tokenizer, grammars: Grammars) -> None:
    think = think_tokens(tokenizer)
    params = SamplingParams(1.0, max_tokens=60, grammar=Grammar("regex", "[a-c]{5}"))
    wish = {think.opening: 5.0, think.closing: 30.0, tokenizer.encode("\n\n")[0]: 30.0}
    free = answers(tokenizer, grammars, [Request((5,), params)] * 40, think, wish)
    opened = [completion.token_ids[0] == think.opening for completion in free]
    assert any(opened) and not all(opened)
    for completion, thinks in zip(free, opened, strict=True):
        assert completion.token_ids.count(think.opening) == thinks
        text = tokenizer.decode(completion.token_ids[:-1])
        assert re.fullmatch("(?s)<think>.*</think>\n\n[a-c]{5}" if thinks else "[a-c]{5}", text)
    wish[think.opening] = 40.0
    for completion in answers(tokenizer, grammars, [Request((5,), params, after_think=True)] * 10, think, wish):
        assert re.fullmatch("[a-c]{5}", tokenizer.decode(completion.token_ids[:-1]))
    for completion in answers(tokenizer, grammars, [Request((5,), params, in_think=True)] * 10, think, wish):
        assert re.fullmatch("(?s).*</think>\n\n[a-c]{5}", tokenizer.decode(completion.token_ids[:-1]))


def test_a_stop_text_without_the_gap_leaves_it_to_the_model(tokenizer: Tokenizer, grammars: Grammars) -> None:
    newline, both = tokenizer.encode("\n")[0], tokenizer.encode("\n\n")[0]
    params = SamplingParams(1.0, max_tokens=60, thinking_budget=2, grammar=Grammar("regex", "[a-c]{5}"))
    for stop_text, wish, gap in (
        ("\n\nOut.</think>", both, "\n\n"),
        ("\n\nOut.</think>", newline, "\n\n"),
        ("</think>\n", newline, "\n\n"),
        ("</think>\n", both, "\n\n?"),
        ("</think>\n\n", both, "\n\n"),
    ):
        think = think_tokens(tokenizer, stop_text)
        wishes = {wish: 40.0, think.closing: -50.0}
        for completion in answers(tokenizer, grammars, [Request((5,), params, in_think=True)] * 4, think, wishes):
            text = tokenizer.decode(completion.token_ids[:-1])
            assert re.fullmatch(gap + "[a-c]{5}", text.split("</think>")[1]), text


def test_biases_cannot_break_the_form(tokenizer: Tokenizer, grammars: Grammars) -> None:
    bias = [(token, -100.0) for mark in '{}"' for token in tokenizer.encode(mark)]
    bias += [(token, 100.0) for token in (*tokenizer.structure, *tokenizer.encode("["))]
    for temperature in (0.0, 1.0):
        form = Grammar("regex", r'\{"[a-c]"\}')
        params = SamplingParams(temperature, max_tokens=30, top_k=5, logit_bias=tuple(bias), grammar=form)
        for completion in answers(tokenizer, grammars, [Request((5,), params)] * 4):
            assert json.loads(tokenizer.decode(completion.token_ids[:-1]).replace("}", ":1}"))


def test_a_free_sample_is_the_same_beside_a_constrained_one(tokenizer: Tokenizer, grammars: Grammars) -> None:
    free = Request((5,), SamplingParams(1.0, max_tokens=40, seed=4, ignore_eos=True))
    bound = Request((5,), SamplingParams(1.0, max_tokens=40, grammar=Grammar("regex", "a{40}b*")))
    beside, alone = (answers(tokenizer, grammars, [free, other])[0] for other in (bound, free))
    assert beside == alone and len(beside.token_ids) == 40


BAD = [
    ("regex", "[ab", "unclosed character class"),
    ("lark", 'start: "a', "lexer error"),
    ("lark", "start: missing", 'unknown name: "missing"'),
    ("json_schema", '{"type": "strange"}', "Invalid type: strange"),
    ("json_schema", '{"not": {}}', "Unimplemented keys"),
    ("json_schema", '{"type"', "EOF"),
    ("json_schema", '{"type": "object", "required": ["a"], "additionalProperties": false}', "Unsatisfiable"),
]


@pytest.mark.parametrize(("kind", "text", "message"), BAD)
def test_bad_grammars_are_refused_in_one_line(grammars: Grammars, kind: Any, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        grammars.check(Grammar(kind, text))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"this {kind} grammar cannot be used: ")


def test_grammars_need_the_tokenizer_and_the_library(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request((5,), SamplingParams(grammar=Grammar("json")))
    with pytest.raises(InputError, match="grammars=Grammars"):
        Sampler(1, None, tokenizer.eos_ids, tokenizer.vocab_size).check(request)

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'twofold\[grammar\]'"):
        Grammars(tokenizer, tokenizer.eos_ids).check(Grammar("json"))


def test_a_grammar_that_cannot_go_on_ends_the_sample_with_its_reason(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """The library gives up on states that grow too complex; the sample is aborted, never passed off as complete."""
    walk = grammars.start(Grammar("regex", "abc"))
    walk.accept(tokenizer.encode("x")[0], "answer")
    assert "\n" not in walk.error and "satisfy" in walk.error
    sampler = Sampler(1, None, tokenizer.eos_ids, tokenizer.vocab_size, grammars=grammars)
    sampler.start(0, Request((5,), SamplingParams(grammar=Grammar("regex", "abc"))))
    sampler._shaping.grammars[0] = walk
    assert bool(sampler.sample(torch.tensor([0]), torch.zeros(1, tokenizer.vocab_size)).finished_R)
    completion = sampler.take(0, 0)
    assert completion.finish_reason == "aborted" and completion.error == walk.error
