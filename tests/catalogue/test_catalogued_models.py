"""Every catalogued model that is trained has a closed form, equal to a trace at a shape and a depth it was not made from.

A trace of six units is one more than the form was made from; what is left out of it is like what is in it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch

from oomph.core.catalogue import MODELS, model_folder
from oomph.core.closed_form import Family, NotClosed, fit
from oomph.core.layout import Shape
from oomph.core.plan import LOOPS_OVER_IMAGES
from oomph.core.trace import Trace
from oomph.core.unroll import UNITS
from oomph.errors import UserError
from oomph.live.batch import Images, images_of
from oomph.live.layers import shorten
from oomph.live.model import build, part_finder, read_config
from oomph.live.simulate import Setup, Simulator

pytestmark = pytest.mark.slow

NO_TEXT = {
    "clip-vit-large-patch14-336",
    "clip-vit-large-patch14-336-vision",
    "siglip-so400m-patch14-384",
    "siglip-so400m-patch14-384-vision",
}
TRAINED = [name for name in MODELS if name not in NO_TEXT]
PADS_MASKS = {"gemma-3-12b-it"}
"""Their masks are padded unless the tokens are a multiple of 8; for such tokens they are traced at the very shape."""
IMAGE_SIZE = {"qwen2.5-vl-7b-instruct": (336, 336)}
"""Smaller images where each one is many operators: nine windows in each layer."""
SETUP = Setup("sdpa", "chunked", "adamw-fused", "blocks", (8, 0))


class Model(NamedTuple):
    """A model, how it takes images, the family of shapes that is traced: two samples or more, with an image each."""

    name: str
    config: Any
    images: Images | None
    family: Family

    @property
    def image_tokens(self) -> int:
        return 0 if self.images is None else self.images.tokens

    def simulator(self, units: int) -> Simulator:
        model = build(self.config, torch.bfloat16, SETUP.attention)
        part = part_finder(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part(name) != "vision")
        return Simulator(model, SETUP, shorten(model, units), self.images)

    def shape(self, tokens: int) -> Shape:
        """Samples of so many tokens beside their images'; not one of the shapes that forms are made from or checked on."""
        samples = 2 if self.family.images < 0 else 4
        images = abs(self.family.images) if self.family.images < 0 else samples * (self.images is not None)
        return Shape(samples, tokens + self.image_tokens, images)


def model(name: str) -> Model:
    config = read_config(model_folder(name))
    images = images_of(config, IMAGE_SIZE.get(name)) if getattr(config, "vision_config", None) is not None else None
    loops = config.model_type in LOOPS_OVER_IMAGES
    return Model(name, config, images, Family.of((2, 0, 0 if images is None else 2), loops))


@lru_cache(maxsize=1)
def shallow(name: str) -> list[tuple[Shape, Trace]]:
    """What a form is made from: traces of five units at two shapes."""
    found = model(name)
    simulator = found.simulator(UNITS)
    return [(Shape(*shape), simulator.trace(Shape(*shape))) for shape in found.family.examples(found.image_tokens)[:2]]


@lru_cache(maxsize=1)
def deeper(name: str) -> Simulator:
    return model(name).simulator(UNITS + 1)


def assert_exact(name: str, shape: Shape) -> None:
    """Compares the form with a trace, and the model with its published number of parameters."""
    trace = deeper(name).trace(shape)
    try:
        form = fit(shallow(name), (shape, trace))
    except NotClosed as reason:
        pytest.fail(str(reason))
    assert sum(parameter.numel for parameter in form.parameters) == MODELS[name].parameters
    assert form.pads_masks == (name in PADS_MASKS)


@pytest.mark.parametrize("name", TRAINED)
def test_the_form_is_what_a_trace_says(name: str) -> None:
    """At the shape that every form is checked on, and at one whose tokens are a multiple of 8, as those of most recipes."""
    found = model(name)
    assert_exact(name, Shape(*found.family.examples(found.image_tokens)[2]))
    if name not in PADS_MASKS:
        assert_exact(name, found.shape(2048))


def test_the_check_would_fail() -> None:
    """On a trace in which one storage is larger by a byte."""
    name = "llama-3.1-8b"
    shape = model(name).shape(2051)
    trace = deeper(name).trace(shape)
    number = next(n for n, row in enumerate(trace.storages) if row.kind.phase == "backward")
    trace.storages[number] = trace.storages[number]._replace(nbytes=trace.storages[number].nbytes + 1)
    with pytest.raises(NotClosed):
        fit(shallow(name), (shape, trace))


@pytest.mark.parametrize("name", sorted(NO_TEXT))
def test_what_generates_no_text_is_refused(name: str) -> None:
    config = read_config(model_folder(name))
    with pytest.raises(UserError, match="is not a language model or a vision-language model") as caught:
        build(config, torch.bfloat16, "sdpa")
    assert "made of parts" in caught.value.hint


def test_every_model_is_one_or_the_other() -> None:
    assert NO_TEXT < set(MODELS)
    assert len(TRAINED) == len(MODELS) - len(NO_TEXT)
