"""From a recipe to a plan: every stage's configuration, what it needs, whether the card has it, and what else there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from oomph.core.choices import reasons_for, resolve
from oomph.core.devices import Gpu, find_gpu
from oomph.core.fit import fit as what_it_takes
from oomph.core.forms import Source, versions
from oomph.core.ladder import climb
from oomph.core.space import KNOBS
from oomph.core.stage import StageModel
from oomph.core.suggest import suggestions
from oomph.core.timeline import live_timeline
from oomph.errors import UserError
from oomph.recipe import Experts, Recipe, Stage, stage_of
from oomph.recipe.schema import Balance
from oomph.records import Choice, Plan, Prediction, StagePlan


def make_plan(
    recipe: Recipe,
    source: Source,
    stages: Sequence[str] | None = None,
    *,
    ladder: bool = False,
    fit: bool = False,
    keep: Sequence[str] = (),
) -> Plan:
    """Predicts the recipe's stages, or those named.

    Args:
        recipe: what is wanted.
        source: where closed forms come from.
        stages: names; None for all.
        ladder: whether to search for configurations that fit. Without it, what the recipe leaves to us has the value that
            needs little memory, and the micro-batch is the largest that fits; with it, the fastest configuration is taken.
        fit: whether to say what each stage would take: the smallest cards, and what this card can hold at the most.
        keep: knobs that the search leaves as they are even where nothing fits.

    Raises:
        UserError: a stage, a model or a card is not known, knobs exclude each other, or rules do not cover the model.
    """
    _check_knobs(keep)
    gpu = find_gpu(recipe.hardware.gpu)
    planned = [stage_of(recipe, name) for name in stages] if stages else list(recipe.stages)
    models = _models(recipe, planned, gpu, source)
    source.prepare([key for model in models for key in model.first_keys()])
    plans = [searched(model, keep) if ladder else _plan(model) for model in models]
    if fit:
        plans = [_with_fit(plan, model) for plan, model in zip(plans, models, strict=True)]
    libraries = dict.fromkeys(name for model in models for key in model.first_keys() for name in key.libraries())
    return Plan(recipe.name, gpu.name, recipe.hardware.gpus, tuple(plans), versions(list(libraries)))


def _check_knobs(names: Sequence[str]) -> None:
    varied = (*KNOBS, "micro_batch")
    unknown = [name for name in names if name not in varied]
    if unknown:
        raise UserError([f"a search does not vary {name}" for name in unknown], f"it varies {', '.join(varied)}")


def _models(recipe: Recipe, stages: Sequence[Stage], gpu: Gpu, source: Source) -> list[StageModel]:
    """A model of each stage.

    Raises:
        UserError: with the problems of all stages.
    """
    models, errors = [], []
    for stage in stages:
        try:
            models.append(StageModel(recipe, stage, gpu, source))
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserError([problem for error in errors for problem in error.problems], errors[0].hint)
    return models


def _plan(model: StageModel) -> StagePlan:
    """The stage's plan without a search."""
    choice, reasons = resolve(model.stage, model.recipe, model.gpu, model.fits)
    return stage_plan(model, choice, reasons)


def searched(model: StageModel, keep: Sequence[str] = ()) -> StagePlan:
    """The stage's plan with its ladder. Where something fits with all that is pinned, the fastest such choice is taken."""
    climbed = climb(model, model.first, keep)
    if climbed.choice is None:
        choice, reasons = resolve(model.stage, model.recipe, model.gpu, lambda _: False)
    else:
        choice, reasons = climbed.choice, reasons_for(climbed.choice, model.stage, model.recipe, model.gpu)
    plan = stage_plan(model, choice, reasons)
    start = climbed.nearest or plan
    return replace(
        plan,
        ladder=climbed.ladder,
        unpinned=climbed.unpinned,
        nearest=climbed.nearest,
        suggestions=suggestions(model, start.choice, start.prediction),
        search=climbed.search,
    )


def _with_fit(plan: StagePlan, model: StageModel) -> StagePlan:
    """The plan with what the stage would take, seen from the fastest configuration that fits, if any does."""
    best = plan.ladder[0] if plan.ladder else plan.nearest or plan
    return replace(plan, fit=what_it_takes(model, best.choice))


def stage_plan(
    model: StageModel, choice: Choice, reasons: dict[str, str], prediction: Prediction | None = None
) -> StagePlan:
    """The plan of a stage with a choice.

    Args:
        model: the stage.
        choice: the knobs.
        reasons: a sentence for each of them.
        prediction: of another device than the stage's card, for which there is no estimate of time; none to predict the card's.
    """
    laid = model.lay_out(choice)
    counts = [(parameter.trainable, parameter.numel) for parameter in laid.form.parameters]
    return StagePlan(
        name=model.stage.name,
        choice=choice,
        reasons=reasons,
        prediction=prediction or model.predict(choice),
        trainable_parameters=sum(numel for trainable, numel in counts if trainable),
        total_parameters=sum(numel for _, numel in counts),
        samples_tokens=model.tokens,
        image_tokens=laid.traced.image_tokens * model.images,
        traced=laid.traced.how,
        speed=None if prediction else model.speed(choice),
        made=tuple(_made(model.stage)),
        timeline=live_timeline(laid.events, prediction.usable_bytes) if prediction else model.timeline(choice),
    )


def _made(stage: Stage) -> Iterator[str]:
    """What a stage makes of the model, in words, in the order in which it does."""
    if stage.experts:
        yield _upcycled(stage.experts)
    if stage.balance:
        yield _balanced(stage.balance)
    if stage.quantization:
        scales = ", its scales in 8 bits" if stage.quantization.double_quantization else ""
        yield f"frozen linear layers in {stage.quantization.kind}{scales}"
    if stage.lora:
        named = [stage.lora.target_modules] if isinstance(stage.lora.target_modules, str) else stage.lora.target_modules
        yield f"LoRA of rank {stage.lora.rank} on {', '.join([*named, *stage.lora.target_parameters])}"


def _upcycled(experts: Experts) -> str:
    layers = experts.layers if isinstance(experts.layers, str) else f"{len(experts.layers)} listed"
    counts = [experts.count] if isinstance(experts.count, int) else sorted(set(experts.count))
    count = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    words = [f"{count} experts in {layers} layers, {experts.top_k} for each token"]
    words += ["beside the dense block"] if experts.residual else []
    words += [f"with noise of {experts.noise:g} standard deviations"] if experts.noise else []
    if experts.dispatch == "capacity":
        words.append(f"through dense tensors that hold {experts.capacity_factor:g} times an even load, and drop the rest")
    return ", ".join(words)


def _balanced(balance: Balance) -> str:
    where = {
        "sequence": "within each sample",
        "group": f"within groups of {balance.group} samples",
        "micro-batch": "within each micro-batch",
        "bias": f"by biases that move by {balance.bias_rate:g} a step",
    }
    loss = "" if balance.kind == "bias" else f", coefficient {balance.coefficient:g}"
    z_loss = f", z-loss {balance.z_loss:g}" if balance.z_loss else ""
    return f"their load evened {where[balance.kind]}{loss}{z_loss}"
