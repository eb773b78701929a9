"""Makes closed forms: builds the model that a key names, traces its step at a few shapes, fits and checks the formulas."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from oomph.core.closed_form import Family, NotClosed, constant_form, fit
from oomph.core.forms import FormKey, Traced
from oomph.core.layout import Shape
from oomph.core.unroll import UNITS, NotPeriodic
from oomph.errors import UntraceableError
from oomph.live.adapters import add_adapters, check_rules
from oomph.live.balance import apply_balance
from oomph.live.batch import Images, images_of
from oomph.live.capacity import balance_capacity, load_of
from oomph.live.model import LLAVA_PROJECTOR, build, compose_llava, part_finder, read_config, without_adapters
from oomph.live.modeling_oomph_llava import projector
from oomph.live.moe import make_choice_biases, upcycle
from oomph.live.moe_architectures import check_same, has_choice_bias, has_own_class, section_in
from oomph.live.precision import arithmetic_of
from oomph.live.quantization import quantize
from oomph.live.simulate import Setup, Simulator
from oomph.recipe import Experts, cover
from oomph.recipe.rules import parse_pattern
from oomph.recipe.schema import Balance, Lora

WHOLE = 1 << 20


def make_form(key: FormKey) -> Traced:
    """The closed form of a key, or, for a key with a shape, the trace of the whole model at that shape as one.

    Raises:
        UserError: the model cannot be built or traced, or the rules do not cover its parameters.
    """
    config = read_model_config(key)
    model = build_model(key, config)
    images = images_of(config, (key.image_size[0], key.image_size[1]) if key.image_size else None) if key.images else None
    tokens = images.tokens if images is not None else 0
    if key.shape is not None:
        trace = _simulator(key, model, images, UNITS if key.periodic else WHOLE).trace(Shape(*key.shape))
        return Traced(constant_form(trace), tokens, f"traced at this very shape{'' if key.periodic else ', all layers'}")
    family = Family(key.one_sample, key.images)
    *made, held_out = family.examples(tokens)
    try:
        simulator = _simulator(key, model, images, UNITS + 1, UNITS)
        check = simulator.trace(Shape(*held_out))
        simulator.shorten()
        load = load_of(_experts(key, config))
        form = fit([(shape, simulator.trace(Shape(*shape))) for shape in made], (held_out, check), load)
    except (NotClosed, NotPeriodic, UntraceableError) as reason:
        return Traced(None, tokens, f"no closed form: {reason}")
    note = f"; step time: {form.work.note}" if form.work.note else ""
    return Traced(form, tokens, f"closed form of {len(made)} traces, checked on one more shape and depth{note}")


def read_model_config(key: FormKey) -> PretrainedConfig:
    """The configuration that the key's folders make.

    Raises:
        UserError: transformers cannot read one of them.
    """
    if key.model is not None:
        return read_config(Path(key.model))
    assert key.vision is not None
    assert key.language is not None
    vision, language = read_config(Path(key.vision)), read_config(Path(key.language))
    layer, select = key.vision_feature_layer, key.vision_feature_select
    return compose_llava(vision, language, layer, select, key.projector or LLAVA_PROJECTOR)


def build_model(key: FormKey, config: PretrainedConfig) -> PreTrainedModel:
    """The key's model on the ``meta`` device, changed as the stage asks for it, with what trains requiring gradients.

    It is upcycled first, then quantized, then gets its adapters. The rules mean names as they are without adapters.

    Raises:
        UserError: the model cannot be built or changed, or the rules do not cover its parameters.
    """
    arithmetic = arithmetic_of(key.precision)
    model = build(config, arithmetic.frozen, key.attention)
    set_projector(model, arithmetic.frozen)
    experts = _experts(key, config)
    if experts is not None:
        upcycle(model, experts)
    if has_choice_bias(config):
        make_choice_biases(model)
    _balance(key, model, experts)
    check_rules((*key.trained, *key.frozen), bool(key.lora))
    if key.quantization:
        rates = _rates(key, model, adapters=False)
        quantize(model, key.quantization, lambda name: rates[name] is not None)
    if key.lora:
        add_adapters(model, Lora.model_validate_json(key.lora))
    rates = _rates(key, model, adapters=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates[without_adapters(name)] is not None)
    part = part_finder(model)
    arithmetic.lift(model, part)
    model.train()
    return model


def _experts(key: FormKey, config: PretrainedConfig) -> Experts | None:
    """What the dense model is upcycled to; None where it stays dense, or comes with experts of its own class.

    Raises:
        UserError: the stage asks for other experts than the model has.
    """
    asked = Experts.model_validate_json(key.experts) if key.experts else None
    found = section_in(config)
    if found is None or asked is None:
        return found if found is not None and not has_own_class(config) else asked
    check_same(asked, found, config, str(key.model or key.language), top_k=has_own_class(config))
    return None if has_own_class(config) else asked


def _balance(key: FormKey, model: PreTrainedModel, experts: Experts | None) -> None:
    """Lets the routers count what they choose, and adds the stage's balance, in place.

    Raises:
        UserError: there is nothing to balance, or it cannot be balanced like this.
    """
    balance = Balance.model_validate_json(key.balance) if key.balance else None
    if experts is None or experts.dispatch != "capacity":
        apply_balance(model, balance)
    elif balance is not None:
        balance_capacity(model, balance)


def _rates(key: FormKey, model: PreTrainedModel, adapters: bool) -> dict[str, float | None]:
    """The learning rate of every parameter by the name it has without adapters, 1 where it trains and None where not."""
    part = part_finder(model)
    rules: dict[str, float | str] = {**dict.fromkeys(key.trained, 1.0), **dict.fromkeys(key.frozen, "frozen")}
    named = [(without_adapters(name), part(name)) for name, _ in model.named_parameters()]
    meant = rules if adapters else {text: rate for text, rate in rules.items() if parse_pattern(text).part != "lora"}
    return cover(meant, named)  # type: ignore[arg-type]


def set_projector(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replaces LLaVA's own projector where the configuration names another."""
    kind = getattr(model.config, "projector", LLAVA_PROJECTOR)
    if kind != LLAVA_PROJECTOR:
        sizes = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        with torch.device("meta"):
            model.base_model.multi_modal_projector = projector(kind, *sizes).to(dtype)


def _simulator(
    key: FormKey, model: PreTrainedModel, images: Images | None, units: int, then: int | None = None
) -> Simulator:
    capability = (key.capability[0], key.capability[1]) if key.capability else None
    knobs = key.attention, key.loss, key.optimizer, key.checkpointing, key.vision_checkpointing
    setup = Setup(*knobs, capability, precision=key.precision)
    return Simulator(model, setup, units, images, then)
