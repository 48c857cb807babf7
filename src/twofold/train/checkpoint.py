"""Training state in one file, written atomically: weights, optimiser moments, random state, counters, source, settings.

One safetensors file whose header carries the JSON part; nothing is pickled, and a half-written state cannot exist.
A state that lacks a tensor or a fact the run needs, or was made with other settings, is refused by name. Tensors are
read into those that the run already has. States of several processes are folders (``sharded.py``) with the same names
inside. Finished models are saved by ``model.weights`` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from twofold.base.dist import fill
from twofold.base.files import atomic_path
from twofold.base.records import InputError

FACTS = ("step", "tokens", "steps", "skipped", "split", "best", "settings", "source", "objective", "tensor")

Optimizers = Mapping[str, tuple[torch.optim.Optimizer, float]]


class Saved(Protocol):
    """A state on disk. ``fill`` reads into tensors that exist, whole or sharded, by name."""

    origin: Path
    facts: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def fill(self, targets: dict[str, torch.Tensor]) -> None: ...


class SavedFile:
    """A state that ``save_state`` wrote. Only its header is read at once.

    Raises:
        InputError: the file is not readable as such.
    """

    def __init__(self, path: Path) -> None:
        self.origin = path
        try:
            with safe_open(path, framework="pt") as handle:
                self.facts = json.loads(handle.metadata()["facts"])
                self.shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise damaged(path, error) from None

    def fill(self, targets: dict[str, torch.Tensor]) -> None:
        with safe_open(self.origin, framework="pt") as handle:
            for name, target in targets.items():
                fill(target, handle.get_tensor(name))


def damaged(path: Path, error: BaseException) -> InputError:
    """The refusal of a state that cannot be read."""
    return InputError(f"training state {path} is damaged ({error}); delete it to start the stage again")


def save_state(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-able facts as one file."""
    whole = {name: t.contiguous() for name, t in tensors.items()}
    with atomic_path(path) as temporary:  # the file is written from the tensors: a copy of a state may be gigabytes
        save_file(whole, temporary, metadata={"facts": json.dumps(facts)})


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what ``save_state`` wrote.

    Raises:
        InputError: the file is not readable as such.
    """
    saved = SavedFile(path)
    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in saved.shapes}, saved.facts


def optimizer_tensors(name: str, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Moments under "<name>.<parameter>.<moment>"."""
    out = {}
    for parameter_name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{name}.{parameter_name}.{key}"] = value if torch.is_tensor(value) else torch.tensor(value)
    return out


def run_tensors(model: torch.nn.Module, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """All tensors of a state, as they are now: weights, moments, and the random state of torch."""
    out = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, (optimizer, _) in optimizers.items():
        out |= optimizer_tensors(name, optimizer, model)
    out["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        out["random.cuda"] = torch.cuda.get_rng_state()
    return out


def restore(saved: Saved, model: torch.nn.Module, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """Put weights, moments and random state back; returns the tensors that were filled, by name.

    Raises:
        InputError: something is missing or has another shape; nothing has been changed then.
    """
    targets, moments = _weights(saved, model), []
    for name, (optimizer, _) in optimizers.items():
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter, found in _moments(saved, name, model, owned):
            moments.append((optimizer, parameter, found))
            targets |= {key: tensor for key, tensor, _ in found}
    for name in ("random.cpu", *(["random.cuda"] if torch.cuda.is_available() else [])):
        if name not in saved.shapes:
            raise _refusal(saved, f"no {name}, the state of torch's random numbers")
        targets[name] = torch.empty(saved.shapes[name], dtype=torch.uint8)
    saved.fill(targets)
    for optimizer, parameter, found in moments:
        optimizer.state[parameter] = {moment: tensor for _, tensor, moment in found}
    torch.set_rng_state(targets.pop("random.cpu"))
    if "random.cuda" in targets:
        torch.cuda.set_rng_state(targets.pop("random.cuda"))
    return targets


def restore_weights(saved: Saved, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Put weights alone back; returns them by name.

    Raises:
        InputError: weights that do not fit.
    """
    targets = _weights(saved, model)
    saved.fill(targets)
    return targets


def _weights(saved: Saved, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = {f"model.{name}": value for name, value in model.state_dict().items()}
    theirs = {name for name in saved.shapes if name.startswith("model.")}
    problems = [f"no {name}" for name in own if name not in theirs]
    problems += [f"{name}, which this model has not" for name in sorted(theirs - own.keys())]
    problems += [
        f"{name} of shape {list(saved.shapes[name])}, not {list(value.shape)}"
        for name, value in own.items()
        if name in theirs and saved.shapes[name] != tuple(value.shape)
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise InputError(
            f"{saved.origin} does not fit this model: it has {problems[0]}{more}; delete it to start again"
        )
    return own


def _moments(
    saved: Saved, name: str, model: torch.nn.Module, owned: set[int]
) -> list[tuple[torch.nn.Parameter, list[tuple[str, torch.Tensor, str]]]]:
    """For each parameter of an optimiser its (full name, tensor to be filled, moment)."""
    parameters = {f"{name}.{key}.": p for key, p in model.named_parameters() if id(p) in owned}
    parts = [full.rpartition(".") for full in saved.shapes]
    kinds = {moment for prefix, dot, moment in parts if prefix + dot in parameters}  # of any of its parameters
    out = []
    for prefix, parameter in parameters.items():
        found = []
        for moment in sorted(kinds) or ["moments"]:
            shape = saved.shapes.get(prefix + moment)
            if shape is None or shape not in (tuple(parameter.shape), ()):
                raise _refusal(saved, f"no {name} {moment} that fits {prefix[len(name) + 1 : -1]!r}")
            target = (
                torch.zeros_like(parameter, requires_grad=False) if shape else torch.zeros((), device=parameter.device)
            )
            found.append((prefix + moment, target, moment))
        out.append((parameter, found))
    return out


def check_facts(saved: Saved, settings: dict[str, Any]) -> None:
    """Refuse a state that lacks a fact, or that was made with other settings than ``settings``.

    Raises:
        InputError: names the fact, or the setting with both values.
    """
    for name in FACTS:
        if name not in saved.facts:
            raise _refusal(saved, f"no {name!r}")
    before, now = _leaves(saved.facts["settings"]), _leaves(json.loads(json.dumps(settings)))
    changed = [
        f"{name} was {before.get(name, 'not set')!r} and is {now.get(name, 'not set')!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name, ...) != now.get(name, ...)
    ]
    if changed:
        raise InputError(
            f"{saved.origin} was made with other settings: {'; '.join(changed)}; "
            "put them back, or delete it to start again"
        )


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in _leaves(value, f"{prefix}.{key}" if prefix else key).items()
    }


def _refusal(saved: Saved, lacking: str) -> InputError:
    return InputError(
        f"the training state {saved.origin} has {lacking}; it cannot be resumed, delete it to start the stage again"
    )
