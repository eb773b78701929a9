"""Frozen weights in 4 or 8 bits: bitsandbytes' own layers on the meta device, and its own code on fake tensors.

Checked with bitsandbytes 0.50.2, transformers 5.23 and PEFT 0.20. `quantize` exchanges layers as transformers does
(``integrations/bitsandbytes.py``, ``replace_with_bnb_linear``) and quantizes the weights with bitsandbytes' functions, which
work on the meta device. Only ``nn.Linear`` is exchanged: experts that one tensor holds stay as they are. PEFT finds the
layers by their class, so adapters have to come afterwards.

A weight is a `HeldWeight`, since ``Params4bit`` and ``Int8Params`` are tensor classes that a fake tensor cannot be of. It has
the attributes that bitsandbytes and PEFT ask for.

What `quantized_run` answers where bitsandbytes' code asks for what a tensor on a GPU would answer otherwise:

* ``matmul`` (``autograd/_functions.py``) takes ``MatMul8bitFp`` for training on a CPU: the GPU's ``MatMul8bitLt`` stands there.
* ``Linear4bit.forward`` (``nn/modules.py``) repacks weights for CPUs with AVX-512 when it evaluates: the layers say there is
  none.
* ``int8_vectorwise_quant`` looks for columns of the input with values above the threshold (``backends/cuda/ops.py``): it finds
  none, and ``int8_mixed_scaled_mm`` (``backends/default/ops.py``) then has none to multiply in 16 bits.
* ``MatMul8bitLt`` says at each call that it casts bfloat16 to float16: it says so to nobody.
"""

from __future__ import annotations

import copy
import importlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from oomph.errors import UserError
from oomph.live.fake import really_run
from oomph.recipe.schema import Quantization

_SETTINGS = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
THRESHOLD = 6.0
"""Inputs of int8 layers from which on a column counts as an outlier (transformers, ``llm_int8_threshold``)."""


class HeldWeight(nn.Parameter):
    """A quantized weight on the meta device, with the attributes of bitsandbytes' parameter that it stands for."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldWeight:
        if id(self) not in memo:
            memo[id(self)] = other = HeldWeight(self.data.clone(), requires_grad=False)
            self.carry(other, lambda tensor: copy.deepcopy(tensor, memo))
        return memo[id(self)]  # type: ignore[no-any-return]

    def carry(self, other: Tensor, remake: Callable[[Tensor], Tensor]) -> None:
        """Gives another parameter these attributes, their tensors remade."""

        def remade(value: Any) -> Any:
            if isinstance(value, Tensor):
                return other if value is self else remake(value)
            if hasattr(value, "absmax"):
                parts = {name: remade(part) for name, part in vars(value).items() if name != "nested"}
                return type(value)(**parts)
            return value

        for name, value in vars(self).items():
            setattr(other, name, remade(value))


class Arrival(NamedTuple):
    """What the allocation of a weight on the GPU is: what is there meanwhile, then what stays, in the order of allocation.

    Attributes:
        transients: shape and dtype of each tensor that is freed once the weight is there.
        held: the weight's tensors.
    """

    transients: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    held: tuple[Tensor, ...]


def quantize(model: PreTrainedModel, section: Quantization | str, trains: Callable[[str], bool]) -> None:
    """Quantizes the weights of a model's linear layers, in place, on the meta device.

    Left out are: the head and tied weights, as transformers leaves them out (``get_keys_to_not_convert``); modules that the
    model's class keeps in float32; those with a part of `section.skip` in their names; and those whose weight trains. With
    `section.upcast`, PEFT's ``prepare_model_for_kbit_training`` turns all other 16-bit weights into float32.

    Args:
        model: on the meta device, without adapters.
        section: the stage's ``quantization``, or its JSON.
        trains: whether the parameter of a name trains.

    Raises:
        UserError: bitsandbytes or PEFT is not installed, or no layer is left to quantize.
    """
    if isinstance(section, str):
        section = Quantization.model_validate_json(section)
    bnb = _imported("bitsandbytes")
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    left_out = _left_out(model, section, trains, layers)
    if not set(layers) - set(left_out):
        raise UserError(*_nothing(layers, trains))
    _exchange(model, section, left_out)
    with mock.patch.dict(bnb.functional.name2qmap, clear=True):
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
                _quantize_weight(bnb, module)
    setattr(model, "is_loaded_in_4bit" if section.kind == "nf4" else "is_loaded_in_8bit", True)
    if section.upcast:
        _imported("peft").prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _imported(name: str) -> Any:
    try:
        return really_run(importlib.import_module, (name,), {})
    except ModuleNotFoundError as missing:
        if missing.name != name:
            raise
        raise UserError(f"quantized weights need {name}, which is not installed", 'pip install "oomph[quantized]"') from None


def _nothing(layers: Sequence[str], trains: Callable[[str], bool]) -> tuple[str, str]:
    if any(trains(f"{name}.weight") for name in layers):
        hint = "freeze the language model and train adapters (a section lora, and `lora` among what trains)"
        return "quantized weights cannot train, and the layers that could be quantized all train", hint
    return "quantization has no layer to quantize", "leave the section out, or skip less"


def _left_out(
    model: PreTrainedModel, section: Quantization, trains: Callable[[str], bool], layers: Sequence[str]
) -> list[str]:
    from transformers.quantizers.quantizers_utils import should_convert_module

    own = HfQuantizer.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
    return [
        name
        for name in layers
        if not should_convert_module(name, own) or any(part in name for part in section.skip) or trains(f"{name}.weight")
    ]


def _exchange(model: PreTrainedModel, section: Quantization, left_out: Sequence[str]) -> None:
    """Puts bitsandbytes' layers in the place of the others, biases in the model's precision."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    dtype = model.dtype
    config = BitsAndBytesConfig(
        load_in_4bit=section.kind == "nf4",
        load_in_8bit=section.kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=section.double_quantization,
        llm_int8_threshold=THRESHOLD,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        replace_with_bnb_linear(model, [f"{re.escape(name)}$" for name in left_out], config)
    finally:
        torch.set_default_dtype(default)


def _quantize_weight(bnb: Any, module: Any) -> None:
    """Runs bitsandbytes' quantization on the meta device, as ``Params4bit._quantize`` and ``Int8Params._quantize`` do."""
    source = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        settings = {name: getattr(source, name) for name in _SETTINGS}
        packed, state = bnb.functional.quantize_4bit(source.data, **settings)
        weight = HeldWeight(packed, requires_grad=False)
        attributes = {**settings, "quant_state": state, "bnb_quantized": True, "map": bnb.functional.name2qmap.get("dynamic")}
        module.support_avx512bf16_for_cpu = False
    else:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(source.data.to(torch.float16))
        weight = HeldWeight(codes, requires_grad=False)
        attributes = {"CB": weight, "SCB": scales, "has_fp16_weights": False}
    vars(weight).update(attributes)
    module.weight = weight


def quantized_layers(model: nn.Module) -> list[Any]:
    """The layers of bitsandbytes in the model, whose weights are quantized."""
    return [module for module in model.modules() if _kind(module)]


def _kind(module: nn.Module) -> str:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is not None:
        return "nf4"
    return "int8" if hasattr(getattr(module, "state", None), "has_fp16_weights") else ""


def arrival(module: nn.Module, name: str) -> Arrival | None:
    """How a module's parameter comes onto the GPU, where it is a quantized weight; none for all others.

    The loader takes one weight at a time: it brings the 16-bit weight to the GPU, quantizes it, and drops it. The order is
    that of ``quantize_4bit`` (``bitsandbytes/functional.py`` and ``backends/cuda/ops.py``): scales, packed weights, the 16
    values of a code; with double quantisation then the scales' mean, their scales, their codes, and a copy of the 256 values
    of a byte, which the process holds once more. ``int8_vectorwise_quant`` makes the scales of rows, then the codes.
    """
    kind = _kind(module) if name == "weight" else ""
    if not kind:
        return None
    layer: Any = module
    weight = layer.weight
    if kind == "int8":
        row_scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return Arrival(((tuple(weight.shape), torch.float16),), (row_scales, weight))
    state = weight.quant_state
    source = (tuple(state.shape), state.dtype)
    if not state.nested:
        return Arrival((source,), (state.absmax, weight, state.code))
    scales = (tuple(state.absmax.shape), torch.float32)
    nested = (state.offset, weight.map, state.state2.absmax, state.absmax, state.state2.code)
    return Arrival((source, scales, scales), (weight, state.code, *nested))


class _NoOutliers(TorchDispatchMode):
    """Answers int8 operators whose results have as many columns as there are outliers: none. Enter it inside the fake mode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        ops = torch.ops.bitsandbytes
        self._quantize, self._multiply = ops.int8_vectorwise_quant.default, ops.int8_mixed_scaled_mm.default

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator."""
        if func is self._quantize:
            rows = args[0].numel() // args[0].shape[-1]
            scales = args[0].new_empty(rows, dtype=torch.float32)
            return args[0].new_empty(args[0].shape, dtype=torch.int8), scales, args[0].new_empty(0, dtype=torch.long)
        if func is self._multiply:
            inputs, codes, weight, *_ = args
            return inputs.new_empty((*codes.shape[:-1], weight.shape[0])), inputs.new_empty(0)
        return func(*args, **(kwargs or {}))


@contextmanager
def quantized_run(model: nn.Module) -> Iterator[None]:
    """The layers of bitsandbytes of the model run as on a GPU in the block, which is inside the fake mode.

    What the first forward leaves in the layers is taken back at the end: biases in another precision, scales that moved.
    """
    layers = quantized_layers(model)
    if not layers:
        yield
        return
    functions: Any = importlib.import_module("bitsandbytes.autograd._functions")
    biases = [(layer.bias, layer.bias.dtype) for layer in layers if layer.bias is not None]
    _renew(biases)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(functions, "MatMul8bitFp", functions.MatMul8bitLt))
        stack.enter_context(mock.patch.object(functions.logger, "level", logging.ERROR))
        stack.enter_context(_NoOutliers())
        yield
    _renew(biases)


def _renew(biases: Sequence[tuple[Tensor, torch.dtype]]) -> None:
    """Gives biases their precision, and storages that nothing else holds, so that they go when the first forward casts them."""
    for bias, dtype in biases:
        bias.data = torch.empty_like(bias, dtype=dtype)
