"""Checkpoints that are whole or not there: a run that is killed at any moment goes on from one that was verified.

A checkpoint is written into a folder beside its final name, every file is flushed to the disk, a manifest with sizes and
hashes comes last, and then the folder is renamed, which is one step for the file system. Older ones go only after the new one
has been read back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from oomph.errors import RunError

MANIFEST = "manifest.json"
_SCHEMA = 1
_BLOCK = 1 << 22
_PREFIX, _UNFINISHED, _REPLACED = "step-", ".unfinished-", ".replaced-"


class Checkpoints:
    """The checkpoints of a stage in one folder. One process writes there at a time.

    Args:
        folder: made when the first one is saved.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Saves what `write` puts into the folder that it is given; returns where it is then.

        Raises:
            RunError: the disk is full, or cannot be written to. Earlier checkpoints are as they were.
        """
        final = self._folder / f"{_PREFIX}{step:08d}"
        temporary = self._folder / f"{_UNFINISHED}{final.name}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clear()
            temporary.mkdir()
            write(temporary)
            _seal(temporary, step)
            self._put(temporary, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(
                f"the checkpoint of step {step} cannot be written to {self._folder}: {error.strerror or error}",
                "earlier checkpoints are as they were; make room or choose another --output, and go on with --resume",
            ) from error
        self._drop_old(final)
        return final

    def _clear(self) -> None:
        """Removes what an interrupted save has left; a checkpoint that was being replaced comes back."""
        for path in self._folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path)
        for path in self._folder.glob(f"{_REPLACED}*"):
            final = self._folder / path.name.removeprefix(_REPLACED)
            shutil.rmtree(path) if final.exists() else path.rename(final)

    def _put(self, temporary: Path, final: Path) -> None:
        replaced = self._folder / f"{_REPLACED}{final.name}"
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        _flush(self._folder)
        if replaced.exists():
            shutil.rmtree(replaced)

    def _drop_old(self, newest: Path) -> None:
        if problem := damage(newest):
            raise RunError(
                f"the checkpoint {newest} is not what was written: {problem}", "the disk may be failing; earlier ones are kept"
            )
        for path in self._saved()[self._keep :]:
            if path != newest:
                shutil.rmtree(path, ignore_errors=True)

    def _saved(self) -> list[Path]:
        """Folders with the name of a checkpoint, the latest step first."""
        found = [path for path in self._folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
        return sorted(found, key=lambda path: -int(path.name.removeprefix(_PREFIX)))

    def newest(self, notify: Callable[[str], None] = lambda sentence: None) -> Path | None:
        """The latest checkpoint that is whole; `notify` is told of those that are not."""
        if self._folder.is_dir():
            self._clear()
        for path in self._saved():
            problem = damage(path)
            if not problem:
                return path
            notify(f"checkpoint {path.name} is not used: {problem}")
        return None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in words; empty where every file has the size and the hash of the manifest."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != _SCHEMA:
            return f"it was written by another version, schema {manifest['schema']}"
        expected = {str(name): tuple(entry) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _digest(path) != digest:
            return f"{name} has another content than was written"
    return ""


def _seal(folder: Path, step: int) -> None:
    """Writes the manifest, and flushes everything to the disk."""
    files = {}
    for path in _files(folder):
        _flush(path)
        files[str(path.relative_to(folder))] = (path.stat().st_size, _digest(path))
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"schema": _SCHEMA, "step": step, "files": files}, indent=2) + "\n", encoding="utf-8")
    _flush(manifest)
    for path in [*(inner for inner in folder.rglob("*") if inner.is_dir()), folder]:
        _flush(path)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
