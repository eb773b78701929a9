"""What a stage trains: ordered rules ``pattern: learning rate | frozen``, of which exactly one covers each parameter.

A pattern is a part of the model (``language``), a part and a glob over the parameter's full name
(``language:*.mlp.fc*``), or a part and the complement of a glob (``language:!*.mlp.fc*``).
"""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from oomph.errors import UserError
from oomph.recipe.suggest import did_you_mean

PARTS = ("vision", "projector", "language", "experts", "router", "head", "lora")
_EXAMPLES = 3


class Pattern(NamedTuple):
    """A pattern taken apart: the part, the glob over full names, and whether it is the complement that is meant."""

    part: str
    glob: str = "*"
    complement: bool = False

    def matches(self, name: str, part: str) -> bool:
        """Whether the parameter ``name`` of ``part`` is meant."""
        return part == self.part and fnmatch.fnmatchcase(name, self.glob) != self.complement


def parse_pattern(text: str) -> Pattern:
    """``part``, ``part:glob`` or ``part:!glob``.

    Raises:
        ValueError: the part is unknown, or nothing follows the colon.
    """
    part, colon, glob = text.partition(":")
    if part not in PARTS:
        raise ValueError(f"`{part}` is no part of a model{did_you_mean(part, PARTS) or f'; parts are {_words(PARTS)}'}")
    complement = glob.startswith("!")
    glob = glob.removeprefix("!")
    if colon and not glob:
        raise ValueError(f"the pattern `{text}` has no glob after the colon")
    return Pattern(part, glob or "*", complement)


def cover(
    rules: Mapping[str, float | Literal["frozen"]], parameters: Sequence[tuple[str, str]]
) -> dict[str, float | None]:
    """The learning rate of every parameter, None where it is frozen.

    Args:
        rules: pattern to learning rate or ``"frozen"``, as a stage's ``train`` has them.
        parameters: (full name, part) of every parameter of the model.

    Raises:
        UserError: a rule matches nothing, or a parameter is matched by no rule or by several.
    """
    patterns = {text: parse_pattern(text) for text in rules}
    matched: Counter[str] = Counter()
    uncovered: defaultdict[str, list[str]] = defaultdict(list)
    repeated: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    rates: dict[str, float | None] = {}
    for name, part in parameters:
        hits = tuple(text for text, pattern in patterns.items() if pattern.matches(name, part))
        matched.update(hits)
        if not hits:
            uncovered[part].append(name)
            continue
        if len(hits) > 1:
            repeated[hits].append(name)
        rate = rules[hits[0]]
        rates[name] = None if rate == "frozen" else float(rate)
    problems = [_matches_nothing(text, parameters) for text in rules if not matched[text]]
    problems += [f"no rule covers {_some(names)} of part `{part}`" for part, names in uncovered.items()]
    problems += [f"the rules {_words(hits)} all match {_some(names)}" for hits, names in repeated.items()]
    if problems:
        raise UserError(problems, "every parameter is matched by exactly one rule: `part`, `part:glob` or `part:!glob`")
    return rates


def _matches_nothing(text: str, parameters: Sequence[tuple[str, str]]) -> str:
    parts = Counter(part for _, part in parameters)
    present = ", ".join(f"{part} ({count:,})" for part, count in parts.items()) or "none"
    return f"the rule `{text}` matches no parameter; the model's parts, with their numbers of parameters: {present}"


def _some(names: Sequence[str]) -> str:
    number = f"{len(names):,} parameter{'s' if len(names) > 1 else ''}"
    more = ", ..." if len(names) > _EXAMPLES else ""
    return f"{number} ({', '.join(names[:_EXAMPLES])}{more})"


def _words(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return ", ".join(quoted[:-1]) + " and " + quoted[-1] if len(quoted) > 1 else quoted[0]
