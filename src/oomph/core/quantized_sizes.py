"""Bytes of the hidden allocations of bitsandbytes' products with 4-bit weights: they depend on thresholds in the rows.

``bitsandbytes::gemm_4bit`` (bitsandbytes 0.50.2, ``backends/cuda/ops.py``) multiplies few rows in a kernel that reads packed
weights, and for more rows makes the 16-bit weight first. ``_gemm_4bit_use_custom_cuda`` says which, from the compute
capability, the number of multiprocessors, the type of the inputs and the three extents. Its decisions are written down here
as conditions on them.
"""

from __future__ import annotations

from typing import NamedTuple

INT8_PRODUCT = "bitsandbytes.int8_mixed_scaled_mm"
NO_OUTLIERS = "columns of outliers in what int8 layers multiply: none is assumed, each would take copies of itself in 16 bits"
FLOAT32, FLOAT16, BFLOAT16 = range(3)
MOST_FUSED_ROWS = 1536
"""Rows above which the weight is always made (``_gemm_4bit_custom_max_m``)."""

_ALWAYS_FUSED_ROWS = 4
_FEW_ROWS = 8
_SMALL_WEIGHT = 4 << 20


class _Product(NamedTuple):
    """A product of [rows, inputs] and a weight [outputs, inputs] on a card of so many multiprocessors."""

    sm: int
    multiprocessors: int
    rows: int
    outputs: int
    inputs: int

    @property
    def blocks(self) -> int:
        """Blocks of 64 outputs."""
        return -(-self.outputs // 64)

    def waves(self, count: int, parts: int = 1) -> bool:
        """Whether the blocks fill at least count / parts of the multiprocessors."""
        return self.blocks * parts >= self.multiprocessors * count

    @property
    def fast_memory(self) -> bool:
        """sm_80 and sm_9x have stacked memory."""
        return self.sm == 80 or self.sm // 10 == 9


def _few_rows(p: _Product) -> bool:
    """Five to seven rows and a weight of 4 Mi elements or more."""
    if p.fast_memory and p.rows >= 6 and p.blocks >= (36 if p.sm // 10 == 9 else 48):
        under_three_quarters, under_three_fifths = not p.waves(3, 4), not p.waves(3, 5)
        if p.inputs > p.outputs and under_three_quarters:
            return False
        if p.inputs == p.outputs:
            return not (under_three_fifths if p.sm == 80 else under_three_quarters and not under_three_fifths)
    return True


def _short_small_weight(p: _Product) -> int:
    """Most rows for a small weight whose inputs are less than half its outputs."""
    if p.fast_memory:
        low = p.blocks * 3 < p.multiprocessors
        return (1536 if low else 512) if p.sm == 80 else (512 if low else 320)
    if p.sm == 75:
        if p.waves(3):
            return 320
        return 64 if p.inputs >= 1024 else 96 if p.inputs >= 704 else 320
    return 192 if not p.waves(1) and p.blocks * p.inputs > p.multiprocessors * 320 else 320


def _small_weight(p: _Product) -> int:
    """Most rows for a weight of less than 4 Mi elements."""
    if p.inputs * 2 < p.outputs:
        return _short_small_weight(p)
    quarter = p.blocks * 4 <= p.multiprocessors
    deep = p.inputs >= p.outputs
    if p.sm == 80 and quarter:
        if not deep:
            return 384
        return 32 if p.blocks * 8 <= p.multiprocessors else 128
    if p.sm == 75 and not p.waves(1) and p.rows > _FEW_ROWS:
        return 64
    if quarter:
        return 23 if deep and not p.fast_memory else 32
    return 16 if p.blocks * 2 <= p.multiprocessors else 0


def _sm_75(p: _Product) -> int:
    if p.waves(3):
        return 128 if p.inputs < p.outputs else 64
    return 64 if p.blocks >= p.multiprocessors // 2 else 32


def _sm_80(p: _Product) -> int:
    shallow = p.inputs < p.outputs
    if p.waves(3):
        return 128
    if p.waves(1):
        return 64 if shallow else 32
    if p.inputs >= p.outputs * 3 and p.blocks * 4 > p.multiprocessors:
        return 0
    if p.inputs == p.outputs and p.blocks >= 48 and not p.waves(3, 5):
        return 0
    if not p.waves(1, 2):
        if p.inputs <= p.outputs:
            return 128
        if p.waves(1, 3):
            return 0
    return 128 if p.blocks >= p.multiprocessors // 2 and shallow else 16


def _sm_86(p: _Product) -> int:
    if p.waves(1):
        return 128
    return 64 if p.blocks >= p.multiprocessors // 2 else 16


def _sm_90(p: _Product) -> int:
    for waves, rows in ((3, 64), (2, 48), (1, 32)):
        if p.waves(waves):
            return rows
    if p.blocks >= p.multiprocessors // 2:
        return 0 if p.inputs >= p.outputs and not p.waves(3, 4) else 16
    return 0


def _sm_100(p: _Product) -> int:
    if p.waves(3):
        return 32
    return 8 if p.waves(1) and p.inputs < p.outputs else 0


def _sm_120(p: _Product) -> int:
    if p.waves(3):
        return 256
    if p.waves(2):
        return 128
    if p.waves(4, 5):
        return 96 if p.inputs >= p.outputs else 64
    if p.blocks >= p.multiprocessors // 2:
        return 64 if p.inputs * 2 >= p.outputs and p.blocks >= 128 else 8
    return 16 if p.inputs > p.outputs * 2 and p.blocks > 64 else 8


def _others(p: _Product) -> int:
    """sm_89, sm_121 below one wave, and what has no rule of its own."""
    very_deep = p.inputs > p.outputs * 2
    for waves, rows in ((3, 256), (2, 128)):
        if p.waves(waves):
            return rows
    if p.waves(4, 5):
        if very_deep or p.blocks >= 200:
            return 128
        return 64 if p.inputs < p.outputs else 128 if p.multiprocessors >= 60 else 32
    if p.blocks >= p.multiprocessors // 2:
        return 64 if very_deep else 8 if p.blocks >= 64 else 32
    if p.inputs > p.outputs and p.blocks <= 48:
        return 12 if p.inputs >= p.outputs * 3 else 10
    return 16 if very_deep or p.blocks < 48 else 8


def _many_rows(p: _Product) -> int:
    """Most rows, of 8 to 512, for a weight of 4 Mi elements or more."""
    if p.sm == 121:
        return 256 if p.waves(1) else _others(p)
    by_architecture = {75: _sm_75, 80: _sm_80, 86: _sm_86, 120: _sm_120}
    return (_sm_90 if p.sm // 10 == 9 else by_architecture.get(p.sm, _others))(p)


def is_fused(sm: int, multiprocessors: int, precision: int, rows: int, outputs: int, inputs: int, blocksize: int) -> bool:
    """Whether the product runs in the kernel that reads packed weights.

    Args:
        sm: the architecture, 80 for sm_80.
        multiprocessors: of the card.
        precision: of the inputs: `FLOAT32`, `FLOAT16` or `BFLOAT16`.
        rows: of the inputs, all leading dimensions together.
        outputs: rows of the weight.
        inputs: columns of the weight.
        blocksize: weights that share a scale.
    """
    if rows > MOST_FUSED_ROWS or inputs % blocksize:
        return False
    if rows <= _ALWAYS_FUSED_ROWS:
        return True
    if precision == FLOAT32 or sm < 75 or (sm // 10 == 7 and precision != FLOAT16):
        return rows < _FEW_ROWS
    if sm == 87 or sm // 10 == 11:
        return False
    product = _Product(sm, multiprocessors, rows, outputs, inputs)
    if sm // 10 == 10:
        return rows <= _sm_100(product)
    if outputs * inputs < _SMALL_WEIGHT:
        return rows <= _small_weight(product)
    if rows < _FEW_ROWS:
        return _few_rows(product)
    return rows <= min(512, _many_rows(product))


def dequantized_weight(
    sm: int, multiprocessors: int, precision: int, rows: int, outputs: int, inputs: int, blocksize: int
) -> int:
    """``_dequant_linear_fallback``: the weight in the inputs' precision, ``B_dq``; see `is_fused` for the numbers."""
    if is_fused(sm, multiprocessors, precision, rows, outputs, inputs, blocksize):
        return 0
    return outputs * inputs * (4 if precision == FLOAT32 else 2)


def dequantized_scales(
    sm: int, multiprocessors: int, precision: int, rows: int, outputs: int, inputs: int, blocksize: int
) -> int:
    """``_dequant_linear_fallback``: the scales of double quantisation in float32; see `is_fused` for the numbers."""
    if is_fused(sm, multiprocessors, precision, rows, outputs, inputs, blocksize):
        return 0
    return -(-outputs * inputs // blocksize) * 4
