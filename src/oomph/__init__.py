"""Oomph: the peak CUDA memory of a training step, predicted to the byte and without a GPU.

`predict` does so for a model and a step of your own; `render` shows what it gives.

The records' names are imported when they are first used, and so is what the two functions need, so that ``import oomph`` costs
next to nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from oomph.errors import UntraceableError, UserError
    from oomph.records import Choice, Footprint, Measurement, Plan, Prediction

__all__ = [
    "Choice",
    "Footprint",
    "Measurement",
    "Plan",
    "Prediction",
    "UntraceableError",
    "UserError",
    "predict",
    "render",
]

_HOME = {
    "Choice": "oomph.records",
    "Footprint": "oomph.records",
    "Measurement": "oomph.records",
    "Plan": "oomph.records",
    "Prediction": "oomph.records",
    "UntraceableError": "oomph.errors",
    "UserError": "oomph.errors",
}
_RENDERED = {
    "Plan": "oomph.report.text",
    "Prediction": "oomph.report.prediction",
    "Measurement": "oomph.report.measurement",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def predict(
    step: Callable[..., Any],
    model: Any,
    example_batch: Any,
    *,
    gpu: str,
    optimizer: Callable[[list[Any]], Any] | None = None,
    steps: int = 2,
    layers: Literal["all", "equal"] = "all",
    worst_case: bool = False,
    expandable_segments: bool = False,
) -> Prediction:
    """What a training step of your own needs of a GPU, without one. docs/your-own-model.md has an example.

    The step runs for real, on a copy of the model whose tensors are fake: they have shapes and no data. Your model stays as
    it is. Every tensor of model and batch counts as the GPU's, wherever it lies now.

    Args:
        step: called as ``step(model, batch)``, or ``step(model, optimizer, batch)`` where there is an `optimizer`. It does what
            one step of your training does: forward, backward, ``optimizer.step()``. What it returns is dropped.
        model: any ``torch.nn.Module``, with weights or on the ``meta`` device, in the mode (training or evaluation) that it
            is in.
        example_batch: what the step gets as its batch: tensors in any structure of lists, tuples and dicts, on any device,
            with other things between them. Integers and bools keep their values, floating-point tensors only their shapes.
        gpu: the card, by a name of the catalogue or a part of one, ``A100-SXM4-40GB`` or ``4090``.
        optimizer: makes the optimizer from a list of the parameters that require a gradient:
            ``lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)``.
        steps: how many steps run, one after the other; two or more, since an optimizer's states exist from the second on.
        layers: ``"equal"`` traces five layers of a long ``nn.ModuleList`` of equal ones and repeats the middle one, if that
            gives a trace of six layers to the byte; ``"all"`` traces all.
        worst_case: whether conditions on values that nobody knows select every element (``x[mask]``, ``nonzero``,
            ``masked_select``). Without it the step fails there.
        expandable_segments: whether the allocator runs with ``expandable_segments:True``.

    Raises:
        UserError: an argument cannot be taken, or the step uses weights or an optimizer that it is not given.
        UntraceableError: the step asks for what fake tensors do not have. The message names the module, the operator, the
            line, and the way out.
        Exception: what the step itself raises, with a note that says where.
    """
    live: Any = importlib.import_module("oomph.live.predict")
    prediction: Prediction = live.predict(
        step,
        model,
        example_batch,
        gpu=gpu,
        optimizer=optimizer,
        steps=steps,
        layers=layers,
        worst_case=worst_case,
        expandable_segments=expandable_segments,
    )
    return prediction


def render(record: Plan | Prediction | Measurement, width: int = 80, color: bool = False) -> str:
    """A record as text for a terminal: ``print(oomph.render(prediction))``.

    Args:
        record: a plan, a prediction or a measurement.
        width: cells of a line; below 70 it is taken as 70.
        color: whether to add escape codes for colour and weight; the words are the same.

    Raises:
        TypeError: there is no text for such a record.
    """
    name = type(record).__name__
    if name not in _RENDERED:
        raise TypeError(f"a {name} cannot be rendered, only {', '.join(_RENDERED)}")
    report: Any = importlib.import_module(_RENDERED[name])
    text: str = report.render(record, width, color)
    return text
