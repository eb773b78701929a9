"""README.md is true: its tree is the repository's, its commands run, its screens are what they print."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from oomph import cli
from oomph.records import SCHEMA

INDENT = 2
JSON_PAGE = "docs/plan-json.md"


def listed(tree: str) -> Iterator[str]:
    """The paths of a tree: a line has a name, two spaces or more, and a description; folders end with a slash."""
    above: list[str] = []
    for line in tree.splitlines():
        entry = re.fullmatch(r"( *)(\S+)  +\S.*", line)
        assert entry, f"a line of the tree is no name and description: {line!r}"
        above = [*above[: len(entry[1]) // INDENT], entry[2]]
        yield "".join(above)


def test_the_tree_is_the_repository(root: Path, pages: dict[str, Any]) -> None:
    (block,) = pages["README.md"].blocks("text")
    shown = list(listed(block.text))
    missing = [path for path in shown if not (root / path).exists() or path.endswith("/") != (root / path).is_dir()]
    assert not missing, f"the tree shows what is not there: {missing}"
    assert len(shown) == len(set(shown))
    unlisted = sorted(set(expected(root)) - set(shown))
    assert not unlisted, f"the tree of README.md lacks {unlisted}"


def expected(root: Path) -> Iterator[str]:
    """What the tree has to show: the top of the repository, modules and folders of the package, pages, folders of tests."""
    ignored = [*(root / ".gitignore").read_text(encoding="utf-8").split(), ".git/"]
    for path in root.iterdir():
        name = path.name + "/" * path.is_dir()
        if not any(fnmatch(name, pattern) for pattern in ignored) and name != "src/":
            yield name
    for path in (root / "src" / "oomph").rglob("*.py"):
        yield _relative(root, path if path.name != "__init__.py" or path.parent.name == "oomph" else path.parent)
    for folder in ("docs", "recipes", "tests"):
        for path in (root / folder).iterdir():
            if path.is_dir() and any(file.suffix != ".pyc" for file in path.rglob("*.*")):
                yield _relative(root, path)
            elif path.suffix == ".md":
                yield _relative(root, path)


def _relative(root: Path, path: Path) -> str:
    return f"{path.relative_to(root)}{'/' * path.is_dir()}"


def test_a_tree_is_read_as_it_is_meant() -> None:
    assert list(listed("a/   x y\n  b/  z\n    c  d\n  e  f\ng.h  i\n")) == ["a/", "a/b/", "a/b/c", "a/e", "g.h"]
    with pytest.raises(AssertionError):
        list(listed("a without a description\n"))


@pytest.mark.slow
def test_the_screens_are_what_the_program_prints(pages: dict[str, Any], reader: Any, follow: Callable[..., None]) -> None:
    page = pages["README.md"]
    assert sum(bool(shown.output) for shown in page.commands()) == 2
    follow(reader, page)


@pytest.mark.slow
def test_the_example_for_scripts_reads_what_the_program_writes(pages: dict[str, Any], reader: Any) -> None:
    (command,), (example,) = pages[JSON_PAGE].commands(), pages[JSON_PAGE].blocks("python")
    reader.run(command.command)
    before = os.getcwd()
    os.chdir(reader.folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(example.text, JSON_PAGE, "exec"), {})
    finally:
        os.chdir(before)
    written = json.loads((reader.folder / "plan.json").read_text(encoding="utf-8"))
    (stage,) = written["stages"]
    prediction, request = stage["prediction"], stage["prediction"]["failing_request"]
    assert printed.getvalue() == f"finetune {prediction['fits']} {prediction['allocated_peak_bytes']}\n"
    assert written["schema"] == SCHEMA
    assert request["in_use_bytes"] + request["bytes"] > prediction["usable_bytes"] > request["reserved_bytes"]
    assert sum(prediction["by_role"].values()) == sum(prediction["by_module"].values()) == request["in_use_bytes"]
    assert sum(prediction["outside"].values()) == prediction["outside_bytes"]
    assert stage["samples_tokens"] == 2048 - 1 + stage["image_tokens"]


def test_a_quotation_is_followed_to_the_letter(quoting: Callable[[str, str], str]) -> None:
    output = "a 1\n\nall of it: 17 bytes\nmore\n\nlast words\n\nend\n"
    assert quoting("a 1\n\n[...]\n\nend\n", output) == "a 1\n\n[...]\n\nend\n"
    assert quoting("a 2\n\n[...]\n\nlast words\n", output) == "a 1\n\n[...]\n\nlast words\n\n[...]\n"
    assert quoting("[...]\n\nall of it: 16 bytes\n\n[...]\n", output) == "[...]\n\nall of it: 17 bytes\nmore\n\n[...]\n"
    assert quoting("a 1\n\nall of it: 17 bytes\nmore\n\nend\n", output) == "a 1\n\nall of it: 17 bytes\nmore\n\n[...]\n\nend\n"
    assert quoting("[...]\n\nend\n", output) == "[...]\n\nend\n"


def test_makefile_has_the_targets_that_the_pages_name(root: Path, pages: dict[str, Any]) -> None:
    targets = set(re.findall(r"^(\w+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for page in pages.values() for target in re.findall(r"(?:`|\$ )make (\w+)", page.text)}
    assert {"demo", "test", "bench"} <= named <= targets


def test_exit_codes_are_those_of_the_command_line(pages: dict[str, Any]) -> None:
    documented = {int(code) for code, _ in pages["README.md"].table("For scripts")}
    assert documented == {int(code) for code in re.findall(r"(\d+): ", cli.run.__doc__ or "")}


def test_every_exit_code_has_its_heading(pages: dict[str, Any]) -> None:
    page = pages["docs/errors-and-exit-codes.md"]
    codes = [int(code) for code, *_ in page.table("Errors and exit codes")]
    assert [int(heading.partition(":")[0]) for heading in page.headings()[1:]] == codes
    assert set(codes) == {int(code) for code in re.findall(r"(\d+): ", cli.run.__doc__ or "")}


def test_numbers_in_the_table_of_comparisons(root: Path, pages: dict[str, Any]) -> None:
    folder = root / "tests" / "measured"
    text = pages["README.md"].section("What it predicts")
    traces = [json.loads(gzip.decompress(file.read_bytes())) for file in (folder / "allocator-traces").glob("*.gz")]
    requests = sum(action == "a" for trace in traces for action, *_ in trace["events"])
    assert len(traces) == 3
    assert f"three snapshots of real GPU runs, {requests:,} requests" in text
    compared = pages["docs/accuracy.md"].table("16-bit weights")
    assert all(error == "+0" for row in compared for error in row[3:])
    every = f"equal to the byte in all {len(compared)} configurations with 16-bit weights"
    assert f"{every}, reserved bytes and every phase too" in text
    assert f"in {len(json.loads((folder / 'sharding.json').read_text(encoding='utf-8'))['rows'])} layouts" in text
