"""Two messages that two processes wrote into one line at the same time, character by character, are told apart.

Both follow one wording, so the line is read by two copies of it at once: every character goes on in one of them. Of all ways to
read the line the one is taken in which the most sizes are the same in both, as those of two ranks mostly are, and then the one
that changes least often between the two, as processes write in pieces. Digits that differ may still come out exchanged.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

_OLD = (
    "CUDA out of memory. Tried to allocate @ (GPU #; @ total capacity; @ already allocated; @ free; "
    "@ reserved in total by PyTorch)"
)
_OLD_ADVICE = (
    " If reserved memory is >> allocated memory try setting max_split_size_mb to avoid fragmentation.  "
    "See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF"
)
_NEW = (
    "CUDA out of memory. Tried to allocate @. GPU # has a total {} of @ of which @ is free. Including non-PyTorch memory, "
    "this process has @ memory in use. Of the allocated memory @ is allocated by PyTorch, and @ is reserved by PyTorch but "
    "unallocated."
)
_NEW_ADVICE = (
    " If reserved but unallocated memory is large try setting max_split_size_mb to avoid fragmentation.  "
    "See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF",
    " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid "
    "fragmentation.  See documentation for Memory Management  "
    "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)",
)
WORDINGS = (
    _OLD + _OLD_ADVICE,
    _OLD,
    _NEW.format("capacty") + _NEW_ADVICE[0],
    _NEW.format("capacity") + _NEW_ADVICE[1],
)
"""The wordings that are told apart: ``@`` is a size with two decimals, ``#`` a number."""

_CLASSES = ("torch.cuda.OutOfMemoryError: ", "torch.OutOfMemoryError: ", "RuntimeError: ", "")
_LONGEST, _SHORTEST, _MOST_STATES, _MOST_ORDERS = 2_400, 120, 20_000, 24
_SIZE = re.compile(r"\d{1,9}\.\d\d [GMKT]iB")
_DIGITS = frozenset("0123456789")
_STEP = tuple[int, int, int]


def looks_tangled(line: str) -> bool:
    """Whether a line can be two messages in one: it holds all letters of one twice over, and is not too long to be tried."""
    if not _SHORTEST <= len(line) <= _LONGEST:
        return False
    return all(line.count(letter) >= 2 for letter in "CUDAPT") and _holds(line, "CUDA out of memory. Tried to allocate ")


def untangle(line: str) -> list[str]:
    """The two messages that a line is made of; empty where it is not made of two."""
    text = line.strip()
    turns = [text[::2], text[1::2]]
    if all("CUDA out of memory. Tried to allocate " in message for message in turns):
        return turns
    for wording in WORDINGS:
        least = 2 * sum(1 if symbol == "#" else 7 if symbol == "@" else 1 for symbol in wording)
        for name in _CLASSES:
            most = least + 2 * len(name) + 60
            if least + 2 * len(name) <= len(text) <= most:
                found = _read(text, _symbols(name + wording))
                if found:
                    return _agreeing(text, name + wording, found)
    return []


def _agreeing(text: str, wording: str, found: list[str]) -> list[str]:
    """The reading of a line in which as many sizes as possible are the same in both messages, the first ones first."""
    for number in range(wording.count("@")):
        sizes = [_SIZE.findall(message) for message in found]
        for size in _candidates(sizes[0][number], sizes[1][number]):
            parts = wording.split("@", 1)
            read = _read(text, _symbols(parts[0] + size + parts[1]))
            if read:
                wording, found = parts[0] + size + parts[1], read
                break
        else:
            wording = wording.replace("@", "\0", 1)
    return found


def _candidates(first: str, second: str) -> list[str]:
    """Sizes that both messages may have had, where two were read with their digits mixed."""
    found = [first, second]
    pool = Counter(letter for letter in first + second if letter.isdigit())
    unit, digits = first.split(" ")[1], sum(pool.values()) // 2
    if len(first) == len(second) and all(n % 2 == 0 for n in pool.values()) and digits <= 5:
        half = sorted(Counter({letter: n // 2 for letter, n in pool.items()}).elements())
        for letters in sorted(set(itertools.permutations(half)))[:_MOST_ORDERS]:
            text = "".join(letters)
            found.append(f"{text[:-2]}.{text[-2:]} {unit}")
    return list(dict.fromkeys(found))


def _holds(line: str, phrase: str) -> bool:
    """Whether the letters of a phrase come in this order, whatever stands between them."""
    letters = iter(line)
    return all(letter in letters for letter in phrase)


def _symbols(wording: str) -> list[str]:
    """What a copy of the wording reads, one after the other: a letter, a digit (``d``), digits (``*``) or a unit (``u``)."""
    found: list[str] = []
    for symbol in wording:
        if symbol in "@\0":
            found += ["\0d", "\0*", ".", "\0d", "\0d", " ", "\0u", "i", "B"]
        elif symbol == "#":
            found += ["\0d", "\0*"]
        else:
            found.append(symbol)
    return found


def _next(symbols: Sequence[str], at: int, letter: str) -> list[int]:
    """Where a copy can stand after a letter that it reads at a place."""
    found: list[int] = []
    while at < len(symbols):
        symbol = symbols[at]
        if symbol == "\0*":
            if letter in _DIGITS:
                found.append(at)
            at += 1
            continue
        if symbol == letter or (symbol == "\0d" and letter in _DIGITS) or (symbol == "\0u" and letter in "GMKT"):
            found.append(at + 1)
        break
    return found


def _read(text: str, symbols: Sequence[str]) -> list[str]:
    steps: list[dict[_STEP, tuple[int, _STEP | None]]] = [{(0, 0, 0): (0, None)}]
    table: dict[tuple[int, str], list[int]] = {}
    for letter in text:
        reached: dict[_STEP, tuple[int, _STEP | None]] = {}
        for state, (cost, _) in steps[-1].items():
            for copy in (0, 1):
                key = (state[copy], letter)
                if key not in table:
                    table[key] = _next(symbols, *key)
                for place in table[key]:
                    new: _STEP = (place, state[1], 0) if copy == 0 else (state[0], place, 1)
                    total = cost + (state[2] != copy)
                    if new not in reached or total < reached[new][0]:
                        reached[new] = (total, state)
        if not reached or len(reached) > _MOST_STATES:
            return []
        steps.append(reached)
    ends = [state for state in steps[-1] if all(_is_end(symbols, place) for place in state[:2])]
    if not ends:
        return []
    return _follow(text, steps, min(ends, key=lambda state: steps[-1][state][0]))


def _is_end(symbols: Sequence[str], place: int) -> bool:
    return all(symbol == "\0*" for symbol in symbols[place:])


def _follow(text: str, steps: Sequence[dict[_STEP, tuple[int, _STEP | None]]], state: _STEP) -> list[str]:
    """The two texts, from the last step back to the first."""
    copies: tuple[list[str], list[str]] = ([], [])
    for letter, step in zip(reversed(text), reversed(steps), strict=False):
        copies[state[2]].append(letter)
        before = step[state][1]
        if before is None:
            break
        state = before
    return ["".join(reversed(letters)) for letters in copies]
