"""From a recipe to a plan: every stage's configuration, what it needs, and whether the card has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from oomph.core import predict
from oomph.core.catalogue import find_model
from oomph.core.choices import resolve, sample_tokens
from oomph.core.closed_form import LEAST_ROWS, ClosedForm, Family
from oomph.core.devices import Gpu, find_gpu
from oomph.core.events import Events
from oomph.core.forms import FormKey, Source, Traced, versions
from oomph.core.layout import Shape, evaluation_shape, lay_out
from oomph.errors import UserError
from oomph.recipe import Parts, Recipe, Stage, data_of, stage_of
from oomph.records import Choice, Plan, StagePlan

LOOPS_OVER_IMAGES = frozenset({"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "paddleocr_vl", "kimi_k25"})
"""Models whose vision towers attend within one image after the other, so that their operators depend on the number."""


def make_plan(recipe: Recipe, source: Source, stages: Sequence[str] | None = None) -> Plan:
    """Predicts the recipe's stages, or those named.

    Raises:
        UserError: a stage, a model or a card is not known, knobs exclude each other, or rules do not cover the model.
    """
    gpu = find_gpu(recipe.hardware.gpu)
    planned = [stage_of(recipe, name) for name in stages] if stages else list(recipe.stages)
    planners = _planners(recipe, planned, gpu, source)
    source.prepare([key for planner in planners for key in planner.first_keys()])
    return Plan(recipe.name, gpu.name, recipe.hardware.gpus, tuple(planner.plan() for planner in planners), versions())


def _planners(recipe: Recipe, stages: Sequence[Stage], gpu: Gpu, source: Source) -> list[_StagePlanner]:
    """A planner for each stage.

    Raises:
        UserError: with the problems of all stages.
    """
    planners, errors = [], []
    for stage in stages:
        try:
            planners.append(_StagePlanner(recipe, stage, gpu, source))
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserError([problem for error in errors for problem in error.problems], errors[0].hint)
    return planners


class _Laid(NamedTuple):
    """A choice laid out: what the tracer made, its form, its events, the tokens of a sample."""

    traced: Traced
    form: ClosedForm
    events: Events
    tokens: int


class _StagePlanner:
    def __init__(self, recipe: Recipe, stage: Stage, gpu: Gpu, source: Source) -> None:
        self._recipe, self._stage, self._gpu, self._source = recipe, stage, gpu, source
        self._data = data_of(recipe, stage)
        self._folders = _folders(recipe)
        kind, sees = _model_kind(recipe, self._folders)
        self._images, self._loops = self._data.images_per_sample if sees else 0, kind in LOOPS_OVER_IMAGES
        self._largest, _ = resolve(stage, recipe, gpu)

    def first_keys(self) -> list[FormKey]:
        """The keys of the first choice that planning will look at."""
        return [self._key(self._largest, self._family(shape)) for shape in self._shapes(self._largest, 1)]

    def plan(self) -> StagePlan:
        """The stage's plan."""
        choice, reasons = resolve(self._stage, self._recipe, self._gpu, self._fits)
        laid = self._lay_out(choice)
        prediction = predict.predict(laid.events, choice, self._gpu, laid.form.unclassified)
        counts = [(parameter.trainable, parameter.numel) for parameter in laid.form.parameters]
        return StagePlan(
            name=self._stage.name,
            choice=choice,
            reasons=reasons,
            prediction=prediction,
            trainable_parameters=sum(numel for trainable, numel in counts if trainable),
            total_parameters=sum(numel for _, numel in counts),
            samples_tokens=laid.tokens,
            image_tokens=laid.traced.image_tokens * self._images,
            traced=laid.traced.how,
        )

    def _fits(self, choice: Choice) -> bool:
        laid = self._lay_out(choice)
        shape = self._shapes(choice, laid.tokens)[0]
        least = laid.form.live_peak(shape, choice.accumulation > 1) if choice.sharding == "none" else 0
        if least > predict.usable_bytes(choice, self._gpu):
            return False
        return predict.fits(laid.events, choice, self._gpu)

    def _lay_out(self, choice: Choice) -> _Laid:
        traced = self._source.traced(self._key(choice, self._family(self._shapes(choice, 1)[0])))
        tokens = sample_tokens(self._data, traced.image_tokens if self._images else 0)
        micro, *evaluated = self._shapes(choice, tokens)
        traced, form = self._traced(choice, micro)
        evaluation = self._traced(choice, evaluated[0])[1] if evaluated and evaluated[0] != micro else None
        return _Laid(traced, form, lay_out(form, choice, tokens, self._images, evaluation), tokens)

    def _traced(self, choice: Choice, shape: Shape) -> tuple[Traced, ClosedForm]:
        """The form of a shape's family, or, where sizes are not closed, of the shape itself."""
        general = traced = self._source.traced(self._key(choice, self._family(shape)))
        few, aligned = shape.samples * shape.tokens < LEAST_ROWS, shape.tokens % 8 == 0
        if general.form is None or few or (aligned and general.form.pads_masks):
            traced = self._source.traced(self._key(choice, self._family(shape), shape, general.form is not None))
        if general.form is None:
            traced = replace(traced, how=f"{traced.how}; {general.how}")
        assert traced.form is not None
        return traced, traced.form

    def _shapes(self, choice: Choice, tokens: int) -> list[Shape]:
        shapes = [Shape(choice.micro_batch, tokens, choice.micro_batch * self._images)]
        evaluated = evaluation_shape(choice, tokens, self._images)
        return shapes if evaluated is None else [*shapes, evaluated]

    def _family(self, shape: Shape) -> Family:
        return Family.of(shape, self._loops)

    def _key(self, choice: Choice, family: Family, shape: Shape | None = None, periodic: bool = False) -> FormKey:
        parts = self._recipe.model if isinstance(self._recipe.model, Parts) else None
        experts, rules, size = self._stage.experts, self._stage.train, self._data.image_size
        return FormKey(
            **self._folders,
            projector=parts.projector if parts else None,
            vision_feature_layer=parts.vision_feature_layer if parts else 0,
            vision_feature_select=parts.vision_feature_select if parts else "",
            expert_count=experts.count if experts else 0,
            expert_top_k=experts.top_k if experts else 0,
            expert_layers=json.dumps(experts.layers) if experts else "",
            trained=tuple(pattern for pattern, rate in rules.items() if rate != "frozen"),
            frozen=tuple(pattern for pattern, rate in rules.items() if rate == "frozen"),
            attention=choice.attention,
            loss=choice.loss,
            optimizer=choice.optimizer,
            checkpointing=choice.checkpointing,
            precision=choice.precision,
            capability=self._gpu.compute_capability or (),
            image_size=() if size is None else (size, size) if isinstance(size, int) else tuple(size),
            one_sample=family.one_sample,
            images=family.images,
            shape=None if shape is None else tuple(shape),
            periodic=periodic,
        )


def _model_kind(recipe: Recipe, folders: dict[str, str | None]) -> tuple[str, bool]:
    """The model's type as transformers names it, and whether it sees images."""
    if isinstance(recipe.model, Parts):
        return "llava", True
    content = json.loads((Path(str(folders["model"])) / "config.json").read_text(encoding="utf-8"))
    return str(content["model_type"]), "vision_config" in content


def _folders(recipe: Recipe) -> dict[str, str | None]:
    if isinstance(recipe.model, Parts):
        vision, language = find_model(recipe.model.vision), find_model(recipe.model.language)
        return {"model": None, "vision": str(vision), "language": str(language)}
    return {"model": str(find_model(recipe.model)), "vision": None, "language": None}
