"""Weights of 4 and 8 bits: which layers hold them, what they hold, how they come onto the GPU, and what a step asks for."""

from __future__ import annotations

import copy
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit as Linear4bitOfBitsandbytes
from bitsandbytes.nn.modules import Linear8bitLt as Linear8bitOfBitsandbytes
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from transformers import LlamaConfig, MixtralConfig, PreTrainedModel, Qwen2Config

from oomph.core.allocator import Allocator, replay
from oomph.core.closed_form import ClosedForm
from oomph.core.forms import FormKey
from oomph.core.layout import Shape, compose
from oomph.core.predict import leaves_out
from oomph.core.pretrained import Workers, from_pretrained, interleavings
from oomph.core.quantized_sizes import NO_OUTLIERS
from oomph.core.trace import Trace
from oomph.errors import UserError
from oomph.live.adapters import add_adapters
from oomph.live.cuda_rules import CudaRules, Device
from oomph.live.cuda_rules.program import Program
from oomph.live.cuda_rules.quantized import is_classified, rule_of
from oomph.live.model import build, to_fake
from oomph.live.quantization import HeldWeight, arrival, quantize, quantized_layers
from oomph.live.simulate import Setup, Simulator, fake_mode
from oomph.live.source import make_form
from oomph.recipe.schema import Lora, Quantization
from oomph.records import Choice, Quantized

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
LORA = Lora(rank=8)


def llama(layers: int = 7, dtype: torch.dtype = torch.bfloat16, kind: Any = LlamaConfig, **more: Any) -> PreTrainedModel:
    return build(kind(**{**SIZES, "num_hidden_layers": layers, "tie_word_embeddings": False, **more}), dtype, "sdpa")


def frozen(name: str) -> bool:
    return False


def quantized(kind: Quantized, model: PreTrainedModel | None = None, **more: Any) -> PreTrainedModel:
    made = model or llama(2)
    quantize(made, Quantization(kind=kind, **more), frozen)
    return made


def names(model: PreTrainedModel) -> set[str]:
    layers = {id(layer) for layer in quantized_layers(model)}
    return {name for name, module in model.named_modules() if id(module) in layers}


class TestLayers:
    def test_linear_layers_become_those_of_bitsandbytes(self) -> None:
        model = quantized("nf4")
        assert len(names(model)) == 2 * 7
        layer = model.model.layers[0].mlp.down_proj
        assert type(layer) is Linear4bitOfBitsandbytes
        assert layer.compute_dtype == torch.bfloat16
        assert layer.weight.shape == (256 * 512 // 2, 1)
        assert layer.weight.dtype == torch.uint8
        assert type(quantized("int8").model.layers[0].mlp.down_proj) is Linear8bitOfBitsandbytes

    def test_the_head_stays_as_it_is(self) -> None:
        assert type(quantized("nf4").lm_head) is torch.nn.Linear
        assert type(quantized("int8", llama(2, tie_word_embeddings=True)).lm_head) is torch.nn.Linear

    def test_skipped_layers_stay_as_they_are(self) -> None:
        assert {name.rpartition(".")[2] for name in names(quantized("nf4", skip=["mlp", "v_proj"]))} == {
            "q_proj",
            "k_proj",
            "o_proj",
        }

    def test_layers_that_train_stay_as_they_are(self) -> None:
        model = llama(2)
        quantize(model, Quantization(kind="nf4"), lambda name: "layers.1." in name)
        assert all(".0." in name for name in names(model))

    def test_a_layer_whose_name_is_the_end_of_another_is_told_apart(self) -> None:
        model = llama(12)
        quantize(model, Quantization(kind="nf4"), lambda name: name.startswith("model.layers.1."))
        assert not any(".1." in name for name in names(model))
        assert any(".11." in name for name in names(model))

    def test_the_section_may_be_json(self) -> None:
        model = llama(2)
        quantize(model, json.dumps({"kind": "int8"}), frozen)
        assert names(model)

    def test_experts_in_one_tensor_stay_as_they_are(self) -> None:
        config: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = quantized("nf4", llama(2, kind=MixtralConfig, **config), upcast=False)
        experts = model.model.layers[0].mlp.experts
        assert experts.gate_up_proj.dtype == torch.bfloat16
        assert not any("experts" in name for name in names(model))
        upcast = quantized("nf4", llama(2, kind=MixtralConfig, **config))
        assert upcast.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32

    def test_peft_finds_the_layers(self) -> None:
        wrappers: dict[Quantized, type] = {"nf4": Linear4bit, "int8": Linear8bitLt}
        for kind, wrapper in wrappers.items():
            model = quantized(kind)
            add_adapters(model, LORA)
            layer: Any = model.model.layers[0].self_attn.q_proj
            assert isinstance(layer, Linear4bit | Linear8bitLt)
            assert layer.__class__ is wrapper
            assert layer.lora_A["default"].weight.dtype == torch.float32


class TestRefusals:
    def test_what_trains_whole_has_nothing_to_quantize(self) -> None:
        with pytest.raises(UserError, match="cannot train"):
            quantize(llama(2), Quantization(kind="nf4"), lambda name: True)

    def test_what_is_skipped_whole_has_nothing_to_quantize(self) -> None:
        with pytest.raises(UserError, match="no layer to quantize"):
            quantized("nf4", skip=["proj"])

    def test_a_missing_package_is_named_with_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = importlib.import_module

        def missing(name: str, package: str | None = None) -> Any:
            if name == "bitsandbytes":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", missing)
        with pytest.raises(UserError, match="bitsandbytes") as caught:
            quantized("nf4")
        assert "oomph[quantized]" in str(caught.value.hint)


class TestWeights:
    @pytest.mark.parametrize("double", [False, True])
    def test_scales_of_nf4(self, double: bool) -> None:
        weight = quantized("nf4", double_quantization=double).model.layers[0].self_attn.q_proj.weight
        state, scales = weight.quant_state, 256 * 256 // 64
        assert state.absmax.shape == (scales,)
        assert state.absmax.dtype == (torch.uint8 if double else torch.float32)
        if double:
            assert state.state2.absmax.shape == (scales // 256,)
            assert state.offset.shape == ()

    def test_each_weight_of_double_quantization_has_a_copy_of_one_map(self) -> None:
        layers = quantized_layers(quantized("nf4", double_quantization=True))
        assert len({id(layer.weight.map) for layer in layers}) == 1
        assert len({id(layer.weight.quant_state.state2.code) for layer in layers}) == len(layers)
        assert "dynamic" not in bnb.functional.name2qmap or bnb.functional.name2qmap["dynamic"].device.type != "meta"

    def test_scales_of_int8(self) -> None:
        weight = quantized("int8").model.layers[0].mlp.down_proj.weight
        assert weight.dtype == torch.int8
        assert weight.SCB.shape == (256,)
        assert weight.CB is weight

    def test_upcast_is_that_of_peft(self) -> None:
        def kept(model: PreTrainedModel) -> set[torch.dtype]:
            return {p.dtype for p in model.parameters() if p.dtype not in (torch.uint8, torch.int8)}

        assert kept(quantized("nf4", llama(2, torch.float16))) == {torch.float32}
        assert kept(quantized("nf4", llama(2, torch.float16), upcast=False)) == {torch.float16}

    def test_biases_have_the_models_precision(self) -> None:
        model = quantized("nf4", llama(2, torch.float16, Qwen2Config), upcast=False)
        assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.float16

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_copies_and_fakes_carry_the_attributes(self, kind: Quantized) -> None:
        model = quantized(kind, double_quantization=kind == "nf4")
        twin = copy.deepcopy(model)
        weight, other = (m.model.layers[0].self_attn.q_proj.weight for m in (model, twin))
        assert isinstance(other, HeldWeight)
        assert vars(weight).keys() == vars(other).keys()
        assert other is not weight
        to_fake(model, fake_mode()[0])
        fake = model.model.layers[0].self_attn.q_proj.weight
        parts = (fake.quant_state.absmax, fake.quant_state.state2.code) if kind == "nf4" else (fake.SCB, fake.CB)
        assert all(type(part).__name__ == "FakeTensor" for part in parts)
        assert kind == "nf4" or fake.CB is fake


class TestArrival:
    def test_what_a_weight_of_nf4_brings(self) -> None:
        layer = quantized("nf4").model.layers[0].mlp.down_proj
        found = arrival(layer, "weight")
        assert found is not None
        assert found.transients == (((256, 512), torch.bfloat16),)
        assert [math.prod(t.shape) * t.element_size() for t in found.held] == [256 * 512 // 64 * 4, 256 * 512 // 2, 64]
        assert arrival(layer, "bias") is None

    def test_what_a_weight_of_double_quantization_brings(self) -> None:
        found = arrival(quantized("nf4", double_quantization=True).model.layers[0].mlp.down_proj, "weight")
        assert found is not None
        scales = 256 * 512 // 64
        transients = [math.prod(shape) * dtype.itemsize for shape, dtype in found.transients]
        assert transients == [256 * 512 * 2, scales * 4, scales * 4]
        held = [math.prod(t.shape) * t.element_size() for t in found.held]
        assert held == [256 * 512 // 2, 64, 4, 1024, scales // 256 * 4, scales, 1024]

    def test_what_a_weight_of_int8_brings(self) -> None:
        found = arrival(quantized("int8").model.layers[0].mlp.down_proj, "weight")
        assert found is not None
        assert found.transients == (((256, 512), torch.float16),)
        assert [t.dtype for t in found.held] == [torch.float32, torch.int8]

    def test_other_parameters_come_as_they_are(self) -> None:
        assert arrival(torch.nn.Linear(2, 2), "weight") is None


def program(op: Any, device: Device, *args: Any, **kwargs: Any) -> Program | None:
    with fake_mode()[0]:
        return CudaRules(device, "sdpa").program(op, args, kwargs, kwargs.pop("outputs", ()))


class TestRules:
    A100 = Device((8, 0))

    def packed(self, outputs: int, inputs: int) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        return torch.empty(outputs * inputs // 2, 1, dtype=torch.uint8), [outputs, inputs], torch.empty(outputs * inputs // 64)

    @pytest.mark.parametrize(("rows", "bytes_"), [(4, 0), (1536, 0), (1537, 2048 * 512 * 2)])
    def test_gemm_4bit_makes_the_weight_for_many_rows(self, rows: int, bytes_: int) -> None:
        inputs = torch.empty(1, rows, 512, dtype=torch.bfloat16)
        found = program(torch.ops.bitsandbytes.gemm_4bit.default, self.A100, inputs, *self.packed(2048, 512), 64, "nf4")
        assert found is not None
        assert [(extra.name, extra.bytes) for extra in found.before] == [("B_dq", bytes_)]
        assert not found.after

    def test_gemm_4bit_restores_the_scales_of_double_quantization(self) -> None:
        inputs, (weight, shape, scales) = torch.empty(4096, 512, dtype=torch.bfloat16), self.packed(2048, 512)
        nested = {
            "absmax_8bit": scales.to(torch.uint8),
            "absmax_code": torch.empty(256),
            "absmax_offset": torch.empty(()),
        }
        args = inputs, weight, shape, torch.empty(64), 64, "nf4"
        found = program(torch.ops.bitsandbytes.gemm_4bit.default, self.A100, *args, **nested)
        assert found is not None
        assert [extra.name for extra in found.before] == ["absmax_dq", "absmax", "B_dq"]
        assert [extra.bytes for extra in found.before[:2]] == [2048 * 512 // 64 * 4] * 2

    def test_gemm_4bit_takes_the_workspaces_of_a_linear_layer(self) -> None:
        rules = CudaRules(Device((7, 5), unified_workspaces=False), "sdpa")
        inputs, bias = torch.empty(9, 512, dtype=torch.float16), torch.empty(2048, dtype=torch.float16)
        op, args = torch.ops.bitsandbytes.gemm_4bit.default, (inputs, *self.packed(2048, 512), 64, "nf4")
        assert [key for key, _ in rules.workspaces(op, args, {})] == ["cublas"]
        assert [key for key, _ in rules.workspaces(op, args, {"bias": bias})] == ["cublas", "cublaslt"]
        assert [key for key, _ in rules.workspaces(op, (*args, bias), {})] == ["cublas", "cublaslt"]

    def test_int8_quantization_looks_for_outliers(self) -> None:
        inputs = torch.empty(100, 64, dtype=torch.float16)
        op = torch.ops.bitsandbytes.int8_vectorwise_quant.default
        found = program(op, self.A100, inputs, 6.0)
        assert found is not None
        assert found.peak_bytes == 100 * 64 * 2 + 100 * 64
        assert program(op, self.A100, inputs, 0.0) is None

    @pytest.mark.parametrize(("dtype", "copies"), [(torch.float16, 0), (torch.bfloat16, 1)])
    def test_int8_products_are_in_32_bits_first(self, dtype: torch.dtype, copies: int) -> None:
        inputs, codes = torch.empty(100, 64, dtype=dtype), torch.empty(100, 64, dtype=torch.int8)
        weight = torch.empty(32, 64, dtype=torch.int8)
        op = torch.ops.bitsandbytes.int8_mixed_scaled_mm.default
        outputs = torch.empty(100, 32, dtype=dtype), torch.empty(0, dtype=dtype)
        args = inputs, codes, weight, torch.empty(100), torch.empty(32)
        found = CudaRules(self.A100, "sdpa").program(op, args, {}, outputs)
        assert found is not None
        assert found.peak_bytes == 100 * 32 * (4 + 2 * copies)

    def test_operators_that_were_looked_at(self) -> None:
        assert is_classified(torch.ops.bitsandbytes.dequantize_4bit.default)
        assert rule_of(torch.ops.bitsandbytes.dequantize_4bit.default) is None
        assert not is_classified(torch.ops.bitsandbytes.gemv_4bit.default)


@pytest.fixture(scope="module")
def form_of(plain_key: FormKey, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Quantized], ClosedForm]:
    """Forms of small models with adapters and checkpointing by the kind of their weights, made once."""
    made: dict[Quantized, ClosedForm] = {}

    def form(kind: Quantized) -> ClosedForm:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            Qwen2Config(**{**SIZES, "num_hidden_layers": 7, "tie_word_embeddings": False}).save_pretrained(folder)
            section = Quantization(kind=kind).model_dump_json()
            rules: dict[str, Any] = {"trained": ("lora",), "frozen": ("language", "head"), "precision": "float16"}
            key = replace(plain_key, model=str(folder), lora=LORA.model_dump_json(), quantization=section, **rules)
            traced = make_form(replace(key, checkpointing="blocks", optimizer="adamw-foreach"))
            assert traced.form is not None, traced.how
            made[kind] = traced.form
        return made[kind]

    return form


def direct(kind: Quantized, shape: tuple[int, int, int]) -> Trace:
    """The trace of the same model, whole, at one shape."""
    model = llama(7, torch.float16, Qwen2Config)
    quantized(kind, model)
    add_adapters(model, LORA)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    setup = Setup("sdpa", "full", "adamw-foreach", "blocks", "none", (8, 0), precision="float16")
    return Simulator(model, setup, 1 << 20, None).trace(Shape(*shape))


def test_a_form_holds_where_the_weight_is_made_and_where_it_is_not(form_of: Callable[[Quantized], ClosedForm]) -> None:
    shape = (2, 11, 0)
    form, trace = form_of("nf4"), direct("nf4", shape)
    assert form.timeline == trace.timeline
    sizes = form.sizes(shape)
    assert [int(sizes[number]) for number in form.formula] == [storage.nbytes for storage in trace.storages]
    made = {storage.nbytes for storage in trace.storages if storage.kind.op.endswith(":B_dq")}
    assert 0 in made
    assert all(0 < n for n in map(int, form.sizes((3, 1024, 0))[_numbers(form, ":B_dq")]))


def _numbers(form: ClosedForm, op: str) -> list[int]:
    """The formulas of an operator's storages."""
    return sorted({f for f, kind in zip(form.formula, form.kind, strict=True) if form.kinds[kind].op.endswith(op)})


def test_biases_change_their_precision_once(form_of: Callable[[Quantized], ClosedForm]) -> None:
    form = form_of("nf4")
    events = compose(form, Shape(2, 64, 0), 2, None)
    biases = [s for s, kind in enumerate(events.kinds) if kind.op == "load" and kind.module.endswith("q_proj.base_layer")]
    freed = [entry for segment in events.segments for entry in segment.timeline if entry < 0 and ~entry in biases]
    assert len(freed) == len(set(freed)) == 7
    assert replay(events.sizes, events.segments, Allocator()).failure is None


def test_int8_layers_keep_their_inputs_past_a_checkpoint(form_of: Callable[[Quantized], ClosedForm]) -> None:
    """``MatMul8bitLt`` keeps them on its context, where checkpointing does not see them."""
    peaks = {}
    for kind in ("nf4", "int8"):
        events = compose(form_of(kind), Shape(4, 1024, 0), 1, None)
        peaks[kind] = replay(events.sizes, events.segments, Allocator()).peak_allocated
    assert peaks["int8"] > peaks["nf4"] + 7 * 4 * 1024 * (2 * 256 + 512) * 2


def test_outliers_are_left_out_in_words(form_of: Callable[[Quantized], ClosedForm]) -> None:
    assert NO_OUTLIERS not in leaves_out(_choice(), ())
    form = form_of("int8")
    assert any(kind.op.startswith("bitsandbytes.int8_mixed_scaled_mm") for kind in form.kinds)


def _choice() -> Choice:
    return Choice(1, 1, 1)


class TestPretrained:
    @pytest.mark.parametrize("workers", [Workers(0), Workers(), Workers(1), *interleavings()[::3]])
    def test_every_order_ends_with_the_same_tensors(self, form_of: Callable[[Quantized], ClosedForm], workers: Workers) -> None:
        events = compose(form_of("nf4"), Shape(2, 64, 0), 1, None)
        loaded = from_pretrained(events, workers)
        alive: list[set[int]] = []
        for made in (events, loaded):
            live: set[int] = set()
            for entry in made.segments[0].timeline:
                if entry >= 0:
                    assert entry not in live
                    live.add(entry)
                else:
                    live.remove(~entry)
            alive.append(live)
        assert alive[0] == alive[1]
        assert replay(loaded.sizes, loaded.segments, Allocator()).failure is None

    def test_workers_run_ahead_and_the_main_thread_alone_does_not(self, form_of: Callable[[Quantized], ClosedForm]) -> None:
        events = compose(form_of("nf4"), Shape(2, 64, 0), 1, None)

        def most(workers: Workers) -> int:
            loaded, live, peak = from_pretrained(events, workers), 0, 0
            for entry in loaded.segments[0].timeline:
                if loaded.kinds[max(entry, ~entry)].op == "load:source" and loaded.kinds[max(entry, ~entry)].dtype == "float16":
                    live += 1 if entry >= 0 else -1
                    peak = max(peak, live)
            return peak

        kept = most(Workers(0))
        assert kept < most(Workers(2)) <= most(Workers(4)) < most(Workers(4, delay=1e9))

    def test_keys_come_in_natural_order(self, form_of: Callable[[Quantized], ClosedForm]) -> None:
        loaded = from_pretrained(compose(form_of("nf4"), Shape(2, 64, 0), 1, None), Workers(0))
        sources = [s for s in loaded.segments[0].timeline if s >= 0 and loaded.kinds[s].op == "load:source"]
        modules = [loaded.module(s).replace(".base_layer", "") for s in sources]
        assert modules[:2] == ["lm_head", "model.embed_tokens"]
        assert modules[2:4] == ["model.layers.0.input_layernorm", "model.layers.0.mlp.down_proj"]
        assert modules[-1] == "model.norm"
