"""Training state in one file, written atomically: weights, optimiser moments, source state and step.

One safetensors file whose header carries the JSON part; nothing is pickled, and a half-written state cannot exist.
A state that lacks a tensor the run needs is refused by name. Finished models are saved by ``model.weights`` instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from twofold.base.files import atomic_path
from twofold.base.records import InputError


def save_state(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-able facts as one file."""
    data = save({name: t.contiguous() for name, t in tensors.items()}, metadata={"facts": json.dumps(facts)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what ``save_state`` wrote.

    Raises:
        InputError: the file is not readable as such.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            facts = json.loads(handle.metadata()["facts"])
            return {name: handle.get_tensor(name) for name in handle.keys()}, facts
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"training state {path} is damaged ({error}); delete it to start the stage again") from None


def optimizer_tensors(name: str, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Moments under "<name>.<parameter>.<moment>"."""
    out = {}
    for parameter_name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{name}.{parameter_name}.{key}"] = value if torch.is_tensor(value) else torch.tensor(value)
    return out


def restore_optimizer(
    name: str, optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: dict[str, torch.Tensor]
) -> None:
    """Put saved moments back.

    Raises:
        InputError: a parameter of the optimiser lacks a saved moment that the others have, or one of its shape.
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for parameter_name, parameter in model.named_parameters():
        if id(parameter) in owned:
            prefix = f"{name}.{parameter_name}."
            saved[parameter_name] = {
                k.removeprefix(prefix): t.clone() for k, t in tensors.items() if k.startswith(prefix)
            }
    expected = set().union(*saved.values()) or {"moments"}
    for parameter_name, parameter in model.named_parameters():
        if parameter_name not in saved:
            continue
        found = saved[parameter_name]
        for key in sorted(expected):
            if key not in found or found[key].shape not in (parameter.shape, torch.Size()):
                raise InputError(
                    f"the training state has no {name} {key} that fits {parameter_name!r}; it cannot be resumed, "
                    "delete it to start the stage again"
                )
        optimizer.state[parameter] = found
