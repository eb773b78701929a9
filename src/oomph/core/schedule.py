"""How learning rates change over the steps of a stage, as transformers has them (optimization.py, ``get_*_schedule``)."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def rate_factor(schedule: Schedule, warmup: float, step: int, steps: int) -> float:
    """What a learning rate is multiplied with in a step: from 0 to 1 in the warm-up, then back to 0, unless it is constant.

    Args:
        schedule: its shape after the warm-up: half a cosine, a line, or constant.
        warmup: the share of the steps in which it rises, rounded up to whole steps.
        step: from 0.
        steps: of the stage.
    """
    rising = math.ceil(steps * warmup)
    if step < rising:
        return step / rising
    if schedule == "constant":
        return 1.0
    progress = (step - rising) / max(1, steps - rising)
    return max(0.0, (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress)
