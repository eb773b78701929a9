"""A sample as all of training sees it, from the JSON forms in which conversations are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGE_TAG = "<image>"
"""Stands in a text for an image (haotian-liu/LLaVA, docs/Finetune_Custom_Data.md)."""

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""Who speaks, as LLaVA's data and chat messages write it, and as chat templates do."""


class BadSample(ValueError):
    """A record that is no sample.

    Attributes:
        problems: one clause for each thing that is wrong.
        id: the record's own name, as far as it has one.
    """

    def __init__(self, problems: list[str], name: str = "") -> None:
        super().__init__("; ".join(problems))
        self.problems, self.id = problems, name


@dataclass(frozen=True)
class Turn:
    """What one side says. The text has an `IMAGE_TAG` where an image stands."""

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A conversation. `images` are file names in the order of the tags; `id` is empty where the record has none."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]

    @property
    def num_tags(self) -> int:
        """How many image tags the texts hold."""
        return sum(turn.text.count(IMAGE_TAG) for turn in self.turns)


def parse(record: Any) -> Sample:
    """The sample of a record: ``conversations`` of ``from`` and ``value``, or ``messages`` of ``role`` and ``content``.

    Raises:
        BadSample: it is none; all that is wrong is said at once.
    """
    if isinstance(record, ValueError):
        raise BadSample([str(record)])
    if not isinstance(record, dict):
        raise BadSample([f"a sample is a JSON object, not {_kind(record)}"])
    problems: list[str] = []
    name = record.get("id", "")
    if not isinstance(name, str | int) or isinstance(name, bool):
        problems.append(f"its id is {_kind(name)}, where a text or a whole number is expected")
        name = ""
    if record.get("video") is not None:
        problems.append("it has a video, and videos are not trained on")
    images = _names(record, problems)
    turns = _turns(record, images, problems)
    if turns and not any(turn.role == "assistant" for turn in turns):
        problems.append("it has no turn of the assistant, so there is nothing to learn from it")
    if problems:
        raise BadSample(problems, str(name))
    return Sample(str(name), tuple(images), tuple(turns))


def _names(record: dict[str, Any], problems: list[str]) -> list[str]:
    """The image files that a record names beside its conversation."""
    if record.get("image") is not None and record.get("images") is not None:
        problems.append("it has both `image` and `images`; one is enough")
    given = record.get("image") if record.get("image") is not None else record.get("images")
    names = [] if given is None else given if isinstance(given, list) else [given]
    if any(not isinstance(name, str) or not name for name in names):
        problems.append("`image` is a file's name or a list of them")
        return []
    return names


def _turns(record: dict[str, Any], images: list[str], problems: list[str]) -> list[Turn]:
    """The turns; images that chat messages name within them are added to `images`."""
    key = "conversations" if "conversations" in record else "messages"
    given = record.get(key)
    if not isinstance(given, list) or not given:
        problems.append("it has no `conversations` (or `messages`): a list of turns")
        return []
    who, what = ("from", "value") if key == "conversations" else ("role", "content")
    turns, named = [], list[str]()
    for number, turn in enumerate(given):
        if not isinstance(turn, dict):
            problems.append(f"turn {number} is {_kind(turn)}, where an object with `{who}` and `{what}` is expected")
            continue
        role = ROLES.get(turn[who]) if isinstance(turn.get(who), str) else None
        text = _text(turn.get(what), named)
        if role is None:
            known = "human, gpt or system" if key == "conversations" else "user, assistant or system"
            problems.append(f"turn {number} is of {turn.get(who)!r}, where {known} is expected")
        if text is None:
            problems.append(f"turn {number} has no text in `{what}`")
        elif role == "assistant" and not text.strip():
            problems.append(f"turn {number} is an empty answer")
        turns.append(Turn(role or "", text or ""))
    if named and images:
        problems.append("its images are named in the turns and beside them; one is enough")
    images += named
    return turns


def _text(content: Any, named: list[str]) -> str | None:
    """A turn's text, with tags in the place of image parts; None where it is neither a text nor a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind == "image":
            pieces.append(IMAGE_TAG)
            named += [part[key] for key in ("image", "path") if isinstance(part.get(key), str)][:1]
        else:
            return None
    return "".join(pieces)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
