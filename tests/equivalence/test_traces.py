"""A few layers unrolled are the whole model, formulas are what a trace at that shape says, and no two traces differ.

All on small configurations of the real classes, with as many layers as make some of them left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from oomph.core.allocator import Allocator, replay
from oomph.core.closed_form import ClosedForm, Family, fit
from oomph.core.forms import FormKey, Traced
from oomph.core.layout import Shape, lay_out
from oomph.core.trace import NOWHERE, Trace, layer_of
from oomph.core.unroll import UNITS, unroll
from oomph.errors import UserError
from oomph.live.batch import Images, images_of
from oomph.live.memo import Memo
from oomph.live.model import build, compose_llava, part_finder
from oomph.live.simulate import Setup, Simulator
from oomph.live.source import make_form
from oomph.records import Choice

WHOLE = 1 << 20
LAYERS = 7
MANY, TEXT_ALONE = Family(False, 2), Family(False, 0)
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
TOWER: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "num_hidden_layers": LAYERS,
    "image_size": 140,
    "patch_size": 14,
    **SIZES,
}
IMAGE_TOKENS = 100
VOCABULARY = 503
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    **SIZES,
}


def llava(language: PretrainedConfig) -> PretrainedConfig:
    """LLaVA with a small CLIP tower."""
    return compose_llava(CLIPVisionConfig(**TOWER), language, -2, "patch")


def phi() -> PretrainedConfig:
    return llava(PhiConfig(vocab_size=VOCABULARY, num_key_value_heads=4, num_hidden_layers=LAYERS, **SIZES))


def llama() -> PretrainedConfig:
    return LlamaConfig(**{name: value for name, value in LLAMA.items() if name != "model_type"})


def llava_llama() -> PretrainedConfig:
    return llava(llama())


def qwen() -> PretrainedConfig:
    """A mixture of eight experts in each layer, two of them for each token."""
    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    return Qwen3MoeConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_hidden_layers=LAYERS, **SIZES, **experts)


def gemma() -> PretrainedConfig:
    """A layer that sees a window of tokens and one that sees all, again and again, and a window at the end."""
    kinds = ["sliding_attention", "full_attention"] * LAYERS + ["sliding_attention"]
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": len(kinds), "layer_types": kinds}
    text = Gemma3TextConfig(vocab_size=VOCABULARY, sliding_window=256, **sizes)
    vision = SiglipVisionConfig(**SIZES, num_hidden_layers=LAYERS, image_size=140, patch_size=14)
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=500)


@dataclass(frozen=True)
class Case:
    """What is traced: a model, what of it is frozen, the knobs, a family of shapes."""

    config: Callable[[], PretrainedConfig]
    checkpointing: str = "none"
    attention: Any = "sdpa"
    loss: str = "full"
    optimizer: str = "adamw-fused"
    frozen: tuple[str, ...] = ("vision",)
    family: Family = MANY
    capability: tuple[int, int] | None = (8, 0)

    def simulator(self, units: int) -> Simulator:
        config = self.config()
        model = build(config, torch.bfloat16, self.attention)
        part = part_finder(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part(name) not in self.frozen)
        vision = "blocks" if self.checkpointing == "blocks" else "none"
        setup = Setup(self.attention, self.loss, self.optimizer, self.checkpointing, vision, self.capability)
        return Simulator(model, setup, units, self.images(config))

    def images(self, config: PretrainedConfig) -> Images | None:
        return images_of(config, None) if self.family.images else None

    def examples(self) -> list[Shape]:
        images = self.images(self.config())
        return [Shape(*shape) for shape in self.family.examples(images.tokens if images else 0)]

    def form(self) -> ClosedForm:
        """The form of five units, made from two shapes and not checked on a third: that is what the tests do."""
        simulator = self.simulator(UNITS)
        return fit([(shape, simulator.trace(shape)) for shape in self.examples()[:2]], None)


TEXT = Case(llama, frozen=(), family=TEXT_ALONE)
MIXTURE = Case(qwen, frozen=(), family=TEXT_ALONE)
CASES: dict[str, Case] = {
    "LLaVA Phi, checkpointing": Case(phi, "blocks", optimizer="adamw-foreach"),
    "LLaVA Phi, eager-fp32 attention, full-shifted loss": Case(phi, "blocks", "eager-fp32", "full-shifted"),
    "Qwen3-MoE, checkpointing": replace(MIXTURE, checkpointing="blocks"),
}
SLOW: dict[str, Case] = {
    "LLaVA Phi, chunked loss": Case(phi, loss="chunked"),
    "LLaVA Phi, one sample": Case(phi, "blocks", family=Family(True, 1)),
    "Llama": TEXT,
    "LLaVA Phi": Case(phi),
    "LLaVA Phi, no image": Case(phi, "blocks", family=TEXT_ALONE),
    "LLaVA Phi, one sample, several images": Case(phi, family=Family(True, 2)),
    "LLaVA Phi, eager attention": Case(phi, attention="eager", loss="full-shifted"),
    "LLaVA Phi, trained tower": Case(phi, frozen=()),
    "LLaVA Phi, trained tower, checkpointing": Case(phi, "blocks", frozen=()),
    "LLaVA Phi, the projector alone": Case(phi, "blocks", frozen=("vision", "language", "head")),
    "LLaVA Phi, the tower alone": Case(phi, frozen=("projector", "language", "head")),
    "LLaVA Llama, checkpointing, chunked loss": Case(llava_llama, "blocks", loss="chunked"),
    "LLaVA Llama, H100": Case(llava_llama, capability=(9, 0)),
    "LLaVA Llama, T4": Case(llava_llama, capability=(7, 5)),
    "LLaVA Llama, no rules": Case(llava_llama, capability=None),
    "Llama, foreach": replace(TEXT, optimizer="adamw-foreach"),
    "Llama, loop": replace(TEXT, optimizer="adamw-loop"),
    "Llama, one sample": replace(TEXT, family=Family(True, 0)),
    "Qwen3-MoE": MIXTURE,
    "Qwen3-MoE, eager attention, chunked loss": replace(MIXTURE, attention="eager", loss="chunked"),
    "Qwen3-MoE, the router frozen": replace(MIXTURE, frozen=("router",)),
    "Gemma3": Case(gemma),
    "Gemma3, checkpointing": Case(gemma, "blocks"),
}
ALL = {**CASES, **SLOW}
LOOP = "a temporary of AdamW's loop ends where the next parameter's has begun, which may be in another layer"
ALIGNED = "masks of attention are padded unless the tokens are a multiple of 8, which none of the traced shapes is"


def failure(name: str, aligned: bool = False) -> str:
    """Why a case is expected to fail."""
    if "loop" in name:
        return LOOP
    return ALIGNED if aligned and name.startswith("Gemma3") else ""


def marked(name: str, *more: Any, reason: str = "") -> Any:
    """A parameter: slow where the case is, and expected to fail where there is a reason to."""
    marks: list[pytest.MarkDecorator] = [pytest.mark.slow] * (name in SLOW)
    return pytest.param(name, *more, marks=[*marks, *[pytest.mark.xfail(reason=reason, strict=True)] * bool(reason)])


SHAPES: dict[Family, list[Shape]] = {
    MANY: [Shape(2, 304, 2), Shape(4, 4603, 12)],
    TEXT_ALONE: [Shape(2, 304, 0), Shape(7, 4603, 0)],
    Family(True, 0): [Shape(1, 304, 0), Shape(1, 9001, 0)],
    Family(True, 1): [Shape(1, 304, 1), Shape(1, 9001, 1)],
    Family(True, 2): [Shape(1, 304, 2), Shape(1, 9001, 5)],
}
"""Not those that forms are made from: a shorter one, of tokens that are a multiple of 8, and a longer one of a prime."""
PAIRS = [
    marked(name, shape, reason=failure(name, shape.tokens % 8 == 0))
    for name, case in ALL.items()
    for shape in SHAPES[case.family][-1 if name in SLOW and case.config is not gemma else 0 :]
]


@cache
def form_of(name: str) -> ClosedForm:
    return ALL[name].form()


@cache
def whole_of(name: str) -> Simulator:
    return ALL[name].simulator(WHOLE)


def storages(form: ClosedForm, shape: Shape) -> Iterable[tuple[Any, ...]]:
    """Bytes, kind, layer and parameter of everything that the form says is allocated."""
    sizes = form.sizes(shape).tolist()
    for formula, kind, layer, parameter in zip(form.formula, form.kind, form.layer, form.parameter, strict=True):
        name = form.parameters[parameter].name if parameter >= 0 else ""
        yield sizes[formula], form.kinds[kind], layer, name


def traced(trace: Trace) -> Iterable[tuple[Any, ...]]:
    """The same of a trace of all layers."""
    for row in trace.storages:
        layer = -1 if row.home == NOWHERE else layer_of(row.home)
        name = trace.parameters[row.parameter].name if row.parameter >= 0 else ""
        yield row.nbytes, row.kind, layer, name


def assert_equal(form: ClosedForm, shape: Shape, whole: Trace) -> None:
    for expected, found in zip(traced(whole), storages(form, shape), strict=False):
        assert found == expected, f"at {shape}"
    assert form.timeline == whole.timeline
    assert form.parameters == whole.parameters
    assert form.pieces == whole.pieces
    assert form.marks == whole.marks
    assert form.trained == len({row.parameter for row in whole.storages if row.kind.role == "gradient"} - {-1})


@pytest.mark.parametrize(("name", "shape"), PAIRS)
def test_five_units_and_two_shapes_are_all_layers_at_any_shape(name: str, shape: Shape) -> None:
    assert_equal(form_of(name), shape, whole_of(name).trace(shape))


@pytest.mark.parametrize("name", [marked(name) for name in ALL])
def test_a_step_ends_what_it_makes(name: str) -> None:
    """Nothing is freed twice or allocated while it is alive, and no step but the first changes what stays."""
    form, (shape, *_) = form_of(name), SHAPES[ALL[name].family]
    images = shape.images // shape.samples
    for accumulation in (1, 3):
        choice = Choice(shape.samples, accumulation, shape.samples * accumulation, eval_batch=shape.samples)
        events = lay_out(form, choice, shape.tokens, images)
        resident, after = set[int](), dict[str, set[int]]()
        for segment in events.segments:
            for entry in list(segment.timeline) * segment.repeat:
                if entry >= 0:
                    assert entry not in resident
                    resident.add(entry)
                else:
                    resident.remove(~entry)
            after[segment.name] = set(resident)
        assert after["step/optimizer"] == after["warmup/optimizer"]
        assert after["warmup/optimizer"] <= after["evaluate"]
        roles = {events.kinds[storage].role for storage in after["step/optimizer"]}
        assert roles <= {"weight", "optimizer", "workspace"}
        result = replay(events.sizes, events.segments, Allocator())
        assert result.peak_allocated >= form.live_peak(shape, accumulation > 1)


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw-fused",
        "adamw-foreach",
        "adamw-loop",
    ],
)
def test_the_step_counter_is_on_the_gpu_where_the_kernel_is_fused(optimizer: str) -> None:
    """``torch/optim/adam.py``, ``_init_group``: on the host unless capturable or fused."""
    simulator = replace(TEXT, optimizer=optimizer).simulator(WHOLE)
    trace = simulator.trace(Shape(2, 300, 0))
    states = [row for row in trace.storages if row.kind.role == "optimizer"]
    assert len(states) == len(trace.parameters) * (3 if optimizer == "adamw-fused" else 2)


# One trace is like the other.


@pytest.mark.parametrize(
    "case",
    [Case(phi, "blocks", optimizer="adamw-foreach"), pytest.param(replace(MIXTURE, loss="chunked"), marks=pytest.mark.slow)],
    ids=["LLaVA", "MoE"],
)
def test_operators_from_memory_are_the_operators(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second trace of a simulator takes nearly all from memory, and the first one much."""
    shape = SHAPES[case.family][0]
    simulator = case.simulator(UNITS)
    first, second = simulator.trace(shape), simulator.trace(shape)
    monkeypatch.setattr(Memo, "run", lambda self, func, args, kwargs: func(*args, **kwargs))
    plain = case.simulator(UNITS).trace(shape)
    assert first == plain
    assert second == plain


@pytest.mark.slow
def test_traces_do_not_depend_on_what_was_traced_before() -> None:
    case = Case(phi, "blocks")
    one, other = SHAPES[case.family]
    simulator = case.simulator(UNITS)
    simulator.trace(other)
    assert simulator.trace(one) == case.simulator(UNITS).trace(one)


def test_nothing_is_left_out_of_a_trace_of_all_layers() -> None:
    trace = TEXT.simulator(WHOLE).trace(Shape(2, 300, 0))
    out = unroll(trace)
    assert out.timeline == trace.timeline
    assert [copy.source for copy in out.copies] == list(range(len(trace.storages)))


# From configurations to forms.



@pytest.fixture
def make(plain_key: FormKey, tmp_path: Path) -> Callable[..., Traced]:
    """Makes the form of LLaVA with a small tower and Llama; the configurations and the key may differ from the usual."""
    llava = replace(
        plain_key,
        projector="mlp2x_gelu",
        vision_feature_layer=-2,
        vision_feature_select="patch",
        trained=("projector", "language", "head"),
        frozen=("vision",),
        loss="chunked",
        checkpointing="blocks",
        one_sample=True,
        images=1,
    )

    def run(tower: dict[str, Any] | None = None, language: dict[str, Any] | None = None, **more: Any) -> Traced:
        folders = {}
        for name, config in {"vision": {**TOWER, **(tower or {})}, "language": {**LLAMA, **(language or {})}}.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text(json.dumps(config))
            folders[name] = str(tmp_path / name)
        return make_form(replace(llava, **folders, **more))

    return run


def test_a_form_is_made_and_checked(make: Callable[..., Traced]) -> None:
    found = make()
    assert found.form is not None
    assert found.image_tokens == IMAGE_TOKENS
    assert found.how == "closed form of 2 traces, checked on one more shape and depth"


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 5, 12])
def test_any_number_of_layers_has_a_form(make: Callable[..., Traced], layers: int) -> None:
    found = make({"num_hidden_layers": layers}, {"num_hidden_layers": layers})
    assert found.form is not None, found.how
    names = {parameter.name for parameter in found.form.parameters if parameter.name.endswith("q_proj.weight")}
    assert len(names) == 2 * layers


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["identity", "mlp3x_gelu"])
def test_any_projector_has_a_form(make: Callable[..., Traced], projector: str) -> None:
    trained = ("language", "head") if projector == "identity" else ("projector", "language", "head")
    found = make(projector=projector, trained=trained)
    assert found.form is not None, found.how
    weights = [p for p in found.form.parameters if p.part == "projector" and len(p.shape) == 2]
    assert len(weights) == {"identity": 0, "mlp3x_gelu": 3}[projector]


@pytest.mark.slow
@pytest.mark.parametrize("layer", [-1, -5])
def test_any_layer_of_the_tower_can_be_the_feature(make: Callable[..., Traced], layer: int) -> None:
    """Where the repetition breaks at that layer, there is no form, and the model is traced with all of its layers."""
    found = make(vision_feature_layer=layer)
    if found.form is None:
        assert found.how.startswith("no closed form: ")
        assert make(vision_feature_layer=layer, shape=(1, 300, 1)).form is not None


@pytest.mark.parametrize("layer", [-100, 8, 100])
def test_a_layer_that_the_tower_lacks_is_a_mistake(make: Callable[..., Traced], layer: int) -> None:
    assert make(vision_feature_layer=layer).form is None
    with pytest.raises(UserError, match="cannot be traced"):
        make(vision_feature_layer=layer, shape=(1, 300, 1))


@pytest.mark.slow
def test_no_image_has_a_form_though_the_projector_gets_no_gradient(make: Callable[..., Traced]) -> None:
    found = make(images=0)
    assert found.form is not None, found.how


@pytest.mark.slow
def test_a_trace_of_few_layers_at_a_shape_is_that_of_all(make: Callable[..., Traced]) -> None:
    shape = Shape(1, 304, 1)
    few, whole = (make(shape=tuple(shape), periodic=periodic).form for periodic in (True, False))
    assert few is not None
    assert whole is not None
    assert few.timeline == whole.timeline
    assert list(storages(few, shape)) == list(storages(whole, shape))


WEIRD: dict[str, dict[str, Any]] = {
    "layers in quotes": {"num_hidden_layers": "7"},
    "heads that do not divide": {"hidden_size": 63},
    "key heads that do not divide": {"num_key_value_heads": 3},
    "an unknown activation": {"hidden_act": "gelu_of_next_year"},
    "an unknown rotary embedding": {"rope_scaling": {"rope_type": "next_year", "factor": 2.0}},
    "an unknown dtype": {"dtype": "float99"},
    "an unknown model": {"model_type": "llama_of_next_year"},
    "a model that generates no text": {"model_type": "vit"},
}



@pytest.mark.parametrize("name", WEIRD)
def test_a_configuration_that_cannot_be_is_the_user_s_to_mend(make: Callable[..., Traced], name: str) -> None:
    with pytest.raises(UserError):
        make(language=WEIRD[name], shape=(1, 300, 1))


def test_weights_that_are_quantized_are_refused_or_named(make: Callable[..., Traced]) -> None:
    """A model in 4 bits is not what a plan of 16 bits says."""
    with pytest.raises(UserError, match="quantiz"):
        make(language={"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
