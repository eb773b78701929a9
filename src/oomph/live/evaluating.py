"""The loss over held-out data: forwards without gradients, cut as they are predicted to fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oomph.core.admission import Admission, TooLargeError
from oomph.errors import RunError
from oomph.live.budget import uncounted
from oomph.live.data.collating import Prepared
from oomph.live.precision import Arithmetic
from oomph.live.recover import Failure, Place, attempt
from oomph.live.step import LOSSES, Batch
from oomph.units import size


class Evaluator:
    """Evaluates a model on samples.

    Args:
        model: on its device.
        loss: one of `step.LOSSES`, by its name.
        arithmetic: what the model computes in.
        admission: cuts pieces of the samples.
        collate: makes micro-batches of samples, of at least so many tokens.
        piece: samples that are prepared at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss: str,
        arithmetic: Arithmetic,
        admission: Admission,
        collate: Callable[[Sequence[Prepared], int], Batch],
        piece: int,
    ) -> None:
        self._model, self._loss, self._arithmetic = model, loss, arithmetic
        self._admission, self._collate, self._piece = admission, collate, piece
        self._device = next(model.parameters()).device

    def evaluate(
        self, samples: Callable[[int], Prepared], count: int, stop: Callable[[], bool]
    ) -> tuple[float, int, float] | None:
        """The mean loss over all label tokens, how many these are, and the seconds that it took; None if it was stopped.

        Args:
            samples: gives each sample, by its number.
            count: how many there are.
            stop: asked before every piece.

        Raises:
            RunError: a sample does not fit by itself.
        """
        begun, total, tokens = time.perf_counter(), 0.0, 0
        self._model.eval()
        try:
            for first in range(0, count, self._piece):
                if stop():
                    return None
                with uncounted():
                    piece = [samples(index) for index in range(first, min(count, first + self._piece))]
                total += sum(self._losses(piece))
                tokens += sum(sample.cost.label_tokens for sample in piece)
        finally:
            self._model.train()
        return total / max(1, tokens), tokens, time.perf_counter() - begun

    def _losses(self, samples: list[Prepared]) -> Iterator[float]:
        """The sums of each micro-batch's loss over its tokens. One that runs out of memory is cut anew."""
        while samples:
            costs = [sample.cost for sample in samples]
            try:
                split = self._admission.split(costs)
            except TooLargeError as error:
                raise RunError(
                    f"{samples[error.position].name} of data.evaluation does not fit by itself: it takes "
                    f"{size(error.peak_bytes)}, and there are {size(error.limit_bytes)}",
                    "leave it out, lower data.max_tokens, or give it more memory",
                ) from None
            done: set[int] = set()
            for number, (positions, shape) in enumerate(zip(split.micro_batches, split.shapes, strict=True)):
                loss = self._loss_of([samples[position] for position in positions], shape.tokens)
                if isinstance(loss, Failure):
                    self._admission.failed(split, number)
                    break
                yield loss
                done |= set(positions)
            samples = [sample for position, sample in enumerate(samples) if position not in done]

    def _loss_of(self, samples: Sequence[Prepared], tokens: int) -> float | Failure:
        def run() -> float:
            with torch.no_grad(), self._arithmetic.around_forward(self._device.type):
                batch = {name: self._moved(value) for name, value in self._collate(samples, tokens).items()}
                return float(LOSSES[self._loss](self._model, batch, 1))

        return attempt(run, self._model, Place(), self._device)

    def _moved(self, value: Any) -> Any:
        return value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value
