"""What a checkpoint holds of a stage: all that its next step depends on, as tensors and plain numbers, never as code.

``model.safetensors`` has the parameters that train and all buffers, ``optimizer.safetensors`` the states of the optimizer as
``parameter/state``, ``random.safetensors`` those of torch's random generators, and ``trainer.json`` everything else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oomph.errors import RunError

TRAINER = "trainer.json"
_SCHEMA = 1
_CHANGED = "have the model's own files changed? go on with what it was made with"
_MODEL, _OPTIMIZER, _RANDOM = "model.safetensors", "optimizer.safetensors", "random.safetensors"


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Writes a checkpoint into an empty folder.

    Args:
        folder: where to.
        model: its frozen parameters are left out.
        optimizer: over the others.
        state: plain numbers and texts.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    states = {path: states[key] for path, (states, key) in _named_states(model, optimizer).items()}
    tensors = {path: value for path, value in states.items() if isinstance(value, Tensor)}
    numbers = {path: value for path, value in states.items() if path not in tensors}
    generators, seeds = _random_states()
    for name, content in ((_MODEL, dict(_changing(model))), (_OPTIMIZER, tensors), (_RANDOM, generators)):
        _save(folder / name, content)
    everything = {"schema": _SCHEMA, "optimizer": numbers, "random": seeds, **state}
    (folder / TRAINER).write_text(json.dumps(everything) + "\n", encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """The numbers and texts of a checkpoint.

    Raises:
        RunError: another version wrote it.
    """
    state: dict[str, Any] = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    if state["schema"] != _SCHEMA:
        raise RunError(f"{folder} was written by another version, schema {state['schema']}", "go on with that version")
    return state


def load_model(folder: Path, model: nn.Module) -> None:
    """Puts the model of a checkpoint into one that was made as it was for the run that saved it, in place.

    Raises:
        RunError: it holds other tensors than the model has.
    """
    saved, present = load_file(folder / _MODEL), dict(_changing(model))
    strange = sorted(saved.keys() ^ present.keys())
    strange += sorted(name for name in saved.keys() & present.keys() if saved[name].shape != present[name].shape)
    if strange:
        raise RunError(f"{folder} is of another model, in which {strange[0]} is otherwise", _CHANGED)
    with torch.no_grad():
        for name, tensor in present.items():
            tensor.copy_(saved[name])


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the states of a checkpoint into those of an optimizer, in place, so that it takes no memory beside them.

    Args:
        folder: the checkpoint.
        model: whose parameters the optimizer has; those of the checkpoint, by `load_model`, before the optimizer was made.
        optimizer: with all of its states.

    Raises:
        RunError: they are the states of other parameters or of another optimizer.
    """
    numbers: dict[str, Any] = read_state(folder)["optimizer"]
    saved, present = load_file(folder / _OPTIMIZER), _named_states(model, optimizer)
    if {*saved, *numbers} != set(present):
        strange = min({*saved, *numbers} ^ set(present))
        raise RunError(f"{folder} is of another optimizer, in which {strange} is otherwise", _CHANGED)
    with torch.no_grad():
        for path, (states, key) in present.items():
            if path in saved:
                states[key].copy_(saved[path])
            else:
                states[key] = numbers[path]


def load_random(folder: Path) -> None:
    """Sets the random generators as they were."""
    tensors, numbers = load_file(folder / _RANDOM), read_state(folder)["random"]
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, state, following = numbers["python"]
    random.setstate((version, tuple(state), following))
    kind, keys, *rest = numbers["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that training changes, or may."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    yield from model.named_buffers()


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors, each with memory of its own, as the format wants it."""
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with disk_errors():
        save_file(own, path)


@contextmanager
def disk_errors() -> Iterator[None]:
    """What safetensors says of a disk that cannot be written to becomes an OSError, as everybody else raises it."""
    try:
        yield
    except SafetensorError as error:
        reason = str(error).partition("I/O error: ")[2]
        if not reason:
            raise
        raise OSError(reason.partition(" (os error")[0]) from error


def _named_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[dict[str, Any], str]]:
    """Where the optimizer keeps each state: the dictionary and the key, by ``parameter/state``."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for name, parameter in model.named_parameters():
        states = optimizer.state.get(parameter, {})
        found |= {f"{name}/{key}": (states, key) for key in states}
    return found


def _random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
