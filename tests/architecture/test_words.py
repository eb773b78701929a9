"""The repository speaks of the project alone: nothing in it points at the machine it was written on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FOLDERS = [".ci", "benchmarks", "docs", "recipes", "src", "tests"]
FOREIGN = {
    "a folder of one machine": re.compile("(?<![A-Za-z0-9_.~])/(?:work|tmp|root|home|Users)/"),
    "a package index": re.compile(r"\b(?:pypi|pythonhosted)\.org\b"),
    "a merge that was not finished": re.compile("^(?:<{7}|>{7}) ", re.MULTILINE),
}


def texts(root: Path) -> Iterator[tuple[Path, str]]:
    """Every text file of the repository: what stands at the top, and below the project's folders."""
    candidates = [*root.iterdir(), *(path for folder in FOLDERS for path in (root / folder).rglob("*"))]
    for path in candidates:
        if path.is_file() and "__pycache__" not in path.parts:
            data = path.read_bytes()
            if b"\0" not in data:
                yield path.relative_to(root), data.decode("utf-8")


def foreign(text: str) -> list[str]:
    """What in the text does not belong."""
    return [what for what, pattern in FOREIGN.items() if pattern.search(text)]


def test_no_file_holds_words_that_do_not_belong(root: Path) -> None:
    found = [f"{path}: {what}" for path, text in texts(root) for what in foreign(text)]
    assert not found, "\n".join(found)


def test_the_check_finds_what_it_looks_for() -> None:
    assert foreign("cp " + "/".join(["", "root", "recipe.yaml"]) + " .") == ["a folder of one machine"]
    assert foreign("https://" + ".".join(["pypi", "org"]) + "/simple") == ["a package index"]
    assert foreign("<" * 7 + " HEAD") == ["a merge that was not finished"]
    assert not foreign("https://example.org/tmp/file, ~/home/x and src/work/")
