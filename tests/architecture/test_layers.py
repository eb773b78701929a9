"""Data flows one way: a module may import what lies below it, and third-party packages only where its layer has them."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# From the bottom to the top. The words stand in their own order; a folder is one layer.
WORDS = ["oomph.units", "oomph.errors", "oomph.record", "oomph.records", "oomph.run_records"]
WORDS += ["oomph.diagnosis_records", "oomph.recipe"]
MAY_IMPORT = {
    "oomph.units": [],
    "oomph.errors": WORDS[:1],
    "oomph.record": WORDS[:2],
    "oomph.records": WORDS[:3],
    "oomph.run_records": WORDS[:4],
    "oomph.diagnosis_records": WORDS[:4],
    "oomph.recipe": WORDS,
    "oomph.core": [*WORDS, "oomph.core"],
    "oomph.live": [*WORDS, "oomph.core", "oomph.live"],
    "oomph.report": [*WORDS, "oomph.report"],
    "oomph": WORDS,
    "oomph.cli": [*WORDS, "oomph.core", "oomph.live", "oomph.report", "oomph"],
    "oomph.__main__": ["oomph.cli"],
}
THIRD_PARTY = {
    "oomph.recipe": {"pydantic", "pydantic_core", "yaml"},
    "oomph.core": {"numpy"},
    "oomph.live": {"PIL", "jinja2", "numpy", "safetensors", "torch", "transformers"},
    "oomph.report": {"jinja2", "matplotlib", "rich"},
    "oomph.cli": {"rich", "typer"},
}


def layer(name: str) -> str | None:
    """The longest entry of `MAY_IMPORT` that is the module or a folder above it; the top package counts for itself alone."""
    candidates = [entry for entry in MAY_IMPORT if name == entry or (entry != "oomph" and name.startswith(f"{entry}."))]
    return max(candidates, key=len, default=None)


def imports(tree: ast.AST, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands; ``from package import module`` counts as the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in known else str(node.module)


def complaints(name: str, tree: ast.AST, known: set[str]) -> list[str]:
    """What the module imports and its layer may not, in words."""
    own = layer(name)
    if own is None:
        return [f"{name} belongs to no layer: give it a place in MAY_IMPORT"]
    found = []
    for line, target in imports(tree, known):
        top = target.partition(".")[0]
        if top == "oomph" and layer(target) not in MAY_IMPORT[own]:
            found.append(f"{name}:{line} imports {target}, which does not lie below {own}")
        elif top != "oomph" and top not in sys.stdlib_module_names and top not in THIRD_PARTY.get(own, set()):
            found.append(f"{name}:{line} imports {target}, which {own} has to do without")
    return found


def test_imports_go_down_only(modules: dict[str, Any]) -> None:
    found = [text for module in modules.values() for text in complaints(module.name, module.tree, set(modules))]
    assert not found, "imports against the direction:\n" + "\n".join(found)


def test_modules_do_not_import_each_other_in_a_circle(modules: dict[str, Any]) -> None:
    graph = {
        name: {target for _, target in imports(module.tree, set(modules)) if target in modules and target != name}
        for name, module in modules.items()
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("oomph.units", "import oomph.errors"),
        ("oomph.errors", "from oomph import records"),
        ("oomph.records", "import pydantic"),
        ("oomph.core.plan", "import torch"),
        ("oomph.core.plan", "def f():\n    from torch.nn import functional"),
        ("oomph.core.plan", "from oomph.live.trace import trace"),
        ("oomph.live.trace", "from oomph.report import text"),
        ("oomph.live.trace", "import oomph.cli"),
        ("oomph.report.text", "from oomph.core import predict"),
        ("oomph.report.text", "from oomph import Plan"),
        ("oomph", "from oomph.core.plan import plan"),
        ("oomph.cli", "import torch"),
        ("oomph.elsewhere", "import os"),
    ],
)
def test_an_import_against_the_direction_is_found(name: str, line: str) -> None:
    assert complaints(name, ast.parse(line), {"oomph", "oomph.core.predict", "oomph.records", "oomph.report"})


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("oomph.records", "import json, oomph.units"),
        ("oomph.core.plan", "from oomph.core.events import Events"),
        ("oomph.core.plan", "import numpy as np"),
        ("oomph.live.trace", "from torch.utils._python_dispatch import TorchDispatchMode"),
        ("oomph.cli", "from oomph.live import trace"),
    ],
)
def test_an_import_downwards_passes(name: str, line: str) -> None:
    assert not complaints(name, ast.parse(line), set())
