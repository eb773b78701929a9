"""Activation checkpointing changes memory and nothing else, and its forms are what a trace of all layers says."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, PhiConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from oomph.core.catalogue import MODELS as MODELS_OF_CATALOGUE
from oomph.core.catalogue import model_folder
from oomph.core.closed_form import ClosedForm
from oomph.core.events import Kind
from oomph.core.forms import FormKey
from oomph.core.layout import Shape
from oomph.errors import UserError
from oomph.live import offload
from oomph.live.batch import images_of
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.layers import find_stacks
from oomph.live.model import build, compose_llava, part_finder, read_config
from oomph.live.moe import upcycle
from oomph.live.simulate import Setup, Simulator
from oomph.live.source import make_form
from oomph.live.step import full_loss
from oomph.recipe import Experts

LANGUAGE = ["none", "every-4", "every-3", "every-2", "blocks", "blocks-offload"]
STRIDES = {"every-4": 4, "every-3": 3, "every-2": 2, "blocks": 1, "blocks-offload": 1}
LAYERS, TOWER_LAYERS = 6, 3
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
VOCABULARY = 96
WHOLE = 1 << 20


# Real models.


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(image_size=28, patch_size=14, num_hidden_layers=TOWER_LAYERS, **SIZES)
    language = PhiConfig(vocab_size=VOCABULARY, num_hidden_layers=LAYERS, **SIZES)
    return build(compose_llava(vision, language, -2, "patch"), torch.float32, "sdpa")


def mixture() -> PreTrainedModel:
    model = llava()
    upcycle(model, Experts(count=4, top_k=2))
    return model


def text() -> PreTrainedModel:
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_hidden_layers=LAYERS, **SIZES)
    return build(config, torch.float32, "sdpa")


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"LLaVA": llava, "upcycled LLaVA": mixture, "Llama": text}


@cache
def made(name: str) -> PreTrainedModel:
    """A real model with random weights; nothing trains in it that is copied from it."""
    model = MODELS[name]().to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=random)
        for buffer in model.buffers():
            values = torch.arange(buffer.numel()).view_as(buffer)
            buffer.copy_(values if not buffer.is_floating_point() else 1.0 / (1 + values))
    return model


def batch(model: PreTrainedModel) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY - 1, (2, 12), generator=random)
    images = images_of(model.config, None) if hasattr(model.config, "vision_config") else None
    if images is None:
        return {"input_ids": ids, "labels": ids}
    ids[:, : images.tokens] = VOCABULARY - 1
    pixels = torch.randn((2, 3, 28, 28), generator=random)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == VOCABULARY - 1, -100), "pixel_values": pixels}


class Passed:
    """What one step left: the gradients by name, and how often each block's attention ran."""

    def __init__(self, name: str, language: str, vision: str, frozen: tuple[str, ...] = ()) -> None:
        model = copy.deepcopy(made(name))
        part = part_finder(model)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(part(path) not in frozen)
        apply_checkpointing(model, language, vision)
        self.runs: Counter[str] = Counter()
        self.language: list[str] = []
        self.tower: list[str] = []
        for path, module in model.named_modules():
            if isinstance(module, GradientCheckpointingLayer):
                (self.tower if part(f"{path}.weight") == "vision" else self.language).append(path)
                module.self_attn.register_forward_hook(self._counter(path))
        full_loss(model.train(), batch(model), 7).backward()
        self.gradients = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}

    def _counter(self, path: str) -> Callable[..., None]:
        return lambda *_: self.runs.update([path])

    def recomputed(self, paths: list[str]) -> list[int]:
        """The numbers of the blocks that ran twice; the others ran once."""
        assert {self.runs[path] for path in paths} <= {1, 2}
        return [number for number, path in enumerate(paths) if self.runs[path] == 2]


@cache
def plain(name: str, frozen: tuple[str, ...] = ()) -> Passed:
    return Passed(name, "none", "none", frozen)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("language", "vision"), list(zip(LANGUAGE, ["blocks", "none"] * 3, strict=True)))
def test_gradients_are_the_same_to_the_bit(name: str, language: str, vision: str) -> None:
    passed, expected = Passed(name, language, vision), plain(name)
    assert passed.gradients.keys() == expected.gradients.keys()
    for path, gradient in passed.gradients.items():
        assert torch.equal(gradient, expected.gradients[path]), path
    stride = STRIDES.get(language, LAYERS)
    assert passed.recomputed(passed.language) == ([] if language == "none" else list(range(0, LAYERS, stride)))
    # LLaVA takes the output of the last layer but one, so the last one's forward is never needed again.
    assert passed.recomputed(passed.tower) == (list(range(TOWER_LAYERS - 1)) if passed.tower and vision == "blocks" else [])


def test_a_frozen_tower_keeps_no_graph() -> None:
    """Nothing of it is recomputed, though its blocks are checkpointed."""
    passed, expected = Passed("LLaVA", "every-2", "blocks", ("vision",)), plain("LLaVA", ("vision",))
    assert passed.recomputed(passed.tower) == []
    assert all(torch.equal(gradient, expected.gradients[path]) for path, gradient in passed.gradients.items())


@pytest.mark.parametrize("frozen", [(), ("vision", "projector"), ("vision", "language", "head")])
def test_the_blocks_inputs_wait_in_host_memory(frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[tuple[int, ...]] = []
    to_host = offload.to_host
    monkeypatch.setattr(offload, "to_host", lambda tensor: gone.append(tuple(tensor.shape)) or to_host(tensor))
    Passed("LLaVA", "blocks-offload", "blocks", frozen)
    assert gone == [(2, 12, SIZES["hidden_size"])] * LAYERS


def test_an_input_without_a_gradient_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block's, where the embeddings are frozen."""
    gone: list[Tensor] = []
    monkeypatch.setattr(offload, "to_host", lambda tensor: gone.append(tensor) or tensor.detach().clone())
    model = copy.deepcopy(made("Llama"))
    model.get_input_embeddings().requires_grad_(False)
    apply_checkpointing(model, "blocks-offload", "none")
    full_loss(model, batch(model), 7).backward()
    assert len(gone) == LAYERS - 1


def test_a_model_whose_blocks_cannot_be_recomputed_is_refused() -> None:
    model = text()
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="cannot recompute the blocks of LlamaForCausalLM"):
        apply_checkpointing(model, "every-2", "none")
    apply_checkpointing(model, "none", "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in MODELS_OF_CATALOGUE if not name.startswith(("clip-", "siglip-"))))
def test_every_third_block_of_each_catalogued_model_is_recomputed(name: str) -> None:
    model = build(read_config(model_folder(name)), torch.bfloat16, "sdpa")
    apply_checkpointing(model, "every-3", "blocks")
    part = part_finder(model)
    stacks = {path: layers for path, layers in find_stacks(model) if part(f"{path}.weight") != "projector"}
    assert stacks
    for path, layers in stacks.items():
        stride = 1 if part(f"{path}.weight") == "vision" else 3
        flags = [getattr(layer, "gradient_checkpointing", None) for layer in layers]
        assert flags == [number % stride == 0 for number in range(len(layers))]


# Forms.


SHAPES = [Shape(2, 300, 0), Shape(3, 2050, 0), Shape(7, 4603, 0)]
DEPTHS: dict[int, list[str]] = {
    13: ["none", "every-2", "blocks", "blocks-offload"],
    25: ["none", "every-4", "every-3", "blocks"],
}
"""Layers: six units of the longest pattern and one layer more; and what is tried with so many, from much memory to little."""
CASES = [
    (13, "every-2"),
    (13, "blocks-offload"),
    pytest.param(25, "every-3", marks=pytest.mark.slow),
    pytest.param(25, "every-4", marks=pytest.mark.slow),
]


def llama(layers: int) -> dict[str, Any]:
    return {"vocab_size": 503, "num_key_value_heads": 2, "num_hidden_layers": layers, **SIZES}


@pytest.fixture(scope="module")
def form_of(plain_key: FormKey, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], ClosedForm]:
    """A function from a Llama's layers and their checkpointing to its form, which its making has checked."""

    @cache
    def find(layers: int, checkpointing: str) -> ClosedForm:
        folder = tmp_path_factory.mktemp("llama")
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **llama(layers)}))
        traced = make_form(replace(plain_key, model=str(folder), checkpointing=checkpointing))
        assert traced.form is not None, traced.how
        return traced.form

    return find


@pytest.mark.parametrize(("layers", "checkpointing"), CASES)
def test_a_form_is_what_a_trace_of_all_layers_says(
    layers: int, checkpointing: str, form_of: Callable[[int, str], ClosedForm]
) -> None:
    form, shape = form_of(layers, checkpointing), SHAPES[0]
    setup = Setup("sdpa", "full", "adamw-fused", checkpointing, "none", (8, 0))
    trace = Simulator(build(LlamaConfig(**llama(layers)), torch.bfloat16, "sdpa"), setup, WHOLE, None).trace(shape)
    sizes = form.sizes(shape).tolist()
    assert [sizes[number] for number in form.formula] == [storage.nbytes for storage in trace.storages]
    assert [form.kinds[number] for number in form.kind] == [storage.kind for storage in trace.storages]
    assert form.timeline == trace.timeline
    assert form.parameters == trace.parameters
    assert form.marks == trace.marks


@pytest.mark.parametrize("layers", [13, pytest.param(25, marks=pytest.mark.slow)])
def test_more_recomputation_needs_less_memory(layers: int, form_of: Callable[[int, str], ClosedForm]) -> None:
    for shape in SHAPES:
        for accumulates in (False, True):
            peaks = [form_of(layers, checkpointing).live_peak(shape, accumulates) for checkpointing in DEPTHS[layers]]
            assert peaks == sorted(set(peaks), reverse=True), shape


def test_a_copy_of_an_offloaded_input_is_an_activation_of_its_block(form_of: Callable[[int, str], ClosedForm]) -> None:
    """There is one for each block in each of the two micro-batches of a form, and none without offloading."""
    copies = {}
    for checkpointing in ("blocks", "blocks-offload"):
        form = form_of(13, checkpointing)
        copy_back = Kind("aten._to_copy.default", "model.layers.{}", "recompute", "activation", "bfloat16")
        copies[checkpointing] = sum(form.kinds[number] == copy_back for number in form.kind)
    assert copies == {"blocks": 0, "blocks-offload": 2 * 13}


@pytest.mark.slow
def test_an_upcycled_llava_has_a_form(plain_key: FormKey, tmp_path: Path) -> None:
    """One block of three has experts and another one is recomputed: a unit of three."""
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": 140, "patch_size": 14, **SIZES}
    language = {"model_type": "phi", "vocab_size": 503, "num_hidden_layers": 19, **SIZES}
    for name, config in {"vision": vision, "language": language}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    folders: dict[str, Any] = {name: str(tmp_path / name) for name in ("vision", "language")}
    parts: dict[str, Any] = {"projector": "mlp2x_gelu", "vision_feature_layer": -2, "vision_feature_select": "patch"}
    parts |= {"trained": ("projector", "experts", "router"), "frozen": ("vision", "language", "head")}
    experts = {"experts": json.dumps({"count": 4, "top_k": 2, "layers": list(range(1, 19, 3))}), "images": 2}
    traced = make_form(replace(plain_key, **folders, **parts, **experts, checkpointing="every-3"))
    assert traced.form is not None, traced.how
