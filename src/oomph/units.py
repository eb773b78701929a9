"""How numbers are read and written: the one place that knows what a GiB is.

Bytes are integers everywhere else. 1 KiB = 1024 bytes, 1 MiB = 1024², 1 GiB = 1024³ (IEC 80000-13).
"""

from __future__ import annotations

import re
from fractions import Fraction

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(B|KiB|MiB|GiB|TiB)?\s*$")
_UNITS = {None: 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB}


def gib(nbytes: int) -> str:
    """Bytes as GiB with two decimals, without the unit: ``6.56``."""
    return f"{nbytes / GIB:.2f}"


def size(nbytes: int) -> str:
    """Bytes with the unit a person would pick: ``6.56 GiB``, ``8.1 MiB``, ``512 B``."""
    sign = "-" if nbytes < 0 else ""
    magnitude = abs(nbytes)
    if magnitude >= GIB // 10:
        return f"{sign}{magnitude / GIB:,.2f} GiB"
    if magnitude >= MIB // 10:
        return f"{sign}{magnitude / MIB:.1f} MiB"
    if magnitude >= KIB:
        return f"{sign}{magnitude / KIB:.1f} KiB"
    return f"{sign}{magnitude} B"


def count(number: int) -> str:
    """A count of things, parameters for instance: ``2.78 B``, ``9.2 M``, ``640``."""
    for scale, suffix, digits in ((10**12, "T", 2), (10**9, "B", 2), (10**6, "M", 1)):
        if abs(number) >= scale:
            return f"{number / scale:.{digits}f} {suffix}"
    return f"{number:,}"


def parse_size(text: str) -> int:
    """``"2GiB"``, ``"512 MiB"`` or ``"1048576"`` as bytes; a fraction of a byte is cut off.

    Raises:
        ValueError: the text is not a number with one of the units B, KiB, MiB, GiB, TiB.
    """
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size: write a number and B, KiB, MiB, GiB or TiB, for example 2GiB")
    return int(Fraction(match[1]) * _UNITS[match[2]])
