"""What helps a stage that ran out of memory: rungs of its ladder, and changes beside it, each with what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from oomph.core.choices import clashes, cuts, with_micro_batch
from oomph.core.exactness import change, exactness, is_exact
from oomph.core.plan import searched
from oomph.core.stage import StageModel
from oomph.diagnosis_records import Cure
from oomph.errors import UserError
from oomph.recipe import memory_of
from oomph.records import Choice, FailingRequest, Rung, StagePlan

RUNGS = 3
"""Rungs of the ladder that are shown, unless more of them have names."""

_FEW = 3
_BATCH = {"micro_batch", "accumulation", "eval_batch"}


def cures(model: StageModel, asked: Choice, event: FailingRequest | None) -> tuple[Cure, ...]:
    """Changes with the same effective batch, each predicted: those that fit first, of these the fastest first.

    Among them is the reader's own, half the micro-batch and twice the accumulation, whether it fits or not. What trains
    something else comes last.

    Args:
        model: the stage on its card.
        asked: the configuration that ran out of memory.
        event: the request that failed, where it is known.
    """
    plan, halved = searched(model), _halved(model, asked)
    choices = dict.fromkeys([*_own(model, asked), *(rung.choice for rung in _selected(plan))])
    model.prepare(choices)
    made = [_valued(model, asked, choice, event) for choice in choices if choice != asked]
    made = [replace(cure, asked=cure.choice == halved) for cure in made]
    made.sort(key=lambda cure: (not cure.fits, -(cure.samples_per_second or 0.0)))
    cut = _cut_after_splice(model, asked)
    made += [cut] if cut else []
    return tuple(made) if any(cure.fits for cure in made) else (*made, *_suggested(plan))


def _selected(plan: StagePlan) -> list[Rung]:
    """The first rungs, those with names, and what comes nearest where none fits."""
    rungs = [rung for number, rung in enumerate(plan.ladder) if number < RUNGS or rung.named]
    return rungs or ([plan.nearest] if plan.nearest else [])


def _own(model: StageModel, asked: Choice) -> Iterator[Choice]:
    """Changes that are valued whatever the ladder holds: half the batch, no scores written out, no logits kept."""
    halved = _halved(model, asked)
    if halved:
        yield halved
    lean = replace(asked, attention="efficient") if asked.attention.startswith("eager") else asked
    for choice in (lean, replace(lean, loss="chunked")):
        if choice != asked and not clashes(vars(choice), model.gpu, model.recipe.hardware):
            yield choice


def _halved(model: StageModel, asked: Choice) -> Choice | None:
    """Half the micro-batch and twice the accumulation; none where the batch cannot be cut so."""
    half = asked.micro_batch // 2
    if half not in cuts(asked, asked.sharding, every=True):
        return None
    return with_micro_batch(asked, half, memory_of(model.recipe, model.stage).eval_batch)


def _valued(model: StageModel, asked: Choice, choice: Choice, event: FailingRequest | None) -> Cure:
    prediction = model.predict(choice)
    names = _changed(asked, choice)
    whys = [sentence.partition(": ")[2] for sentence in (change(name, asked, choice) for name in names)]
    exact = exactness(asked, choice, model.routes, model.drops, model.couples)
    return Cure(
        change=", ".join(_words(name, choice) for name in names),
        why="; ".join([*(why for why in whys if why and len(names) < _FEW), exact]),
        exact=is_exact(asked, choice, model.drops, model.couples),
        saves_bytes=_saved(asked, choice, event),
        allocated_peak_bytes=prediction.allocated_peak_bytes,
        reserved_peak_bytes=prediction.reserved_peak_bytes,
        samples_per_second=model.speed(choice).samples_per_second,
        fits=prediction.fits,
        choice=choice,
    )


def _changed(asked: Choice, choice: Choice) -> list[str]:
    """The knobs that differ, without those that follow from others."""
    names = [name for name in vars(choice) if getattr(choice, name) != getattr(asked, name)]
    return [name for name in names if name not in ("accumulation", "eval_batch")] or names


def _words(name: str, choice: Choice) -> str:
    """A knob's value in words: ``attention sdpa``."""
    value = getattr(choice, name)
    if name == "micro_batch":
        return f"micro-batch {value} and accumulation {choice.accumulation}"
    return f"{name.replace('_', ' ')} {value if not isinstance(value, bool) else 'on' if value else 'off'}"


def _saved(asked: Choice, choice: Choice, event: FailingRequest | None) -> int | None:
    """How much smaller the tensor that failed gets: by the samples, or by all of it where attention no longer writes it out."""
    if event is None:
        return None
    changed = {name for name in vars(choice) if getattr(choice, name) != getattr(asked, name)}
    if event.role == "scores" and not choice.attention.startswith("eager"):
        return event.bytes
    divided = event.shape[:1] and event.shape[0] % asked.micro_batch == 0
    if changed <= _BATCH and divided and choice.micro_batch < asked.micro_batch:
        return event.bytes - event.bytes * choice.micro_batch // asked.micro_batch
    return None


def _cut_after_splice(model: StageModel, asked: Choice) -> Cure | None:
    """Samples cut to their limit after the image tokens are in. That trains on other samples."""
    data = model.data
    if data.image_tokens_count or not model.images:
        return None
    for limit in (data.max_tokens, data.max_tokens + 1):  # one more where this very number would have to be traced
        try:
            shorter = model.on(model.gpu, data=data.model_copy(update={"image_tokens_count": True, "max_tokens": limit}))
            if not shorter.closed(asked):
                continue
            prediction, speed = shorter.predict(asked), shorter.speed(asked)
        except UserError:
            return None
        lost = model.tokens - data.max_tokens
        return Cure(
            change=f"samples cut to {data.max_tokens:,} tokens after the image tokens are in (data.image_tokens_count=true)",
            why=f"not the same training: up to {lost:,} tokens of text are cut from the longest samples",
            exact=False,
            allocated_peak_bytes=prediction.allocated_peak_bytes,
            reserved_peak_bytes=prediction.reserved_peak_bytes,
            samples_per_second=speed.samples_per_second,
            fits=prediction.fits,
            choice=asked,
        )
    return None


def _suggested(plan: StagePlan) -> Iterator[Cure]:
    """Changes of the mathematics, where nothing that keeps it fits."""
    for suggestion in plan.suggestions:
        if suggestion.fits:
            yield Cure(
                change=suggestion.change,
                why=f"not the same training; {suggestion.basis}",
                exact=False,
                allocated_peak_bytes=suggestion.allocated_peak_bytes,
                fits=True,
            )
