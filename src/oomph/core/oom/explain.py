"""From a text to its diagnosis, without a recipe: everything that the text says on its own."""

from __future__ import annotations

import sys
from pathlib import Path

from oomph.core.oom.advice import cures
from oomph.core.oom.candidates import candidates, says_nothing
from oomph.core.oom.causes import causes
from oomph.core.oom.cleaning import decode
from oomph.core.oom.clues import find_clues
from oomph.core.oom.messages import Found, find_messages
from oomph.diagnosis_records import Diagnosis, OomMessage
from oomph.errors import UserError
from oomph.units import GIB, MIB, size

_WAY_OUT = (
    "paste what the program printed, the error and the traceback above it, into a file, or pipe it into `oomph explain -`"
)


def read_text(file: str) -> tuple[str, str]:
    """The text of a file, and what messages call it.

    Args:
        file: a path, or ``-`` for standard input.

    Raises:
        UserError: there is no such file, it cannot be read, or holds no text.
    """
    if file == "-":
        return decode(sys.stdin.buffer.read(), "standard input"), "standard input"
    try:
        return decode(Path(file).read_bytes(), file), file
    except FileNotFoundError:
        raise UserError(f"there is no file {file!r}", _WAY_OUT) from None
    except IsADirectoryError:
        raise UserError(f"{file!r} is a folder", _WAY_OUT) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file!r} cannot be read: {getattr(error, 'strerror', None) or error}", _WAY_OUT) from None


def explain(text: str, source: str) -> Diagnosis:
    """What a text says about memory that ran out.

    Args:
        text: what a program printed, in any state.
        source: what to call it.

    Raises:
        UserError: nothing in it says that memory ran out.
    """
    found = find_messages(text)
    if not found.messages:
        raise UserError(f"{source} holds no report of memory that ran out", _WAY_OUT)
    place = _explained(found.messages)
    message = found.messages[place]
    clues = find_clues(text, message, found.messages)
    guessed = candidates(message, clues)
    reasons = causes(message)
    return Diagnosis(
        source=source,
        messages=found.messages,
        explained=place,
        candidates=guessed,
        causes=reasons,
        cures=cures(message, guessed, reasons),
        notes=tuple(_notes(text, found, message)),
    )


def _explained(messages: tuple[OomMessage, ...]) -> int:
    """The place of the message that says most: the first with a size, else the first with any number, else the first."""
    sizes = [place for place, message in enumerate(messages) if message.requested_bytes is not None]
    numbers = [place for place, message in enumerate(messages) if message.allocated_bytes or message.process_bytes]
    return (sizes or numbers or [0])[0]


def _notes(text: str, found: Found, message: OomMessage) -> list[str]:
    notes = []
    nothing = says_nothing(message)
    if nothing:
        notes.append(nothing)
    if message.truncated and message.requested_bytes is not None and message.kind.endswith("allocator"):
        notes.append("the message is cut off: what it does not say is not known")
    if found.tangled:
        notes.append(
            "two processes wrote into one line; their messages were told apart, but digits that differ may be exchanged"
        )
    if found.left_out:
        notes.append(f"{found.left_out:,} more messages, each with other numbers, are left out")
    notes += _oddities(message)
    if found.divisions > 1:
        notes.append(
            f"roundup_power2_divisions is set to {found.divisions}: the size was rounded up by up to a {found.divisions}th "
            "before it was printed, so more tensors can be meant"
        )
    advised = sum(item.repeats for item in found.messages if "expandable_segments" in item.hints)
    if text.count("expandable_segments:True") > advised > 0:
        notes.append("expandable_segments seems to be on already: PyTorch gives this advice even then (pytorch/pytorch#173049)")
    return notes


def _oddities(message: OomMessage) -> list[str]:
    """What cannot be as it stands, and how it comes about."""
    capacity = message.capacity_bytes
    if capacity is None:
        return []
    notes = []
    held = max(message.allocated_bytes or 0, message.reserved_bytes or 0)
    if held > capacity + 64 * MIB:
        notes.append(
            f"PyTorch holds {size(held)} on a card of {size(capacity)}: the driver puts what does not fit into host memory, "
            "as Windows does and unified memory, which is slow long before it fails"
        )
    if capacity < GIB:
        notes.append(f"the card has {size(capacity)} in all: a slice of one, or a limit that a container sets")
    return notes
