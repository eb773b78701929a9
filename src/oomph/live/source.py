"""Makes closed forms: builds the model that a key names, traces its step at a few shapes, fits and checks the formulas."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from oomph.core.closed_form import Family, NotClosed, constant_form, fit
from oomph.core.forms import FormKey, Traced
from oomph.core.layout import Shape
from oomph.core.unroll import UNITS, NotPeriodic
from oomph.errors import UntraceableError
from oomph.live.batch import Images, images_of
from oomph.live.model import build, compose_llava, part_finder, projector, read_config
from oomph.live.moe import upcycle
from oomph.live.simulate import Setup, Simulator
from oomph.recipe import cover

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
        deeper = _simulator(key, copy.deepcopy(model), images, UNITS + 1)
        shallow = _simulator(key, model, images, UNITS)
        traces = [(shape, shallow.trace(Shape(*shape))) for shape in made]
        form = fit(traces, (held_out, deeper.trace(Shape(*held_out))))
    except (NotClosed, NotPeriodic, UntraceableError) as reason:
        return Traced(None, tokens, f"no closed form: {reason}")
    note = f"; step time: {form.work.note}" if form.work.note else ""
    return Traced(form, tokens, f"closed form of {len(traces)} traces, checked on one more shape and depth{note}")


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
    return compose_llava(vision, language, key.vision_feature_layer, key.vision_feature_select)


def build_model(key: FormKey, config: PretrainedConfig) -> PreTrainedModel:
    """The key's model on the ``meta`` device, upcycled where the stage asks for it, with what trains requiring gradients.

    Raises:
        UserError: the model cannot be built, or the rules do not cover its parameters.
    """
    dtype = getattr(torch, key.precision)
    model = build(config, dtype, key.attention)
    if key.projector is not None:
        _set_projector(model, key.projector, dtype)
    if key.expert_count:
        upcycle(model, key.expert_count, key.expert_top_k, json.loads(key.expert_layers))
    part = part_finder(model)
    named = list(model.named_parameters())
    rules: dict[str, float | str] = {**dict.fromkeys(key.trained, 1.0), **dict.fromkeys(key.frozen, "frozen")}
    rates = cover(rules, [(name, part(name)) for name, _ in named])  # type: ignore[arg-type]
    for name, parameter in named:
        parameter.requires_grad_(rates[name] is not None)
    model.train()
    return model


def _set_projector(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> None:
    """Replaces LLaVA's projector, which is ``mlp2x_gelu``, where the recipe names another."""
    if kind == "mlp2x_gelu":
        return
    sizes = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    with torch.device("meta"):
        model.base_model.multi_modal_projector = projector(kind, *sizes).to(dtype)


def _simulator(key: FormKey, model: PreTrainedModel, images: Images | None, units: int) -> Simulator:
    capability = (key.capability[0], key.capability[1]) if key.capability else None
    setup = Setup(key.attention, key.loss, key.optimizer, key.checkpointing, key.vision_checkpointing, capability)
    return Simulator(model, setup, units, images)
