"""Small is kept small: lengths of functions and files, and a docstring on everything public."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

FUNCTION_LINES = 60
FILE_LINES = 500

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    """(dotted name, definition) of every function and class that stands in a module or a class."""
    for node in body:
        if isinstance(node, Definition):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, name)


def is_public(name: str) -> bool:
    """Whether no part of the dotted name starts with an underscore."""
    return not any(part.startswith("_") for part in name.split("."))


def undocumented(name: str, tree: ast.Module) -> list[str]:
    """The module itself and its public definitions that have no docstring."""
    public = [(name, tree), *((path, node) for path, node in definitions(tree.body, name) if is_public(path))]
    return [path for path, node in public if not (ast.get_docstring(node) or "").strip()]


def too_long(name: str, tree: ast.Module) -> list[str]:
    """The functions over the budget, nested ones included, with their lengths."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > FUNCTION_LINES]


def test_functions_are_short(modules: dict[str, Any]) -> None:
    found = [text for module in modules.values() for text in too_long(module.name, module.tree)]
    assert not found, f"split these, a function has at most {FUNCTION_LINES} lines:\n" + "\n".join(found)


def test_files_are_short(modules: dict[str, Any]) -> None:
    found = [f"{m.name}: {len(m.lines)} lines" for m in modules.values() if len(m.lines) > FILE_LINES]
    assert not found, f"split these, a file has at most {FILE_LINES} lines:\n" + "\n".join(found)


def test_everything_public_has_a_docstring(modules: dict[str, Any]) -> None:
    found = [text for module in modules.values() for text in undocumented(module.name, module.tree)]
    assert not found, "say in a docstring what these are:\n" + "\n".join(found)


def test_the_checks_find_what_they_look_for() -> None:
    body = "    x = 1\n" * FUNCTION_LINES
    tree = ast.parse(f"class C:\n    'Kept.'\n    def m(self): ...\n    def _n(self): ...\ndef long():\n{body}")
    assert too_long("m", tree) == [f"m.long: {FUNCTION_LINES + 1} lines"]
    assert undocumented("m", tree) == ["m", "m.C.m", "m.long"]
