"""Constants of the rules against the headers that come with torch: the code of the very version that runs."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest
import torch

from oomph.core import kernel_sizes
from oomph.live.cuda_rules import Device, attention_kernels, kernels

HEADERS = Path(torch.__file__).parent / "include" / "ATen"
half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
TYPES = {half: "f16", bf16: "bf16", fp32: "f32"}
DISPATCHED = [
    *((Device((7, 0)), dtype, 70) for dtype in (half, fp32)),
    *((Device((7, 5)), dtype, 75) for dtype in (half, fp32)),
    *((Device(card), dtype, 80) for card in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)) for dtype in TYPES),
]
KERNEL = re.compile(
    r"(?:if \((?P<only>cc == 86 \|\| cc == 89)\) )?"
    r"cb\(AttentionBackwardKernel<[^,]+, [^,]+, true, (?P<dropout>true|false), (?:true|false), (?P<tile>\d+, \d+, \d+)"
)


def header(*path: str) -> str:
    return HEADERS.joinpath(*path).read_text(encoding="utf-8")


def constant(text: str, pattern: str) -> int:
    """The number that the pattern captures; the pattern must occur."""
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found[1])


@pytest.mark.parametrize(("device", "dtype", "sm"), DISPATCHED, ids=lambda value: str(getattr(value, "sm", value)))
@pytest.mark.parametrize("dropout", [False, True])
def test_backward_kernels_are_tried_in_the_order_of_the_header(
    device: Device, dtype: torch.dtype, sm: int, dropout: bool
) -> None:
    text = header("native", "transformers", "cuda", "mem_eff_attention", "kernels", "cutlassB.h")
    body = text.split(f"void dispatch_cutlassB_{TYPES[dtype]}_sm{sm}(T cb, int cc) {{")[1].split("\n}")[0]
    tried = [
        tuple(map(int, kernel["tile"].split(", ")))
        for kernel in KERNEL.finditer(body)
        if (kernel["dropout"] == "true") is dropout and (not kernel["only"] or device.sm in (86, 89))
    ]
    ours = attention_kernels._backward_tiles(device, dtype, dropout)
    fits = {tile[:3]: tile.shared_memory <= device.shared_memory_per_block for tile in ours}

    def reached(tiles: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The kernels that run for some head: no earlier one takes as large heads."""
        earlier = [max((t[2] for t in tiles[:n] if fits[t]), default=0) for n in range(len(tiles))]
        return [tile for tile, most in zip(tiles, earlier, strict=True) if tile[2] > most]

    distinct = [tile for tile, _ in groupby(tried) if tile in fits]
    assert reached(list(fits)) == reached(distinct)
    assert [tile for tile in dict.fromkeys(tried) if tile not in fits and tile[2] > max(t[2] for t in fits if fits[t])] == []


def test_reductions() -> None:
    text = header("native", "cuda", "Reduce.cuh")
    assert constant(text, r"static constexpr int MAX_NUM_THREADS = (\d+);") == kernel_sizes._MAX_THREADS
    assert constant(text, r"#else\s+constexpr int min_values_per_thread = (\d+);") == kernel_sizes._MIN_VALUES_PER_THREAD
    assert constant(text, r"constexpr int max_values_per_thread = (\d+);") == kernel_sizes._MAX_VALUES_PER_THREAD


def test_lists_are_cut_into_chunks() -> None:
    assert constant(header("native", "cuda", "MultiTensorApply.cuh"), r"kChunkSize = (\d+);") == kernels._CHUNK


def test_short_rows_are_sorted_in_place() -> None:
    assert constant(header("native", "cuda", "Sort.h"), r"self\.size\(dim\) <= (\d+);") == kernel_sizes.SMALL_SORT


def test_attention_backends_are_tried_in_the_order_of_the_header() -> None:
    order = header("Context.h").split("sdp_priority_order = {")[1].split("}")[0]
    assert re.findall(r"SDPBackend::(\w+)", order)[:4] == ["flash_attention", "efficient_attention", "math", "cudnn_attention"]


def test_grouped_heads_are_a_matter_of_two_flags() -> None:
    """A third flag, of later versions, goes with grouped heads in mem-efficient attention."""
    text = header("native", "transformers", "sdp_utils_cpp.h")
    flags = re.search(r"template <([^>]*)>\s*inline bool check_batch_size_and_num_heads_dense", text)
    assert flags is not None
    assert flags[1] == "bool supports_gqa, bool requires_same_num_heads=true"
