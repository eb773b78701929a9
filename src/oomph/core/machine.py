"""What was seen outside the allocator on this machine's own cards: kept in the user's configuration folder.

The file is ``$XDG_CONFIG_HOME/oomph/machine.json``, by default in ``~/.config``. It has one constant for each card, driver
and version of torch. A plan takes those of its own version of torch in place of the catalogue's.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from oomph.errors import UserError
from oomph.records import Record

SCHEMA = 1


@dataclass(frozen=True)
class Constant(Record):
    """What one process holds of a card outside the caching allocator, in bytes.

    `name` is ``context`` or ``nccl``, the latter of a run on `gpus` GPUs. `gpu` is the catalogue's name of the card, where it
    has one. `low` and `high` are the lowest and the highest reading, `date` is that of the last one in ISO 8601.
    """

    gpu: str
    driver: str
    torch: str
    name: Literal["context", "nccl"]
    gpus: int
    low: int
    high: int
    date: str

    @property
    def bytes(self) -> int:
        """The figure to plan with."""
        return self.high


def machine_file() -> Path:
    """Where the constants are kept."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(base) / "oomph" / "machine.json"


def constants(file: Path | None = None) -> tuple[Constant, ...]:
    """All that is kept; nothing where there is no file.

    Raises:
        UserError: the file is damaged, or comes from another version.
    """
    path = machine_file() if file is None else file
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return ()
    return _read(path, changed)


def constant(gpu: str, torch: str, name: str, gpus: int = 1) -> Constant | None:
    """The latest constant of a card with a version of torch, whatever the driver; None where none was measured.

    Raises:
        UserError: as `constants` does.
    """
    found = [c for c in constants() if (c.gpu, c.torch, c.name, c.gpus) == (gpu, torch, name, gpus)]
    return max(found, key=lambda c: c.date, default=None)


def remember(seen: Constant, file: Path | None = None) -> None:
    """Adds a constant; one of the same card, driver and torch is widened to hold both.

    Raises:
        UserError: the file is damaged or comes from another version.
        OSError: it cannot be written.
    """
    path = machine_file() if file is None else file
    known = {_key(c): c for c in constants(path)}
    before = known.get(_key(seen), seen)
    known[_key(seen)] = replace(seen, low=min(before.low, seen.low), high=max(before.high, seen.high))
    body = json.dumps({"schema": SCHEMA, "constants": [c.to_json() for c in known.values()]}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
        try:
            part.write(body)
            part.flush()
            os.fsync(part.fileno())
            os.replace(part.name, path)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise
    _read.cache_clear()


def _key(seen: Constant) -> tuple[str, str, str, str, int]:
    return seen.gpu, seen.driver, seen.torch, seen.name, seen.gpus


@functools.cache
def _read(path: Path, changed: int) -> tuple[Constant, ...]:
    """The file's constants; `changed`, the time of its last change, makes the cache notice one."""
    try:
        data = json.loads(path.read_bytes())
        if data["schema"] != SCHEMA:
            raise ValueError(f"its schema is {data['schema']!r} and not {SCHEMA}")
        return tuple(Constant.from_json(item) for item in data["constants"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(
            f"{str(path)!r} does not hold what `oomph measure` writes there: {reason}",
            "delete the file; `oomph measure` writes it anew",
        ) from None
