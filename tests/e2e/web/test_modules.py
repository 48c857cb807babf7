"""The parts of the web chat one by one, inside Chromium: event reader, Markdown, maths, calculator, conversations.

The page's files are served as they are, without a model. Not here: the page as a whole (``test_page.py``).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import twofold
from twofold.tasks.tools import CALC_TOOL, calculate

WEB = Path(twofold.__file__).parent / "serve" / "web"

Run = Callable[..., Any]


class Files(SimpleHTTPRequestHandler):
    """The folder of the page, and nothing in the log."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def run(browser: Any) -> Iterator[Run]:
    """``run(imports, body, argument)``: a JavaScript function's value, with names imported from the page's modules."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=WEB))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.server_port}/index.html")

    def evaluate(module: str, names: str, body: str, argument: Any = None) -> Any:
        return page.evaluate(
            f"async (given) => {{ const {{ {names} }} = await import('./{module}'); {body} }}", argument
        )

    yield evaluate
    page.close()
    server.shutdown()
    server.server_close()


def test_the_event_reader_gives_the_same_for_every_cut(run: Run) -> None:
    """T24 on the client's side."""
    text = 'data: {"a": "é"}\r\n\r\n: a comment\n\nevent: x\ndata: one\ndata: two\n\ndata:[DONE]\n\n'
    found = run(
        "api.js",
        "EventReader",
        """return Array.from({ length: given.length + 1 }, (_, cut) => {
          const reader = new EventReader();
          return [...reader.feed(given.slice(0, cut)), ...reader.feed(given.slice(cut)), ...reader.end()];
        });""",
        text,
    )
    assert all(events == ['{"a": "é"}', "one\ntwo", "[DONE]"] for events in found)


EXPRESSIONS = [
    "37*48", "1+2*3", "(1+2)*3", "-7//2", "-7%3", "7%-3", "1/3", "2/4", "1e3", "1.5e3*2", "10/5", "2--3",
    "+4", "1e15/10", "1e20*1.0", "1/100000", "1/3000000", "0.1+0.2", "123456789*1000", ".5*4", "", "1/0", "1//0",
    "5%0", "2**3", "a+1", "(1", "1)", "1 2", "__import__('os')", "9" * 201, "1e999", "-0", "7.0//2",
]  # fmt: skip


def test_the_calculator_answers_as_the_one_in_python(run: Run) -> None:
    found = run("calc.js", "calculate", "return given.map(calculate);", EXPRESSIONS)
    assert dict(zip(EXPRESSIONS, found, strict=True)) == {text: calculate(text) for text in EXPRESSIONS}
    assert run("calc.js", "CALCULATOR", "return CALCULATOR;") == CALC_TOOL
    bad = [["calc", '{"expression": 3}'], ["calc", '{"x": "1"}'], ["calc", "{"], ["calc", "null"], ["other", "{}"]]
    results = run("calc.js", "runCall", "return given.map(([name, source]) => runCall(name, source));", bad)
    assert results[-1] is None and all(result.startswith("error: ") for result in results[:-1])


def shown(run: Run, sources: list[str]) -> list[str]:
    """Markdown as HTML, classes and attributes left out."""
    body = """return given.map((source) => {
      const box = document.createElement("div");
      showMarkdown(box, source);
      return box.innerHTML;
    });"""
    found = run("markdown.js", "showMarkdown", body, sources)
    return [re.sub(r' (class|tabindex|target|rel|title|type|aria-[a-z]+)="[^"]*"', "", html) for html in found]


MARKDOWN = {
    "plain *em* **strong** ***both*** ~~gone~~ `code`": "<p>plain <em>em</em> <strong>strong</strong> "
    "<em><strong>both</strong></em> <del>gone</del> <code>code</code></p>",
    "snake_case_name and 2*3*4 stay": "<p>snake_case_name and 2<em>3</em>4 stay</p>",
    "**“重点”**文字和*强调*。": "<p><strong>“重点”</strong>文字和<em>强调</em>。</p>",
    "a * b ** c": "<p>a * b ** c</p>",
    "# One\n## Two ##": "<h3>One</h3><h4>Two</h4>",
    "- a\n- b\n  - c\n\n1. x\n2. y": "<ul><li><span>a</span></li>"
    "<li><span>b</span><ul><li><span>c</span></li></ul></li>"
    '</ul><ol start="1"><li><span>x</span></li><li><span>y</span></li></ol>',
    "3. x\n\n   more\n4. y": '<ol start="3"><li><p>x</p><p>more</p></li><li><p>y</p></li></ol>',
    "- [x] done\n- [ ] open": '<ul><li><input disabled=""><span>done</span></li>'
    '<li><input disabled=""><span>open</span></li></ul>',
    "> quoted\n> **more**": "<blockquote><p>quoted<br><strong>more</strong></p></blockquote>",
    "a\nb  \nc": "<p>a<br>b<br>c</p>",
    "---": "<hr>",
    "| a | b |\n|--|:-:|\n| `x|y` | \\| |": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr>"
    "<td><code>x|y</code></td><td>|</td></tr></tbody></table></div>",
    "[a](https://x.org) <https://y.org> https://z.org.": '<p><a href="https://x.org">a</a> <a href="https://y.org">'
    'https://y.org</a> <a href="https://z.org">https://z.org</a>.</p>',
    "[a](javascript:x) ![i](https://x.org/i.png)": '<p><span>a</span> <a href="https://x.org/i.png">i</a></p>',
    "<b>x</b> & &amp; \\*no\\*": "<p>&lt;b&gt;x&lt;/b&gt; &amp; &amp;amp; *no*</p>",
    "costs $5 or $10 today": "<p>costs $5 or $10 today</p>",
    "``a`b`` and `unclosed": "<p><code>a`b</code> and `unclosed</p>",
}


def test_markdown(run: Run) -> None:
    assert dict(zip(MARKDOWN, shown(run, list(MARKDOWN)), strict=True)) == MARKDOWN


def test_code_is_kept_to_the_letter(run: Run) -> None:
    code = 'def f(x):\n    # "comment"\n    return x * 2  # 1\n\n\tprint("<b>", 0x1F)\n'
    body = """return given.map((language) => {
      const box = document.createElement("div");
      showMarkdown(box, "```" + language + "\\n" + CODE + "```\\nafter");
      const pre = box.querySelector("pre");
      return [pre.textContent + "\\n", pre.querySelectorAll("span").length, box.lastChild.textContent];
    });""".replace("CODE", json.dumps(code))
    python, plain, unknown = run("markdown.js", "showMarkdown", body, ["python", "", "zorg"])
    assert python[0] == plain[0] == unknown[0] == code and python[2] == "after"
    assert python[1] >= 6 and plain[1] == 0


def test_every_prefix_of_an_answer_can_be_shown_and_the_last_is_as_if_at_once(run: Run) -> None:
    """What streaming does; blocks that did not change keep their elements."""
    source = "\n\n".join([*MARKDOWN, "$$\\frac{1}{2}$$", "```py\nx = 1\n```", "\\[x\\]", "end $a^2$."])
    body = """const grown = document.createElement("div"), whole = document.createElement("div");
    let first = null, kept = true;
    for (let end = 0; end <= given.length; end += 1) {
      showMarkdown(grown, given.slice(0, end));
      if (end > 200) { first ??= grown.firstChild; kept &&= first === grown.firstChild; }
    }
    showMarkdown(whole, given);
    return [grown.innerHTML === whole.innerHTML, kept];"""
    assert run("markdown.js", "showMarkdown", body, source) == [True, True]


def test_hostile_markdown_takes_no_long_time(run: Run) -> None:
    sources = [
        "*" * 20000,
        "[" * 20000,
        "`" * 9999 + "x",
        "> " * 5000,
        "- " * 5000,
        "$" * 9999,
        "|" * 9999 + "\n|-|",
        "**a" * 5000,
    ]
    sources += [
        "$" + "{" * 9000 + "$",
        "$" + "\\sqrt" * 4000 + "$",
        "$\\left(" * 2000,
        "<" * 20000,
        "h" * 20000,
        "\\" * 20001,
    ]
    body = """const box = document.createElement("div");
    return given.map((source) => {
      const from = performance.now();
      showMarkdown(box, source);
      return performance.now() - from;
    });"""
    times = run("markdown.js", "showMarkdown", body, sources)
    assert max(times) < 3000, dict(zip([source[:8] for source in sources], times, strict=True))


FORMULAS = {
    r"\frac{-b \pm \sqrt{b^2-4ac}}{2a}": "mfrac mrow mo mi mo msqrt mrow msup mi mn mo mn mi mi mrow mn mi",
    r"x_1^2": "msubsup mi mn mn",
    r"x^12": "msup mi mn mn",
    r"f'(x)": "msup mi mo mo mi mo",
    r"\int_0^1 x\,dx": "msubsup mo mn mn mi mspace mi mi",
    r"\lim_{n\to\infty} a_n": "munder mo mrow mi mo mi msub mi mi",
    r"\left[\frac12\right]": "mrow mo mfrac mn mn mo",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": "mrow mo mtable mtr mtd mn mtd mn mtr mtd mn mtd mn mo",
    r"\begin{cases}1&x>0\\0\end{cases}": "mrow mo mtable mtr mtd mn mtd mi mo mn mtr mtd mn",
    r"\mathbb{R}\mathbf{x}\text{ if $x$}": "mi mi mrow mtext mi mtext",
    r"\overset{!}{=} a \bmod b": "mover mo mo mi mo mi",
    r"{a \over b}": "mfrac mrow mi mrow mi",
    r"5\% \{1\}": "mn mtext mo mn mo",
    r"\binom{n}{k}\hat{x}\boxed{7}": "mrow mo mfrac mi mi mo mover mi mo mrow mn",
}
BROKEN = [
    r"\frac{1",
    r"\foo{x}",
    "x}",
    r"\begin{zorg}1\end{zorg}",
    r"\left(1",
    r"\href{javascript:x}{y}",
    "{" * 200 + "x" + "}" * 200,
]


def test_maths(run: Run) -> None:
    body = """return given.map((source) => {
      const node = maths(source, true);
      return node.localName === "math" ? [...node.querySelectorAll("*")].map((part) => part.localName).join(" ") : node;
    }).map((found) => typeof found === "string" ? found : [found.localName, found.textContent]);"""
    assert dict(zip(FORMULAS, run("tex.js", "maths", body, list(FORMULAS)), strict=True)) == FORMULAS
    for source, found in zip(BROKEN, run("tex.js", "maths", body, BROKEN), strict=True):
        assert found == ["code", source], "what cannot be read is shown as it is"


def test_conversations_from_outside_are_checked(run: Run) -> None:
    """Links that form no tree are refused; unknown fields and wrong types are dropped."""
    good = {
        "id": "abc", "title": "t", "pick": "u", "kids": ["u"], "evil": 1,
        "nodes": {
            "u": {"role": "user", "content": "q", "kids": ["a", "b"], "pick": "b"},
            "a": {"role": "assistant", "content": 7, "kids": [], "state": "streaming", "tokens": [["x", -1], ["y"], 3]},
            "b": {"role": "assistant", "content": "r", "kids": [], "state": "done", "stats": {"prompt": 3, "x": "y"}},
        },
    }  # fmt: skip
    found = run("tree.js", "checked", "return checked(given);", good)
    assert "evil" not in found and found["nodes"]["u"]["pick"] == "b"
    node = found["nodes"]["a"]
    assert node | {"content": "", "state": "interrupted", "tokens": [["x", -1, [], 0]]} == node
    assert found["nodes"]["b"]["stats"] == {"prompt": 3}
    loops = json.loads(json.dumps(good))
    loops["nodes"]["a"]["kids"] = ["u"]
    strange = json.loads(json.dumps(good))
    strange["nodes"]["a"]["role"] = "system"
    for bad in [loops, strange, {}, None, {"nodes": {}, "kids": ["x"]}, {"nodes": {}, "kids": 3}]:
        body = "try { checked(given); return 'taken'; } catch (error) { return 'refused'; }"
        assert run("tree.js", "checked", body, bad) == "refused", bad


def test_what_cannot_be_drawn_is_mended(run: Run) -> None:
    """Times that no Date holds, kinds of errors without a text, probabilities without alternatives, counts below 0."""
    raw = {
        "created": 1e300, "updated": -8.7e15, "kids": ["a"],
        "nodes": {
            "a": {
                "role": "assistant", "kids": [], "created": 1e300, "state": "error", "error": {"kind": "foo"},
                "tokens": [["a", -1], ["b", 1e300, [["c", 2], 5, ["d"], ["e", -2]], True]],
                "stats": {"budget": -1, "completion": 3, "forced": True},
            },
        },
    }  # fmt: skip
    found = run("tree.js", "checked", "return checked(given);", raw)
    [drawn] = run("i18n.js", "day", "return given.map(day);", [found["updated"]])
    node = found["nodes"]["a"]
    assert drawn and abs(found["created"]) <= 8.64e15 and node["created"] == 0
    assert node["error"] == {"kind": "server", "message": ""} and node["stats"] == {"completion": 3, "forced": True}
    assert node["tokens"] == [["a", -1, [], 0], ["b", 0, [["c", 0], ["e", -2]], 1]]
    kept = {**raw, "updated": 8.64e15, "nodes": {"a": {**raw["nodes"]["a"], "error": {"kind": "busy", "message": "m"}}}}
    found = run("tree.js", "checked", "return checked(given);", kept)
    assert found["updated"] == 8.64e15 and found["nodes"]["a"]["error"] == {"kind": "busy", "message": "m"}


def test_every_kind_of_error_has_a_text(run: Run) -> None:
    kinds = run("tree.js", "ERRORS", "return ERRORS;")
    named = re.findall(r'ApiError\("(\w+)"|: "([a-z]+)"', (WEB / "api.js").read_text(encoding="utf-8"))
    assert {name for names in named for name in names if name} <= set(kinds)
    texts = run("i18n.js", "t", "return given.map((kind) => t(`error_${kind}`));", kinds)
    assert len(set(texts)) == len(kinds)


def test_both_languages_have_every_text() -> None:
    """Each entry has two texts with the same names to fill in, and every text that is asked for exists."""
    source = (WEB / "strings.js").read_text(encoding="utf-8")
    entries = re.findall(r'^  (\w+): \[\s*("(?:[^"\\]|\\.)*"),\s*("(?:[^"\\]|\\.)*"),?\s*\],$', source, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^  \w+: \[", source, re.MULTILINE)) > 100
    for key, english, chinese in entries:
        assert set(re.findall(r"{(\w+)}", english)) == set(re.findall(r"{(\w+)}", chinese)), key
    code = "\n".join(path.read_text(encoding="utf-8") for path in WEB.glob("*.js"))
    asked = set(re.findall(r"""\bt\((?:\w+ \? )?"(\w+)\"""", code))
    assert asked <= {key for key, _, _ in entries}


# Ways to make markup, code or styles from text.
FROM_TEXT = r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(\"style"


def test_the_page_needs_no_one_else_and_no_inline_code() -> None:
    html = (WEB / "index.html").read_text(encoding="utf-8")
    assert "default-src 'self'" in html and "require-trusted-types-for 'script'" in html
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", html)
    for path in WEB.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(\"style", text
        ), path
        assert len(text.splitlines()) <= 500, path
        assert not re.search(r"(?:from|import|url|src|href)\W{0,3}[\"'(]https?://(?!www\.w3\.org)", text), path
