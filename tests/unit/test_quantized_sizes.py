"""Which products with 4-bit weights are fused, against bitsandbytes' own decision, and the bytes that follow from it."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oomph.core.kernel_sizes import SIZES
from oomph.core.quantized_sizes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    MOST_FUSED_ROWS,
    dequantized_scales,
    dequantized_weight,
    is_fused,
)

DTYPES = {FLOAT32: torch.float32, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}
CARDS = [(70, 80), (75, 40), (80, 108), (86, 84), (87, 16), (89, 58), (89, 142), (90, 132), (100, 148), (103, 148), (110, 20)]
CARDS += [(120, 170), (120, 36), (121, 48)]


@functools.cache
def theirs() -> Callable[[int, int, torch.dtype, int, int, int], bool]:
    """``_gemm_4bit_use_custom_cuda``, taken out of its module, which cannot be imported without a GPU."""
    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "backends" / "cuda" / "ops.py").read_text(encoding="utf-8")
    wanted = "_gemm_4bit_use_custom_cuda"
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == wanted)
    function.decorator_list = []
    module = ast.fix_missing_locations(ast.Module([function], []))
    namespace: dict[str, Any] = {"torch": torch, "_GEMM_4BIT_CUSTOM_FLOOR_M": 4}
    card = SimpleNamespace(sm=0, multiprocessors=0)
    namespace["_gpu_dispatch_props"] = lambda _: (card.multiprocessors, *divmod(card.sm, 10))
    exec(compile(module, "ops.py", "exec"), namespace)

    def decide(sm: int, multiprocessors: int, dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> bool:
        card.sm, card.multiprocessors = sm, multiprocessors
        return bool(namespace[wanted](0, dtype, rows, outputs, inputs))

    return decide


sides = st.integers(1, 512).map(lambda n: 64 * n)


@settings(max_examples=1000)
@given(st.sampled_from(CARDS), st.sampled_from(sorted(DTYPES)), st.integers(1, 1536), sides, sides)
@example((75, 40), FLOAT16, 8, 576, 576)
@example((75, 40), FLOAT16, 9, 576, 576)
@example((80, 108), BFLOAT16, 17, 4096, 4096)
def test_the_kernel_is_that_of_bitsandbytes(card: tuple[int, int], precision: int, rows: int, n: int, k: int) -> None:
    assert is_fused(*card, precision, rows, n, k, 64) == theirs()(*card, DTYPES[precision], rows, n, k)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("precision", sorted(DTYPES))
def test_few_rows_decide_as_bitsandbytes_does(card: tuple[int, int], precision: int) -> None:
    for rows in range(1, 34):
        for n, k in ((256, 1024), (1024, 256), (2048, 2048), (3072, 8192), (8192, 3072), (2560, 10240), (28672, 8192)):
            assert is_fused(*card, precision, rows, n, k, 64) == theirs()(*card, DTYPES[precision], rows, n, k)


def test_many_rows_and_odd_blocks_are_never_fused() -> None:
    assert is_fused(80, 108, BFLOAT16, MOST_FUSED_ROWS, 2048, 512, 64)
    assert not is_fused(80, 108, BFLOAT16, MOST_FUSED_ROWS + 1, 2048, 512, 64)
    assert not is_fused(80, 108, BFLOAT16, 1, 4096, 1000, 64)


def test_the_weight_and_its_scales_are_made_together() -> None:
    few, many = (80, 108, BFLOAT16, 4, 4096, 1024, 64), (80, 108, BFLOAT16, 4096, 4096, 1024, 64)
    assert (dequantized_weight(*few), dequantized_scales(*few)) == (0, 0)
    assert dequantized_weight(*many) == 4096 * 1024 * 2
    assert dequantized_weight(80, 108, FLOAT32, *many[3:]) == 4096 * 1024 * 4
    assert dequantized_scales(*many) == 4096 * 1024 // 64 * 4
    assert {"dequantized_weight", "dequantized_scales"} <= SIZES.keys()
