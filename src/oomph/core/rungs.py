"""The rungs of a ladder that a running model can change to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from oomph.records import Choice

_LIVE: dict[str, tuple[str, ...]] = {
    "checkpointing": ("none", "every-4", "every-3", "every-2", "blocks", "blocks-offload"),
    "vision_checkpointing": ("none", "blocks"),
    "loss": ("full-shifted", "full", "chunked"),
}
"""The knobs that can change between two steps and keep the mathematics, with their values from most memory to least."""
_CUT = ("micro_batch", "accumulation", "eval_batch")


def live_rungs(choice: Choice, rungs: Sequence[Choice]) -> tuple[Choice, ...]:
    """A choice, and those of some rungs that a running model can change to, each of which recomputes more than the one before.

    They differ in nothing but checkpointing and the loss's chunks, so the mathematics is the same. Micro-batch and accumulation
    are those of `choice` in all of them, as each step is cut by itself.
    """
    found = [choice]
    for rung in rungs:
        same = {knob: getattr(choice, knob) for knob in (*_LIVE, *_CUT)}
        if replace(rung, **same) == choice and _needs_less(rung, found[-1]):
            found.append(replace(rung, **{knob: getattr(choice, knob) for knob in _CUT}))
    return tuple(found)


def recomputed(choice: Choice) -> str:
    """What a choice recomputes, as a name that tells live rungs apart: ``blocks, none, chunked``."""
    return ", ".join(str(getattr(choice, knob)) for knob in _LIVE)


def _needs_less(rung: Choice, than: Choice) -> bool:
    pairs = [(order.index(getattr(rung, knob)), order.index(getattr(than, knob))) for knob, order in _LIVE.items()]
    return all(ours >= theirs for ours, theirs in pairs) and any(ours > theirs for ours, theirs in pairs)
