"""Reads weights with transformers, and says in words what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHOWN = 3


class Weights(NamedTuple):
    """What a folder gives.

    Attributes:
        model: in host memory; None where something is wrong.
        problems: what is, one sentence each.
        unused: weights in the files that the model has no place for.
    """

    model: PreTrainedModel | None
    problems: list[str]
    unused: list[str]


def read_weights(kind: Any, folder: Path, dtype: torch.dtype | str, config: PretrainedConfig | None = None) -> Weights:
    """The model in a folder, whole or not at all.

    Args:
        kind: a class with ``from_pretrained``.
        folder: with a configuration and safetensors files; others are not read.
        dtype: of the weights; ``auto`` for the folder's own.
        config: the configuration, where it is another than the folder's.
    """
    problems = _file_problems(folder)
    if problems:
        return Weights(None, problems, [])
    options: dict[str, Any] = {} if config is None else {"config": config}
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # whatever a model's own classes make of what the files hold
        text = " ".join(str(error).split()) or type(error).__name__
        return Weights(None, [f"transformers cannot load {folder}: {text}"], [])
    missing = sorted(info["missing_keys"])
    if missing:
        problems.append(f"{folder} lacks {len(missing)} weights of {type(model).__name__}: {_some(missing)}")
    for name, theirs, ours in sorted(info["mismatched_keys"]):
        problems.append(f"{folder}: the weight {name} is {list(theirs)}, and the model's is {list(ours)}")
    problems += [f"{folder}: {message}" for message in info["error_msgs"]]
    return Weights(None if problems else model, problems, sorted(info["unexpected_keys"]))


def _file_problems(folder: Path) -> list[str]:
    """What is wrong with the files before anything is read from them."""
    if (folder / _INDEX).is_file():
        try:
            content = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            names = sorted(set(content["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [f"{folder / _INDEX} is no index of weights"]
    elif (folder / _SINGLE).is_file():
        names = [_SINGLE]
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            return [f"{folder} holds weights as pickles alone ({_some(pickles)}), which run code when they are read"]
        return [f"{folder} holds no weights: there is no {_SINGLE}"]
    return [problem for name in names if (problem := _damage(folder / name))]


def _damage(path: Path) -> str:
    if not path.is_file():
        return f"{path} is missing, and the index beside it names it"
    try:
        with safe_open(path, framework="pt"):
            return ""
    except (SafetensorError, OSError) as error:
        return f"{path} cannot be read as safetensors: {error}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


@contextmanager
def quiet() -> Iterator[None]:
    """In the block transformers reports nothing and shows no progress: what matters is said in our words."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
