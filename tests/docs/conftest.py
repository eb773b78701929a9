"""The pages as data: their fenced blocks, tables and links, and a way to run the commands that they show."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CUT = "[...]"
PROMPT = "$ "


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line, its text without the fences."""

    language: str
    line: int
    text: str


class Shown(NamedTuple):
    """A command that a page shows, and what it prints there; nothing where the page shows the command alone."""

    line: int
    command: str
    output: str


@dataclass(frozen=True)
class Page:
    """A Markdown file, by its path from the top folder."""

    path: Path
    text: str

    def blocks(self, language: str) -> list[Block]:
        """The fenced blocks of a language."""
        found = re.finditer(r"^```(\w*)\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        return [Block(m[1], self.text.count("\n", 0, m.start(2)) + 1, m[2]) for m in found if m[1] == language]

    def commands(self) -> list[Shown]:
        """Every command in the blocks of language ``console``."""
        return [shown for block in self.blocks("console") for shown in _commands(block)]

    def section(self, heading: str) -> str:
        """The text below a heading, up to the next one."""
        found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", self.text, re.MULTILINE | re.DOTALL)
        assert found, f"{self.path} has no heading {heading!r}"
        return found[1]

    def table(self, heading: str) -> list[list[str]]:
        """The rows of the table below a heading, without its head."""
        lines = [line for line in self.section(heading).splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]

    def headings(self) -> list[str]:
        """All headings."""
        outside = re.sub(r"^```.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)
        return re.findall(r"^#+ (.+)$", outside, re.MULTILINE)

    def links(self) -> list[str]:
        """The targets of all links that do not lead into the web."""
        return [target for target in re.findall(r"\]\(([^)]+)\)", self.text) if not target.startswith("http")]


def _commands(block: Block) -> Iterator[Shown]:
    lines = block.text.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if line.startswith(PROMPT)]
    assert starts[:1] == [0], f"line {block.line}: a block of commands begins with {PROMPT!r}"
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield Shown(block.line + start, lines[start].removeprefix(PROMPT).strip(), "".join(lines[start + 1 : end]))


def requote(quoted: str, output: str) -> str:
    """The quoted paragraphs as the output has them, with `CUT` wherever paragraphs between them are left out.

    Paragraphs are told by their words, whatever their numbers. A quotation that is up to date comes out unchanged.
    """
    paragraphs = output.removesuffix("\n").split("\n\n")
    wanted = [paragraph for paragraph in quoted.removesuffix("\n").split("\n\n") if paragraph != CUT]
    chosen: list[int] = []
    for paragraph in wanted:
        rest = range(chosen[-1] + 1 if chosen else 0, len(paragraphs))
        likeness = {at: difflib.SequenceMatcher(None, _words(paragraph), _words(paragraphs[at])).ratio() for at in rest}
        if likeness:
            chosen.append(max(likeness, key=lambda at: likeness[at]))
    kept: list[str] = []
    for before, at in zip([-1, *chosen], [*chosen, len(paragraphs)], strict=True):
        kept += [CUT] * (at > before + 1)
        kept += paragraphs[at : at + 1]
    return "\n\n".join(kept) + "\n"


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z_]+|─+", text)


class Reader:
    """Somebody who follows a page: runs its commands in one folder, and sees what they print but for their progress."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self._last = folder / "folder", 0
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in {"COLUMNS", "FORCE_COLOR", "OOMPH_DEBUG"}},
            "PYTHONIOENCODING": "utf-8",
        }
        self.folder.mkdir()
        (self.folder / "recipes").symlink_to(root / "recipes")

    def save(self, page: Page) -> list[Path]:
        """Writes the page's YAML and text blocks that begin with a file's name; returns the YAML files, which are recipes."""
        for block in page.blocks("text"):
            if name := re.match(r"# ([\w-]+\.txt)\n", block.text):
                (self.folder / name[1]).write_text(block.text[name.end() :], encoding="utf-8")
        saved = []
        for block in page.blocks("yaml"):
            if name := re.match(r"# ([\w-]+\.yaml)\n", block.text):
                saved.append(self.folder / name[1])
                saved[-1].write_text(block.text, encoding="utf-8")
        return saved

    def run(self, command: str) -> str:
        """What a command prints, to stderr and to stdout, without the lines that say what is being traced.

        Known are ``oomph``, with ``> FILE``, and ``echo $?``.
        """
        if command == "echo $?":
            return f"{self._last}\n"
        command, _, target = command.partition(" > ")
        program, *arguments = shlex.split(command)
        assert program == "oomph", f"a page shows what {program} prints, and nobody knows how to check that"
        done = subprocess.run(
            [sys.executable, "-m", "oomph", *arguments],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if target else subprocess.STDOUT,
            check=False,
        )
        self._last = done.returncode
        printed = re.sub(r"^tracing \d+ .*\n", "", done.stdout.decode(), flags=re.MULTILINE)
        if target:
            (self.folder / target).write_text(printed, encoding="utf-8")
        return "" if target else printed


@pytest.fixture(scope="session")
def pages(root: Path) -> dict[str, Page]:
    """Every page of the repository by its path from the top."""
    files = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("benchmarks/*.md")]
    found = [Page(file.relative_to(root), file.read_text(encoding="utf-8")) for file in sorted(files)]
    return {str(page.path): page for page in found}


@pytest.fixture(scope="module")
def reader(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Somebody with an empty folder."""
    return Reader(tmp_path_factory.mktemp("reader"), root)


@pytest.fixture(scope="session")
def follow() -> Callable[[Any, Any], None]:
    """A function that has a reader run every command whose output a page shows, and compares them."""

    def check(reader: Reader, page: Page) -> None:
        reader.save(page)
        for shown in page.commands():
            if shown.output or " > " in shown.command:
                printed = reader.run(shown.command)
                expected = requote(shown.output, printed) if CUT in shown.output else printed
                assert shown.output == expected, f"{page.path}, line {shown.line}: `{shown.command}` prints\n{expected}"

    return check


@pytest.fixture(scope="session")
def quoting() -> Callable[[str, str], str]:
    """The function `requote`."""
    return requote
