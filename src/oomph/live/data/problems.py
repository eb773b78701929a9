"""What is wrong with data, collected so that all of it is said at once, and no more than can be read."""

from __future__ import annotations

from oomph.errors import UserError

SHOWN = 20
"""How many problems are written out; the others are counted."""


class Problems:
    """The mistakes of data files: the first of them in words, the number of all.

    Attributes:
        count: how many there are.
    """

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, place: str, text: str) -> None:
        """Notes one mistake.

        Args:
            place: the file, with the line or the number in it, and the sample.
            text: what is wrong and why.
        """
        self.count += 1
        if len(self._first) < SHOWN:
            self._first.append(f"{place}: {text}")

    def raise_any(self, hint: str) -> None:
        """Raises all that was noted.

        Raises:
            UserError: something was.
        """
        if self.count:
            more = self.count - len(self._first)
            rest = [f"and {more:,} more problem{'s' if more > 1 else ''} of the data"] if more else []
            raise UserError([*self._first, *rest], hint)
