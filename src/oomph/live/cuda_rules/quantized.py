"""Hidden allocations of bitsandbytes' operators, by name: the package is an extra, and its operators exist once it is imported.

From bitsandbytes 0.50.2: ``backends/cuda/ops.py`` for kernels on CUDA, ``backends/default/ops.py`` for operators that are
made of others on every device.
"""

from __future__ import annotations

from typing import Any

import torch

from oomph.core.quantized_sizes import BFLOAT16, FLOAT16, FLOAT32, dequantized_scales, dequantized_weight
from oomph.live.cuda_rules.program import Arguments, Device, Extra, Program, Rule, sized
from oomph.live.cuda_rules.sizes import shape_of

_PRECISIONS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}

Outputs = tuple[torch.Tensor, ...]


def gemm_4bit(device: Device, call: Arguments, outputs: Outputs) -> Program:
    """``_dequant_linear_fallback``: scales of double quantisation and the weight come before the product.

    The fused kernel reads packed weights instead, and copies strided inputs (``_gemm_4bit_kernel_impl``), as ``F.linear`` does.
    """
    tensor = call["A"]
    width = int(tensor.shape[-1])
    extents = tensor.numel() // width, *(int(extent) for extent in call["shapeB"])
    numbers = device.sm, device.multiprocessor_count, _PRECISIONS[tensor.dtype], *extents, call["blocksize"]
    before: tuple[Extra, ...] = ()
    if call["absmax_8bit"] is not None:
        before = tuple(sized(name, dequantized_scales, *numbers) for name in ("absmax_dq", "absmax"))
    before += (sized("B_dq", dequantized_weight, *numbers),)
    if not tensor.is_contiguous():
        before += (Extra(shape_of(tensor), tensor.dtype, "A"),)
    return Program(before)


def int8_vectorwise_quant(device: Device, call: Arguments, outputs: Outputs) -> Program | None:
    """``int8_vectorwise_quant``: magnitudes and which are above the threshold, as large as the input; whether any is.

    None is taken to be: its column would be copied in 16 bits, here and in the product.
    """
    if not call["threshold"]:
        return None
    shape = shape_of(call["A"])
    magnitudes, outliers = Extra(shape, call["A"].dtype, "abs"), Extra(shape, torch.bool, "outliers")
    return Program(after=(magnitudes, outliers, 0, Extra((), torch.bool, "any"), 2, Extra((), torch.int8, "value")))


def int8_mixed_scaled_mm(device: Device, call: Arguments, outputs: Outputs) -> Program:
    """``int8_scaled_mm`` and ``int8_mm_dequant``: the product in int32, then the result in fp16, which may be cast."""
    result = outputs[0]
    before: tuple[Extra, ...] = (Extra(shape_of(result), torch.int32, "out_i32"),)
    if result.dtype != torch.float16:
        before += (Extra(shape_of(result), torch.float16, "out"),)
    return Program(before)


_RULES: dict[str, Rule] = {
    "bitsandbytes.gemm_4bit.default": gemm_4bit,
    "bitsandbytes.int8_vectorwise_quant.default": int8_vectorwise_quant,
    "bitsandbytes.int8_mixed_scaled_mm.default": int8_mixed_scaled_mm,
}
_OUTPUTS_ONLY = ("bitsandbytes.dequantize_4bit.default", "bitsandbytes.dequantize_blockwise.default")


def rule_of(func: Any) -> Rule | None:
    """The rule of one of bitsandbytes' operators; none for those that allocate their outputs alone, and all others."""
    return _RULES.get(str(func)) if func.namespace == "bitsandbytes" else None


def is_classified(func: Any) -> bool:
    """Whether it is an operator of bitsandbytes that was looked at."""
    return str(func) in _RULES or str(func) in _OUTPUTS_ONLY


def multiplies(func: Any) -> bool:
    """Whether the operator multiplies through cuBLAS as ``linear`` does, with a bias or without.

    The fused kernel does not. The next product after it does, so that the library's workspace comes a moment later then.
    """
    return func.namespace == "bitsandbytes" and str(func) == "bitsandbytes.gemm_4bit.default"
