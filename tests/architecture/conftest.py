"""The package's source, parsed once."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, where it is, its lines and its syntax tree."""

    name: str
    path: Path
    lines: list[str]
    tree: ast.Module


def parse(path: Path, source: Path) -> Module:
    """The module at `path`, named as it is imported from the folder `source`."""
    parts = path.relative_to(source).with_suffix("").parts
    text = path.read_text(encoding="utf-8")
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, path, text.splitlines(), ast.parse(text, filename=str(path)))


@pytest.fixture(scope="session")
def modules(root: Path) -> dict[str, Module]:
    """Every module of the package by its name."""
    source = root / "src"
    parsed = [parse(path, source) for path in sorted(source.rglob("*.py"))]
    assert parsed, f"there is no Python file below {source}"
    return {module.name: module for module in parsed}
