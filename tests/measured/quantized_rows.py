"""The measured steps of t4_lora_sweep.json with nf4 weights: points, and intervals over the loader's interleavings.

The script is that of rows.py. It loads a quantised model with ``from_pretrained``, whose worker threads of transformers 5.0.0
run ahead of the quantisation: see `oomph.core.pretrained`. Which of them is how fast decides where blocks lie. The point
takes workers of equal speed and a main thread that needs no time; the interval takes main threads from fast to slow.

Tests and benchmarks load this file by its path.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from oomph.core.allocator import rounded
from oomph.core.closed_form import constant_form
from oomph.core.events import Events
from oomph.core.layout import as_traced
from oomph.core.pretrained import Workers, from_pretrained, interleavings


def _rows() -> Any:
    name = "measured_rows"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("rows.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


rows = _rows()
MEASURED: list[dict[str, Any]] = [row for row in rows.ROWS if row["run"]["quantization"] == "nf4"]
QUANTISED: dict[str, list[dict[str, Any]]] = {}
for _row in MEASURED:
    QUANTISED.setdefault(rows.name(_row), []).append(_row)
"""Rows by name; a configuration that was measured several times has several."""


@dataclass(frozen=True)
class Prediction:
    """`Peaks` of the nominal load, and the least and the most of each over it and the sampled ones."""

    point: Any
    low: Any
    high: Any


@functools.cache
def script(key: str) -> Events:
    """The events of a row's script with the weights loaded in the trace's order."""
    shape = (1, 1, 0)  # of no account: the sizes are those of the trace
    return as_traced(constant_form(rows.trace(QUANTISED[key][0])), shape)


@functools.cache
def predicted(key: str) -> Prediction:
    """The predicted peaks of a row, from the nominal load and the sampled ones."""
    events = script(key)
    loads = (Workers(), *interleavings())
    peaks = [rows.replayed(from_pretrained(events, workers)) for workers in loads]
    names = [field.name for field in fields(rows.Peaks)]
    low, high = (rows.Peaks(**{n: pick(getattr(p, n) for p in peaks) for n in names}) for pick in (min, max))
    return Prediction(peaks[0], low, high)


def requested(key: str) -> int:
    """The peak of the measured step in bytes asked for, rounded up to 512 each: what blocks hold without rests."""
    events = script(key)
    alive = peak = 0
    for segment in events.segments:
        if segment.name == "phases":
            break
        peak = 0
        for entry in segment.timeline:
            alive += rounded(events.sizes[entry]) if entry >= 0 else -rounded(events.sizes[~entry])
            peak = max(peak, alive)
    return peak


def shown(key: str) -> list[dict[str, Any]]:
    """A line for each measurement of a row: bytes predicted and measured, the intervals, and the cause of a larger residual."""
    prediction, least = predicted(key), requested(key)
    lines = []
    for row in QUANTISED[key]:
        found = rows.Peaks.of(row["measured"])
        residual = prediction.point.allocated - found.allocated
        lines.append(
            {
                "row": key,
                "allocated": prediction.point.allocated,
                "allocated_interval": (prediction.low.allocated, prediction.high.allocated),
                "measured_allocated": found.allocated,
                "reserved": prediction.point.reserved,
                "reserved_interval": (prediction.low.reserved, prediction.high.reserved),
                "measured_reserved": found.reserved,
                "cause": _cause(prediction.point, found, least) if abs(residual) > 0.001 * found.allocated else "",
            }
        )
    return lines


def _cause(point: Any, found: Any, least: int) -> str:
    """Requests are the same in both: what differs are rests of blocks, already after loading or from there on."""
    predicted_rests, measured_rests = ((peaks.allocated - least) / rows.MIB for peaks in (point, found))
    loaded = (point.loaded - found.loaded) / rows.MIB
    return (
        f"rests of blocks at the peak, {predicted_rests:.2f} MiB predicted and {measured_rests:.2f} MiB measured, "
        f"of which {loaded:+.2f} MiB differ after loading: the speed of the loader's threads"
    )
