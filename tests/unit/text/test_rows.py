"""Files of rows by kind, Arrow's padding, and tokens that a fine-tune added, inside contents."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from twofold.base.records import InputError, ToolCall
from twofold.text.chat import Renderer
from twofold.text.formats import Example, read_example, write_example
from twofold.text.rows import read_rows, read_views
from twofold.text.tokenizer import ADDED_TOKENS, Tokenizer

ROW = {"messages": [{"role": "user", "content": "q, “é”\nq"}, {"role": "assistant", "content": "a"}]}
LINE = json.dumps(ROW, ensure_ascii=False)
CSV = 'prompt,completion,id\r\n"q, ""x""\nq",a,1\r\n\r\nq,,2\r\n'


def found(path: Path, data: bytes) -> list[tuple[str, Any]]:
    path.write_bytes(data)
    return list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("x.jsonl", f"\n{LINE}\n \n{LINE}", [":2", ":4"]),
        ("x.json", "\n \n [\n" + LINE + "," + LINE + "]\n", ["[0]", "[1]"]),
        ("x.json", "\ufeff\n" + json.dumps(ROW, indent=1), ["[0]"]),
        ("x.json", f"{json.dumps(ROW, indent=1)}\n{json.dumps(ROW, indent=1)}", ["[0]", "[1]"]),
        ("x.json", "", []),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_json_in_every_shape(name: str, text: str, places: list[str], packed: bool, tmp_path: Path) -> None:
    data = gzip.compress(text.encode()) if packed else text.encode()
    assert found(tmp_path / name, data) == [(place, ROW) for place in places]


@pytest.mark.parametrize("name", ["x.csv", "X.CSV.gz"])
def test_a_table_is_rows_by_name(name: str, tmp_path: Path) -> None:
    data = gzip.compress(CSV.encode()) if name.endswith("gz") else CSV.encode()
    first, last = found(tmp_path / name, data)
    assert first == (":2", {"prompt": 'q, "x"\nq', "completion": "a", "id": "1"})
    assert last == (":5", {"prompt": "q", "completion": None, "id": "2"})
    assert read_example(first[1]).segments == (('q, "x"\nq', 0.0), ("a", 1.0))


def test_conversations_in_cells_are_json(tmp_path: Path) -> None:
    text = "messages\tid\n" + '"' + LINE[len('{"messages": ') : -1].replace('"', '""') + '"\t7\n'
    [(_, row)] = found(tmp_path / "x.tsv", text.encode())
    assert read_example(row).messages == read_example(ROW).messages


def test_broken_tables_are_named(tmp_path: Path) -> None:
    (_, short), (place, good) = found(tmp_path / "x.csv", b"prompt,completion\nq,a,b\nq,a\n")
    assert isinstance(short, InputError) and "3 cells under 2 names" in str(short) and (place, len(good)) == (":3", 2)
    for text, message in (("a,a\n1,2\n", "two have the same"), ('a,b\n"x,1\n', "not CSV"), ("a,\n1,2\n", "no name")):
        with pytest.raises(InputError, match=message):
            found(tmp_path / "x.csv", text.encode())
    assert len(found(tmp_path / "x.csv", f"text\n{'x' * 200_000}\n".encode())) == 1  # above the library's limit


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04...", "a zip archive or a spreadsheet"),
        (b"\x28\xb5\x2f\xfd...", "zstd"),
        (b"ARROW1\0\0", "an Arrow file"),
        ("x".encode("utf-16"), "UTF-16"),
        (b"\x80abc", "not UTF-8"),
        (gzip.compress(LINE.encode() * 50, mtime=0)[:40], "is damaged"),
        (b"[1, 2", "not JSON"),
    ],
)
def test_other_kinds_are_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        found(tmp_path / "x.jsonl", data)


def test_parquet_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"twofold\[parquet\]"):
        found(tmp_path / "x.parquet", b"PAR1")


def test_parquet_pads_and_the_padding_is_no_value(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    calls = [call(a=1), call(b={"x": 2})]
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [c]}]} for c in calls]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x")  # no name, the beginning says it
    read = [read_example(row) for _, row in read_rows(tmp_path / "x")]
    assert [example.messages[1].tool_calls[0].arguments for example in read] == [{"a": 1}, {"b": {"x": 2}}]


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": None, "function": {"name": "f", "arguments": arguments}}


def tool(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"properties": properties, **more}}}


def arguments_of(given: Any, *tools: Any) -> Any:
    turn = {"role": "assistant", "content": None, "reasoning_content": None, "tool_calls": [call()], "weight": None}
    turn["tool_calls"][0]["function"]["arguments"] = given
    row = {"messages": [{"role": "user", "content": "q", "tool_calls": None, "tool": None}, turn], "tools": list(tools)}
    [read] = read_example(row).messages[1].tool_calls
    return read.arguments


MAYBE = {"anyOf": [{"type": "string"}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("given", "tools", "meant"),
    [
        ({"a": 1, "b": None}, [], {"a": 1}),
        ({"a": {"x": None, "y": [{"z": None, "u": 1}, None]}}, [], {"a": {"y": [{"u": 1}, None]}}),
        ('{"a": null}', [], {"a": None}),  # text was never a struct
        ({"a": None, "b": None}, [tool({"a": {"type": ["string", "null"]}, "b": {"type": "string"}})], {"a": None}),
        ({"a": None}, [tool({"a": MAYBE})], {"a": None}),
        ({"a": None}, [tool({"a": {"type": "string", "nullable": True}})], {"a": None}),
        ({"a": None}, [tool({"a": {"enum": ["x", None]}})], {"a": None}),
        ({"a": None, "b": None}, [tool({"a": {}, "b": {}}, required=["a"])], {"a": None}),
        ({"a": None}, [tool({"a": {"type": "string"}}, required=["a"])], {}),
        ({"a": {"b": None, "c": None}}, [tool({"a": {"properties": {"b": MAYBE}}})], {"a": {"b": None}}),
        ({"a": [{"b": None, "c": None}]}, [tool({"a": {"items": {"properties": {"b": MAYBE}}}})], {"a": [{"b": None}]}),
        ({"a": {"k": None}}, [tool({"a": {"additionalProperties": MAYBE}})], {"a": {"k": None}}),
        (
            {"a": {"b": None}},
            [tool({"a": {"$ref": "#/$defs/A"}}, **{"$defs": {"A": {"properties": {"b": MAYBE}}}})],
            {"a": {"b": None}},
        ),
        ({"a": None}, [tool({"a": {"$ref": "#/$defs/A"}}, **{"$defs": {"A": {"$ref": "#/$defs/A"}}})], {}),
    ],
)
def test_nulls_of_arguments_are_what_the_tool_declares(given: Any, tools: list[Any], meant: Any) -> None:
    assert arguments_of(given, *tools) == meant


def test_nulls_of_tools_are_padding_but_a_default_that_may_be_null() -> None:
    padded = tool({
        "a": {"type": "string", "description": None, "default": None, "enum": ["x", None]},
        "b": None,
        "c": {"type": "string", "default": None, "items": {"type": None}},
        "d": {**MAYBE, "default": None},
        "e": {**MAYBE, "default": None},
        "f": {"const": None},
    }, required=["e"], strict=None)  # fmt: skip
    meant = tool({
        "a": {"type": "string", "default": None, "enum": ["x", None]},
        "c": {"type": "string", "items": {}},
        "d": {**MAYBE, "default": None},
        "e": MAYBE,
        "f": {"const": None},
    }, required=["e"])  # fmt: skip
    turns = ROW["messages"]
    assert read_example({"messages": turns, "tools": [padded, None][:1]}).tools == (meant,)
    for text in (json.dumps([padded]), [json.dumps(padded)]):  # text is taken at its word
        assert read_example({"messages": turns, "tools": text}).tools == (padded,)


def test_nulls_that_were_meant_are_written_so_that_they_come_back() -> None:
    messages = read_example(ROW).messages
    calls = (messages[0], messages[1].__class__("assistant", "", None, (ToolCall("f", {"a": None, "b": [{}]}),)))
    example = Example("openai", calls, (tool({"a": {"default": None}}),))
    for form in ("openai", "sharegpt", "prompt_completion"):
        row = json.loads(json.dumps(write_example(example, form)))  # type: ignore[arg-type]
        assert read_example(row).messages[1].tool_calls[0].arguments == {"a": None, "b": [{}]}


def test_columns_are_counted_and_can_be_left_out(tmp_path: Path) -> None:
    renderer = Renderer(Tokenizer.train(["some text"] * 3, 300))
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({**ROW, "id": 1, "response": "b"}) + "\n" + json.dumps({**ROW, "id": 2}))
    ignored: Counter[str] = Counter()
    (_, first), (_, second) = read_views(path, renderer, ignored=ignored)
    assert isinstance(first, InputError) and "'response'" in str(first) and ignored == {"id": 1}
    (_, first), _ = read_views(path, renderer, ignore=("response",))
    assert first == second


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    """A tokenizer after a fine-tune that added tokens with all sorts of flags."""
    folder = tmp_path_factory.mktemp("grown")
    base = Tokenizer.train(["which letter comes after"] * 4, 300)
    base.save(folder, "")
    full = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for flags in ({"special": True}, {"normalized": False}, {"special": True, "normalized": False}, {"lstrip": True}):
        full.add_tokens([tokenizers.AddedToken(f"<|{''.join(flags)}|>", **flags)])
    full.add_tokens([tokenizers.AddedToken("<|pad|>", special=True)])
    full.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<|pad|>"}
    for key in ("additional_special_tokens", "added_tokens_decoder", "extra_special_tokens"):
        config.pop(key, None)
    config["additional_special_tokens"] = ["<|special|>", "<|specialnormalized|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, Tokenizer.from_folder(folder)


OWN = ["<|special|>", "<|normalized|>", "<|specialnormalized|>", "<|lstrip|>"]


def test_tokens_that_a_fine_tune_added_are_tokens_inside_contents(grown: tuple[Path, Tokenizer]) -> None:
    _, tokenizer = grown
    text = "after".join(["letter", *OWN, "which"])
    own = [tokenizer.token_id(token) for token in OWN]
    for ids in (tokenizer.encode(text), tokenizer.encode_with_offsets(text)[0], *tokenizer.encode_batch([text])):
        assert [i for i in ids if i in own] == own and ids == tokenizer.encode_with_special(text)
    [view] = Renderer(tokenizer).views([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    assert [i for i in view.token_ids if i in own] == own * 2 and tokenizer.decode(view.token_ids) == view.text


def test_the_structure_stays_data_whatever_its_flags(grown: tuple[Path, Tokenizer]) -> None:
    folder, tokenizer = grown
    text = "which".join([*(token for token, _ in ADDED_TOKENS), "<|pad|>"])
    structure = {tokenizer.token_id(token) for token, _ in ADDED_TOKENS} | {tokenizer.token_id("<|pad|>")}
    assert not structure & set(tokenizer.encode(text))
    saved = json.loads((folder / "tokenizer.json").read_text())
    for token in saved["added_tokens"]:  # as add_tokens of transformers flags <think>, added to a base without it
        token |= {"normalized": True, "special": False}
    again = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(saved)))
    assert not (structure - {tokenizer.token_id("<|pad|>")}) & set(again.encode(text))


def test_contents_with_added_tokens_are_those_of_transformers(grown: tuple[Path, Tokenizer]) -> None:
    transformers = pytest.importorskip("transformers")
    folder, tokenizer = grown
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": f"which {OWN[0]}letter{OWN[1]}"}, {"role": "assistant", "content": OWN[2]}]
    renderer = Renderer(tokenizer)
    ids = renderer.render(messages).token_ids
    template = renderer.chat_template
    assert ids == list(theirs.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"])
