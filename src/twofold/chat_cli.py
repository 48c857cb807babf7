"""``twofold chat``: talk to a finished model in the terminal, thinking shown apart from the answer as it is made.

One conversation, kept as messages and rendered by the one renderer, streamed by the one engine and read by the one
parser; ``/think`` and ``/no_think`` are plain text that the model follows. Works with piped lines as well. Not here:
anything that decides what a reply says, how lines are read and shown (``chat_view.py``), and the web page.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from twofold.base.config import parse_value
from twofold.base.records import InputError, Message, SamplingParams
from twofold.chat_view import Input, ReplyView, printable
from twofold.engine.engine import EngineOptions
from twofold.episodes.play import MAX_TURNS
from twofold.llm import LLM
from twofold.model.hf_config import read_about
from twofold.recipes.models import find_model
from twofold.tasks.tools import Calc, ToolTask
from twofold.text.parse import Parsed, ParseOptions, StreamParser

FIELDS = tuple(SamplingParams.__dataclass_fields__)
TOOLS: dict[str, ToolTask] = {"calc": Calc()}
HELP = """\
/budget N     stop thinking after N tokens; /budget off lifts the limit
/thoughts     show the thought of the last reply; /thoughts fold and /thoughts show say how the next ones come
/set KEY=VALUE  sampling: temperature, top_p, top_k, max_tokens, stop, ...; /set shows what is set
/reset        forget the conversation; the system prompt stays
/system TEXT  set the system prompt; without TEXT there is none
/help         this list
/quit         leave (so does Ctrl-D); Ctrl-C stops a reply
A line that ends in \\ goes on in the next one; \"\"\" begins and ends a text of several lines.
/think or /no_think inside a message ask the model for that mode"""
NO_NOTE = "Nothing is on record about what this model can do. Small models answer what they were trained on, no more."


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
            parts.append("cut off: max_tokens or the context is used up")
        return " · ".join([*parts, *dict.fromkeys(self.parsed.errors)])


class Chat:
    """A conversation with one model.

    Args:
        sampling: fields of ``SamplingParams``; what is not given comes from the checkpoint. Reply number i of the chat
            uses seed ``seed + i``. thinking: False pre-fills the empty think block (the hard switch).
            tools: offered to the model and run here, or None. fold: show thoughts as one line.
    """

    def __init__(
        self,
        policy: LLM,
        console: Console,
        sampling: Mapping[str, Any],
        thinking: bool = True,
        system: str | None = None,
        tools: ToolTask | None = None,
        fold: bool = False,
    ) -> None:
        self.policy, self.console = policy, console
        self.renderer = policy.renderer  # a model without a chat format is refused before the first line is read
        self.thinking, self.tools, self.fold = thinking, tools, fold
        self.sampling: dict[str, Any] = {}
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.replies = 0
        self.thought = ""
        self.view = ReplyView(console)
        self.configure(sampling)

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change sampling parameters; None takes one back. What cannot be kept is refused before it is used.

        Raises:
            InputError: an unknown parameter, or a value that the model cannot honour.
        """
        wanted = {name: value for name, value in {**self.sampling, **changes}.items() if value is not None}
        request = self.policy.request([0], wanted, thinking=self.thinking)
        if request.params.n != 1:
            raise InputError(f"a chat has one reply, n = {request.params.n} asks for more")
        self.sampling = wanted

    def run(self, lines: Input) -> None:
        """Read until the end of input or /quit."""
        while True:
            try:
                text = lines.read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not lines.interactive:
                    raise
                self.say("\nCtrl-D or /quit leaves")
                continue
            if not text.strip():
                continue
            try:
                if is_command(text):
                    if text.split()[0] == "/quit":
                        return
                    self.say(self.command(text))
                else:
                    self.respond(text)
            except KeyboardInterrupt:
                self.view.end()
                self.say("stopped; this exchange is not kept")
            except InputError as error:
                self.view.end()
                self.say(f"error: {error}", "bold red")

    def command(self, line: str) -> str:
        """Carry out a slash command; returns what there is to say.

        Raises:
            InputError: an unknown command or a value that it does not take.
        """
        name, value = [*line.strip().split(maxsplit=1), ""][:2]
        actions = {
            "/help": lambda _: HELP,
            "/reset": self._reset,
            "/system": self._system,
            "/budget": self._budget,
            "/thoughts": self._thoughts,
            "/set": self._set,
        }
        if name not in actions:
            raise InputError(f"unknown command {name}; /help lists them")
        return actions[name](value)

    def respond(self, text: str) -> None:
        """Add a user turn and stream the reply, running tools as often as an episode may; kept only when whole."""
        renderer, asked = self.renderer, [*self.messages, Message("user", text)]
        ids = renderer.prompt_ids(asked, self.tools.tools if self.tools else None, thinking=self.thinking)
        self.thought = ""
        for turn in range(1, MAX_TURNS + 1):
            reply = self.stream(ids)
            self.say(reply.footer())
            parsed = reply.parsed
            self.thought += parsed.reasoning or ""
            if not parsed.tool_calls or not parsed.complete or self.tools is None or turn == MAX_TURNS:
                if parsed.tool_calls:
                    self.say("the call was not run: " + ("start with --tools calc" if not self.tools else "too many"))
                asked.append(Message("assistant", parsed.content, parsed.reasoning))
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
        limit = self.policy.model.config.longest
        if len(prompt_ids) >= limit:
            raise InputError.overflow("the conversation", len(prompt_ids), limit, "/reset begins a new one")
        sampling = {**self.sampling, "seed": self.sampling.get("seed", 0) + self.replies}
        request = self.policy.request(prompt_ids, sampling, thinking=self.thinking)
        self.replies += 1
        self.view = view = ReplyView(self.console, self.fold)
        options = ParseOptions(stop=request.params.stop, tools=self.tools.tools if self.tools else None)
        parser = StreamParser(self.policy.tokenizer, prompt_ids, options)
        token_ids: list[int] = []
        thinking, any_forced, started = 0, False, time.perf_counter()
        with closing(self.policy.engine.stream(request)) as tokens:
            for token, forced in tokens:
                inside = parser.in_think
                for delta in parser.feed(token):
                    view.show(delta)
                thinking += inside and parser.in_think and not forced
                any_forced |= forced
                token_ids.append(token)
                if parser.state == "done":  # by a stop string; after an end token nothing more comes
                    break
        seconds = time.perf_counter() - started
        for delta in parser.end():
            view.show(delta)
        view.end()
        return Reply(token_ids, parser.finish(), thinking, any_forced, seconds)

    def say(self, text: str, style: str = "dim") -> None:
        """A line of the program's own."""
        self.console.print(Text(printable(text), style=style), soft_wrap=True)

    def _reset(self, _: str) -> str:
        self.messages = [m for m in self.messages[:1] if m.role == "system"]
        return "a new conversation"

    def _system(self, value: str) -> str:
        rest = self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages
        self.messages = [Message("system", value), *rest] if value else rest
        return "system prompt set" if value else "no system prompt"

    def _budget(self, value: str) -> str:
        if value != "off" and not value.isdecimal():
            raise InputError(f"/budget takes a number of tokens or off, got {value!r}")
        self.configure({"thinking_budget": None if value == "off" else int(value)})
        return f"thinking budget: {value}"

    def _thoughts(self, value: str) -> str:
        if value not in ("", "fold", "show"):
            raise InputError(f"/thoughts takes fold, show or nothing, got {value!r}")
        if value:
            self.fold = value == "fold"
            return "thoughts are folded" if self.fold else "thoughts are shown"
        return self.thought.strip("\n") or "there was no thought"

    def _set(self, value: str) -> str:
        if value:
            self.configure(sampling_from([value]))
        return ", ".join(f"{name}={shown!r}" for name, shown in self.sampling.items()) or "nothing is set"


def chat(
    folder: Path,
    sampling: Mapping[str, Any],
    thinking: bool = True,
    system: str | None = None,
    tools: str | None = None,
    fold: bool = False,
    loading: Mapping[str, Any] | None = None,
    history: bool = True,
) -> None:
    """Find the model, say what it can do, and talk until the input ends.

    Args:
        folder: a model or run folder, or a .gguf file. sampling, thinking, system, fold: see ``Chat``. tools: name of
            a tool, or None. loading: further arguments of ``LLM``. history: keep lines in the user's state folder.

    Raises:
        InputError: no model there, or none that can chat; an unknown tool, or a parameter that the model cannot honour.
    """
    if tools is not None and tools not in TOOLS:
        raise InputError(f"unknown tool {tools!r}; there is: {', '.join(TOOLS)}")
    console = Console(highlight=False)
    model_folder = find_model(folder)
    policy = LLM(model_folder, max_rows=1, options=EngineOptions(entropies=False), **(loading or {}))
    session = Chat(policy, console, sampling, thinking, system, TOOLS[tools] if tools else None, fold)
    size = policy.model.config.num_parameters()
    console.print(Text(f"{model_folder}, {size:,} parameters", style="bold"), soft_wrap=True)
    for line in note(model_folder):
        session.say(line, "")
    session.say("/help lists commands, Ctrl-D leaves")
    with closing(Input(console, history)) as lines:
        session.run(lines)


def sampling_from(assignments: list[str]) -> dict[str, Any]:
    """Sampling parameters from ``KEY=VALUE`` strings; values are JSON, or text where they are not.

    Raises:
        InputError: no such parameter, or no value.
    """
    sampling: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or name not in FIELDS:
            raise InputError(f"sampling is set as KEY=VALUE, got {assignment!r}; there are {', '.join(FIELDS)}")
        value = parse_value(text)
        if name == "stop" and value is not None and not isinstance(value, list):  # text, whatever it looks like
            value = [value if isinstance(value, str) else text]
        sampling[name] = tuple(value) if isinstance(value, list) else value
    return sampling


def note(folder: Path) -> list[str]:
    """What the model can and cannot do, from ``about.json`` of its folder: {"can": [...], "cannot": "..."}."""
    try:
        about = read_about(folder)
    except InputError as error:
        return [NO_NOTE, f"({error})"]
    if about is None:
        return [NO_NOTE]
    return ["It can answer, for example:", *(f"  {line}" for line in about["can"]), f"It cannot: {about['cannot']}"]


def is_command(line: str) -> bool:
    """Lines that begin with a slash, except those that begin with a soft switch."""
    word = line.split()[0]
    return word.startswith("/") and word not in ("/think", "/no_think")
