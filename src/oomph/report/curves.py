"""A run's log as pictures: the loss, memory as it was predicted and measured, and the load of experts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oomph.report.expert_loads import draw_loads
from oomph.run_records import EvaluationRecord, StepRecord, last_loads
from oomph.units import GIB, MIB

_INCHES, _DOTS = (8.0, 4.5), 120
_FEW = 30
"""Steps up to which each is marked with a point."""


def draw(lines: Sequence[StepRecord | EvaluationRecord], title: str, folder: Path) -> list[Path]:
    """Draws ``loss.png`` and ``memory.png`` into a folder, and of a model with experts ``experts.png``; nothing without steps.

    Args:
        lines: of the log, in their order.
        title: the run's name.
        folder: where the pictures go.

    Returns:
        The pictures.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    steps = [line for line in lines if isinstance(line, StepRecord) and line.step]
    if not steps:
        return []
    before = _steps_before(steps)
    evaluations = [line for line in lines if isinstance(line, EvaluationRecord)]
    pictures: list[tuple[str, Callable[[Any], None]]] = [
        ("loss.png", lambda axes: _loss(axes, steps, evaluations, before)),
        ("memory.png", lambda axes: _memory(axes, steps, before)),
    ]
    drawn = [_draw(folder / name, title, before, fill) for name, fill in pictures]
    last = next((step.stage for step in reversed(steps) if step.experts), None)
    loads, _ = last_loads([step for step in steps if step.stage == last])
    if any(sum(load.total) for load in loads):
        drawn.append(_save(folder / "experts.png", f"{title}, {last}", lambda figure: draw_loads(figure, loads)))
    return drawn


def _steps_before(steps: Sequence[StepRecord]) -> dict[str, int]:
    """How many steps the stages before each have."""
    before, total = {}, 0
    for step in steps:
        if step.stage not in before:
            before[step.stage] = total
            total += step.steps
    return before


def _draw(path: Path, title: str, before: dict[str, int], fill: Callable[[Any], None]) -> Path:
    def curves(figure: Any) -> None:
        axes: Any = figure.add_subplot()
        fill(axes)
        for stage, start in before.items():
            axes.axvline(start + 0.5, color="0.8", linewidth=1, zorder=0)
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
            axes.annotate(stage, (start + 0.5, 1), (3, -3), parse_math=False, **place)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()

    return _save(path, title, curves)


def _save(path: Path, title: str, fill: Callable[[Any], None]) -> Path:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks of its cache of fonts
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    fill(figure)
    figure.suptitle(title, parse_math=False)
    temporary = path.with_name(f".unfinished-{path.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter of the title that the font does not have
        figure.savefig(temporary, dpi=_DOTS, format="png")
    temporary.replace(path)
    return path


def _loss(
    axes: Any, steps: Sequence[StepRecord], evaluations: Sequence[EvaluationRecord], before: dict[str, int]
) -> None:
    trained = [(before[line.stage] + line.step, line.loss) for line in steps if line.loss is not None]
    held_out = [(before[line.stage] + line.step, line.loss) for line in evaluations if line.stage in before]
    axes.plot(*_columns(trained), marker="." if len(trained) <= _FEW else None, label="training, each step")
    if held_out:
        axes.plot(*_columns(held_out), marker="o", linestyle="--", label="held-out data")
    axes.set_ylabel("loss (nats per label token)")


def _memory(axes: Any, steps: Sequence[StepRecord], before: dict[str, int]) -> None:
    most = max(max(line.predicted_peak_bytes or 0, line.measured_peak_bytes or 0) for line in steps)
    unit, name = (GIB, "GiB") if most >= GIB else (MIB, "MiB")
    marker = "." if len(steps) <= _FEW else None
    series: list[tuple[str, Callable[[StepRecord], int | None], dict[str, Any]]] = [
        ("measured", lambda line: line.measured_peak_bytes, {"marker": marker}),
        ("predicted", lambda line: line.predicted_peak_bytes, {"linestyle": ":", "linewidth": 2.5}),
    ]
    for label, value, style in series:
        found = [(before[line.stage] + line.step, at / unit) for line in steps if (at := value(line)) is not None]
        if found:
            axes.plot(*_columns(found), label=label, **style)
    limits = [(before[line.stage] + line.step, line.limit_bytes / unit) for line in steps]
    if max(limit for _, limit in limits) * unit <= 4 * most:
        axes.plot(*_columns(limits), color="tab:red", linestyle="--", label="allowed")
    redone = [
        (before[line.stage] + line.step, (line.measured_peak_bytes or line.predicted_peak_bytes or 0) / unit)
        for line in steps
        if line.recoveries
    ]
    if redone:
        axes.plot(*_columns(redone), marker="x", linestyle="none", color="tab:red", label="redone: memory ran out")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"peak of the step ({name})")


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
