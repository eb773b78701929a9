"""Predictions as footprints, the type of what is measured: on a card with its allocator, on the CPU without one."""

from __future__ import annotations

from itertools import pairwise

from oomph.core.events import Events
from oomph.records import Footprint, PhasePeak, Prediction


def of_prediction(prediction: Prediction) -> Footprint:
    """What a card's allocator is predicted to do, the evaluation as one more phase."""
    evaluation = (prediction.evaluation,) if prediction.evaluation else ()
    return Footprint(
        prediction.allocated_peak_bytes,
        prediction.reserved_peak_bytes,
        (*prediction.phases, *evaluation),
        prediction.by_role,
        prediction.by_module,
    )


def live_footprint(events: Events) -> Footprint:
    """The bytes of the storages alive, not rounded, at their peak and at that of each phase.

    This is what a device without a caching allocator does, so no more is reserved than is allocated. A phase begins with
    what the one before it left, as in `allocator.replay`.
    """
    peaks, alive, phase = {"load": 0}, 0, "load"
    for segment in events.segments:
        for _ in range(segment.repeat):
            ends = [*segment.marks, (len(segment.timeline), "")]
            for (start, entered), (end, _) in pairwise([(0, phase), *ends]):
                phase = entered
                peaks[phase] = max(peaks.get(phase, 0), alive)
                for entry in segment.timeline[start:end]:
                    alive += events.sizes[entry] if entry >= 0 else -events.sizes[~entry]
                    peaks[phase] = max(peaks[phase], alive)
    whole = max(peaks.values())
    return Footprint(whole, whole, tuple(PhasePeak(name, peak, peak) for name, peak in peaks.items()))
