"""A run's log summed up, stage by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from oomph.run_records import EvaluationRecord, RunStage, StageSetup, StepRecord, last_loads


def sum_up(name: str, setup: StageSetup, lines: Sequence[StepRecord | EvaluationRecord]) -> RunStage:
    """One stage of a run.

    Args:
        name: the stage's.
        setup: what was known of it before it ran.
        lines: of the log, those of other stages too.
    """
    everything = [line for line in lines if line.stage == name and isinstance(line, StepRecord)]
    steps = [line for line in everything if line.step]
    losses = [line.loss for line in steps if line.loss is not None]
    loads, balance_loss = last_loads(steps)
    seconds: Counter[str] = Counter()
    for line in steps:
        seconds.update(line.seconds)
    errors = [
        line.prediction_error_bytes / line.measured_peak_bytes
        for line in steps
        if line.prediction_error_bytes is not None and line.measured_peak_bytes
    ]
    return RunStage(
        name=name,
        steps=len(steps),
        planned_steps=setup.steps,
        samples=sum(line.samples for line in steps),
        tokens=sum(line.tokens for line in steps),
        trained=setup.trained,
        inexact=setup.inexact,
        choice=setup.choice,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        evaluations=tuple(line for line in lines if line.stage == name and isinstance(line, EvaluationRecord)),
        limit_bytes=setup.limit_bytes,
        predicted_peak_bytes=max((line.predicted_peak_bytes or 0 for line in steps), default=0) or None,
        measured_peak_bytes=max((line.measured_peak_bytes or 0 for line in steps), default=0) or None,
        worst_error=max(errors, key=abs, default=None),
        mean_error=sum(errors) / len(errors) if errors else None,
        recoveries=tuple(recovery for line in everything for recovery in line.recoveries),
        skipped=tuple(sample for line in steps for sample in line.skipped),
        shrunk=tuple(sample for line in steps for sample in line.shrunk),
        seconds=dict(seconds),
        experts=loads,
        balance_loss=balance_loss,
    )
