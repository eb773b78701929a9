"""Every configuration with the effective batch that was asked for and the same mathematics, and those worth a closer look."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from oomph.core.choices import GpuLike, clashes, cuts, with_micro_batch
from oomph.core.eight_bit import EIGHT_BIT
from oomph.recipe import Hardware
from oomph.records import Choice

KNOBS: dict[str, tuple[Any, ...]] = {
    "checkpointing": ("none", "every-2", "blocks", "blocks-offload"),
    "vision_checkpointing": ("none", "blocks"),
    "attention": ("sdpa", "efficient", "eager"),
    "loss": ("full", "chunked", "full-shifted"),
    "optimizer": ("adamw-fused", "adamw-foreach"),
    "optimizer_offload": (False, True),
    "sharding": ("none", "ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2-no-reshard", "fsdp2-hybrid"),
    "expandable_segments": (False, True),
}
"""What a search varies, beside the cut of the batch. Precision, the optimizer's float32 copies of weights and the bits of its
states are mathematics; every third or fourth block lies between two that are searched, and is there to be pinned."""


class Space(NamedTuple):
    """The choices left to look at, and how many there were.

    The others are beaten at whatever size: another one of the space needs no more bytes and no more time.
    """

    choices: tuple[Choice, ...]
    considered: int


def space(asked: Choice, fixed: Mapping[str, Any], gpu: GpuLike, hardware: Hardware, eval_batch: int | str) -> Space:
    """All choices that keep the effective batch and the mathematics of the one that was asked for.

    Args:
        asked: for everything that is not varied.
        fixed: knobs that are not varied, with their values; ``micro_batch`` may be one.
        gpu: the card.
        hardware: GPUs and machines.
        eval_batch: what the recipe says of it; `auto` follows the micro-batch.
    """
    kept: list[Choice] = []
    considered = 0
    domains = {knob: (fixed[knob],) if knob in fixed else domain(knob, asked) for knob in KNOBS}
    for values in itertools.product(*domains.values()):
        knobs = dict(zip(domains, values, strict=True))
        whole = {**vars(asked), **knobs}
        if clashes(whole, gpu, hardware):
            continue
        every, best = _micro_batches(asked, knobs["sharding"], fixed)
        considered += len(every)
        if not _beaten(knobs, domains):
            kept += [with_micro_batch(replace(asked, **knobs), micro_batch, eval_batch) for micro_batch in best]
    return Space(tuple(kept), considered)


def domain(knob: str, asked: Choice) -> tuple[Any, ...]:
    """The values of a knob that keep the mathematics of a choice, its own first."""
    own = getattr(asked, knob)
    alike = EIGHT_BIT if knob == "optimizer" and own in EIGHT_BIT else KNOBS[knob]
    return (own, *(value for value in alike if value != own))


def _micro_batches(asked: Choice, sharding: str, fixed: Mapping[str, Any]) -> tuple[Sequence[int], Sequence[int]]:
    """All micro-batches, and the smallest of those that take the same number of steps."""
    if "micro_batch" in fixed:
        own = [fixed["micro_batch"]] if fixed["micro_batch"] in cuts(asked, sharding, every=True) else []
        return own, own
    return cuts(asked, sharding, every=True), cuts(asked, sharding)


def _beaten(knobs: Mapping[str, Any], domains: Mapping[str, Sequence[Any]]) -> bool:
    """Whether another value of one of the knobs is at least as good in memory and in time, whatever the others are.

    Of the attentions, PyTorch's own pick is the fastest fused kernel that runs, and fused kernels never make the scores
    that `eager` writes out. A shifted copy of the logits, and an optimizer that makes temporary copies, are additions to
    what is there without them. Optimizers with states of 8 bits do not beat each other: a paged one takes less of the GPU,
    and time where the driver has to move its states. Not counted are the step counters that the fused AdamW has on the
    GPU, a block of 512 bytes for each tensor, and that fewer bytes may lie in more pieces.
    """
    return any(knobs[knob] != best and best in domains[knob] for knob, best in _BEST.items()) or (
        knobs["loss"] == "full-shifted" and "full" in domains["loss"]
    )


_BEST = {"attention": "sdpa", "optimizer": "adamw-fused"}
