"""Writes docs/ablation.md: predictions without one CUDA rule at a time, and without parts of the allocator.

``results.json`` keeps the predictions; ``--write`` makes them anew, which takes some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any, NamedTuple

import torch

from oomph.core.allocator import Allocator, replay
from oomph.core.catalogue import model_folder
from oomph.core.closed_form import constant_form
from oomph.core.events import Events
from oomph.core.layout import Shape, compose
from oomph.core.reserve import rounded
from oomph.core.unroll import UNITS
from oomph.errors import UntraceableError
from oomph.live.batch import images_of
from oomph.live.cuda_rules import RULES
from oomph.live.cuda_rules.rules import TABLE
from oomph.live.model import build, part_finder, read_config
from oomph.live.simulate import Setup, Simulator
from oomph.records import Attention

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
TEMPLATE = Path(__file__).with_name("page.md")
PAGE = ROOT / "docs" / "ablation.md"

ALL = ""
NO_SEGMENTS, NO_ROUNDING = "no segments", "no rounding"
PHASES = ("forward", "backward", "optimizer")
ROWS = (
    "SmolLM2-360M-eager-1x4096",
    "SmolLM2-360M-sdpa-1x4096",
    "TinyLlama-1.1B-Chat-v1.0-eager-2x2048",
    "Qwen2.5-1.5B-Instruct-eager-2x1024",
    "Qwen2.5-1.5B-Instruct-sdpa-2x1024",
)


class Step(NamedTuple):
    """A step to predict: a catalogued model, what of it is frozen, and its micro-batch."""

    model: str
    frozen: tuple[str, ...]
    attention: Attention
    capability: tuple[int, int]
    shape: Shape


STEPS = {
    "LLaVA, A100": Step("phi2-clip336-llava", (), "sdpa", (8, 0), Shape(4, 1024, 4)),
    "LLaVA, H100": Step("phi2-clip336-llava", (), "sdpa", (9, 0), Shape(4, 1024, 4)),
    "MoE, A100": Step("qwen3-30b-a3b", ("experts",), "sdpa", (8, 0), Shape(2, 2048, 0)),
    "MoE, H100": Step("qwen3-30b-a3b", ("experts",), "sdpa", (9, 0), Shape(2, 2048, 0)),
    "dense, eager, A100": Step("qwen2.5-7b", (), "eager", (8, 0), Shape(2, 2048, 0)),
}
Peaks = dict[str, int]


@functools.cache
def measured_rows() -> ModuleType:
    """The rows of tests/measured and how they are traced."""
    spec = importlib.util.spec_from_file_location("measured_rows", ROOT / "tests" / "measured" / "rows.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kind(NamedTuple):
    """A way to get a step's events without some rules, and to replay them."""

    events: Callable[[str, Collection[str]], Events]
    peaks: Callable[[Events], Peaks]


def _events_of_row(key: str, without: Collection[str]) -> Events:
    events: Events = measured_rows().events(key, without)
    return events


def _peaks_of_row(events: Events) -> Peaks:
    return dataclasses.asdict(measured_rows().replayed(events))


def _events_of_step(key: str, without: Collection[str]) -> Events:
    step = STEPS[key]
    config = read_config(model_folder(step.model))
    model = build(config, torch.bfloat16, step.attention).train()
    part = part_finder(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part(name) not in step.frozen)
    images = images_of(config, None) if step.shape.images else None
    setup = Setup(step.attention, "full", "adamw-foreach", "none", "none", step.capability, without=frozenset(without))
    return compose(constant_form(Simulator(model, setup, UNITS, images).trace(step.shape)), step.shape, 1, None)


def _peaks_of_step(events: Events) -> Peaks:
    result = replay(events.sizes, events.segments, Allocator())
    phases = {phase.phase: phase.allocated_peak_bytes for phase in result.phases}
    return {"reserved": result.peak_reserved, "allocated": result.peak_allocated, **phases}


MEASURED, PREDICTED = Kind(_events_of_row, _peaks_of_row), Kind(_events_of_step, _peaks_of_step)
"""Rows, and steps that nobody has measured: peaks of reserved bytes, of allocated bytes, and of the latter in each phase."""


def summed(events: Events, size: Callable[[int], int]) -> int:
    """The most bytes alive at one time in the last step, each storage counted as `size` says."""
    live = most = 0
    for segment in events.segments:
        for _ in range(segment.repeat):
            for entry in segment.timeline:
                live += size(events.sizes[entry]) if entry >= 0 else -size(events.sizes[~entry])
                most = max(most, live) if segment.name.startswith("step") else most
    return most


def variants(kind: Kind, key: str, names: Collection[str] = tuple(RULES)) -> dict[str, Peaks | None]:
    """The peaks with everything, without each rule, and as plain sums; none where the model cannot be traced without it.

    Rules without part in the events are left out.
    """
    whole = kind.events(key, ())
    found: dict[str, Peaks | None] = {ALL: kind.peaks(whole)}
    found[NO_SEGMENTS] = {"allocated": summed(whole, rounded)}
    found[NO_ROUNDING] = {"allocated": summed(whole, lambda size: size)}
    hidden = {what.op.partition(":")[0] for what in whole.kinds if ":" in what.op}
    for name in names:
        if name in TABLE and hidden.isdisjoint(map(str, TABLE[name])):
            continue
        try:
            events = kind.events(key, (name,))
        except UntraceableError:
            found[name] = None
            continue
        if (events.sizes, events.segments) != (whole.sizes, whole.segments):
            found[name] = kind.peaks(events)
    return found


def versions() -> dict[str, str]:
    """What the predictions were made with."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "transformers", "peft")}


def measured() -> dict[str, Peaks]:
    """What was measured, by row."""
    rows = measured_rows()
    return {key: dataclasses.asdict(rows.Peaks.of(row["measured"])) for key, row in rows.UNQUANTISED.items()}


def gather(rows: Iterable[str], steps: Iterable[str]) -> dict[str, Any]:
    """All predictions."""
    return {
        "versions": versions(),
        "rows": {key: variants(MEASURED, key) for key in rows},
        "steps": {key: variants(PREDICTED, key) for key in steps},
    }


# --- the page ----------------------------------------------------------------------------------------------------------


def page(results: dict[str, Any], truth: dict[str, Peaks]) -> str:
    """The page.

    Args:
        results: what `gather` gives.
        truth: for each row, what was measured: ``allocated`` and ``reserved``.
    """
    rows, steps = results["rows"], results["steps"]
    idle = [name for name in RULES if not any(name in row for row in rows.values())]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        results["versions"],
        count=len(rows),
        rows="\n".join(f"- {key}" for key in rows),
        exact=sum(row[ALL] == truth[key] for key, row in rows.items()),
        measured=_measured_table(rows, truth),
        idle=textwrap.fill(f"Without part in these steps: {', '.join(idle)}.", 128, break_on_hyphens=False),
        described="\n".join(f"- {key}: {_described(STEPS[key])}" for key in steps),
        unmeasured=_steps_table(steps),
    )


def _described(step: Step) -> str:
    frozen = f"all but {' and '.join(step.frozen)}" if step.frozen else "all weights"
    images = f", {step.shape.images} images" if step.shape.images else ""
    shape = f"{step.shape.samples} × {step.shape.tokens} tokens{images}"
    return f"{step.model}, {frozen} train, {step.attention} attention, {shape}"


def _measured_table(rows: dict[str, Any], truth: dict[str, Peaks]) -> str:
    lines = []
    for name in (*RULES, NO_SEGMENTS, NO_ROUNDING):
        touched = {key: row[name] for key, row in rows.items() if name in row}
        if not touched:
            continue
        traced = {key: found for key, found in touched.items() if found is not None}
        exact = sum(row.get(name, row[ALL]) == truth[key] for key, row in rows.items())
        peaks = [_worst(traced, rows, among) for among in (("allocated",), PHASES, ("reserved",))]
        lines.append([name, *peaks, f"{exact} of {len(rows)}"])
    return _table(("without", "peak allocated", "of a phase", "peak reserved", "still exact"), lines)


def _worst(found: dict[str, Peaks], rows: dict[str, Any], among: Sequence[str]) -> str:
    """The largest relative change of one of the peaks, in any row."""
    changes = [
        ((peaks[key] - rows[row][ALL][key]) / rows[row][ALL][key], peaks[key] - rows[row][ALL][key], key)
        for row, peaks in found.items()
        for key in among
        if key in peaks
    ]
    if not changes:
        return "-" if found else "cannot be traced"
    share, change, key = max(changes, key=lambda one: abs(one[0]))
    where = f", {key}" if len(among) > 1 else ""
    return f"{change:+,} ({share:+.2%}{where})" if change else "0"


def _steps_table(steps: dict[str, Any]) -> str:
    lines = []
    for name in (*RULES, NO_SEGMENTS, NO_ROUNDING):
        if any(name in step for step in steps.values()):
            lines.append([name, *(_step_cell(step, name) for step in steps.values())])
    return _table(("without", *steps), lines)


def _step_cell(step: dict[str, Any], name: str) -> str:
    if name not in step:
        return ""
    found, whole = step[name], step[ALL]
    if found is None:
        return "cannot be traced"
    most = max((key for key in found if key != "reserved"), key=lambda key: abs(found[key] - whole[key]))
    change, reserved = found[most] - whole[most], found.get("reserved", whole["reserved"]) - whole["reserved"]
    if not change and not reserved:
        return "0"
    where = f" in {most}" if most != "allocated" else ""
    return f"{change:+,}{where}; {reserved:+,}" if "reserved" in found else f"{change:+,}"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Prints the page, or writes it and what it was made from."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--as-recorded", action="store_true", help="take the predictions of results.json")
    parser.add_argument("--write", action="store_true", help="write results.json and docs/ablation.md")
    options = parser.parse_args()
    recorded = options.as_recorded
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if recorded else gather(ROWS, STEPS)
    text = page(results, measured())
    if not options.write:
        print(text, end="")
        return
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
