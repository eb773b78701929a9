"""One stage on one card: any choice laid out, predicted, bounded from below and timed, from forms that a source makes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from oomph.core import predict, speed
from oomph.core.allocator import Replay
from oomph.core.bounds import Bounds
from oomph.core.catalogue import find_model
from oomph.core.choices import cuts, resolve, sample_tokens, with_micro_batch
from oomph.core.closed_form import LEAST_ROWS, ClosedForm, Family
from oomph.core.devices import Gpu
from oomph.core.events import Events
from oomph.core.forms import FormKey, Source, Traced
from oomph.core.layout import Shape, evaluation_shape, lay_out
from oomph.core.predict import Lack
from oomph.core.timeline import timeline
from oomph.recipe import Data, Parts, Recipe, Stage, data_of, memory_of, routing
from oomph.recipe.schema import Section
from oomph.records import Choice, Prediction, Speed, Timeline

LOOPS_OVER_IMAGES = frozenset({"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "paddleocr_vl", "kimi_k25"})
"""Models whose vision towers attend within one image after the other, so that their operators depend on the number."""


_DOUBT = 0.05
"""How far the form of several samples may be off for a single one, as a share."""


class Laid(NamedTuple):
    """A choice laid out: what the tracer made, its form, its events."""

    traced: Traced
    form: ClosedForm
    events: Events


class StageModel:
    """A stage of a recipe on a card. Choices may have any knobs; the model, what trains and the data are the stage's.

    Attributes:
        recipe: the recipe.
        stage: one of its stages.
        gpu: the card.
        data: the stage's limits.
        images: of a sample, as the model sees them.
        loops: whether the model's code loops over images.
        routes: whether the model sends tokens to experts.
        couples: whether the experts' load is evened or limited within each micro-batch.
        first: the choice that planning looks at first: the recipe's own settings, the largest cut where that is open.
    """

    def __init__(self, recipe: Recipe, stage: Stage, gpu: Gpu, source: Source, data: Data | None = None) -> None:
        self.recipe, self.stage, self.gpu = recipe, stage, gpu
        self.data = data or data_of(recipe, stage)
        self._source = source
        self._folders = _folders(recipe)
        kind, sees = _model_kind(recipe, self._folders)
        self.images, self.loops = self.data.images_per_sample if sees else 0, kind in LOOPS_OVER_IMAGES
        self._bounds: dict[int, Bounds] = {}
        self._last: tuple[Choice, Laid, Replay] | None = None
        self._predictions: dict[Choice, Prediction] = {}
        self._speeds: dict[Choice, Speed] = {}
        self._costs: dict[Any, Any] = {}
        self.routes = stage.experts is not None or "experts" in stage.train
        self.couples = routing.couples(stage)
        self.first = self._start()

    def on(
        self, gpu: Gpu, recipe: Recipe | None = None, data: Data | None = None, stage: Stage | None = None
    ) -> StageModel:
        """The same stage on another card, with other hardware in its recipe, with other limits or with other settings."""
        return StageModel(recipe or self.recipe, stage or self.stage, gpu, self._source, data or self.data)

    def _start(self) -> Choice:
        """The choice whose forms are made first: the largest cut, or, where each image takes a form longer, the smallest."""
        choice, _ = resolve(self.stage, self.recipe, self.gpu)
        memory = memory_of(self.recipe, self.stage)
        if self.loops and self.images and memory.micro_batch == "auto":
            return with_micro_batch(choice, cuts(choice, choice.sharding)[-1], memory.eval_batch)
        return choice

    def first_keys(self) -> list[FormKey]:
        """The keys of the first choice that planning will look at."""
        return self.keys(self.first)

    def keys(self, choice: Choice) -> list[FormKey]:
        """The keys of the forms that predicting a choice takes."""
        return [self._key(choice, self._family(shape)) for shape in self._shapes(choice, 1)]

    def prepare_at(self, choice: Choice, shapes: Iterable[Shape]) -> None:
        """Makes the forms of the families of several shapes side by side."""
        self._source.prepare(list(dict.fromkeys(self._key(choice, self._family(shape)) for shape in shapes)))

    def prepare(self, choices: Iterable[Choice]) -> None:
        """Makes the forms of several choices side by side."""
        self._source.prepare(list(dict.fromkeys(key for choice in choices for key in self.keys(choice))))

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens of the longest sample.

        Raises:
            UserError: the images alone are more than the limit.
        """
        traced = self._source.traced(self.first_keys()[0])
        return sample_tokens(self.data, traced.image_tokens if self.images else 0)

    def closed(self, choice: Choice) -> bool:
        """Whether the choice's sizes are formulas; if not, each shape is traced by itself."""
        shape = self._shapes(choice, self.tokens)[0]
        return not self._special(self._source.traced(self._key(choice, self._family(shape))), shape)

    def has_formulas(self, choice: Choice, shape: Shape) -> bool:
        """Whether the sizes of shapes like this one are formulas, though they may not hold at all of them."""
        return self._source.traced(self._key(choice, self._family(shape))).form is not None

    def trains(self, part: str) -> bool:
        """Whether parameters of a part of the model train."""
        return any(parameter.trainable and parameter.part == part for parameter in self._form_of_first.parameters)

    @functools.cached_property
    def drops(self) -> bool:
        """Whether the model has dropout."""
        return any("dropout" in kind.op for kind in self._form_of_first.kinds)

    @functools.cached_property
    def _form_of_first(self) -> ClosedForm:
        return self._traced(self.first, self._shapes(self.first, self.tokens)[0])[1]

    def may_fit(self, choice: Choice) -> bool:
        """Whether a choice of one sample at a time may fit, judged by the form of several without making its own."""
        return (1 - _DOUBT) * self.bound_of_one(choice) <= self.usable_bytes(choice)

    def bound_of_one(self, choice: Choice) -> int:
        """About the bound of a choice of one sample at a time, judged by the form of several; 0 where that cannot tell.

        It cannot where sizes are no formulas, or are those of another number of images.
        """
        family = self._family(Shape(2, 1, 2 * self.images))
        general = None if family.images < 0 else self._source.traced(self._key(choice, family)).form
        if general is None:
            return 0
        return self._bounds_of(general).least_bytes(choice, Shape(1, self.tokens, self.images))

    def lay_out(self, choice: Choice) -> Laid:
        """The events of one rank."""
        micro, *evaluated = self._shapes(choice, self.tokens)
        traced, form = self._traced(choice, micro)
        evaluation = self._traced(choice, evaluated[0])[1] if evaluated and evaluated[0] != micro else None
        return Laid(traced, form, lay_out(form, choice, self.tokens, self.images, evaluation))

    def form(self, choice: Choice, shape: Shape) -> ClosedForm:
        """The form that holds at a shape."""
        return self._traced(choice, shape)[1]

    def predict(self, choice: Choice) -> Prediction:
        """What the choice needs, and whether it fits."""
        if choice not in self._predictions:
            laid, result = self._served(choice)
            self._predictions[choice] = predict.predict(laid.events, choice, self.gpu, laid.form.unclassified, result)
        return self._predictions[choice]

    def timeline(self, choice: Choice) -> Timeline:
        """What the choice has allocated over the steps, by role."""
        laid, result = self._served(choice)
        return timeline(laid.events, choice, result.failure)

    def fits(self, choice: Choice) -> bool:
        """Whether the choice fits."""
        return self.lack(choice) is None

    def lack(self, choice: Choice, sure: bool = False) -> Lack | None:
        """What the card lacks for the choice, at the cost of one replay, or of none where a bound says it.

        Args:
            choice: the knobs.
            sure: whether the error bound of the prediction has to fit beside what is reserved.
        """
        if self.bound(choice) > self.usable_bytes(choice):
            return "bytes"
        laid, result = self._served(choice)
        lack = predict.lack(laid.events, result, self.usable_bytes(choice))
        return "pieces" if lack is None and sure and not predict.surely(self.predict(choice)) else lack

    def _served(self, choice: Choice) -> tuple[Laid, Replay]:
        """The choice laid out, and its replay on the card. The last one is kept: who asks once often asks again."""
        if self._last is None or self._last[0] != choice:
            laid = self.lay_out(choice)
            self._last = choice, laid, predict.serve(laid.events, choice, self.gpu)
        return self._last[1:]

    def bound(self, choice: Choice) -> int:
        """Bytes that the choice has allocated at its peak, at the least."""
        shape = self._shapes(choice, self.tokens)[0]
        return self._bounds_of(self.form(choice, shape)).least_bytes(choice, shape)

    def _bounds_of(self, form: ClosedForm) -> Bounds:
        if id(form) not in self._bounds:
            self._bounds[id(form)] = Bounds(form)
        return self._bounds[id(form)]

    def usable_bytes(self, choice: Choice) -> int:
        """What the allocator may reserve on the card."""
        return predict.usable_bytes(choice, self.gpu)

    def speed(self, choice: Choice) -> Speed:
        """How fast the choice is, as a roofline estimates it."""
        if choice not in self._speeds:
            form = self.form(choice, self._shapes(choice, self.tokens)[0])
            samples = None if self.data.samples is None else self.data.samples * self.stage.epochs
            network = self.recipe.hardware.network_gb_s * 1e9
            self._speeds[choice] = speed.estimate(
                form,
                choice,
                self.gpu,
                self.tokens,
                self.images,
                network_bytes_per_second=network,
                samples_in_stage=samples,
                costs=self._costs,
            )
        return self._speeds[choice]

    def _traced(self, choice: Choice, shape: Shape) -> tuple[Traced, ClosedForm]:
        """The form of a shape's family, or, where sizes are not closed, of the shape itself."""
        general = traced = self._source.traced(self._key(choice, self._family(shape)))
        if self._special(general, shape):
            traced = self._source.traced(self._key(choice, self._family(shape), shape, general.form is not None))
        if general.form is None:
            traced = replace(traced, how=f"{traced.how}; {general.how}")
        assert traced.form is not None
        return traced, traced.form

    def _special(self, general: Traced, shape: Shape) -> bool:
        """Whether the family's form does not hold at the shape."""
        if general.form is None:
            return True
        few, aligned = shape.samples * shape.tokens < LEAST_ROWS, shape.tokens % 8 == 0
        return (few and general.form.chunks) or (aligned and general.form.pads_masks)

    def _shapes(self, choice: Choice, tokens: int) -> list[Shape]:
        shapes = [Shape(choice.micro_batch, tokens, choice.micro_batch * self.images)]
        evaluated = evaluation_shape(choice, tokens, self.images)
        return shapes if evaluated is None else [*shapes, evaluated]

    def _family(self, shape: Shape) -> Family:
        return Family.of(shape, self.loops)

    def _key(self, choice: Choice, family: Family, shape: Shape | None = None, periodic: bool = False) -> FormKey:
        parts = self.recipe.model if isinstance(self.recipe.model, Parts) else None
        rules, size = self.stage.train, self.data.image_size
        return FormKey(
            **self._folders,
            projector=parts.projector if parts else None,
            vision_feature_layer=parts.vision_feature_layer if parts else 0,
            vision_feature_select=parts.vision_feature_select if parts else "",
            experts=_json(self.stage.experts),
            balance=_json(self.stage.balance),
            lora=_json(self.stage.lora),
            quantization=_json(self.stage.quantization),
            trained=tuple(pattern for pattern, rate in rules.items() if rate != "frozen"),
            frozen=tuple(pattern for pattern, rate in rules.items() if rate == "frozen"),
            attention=choice.attention,
            loss=choice.loss,
            optimizer=choice.optimizer,
            checkpointing=choice.checkpointing,
            vision_checkpointing=choice.vision_checkpointing,
            precision=choice.precision,
            capability=self.gpu.compute_capability or (),
            image_size=() if size is None else (size, size) if isinstance(size, int) else tuple(size),
            one_sample=family.one_sample,
            images=family.images,
            shape=None if shape is None else tuple(shape),
            periodic=periodic,
        )


def _json(section: Section | None) -> str:
    return "" if section is None else section.model_dump_json()


def _model_kind(recipe: Recipe, folders: dict[str, str | None]) -> tuple[str, bool]:
    """The model's type as transformers names it, and whether it sees images."""
    if isinstance(recipe.model, Parts):
        return "llava", True
    content = json.loads((Path(str(folders["model"])) / "config.json").read_text(encoding="utf-8"))
    kind = content.get("dense_model_type") or content["model_type"]  # of our own folders with experts, what they were made of
    return str(kind), "vision_config" in content


def _folders(recipe: Recipe) -> dict[str, str | None]:
    if isinstance(recipe.model, Parts):
        vision, language = find_model(recipe.model.vision), find_model(recipe.model.language)
        return {"model": None, "vision": str(vision), "language": str(language)}
    return {"model": str(find_model(recipe.model)), "vision": None, "language": None}

