"""AdamW in host memory: what a rank allocates when the optimizer's states and its step are not on the GPU.

The gradients are clipped on the GPU. Then each is copied to the host and freed, the host updates its copies of the weights,
and these are copied into the parameters, in place: ``oomph.live.offload.HostOptimizer``. States and temporaries of the
optimizer are never on the GPU.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Final

from oomph.core.events import Events, Segment
from oomph.core.ranks import Edit, copied, part

_FOUND: Final = "aten.add.Tensor"
"""How ``GradScaler.step`` tells the fused AdamW whether all gradients are finite (torch 2.13, torch/amp/grad_scaler.py)."""


def offload_optimizer(events: Events) -> Events:
    """The events of a rank whose AdamW is in host memory; the input is not changed.

    What an optimizer's segment allocates once the gradients are clipped is dropped. What it frees of earlier storages, the
    gradients, it frees in the same order, and nothing is allocated meanwhile.

    Args:
        events: of one rank, whose states are storages of role ``optimizer`` that the warm-up's optimizer allocates: without
            sharding, under DDP and under FSDP2.
    """
    out = copied(events)
    clipping = _clipping_births(events)
    out.segments = [_without_step(s, events, clipping) if part(s) == "optimizer" else s for s in events.segments]
    return out


def _clipping_births(events: Events) -> int:
    """How many storages are allocated before the warm-up's optimizer allocates its first, a state or what it is told."""
    (warmup,) = (segment for segment in events.segments if segment.name == "warmup/optimizer")
    clipping = list(takewhile(lambda storage: events.kinds[storage].role != "optimizer", _born(warmup, events)))
    return len(clipping) - bool(clipping and events.kinds[clipping[-1]].op == _FOUND)


def _without_step(segment: Segment, events: Events, clipping: int) -> Segment:
    """The segment without what is born in it after its first `clipping` storages."""
    edit = Edit(segment)
    edit.drop_storages(set(_born(segment, events)[clipping:]))
    return edit.result()


def _born(segment: Segment, events: Events) -> list[int]:
    """What clipping and the optimizer allocate in a segment, in order; workspaces and buckets of DDP are not theirs."""
    others = ("workspace", "communication")
    return [entry for entry in segment.timeline if entry >= 0 and events.kinds[entry].role not in others]
