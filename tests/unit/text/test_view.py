"""The view shows every token once, with its weight, and can neither be fooled by content nor hide an error."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from twofold.base.records import InputError
from twofold.text.chat import Renderer
from twofold.text.tokenizer import Tokenizer
from twofold.text.view import Sample, html_view, terminal_view, view_file

ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "hi <script>alert(1)</script> \x1b[31m 你🙂\t&amp;"},
            {"role": "assistant", "reasoning_content": "hm", "content": "yes"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "no"},
        ]
    },
    {"text": "plain"},
    {"messages": [{"role": "user", "content": "nobody answers"}]},
]


class Page(HTMLParser):
    """Tags, and (style, tooltip, text) of every token."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[list[Any]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "b" and "title" in values:
            self.tokens.append([values["style"], values["title"], ""])

    def handle_data(self, data: str) -> None:
        if self.tokens and self.tags[-1] in ("b", "i"):
            self.tokens[-1][2] += data


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Rows (or raw lines) -> a JSON Lines file."""

    def make(*rows: Any) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return make


def test_samples_are_the_views_that_are_trained(tokenizer: Tokenizer, write: Callable[..., Path]) -> None:
    renderer = Renderer(tokenizer)
    samples = view_file(write(ROWS[0], "", *ROWS[1:]), renderer)
    assert [sample.title for sample in samples] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"]
    assert samples[0].views == tuple(renderer.views(ROWS[0]["messages"]))
    assert samples[1].views == (renderer.render_text([("plain", 1.0)]),)
    assert samples[2].views == ()
    assert len(view_file(write(*ROWS), renderer, limit=2)) == 2


def test_a_json_array_and_a_byte_order_mark_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, renderer = tmp_path / "rows.json", Renderer(tokenizer)
    for text in (json.dumps(ROWS, indent=1), "\ufeff" + json.dumps(ROWS)):
        path.write_text(text, encoding="utf-8")
        assert [sample.title for sample in view_file(path, renderer)] == [
            "rows.json[0]",
            "rows.json[1]",
            "rows.json[2]",
        ]
    path.write_text("\ufeff" + json.dumps(ROWS[1]), encoding="utf-8")
    assert [sample.title for sample in view_file(path, renderer)] == ["rows.json:1"]
    path.write_text(json.dumps([ROWS[1], {"x": 1}]))
    with pytest.raises(InputError, match=r"rows\.json\[1\]: unknown row"):
        view_file(path, renderer)
    path.write_text("[1,")
    with pytest.raises(InputError, match=r"rows\.json: not JSON .*; give one JSON object a line"):
        view_file(path, renderer)


def test_html_has_every_token_and_no_foreign_markup(tokenizer: Tokenizer, write: Callable[..., Path]) -> None:
    samples = view_file(write(*ROWS), Renderer(tokenizer))
    html = html_view(samples, tokenizer, "a <title>")
    page = Page(html)
    assert "script" not in page.tags and "link" not in page.tags and "http" not in html.replace("http-equiv", "")
    tokens = [
        (token, weight)
        for sample in samples
        for view in sample.views
        for token, weight in zip(view.token_ids, view.weights, strict=True)
    ]
    assert len(page.tokens) == len(tokens)
    for (token, weight), (style, tip, text) in zip(tokens, page.tokens, strict=True):
        assert tip.startswith(f"id {token} ·") and tip.endswith(f"weight {weight:g}") and style == f"--w:{weight:g}"
        whole = tokenizer.token_text(token)
        shown = text.replace("↵\n", "\n").replace("→\t", "\t")
        assert shown.startswith("\\") if whole is None or whole == "\x1b" else shown == whole
    assert "view 2 of 2" in html and "nothing to train" in html and "\x1b" not in html
    assert "prefers-color-scheme: dark" in html and "a &lt;title&gt;" in html


def test_terminal_marks_trained_tokens(tokenizer: Tokenizer, write: Callable[..., Path]) -> None:
    samples = view_file(write(*ROWS), Renderer(tokenizer))
    console = Console(width=100, record=True, color_system="truecolor", force_terminal=True, file=io.StringIO())
    console.print(terminal_view(samples, tokenizer))
    text = console.export_text(clear=False)
    assert "whose turn" in text and "rows.jsonl:1, view 1 of 2" in text and "trained: " in text
    assert "\\u001b" in text and "\x1b" not in text and "nothing to train" in text
    styled = console.export_text(styles=True)
    assert "\x1b[1;4;32m" in styled and "\x1b[2;36m" in styled and "\x1b[1;3;4;32m" in styled


def test_partial_weights_show(tokenizer: Tokenizer) -> None:
    rendered = Renderer(tokenizer).render_text([("prompt ", 0.0), ("half", 0.5)])
    html = html_view([Sample("x", (rendered,))], tokenizer)
    assert "--w:0.5" in html and "weight 0.5" in html
    [text] = [line for line in terminal_view([Sample("x", (rendered,))], tokenizer).renderables[3:4]]
    assert any("underline" in str(span.style) and "bold" not in str(span.style) for span in text.spans)  # type: ignore[union-attr]


def test_errors_name_the_line(tokenizer: Tokenizer, write: Callable[..., Path], tmp_path: Path) -> None:
    renderer = Renderer(tokenizer)
    for bad, fault in [("{oops", ":2: "), ({"x": 1}, ":2: unknown row"), ("[" * 100_000, ":2: ")]:
        with pytest.raises(InputError, match=fault):
            view_file(write(ROWS[0], bad), renderer)
        assert len(view_file(tmp_path / "rows.jsonl", renderer, limit=1)) == 1
    with pytest.raises(InputError, match=r"cannot be read"):
        view_file(tmp_path / "none.jsonl", renderer)
    with pytest.raises(InputError, match="limit"):
        view_file(tmp_path / "rows.jsonl", renderer, limit=0)
    with pytest.raises(InputError, match="has no rows"):
        view_file(write(""), renderer)
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="UTF-8"):
        view_file(tmp_path / "rows.jsonl", renderer)
