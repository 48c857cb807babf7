"""The command: keys from files, what is said at the start, and a warning where anybody may come in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twofold.base.config import ConfigError
from twofold.base.records import InputError
from twofold.llm import LLM
from twofold.serve.config import ServeConfig
from twofold.serve_cli import banner, chat_line, read_keys, serve
from twofold.text.families import UnknownTemplate


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    assert read_keys(["zero", f"@{tmp_path / 'keys'}"]) == ["zero", "one", "two"]
    (tmp_path / "empty").write_text("\n")
    for bad in ("", " ", f"@{tmp_path / 'empty'}", f"@{tmp_path / 'none'}"):
        with pytest.raises(ConfigError, match="key"):
            read_keys([bad])


def test_what_is_said() -> None:
    config = SimpleNamespace(num_parameters=lambda: 1234567)
    service: Any = SimpleNamespace(
        llm=SimpleNamespace(model=SimpleNamespace(config=config)), name="tiny", config=ServeConfig()
    )
    lines = banner(service, Path("runs/tiny"), "127.0.0.1", 8000)
    assert lines[0] == "runs/tiny, 1,234,567 parameters, served as 'tiny'" and len(lines) == 3
    assert "warning: 0.0.0.0 can be reached" in banner(service, Path("x"), "0.0.0.0", 8000)[-1]
    service.config = ServeConfig(api_keys=("k",))
    assert banner(service, Path("x"), "0.0.0.0", 8000)[-1].endswith("/v1 (with a key)")


def test_a_model_without_chats_is_served_only_where_no_family_would_help() -> None:
    llm: Any = LLM.__new__(LLM)
    llm._renderer = UnknownTemplate("the chat template is none of the families; --family NAME")
    with pytest.raises(UnknownTemplate, match="--family NAME"):
        chat_line(llm)
    llm._renderer = InputError("the checkpoint has no chat template")
    assert chat_line(llm) == "warning: completions only, no chats: the checkpoint has no chat template"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_queue'"):
        serve(tmp_path, overrides=["max_quue=3"])
    with pytest.raises(InputError, match="twofold run tiny"):
        serve(tmp_path)
