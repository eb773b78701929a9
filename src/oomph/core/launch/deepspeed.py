"""What a DeepSpeed configuration does to memory, from its file, or from its name where the file is not here."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from oomph.errors import UserError
from oomph.records import Optimizer, Sharding
from oomph.units import MIB

_MOST_BYTES = MIB
_BY_NAME = re.compile(r"(?:zero|stage|ds_z)[_-]?([0123])", re.IGNORECASE)
_STAGES: dict[int, Sharding] = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}


class DeepSpeed(NamedTuple):
    """A configuration of DeepSpeed: sharding and offload, its own optimizer if it names one, and notes on the rest."""

    sharding: Sharding
    optimizer_offload: bool
    optimizer: Optimizer | None
    notes: tuple[str, ...]


def read_deepspeed(name: str, script: Path) -> DeepSpeed:
    """The configuration of that name, beside the script or where the training would be started.

    Raises:
        UserError: the file is here and no DeepSpeed configuration, or it is not and its name does not say what it is.
    """
    path = _locate(name, script)
    if path is None:
        return _by_name(name)
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError("it is too large")
        content = json.loads(data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no DeepSpeed configuration: {error}", "--deepspeed names a JSON file") from None
    zero = content.get("zero_optimization", {}) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(zero, dict):
        raise UserError(f"{path} is no DeepSpeed configuration: it is no JSON object with objects in it")
    return _read(content, zero, path)


def _read(content: dict[str, Any], zero: dict[str, Any], path: Path) -> DeepSpeed:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in _STAGES:
        raise UserError(f"{path} has zero_optimization.stage {stage!r}, where DeepSpeed has 0, 1, 2 and 3")
    notes = []
    if _device(zero, "offload_param"):
        notes.append(f"{path.name} keeps weights in host memory (offload_param), which is not predicted")
    optimizer: Optimizer | None = None
    named = content.get("optimizer")
    if isinstance(named, dict):
        kind = str(named.get("type", ""))
        optimizer = "adamw-fused" if kind.lower() in ("adam", "adamw", "fusedadam") else None
        notes += [] if optimizer else [f"{path.name} has the optimizer {kind or 'without a type'}, which is taken as AdamW"]
    if isinstance(content.get("activation_checkpointing"), dict):
        notes.append(f"{path.name} has activation_checkpointing, which Hugging Face models do not look at")
    offloads = _device(zero, "offload_optimizer") or zero.get("cpu_offload") is True
    return DeepSpeed(_STAGES[stage], offloads, optimizer, tuple(notes))


def _device(zero: dict[str, Any], name: str) -> bool:
    section = zero.get(name)
    return isinstance(section, dict) and section.get("device", "cpu") != "none"


def _by_name(name: str) -> DeepSpeed:
    """``zero2.json``, ``zero3_offload.json``, ``deepspeed_zero2.json``: the names that these projects ship."""
    bare = PurePath(name).name
    match = _BY_NAME.search(bare)
    if match is None:
        raise UserError(
            f"--deepspeed {name} is not here, and its name does not say which stage of ZeRO it is",
            "put the file beside the script, or set sharding=zero2",
        )
    offloads = "offload" in bare.lower()
    how = f"ZeRO-{match[1]}{' with its optimizer in host memory' if offloads else ''}"
    return DeepSpeed(_STAGES[int(match[1])], offloads, None, (f"{bare} is not beside the script; by its name it is {how}",))


def _locate(name: str, script: Path) -> Path | None:
    """The file: where the name leads, or beside the script and in the folders above it, by its path or by its bare name."""
    given = Path(os.path.expanduser(name))
    folders = [script.absolute().parent, *list(script.absolute().parents)[1:5]]
    candidates = [given, *(folder / given for folder in folders), script.absolute().parent / given.name]
    try:
        return next((path for path in candidates if path.is_file()), None)
    except (OSError, ValueError):
        return None
