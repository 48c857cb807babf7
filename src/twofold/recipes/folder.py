"""A whole Hugging Face folder from a loaded checkpoint: weights, configuration, tokenizer, template, defaults.

The one place that writes a checkpoint which came from elsewhere; models made by the tiny recipe have their own fixed
defaults (``pretrain.save_model``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from twofold.base.records import InputError
from twofold.llm import LLM
from twofold.model.hf_config import read_generation_config, write_generation_config
from twofold.model.weights import save_weights
from twofold.text.chat import Renderer
from twofold.text.tokenizer import Tokenizer

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def save_folder(
    llm: LLM, origin: Path, template: str | None, folder: Path, kind: str, tokenizer: Tokenizer | None = None
) -> None:
    """Write all files of a Hugging Face folder; the model in memory takes the type that is written.

    Its generation_config.json is ``origin``'s, with the end tokens that ``llm`` stops at wherever they were named.

    Args:
        origin: the checkpoint that ``llm`` was loaded from. template: its chat template, as it is written where no
            renderer knows it; None leaves the folder without one. kind: f32, f16 or bf16. tokenizer: in place of the
            checkpoint's own, with tokens added.

    Raises:
        InputError: a tensor that f16 cannot hold.
    """
    dtype = TYPES[kind]
    for name, tensor in llm.model.state_dict().items():
        if dtype == torch.float16 and not float(tensor.abs().max()) <= torch.finfo(dtype).max:
            raise InputError(f"{origin}: tensor {name!r} has values that f16 cannot hold; use --type bf16 or f32")
    save_weights(llm.model.to(dtype), folder)
    tokenizer = (tokenizer or llm.tokenizer).completed(llm.engine.eos_ids[0], llm.model.config.longest)
    if llm.has_renderer:
        Renderer(tokenizer, llm.renderer.policy).save(folder)
    else:
        tokenizer.save(folder, template or "")
        if template is None:
            (folder / "chat_template.jinja").unlink()
    own: Mapping[str, Any] = read_generation_config(origin) if origin.is_dir() else {}
    write_generation_config(folder, dict(own) | {"eos_token_id": list(llm.engine.eos_ids)})
