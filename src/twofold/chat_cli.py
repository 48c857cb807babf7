"""``twofold chat``: talk to a finished model in the terminal, thinking shown apart from the answer as it is made.

One conversation, kept as messages and rendered by the one renderer, streamed by the one engine and read by the one
parser; ``/think`` and ``/no_think`` are plain text that the model follows. Works with piped lines as well. Not here:
anything that decides what a reply says, and the web page.
"""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from twofold.base.files import read_json
from twofold.base.records import InputError, Message, Request, SamplingParams, ToolCall
from twofold.episodes.play import MAX_TURNS
from twofold.llm import LLM
from twofold.recipes.post import find_model
from twofold.tasks.tools import Calc, ToolTask
from twofold.text.parse import Delta, Parsed, StreamParser

with suppress(ImportError):
    import readline  # noqa: F401 gives input() a history and line editing

TOOLS: dict[str, ToolTask] = {"calc": Calc()}
PROMPT = "you> "
HELP = """\
/budget N   stop thinking after N tokens; /budget off lifts the limit
/reset      forget the conversation; the system prompt stays
/system TEXT  set the system prompt; without TEXT there is none
/help       this list
/quit       leave (so does Ctrl-D); Ctrl-C stops a reply
/think or /no_think inside a message ask the model for that mode"""
NO_NOTE = "Nothing is on record about what this model can do. Small models answer what they were trained on, no more."

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a reply must not steer the terminal


@dataclass(frozen=True)
class Reply:
    """One streamed assistant turn: its tokens, what they mean, and how it went."""

    token_ids: list[int]
    parsed: Parsed
    thinking_tokens: int
    forced: bool
    seconds: float

    def footer(self) -> str:
        """Counts, speed, and anything out of the ordinary, as one line."""
        count = len(self.token_ids)
        parts = [f"{count} tokens, {self.thinking_tokens} thinking", f"{count / max(self.seconds, 1e-9):.0f} tok/s"]
        if self.forced:
            parts.append("budget spent, the stop text was forced")
        if not self.parsed.complete:
            parts.append("cut off: --max-tokens or the context is used up")
        return " · ".join([*parts, *dict.fromkeys(self.parsed.errors)])


class ReplyView:
    """Prints the deltas of one reply: thoughts dim and italic under a rule, the answer plain, calls in colour."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.kind = ""
        self.line_open = False

    def show(self, delta: Delta) -> None:
        """Print one increment."""
        if delta.kind != self.kind:
            self.end_line()
            if delta.kind == "reasoning":
                self.console.print(Rule(Text("thinking", "dim"), style="dim", align="left"))
            elif self.kind == "reasoning":
                self.console.print(Rule(style="dim"))
            self.kind = delta.kind
        if delta.call is not None:
            self.console.print(Text(f"calls {call_text(delta.call)}", style="cyan"), soft_wrap=True)
            return
        text = _UNPRINTABLE.sub("\ufffd", delta.text)
        style = "dim italic" if delta.kind == "reasoning" else ""
        self.console.print(Text(text, style=style), end="", soft_wrap=True)
        self.line_open = not text.endswith("\n")

    def end_line(self) -> None:
        """Go to the start of a line."""
        if self.line_open:
            self.console.print()
        self.line_open = False


class Chat:
    """A conversation with one model.

    Args:
        params: sampling; reply number i of the chat uses seed ``params.seed + i``. thinking: False pre-fills the empty
            think block (the hard switch). tools: offered to the model and run here, or None.
    """

    def __init__(
        self,
        policy: LLM,
        console: Console,
        params: SamplingParams,
        thinking: bool = True,
        system: str | None = None,
        tools: ToolTask | None = None,
    ) -> None:
        self.policy, self.console, self.params = policy, console, params
        self.thinking, self.tools = thinking, tools
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.replies = 0
        self.view = ReplyView(console)
        policy.engine.check(0, Request((0,), params))  # a budget that cannot be kept is refused before the first turn

    def run(self) -> None:
        """Read lines until the end of input or /quit."""
        while True:
            try:
                line = read_line(self.console)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                self.say("\nCtrl-D or /quit leaves")
                continue
            if not line.strip():
                continue
            try:
                if is_command(line):
                    if line.split()[0] == "/quit":
                        return
                    self.say(self.command(line))
                else:
                    self.respond(line)
            except KeyboardInterrupt:
                self.view.end_line()
                self.say("stopped; this exchange is not kept")
            except InputError as error:
                self.view.end_line()
                self.say(f"error: {error}", "bold red")

    def command(self, line: str) -> str:
        """Carry out a slash command; returns what there is to say.

        Raises:
            InputError: an unknown command or a value that it does not take.
        """
        name, value = [*line.strip().split(maxsplit=1), ""][:2]
        if name == "/help":
            return HELP
        if name == "/reset":
            self.messages = [m for m in self.messages[:1] if m.role == "system"]
            return "a new conversation"
        if name == "/system":
            rest = self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages
            self.messages = [Message("system", value), *rest] if value else rest
            return "system prompt set" if value else "no system prompt"
        if name == "/budget":
            if value != "off" and not value.isdecimal():
                raise InputError(f"/budget takes a number of tokens or off, got {value!r}")
            params = replace(self.params, thinking_budget=None if value == "off" else int(value))
            self.policy.engine.check(0, Request((0,), params))
            self.params = params
            return f"thinking budget: {value}"
        raise InputError(f"unknown command {name}; /help lists them")

    def respond(self, text: str) -> None:
        """Add a user turn and stream the reply, running tools as often as an episode may; kept only when whole."""
        renderer, asked = self.policy.renderer, [*self.messages, Message("user", text)]
        ids = renderer.prompt_ids(asked, self.tools.tools if self.tools else None, thinking=self.thinking)
        for turn in range(1, MAX_TURNS + 1):
            reply = self.stream(ids)
            self.say(reply.footer())
            parsed = reply.parsed
            if not parsed.tool_calls or not parsed.complete or self.tools is None or turn == MAX_TURNS:
                if parsed.tool_calls:
                    self.say("the call was not run: " + ("start with --tools calc" if not self.tools else "too many"))
                asked.append(replace(parsed.message(), tool_calls=()))
                break
            results = [self.tools.execute(call) for call in parsed.tool_calls]
            for result in results:
                self.console.print(Text(f"result {result}", style="cyan"), soft_wrap=True)
            ids = ids + reply.token_ids + renderer.tool_result_ids(results, thinking=self.thinking)
            asked += [parsed.message(), *(Message("tool", result) for result in results)]
        self.messages = asked

    def stream(self, prompt_ids: list[int]) -> Reply:
        """Sample one assistant turn and show it as it comes.

        Raises:
            InputError: the conversation fills the model's context.
        """
        limit = self.policy.model.config.max_position_embeddings
        room = limit - len(prompt_ids)
        if room < 1:
            raise InputError(
                f"the conversation has {len(prompt_ids)} tokens, the model's context {limit}; /reset begins a new one"
            )
        seed = self.params.seed + self.replies
        params = replace(self.params, max_tokens=min(self.params.max_tokens, room), seed=seed)
        self.replies += 1
        self.view = view = ReplyView(self.console)
        parser = StreamParser(self.policy.tokenizer, prompt_ids)
        token_ids: list[int] = []
        thinking, any_forced, started = 0, False, time.perf_counter()
        for token, forced in self.policy.engine.stream(Request(tuple(prompt_ids), params, parser.in_think)):
            inside = parser.in_think
            for delta in parser.feed(token):
                view.show(delta)
            thinking += inside and parser.in_think and not forced
            any_forced |= forced
            token_ids.append(token)
        seconds = time.perf_counter() - started
        for delta in parser.end():
            view.show(delta)
        view.end_line()
        return Reply(token_ids, parser.finish(), thinking, any_forced, seconds)

    def say(self, text: str, style: str = "dim") -> None:
        """A line of the program's own."""
        self.console.print(Text(_UNPRINTABLE.sub("\ufffd", text), style=style), soft_wrap=True)


def chat(folder: Path, params: SamplingParams, thinking: bool, system: str | None, tools: str | None) -> None:
    """Find the model, say what it can do, and talk until the input ends.

    Raises:
        InputError: no model there, an unknown tool, or a budget that the model cannot keep.
    """
    if tools is not None and tools not in TOOLS:
        raise InputError(f"unknown tool {tools!r}; there is: {', '.join(TOOLS)}")
    console = Console(highlight=False)
    model_folder = find_model(folder)
    policy = LLM(model_folder, max_rows=1)
    session = Chat(policy, console, params, thinking, system, TOOLS[tools] if tools else None)
    size = policy.model.config.num_parameters()
    console.print(Text(f"{model_folder}, {size:,} parameters", style="bold"), soft_wrap=True)
    for line in note(model_folder):
        session.say(line, "")
    session.say("/help lists commands, Ctrl-D leaves")
    session.run()


def note(folder: Path) -> list[str]:
    """What the model can and cannot do, from ``about.json`` of its folder: {"can": [...], "cannot": "..."}."""
    path = folder / "about.json"
    if not path.is_file():
        return [NO_NOTE]
    try:
        about = read_json(path)
        can, cannot = [str(line) for line in about["can"]], str(about["cannot"])
    except (ValueError, KeyError, TypeError):
        return [NO_NOTE, f"({path} is damaged)"]
    return ["It can answer, for example:", *(f"  {line}" for line in can), f"It cannot: {cannot}"]


def is_command(line: str) -> bool:
    """Lines that begin with a slash, except those that begin with a soft switch."""
    word = line.split()[0]
    return word.startswith("/") and word not in ("/think", "/no_think")


def read_line(console: Console) -> str:
    """The next line typed or piped in; a piped line is shown, so that the output reads as a conversation.

    Raises:
        EOFError: there is no more. InputError: the input is not UTF-8.
    """
    try:
        if sys.stdin.isatty():
            return input(PROMPT)
        line = input()
    except UnicodeDecodeError as error:
        raise InputError(f"the input is not UTF-8 text ({error.reason}); convert it first") from None
    if line.strip():
        console.print(Text(PROMPT + _UNPRINTABLE.sub("\ufffd", line), style="bold"), soft_wrap=True)
    return line


def call_text(call: ToolCall) -> str:
    """A call as people write one; JSON escapes keep it printable whatever the model put there."""
    arguments = ", ".join(f"{json.dumps(k)[1:-1]}={json.dumps(v)}" for k, v in call.arguments.items())
    return f"{json.dumps(call.name)[1:-1]}({arguments})"
