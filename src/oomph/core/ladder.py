"""The ladder: configurations that fit, fastest first, all with the effective batch and the mathematics that were asked for.

What a recipe pins stays as long as anything fits with it. Where nothing does, the ladder changes pinned settings too, and
says which: the fastest configurations of all, and those that change least.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from oomph.core.choices import clashes, cuts, with_micro_batch
from oomph.core.eight_bit import EIGHT_BIT
from oomph.core.exactness import change, exactness, is_exact
from oomph.core.search import ALIKE, Searcher
from oomph.core.space import KNOBS, Space, domain, space
from oomph.core.stage import StageModel
from oomph.recipe import memory_of
from oomph.records import Choice, Rung, Search, Speed

_LEANER: dict[str, tuple[Any, ...]] = {
    "checkpointing": ("none", "every-4", "every-3", "every-2", "blocks", "blocks-offload"),
    "vision_checkpointing": ("none", "blocks"),
    "attention": ("eager-fp32", "eager", "efficient", "sdpa"),
    "loss": ("full-shifted", "full", "chunked"),
    "optimizer": ("adamw-loop", "adamw-foreach", "adamw-fused", *EIGHT_BIT),
    "optimizer_offload": (False, True),
    "expandable_segments": (False, True),
}
"""The values of a knob by falling memory: where a configuration does not fit, only a later value can help.

Of the optimizers, those with states of 8 bits are compared with each other alone."""

_ABOUT: dict[str, tuple[str, ...]] = {
    "checkpointing": ("activation",),
    "vision_checkpointing": ("activation",),
    "attention": ("scores",),
    "loss": ("logits",),
    "optimizer": ("temporary",),
    "optimizer_offload": ("optimizer",),
    "expandable_segments": (),
}
"""The roles whose bytes a knob is about; what it costs nothing to try has none."""
_BLAME = 0.15
"""The share of the memory in use from which a role is worth a change by itself."""
_MOST_LOOPS = 4
"""Images of a micro-batch up to which a search looks at a model that loops over them."""


class Climbed(NamedTuple):
    """What a search found; `choice` is the fastest configuration with all that is pinned, if any fits."""

    choice: Choice | None
    ladder: tuple[Rung, ...]
    unpinned: Rung | None
    nearest: Rung | None
    search: Search


def climb(model: StageModel, asked: Choice, keep: Collection[str] = ()) -> Climbed:
    """Searches the configurations of a stage.

    Args:
        model: the stage on its card.
        asked: the recipe's own settings, with a definite value wherever it leaves one to us.
        keep: knobs whose values stay even where nothing fits with them.
    """
    return _Climb(model, asked, keep).run()


class _Climb:
    def __init__(self, model: StageModel, asked: Choice, keep: Collection[str]) -> None:
        memory = memory_of(model.recipe, model.stage)
        self._model, self._asked, self._eval = model, asked, memory.eval_batch
        self._pins = {knob: getattr(asked, knob) for knob in (*KNOBS, "micro_batch") if getattr(memory, knob) != "auto"}
        self._held = {knob: getattr(asked, knob) for knob in keep} | self._given()
        self._searcher = Searcher(model, lambda choice: len(self._changed(choice)))
        self._spaces: list[Space] = []

    def run(self) -> Climbed:
        within = self._space({**self._pins, **self._held})
        found = self._frontier(within) or self._barely(within)
        if found:
            faster = self._faster(found[0]) if set(self._pins) - set(self._held) else None
            return Climbed(found[0], self._rungs(found), faster, None, self._search())
        if set(self._pins) - set(self._held):
            within = self._space(self._held)
            found = self._frontier(within) or self._barely(within)
        if not found:
            return Climbed(None, (), None, self._rung(self._leanest(within)), self._search())
        return Climbed(None, self._rungs([*found, *self._near()]), None, None, self._search())

    def _given(self) -> dict[str, Any]:
        """Knobs that the stage leaves no choice of."""
        model, asked = self._model, self._asked
        if not model.closed(model.first):
            return {knob: getattr(asked, knob) for knob in KNOBS}
        held = {} if model.trains("vision") else {"vision_checkpointing": asked.vision_checkpointing}
        if model.loops and model.images:  # a form for each number of images: fewer other knobs
            held |= {knob: getattr(asked, knob) for knob in ("loss", "vision_checkpointing")}
        return held

    def _space(self, fixed: Mapping[str, Any]) -> list[Choice]:
        """The choices worth a look, the forms of all but single samples made."""
        found = space(self._asked, fixed, self._model.gpu, self._model.recipe.hardware, self._eval)
        self._spaces.append(found)
        choices = [choice for choice in found.choices if self._traceable(choice)]
        self._model.prepare(choice for choice in choices if choice.micro_batch > 1)
        return choices

    def _traceable(self, choice: Choice) -> bool:
        """Whether a trace takes seconds and not minutes: a model's loop over images makes it longer with each image."""
        few = choice.micro_batch * self._model.images <= _MOST_LOOPS
        return not self._model.loops or few or choice.micro_batch == self._asked.micro_batch

    def _frontier(self, choices: Sequence[Choice]) -> list[Choice]:
        """The choices that fit and that no other one beats.

        Single samples have forms of their own, and are never faster than two at a time: they are looked at where two do
        not fit, which first the bounds say and then the replays.
        """
        several = [choice for choice in choices if choice.micro_batch > 1]
        found = self._searcher.frontier(several + self._single(choices, several, self._no_room))
        late = self._single(choices, several, self._searcher.failed)
        return self._searcher.frontier([*found, *late]) if late else found

    def _single(self, choices: Sequence[Choice], several: Sequence[Choice], fails: Callable[[Choice], bool]) -> list[Choice]:
        """The choices of one sample whose next larger cut fails, their forms made."""
        larger = {_knobs(choice): choice for choice in several}  # the smallest, as cuts come largest first
        ones = [
            choice
            for choice in choices
            if choice.micro_batch == 1
            and (_knobs(choice) not in larger or (fails(larger[_knobs(choice)]) and self._model.may_fit(choice)))
        ]
        self._model.prepare(ones)
        return ones

    def _barely(self, choices: Sequence[Choice]) -> list[Choice]:
        """The fastest of the choices that fit without room for the error bound; none where no choice does."""
        barely = [choice for choice in choices if choice in self._searcher.replayed and self._model.fits(choice)]
        return [min(barely, key=self._seconds)] if barely else []

    def _leanest(self, choices: Sequence[Choice]) -> Choice:
        """The choice with the smallest bound, where single samples are judged by the forms of several that are made."""
        several = {_knobs(choice) for choice in choices if choice.micro_batch > 1}

        def least(choice: Choice) -> int:
            judged = choice.micro_batch == 1 and _knobs(choice) in several
            return self._model.bound_of_one(choice) if judged else self._model.bound(choice)

        smallest = min(map(least, choices))
        lean = [choice for choice in choices if least(choice) == smallest]
        self._model.prepare(lean)
        return self._searcher.leanest(lean)

    def _no_room(self, choice: Choice) -> bool:
        return self._model.bound(choice) > self._model.usable_bytes(choice)

    def _faster(self, best: Choice) -> Rung | None:
        """The fastest configuration without pins, where it is faster than the best one with them.

        Single samples are looked at where the batch has no larger cut.
        """
        within = self._space(self._held)
        several = [choice for choice in within if choice.micro_batch > 1]
        found = self._searcher.fastest(several + self._single(within, several, lambda _: False))
        if found is None or self._seconds(found) > (1 - 2 * ALIKE) * self._seconds(best):
            return None
        return self._rung(found)

    def _seconds(self, choice: Choice) -> float:
        return self._model.speed(choice).step_seconds

    # The neighbourhood of what was asked for.

    def _near(self) -> list[Choice]:
        """Configurations that fit and change one setting, or attention and loss, of those that were asked for."""
        singles = [self._with(knob, value) for knob in _LEANER if self._to_blame(knob) for value in self._leaner(knob)]
        singles += [self._with("sharding", value) for value in self._values("sharding")]
        pairs = [
            replace(self._asked, attention=attention, loss=loss)
            for attention in (self._leaner("attention") if self._to_blame("attention") else ())
            for loss in self._leaner("loss")[-1:]
        ]
        changed = [choice for choice in [*singles, *pairs] if self._possible(choice)]
        self._model.prepare(changed)
        near = [choice for choice in changed if self._searcher.fits(choice)]
        near += self._recut([choice for choice in pairs if choice in near])
        return [*near, *self._smaller()]

    def _to_blame(self, knob: str) -> bool:
        """Whether what the knob is about takes a good part of the memory at the moment of the failure."""
        by_role = self._model.predict(self._asked).by_role
        about = ("optimizer",) if knob == "optimizer" and self._asked.optimizer in EIGHT_BIT else _ABOUT[knob]
        return not about or sum(by_role.get(role, 0) for role in about) >= _BLAME * sum(by_role.values())

    def _leaner(self, knob: str) -> list[Any]:
        order = _LEANER[knob]
        own = getattr(self._asked, knob)
        return [value for value in self._values(knob) if own not in order or order.index(value) > order.index(own)]

    def _values(self, knob: str) -> list[Any]:
        return [] if knob in self._held else list(domain(knob, self._asked)[1:])

    def _with(self, knob: str, value: Any) -> Choice:
        return replace(self._asked, **{knob: value})

    def _possible(self, choice: Choice) -> bool:
        legal = not clashes(vars(choice), self._model.gpu, self._model.recipe.hardware)
        return legal and choice.micro_batch in cuts(choice, choice.sharding, every=True)

    def _recut(self, choices: Iterable[Choice]) -> list[Choice]:
        """The same with the largest micro-batch that fits, where it is larger."""
        found = []
        for choice in choices if "micro_batch" not in self._held else ():
            larger = (cut for cut in cuts(choice, choice.sharding) if cut > choice.micro_batch)
            tried = (with_micro_batch(choice, cut, self._eval) for cut in larger)
            best = next((recut for recut in tried if self._searcher.fits(recut)), None)
            found += [best] if best is not None else []
        return found

    def _smaller(self) -> list[Choice]:
        """The published cure: the largest micro-batch below the one asked for that fits."""
        if "micro_batch" in self._held:
            return []
        smaller = [cut for cut in cuts(self._asked, self._asked.sharding) if cut < self._asked.micro_batch]
        choices = (with_micro_batch(self._asked, cut, self._eval) for cut in smaller)
        found = next((choice for choice in choices if self._searcher.fits(choice)), None)
        return [found] if found is not None else []

    # Rungs.

    def _rungs(self, choices: Iterable[Choice]) -> tuple[Rung, ...]:
        rungs = sorted(map(self._rung, dict.fromkeys(choices)), key=lambda rung: rung.step_seconds)
        names: dict[int, list[str]] = {0: ["fastest"]}
        least = min(range(len(rungs)), key=lambda n: rungs[n].prediction.reserved_peak_bytes)
        names.setdefault(least, []).append("least memory")
        if all(rung.changes for rung in rungs):
            simplest = min(range(len(rungs)), key=lambda n: (len(rungs[n].changes), rungs[n].step_seconds))
            names.setdefault(simplest, []).append("least change")
        for number, rung in enumerate(rungs):
            if rung.choice == self._asked:
                names.setdefault(number, []).append("as asked")
        return tuple(replace(rung, named=tuple(names.get(number, ()))) for number, rung in enumerate(rungs))

    def _rung(self, choice: Choice) -> Rung:
        speed = self._model.speed(choice)
        return Rung(
            **{field.name: getattr(speed, field.name) for field in fields(Speed)},
            choice=choice,
            prediction=self._model.predict(choice),
            changes={knob: change(knob, self._asked, choice) for knob in self._changed(choice)},
            exact=is_exact(self._asked, choice, self._model.drops, self._model.couples),
            exactness=exactness(self._asked, choice, self._model.routes, self._model.drops, self._model.couples),
        )

    def _changed(self, choice: Choice) -> list[str]:
        """The pinned knobs to which a choice gives another value."""
        return [knob for knob, value in self._pins.items() if getattr(choice, knob) != value]

    def _search(self) -> Search:
        bounded, replayed = self._searcher.bounded, self._searcher.replayed
        widest = max(self._spaces, key=lambda found: found.considered)
        return Search(
            considered=widest.considered,
            dominated=widest.considered - len({*widest.choices, *bounded, *replayed}),
            bounded=len(bounded),
            replayed=len(replayed),
        )


def _knobs(choice: Choice) -> Choice:
    """The choice without the cut of its batch."""
    return replace(choice, micro_batch=0, accumulation=0, eval_batch=None)
