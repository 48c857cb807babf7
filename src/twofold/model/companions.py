"""What stands beside the weights of a checkpoint: tokenizer, chat format, sampling defaults, end tokens.

The same for a Hugging Face folder and a GGUF file. What a checkpoint may lack is kept as the error that says so, and is
raised when it is needed: a base model has no chat format, and a folder of mere weights no tokenizer. Damaged files are
errors at once. Not here: the weights, and what is done with any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofold.base.gguf_file import is_gguf, read_metadata
from twofold.base.records import InputError
from twofold.model.hf_config import read_generation_config, said_ends
from twofold.text.chat import Renderer
from twofold.text.gguf_tokenizer import gguf_ends, gguf_template, tokenizer_from_gguf
from twofold.text.policy import ChatPolicy
from twofold.text.roles import end_ids
from twofold.text.tokenizer import Tokenizer

NO_TOKENIZER = "there are no tokenizer files, so that it takes and gives token ids alone"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "*.tiktoken", "*.model")


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer could be made of."""
    return any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)


@dataclass(frozen=True, slots=True)
class Companions:
    """ends_said: what the files say about the tokens that end a reply, as (where, value), the weightier first."""

    tokenizer: Tokenizer | InputError
    renderer: Renderer | InputError
    generation: dict[str, Any]
    ends_said: list[tuple[str, Any]]

    def ends(self, rows: int) -> tuple[int, ...]:
        """The tokens that end a reply of a model with ``rows`` rows; raises as ``ends_of`` does."""
        return ends_of(self.tokenizer, self.ends_said, rows)


def read_companions(path: Path, policy: ChatPolicy | None) -> Companions:
    """Read what stands beside the weights of a Hugging Face folder or in a GGUF file.

    Args:
        policy: the chat format, where the checkpoint's own template is missing or unknown.

    Raises:
        InputError: a damaged file.
    """
    return _of_gguf(path, policy) if is_gguf(path) else _of_folder(path, policy)


def tokenizer_of(folder: Path) -> Tokenizer | InputError:
    """The tokenizer of a folder, or the error to raise when one is needed where no file is there to make one of.

    Raises:
        InputError: a damaged file, or a tokenizer of an unknown kind.
    """
    if has_vocabulary(folder):
        return Tokenizer.from_folder(folder)
    return InputError(f"{folder}: {NO_TOKENIZER}; copy the tokenizer files of this model into the folder")


def ends_of(tokenizer: Tokenizer | InputError, said: Iterable[tuple[str, Any]], rows: int) -> tuple[int, ...]:
    """The tokens that end a reply; none where no file says so and there is no tokenizer that might.

    Raises:
        InputError: a value is no id of a token, or a tokenizer knows no end either.
    """
    return tokenizer.ends(said, rows) if isinstance(tokenizer, Tokenizer) else end_ids(said, rows)


def _of_folder(folder: Path, policy: ChatPolicy | None) -> Companions:
    tokenizer = tokenizer_of(folder)
    if isinstance(tokenizer, InputError):
        return Companions(tokenizer, tokenizer, read_generation_config(folder), said_ends(folder))
    renderer = _or_error(lambda: Renderer.from_pretrained(folder, policy))
    return Companions(tokenizer, renderer, read_generation_config(folder), said_ends(folder))


def _of_gguf(path: Path, policy: ChatPolicy | None) -> Companions:
    metadata = read_metadata(path)
    tokenizer = tokenizer_from_gguf(metadata, str(path))
    template = gguf_template(metadata, str(path))
    renderer = _or_error(lambda: Renderer.from_parts(tokenizer, template, policy))
    return Companions(tokenizer, renderer, {}, [(str(path), list(gguf_ends(metadata, tokenizer, str(path))))])


def _or_error(make: Callable[[], Renderer]) -> Renderer | InputError:
    """A base model can be continued and scored without a chat format; the error is raised when one is needed."""
    try:
        return make()
    except InputError as error:
        return error
