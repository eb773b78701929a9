"""Data files as they lie on the disk: which bytes each record has, so that none has to stay in memory."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oomph.recipe.schema import DataFile

Numbers = NDArray[np.int64]
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_FORMS = "a file of samples is a JSON list, or has one JSON object on each line"


class Index(NamedTuple):
    """Where a file's records are: the first byte of each and the byte after it, and the line of each in JSONL.

    A JSON list has no lines; there the numbers count from 0.
    """

    starts: Numbers
    ends: Numbers
    numbers: Numbers
    is_list: bool


class Source:
    """A data file with its index.

    Attributes:
        name: the file as the recipe names it.
        path: the file.
        images: the folder that its images lie in.
        weight: how often an epoch holds each sample.
        sha256: of the file's bytes, so that a later run can tell that they changed.
        index: where the records are; of a file that cannot be indexed whole, those before the mistake.
        problem: the mistake, or an empty string.
    """

    def __init__(self, file: DataFile) -> None:
        """Hashes a file of samples.

        Raises:
            OSError: the file cannot be read.
        """
        self.name, self.path, self.weight = file.path, Path(file.path).expanduser(), file.weight
        self.images = self.path.parent if file.images is None else Path(file.images).expanduser()
        with open(self.path, "rb") as opened:
            self.sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        self.index, self.problem = Index(*(np.zeros(0, np.int64),) * 3, is_list=False), ""

    def scan(self) -> None:
        """Indexes the file.

        Raises:
            OSError: the file cannot be read.
        """
        self.index, self.problem = _scan(self.path)

    def __len__(self) -> int:
        return len(self.index.starts)

    def place(self, number: int) -> str:
        """Where a record stands, as ``train.json[3]`` in a list (from 0) or ``train.jsonl:4`` by its line (from 1)."""
        at = int(self.index.numbers[number])
        return f"{self.name}[{at}]" if self.index.is_list else f"{self.name}:{at}"

    def records(self, first: int, last: int) -> Iterator[Any]:
        """The values of the records from `first` to before `last`, a ValueError in the place of one that cannot be read.

        Raises:
            OSError: the file cannot be read any more.
        """
        with open(self.path, "rb") as opened:
            for start, end in zip(self.index.starts[first:last], self.index.ends[first:last], strict=True):
                opened.seek(int(start))
                yield _value(opened.read(int(end - start)))


def _value(raw: bytes) -> Any:
    """The value of a record, or a ValueError that says in words why there is none."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"it is not UTF-8 text: byte {error.start} of the sample is no character of it")
    except RecursionError:
        return ValueError("it is nested too deeply")
    except json.JSONDecodeError as error:
        return ValueError(f"it is not valid JSON: {error.msg} at column {error.pos + 1}")


def _scan(path: Path) -> tuple[Index, str]:
    with open(path, "rb") as opened:
        bom = len(_BOM) if opened.read(len(_BOM)) == _BOM else 0
        opened.seek(bom)
        head = b""
        while not head and (line := opened.readline()):
            head = line.strip()
        if head[:1] == b"[":
            opened.seek(bom)
            # As Latin-1 each byte is one character, and JSON's own marks are the same in it as in UTF-8.
            return _scan_list(opened.read().decode("latin-1"), bom)
    if head == b"{":
        return _index([], is_list=False), f"its first line is a lone brace; {_FORMS}"
    if head and head[:1] != b"{":
        return _index([], is_list=False), f"it begins with {head[:20].decode('utf-8', 'replace')!r}; {_FORMS}"
    return _scan_lines(path, bom)


def _scan_lines(path: Path, bom: int) -> tuple[Index, str]:
    found: list[tuple[int, int, int]] = []
    end = bom
    with open(path, "rb") as opened:
        opened.seek(bom)
        for number, line in enumerate(opened, start=1):
            start, end = end, end + len(line)
            if line.strip():
                found.append((start, start + len(line.rstrip()), number))
    return _index(found, is_list=False), ""


def _scan_list(text: str, offset: int) -> tuple[Index, str]:
    """The index of a JSON list: its values are read one after the other, and none is kept."""
    decoder, found = json.JSONDecoder(), list[tuple[int, int, int]]()
    at = _after_space(text, text.index("[") + 1)
    try:
        while text[at : at + 1] != "]" or found:
            _, end = decoder.raw_decode(text, at)
            found.append((offset + at, offset + end, len(found)))
            at = _after_space(text, end)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']' after a sample", text, at)
            at = _after_space(text, at + 1)
        if (rest := _after_space(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data after the list", text, rest)
    except json.JSONDecodeError as error:
        return _index(found, is_list=True), f"it is not valid JSON: {error.msg}, line {error.lineno} column {error.colno}"
    except RecursionError:
        return _index(found, is_list=True), f"its sample {len(found)} is nested too deeply"
    return _index(found, is_list=True), ""


def _after_space(text: str, at: int) -> int:
    matched = _SPACE.match(text, at)
    assert matched
    return matched.end()


def _index(found: list[tuple[int, int, int]], is_list: bool) -> Index:
    table = np.array(found, np.int64).reshape(-1, 3)
    return Index(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy(), is_list)
