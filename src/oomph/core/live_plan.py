"""What a device without a caching allocator needs for a choice, as a prediction: bytes are those of live storages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from oomph.core.allocator import live_at
from oomph.core.events import Events
from oomph.core.footprint import live_footprint
from oomph.core.predict import LARGEST, UNMEASURED, owner
from oomph.records import FailingRequest, Prediction


def live_prediction(events: Events, limit_bytes: int) -> Prediction:
    """The prediction for a device whose memory is the host's, as the CPU's is.

    Args:
        events: of one rank.
        limit_bytes: what its storages may take.
    """
    footprint = live_footprint(events)
    segment, position, failing = _moments(events, limit_bytes)
    alive = live_at(events.segments, segment, position)
    largest = sorted(alive, key=lambda storage: -events.sizes[storage])[:LARGEST]
    evaluation = next((phase for phase in footprint.phases if phase.phase == "evaluate"), None)
    return Prediction(
        fits=failing is None,
        allocated_peak_bytes=footprint.allocated_peak_bytes,
        reserved_peak_bytes=footprint.reserved_peak_bytes,
        outside_bytes=0,
        usable_bytes=limit_bytes,
        phases=tuple(phase for phase in footprint.phases if phase.phase != "evaluate"),
        by_role=_sums(events, alive, lambda storage: events.kinds[storage].role),
        by_module=_sums(events, alive, lambda storage: owner(events.kinds[storage])),
        failing_request=failing,
        largest_requests=tuple(map(events.request, largest)),
        error_bound=UNMEASURED,
        leaves_out=("what the kernels of the CPU take for themselves", "the process itself and its libraries"),
        evaluation=evaluation,
    )


def _sums(events: Events, alive: list[int], name: Callable[[int], str]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for storage in alive:
        sums[name(storage)] += events.sizes[storage]
    return dict(sums.most_common())


def _moments(events: Events, limit: int) -> tuple[int, int, FailingRequest | None]:
    """Where the first request is that exceeds the limit, else where the peak is: its segment and the position in it."""
    alive, peak, at = 0, -1, (0, 0)
    for number, segment in enumerate(events.segments):
        for position, entry in enumerate(segment.timeline):
            alive += events.sizes[entry] if entry >= 0 else -events.sizes[~entry]
            if entry >= 0 and alive > limit:
                request, before = events.request(entry), alive - events.sizes[entry]
                return number, position - 1, FailingRequest(**vars(request), in_use_bytes=before, reserved_bytes=before)
            if alive > peak:
                peak, at = alive, (number, position)
    return *at, None
