"""Lower bounds of what a choice needs, cheap enough for thousands of choices: what a search drops without a replay."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from oomph.core.closed_form import ClosedForm
from oomph.core.fsdp_hooks import find_groups
from oomph.core.sharding import static_bytes
from oomph.records import Choice

_BLOCK = 512
_WHOLE_GRADIENTS = ("none", "ddp", "zero1")
"""Shardings under which a rank holds the gradients of all parameters from a backward to the step."""

_REST = Choice(micro_batch=1, accumulation=1, effective_batch=1)
_DECIDES = ("gpus", "nodes", "precision", "optimizer", "optimizer_offload", "master_weights", "sharding")
"""The knobs on which resident bytes depend."""


class _Steps(NamedTuple):
    """The events of a step's micro-batches, of storages that are not resident.

    Attributes:
        formulas: the number of each event's formula.
        signs: 1 for a birth, -1 for a death.
        turns: whether all blocks have run forward, and none backward.
    """

    formulas: npt.NDArray[np.int64]
    signs: npt.NDArray[np.int64]
    turns: npt.NDArray[np.bool_]


class Bounds:
    """The bounds of one form."""

    def __init__(self, form: ClosedForm) -> None:
        self._form = form
        self._resident: dict[Choice, int] = {}
        self._working: dict[tuple[tuple[int, ...], bool, bool], tuple[int, int]] = {}
        self._steps: dict[tuple[bool, bool], _Steps] = {}

    def least_bytes(self, choice: Choice, shape: Sequence[int]) -> int:
        """Bytes that a rank of the choice has allocated at its peak, at the least.

        What stays resident (the rank's share of weights and of optimizer states, communication buffers), and on top of it
        the most that forward and backward have alive at one time, each storage rounded up to 512 bytes. Of gathered
        weights only those are in it that FSDP2 surely has then; what the allocator cannot split off is not.

        Args:
            choice: the knobs.
            shape: (samples, tokens, images) of a micro-batch, of the form's family.

        Raises:
            UserError: the sharding cannot hold these parameters, or a tensor is impossibly large.
        """
        most, at_turn = self._working_peaks(shape, choice)
        root, blocks = self._gathered if choice.sharding.startswith("fsdp2") else (0, 0)
        kept = blocks if choice.sharding == "fsdp2-no-reshard" else 0
        return self._resident_bytes(choice) + root + max(most, at_turn + kept)

    def _resident_bytes(self, choice: Choice) -> int:
        """Bytes of a rank that live through forward and backward, whatever the batch; whole gradients are not in it."""
        accumulates = choice.accumulation > 1
        key = replace(_REST, accumulation=1 + accumulates, **{name: getattr(choice, name) for name in _DECIDES})
        if key not in self._resident:
            static = static_bytes(self._form.parameters, choice, reached=self._form.reached)
            gone = {"optimizer"} if choice.optimizer_offload else set()
            if choice.sharding in _WHOLE_GRADIENTS or not (accumulates or choice.sharding == "zero3"):
                gone.add("gradient")
            self._resident[key] = sum(nbytes for role, nbytes in static.items() if role not in gone)
        return self._resident[key]

    @functools.cached_property
    def _gathered(self) -> tuple[int, int]:
        """Bytes of the root's weights under FSDP2, which stay gathered, and of the weights of all blocks that run."""
        form = self._form
        stacks = [kind.module.partition("{}")[0] if kind.phase == "forward" else None for kind in form.kinds]
        ran = {(stacks[kind], layer) for kind, layer in zip(form.kind, form.layer, strict=True)}
        root, *blocks = find_groups(form.kinds, form.parameters)
        sizes = [parameter.nbytes for parameter in form.parameters]
        running = [group for group in blocks if (group.module.partition("{}")[0], group.layer) in ran]
        return sum(sizes[n] for n in root.members), sum(sizes[n] for group in running for n in group.members)

    def _working_peaks(self, shape: Sequence[int], choice: Choice) -> tuple[int, int]:
        """The most that micro-batches have alive at any time, and at the turn from forward to backward."""
        whole, accumulates = choice.sharding in _WHOLE_GRADIENTS, choice.accumulation > 1
        key = tuple(shape), whole, accumulates
        if key not in self._working:
            rounded = -(-self._form.sizes(shape) // _BLOCK) * _BLOCK
            steps = self._events(whole, accumulates)
            alive = (rounded[steps.formulas] * steps.signs).cumsum()
            self._working[key] = int(alive.max(initial=0)), int(alive[steps.turns].max(initial=0))
        return self._working[key]

    def _events(self, whole: bool, accumulates: bool) -> _Steps:
        if (whole, accumulates) not in self._steps:
            self._steps[whole, accumulates] = self._step(whole, ("first", "next") if accumulates else ("first",))
        return self._steps[whole, accumulates]

    def _step(self, whole: bool, names: Sequence[str]) -> _Steps:
        form = self._form
        without = {"weight", "optimizer"} if whole else {"weight", "optimizer", "gradient"}
        pieces = [np.array(form.timeline[p.start : p.stop], dtype=np.int64) for p in form.pieces if p.name in names]
        timeline, turns = np.concatenate(pieces), np.concatenate([self._turns(piece) for piece in pieces])
        births = timeline >= 0
        storages = np.where(births, timeline, ~timeline)
        roles = np.array([form.kinds[kind].role for kind in form.kind])[storages]
        # Workspaces are there from the second step's beginning.
        order = np.argsort(roles != "workspace", kind="stable")
        order = order[~np.isin(roles[order], list(without))]
        return _Steps(np.array(form.formula)[storages[order]], np.where(births, 1, -1)[order], turns[order])

    def _turns(self, timeline: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether an event of a micro-batch lies between the last block's forward and the first block's backward."""
        kinds = [self._form.kinds[self._form.kind[entry]] if entry >= 0 else None for entry in timeline.tolist()]
        inside = [(at, kind.phase) for at, kind in enumerate(kinds) if kind is not None and "{}" in kind.module]
        start = max((at for at, phase in inside if phase == "forward"), default=len(timeline))
        stop = min((at for at, phase in inside if at > start and phase != "forward"), default=start)
        turns = np.zeros(len(timeline), dtype=bool)
        turns[start:stop] = True
        return turns
