"""A pasted text as plain lines: without colours, markup, timestamps and prefixes, each with its rank where it has one."""

from __future__ import annotations

import html
import re
from typing import NamedTuple

from oomph.errors import UserError

_ANSI = re.compile(r"\x1b(?:\[[0-9;?]{0,32}[ -/]?[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|[@-Z\\-_])")
_TAG = re.compile(
    r"<(?:/?(?:span|p|pre|code|div|b|i|em|strong|font|td|tr|li|blockquote)(?: [^<>\n]{0,200})?|br ?/?)>", re.IGNORECASE
)
_ENTITY = re.compile(r"&(?:gt|lt|amp|quot|nbsp|#\d{1,5}|#x[0-9a-fA-F]{1,4});")
_ESCAPED = re.compile(r"\\r?\\?n(?=\s{0,8}(?:File|Traceback|torch|Runtime|CUDA|\S{0,20}Error|during|return))", re.IGNORECASE)
_PREFIXES = re.compile(
    r"""\s{0,4}(?:
      \[(?:rank|default|gpu|node|local_rank|worker)[ :=]?(?P<a>\d{1,5})\]\s?:?                # torchrun, PyTorch's [rank0]:
    | (?:rank|worker|local_rank)[ =:_-]?(?P<b>\d{1,5})\s{0,2}[:|\]]                            # rank 0: and rank0 |
    | \[\d{1,5},(?P<c>\d{1,5})\]<(?:stdout|stderr|stddiag)>:                                   # Open MPI's --tag-output
    | (?P<d>\d{1,5}):(?!\d\d[:.])(?=\s?(?:Traceback|torch|Runtime|[\w.]{1,60}Error|\s{2,}\S))  # srun --label
    | \((?:[\w.]{1,60}\s)?pid=\d{1,8}(?:,\sip=[\d.]{1,20})?\)                                  # Ray
    | \[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|\s?[+-]\d\d:?\d\d)?\]?\s{0,2}[:|-]?  # ISO 8601, Docker
    | [A-Z][a-z]{2}\s{1,2}\d{1,2}\s\d\d:\d\d:\d\d\s(?:[\w.-]{1,64}\s(?=kernel:))?(?:kernel:\s?)?   # syslog
    | \[(?:INFO|ERROR|WARNING|WARN|DEBUG|CRITICAL)\]:?
    | (?:INFO|ERROR|WARNING|WARN|DEBUG|CRITICAL)\s{0,3}[:|]
    | \[\s{0,6}\d{1,7}\.\d{6}\]                                                               # dmesg
    | \[\d{2}:\d{2}:\d{2}(?:\.\d{1,6})?\]
    | >(?=\s)                                                                                  # a quotation
    | [\w.-]{1,80}\s{1,8}\|(?=\s)                                                              # docker compose
    )""",
    re.VERBOSE,
)
_MOST_PREFIXES = 6


class Line(NamedTuple):
    """A line without its prefixes, its number in the text from 1, and the rank that printed it."""

    text: str
    number: int
    rank: int | None


def decode(content: bytes, name: str) -> str:
    """The text in a file's content.

    Raises:
        UserError: it is empty, or no text.
    """
    if not content.strip(b"\0 \t\r\n\xef\xbb\xbf\xff\xfe"):
        raise UserError(f"{name} is empty", "paste the error message, with the traceback above it, into a file")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    start = content[:4096]
    if b"\0" in start:
        if start[1::2].count(0) >= 0.8 * (len(start) // 2) > 1.6 * start[::2].count(0):
            return content.decode("utf-16-le", "replace")
        raise UserError(f"{name} is a binary file", "explain reads the text that a program printed")
    return content.decode("utf-8-sig", "replace")


def clean_lines(text: str) -> list[Line]:
    """The lines of a text; what carriage returns overwrite stands on lines of its own."""
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    if "\\n" in text:
        text = _ESCAPED.sub("\n", text)
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if "&" in line and _ENTITY.search(line):
            line = html.unescape(line)
        if "<" in line:
            line = _TAG.sub(" ", line)
        found.append(_stripped(line, number))
    return found


def _stripped(line: str, number: int) -> Line:
    rank: int | None = None
    position = 0
    for _ in range(_MOST_PREFIXES):
        match = _PREFIXES.match(line, position)
        if match is None:
            break
        position = match.end()
        given = next((value for value in match.groups() if value is not None), None)
        rank = int(given) if given is not None and rank is None else rank
    return Line(line[position:] if position else line, number, rank)
