"""Training data as it will be trained, token by token, for the eye: in the terminal and as one HTML page.

Colour says whose turn a token belongs to, strength says its loss weight, and every token shows where it ends. The input
is what the renderer made, so nothing is tokenised or masked a second time here. Not here: the renderer (``chat.py``),
formats of data files (``formats.py``), and the command line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path

from rich.console import Group
from rich.rule import Rule
from rich.text import Text

from twofold.base.records import InputError
from twofold.text.chat import Rendered, Renderer
from twofold.text.rows import read_views
from twofold.text.tokenizer import Tokenizer

_COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", "text": "white"}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fbfbfa; --line: #d8d8d4; --muted: #62666d;
  --system: #8a3ea8; --user: #0b6e99; --assistant: #1d7a46; --tool: #9a6700; --text: #4b5563; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --paper: #17181a; --line: #3a3c40; --muted: #a0a4ab;
  --system: #d39be8; --user: #6cc5ec; --assistant: #6fd39a; --tool: #e6b450; --text: #b6bcc6; } }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 2rem 0 .3rem; } p { margin: .3rem 0; color: var(--muted); }
pre { margin: .4rem 0 1rem; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.75 ui-monospace, monospace; }
b { font-weight: 400; padding: .12em 0; border-right: 1px solid var(--line); color: var(--c);
  opacity: calc(.55 + .45 * min(var(--w), 1));
  background: color-mix(in srgb, var(--c) calc(26% * min(var(--w), 1)), transparent); }
b.reasoning, b.empty_think { font-style: italic; } b.header, b.eot { text-decoration: underline dotted; }
b i { color: var(--muted); font-style: normal; }
.system { --c: var(--system); } .user { --c: var(--user); } .assistant { --c: var(--assistant); }
.tool { --c: var(--tool); } .text { --c: var(--text); }
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of data: where it stands, and the views that it will be trained as."""

    title: str
    views: tuple[Rendered, ...]


def view_file(path: Path, renderer: Renderer, limit: int = 20, *, empty_think_trained: bool = False) -> list[Sample]:
    """Render the first ``limit`` rows of a file of conversations or texts as training does.

    Args:
        path: JSON Lines, or one JSON array; rows in any format of ``read_example``.
        empty_think_trained: as in ``Renderer.views``.

    Raises:
        InputError: naming the file and line (or index), and what is wrong there; also for a file without rows.
    """
    if limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    samples = list(islice(_samples(Path(path), renderer, empty_think_trained), limit))
    if not samples:
        raise InputError(f"{path} has no rows; give JSON Lines or a JSON array of conversations")
    return samples


def terminal_view(samples: Sequence[Sample], tokenizer: Tokenizer) -> Group:
    """The samples for a terminal: bold and underlined is trained, dim is not; the legend comes first."""
    rows: list[Rule | Text] = [_terminal_legend()]
    for sample in samples:
        for number, rendered in enumerate(sample.views, start=1):
            rows.append(Rule(Text(_heading(sample, number)), align="left", style="dim"))
            rows += [Text(_summary(rendered), style="dim"), _terminal_tokens(rendered, tokenizer), Text()]
        if not sample.views:
            rows.append(Text(f"{sample.title}: nothing to train", style="dim"))
    return Group(*rows)


def html_view(samples: Sequence[Sample], tokenizer: Tokenizer, title: str = "Training data") -> str:
    """One self-contained page: no script, no network, light and dark; each token's tooltip has its id and weight."""
    body = []
    for sample in samples:
        for number, rendered in enumerate(sample.views, start=1):
            tokens = "".join(_html_token(*token) for token in _tokens(rendered, tokenizer))
            body.append(f"<h2>{escape(_heading(sample, number))}</h2><p>{escape(_summary(rendered))}</p>")
            body.append(f"<pre>{tokens}</pre>")
        if not sample.views:
            body.append(f"<h2>{escape(sample.title)}</h2><p>nothing to train</p>")
    legend = " ".join(f'<b class="{role}" style="--w:1">{role}</b>' for role in _COLOURS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title><style>{_CSS}</style></head>
<body><h1>{escape(title)}</h1>
<p>{legend} · <b class="assistant" style="--w:1">weight 1</b> <b class="assistant" style="--w:.5">weight 0.5</b>
<b class="assistant" style="--w:0">weight 0, not trained</b> · <b class="assistant reasoning" style="--w:1">thinking</b>
· a thin line ends each token; point at one for its id</p>
{"".join(body)}
</body></html>
"""


def _samples(path: Path, renderer: Renderer, empty_think_trained: bool) -> Iterator[Sample]:
    for place, views in read_views(path, renderer, empty_think_trained=empty_think_trained):
        if isinstance(views, InputError):
            raise InputError(f"{path}{place}: {views}")
        yield Sample(f"{path.name}{place}", views)


def _tokens(rendered: Rendered, tokenizer: Tokenizer) -> Iterator[tuple[int, str, str, str, float]]:
    """(id, what it looks like, role, part, weight) of every token."""
    rows = zip(rendered.token_ids, rendered.roles, rendered.parts, rendered.weights, strict=True)
    for token, role, part, weight in rows:
        yield token, _visible(token, tokenizer), role, part, weight


def _visible(token: int, tokenizer: Tokenizer) -> str:
    """A token's text with line breaks marked; bytes of half a character and control characters as hexadecimal."""
    text = tokenizer.token_text(token)
    if text is None:
        return "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token))
    text = _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)
    return text.replace("\n", "↵\n").replace("\t", "→\t")


def _heading(sample: Sample, number: int) -> str:
    return f"{sample.title}, view {number} of {len(sample.views)}" if len(sample.views) > 1 else sample.title


def _summary(rendered: Rendered) -> str:
    trained = Counter(
        part for part, weight in zip(rendered.parts, rendered.weights, strict=True) if weight > 0
    ).most_common()
    parts = ", ".join(f"{count} {part}" for part, count in trained) or "none"
    total = sum(rendered.weights)
    return f"{len(rendered.token_ids)} tokens; trained: {parts}; weight in all {total:g}"


def _terminal_legend() -> Text:
    legend = Text("whose turn: ")
    for role, colour in _COLOURS.items():
        legend.append(f"{role} ", style=colour)
    legend.append("· ").append("trained", style="bold green underline").append(" · ")
    legend.append("partly", style="green underline").append(" · ")
    return legend.append("not trained", style="dim green").append(" · ").append("thinking", style="italic green")


def _terminal_tokens(rendered: Rendered, tokenizer: Tokenizer) -> Text:
    line = Text(overflow="fold")
    for _, text, role, part, weight in _tokens(rendered, tokenizer):
        strength = "dim" if weight <= 0 else "underline" if weight < 1 else "bold underline"
        slant = "italic " if part in ("reasoning", "empty_think") else ""
        line.append(text, style=f"{slant}{strength} {_COLOURS.get(role, 'white')}")
        line.append("" if text.endswith("\n") else "·", style="dim")
    return line


def _html_token(token: int, text: str, role: str, part: str, weight: float) -> str:
    shown = escape(text).replace("↵", "<i>↵</i>").replace("→\t", "<i>→</i>\t")
    tip = escape(f"id {token} · {role} · {part} · weight {weight:g}")
    return f'<b class="{escape(role)} {escape(part)}" style="--w:{weight:g}" title="{tip}">{shown}</b>'
