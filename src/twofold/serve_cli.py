"""What ``twofold serve`` does: load a model, say where it listens, and serve until it is told to stop.

Not here: options (``cli.py``), and anything that the server does (``serve``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from twofold.base.config import ConfigError
from twofold.base.records import InputError
from twofold.engine.engine import EngineOptions
from twofold.llm import LLM
from twofold.recipes.models import find_model
from twofold.serve.config import ServeConfig
from twofold.serve.server import Server
from twofold.serve.service import Service
from twofold.text.families import UnknownTemplate

LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    model: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    overrides: Sequence[str] = (),
    loading: Mapping[str, Any] | None = None,
    log_level: str = "info",
) -> None:
    """Serve a model folder, a .gguf file, or a run's last model.

    Args:
        model: what to serve. host: address to bind to; others than the local one are reachable from outside.
        port: where to listen; 0 takes a free one. api_keys: any of them opens the API; ``@FILE`` reads a file with one
            a line, so that they do not show in the list of processes. overrides: ``KEY=VALUE`` for
            fields of ``ServeConfig``. loading: further arguments of ``LLM``. log_level: of uvicorn.

    Raises:
        InputError: no model there, a chat template that is not known, or the address cannot be bound to.
        ConfigError: an unknown setting, a bad key.
    """
    config = ServeConfig(api_keys=tuple(read_keys(api_keys))).override(overrides)
    folder = find_model(model)
    console = Console(highlight=False)
    llm = LLM(folder, options=EngineOptions(entropies=False), **(loading or {}))
    if not llm.has_tokenizer:
        raise InputError(f"{folder} has no tokenizer files, and a server speaks text; copy them into the folder")
    chats = chat_line(llm)
    service = Service(llm, config)
    for line in (*banner(service, folder, host, port), chats):
        console.print(Text(line), soft_wrap=True)
    server = Server(service, host, port, log_level)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # raised again after the orderly end that it asked for
            server.run()
    except SystemExit:  # uvicorn has logged why it could not start
        raise InputError(f"cannot listen on {host}:{port}; choose another --port or --host") from None


def read_keys(given: Sequence[str]) -> list[str]:
    """API keys, those in files included.

    Raises:
        ConfigError: an empty key, or a file that cannot be read or has none.
    """
    keys: list[str] = []
    for key in given:
        if key.startswith("@"):
            try:
                lines = Path(key[1:]).read_text(encoding="utf-8").split()
            except (OSError, ValueError) as error:
                raise ConfigError(f"the keys in {key[1:]} cannot be read ({error}); give a text file") from None
        else:
            lines = [key.strip()]
        if not lines or not all(lines):
            raise ConfigError(f"--api-key {key!r} has no key; give a word, or @FILE with one key a line")
        keys += lines
    return keys


def chat_line(llm: LLM) -> str:
    """What to say of the chat format; a model without one is served for completions, as base models are.

    Raises:
        UnknownTemplate: it has a chat template, which is not known: every chat would fail, and ``--family`` helps.
    """
    try:
        return f"chats are written as the family {llm.renderer.policy.family!r} writes them"
    except UnknownTemplate:
        raise
    except InputError as error:
        return f"warning: completions only, no chats: {error}"


def banner(service: Service, folder: Path, host: str, port: int) -> list[str]:
    """What to tell whoever started the server."""
    size = service.llm.model.config.num_parameters()
    lines = [f"{folder}, {size:,} parameters, served as {service.name!r}", f"chat: http://{host}:{port}/"]
    lines.append(f"API:  http://{host}:{port}/v1" + (" (with a key)" if service.config.api_keys else ""))
    if host not in LOCAL and not service.config.api_keys:
        lines.append(f"warning: {host} can be reached from other machines and there is no --api-key")
    return lines
