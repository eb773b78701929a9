"""The commands of a shell script, with its variables put in: read as bash reads them, and nothing of them executed.

Known are quotes, comments, line continuations, assignments, arrays, ``${NAME:-default}`` and ``${NAME//old/new}``. What only
a running shell knows stays as it is written: arguments of the script, variables of its surroundings, ``$(command)``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from oomph.errors import UserError
from oomph.units import KIB, MIB, size

MOST_BYTES = 256 * KIB
"""A script that is larger is none."""

_MOST_EXPANDED = 8 * MIB
_DEEPEST = 4

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ASSIGNMENT = re.compile(r"^(?:[A-Za-z_][A-Za-z0-9_]*)\+?=")
_BRACED = re.compile(
    r"^([A-Za-z_][A-Za-z0-9_]*|[0-9]+|[@*#?])(\[[@*0-9]+\])?(?:(:?[-=])(.*)|(//?)((?:\\.|[^/\\])*)/(.*))?$", re.DOTALL
)
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)([A-Za-z_][A-Za-z0-9_]*)\1")
_ENDS = "\n;&|"
_KEYWORDS = {"if", "then", "else", "elif", "fi", "for", "do", "done", "while", "{", "}", "!", "time", "exec", "nohup", "export"}


class Word(NamedTuple):
    """A word of a command. `unknown` are the parts of it that only a running shell knows, as they are written."""

    text: str
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """One command: its words, what is assigned for it or was before it, and the line on which it begins."""

    words: tuple[Word, ...]
    variables: dict[str, Word]
    line: int


def read_script(path: Path) -> list[Command]:
    """The commands of a script, in their order. Both branches of a condition are taken.

    Raises:
        UserError: the file cannot be read, is too large for a script, or is no text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES // KIB} KiB, and no launch script does", "name the script itself")
    if b"\0" in data:
        raise UserError(f"{path} is a binary file, where a launch script is text", "name the script itself")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is no character of it") from None
    if not text.strip():
        raise UserError(f"{path} is empty", "name the script that starts the training")
    return _Reader(text.replace("\r\n", "\n").replace("\r", "\n")).commands()


class _Reader:
    """Walks over a script once."""

    def __init__(self, text: str, depth: int = 0) -> None:
        self.text, self.at, self.line, self.depth = text, 0, 1, depth
        self.variables: dict[str, list[Word]] = {}
        self.expanded = 0

    def commands(self) -> list[Command]:
        found = []
        while self.at < len(self.text):
            start = self.line
            words = self._command()
            local = self._assign(words)
            if local:
                flat = {name: _joined(value) for name, value in self.variables.items()}
                found.append(Command(tuple(local), flat, start))
        return found

    def _assign(self, words: list[tuple[Word, list[Word] | None]]) -> list[Word]:
        """Takes the assignments at the head of a command; returns the other words.

        Those before a program hold for it alone in a shell. Here they stay, as a script that sets a variable twice means both.
        """
        rest = list(words)
        while rest and (rest[0][0].text in _KEYWORDS or _ASSIGNMENT.match(rest[0][0].text)):
            word, array = rest.pop(0)
            if word.text in _KEYWORDS:
                continue
            name, _, value = word.text.partition("=")
            new = array if array is not None else [Word(value, word.unknown)]
            before = self.variables.get(name.removesuffix("+"), []) if name.endswith("+") else []
            joined = [_joined([*before, *new], "")] if before and array is None else [*before, *new]
            self.variables[name.removesuffix("+")] = joined
        return [word for word, _ in rest]

    def _command(self) -> list[tuple[Word, list[Word] | None]]:
        """The words up to the end of a command, each with the array that is assigned to it, if one is."""
        words: list[tuple[Word, list[Word] | None]] = []
        heredocs: list[str] = []
        while self.at < len(self.text):
            letter = self.text[self.at]
            if letter in " \t" or self.text.startswith("\\\n", self.at):
                self._skip(2 if letter == "\\" else 1)
            elif letter == "#":
                self._skip(len(self._rest_of_line()))
            elif letter in _ENDS:
                self._skip(1)
                if letter == "\n":
                    self._pass(heredocs)
                break
            elif letter in "()":
                self._skip(1)
            elif letter in "<>":
                match = _HEREDOC.match(self.text, self.at)
                heredocs += [match[2]] if match else []
                self._skip(len(match[0]) if match else 1)
            else:
                words += self._word()
        return words

    def _word(self, in_array: bool = False) -> list[tuple[Word, list[Word] | None]]:
        """The word that begins here; a variable without quotes may make several of it, or none."""
        parts: list[Word] = []
        done: list[tuple[Word, list[Word] | None]] = []
        assigned = _ASSIGNMENT.match(self.text[self.at : self.at + 200])
        while self.at < len(self.text) and self.text[self.at] not in " \t()<>" + _ENDS:
            letter = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                self._skip(2)
            elif letter == "\\":
                parts.append(Word(self.text[self.at + 1 : self.at + 2]))
                self._skip(2)
            elif letter == "'":
                parts.append(Word(self._until("'")))
            elif letter == '"':
                quoted = self._quoted()
                if len(quoted) > 1:
                    done += [(word, None) for word in [_joined([*parts, quoted[0]], ""), *quoted[1:-1]]]
                    parts = []
                parts.append(quoted[-1])
            elif letter in "$`":
                values = self._value()
                pieces = values if assigned else [piece for value in values for piece in _split(value)]
                done += [(_joined([*parts, pieces[0]], ""), None)] if len(pieces) > 1 else []
                done += [(piece, None) for piece in pieces[1:-1]]
                parts = ([] if len(pieces) > 1 else parts) + pieces[-1:]
            else:
                parts.append(Word(letter))
                self._skip(1)
        word = _joined(parts, "")
        if assigned and not in_array and word.text.endswith("=") and self.text.startswith("(", self.at):
            return [*done, (word, self._array())]
        return [*done, (word, None)] if parts else done

    def _array(self) -> list[Word]:
        """The elements of an array, from its opening bracket to the closing one."""
        self._skip(1)
        elements: list[Word] = []
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "#":
                self._skip(len(self._rest_of_line()))
            elif self.text[self.at] in " \t\n;&|<>(" or self.text.startswith("\\\n", self.at):
                self._skip(2 if self.text[self.at] == "\\" else 1)
            else:
                elements += [word for word, _ in self._word(in_array=True)]
        self._skip(1)
        return elements

    def _quoted(self) -> list[Word]:
        """What stands between double quotes: one word, or those of an array that is written out in it."""
        self._skip(1)
        words: list[list[Word]] = [[]]
        while self.at < len(self.text) and self.text[self.at] != '"':
            letter = self.text[self.at]
            if letter == "\\" and self.text[self.at + 1 : self.at + 2] in ('"', "\\", "$", "`", "\n"):
                following = self.text[self.at + 1]
                words[-1].append(Word("" if following == "\n" else following))
                self._skip(2)
            elif letter in "$`":
                first, *others = self._value() or [Word("")]
                words[-1].append(first)
                words += [[other] for other in others]
            else:
                words[-1].append(Word(letter))
                self._skip(1)
        self._skip(1)
        return [_joined(parts, "") for parts in words]

    def _value(self) -> list[Word]:
        """What an expansion gives.

        Raises:
            UserError: the script writes out more than a command line holds.
        """
        words = self._expansion()
        self.expanded += sum(len(word.text) + 1 for word in words)
        if self.expanded > _MOST_EXPANDED:
            raise UserError(f"the variables of the script are more than {size(_MOST_EXPANDED)} when they are written out")
        return words

    def _expansion(self) -> list[Word]:
        """The value of what a dollar sign or a backquote begins; itself where only a running shell knows it."""
        start = self.at
        if self.text[start] == "`":
            self._until("`")
        elif self.text.startswith("$(", start):
            self._brackets("(", ")")
        elif self.text.startswith("${", start):
            self._brackets("{", "}")
            return self._braced(self.text[start + 2 : self.at - 1], self.text[start : self.at])
        else:
            match = _NAME.match(self.text, start + 1)
            self._skip(1 + (len(match[0]) if match else 1))
            if match and match[0] in self.variables:
                return [_joined(self.variables[match[0]][:1])]
        written = self.text[start : self.at]
        return [Word(written, (written,))]

    def _braced(self, inside: str, written: str) -> list[Word]:
        match = _BRACED.match(inside)
        if match is None:
            return [Word(written, (written,))]
        name, index, operator, default, slashes, old, new = match.groups()
        values = self.variables.get(name)
        if operator and self.depth < _DEEPEST and _is_unset(values, operator):
            inner = _Reader(f'"{default}"', self.depth + 1)
            inner.variables, inner.expanded = self.variables, self.expanded
            return [_joined([word for word, _ in inner._word()])]
        if values is None:
            return [Word(written, (written,))]
        if index in ("[@]", "[*]"):
            return list(values)
        number = int(index[1:-1]) if index else 0
        value = values[number] if number < len(values) else Word("")
        if slashes:
            old, new = old.replace("\\", ""), new.strip("\"'")
            return [Word(value.text.replace(old, new, -1 if slashes == "//" else 1) if old else value.text, value.unknown)]
        return [value]

    def _brackets(self, opening: str, closing: str) -> None:
        """Goes behind the bracket that closes the one after the dollar sign."""
        depth = 0
        while self.at < len(self.text):
            letter = self.text[self.at]
            depth += (letter == opening) - (letter == closing)
            self._skip(2 if letter == "\\" else 1)
            if letter == closing and depth == 0:
                return

    def _until(self, quote: str) -> str:
        """What stands between here, where a quote is, and the next one."""
        end = self.text.find(quote, self.at + 1)
        end = len(self.text) if end < 0 else end
        inside = self.text[self.at + 1 : end]
        self._skip(end + 1 - self.at)
        return inside

    def _pass(self, heredocs: list[str]) -> None:
        """Goes over the texts that a command reads from the script itself."""
        for end in heredocs:
            while self.at < len(self.text):
                line = self._rest_of_line()
                self._skip(len(line) + 1)
                if line.strip() == end:
                    break

    def _rest_of_line(self) -> str:
        end = self.text.find("\n", self.at)
        return self.text[self.at : end if end >= 0 else len(self.text)]

    def _skip(self, letters: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + letters)
        self.at = min(self.at + letters, len(self.text))


def _is_unset(values: list[Word] | None, operator: str) -> bool:
    """Whether a default takes the place of a value. An argument of the script is taken as not given."""
    if values is None:
        return True
    value = _joined(values)
    return ":" in operator and (not value.text or value.text in value.unknown)


def _split(word: Word) -> list[Word]:
    """The value of a variable as the shell splits it where no quotes stand around it."""
    if word.text in word.unknown:
        return [word]
    return [Word(part, tuple(name for name in word.unknown if name in part)) for part in word.text.split()]


def _joined(words: list[Word], between: str = " ") -> Word:
    return Word(between.join(word.text for word in words), tuple(name for word in words for name in word.unknown))
