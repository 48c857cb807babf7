"""Recognising foreign templates by what they render."""

from __future__ import annotations

from typing import Literal

import pytest

from twofold.base.records import InputError
from twofold.text.chat import CHAT_TEMPLATE
from twofold.text.families import Recognition, UnknownTemplate, grade, recognise, template_difference
from twofold.text.policy import FAMILIES, ChatPolicy
from twofold.text.probes import compile_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_chatml_and_its_default_system_turn() -> None:
    assert recognise(CHATML) == ChatPolicy(family="chatml")
    first = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    assert recognise(first + CHATML) == ChatPolicy(family="chatml", default_system="Be kind.")


def test_a_template_that_writes_a_bos_is_none_of_ours() -> None:
    """Leaving it out in silence would change every answer."""
    for template, bos in ((CHATML, "<s>"), ("{{ bos_token }}" + CHATML, None)):
        assert recognise(template, bos) == ChatPolicy(family="chatml")
    with pytest.raises(InputError, match="nearest: chatml, differs at a user turn"):
        recognise("{{ bos_token }}" + CHATML, "<s>")


def test_a_template_that_writes_its_end_token_by_name() -> None:
    """Many fine-tunes end turns so; it is ChatML only where that token is ChatML's."""
    named = CHATML.replace("m['content'] + '<|im_end|>'", "m['content'] + eos_token")
    assert named != CHATML
    assert recognise(named) == recognise(named, eos="<|im_end|>") == ChatPolicy(family="chatml")
    with pytest.raises(UnknownTemplate, match="differs at a user turn"):
        recognise(named, eos="<|endoftext|>")


def test_training_marks_of_other_tools_are_read_over() -> None:
    marked = CHATML.replace("{{ '<|im_start|>' + m", "{% generation %}{{ '<|im_start|>' + m", 1)
    marked = marked.replace("{% endfor %}", "{% endgeneration %}{% endfor %}")
    assert recognise(marked) == ChatPolicy(family="chatml")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "none of the families"),
        (CHATML.replace("<|im_end|>", "</s>"), "nearest: chatml, differs at a user turn"),
        (CHATML.replace("m['role']", "m['role'] | upper"), "nearest: chatml, differs at a user turn"),
        (CHATML.replace("assistant\\n", "assistant:"), "nearest: chatml, differs at a generation prompt"),
        ("{{ raise_exception('no') }}", "none of the families"),
        ("{{ messages.nothing.at_all }}", "none of the families"),
        ("{% for", "not valid Jinja"),
    ],
)
def test_unknown_templates_are_refused_with_the_nearest_family(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recognise(template)


def test_the_refusal_names_the_way_out() -> None:
    with pytest.raises(UnknownTemplate, match=r"--family NAME, in Python policy=ChatPolicy\(family=NAME\)"):
        recognise("{{ messages }}")


TURN = "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
ASK = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
SHOWS_THOUGHTS = (
    "{%- for m in messages %}{%- if m.role == 'assistant' and m.reasoning_content %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}"
    "{{- m.content + '<|im_end|>\\n' }}"
    "{%- else %}" + TURN + "{%- endif %}{%- endfor %}" + ASK
)
FIRST_SYSTEM = (
    "{%- for m in messages %}{%- if m.role != 'system' or loop.first %}" + TURN + "{%- endif %}{%- endfor %}" + ASK
)
NO_SYSTEM = (
    "{%- for m in messages %}{%- if m.role == 'system' %}{{ raise_exception('no system turns') }}{%- endif %}"
    + TURN
    + "{%- endfor %}"
    + ASK
)
TRIMS_USERS = CHATML.replace("m['content']", "(m['content'] | trim if m['role'] == 'user' else m['content'])")


@pytest.mark.parametrize(
    ("template", "family", "differs"),
    [
        (SHOWS_THOUGHTS, "chatml", ("reasoning at the end", "reasoning in the past")),
        (FIRST_SYSTEM, "chatml", ("a system turn in the middle",)),
        (TRIMS_USERS, "chatml", ("white space around other turns",)),
        (CHAT_TEMPLATE.replace("# Tools", "# My tools"), "hybrid", ("a tool", "tools and a system turn")),
        (
            CHAT_TEMPLATE.replace('{{- "}\\n</tool_call>" -}}', '{{- "}</tool_call>" -}}'),
            "hybrid",
            ("tool calls and results", "a call without tools on offer"),
        ),
        # Shows tools in a form of its own: they are refused by name, not offered in a form that was never learnt.
        (
            "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML,
            "chatml",
            ("a tool",),
        ),
    ],
)
def test_plain_chats_are_enough_and_the_rest_is_named(template: str, family: str, differs: tuple[str, ...]) -> None:
    found = grade(template)
    assert found.policy.family == family
    assert found.differs[: len(differs)] == differs
    with pytest.warns(UserWarning, match=f"read as the family '{family}', but it renders otherwise: {differs[0]}"):
        assert recognise(template) == found.policy


def test_what_a_template_refuses_is_no_difference() -> None:
    assert grade(NO_SYSTEM) == Recognition(ChatPolicy(family="chatml"))
    no_tools = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}"
    assert grade(no_tools + CHATML) == Recognition(ChatPolicy(family="chatml"))


def test_a_template_that_trims_contents() -> None:
    """White space that the model never saw in training is left out here too."""
    trims = CHATML.replace("m['content']", "m['content'] | trim")
    assert grade(trims) == Recognition(ChatPolicy(family="chatml", trim_content=True))
    assert grade(ChatPolicy(family="chatml", trim_content=True).template) == grade(trims)


def test_a_template_that_always_opens_a_thought_is_read_as_one_that_thinks() -> None:
    opens = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    assert opens != CHATML
    found = grade(opens)
    assert found.policy.family == "thinking" and "an answer at the end" in found.differs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("history", ["strip", "keep"])
def test_every_family_is_recognised_by_its_own_template(family: str, history: Literal["strip", "keep"]) -> None:
    if history == "keep" and not FAMILIES[family].thinks:
        return
    policy = ChatPolicy(history, family=family)
    assert grade(policy.template) == Recognition(policy)


def test_a_template_that_thinks_only_when_asked_is_told_apart_by_a_warning() -> None:
    """Qwen3.5's small models: here thinking is on unless it is switched off."""
    template = ChatPolicy(family="qwen3.5").template
    asked = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}" + template
    found = grade(asked)
    assert found.policy == ChatPolicy(family="qwen3.5")
    assert found.differs == ("thinking unless asked for (this template does not)",)


def test_probes_tell_the_treatment_of_past_thinking() -> None:
    keep = "{%- set preserve_thinking = true -%}\n" + CHAT_TEMPLATE
    assert recognise(keep) == ChatPolicy(history_thinking="keep")


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        compile_template("{{ messages.__class__.__mro__ }}")(messages=[])


def test_difference() -> None:
    assert template_difference("a\nb\n", "a\nb\n") == ""
    got = template_difference("a\nb\n", "a\nc\n")
    assert "-b" in got.splitlines() and "+c" in got.splitlines() and "trained with" in got
