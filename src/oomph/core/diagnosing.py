"""An out-of-memory message explained with the recipe that was run: the request, why it was made then, and what helps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from oomph.core.choices import resolve
from oomph.core.curing import cures
from oomph.core.devices import catalogue, find_gpu
from oomph.core.forms import Source
from oomph.core.matching import NEAR, Match, best_match, in_roles, nearest
from oomph.core.predict import owner
from oomph.core.stage import StageModel
from oomph.diagnosis_records import Cure, Diagnosis, OomMessage
from oomph.errors import UserError
from oomph.recipe import Recipe, Stage
from oomph.records import Choice, FailingRequest
from oomph.units import size

_OF_NEED = ("", "real need", "huge request")
_KEPT = 3
_OF_THE_HOST = ("cpu allocator", "linux oom killer")
_SAME_CARD = 0.015
_MODULES = 3
_RARE = (1_000, 10_000)
_MOMENTS = {
    "load": "while the model is loaded",
    "warmup/first": "the first micro-batch of the first step",
    "warmup/next": "later micro-batches of the first step",
    "warmup/optimizer": "the optimizer's part of the first step",
    "step/first": "the first micro-batch of later steps",
    "step/next": "later micro-batches of later steps",
    "step/optimizer": "the optimizer's part of later steps",
    "evaluate": "the evaluation",
}


class Subject(NamedTuple):
    """A stage that may have been running."""

    recipe: Recipe
    stage: Stage


@dataclass(frozen=True)
class Explained:
    """What a recipe adds to a diagnosis. The fields are those of `Diagnosis`; `stage` is the one that the message is about."""

    recipe: str
    stage: str
    event: FailingRequest | None = None
    alive: dict[str, int] = field(default_factory=dict)
    why_now: tuple[str, ...] = ()
    cures: tuple[Cure, ...] = ()
    notes: tuple[str, ...] = ()

    def added_to(self, diagnosis: Diagnosis, notes: Sequence[str] = ()) -> Diagnosis:
        """The diagnosis with what the recipe adds; `notes` come before its own.

        Advice that follows from the message alone stays where its cause is another than need: fragments, other processes.
        """
        first = diagnosis.causes[0].name if diagnosis.causes else ""
        kept = () if first in _OF_NEED else diagnosis.cures[:_KEPT]
        return replace(
            diagnosis,
            event=self.event,
            alive=self.alive,
            why_now=self.why_now,
            cures=(*kept, *self.cures) if self.cures else diagnosis.cures,
            notes=(*diagnosis.notes, *notes, *self.notes),
            recipe=f"{self.recipe}, stage {self.stage}",
        )


def explain_with(message: OomMessage, subjects: Sequence[Subject], source: Source) -> Explained:
    """Finds the request of a message in the steps of the stages that may have been running, and what helps that stage.

    Args:
        message: what was reported.
        subjects: the stages, one at least; the one whose step is most like the message is taken.
        source: where closed forms come from.

    Raises:
        UserError: a model or a card is not known, knobs exclude each other, or rules do not cover the model.
    """
    first = subjects[0]
    if message.kind in _OF_THE_HOST:
        host = "The host's memory ran out, and a recipe says what the GPU needs."
        return Explained(first.recipe.name, first.stage.name, why_now=(host,))
    models = [StageModel(recipe, stage, find_gpu(recipe.hardware.gpu), source) for recipe, stage in subjects]
    source.prepare([key for model in models for key in model.first_keys()])
    asked = [resolve(model.stage, model.recipe, model.gpu, model.fits)[0] for model in models]
    if message.requested_low is None:
        return _predicted(models, asked, message)
    matches = [best_match(model, choice, message) for model, choice in zip(models, asked, strict=True)]
    costs = [math.inf if match is None else match.cost for match in matches]
    chosen = costs.index(min(costs))
    model, choice, match = models[chosen], asked[chosen], matches[chosen]
    beside = _about_card(model, message)
    if match is None or not _is_match(match, message):
        why = tuple(_no_match(model, choice, message, match))
        found = cures(model, choice, None)
        return Explained(model.recipe.name, model.stage.name, why_now=why, cures=found, notes=tuple(beside))
    event = match.event(model.usable_bytes(choice))
    alive = match.alive()
    return Explained(
        recipe=model.recipe.name,
        stage=model.stage.name,
        event=event,
        alive=in_roles(match.events, alive),
        why_now=tuple(_why_now(model, choice, match, event, message)),
        cures=cures(model, choice, event),
        notes=(*_notes(model, choice, match, alive, len(subjects) > 1), *beside),
    )


def card_by_memory(nbytes: int | None) -> str:
    """The card of a message by its memory.

    Raises:
        UserError: the message does not give it, or no card has as much.
    """
    hint = "name it: --gpu A100-SXM4-40GB for example"
    if nbytes is None:
        raise UserError("neither the script nor the message says which card it was", hint)
    cards = [card for card in catalogue() if card.compute_capability is not None]
    card = min(cards, key=lambda card: abs(card.memory_bytes - nbytes))
    if abs(card.memory_bytes - nbytes) > _SAME_CARD * nbytes:
        raise UserError(f"the message is of a card with {size(nbytes)}, and none that is known has as much", hint)
    return card.name


def _gap(match: Match, message: OomMessage) -> float:
    """The share by which what is predicted to be in use differs from the message; 0 where that does not say it."""
    reported = message.allocated_bytes
    return 0.0 if reported is None else abs(match.in_use - reported) / max(reported, 1)


def _is_match(match: Match, message: OomMessage) -> bool:
    """Whether a request may be the one: about as much in use as reported, and not much more needed before it."""
    return _gap(match, message) + match.needed / max(match.in_use, 1) <= NEAR


def _predicted(models: Sequence[StageModel], asked: Sequence[Choice], message: OomMessage) -> Explained:
    """Where the message gives no size: the request that is predicted to fail, if one is."""
    failing = [(model, choice, model.predict(choice)) for model, choice in zip(models, asked, strict=True)]
    model, choice, prediction = next((one for one in failing if one[2].failing_request), failing[0])
    event = prediction.failing_request
    if event is None:
        why = "The message gives no size, and by prediction the stage fits, so nothing can be matched."
    else:
        why = "The message gives no size: this is the request that is predicted to fail first."
    alive = prediction.by_role if event else {}
    found = cures(model, choice, event)
    notes = tuple(_about_card(model, message))
    return Explained(model.recipe.name, model.stage.name, event, alive, (why,), found, notes)


def _no_match(model: StageModel, choice: Choice, message: OomMessage, match: Match | None) -> Iterator[str]:
    """Why no request of the step is taken as the one, with the one that comes nearest."""
    asked = size(message.requested_bytes or 0)
    if match is not None:
        reported = message.allocated_bytes or 0
        request, difference = match.events.request(match.storage), match.in_use - reported
        yield (
            f"No request of stage {model.stage.name} matches: {_named(request.shape, request.dtype, request.module)} asks for "
            f"{asked} at {match.shape.tokens:,} tokens, but with {size(match.in_use)} in use, {size(abs(difference))} "
            f"{'more' if difference > 0 else 'less'} than reported."
        )
        if match.needed:
            yield f"Before it, the same micro-batch needs {size(match.needed)} more, and would have failed there."
    else:
        event, shape = nearest(model, choice, message)
        difference = event.bytes - (message.requested_bytes or 0)
        yield (
            f"No request of stage {model.stage.name} is of {asked} at any sample length up to {model.tokens:,} tokens; nearest "
            f"is {_named(event.shape, event.dtype, event.module)} at {shape.tokens:,}: {size(event.bytes)}, "
            f"{size(abs(difference))} {'more' if difference > 0 else 'less'}."
        )
    yield "So what ran was not this configuration, or other code: check batch, sample length, attention and model."


def _named(shape: Sequence[int], dtype: str, module: str) -> str:
    return f"{dtype} {list(shape)}{f' in {module}' if module else ''}"


def _why_now(
    model: StageModel, choice: Choice, match: Match, event: FailingRequest, message: OomMessage
) -> Iterator[str]:
    """Sentences: which samples make the request, in which part of the step, and how often."""
    samples, tokens, _ = match.shape
    first, last = match.span
    batch = f"a micro-batch of {samples}"
    counts = f"{first:,}" if first == last else f"{first:,} {'or' if last == first + 1 else 'to'} {last:,}"
    most = f"the longest that the data allow has {model.tokens:,}"
    if first <= 2 or (last == model.tokens and last - first > model.tokens // 2):
        yield f"A request of this size is made whatever the samples are; what is in use fits best with {tokens:,} tokens."
    else:
        yield f"Only {batch} whose longest sample has {counts} tokens makes this request; {most}."
        yield from _length(model, tokens)
        yield from _how_often(choice)
    moments = [_MOMENTS[name] for name in match.moments if name in _MOMENTS]
    if set(match.moments) >= {"warmup/first", "step/first"} and choice.accumulation == 1:
        moments = ["every step"]
    elif set(match.moments) >= {"warmup/first", "warmup/next", "step/first", "step/next"}:
        moments = ["every micro-batch"]
    if moments:
        yield f"It comes in {', '.join(moments)}, so the first such sample ends the run, whenever it comes."
    if samples < choice.micro_batch:
        yield f"The recipe's micro-batch is {choice.micro_batch}; one of {samples} is what an epoch may end with."
    if message.allocated_bytes is not None:
        off = 100 * _gap(match, message)
        reported = f"{size(message.allocated_bytes)} in use was reported"
        yield f"{reported}, {size(event.in_use_bytes)} is predicted at this request: {off:.1f} % apart."


def _length(model: StageModel, tokens: int) -> Iterator[str]:
    data, images = model.data, model.images
    if tokens != model.tokens or data.image_tokens_count or not images:
        return
    each = (model.tokens - data.max_tokens) // images + 1
    stand = f"{images} of which stand{'s' if images == 1 else ''} for {'an image' if images == 1 else 'images'}"
    yield (
        f"{tokens:,} is a text cut to {data.max_tokens:,} tokens, {stand}, with {each:,} tokens an image put in afterwards."
    )


def _how_often(choice: Choice) -> Iterator[str]:
    """How often a step holds a rare sample: of n samples at least one has a property of share p with 1 - (1 - p)^n."""
    shares = [1 - (1 - 1 / rare) ** choice.effective_batch for rare in _RARE]
    words = [f"of one in {rare:,}, {100 * share:.2g} % of the steps" for rare, share in zip(_RARE, shares, strict=True)]
    waits = f"about {1 / shares[-1]:,.0f} steps before the first"
    yield f"How many samples are so long is for the data to say: {' and '.join(words)} hold one, then {waits}."


def _notes(
    model: StageModel, choice: Choice, match: Match, alive: dict[int, int], several: bool
) -> Iterator[str]:
    if several:
        yield f"of the stages, {model.stage.name} has the request that is most like the message"
    modules: Counter[str] = Counter()
    for storage, nbytes in alive.items():
        modules[owner(match.events.kinds[storage])] += nbytes
    most = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in modules.most_common(_MODULES))
    yield f"most in use then, by module: {most}"
    if match.shape.tokens == model.tokens and match.shape.samples == choice.micro_batch and model.fits(choice):
        yield "by prediction this configuration fits the card: something else held memory, or it lay in pieces"


def _about_card(model: StageModel, message: OomMessage) -> Iterator[str]:
    capacity, own = message.capacity_bytes, model.gpu.memory_bytes
    if capacity is not None and abs(capacity - own) > _SAME_CARD * own:
        yield (
            f"the message is of a card with {size(capacity)}, the recipe of {model.gpu.name} with {size(own)}; what fits is "
            "said of the latter, and --gpu names another"
        )
