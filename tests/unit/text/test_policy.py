"""Policies: what they refuse, and their file beside the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twofold.base.records import InputError
from twofold.text.chat import Renderer
from twofold.text.policy import FAMILIES, ChatPolicy, read_chat_policy, template_hash, write_chat_policy
from twofold.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"family": "llama"}, "family"),
        ({"history_thinking": "maybe"}, "history_thinking"),
        ({"family": "instruct", "history_thinking": "keep"}, "no think blocks"),
        ({"empty_think_weight": float("nan")}, "empty_think_weight"),
        ({"empty_think_weight": "1"}, "empty_think_weight"),
        ({"stop_text": "a</think>b</think>"}, "stop_text"),
        ({"default_system": 3}, "default_system"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError, match=where):
        ChatPolicy(**changes)


def test_default_system_turns() -> None:
    assert ChatPolicy().system is None
    assert ChatPolicy(family="qwen2.5").system == FAMILIES["qwen2.5"].default_system
    assert ChatPolicy(family="qwen2.5", default_system="Be kind.").system == "Be kind."


def test_file_comes_back(tmp_path: Path) -> None:
    assert read_chat_policy(tmp_path) is None
    policy = ChatPolicy(history_thinking="keep", empty_think_weight=0.5, default_system="S\n")
    write_chat_policy(tmp_path, policy)
    assert read_chat_policy(tmp_path) == (policy, policy.template)
    write_chat_policy(tmp_path, policy, "a template")
    assert read_chat_policy(tmp_path) == (policy, "a template")


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "llama"},
        {"surplus": 1},
        {"template": None},
        {"template": "another"},
        {"template_sha256": template_hash("x")},
    ],
)
def test_damaged_file_is_named(changes: dict[str, Any], tmp_path: Path) -> None:
    write_chat_policy(tmp_path, ChatPolicy())
    path = tmp_path / "chat_policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=r"chat_policy\.json"):
        read_chat_policy(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "{"])
def test_no_policy_at_all_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "chat_policy.json").write_text(text)
    with pytest.raises(InputError, match="not a chat policy"):
        read_chat_policy(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_policy.json", "tokenizer_config.json"])
def test_files_that_may_not_be_read(
    name: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Renderer(tokenizer).save(tmp_path)
    read = Path.read_text

    def refuse(path: Path, *args: Any, **options: Any) -> str:
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(InputError, match=rf"{name} cannot be read: Permission denied"):
        Renderer.from_pretrained(tmp_path)
