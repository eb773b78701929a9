"""The colours of the pages: one name each, with a value for light screens and paper and one for dark screens.

Charts are drawn once, with a placeholder for every name, and the placeholders become CSS variables. The colours of roles
are the scheme `muted` of Paul Tol (https://personal.sron.nl/~pault/, Technical Note SRON/EPS/TN/09-002, issue 3.2), which
readers with any kind of colour blindness can tell apart, and the orange of his scheme `light` as one more; for dark screens
the darkest of them are lighter.
"""

from __future__ import annotations

import re

COLOURS: dict[str, tuple[str, str]] = {
    "ground": ("#ffffff", "#12151a"),
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#57606a", "#a3adb8"),
    "line": ("#d5dae0", "#39414b"),
    "accent": ("#0b5cad", "#74b4f5"),
    "good": ("#1a7f4b", "#63cf95"),
    "bad": ("#b42318", "#ff8f85"),
    "second": ("#b25a00", "#f0a955"),
    "third": ("#7a4fb5", "#bd9bf0"),
    "weight": ("#332288", "#8478de"),
    "optimizer": ("#88ccee", "#7cc3e6"),
    "gradient": ("#44aa99", "#48ad9c"),
    "communication": ("#117733", "#3f9b5b"),
    "workspace": ("#bbbbbb", "#8d949c"),
    "input": ("#999933", "#a5a53f"),
    "activation": ("#ddcc77", "#d9c76c"),
    "scores": ("#cc6677", "#d9768a"),
    "logits": ("#882255", "#b8527f"),
    "dispatch": ("#ee8866", "#f0a07e"),
    "temporary": ("#aa4499", "#c473b7"),
}
ROLES = tuple(list(COLOURS)[9:])
"""The roles in the order in which areas are stacked: what stays is at the bottom, what comes and goes at the top."""

_PLACES = list(COLOURS)
_PLACEHOLDER = re.compile(r"#0a0b([0-9a-f]{2})\b")


def placeholder(name: str) -> str:
    """What stands for a colour while a chart is drawn."""
    return f"#0a0b{_PLACES.index(name):02x}"


def of_role(role: str) -> str:
    """The name of a role's colour; unknown roles share one."""
    return role if role in ROLES else "muted"


def with_variables(svg: str) -> str:
    """A drawing with a CSS variable in the place of every placeholder."""
    return _PLACEHOLDER.sub(lambda found: f"var(--{_PLACES[int(found[1], 16)]})", svg)


def variables(dark: bool) -> str:
    """The CSS declarations of all colours."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLOURS.items())
