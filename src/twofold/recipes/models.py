"""Where models lie: what is a checkpoint, and which one is meant by a run folder. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from twofold.base.files import readable
from twofold.base.gguf_file import hint, is_gguf
from twofold.base.hub import local
from twofold.base.records import InputError

MODEL_STAGES = ("general_rl", "fusion", "rl", "cold_start", "sft")  # of runs, the latest first


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a model folder or a .gguf file."""
    return (path / "config.json").is_file() or (is_gguf(path) and path.is_file())


def find_model(folder: Path) -> Path:
    """A model folder or .gguf file itself, a model of the hub by name, or a run's last finished model that can chat.

    Raises:
        InputError: none of them; the message says what to run. Or a model that cannot be fetched.
    """
    folder = local(folder)
    with readable(folder):
        if is_checkpoint(folder):
            return folder
    if folder.is_file():
        raise InputError(
            f"{folder} is neither a model folder nor a .gguf file; of weights, give the folder they lie in"
        )
    if not folder.is_dir():
        raise InputError(
            f"{folder} does not exist; give a model or run folder or a name such as Qwen/Qwen3-0.6B, or make a model: "
            "twofold run tiny"
        )
    for stage in MODEL_STAGES:
        if (folder / stage / "config.json").is_file():
            return folder / stage
    raise InputError(
        f"{folder} holds no model that can chat (none of {', '.join(MODEL_STAGES)} is finished); "
        f"make one: twofold run tiny --out {folder}{hint(folder)}"
    )
