"""Which template family a foreign chat template belongs to, found by rendering probes, not by reading its text.

Official templates exist in several revisions, and fine-tunes re-wrap them; what counts is what they render. The answer
is graded: a template that renders every probe as a family does is that family; one that renders plain chats so is read
as the nearest family, with the names of the probes that it renders otherwise; any other is refused. Not here: the
families themselves (``policy.py``, ``pieces.py``) and the probes (``probes.py``).
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

from twofold.base.records import InputError, ToolCall
from twofold.text.messages import messages_from_openai, turn_weights
from twofold.text.pieces import conversation, generation_prompt, text_of
from twofold.text.policy import FAMILIES, ChatPolicy
from twofold.text.probes import (
    ARGUMENTS,
    CALLS,
    CONTENT,
    OFF,
    OFFER,
    ON,
    PROBES,
    PROMPT,
    SPACED,
    SYSTEM,
    SYSTEM_OFFER,
    TOOL,
    USER,
    Probe,
    compile_template,
    rendered,
)
from twofold.text.xml_form import SCHEMAS, SPELLINGS, Schemas, XmlTools, call_text, tool_text

BY_HAND = "--family NAME, in Python policy=ChatPolicy(family=NAME)"
_DEFAULT_OFF = "thinking unless asked for (this template does not)"
_HEAD, _TAIL = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"


class UnknownTemplate(InputError):
    """A chat template that renders plain chats as none of the families does; one can be chosen by hand."""


@dataclass(frozen=True, slots=True)
class Recognition:
    """The policy nearest to a template, and the names of what the template renders otherwise (or refuses)."""

    policy: ChatPolicy
    differs: tuple[str, ...] = ()

    def warn(self) -> None:
        """Warn where the policy is not exactly the template."""
        if self.differs:
            warnings.warn(
                f"the chat template is read as the family {self.policy.family!r}, but it renders otherwise: "
                f"{'; '.join(self.differs)}. Chats are written as the family writes them (another one: {BY_HAND})",
                stacklevel=3,
            )


@dataclass(frozen=True, slots=True)
class _Found:
    """A template's renderings by the name of the probe. off: it does not think unless it is asked to."""

    texts: dict[str, str | None]
    bare: dict[str, str | None]
    off: bool

    def differs(self, policy: ChatPolicy, probe: Probe) -> bool:
        """Whether the template renders the probe otherwise than our renderer does."""
        text, about_tools = self.texts[probe.name], probe.tools or probe.calls
        if text is None:  # the template refuses the conversation; of families, one that cannot show tools does as well
            return probe.core or (about_tools and policy.spec.tools)
        if policy.spec.tools or not about_tools:
            return _shown(policy, probe, not self.off) != text
        return text != self.bare[probe.name]  # no place for tools: the template must have none either


def recognise(template: str, bos: str | None = None, eos: str | None = None) -> ChatPolicy:
    """The policy under which our renderer writes what the template renders, with a warning where it is not all.

    Args:
        template: its text. bos: the token that templates know as ``bos_token``; no family of ours writes one. eos: the
            one that they know as ``eos_token``, which some write for the end of a turn; ``<|im_end|>`` unless given.

    Raises:
        InputError: the template cannot be read. UnknownTemplate: it renders plain chats as none of our families does;
            says how to choose one by hand.
    """
    found = grade(template, bos, eos)
    found.warn()
    return found.policy


def grade(template: str, bos: str | None = None, eos: str | None = None) -> Recognition:
    """As ``recognise``, with what differs as names in place of a warning."""
    compiled = compile_template(template)
    tokens = {"eos_token": eos or "<|im_end|>", **({} if bos is None else {"bos_token": bos})}
    texts = {probe.name: rendered(compiled, probe, tokens) for probe in PROBES}
    bare = {probe.name: rendered(compiled, probe.bare(), tokens) for probe in PROBES if probe.tools or probe.calls}
    on, off, unsaid = texts[ON.name], texts[OFF.name], texts[PROMPT.name]
    found = _Found(texts, bare, off=unsaid == off != on)
    best: tuple[tuple[bool, int, bool], ChatPolicy, list[Probe]] | None = None
    for policy in _candidates(texts):
        differing = [probe for probe in PROBES if found.differs(policy, probe)]
        if not differing:
            break
        # Of two that are equally near, the one that refuses tools rather than offer them in a form not learnt.
        wrong_tools = policy.spec.tools and any(probe.tools for probe in differing)
        rank = (any(probe.core for probe in differing), len(differing), wrong_tools)
        if best is None or rank < best[0]:
            best = rank, policy, differing
    else:
        assert best is not None
        rank, policy, differing = best
    if any(probe.core for probe in differing):
        raise UnknownTemplate(
            f"the chat template is none of the families {', '.join(FAMILIES)} (nearest: {policy.family}, differs at "
            f"{differing[0].name}); to use one all the same, choose it: {BY_HAND}"
        )
    names = [probe.name for probe in differing]
    return Recognition(policy, (*names, _DEFAULT_OFF) if found.off and policy.spec.switches else tuple(names))


def template_difference(trained: str, found: str) -> str:
    """Unified diff from the template a checkpoint was trained with to the one found beside it; empty if equal."""
    lines = difflib.unified_diff(
        trained.splitlines(), found.splitlines(), "trained with", "found in the folder", lineterm=""
    )
    return "\n".join(lines)


def _candidates(texts: dict[str, str | None]) -> Iterator[ChatPolicy]:
    """Policies that the template may follow; what one probe decides for all families is settled here."""
    default = _between(texts[USER.name])
    trims = texts[SPACED.name] is not None and texts[SPACED.name] == texts[PROMPT.name]
    form = _xml_form(texts)
    for own in (None, form) if form is not None else (None,):
        for name, spec in FAMILIES.items():
            if default is None and spec.default_system is not None:
                continue  # the family has a default system turn, the template has none
            if own is not None and (own == spec.xml or not (spec.xml or spec.thinks)):
                continue
            given = None if default == spec.default_system else default
            trim = None if trims == spec.trims else trims
            yield ChatPolicy(family=name, default_system=given, trim_content=trim, xml_tools=own)
            if spec.thinks:
                yield ChatPolicy("keep", family=name, default_system=given, trim_content=trim, xml_tools=own)


def _between(text: str | None) -> str | None:
    """The system turn in front of a user turn."""
    if text is None or not text.startswith(_HEAD) or _TAIL not in text:
        return None
    return text[len(_HEAD) : text.index(_TAIL)]


def _xml_form(texts: dict[str, str | None]) -> XmlTools | None:
    """How the template writes tools and calls in the XML form; None where it does not, or not in a way we know."""
    calls, alone, after = texts[CALLS.name], _between(texts[OFFER.name]), _between(texts[SYSTEM_OFFER.name])
    if calls is None or alone is None or after is None or "<function=add>" not in calls:
        return None
    spelled = [
        spelling
        for spelling in SPELLINGS
        if call_text(ToolCall("add", ARGUMENTS), XmlTools("", "", spelling=spelling), "") in calls
    ]
    gap = calls[calls.index(CONTENT) + len(CONTENT) : calls.index("<tool_call>")]
    end = "\n" if "</tool_response>\n<|im_end|>" in calls else ""
    if not spelled or gap not in ("\n\n", "\n", ""):
        return None
    schemas, shown = _described(after)
    if not shown or shown not in alone:
        return None
    head, _, tail = after.partition(shown)
    form = XmlTools(head, tail, schemas, spelling=spelled[0], gap=gap, result_end=end)
    if tail.endswith("\n\n" + SYSTEM):
        return replace(form, tail=tail.removesuffix("\n\n" + SYSTEM))
    head, before = head.removeprefix(SYSTEM), alone[: alone.index(shown)]
    default = before.removesuffix(head) if before.endswith(head) else ""
    return replace(form, head=head, system="first", default_system=default)


def _described(block: str) -> tuple[Schemas, str]:
    """How a system block describes the probe's tool, and the text; "" if it is not there.

    A description that is nearly one of ours is found by the tags around it: the words of the offer are the template's
    in any case.
    """
    written = [(schemas, tool_text(TOOL, XmlTools("", "", schemas=schemas), "")) for schemas in SCHEMAS]
    for schemas, text in written:
        if text in block:
            return schemas, text
    inside = block.partition("<tools>")[2].partition("\n</tools>")[0]
    return ("xml" if "<name>add</name>" in inside else "json"), inside


def _shown(policy: ChatPolicy, probe: Probe, thinking: bool) -> str:
    """What our renderer makes of a probe; ``thinking``: the mode where the probe does not say."""
    messages = messages_from_openai(probe.rows, inline_thinking=policy.spec.thinks)
    weights = turn_weights(messages, None)
    pieces = conversation(policy, messages, [TOOL] if probe.tools else None, weights, 0.0)
    if probe.flags.get("add_generation_prompt"):
        on = probe.flags.get("enable_thinking", thinking) or not policy.spec.switches
        pieces += generation_prompt(policy, on)
    return text_of(pieces)
