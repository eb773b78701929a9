"""What a stage would take: the smallest card for each number of GPUs, and the most that the card asked for can hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from oomph.core.bounds import Bounds
from oomph.core.choices import clashes, cuts, with_micro_batch
from oomph.core.closed_form import LEAST_ROWS, ClosedForm
from oomph.core.devices import Gpu, catalogue
from oomph.core.eight_bit import EIGHT_BIT
from oomph.core.layout import Shape, lay_out
from oomph.core.predict import serve, usable_bytes
from oomph.core.stage import StageModel
from oomph.core.trace import Parameter
from oomph.errors import UserError
from oomph.recipe import KNOBS, Data, Memory, memory_of
from oomph.records import Card, Choice, Fit, Limit, Optimizer, Sharding
from oomph.units import size

COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are looked at beside the recipe's own."""
GPUS_OF_A_NODE = 8
"""GPUs of one machine, where the recipe does not say it of their number."""

_DIVIDE_MOST: tuple[Sharding, ...] = ("fsdp2", "zero3", "fsdp2-hybrid", "ddp")
"""The shardings that divide all between the GPUs, and one for parameters that they refuse."""
_PADDING = 1.25
"""How many times its bytes FSDP2 may gather of the weights, until other shardings are compared with it."""
_DOUBT = 0.05
"""How far what a stage has allocated on one card may be off for another one, as a share."""
_BOUNDLESS = 1 << 50


def fit(model: StageModel, choice: Choice) -> Fit:
    """The smallest cards on which a stage fits, by number of GPUs, and the limits of the card that was asked for.

    Args:
        model: the stage on the card and the number of GPUs that were asked for.
        choice: the configuration whose limits are looked for; of it, the cards keep the effective batch, the precision and
            the weights that the optimizer updates.
    """
    return Fit(smallest_cards(model, choice), limits(model, choice))


def smallest_cards(model: StageModel, choice: Choice) -> tuple[Card, ...]:
    """The smallest card that has room, for each number of GPUs that takes a smaller one than all fewer GPUs do.

    The configuration is the leanest that keeps the mathematics: fused attention, chunked loss, all blocks checkpointed,
    everything divided between the GPUs, the smallest micro-batch, and host memory used where it has to be. Each answer is
    replayed with the card's own kernels. A smaller card is replayed too, unless the stage needs `_DOUBT` more than it has
    by the kernels of the card that was asked for.

    Args:
        model: the stage on the card that was asked for.
        choice: gives the effective batch, precision, master weights, and the layout of the recipe's own number of GPUs.
    """
    found: list[Card] = []
    fused = replace(choice, attention="sdpa")
    cards = [gpu for gpu in catalogue() if gpu.compute_capability and not _clash(model, fused, gpu)]
    left = sorted(cards, key=lambda gpu: (gpu.memory_bytes, gpu.name))
    parameters = model.lay_out(choice).form.parameters
    for gpus in sorted({*COUNTS, choice.gpus}):
        if not left:
            break
        search = _CardSearch(model, _leanest(model, choice, gpus), _gathered_share(parameters, gpus) > _PADDING)
        card = next((card for gpu in left if (card := search.on(gpu))), None)
        if card is not None:
            found.append(card)
            left = left[: [gpu.name for gpu in left].index(card.gpu)]
    return tuple(found)


def _gathered_share(parameters: Sequence[Parameter], ranks: int) -> float:
    """The elements that FSDP2 gathers over those that there are: it pads the first dimension to a multiple of the ranks.

    Stacked weights of 8 experts for instance are gathered as 16 by 16 ranks.
    """
    padded = sum(-(-p.shape[0] // ranks) * ranks * (p.numel // p.shape[0]) for p in parameters if p.shape and p.numel)
    return padded / max(sum(parameter.numel for parameter in parameters), 1)


def _leanest(model: StageModel, choice: Choice, gpus: int) -> list[list[Choice]]:
    """For each sharding that can be, the leanest configurations for a number of GPUs, those that use host memory last.

    Expandable segments are left to where a card has the bytes, but in pieces.
    """
    nodes = choice.nodes if gpus == choice.gpus else max(gpus // GPUS_OF_A_NODE, 1)
    vision = "blocks" if model.trains("vision") else choice.vision_checkpointing
    lean = replace(choice, gpus=gpus, nodes=nodes, vision_checkpointing=vision, expandable_segments=False)
    lean = replace(lean, attention="sdpa", loss="chunked", optimizer=_leanest_optimizer(choice))
    eval_batch = memory_of(model.recipe, model.stage).eval_batch
    found = []
    for sharding in ("none",) if gpus == 1 else _DIVIDE_MOST:
        smallest = cuts(lean, sharding, every=True)[-1:]
        options = [
            with_micro_batch(replace(lean, sharding=sharding, checkpointing=kept, optimizer_offload=offload), cut, eval_batch)
            for kept in ("blocks", "blocks-offload")
            for offload in (False, True)
            for cut in smallest
        ]
        legal = [option for option in options if not _clash(model, option, model.gpu)]
        if legal:
            found.append(legal)
    return found


def _leanest_optimizer(choice: Choice) -> Optimizer:
    """The optimizer that takes least of the GPU, of those with the mathematics of the choice's."""
    return EIGHT_BIT[-1] if choice.optimizer in EIGHT_BIT else "adamw-fused"


def _is_accepted(model: StageModel, choice: Choice) -> bool:
    """Whether the sharding takes the stage's parameters."""
    try:
        with_settings(model, choice).bound(choice)
    except UserError:
        return False
    return True


def _clash(model: StageModel, choice: Choice, gpu: Gpu) -> bool:
    hardware = model.recipe.hardware.model_copy(update={"gpus": choice.gpus, "nodes": choice.nodes})
    return bool(clashes(vars(choice), gpu, hardware))


def with_settings(model: StageModel, choice: Choice, gpu: Gpu | None = None, data: Data | None = None) -> StageModel:
    """The stage as a recipe would have it that pins a choice, so that no form is made for any other.

    Args:
        model: the stage.
        choice: its knobs, its effective batch and its GPUs take the place of the recipe's.
        gpu: the card, where it is another.
        data: the limits, where they are others.

    Raises:
        UserError: the choice's knobs exclude each other or the card.
    """
    knobs = {knob: getattr(choice, knob) for knob in KNOBS if knob != "eval_batch"}
    memory = Memory(**knobs, eval_batch="none" if choice.eval_batch is None else choice.eval_batch)
    stage = model.stage.model_copy(update={"memory": memory, "effective_batch": choice.effective_batch})
    card = gpu or model.gpu
    hardware = {"gpu": card.name, "gpus": choice.gpus, "nodes": choice.nodes}
    recipe = model.recipe.model_copy(update={"hardware": model.recipe.hardware.model_copy(update=hardware)})
    return model.on(card, recipe, data, stage)


class _CardSearch:
    """Tries configurations of one number of GPUs on cards; what they need by the asked card's kernels is worked out once.

    Args:
        model: the stage on the card that was asked for.
        families: configurations by sharding.
        compares: whether the sharding whose leanest configuration needs least is taken; else the first that is possible.
    """

    def __init__(self, model: StageModel, families: Sequence[list[Choice]], compares: bool) -> None:
        self._model = model
        self._boundless = replace(model.gpu, memory_bytes=_BOUNDLESS)
        self._models: dict[Choice, StageModel] = {}
        accepted = (options for options in families if _is_accepted(model, options[0]))
        if compares:
            self._options = min(accepted, key=lambda options: self._needed_bytes(options[-1]), default=[])
        else:
            self._options = next(accepted, [])

    def on(self, gpu: Gpu) -> Card | None:
        """The first configuration that fits on a card."""
        for option in self._options:
            if not self._is_hopeless(option, gpu):
                own = with_settings(self._model, option, gpu)
                for choice in _with_pieces_joined(own, option):
                    if own.fits(choice):
                        return Card(gpu.name, choice, own.predict(choice).reserved_peak_bytes, own.usable_bytes(choice))
        return None

    def _is_hopeless(self, option: Choice, gpu: Gpu) -> bool:
        """Whether the option needs clearly more than the card has: by its bound, then by a replay without a limit."""
        room = usable_bytes(option, gpu) / (1 - _DOUBT)
        return self._boundless_model(option).bound(option) > room or self._needed_bytes(option) > room

    def _needed_bytes(self, option: Choice) -> int:
        return self._boundless_model(option).predict(option).allocated_peak_bytes

    def _boundless_model(self, option: Choice) -> StageModel:
        if option not in self._models:
            self._models[option] = with_settings(self._model, option, self._boundless)
        return self._models[option]


def _with_pieces_joined(model: StageModel, choice: Choice) -> Iterable[Choice]:
    """The choice, and with expandable segments where only the bytes' place is in the way."""
    yield choice
    if model.lack(choice) == "pieces":
        yield replace(choice, expandable_segments=True)


class _Point(NamedTuple):
    """Samples of a micro-batch, and the recipe's limits of a sample."""

    samples: int
    max_tokens: int
    images: int


def limits(model: StageModel, choice: Choice) -> tuple[Limit, ...]:
    """The largest micro-batch, the longest sample and the most images of one, each alone, that the card can hold.

    Each value fits and the next one does not, by replays; 0 says that not even the smallest that is looked at does. Where
    each number of images takes a trace of its own, the micro-batch and the images are estimates with `_DOUBT` of the card to
    spare, which `beyond` says. There are no limits for a model whose sizes are not formulas.

    Args:
        model: the stage on the card that was asked for.
        choice: the configuration; all but the micro-batch stays.
    """
    held = _Held(model, choice)
    found = [_micro_batch(held), _max_tokens(held)]
    if held.sees:
        found.append(_images(held))
    return tuple(limit for limit in found if limit is not None)


def _micro_batch(held: _Held) -> Limit | None:
    start = held.start

    def point(samples: int) -> _Point:
        return start._replace(samples=samples)

    edge = _Edge(held, point, point(max(2, start.samples)), not (held.loops and start.images))
    value = edge.find(start.samples, 1)
    if value is None:
        return None
    asked, batch = (held.choice(samples).effective_batch for samples in (start.samples, value or start.samples))
    takes = "" if batch == asked else f"an effective batch of {batch:,}"
    return Limit("micro_batch", value, "samples", _sentence(takes, edge.beyond(value, 1)))


def _max_tokens(held: _Held) -> Limit | None:
    start, spliced = held.start, held.spliced(held.start.images)
    each = held.tokens_of_an_image if held.counts else 1
    floor = max(start.images * each if held.sees else 1, -(-LEAST_ROWS // start.samples) - spliced, 1)
    floor = held.unaligned(start._replace(max_tokens=floor)).max_tokens

    def point(tokens: int) -> _Point:
        return start._replace(max_tokens=tokens)

    edge = _Edge(held, point, start, True)
    value = edge.find(start.max_tokens, floor)
    if value is None:
        return None
    whole = f"{value + spliced:,} with the image tokens on top" if spliced and value else ""
    return Limit("max_tokens", value, "tokens", _sentence(whole, edge.beyond(value, floor)))


def _images(held: _Held) -> Limit | None:
    start = held.start
    added = held.tokens_of_an_image if held.counts else 1

    def point(images: int) -> _Point:
        return start._replace(images=images, max_tokens=start.max_tokens + (images - start.images) * added)

    edge = _Edge(held, point, point(max(start.images, 1 if held.loops else 2)), not held.loops)
    value = edge.find(start.images, min(start.images, 1))
    if value is None:
        return None
    text = f"with max_tokens {point(value).max_tokens:,} for the same text" if value not in (0, start.images) else ""
    return Limit("images_per_sample", value, "images", _sentence(text, edge.beyond(value, 1)))


def _sentence(*clauses: str) -> str:
    return "; ".join(clause for clause in clauses if clause)


class _Held:
    """A stage whose configuration is held while samples, tokens and images change.

    Attributes:
        start: the point that was asked for.
        sees: whether the model sees images.
        counts: whether image tokens count towards the recipe's limit.
        loops: whether each number of images in a micro-batch has a form of its own.
        tokens_of_an_image: what the model makes of one; 0 for a model that sees none.
    """

    def __init__(self, model: StageModel, choice: Choice) -> None:
        data = model.data
        self._model, self._choice = model, choice
        self._fits: dict[_Point, bool] = {}
        self.start = _Point(choice.micro_batch, data.max_tokens, data.images_per_sample)
        seeing = data.model_copy(update={"images_per_sample": max(data.images_per_sample, 1), "image_tokens_count": False})
        seeing = seeing.model_copy(update={"max_tokens": max(data.max_tokens, seeing.images_per_sample)})
        probe = model if model.images else with_settings(model, choice, data=seeing)
        self.sees, self.counts = probe.images > 0, data.image_tokens_count
        self.loops = self.sees and model.loops
        self.tokens_of_an_image = probe.lay_out(choice).traced.image_tokens if self.sees else 0

    @property
    def gpu(self) -> Gpu:
        """The card."""
        return self._model.gpu

    @property
    def usable_bytes(self) -> int:
        """What the allocator may reserve."""
        return self._model.usable_bytes(self._choice)

    @property
    def needed_bytes(self) -> int:
        """What is reserved at the start, were there no limit."""
        return self._model.predict(self._choice).reserved_peak_bytes

    def choice(self, samples: int) -> Choice:
        """The choice with another micro-batch, and where the effective batch cannot be cut so, with the nearest that can."""
        given = self._choice
        if samples == given.micro_batch:
            return given
        if samples not in cuts(given, given.sharding, every=True):
            share = given.effective_batch // given.gpus
            given = replace(given, effective_batch=samples * max(share // samples, 1) * given.gpus)
        return with_micro_batch(given, samples, memory_of(self._model.recipe, self._model.stage).eval_batch)

    def at(self, point: _Point) -> tuple[StageModel, Choice]:
        """The stage and the choice at a point."""
        choice = self.choice(point.samples)
        if point[1:] == self.start[1:]:
            return self._model, choice
        data = {"max_tokens": point.max_tokens, "images_per_sample": point.images}
        return with_settings(self._model, choice, data=self._model.data.model_copy(update=data)), choice

    def fits(self, point: _Point) -> bool:
        """Whether it fits at a point, by a bound or a replay."""
        if point not in self._fits:
            model, choice = self.at(point)
            self._fits[point] = model.fits(choice)
        return self._fits[point]

    def spliced(self, images: int) -> int:
        """Tokens that images add to the recipe's limit."""
        return images * (self.tokens_of_an_image - 1) if self.sees and not self.counts else 0

    def tokens(self, point: _Point) -> int:
        """Tokens of a sample at a point."""
        return point.max_tokens + self.spliced(point.images)

    def unaligned(self, point: _Point) -> _Point:
        """The point, one token later where its tokens are a multiple of 8: masks are padded at any other number."""
        return point._replace(max_tokens=point.max_tokens + (self.tokens(point) % 8 == 0))


class _Edge:
    """Finds the largest number on an axis of points at which a stage fits.

    Args:
        held: the stage.
        point: the axis.
        typical: a point of the family of shapes that the search is expected to end in.
        exact: whether all points but the start are of one or two families; if not, the answer is an estimate.
    """

    def __init__(self, held: _Held, point: Callable[[int], _Point], typical: _Point, exact: bool) -> None:
        self._held, self._point, self._exact = held, point, exact
        rows = max(typical.max_tokens, -(-LEAST_ROWS // typical.samples))
        self._typical = held.unaligned(typical._replace(max_tokens=rows))

    @functools.cached_property
    def _form(self) -> ClosedForm | None:
        model, choice = self._held.at(self._typical)
        return model.lay_out(choice).form if model.closed(choice) else None

    @functools.cached_property
    def _bounds(self) -> Bounds:
        assert self._form is not None
        return Bounds(self._form)

    def find(self, start: int, floor: int) -> int | None:
        """The number, or 0 where it does not fit at `floor`; None where sizes are not formulas.

        A guess from bounds is corrected by replays. Where forms pad masks, which is not done at a multiple of 8 tokens, the
        replays are of one token more, and the answer and the number after it are replayed as they are.

        Args:
            start: the number that was asked for.
            floor: the smallest to look at.
        """
        if start == floor and not self._held.fits(self._point(start)):
            return 0
        if self._form is None:
            return None
        value = self._guess(max(start, floor), floor)
        value = self._corrected(value, floor, max(value // 256, 1), self._fits_nearby if self._exact else self._fits_alike)
        if self._exact:
            value = self._corrected(max(value, floor), floor, 1, self._fits)
        elif self._fits(start):
            value = max(value, start)
        elif (value := min(value, start - 1)) <= floor:
            value = floor if self._fits(floor) else 0
        return value if value >= floor else 0

    def beyond(self, value: int, floor: int) -> str:
        """What fails at the number after the one that was found, in words."""
        number = max(value + 1, floor)
        if value and not self._exact:
            return f"an estimate with {_DOUBT:.0%} to spare, since each number of images takes a trace of its own"
        model, choice = self._held.at(self._point(number))
        prediction = model.predict(choice)
        request = prediction.failing_request
        assert request is not None
        free = prediction.usable_bytes - request.in_use_bytes
        lacks = f"where {size(free)} is free"
        if free >= request.bytes:
            lacks = f"and the {size(free)} that is free lies in smaller pieces"
        start = f"{number:,} asks" if value else f"not even {number:,} has room: it asks"
        return f"{start} for {size(request.bytes)} at once ({request.role}, {request.phase}), {lacks}"

    def _guess(self, start: int, floor: int) -> int:
        """The largest number whose bound leaves what the start needs above its own bound."""
        room = self._held.usable_bytes - max(self._held.needed_bytes - self._least_bytes(start), 0)
        low, high = floor, start
        while self._least_bytes(high) <= room:
            low, high = high, 2 * high + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._least_bytes(middle) <= room else (low, middle)
        return low

    def _least_bytes(self, number: int) -> int:
        point = self._point(number)
        images = self._typical.images * self._typical.samples if self._held.loops else point.images * point.samples
        shape = Shape(point.samples, self._held.tokens(point), images if self._held.sees else 0)
        return self._bounds.least_bytes(self._held.choice(point.samples), shape)

    def _corrected(self, guess: int, floor: int, step: int, fits: Callable[[int], bool]) -> int:
        """The largest number that fits, by steps of growing width from a guess and halving; `floor` - 1 where none does."""
        if fits(guess):
            low, high = guess, guess + step
            while fits(high):
                step *= 2
                low, high = high, high + step
        else:
            low, high = max(guess - step, floor - 1), guess
            while low >= floor and not fits(low):
                step *= 2
                low, high = max(low - step, floor - 1), low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _fits(self, number: int) -> bool:
        return self._held.fits(self._point(number))

    def _fits_nearby(self, number: int) -> bool:
        """Whether the form of a family says that it fits, one token later where it does not hold at the number itself."""
        pads = self._form is not None and self._form.pads_masks
        return self._held.fits(self._held.unaligned(self._point(number))) if pads else self._fits(number)

    def _fits_alike(self, number: int) -> bool:
        """Whether the form at hand says that it fits, with a margin, though it is of another number of images."""
        assert self._form is not None
        point, gpu = self._point(number), self._held.gpu
        choice = replace(self._held.choice(point.samples), eval_batch=None)
        events = lay_out(self._form, choice, self._held.tokens(point), self._typical.images)
        less = replace(gpu, memory_bytes=gpu.memory_bytes - int(_DOUBT * self._held.usable_bytes))
        return serve(events, choice, less).failure is None
