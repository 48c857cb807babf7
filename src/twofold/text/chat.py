"""The one renderer: messages to token ids, per-token loss weights and labels, in the chat format of a checkpoint.

Training, rollouts, evaluation and serving all render here, and the text equals the official template of the family.
Structure is written by the renderer and may be control tokens; everything that came from outside is data and
cannot forge structure. Not here: the format itself (``pieces.py``), reading what a model sampled (``parse.py``),
reading chat files (``messages.py``, ``formats.py``).
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from twofold.base.files import readable
from twofold.base.gguf_file import is_gguf, read_metadata
from twofold.base.records import InputError, Message
from twofold.text.families import BY_HAND, grade, template_difference
from twofold.text.gguf_tokenizer import gguf_template, tokenizer_from_gguf
from twofold.text.messages import (
    Tools,
    TurnWeights,
    Weights,
    last_flag,
    messages_from_openai,
    messages_to_openai,
    turn_weights,
    validate_messages,
    validate_tools,
)
from twofold.text.pieces import Piece, check_fits, conversation, generation_prompt, text_of, tool_results, view
from twofold.text.policy import FAMILIES, STOP_TEXT, ChatPolicy, read_chat_policy, template_hash, write_chat_policy
from twofold.text.roles import read_settings
from twofold.text.tokenizer import Tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "FAMILIES",
    "STOP_TEXT",
    "ChatPolicy",
    "Rendered",
    "Renderer",
    "TurnWeights",
    "last_flag",
    "messages_from_openai",
    "messages_to_openai",
]

CHAT_TEMPLATE: str = resources.files("twofold.text").joinpath("chat_template.jinja").read_text(encoding="utf-8")

Conversation = Sequence[Message] | Sequence[Mapping[str, Any]]
_Seen = dict[str, tuple[list[int], list[int]]]


@dataclass(slots=True)
class Rendered:
    """A rendered conversation; the four lists run in step, one entry a token.

    weights: loss weight of predicting the token. roles: whose turn ("system", "user", "assistant", "tool").
    parts: "header" (role names, newlines between turns), "reasoning", "empty_think", "content", "call", "eot"
    (``<|im_end|>``), "text" (system, user and tool content). ``text`` is the whole string that was encoded.
    """

    token_ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    text: str = ""


class Renderer:
    """Messages to tokens for one tokenizer and one policy.

    Messages are ``Message`` records or dictionaries in OpenAI's form, everywhere.
    """

    def __init__(self, tokenizer: Tokenizer, policy: ChatPolicy | None = None, differs: Sequence[str] = ()) -> None:
        """Raises InputError when the tokenizer has no chat tokens.

        Args:
            tokenizer: the checkpoint's. policy: its chat format; Qwen3's unless given. differs: names of what the
                checkpoint's own template renders otherwise.
        """
        for token in ("<|im_start|>", "<|im_end|>"):
            if tokenizer.control_id(token) is None:
                raise InputError(f"the tokenizer has no control token {token}; chats need a Qwen-style tokenizer")
        self.tokenizer = tokenizer
        self.policy = policy or ChatPolicy()
        self.differs = tuple(differs)
        self._fixed: _Seen = {}

    @classmethod
    def from_parts(cls, tokenizer: Tokenizer, template: str | None, policy: ChatPolicy | None = None) -> Renderer:
        """A renderer for a checkpoint's tokenizer and template (as a GGUF file carries them).

        Args:
            tokenizer: the checkpoint's.
            template: its Jinja chat template; its family is found by rendering probes.
            policy: overrides what the template says.

        Raises:
            InputError: the template is none of the families and no policy is given.
        """
        if policy is None and template is None:
            raise InputError(
                f"the checkpoint has no chat template; choose a family: {BY_HAND} with one of {', '.join(FAMILIES)}"
            )
        chosen = cls(tokenizer, policy)  # a tokenizer that cannot chat is the first thing to say
        if policy is not None:
            return chosen
        end = tokenizer.role_id("eos")
        found = grade(template or "", tokenizer.bos, None if end is None else tokenizer.token_text(end))
        found.warn()
        return cls(tokenizer, found.policy, found.differs)

    @classmethod
    def from_pretrained(cls, folder: str | Path, policy: ChatPolicy | None = None) -> Renderer:
        """The renderer of a .gguf file or a model folder: its tokenizer, template, and ``chat_policy.json`` if there.

        The policy file decides where it exists. If the folder's template is not the one the checkpoint was trained
        with, a warning shows the difference and rendering follows the trained one.

        Raises:
            InputError: a file is missing or damaged, or the template is none of the families.
        """
        folder = Path(folder)
        if is_gguf(folder):
            metadata = read_metadata(folder)
            tokenizer = tokenizer_from_gguf(metadata, str(folder))
            return cls.from_parts(tokenizer, gguf_template(metadata, str(folder)), policy)
        tokenizer = Tokenizer.from_folder(folder)
        saved = read_chat_policy(folder)
        found = folder_template(folder)
        if policy is not None or saved is None:
            return cls.from_parts(tokenizer, found, policy)
        trained_policy, trained = saved
        if found is not None and template_hash(found) != template_hash(trained):
            warnings.warn(
                f"the chat template in {folder} is not the one this model was trained with; rendering follows the "
                "trained one (delete chat_policy.json to follow the folder's):\n" + template_difference(trained, found),
                stacklevel=2,
            )
        return cls(tokenizer, trained_policy)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, the chat template and ``chat_policy.json`` into a model folder."""
        self.tokenizer.save(Path(folder), self.chat_template)
        write_chat_policy(folder, self.policy)

    def render(
        self,
        messages: Conversation,
        tools: Tools | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = False,
        *,
        empty_think_trained: bool = False,
        weights: Weights | None = None,
    ) -> Rendered:
        """Render a whole conversation once, as the official template does.

        Weight 1 goes to what the assistant writes: thinking with its tags, content, calls and one ``<|im_end|>``.
        In families with think blocks, turns rendered without a block (stripped history) never look like that when
        they are sampled, so they have weight 0; train those through ``views``. An empty block counts as supplied by
        the template (weight ``policy.empty_think_weight``) unless ``empty_think_trained``. Families without think
        blocks show no reasoning, as their templates do.

        Args:
            messages: the conversation; reasoning and content are data, whatever they spell.
            tools: JSON-able tool descriptions, dumped as given.
            thinking: False appends the closed empty think block to the generation prompt (the hard switch).
            add_generation_prompt: end with the header of a new assistant turn.
            empty_think_trained: the model itself is to write empty blocks (``/no_think`` training).
            weights: message index to its loss weight, or to ``TurnWeights`` by part; 1 where nothing is said.

        Raises:
            InputError: naming the message index and field, or the tool.
        """
        checked = self._checked(messages, tools)
        spread = turn_weights(checked, weights)
        pieces = conversation(self.policy, checked, tools, spread, self._empty_weight(empty_think_trained))
        if add_generation_prompt:
            pieces += generation_prompt(self.policy, thinking)
        return self._encode(pieces, {})

    def views(
        self,
        messages: Conversation,
        tools: Tools | None = None,
        *,
        empty_think_trained: bool = False,
        weights: Weights | None = None,
    ) -> list[Rendered]:
        """One training example per trained assistant turn: the prompt as it will be served, then the turn.

        The prompt part equals ``prompt_ids(messages before the turn)`` and has weight 0; each view ends with
        ``<|im_end|>``. A turn without reasoning is a non-thinking sample (block in the prompt), or, with
        ``empty_think_trained``, a thinking-mode sample whose empty block the model writes. Turns whose ``weights``
        are 0 have no view.

        Raises:
            InputError: as ``render``; also for reasoning in a family that has no think block to train.
        """
        checked = self._checked(messages, tools)
        spread = turn_weights(checked, weights)
        empty_weight = self._empty_weight(empty_think_trained)
        views: list[Rendered] = []
        seen: _Seen = {}
        for index, message in enumerate(checked):
            if message.role == "assistant" and spread[index].end(message) > 0:
                prompt, reply = view(
                    self.policy, checked, tools, index, spread[index], empty_weight, empty_think_trained
                )
                # Encoded apart: at inference the prompt's last token is fixed before the reply's first is chosen.
                views.append(_joined(self._encode(prompt, seen), self._encode(reply, seen)))
        return views

    def prompt_ids(self, messages: Conversation, tools: Tools | None = None, *, thinking: bool = True) -> list[int]:
        """Token ids of the conversation and the header of the next assistant turn."""
        return self.render(messages, tools, thinking=thinking, add_generation_prompt=True).token_ids

    def tool_result_ids(self, results: Sequence[str], *, thinking: bool = True) -> list[int]:
        """Tokens that follow an assistant turn ended by ``<|im_end|>``: its tools' results and the next header.

        Appending them to a sampled trajectory gives the prompt of the next turn without re-encoding anything.

        Raises:
            InputError: the template family has no tools.
        """
        if not self.policy.spec.tools:
            raise InputError(f"template family {self.policy.family!r} cannot show tool results")
        pieces = [Piece("\n", "assistant", "header"), *tool_results(self.policy, results)]
        return self._encode(pieces + generation_prompt(self.policy, thinking), {}).token_ids

    def render_text(self, segments: Sequence[tuple[str, float]]) -> Rendered:
        """Plain text without chat structure (prompt/completion strings, documents), ended by ``<|endoftext|>``.

        Args:
            segments: stretches of text with their loss weights; each is encoded by itself, so that a completion
                starts with the token it would start with after its prompt. The end token has the last one's weight.
        """
        rendered = Rendered()
        for text, weight in segments:
            rendered = _joined(rendered, self._encode([Piece(text, "text", "text", weight)], {}))
        if segments:
            end = Piece("<|endoftext|>", "text", "eot", segments[-1][1], True)
            rendered = _joined(rendered, self._encode([end], {}))
        return rendered

    @property
    def stop_ids(self) -> list[int]:
        """Tokens of ``policy.stop_text``; InputError when the tokenizer has no think tokens."""
        if self.tokenizer.think_close is None or self.tokenizer.think_open is None:
            raise InputError("a thinking budget needs <think> and </think> in the tokenizer; this one lacks them")
        return self.tokenizer.encode_with_special(self.policy.stop_text)

    @property
    def chat_template(self) -> str:
        """The Jinja template that renders the same text under this policy; to be saved with the checkpoint."""
        return self.policy.template

    def _checked(self, messages: Conversation, tools: Tools | None) -> list[Message]:
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
            raise InputError(f"messages must be a list, got {type(messages).__name__}; wrap a single message in a list")
        if messages and isinstance(messages[0], Mapping):
            read = messages_from_openai(messages, inline_thinking=self.policy.spec.thinks)  # type: ignore[arg-type]
        else:
            read = list(messages)  # type: ignore[arg-type]
            validate_messages(read)
        validate_tools(tools)
        check_fits(self.policy, read, tools)
        return read

    def _empty_weight(self, trained: bool) -> float:
        supplied = self.policy.spec.prompt == "closed"  # never the model's own
        return 1.0 if trained and not supplied else self.policy.empty_think_weight

    def _encode(self, pieces: Sequence[Piece], seen: _Seen) -> Rendered:
        """Encode runs of text between control tokens as one string, so tokens may cross pieces as in plain text.

        Args:
            pieces: the text.
            seen: runs already encoded, kept by a caller that encodes the same turns many times.
        """
        rendered = Rendered(text=text_of(pieces))
        run: list[Piece] = []
        for piece in pieces:
            control = self.tokenizer.control_id(piece.text) if piece.control else None
            if control is None:
                if piece.text:
                    run.append(piece)
                continue
            if run:
                self._encode_run(run, rendered, seen)
                run = []
            _append(rendered, [control], piece)
        if run:
            self._encode_run(run, rendered, seen)
        return rendered

    def _encode_run(self, run: Sequence[Piece], rendered: Rendered, seen: _Seen) -> None:
        first = run[0]
        if len(run) == 1:
            store = self._fixed if first.part == "header" else seen  # headers are few and everywhere
            known = store.get(first.text)
            if known is None:
                known = store[first.text] = (self.tokenizer.encode(first.text), [])
            _append(rendered, known[0], first)
            return
        text = text_of(run)
        key = f"{len(run)}:{text}"
        known = seen.get(key)
        if known is None:
            known = seen[key] = self.tokenizer.encode_with_offsets(text)
        ids, starts = known
        begin = reached = 0
        for piece in run:
            begin += len(piece.text)
            # A token that crosses a border belongs to the piece it begins in: supplied text is never trained.
            upto = bisect_left(starts, begin)
            _append(rendered, ids[reached:upto], piece)
            reached = upto


def folder_template(folder: Path) -> str | None:
    """Text of the folder's chat template: its own file, or inside tokenizer_config.json (there may be several)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        with readable(path):
            return path.read_text(encoding="utf-8", errors="replace")
    config = folder / "tokenizer_config.json"
    template = read_settings(config).get("chat_template")
    try:
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("tool_use", named.get("default"))
    except (KeyError, TypeError) as error:
        raise InputError(f"{config} is not a readable tokenizer_config.json ({error}); copy the file again") from None
    return template if isinstance(template, str) else None


def _append(rendered: Rendered, ids: Sequence[int], owner: Piece) -> None:
    count = len(ids)
    rendered.token_ids += ids
    rendered.weights += [owner.weight] * count
    rendered.roles += [owner.role] * count
    rendered.parts += [owner.part] * count


def _joined(first: Rendered, second: Rendered) -> Rendered:
    return Rendered(
        first.token_ids + second.token_ids,
        first.weights + second.weights,
        first.roles + second.roles,
        first.parts + second.parts,
        first.text + second.text,
    )
