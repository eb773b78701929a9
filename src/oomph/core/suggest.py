"""Changes of the mathematics that save memory: named with what they would save, and never made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from oomph.core.bounds import Bounds
from oomph.core.closed_form import LEAST_ROWS, ClosedForm, Dimension, Formula
from oomph.core.eight_bit import EIGHT_BIT, state_bytes
from oomph.core.layout import Shape
from oomph.core.sharding import static_bytes
from oomph.core.stage import StageModel
from oomph.core.trace import Parameter
from oomph.errors import UserError
from oomph.records import Choice, Prediction, Suggestion

RANK = 16
"""Rank of the adapters that are suggested."""

_FROZEN = ("language", "experts", "router", "head")
_EMBEDDING = re.compile(r"(?:^|[._])(?:embed\w*|wte|wpe)$")
_SHORTER = (("three quarters", 3, 4), ("half", 1, 2))
_TAKE_ANY_SIZE = frozenset({"idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "paddleocr_vl", "kimi_k25"})
_WHOLE_GRADIENTS = ("none", "ddp", "zero1")
_FP32 = 4
_RESIDENT = "arithmetic on resident bytes"


def suggestions(model: StageModel, choice: Choice, prediction: Prediction) -> tuple[Suggestion, ...]:
    """What other mathematics would save of a choice's allocated peak, the most first; what saves nothing is left out.

    Args:
        model: the stage.
        choice: a choice of it.
        prediction: of the choice.
    """
    found = [
        _lora(model, choice, prediction),
        _eight_bits(model, choice, prediction),
        *(_shorter(model, choice, prediction, *share) for share in _SHORTER),
        _smaller_images(model, choice, prediction),
        _fewer_experts(model, choice, prediction),
    ]
    saving = [suggestion for suggestion in found if suggestion is not None and suggestion.saves_bytes > 0]
    return tuple(sorted(saving, key=lambda suggestion: -suggestion.saves_bytes))


def _lora(model: StageModel, choice: Choice, prediction: Prediction) -> Suggestion | None:
    """Adapters on the language model's linear layers, experts included, instead of training the weights.

    A layer of [outputs, inputs] gets two matrices, [rank, inputs] and [outputs, rank], in its own type (Hu et al., LoRA,
    arXiv 2106.09685). Projector and vision tower train as before.
    """
    form = model.lay_out(choice).form
    given = form.parameters
    frozen = {n: p._replace(trainable=False) for n, p in enumerate(given) if p.trainable and p.part in _FROZEN}
    adapters = [adapter for parameter in given if _is_linear(parameter) for adapter in _adapters(parameter)]
    if not frozen or not adapters:
        return None
    gradients = sum(adapter.nbytes for adapter in adapters) if choice.sharding in _WHOLE_GRADIENTS else 0
    saved = _least(model, choice, form) - _least(model, choice, _altered(form, frozen, adapters)) - gradients
    change = f"LoRA of rank {RANK} on every linear layer of the language model, whose weights stay as they are"
    return _estimated("lora", change, saved, prediction, _RESIDENT)


def _is_linear(parameter: Parameter) -> bool:
    """Whether a parameter is the weight of a linear layer of the language model, or of the experts' layers, stacked."""
    module = parameter.module if parameter.name.endswith(".weight") else parameter.name
    matrix = len(parameter.shape) == 2 and parameter.part == "language"
    stacked = len(parameter.shape) == 3 and parameter.part == "experts"
    single = len(parameter.shape) == 2 and parameter.part == "experts" and parameter.name.endswith(".weight")
    return (matrix or stacked or single) and not _EMBEDDING.search(module)


def _adapters(parameter: Parameter) -> list[Parameter]:
    *experts, outputs, inputs = parameter.shape
    shapes = (*experts, RANK, inputs), (*experts, outputs, RANK)
    return [Parameter(f"{parameter.name}.lora_{n}", shape, parameter.dtype, True, "adapter") for n, shape in enumerate(shapes)]


def _eight_bits(model: StageModel, choice: Choice, prediction: Prediction) -> Suggestion | None:
    """AdamW's moments in one byte each, as `state_bytes` has them; float32 copies of the weights stay.

    Parameters that a sharding divides are taken as one tensor of a rank's share.
    """
    if choice.optimizer_offload or choice.optimizer in EIGHT_BIT:
        return None
    form = model.lay_out(choice).form
    states = static_bytes(form.parameters, choice, reached=form.reached)["optimizer"]
    zero, fsdp = choice.sharding.startswith("zero"), choice.sharding.startswith("fsdp2")
    moments = states - states // 3 if zero or (choice.master_weights and not fsdp) else states
    held = max((parameter.itemsize for parameter in form.parameters if parameter.trainable), default=_FP32)
    itemsize = _FP32 if zero or choice.master_weights else held
    share = Parameter("share", (moments // (2 * itemsize),), "float32", True)
    updated = [share] if zero or fsdp else [form.parameters[number] for number in sorted(form.reached)]
    change = "AdamW with 8-bit states, as bitsandbytes has it: two bytes and a little for each parameter that trains"
    return _estimated("8-bit optimizer", change, moments - state_bytes(updated, "adamw-8bit"), prediction, _RESIDENT)


def _shorter(
    model: StageModel, choice: Choice, prediction: Prediction, words: str, numerator: int, denominator: int
) -> Suggestion | None:
    """Samples cut to a share of their tokens, or one token longer where that needs no trace."""
    tokens = model.data.max_tokens * numerator // denominator
    for limit in (tokens, tokens + 1):
        shorter = model.on(model.gpu, data=model.data.model_copy(update={"max_tokens": limit}))
        try:
            formulas = limit > 0 and shorter.closed(choice)
        except UserError:
            return None
        if formulas:
            less = shorter.predict(choice)
            saved = prediction.allocated_peak_bytes - less.allocated_peak_bytes
            change = f"max_tokens {limit:,}, {words} of the tokens"
            return Suggestion("shorter samples", change, saved, less.allocated_peak_bytes, less.fits, "exact")
    return None


def _smaller_images(model: StageModel, choice: Choice, prediction: Prediction) -> Suggestion | None:
    """Images of half as many pixels, for models that take any size: half the tokens of an image, at the same text."""
    key = model.first_keys()[0]
    kind = key.configurations()[key.model].get("model_type") if key.model else None
    if not model.images or kind not in _TAKE_ANY_SIZE or not model.closed(choice):
        return None
    laid = model.lay_out(choice)
    fewer = model.tokens - model.images * (laid.traced.image_tokens // 2)
    if choice.micro_batch * fewer < LEAST_ROWS:
        return None
    bounds = Bounds(laid.form)
    images = choice.micro_batch * model.images
    before, after = (bounds.least_bytes(choice, Shape(choice.micro_batch, tokens, images)) for tokens in (model.tokens, fewer))
    change = "a data.image_size of half as many pixels, and so half of the image tokens"
    basis = "estimate from the tokens; what the vision tower saves comes on top"
    return _estimated("smaller images", change, before - after, prediction, basis)


def _fewer_experts(model: StageModel, choice: Choice, prediction: Prediction) -> Suggestion | None:
    """Half of the experts that the stage makes, as many as a token sees at the least."""
    experts = model.stage.experts
    if experts is None or isinstance(experts.count, list) or (count := max(experts.count // 2, experts.top_k)) == experts.count:
        return None
    form = model.lay_out(choice).form
    halved = {
        number: parameter._replace(shape=(count, *parameter.shape[1:]))
        for number, parameter in enumerate(form.parameters)
        if parameter.part == "experts" and parameter.shape[0] == experts.count
    }
    saved = _least(model, choice, form) - _least(model, choice, _altered(form, halved))
    return _estimated("fewer experts", f"{count} experts instead of {experts.count}", saved, prediction, _RESIDENT)


def _altered(form: ClosedForm, changed: Mapping[int, Parameter], added: Sequence[Parameter] = ()) -> ClosedForm:
    """A form with other parameters in the place of some, and more of them.

    Gradients of those that change have other bytes, or none where they are frozen. Those that are added have gradients that
    are never alive, which says that they get one.
    """
    new = [changed.get(number, parameter) for number, parameter in enumerate(form.parameters)]
    kinds = [number for number, kind in enumerate(form.kinds) if kind.role == "gradient"]
    formulas, formula = list(form.formulas), list(form.formula)
    for storage, parameter in enumerate(form.parameter):
        if parameter in changed and form.kind[storage] in kinds:
            elements = new[parameter].numel if new[parameter].trainable else 0
            formulas.append(Formula((Dimension(0, elements, 0),), new[parameter].itemsize))
            formula[storage] = len(formulas) - 1
    formulas.append(Formula((Dimension(0, 0, 0),), 1))
    return replace(
        form,
        formulas=formulas,
        formula=formula + [len(formulas) - 1] * len(added),
        kind=form.kind + kinds[:1] * len(added),
        layer=form.layer + [-1] * len(added),
        parameter=form.parameter + [len(new) + number for number in range(len(added))],
        parameters=[*new, *added],
    )


def _least(model: StageModel, choice: Choice, form: ClosedForm) -> int:
    """The lower bound of a form at the stage's shape."""
    shape = Shape(choice.micro_batch, model.tokens, choice.micro_batch * model.images)
    return Bounds(form).least_bytes(choice, shape)


def _estimated(name: str, change: str, saved: int, prediction: Prediction, basis: str) -> Suggestion:
    """A suggestion whose bytes are taken off what is predicted."""
    reserved = prediction.reserved_peak_bytes - saved
    return Suggestion(name, change, saved, prediction.allocated_peak_bytes - saved, reserved <= prediction.usable_bytes, basis)
