"""Measured rows that are kept: a file of JSON lines to which every `oomph measure --keep` appends, one line for each rung."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from oomph.core.catalogue import find_model
from oomph.errors import UserError
from oomph.recipe import Parts, Recipe
from oomph.records import SCHEMA, Measurement

KIND = "measured row"
_ROOM = 1 << 20
"""Bytes that the disk must have left before anything is measured; a row takes a few thousand."""


class Row(NamedTuple):
    """One line: the recipe as JSON, with the configurations of models that only the user has, and one rung's measurement."""

    recipe_digest: str
    recipe: dict[str, Any]
    configurations: dict[str, Any]
    measurement: Measurement

    def to_json(self) -> dict[str, Any]:
        """The line's object."""
        return {"schema": SCHEMA, "kind": KIND, **self._asdict(), "measurement": self.measurement.to_json()}


def rows_of(recipe: Recipe, measurement: Measurement) -> list[Row]:
    """A measurement as rows, one for each rung.

    A model that is a folder of the user's is named by the folder's last name, its configuration beside it.
    """
    content, configurations = _portable(recipe)
    digest = hashlib.sha256(json.dumps([content, configurations], sort_keys=True).encode()).hexdigest()
    parts = [replace(stage, rungs=(rung,)) for stage in measurement.stages for rung in stage.rungs]
    return [Row(digest, content, configurations, replace(measurement, stages=(part,))) for part in parts]


def parse_row(line: bytes | str) -> Row:
    """The row that a line holds.

    Raises:
        ValueError: it is no such line, or comes from another version.
    """
    data = json.loads(line)
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise ValueError("it is no measured row")
    if data.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {data.get('schema')!r}, and this version reads {SCHEMA}")
    missing = {"recipe_digest", "recipe", "configurations", "measurement"} - data.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    measurement = Measurement.from_json(data["measurement"])
    return Row(data["recipe_digest"], data["recipe"], data["configurations"], measurement)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file.

    Raises:
        UserError: it cannot be read, or a line is no measured row.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            rows.append(parse_row(line))
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{str(path)!r} holds no measured rows: line {number}: {reason}",
                "name a new file, or one that `oomph measure --keep` has written",
            ) from None
    if content and not content.endswith(b"\n"):
        raise UserError(f"the last line of {str(path)!r} has no end", "add the line break that is missing, or remove the line")
    return rows


class Kept:
    """A file that a recipe's rows are appended to. Whoever appends holds its lock, and writes whole lines or nothing.

    Args:
        recipe: as it was asked for.
        path: a new file, or one that holds such rows.
        notify: told in a sentence when a row cannot be written.

    Attributes:
        lost: whether a row could not be written.

    Raises:
        UserError: the file is none of ours, cannot be written, or its disk is full.
    """

    def __init__(self, recipe: Recipe, path: Path, notify: Callable[[str], None] = lambda sentence: None) -> None:
        self.path, self.lost, self._recipe, self._notify = path, False, recipe, notify
        hint = "name a file in a folder that can be written"
        try:
            with self._opened() as descriptor:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise UserError(f"{str(path)!r} is not a file that rows can be appended to", hint)
                disk = os.fstatvfs(descriptor)
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be written: {error.strerror}", hint) from None
        if disk.f_bavail * disk.f_frsize < _ROOM:
            raise UserError(f"{str(path)!r} cannot be appended to: its disk is full", hint)
        read_rows(path)

    def keep(self, measurement: Measurement) -> None:
        """Appends a measurement's rows, and returns when they are on the disk. Where that fails, the file stays as it was."""
        try:
            for row in rows_of(self._recipe, measurement):
                self._append(row)
        except OSError as error:
            self.lost = True
            self._notify(f"a row is not kept: {str(self.path)!r} cannot be written: {error.strerror or error}")

    def _append(self, row: Row) -> None:
        line = (json.dumps(row.to_json(), separators=(",", ":")) + "\n").encode()
        with self._opened() as descriptor:
            before = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, before)
                raise

    @contextmanager
    def _opened(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def _portable(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe as JSON without paths of this machine, and the configurations of the folders that it named."""
    content = recipe.model_dump(mode="json", exclude_unset=True)
    configurations: dict[str, Any] = {}

    def named(model: str) -> str:
        folder = Path(os.path.expanduser(model))
        if find_model(model) != folder:
            return model
        name = folder.resolve().name
        configurations[name] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return name

    if isinstance(recipe.model, Parts):
        content["model"] |= {"vision": named(recipe.model.vision), "language": named(recipe.model.language)}
    else:
        content["model"] = named(recipe.model)
    return content, configurations
