"""Recognising foreign templates by what they render."""

from __future__ import annotations

import pytest

from twofold.base.records import InputError
from twofold.text.chat import CHAT_TEMPLATE
from twofold.text.families import compile_template, recognise, template_difference
from twofold.text.policy import ChatPolicy

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


def test_training_marks_of_other_tools_are_read_over() -> None:
    marked = CHATML.replace("{{ '<|im_start|>' + m", "{% generation %}{{ '<|im_start|>' + m", 1)
    marked = marked.replace("{% endfor %}", "{% endgeneration %}{% endfor %}")
    assert recognise(marked) == ChatPolicy(family="chatml")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "none of the families"),
        (CHATML.replace("m['content']", "m['content'] | trim"), "nearest: chatml, differs at a user turn"),
        (CHAT_TEMPLATE.replace("# Tools", "# My tools"), "nearest: hybrid, differs at a tool"),
        (CHAT_TEMPLATE.replace('{{- "}\\n</tool_call>" -}}', '{{- "}</tool_call>" -}}'), "differs at tool calls"),
        ("{{ raise_exception('no') }}", "none of the families"),
        ("{{ messages.nothing.at_all }}", "none of the families"),
        ("{% for", "not valid Jinja"),
    ],
)
def test_unknown_templates_are_refused_with_the_nearest_family(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recognise(template)


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
