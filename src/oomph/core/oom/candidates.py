"""What a request can have been for, from its size and the clues around it, the most plausible first."""

from __future__ import annotations

from collections.abc import Sequence

from oomph.core.oom.clues import Clues
from oomph.core.oom.families import families
from oomph.core.oom.guesses import FLOAT32, Guess, Size, guesses, unknown_weight
from oomph.core.oom.priors import length_in_words
from oomph.diagnosis_records import Candidate, Certainty, OomMessage
from oomph.units import GIB, MIB

MOST = 6
"""Candidates that are named."""

_WIDEST = 1.35
_LARGEST = 64 * 1024 * GIB
_LIKELY, _POSSIBLE, _LEAST = 0.5, 0.08, 0.002
_PAGE = 2 * MIB


def candidates(message: OomMessage, clues: Clues) -> tuple[Candidate, ...]:
    """The candidates for a message's request; none where its size says nothing.

    Args:
        message: with what was asked for.
        clues: what else the text says.
    """
    low, high = message.requested_low, message.requested_high
    if low is None or high is None or high > _WIDEST * low or high > _LARGEST or high < MIB:
        return ()
    size = Size(low, high)
    found = sorted(guesses(size, clues), key=lambda guess: (-guess.weight, guess.what, guess.shape))
    total = sum(guess.weight for guess in found) + unknown_weight(size)
    chosen: list[Guess] = []
    for guess in found:
        if len(chosen) < MOST and guess.weight >= _LEAST * total and not _repeats(guess, chosen):
            chosen.append(guess)
    return tuple(
        Candidate(
            guess.what,
            guess.symbols,
            guess.shape,
            guess.dtype,
            guess.bytes,
            _ordered(guess.families, clues),
            tuple(_reasons(guess, message, clues)),
            _certainty(guess.weight / total),
            rank,
        )
        for rank, guess in enumerate(chosen, 1)
    )


def says_nothing(message: OomMessage) -> str:
    """Why the size of a request says nothing about its tensor; empty where it does."""
    low, high = message.requested_low, message.requested_high
    if low is None or high is None:
        return ""
    if high <= 20 * MIB and high > _WIDEST * low:
        most = "1 MiB" if high <= MIB else "10 MiB"
        return (
            f"the size says little: the allocator asks the driver for a segment of {2 if high <= MIB else 20} MiB for every "
            f"request of up to {most}, so the tensor that failed is a small one, and merely the first that did not fit"
        )
    if high > _LARGEST:
        return "no tensor of a known model has this size: look for a length or an index that is garbage, or negative"
    return ""


def _repeats(guess: Guess, chosen: Sequence[Guess]) -> bool:
    """Whether a better candidate is the same tensor with its samples and lengths cut otherwise."""
    same = [other for other in chosen if (other.kind, other.dtype) == (guess.kind, guess.dtype)]
    return len(same) >= (2 if guess.kind in ("scores", "logits", "weight", "flat") else 1)


def _certainty(share: float) -> Certainty:
    return "likely" if share >= _LIKELY else "possible" if share >= _POSSIBLE else "unlikely"


def _ordered(names: Sequence[str], clues: Clues) -> tuple[str, ...]:
    """The families, those that the text names first, without those that are newer than what the text is of."""
    released = {family.name: family.released for family in families()}
    old = [name for name in names if not clues.latest or released[name] <= clues.latest]
    return tuple(sorted(old or names, key=lambda name: (name not in clues.named, name not in clues.built)))


def _reasons(guess: Guess, message: OomMessage, clues: Clues) -> list[str]:
    found = [_arithmetic(guess, message)]
    if guess.lengths is not None:
        tokens = guess.shape[1] if len(guess.shape) == 3 else guess.shape[-1]
        words = length_in_words(tokens, frozenset(clues.lengths))
        first, last = guess.lengths
        if words:
            found.append(words)
        elif first < last:
            found.append(f"every length from {first:,} to {last:,} prints the same")
    elif guess.kind == "logits":
        words = length_in_words(guess.shape[1] + 1, frozenset(clues.lengths))
        found += [words] if words else []
    if "samples" in guess.symbols and guess.shape[0] in clues.batches:
        found.append(f"{guess.shape[0]} is a micro-batch that the text gives")
    if guess.kind in clues.reasons:
        found.append(clues.reasons[guess.kind])
    elif clues.factors.get(guess.kind, 1.0) < 0.2:
        found.append(f"but the traceback is in the {message.phase} phase, which has few of these")
    if guess.reason:
        found.append(guess.reason)
    return found


def _arithmetic(guess: Guess, message: OomMessage) -> str:
    """The bytes of a tensor, and how they come to be printed as they are."""
    product = " × ".join(f"{value:,}" for value in guess.shape if value != 1) or "1"
    element = 4 if guess.dtype == FLOAT32 else 2 if guess.dtype.startswith("bfloat16") else 1
    half = " / 2" if guess.dtype.startswith("4 bits") else ""
    scale, unit = (GIB, "GiB") if guess.bytes > GIB else (MIB, "MiB")
    line = f"{product} × {element} B{half} = {guess.bytes / scale:,.4f} {unit}"
    if message.kind.endswith("allocator") and message.kind != "cpu allocator":
        rounded = -(-guess.bytes // _PAGE) * _PAGE
        scale, unit = (GIB, "GiB") if rounded > GIB else (MIB, "MiB")
        line += f", in whole segments of 2 MiB {rounded / scale:,.4f} {unit}"
    return line
