"""Every rule against sizes worked out by hand from the kernels' sources, or asked of the libraries themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from oomph.core import kernel_sizes
from oomph.live.cuda_rules import CudaRules, Device, Extra, Program
from oomph.units import MIB

aten = torch.ops.aten
half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32

V100, T4, A100, A40, L40 = Device((7, 0)), Device((7, 5)), Device((8, 0)), Device((8, 6)), Device((8, 9))
H100, B200, RTX_PRO = Device((9, 0)), Device((10, 0)), Device((12, 0))


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def plain(found: Program | None) -> Program | None:
    """The program without allocations of 0 bytes, which ask the allocator for nothing, and without how sizes are named."""
    if found is None:
        return None
    kept: dict[int, int] = {}
    after: list[Extra | int] = []
    extras = [step for step in found.after if isinstance(step, Extra)]
    number = 0
    for step in found.after:
        if isinstance(step, int):
            after += [kept[step]] if step in kept else []
            continue
        if step.bytes:
            kept[number] = len(kept)
            after.append(step._replace(size="", arguments=()))
        number += 1
    assert number == len(extras)
    before = tuple(step._replace(size="", arguments=()) for step in found.before if step.bytes)
    return Program(before, tuple(after)) if before or after else None


def program(device: Device, func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Program | None:
    return plain(CudaRules(device, "sdpa").program(func, args, kwargs, func(*args, **kwargs)))


def after(device: Device, func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> list[tuple[str, int]]:
    """Name and bytes of what is allocated after the outputs; nothing may be freed on the way, nothing comes before."""
    found = program(device, func, *args, **kwargs)
    if found is None:
        return []
    assert found.before == ()
    return named(found.after)


def named(extras: tuple[Extra | int, ...]) -> list[tuple[str, int]]:
    assert not any(isinstance(extra, int) for extra in extras)
    return [(extra.name, extra.bytes) for extra in extras if isinstance(extra, Extra)]


def numbers(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def longs(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.int64)


# --- the pieces --------------------------------------------------------------------------------------------------------


def test_program_peak() -> None:
    kib = [Extra((n, 1024), torch.uint8, "") for n in range(6)]
    assert Program((kib[1],), (kib[5], kib[2], 0, kib[3], 1)).peak_bytes == 8 * 1024
    assert Program((kib[4],)).peak_bytes == 4 * 1024
    assert Program().peak_bytes == 0
    assert Extra((), torch.int64, "scalar").bytes == 8


def test_unknown_devices_count_as_the_last_known_below() -> None:
    assert Device((8, 7)).shared_memory_per_block == A40.shared_memory_per_block == 99 * 1024
    assert Device((11, 0)).multiprocessor_count == B200.multiprocessor_count == 148
    assert Device((6, 1)).threads_per_multiprocessor == V100.threads_per_multiprocessor == 2048
    assert Device((8, 0), multiprocessors=56).multiprocessor_count == 56


def test_arguments_may_come_by_name_or_by_position() -> None:
    probabilities = numbers(4, 8, dtype=half)
    by_name = {"output": probabilities, "dim": -1, "input_dtype": half}
    assert after(T4, aten._softmax_backward_data.default, probabilities, **by_name) == [("tmp", 64)]


# --- matrix products ---------------------------------------------------------------------------------------------------


def test_workspaces() -> None:
    x, w, b = numbers(4, 8), numbers(8, 16), numbers(16)
    plain, biased = (aten.mm.default, (x, w)), (aten.addmm.default, (b, x, w))
    assert CudaRules(A100, "sdpa").workspaces(*plain, {}) == (("cublas", 8519680),)
    assert CudaRules(H100, "sdpa").workspaces(*plain, {}) == (("cublas", 32 * MIB),)
    assert CudaRules(A100, "sdpa").workspaces(*biased, {}) == (("cublas", 8519680),)
    separate = CudaRules(replace(A100, unified_workspaces=False), "sdpa")
    assert separate.workspaces(*biased, {}) == (("cublas", 8519680), ("cublaslt", MIB))
    assert separate.workspaces(aten.addmm.default, (numbers(4, 16), x, w), {}) == (("cublas", 8519680),)
    assert separate.workspaces(aten.add.Tensor, (x, x), {}) == ()


def test_matrix_products_clone_what_blas_cannot_address() -> None:
    x, w = numbers(64, 32), numbers(32, 48)
    gaps = numbers(64, 64)[:, ::2]
    assert program(A100, aten.mm.default, x, w) is None
    assert program(A100, aten.mm.default, numbers(32, 64).t(), numbers(48, 32).t()) is None
    assert program(A100, aten.mm.default, numbers(64, 64)[:, :32], w) is None
    assert after(A100, aten.mm.default, gaps, w) == [("contiguous", 64 * 32 * 2)]
    assert after(A100, aten.addmm.default, numbers(48), gaps, w) == [("contiguous", 64 * 32 * 2)]
    broadcast = numbers(1, 32).expand(64, 32)
    assert after(A100, aten.mm.default, broadcast, w) == [("contiguous", 64 * 32 * 2)]


def test_batched_products_clone_what_blas_cannot_address() -> None:
    heads_inside = numbers(2, 64, 4, 32).transpose(1, 2)[0]
    right = numbers(4, 32, 64)
    assert program(A100, aten.bmm.default, heads_inside, right) is None
    gaps = numbers(4, 64, 64)[..., ::2]
    assert after(A100, aten.bmm.default, gaps, right) == [("contiguous", 4 * 64 * 32 * 2)]
    assert after(A100, aten.baddbmm.default, numbers(4, 64, 64), gaps, right) == [("contiguous", 4 * 64 * 32 * 2)]


@pytest.mark.parametrize(
    ("device", "workspace"),
    [(H100, 84480), (Device((9, 0), multiprocessors=114), 72960), (B200, 75776)],
)
def test_grouped_products_on_hopper_and_blackwell(device: Device, workspace: int) -> None:
    """The workspaces are what CUTLASS 3.8's ``get_workspace_size`` answers for these kernels."""
    offsets = torch.empty(8, dtype=torch.int32)
    arguments = 8 * 3 * 8 + 8 * 3 * 4 + 8 * 3 * 8
    expected = [("input_buf", arguments), ("workspace", workspace)]
    assert after(device, aten._grouped_mm.default, numbers(64, 32), numbers(8, 32, 48), offsets) == expected
    weights = (numbers(32, 64), numbers(64, 48), offsets)
    assert after(device, aten._grouped_mm.default, *weights) == expected


def test_grouped_products_elsewhere() -> None:
    offsets = torch.empty(8, dtype=torch.int32)
    assert program(A100, aten._grouped_mm.default, numbers(64, 32), numbers(8, 32, 48), offsets) is None
    assert program(RTX_PRO, aten._grouped_mm.default, numbers(64, 32), numbers(8, 32, 48), offsets) is None


# --- softmax, norms ----------------------------------------------------------------------------------------------------


def test_softmax_backward_holds_a_product() -> None:
    scores = (2, 4, 128, 128)
    mixed = (numbers(*scores, dtype=fp32), numbers(*scores, dtype=fp32), -1, half)
    assert after(T4, aten._softmax_backward_data.default, *mixed) == [("tmp", 2 * 4 * 128 * 128 * 4)]
    same = (numbers(*scores), numbers(*scores), -1, bf16)
    assert after(H100, aten._softmax_backward_data.default, *same) == [("tmp", 2 * 4 * 128 * 128 * 2)]


def test_softmax_and_log_softmax_copy_strided_inputs_only() -> None:
    dense, strided = numbers(32, 64), numbers(64, 32).t()
    for func in (aten._softmax.default, aten._log_softmax.default):
        assert program(A100, func, dense, -1, False) is None
        assert after(A100, func, strided, -1, False) == [("contiguous", 32 * 64 * 2)]
    assert program(A100, aten._log_softmax_backward_data.default, dense, dense, -1, bf16) is None
    assert after(A100, aten._log_softmax_backward_data.default, strided, dense, -1, bf16) == [("contiguous", 4096)]


def test_safe_softmax_runs_five_ops() -> None:
    found = program(T4, aten._safe_softmax.default, numbers(2, 4, 8, 16, dtype=fp32), -1)
    assert found is not None
    assert found.after == ()
    scores = 2 * 4 * 8 * 16
    assert named(found.before) == [("out", scores * 4), ("masked", scores), ("masked_rows", scores // 16), ("zero", 4)]


def test_logsumexp_holds_the_exponentials() -> None:
    found = program(A100, aten.logsumexp.default, numbers(16, 1000, dtype=fp32), [-1])
    assert found == Program((Extra((16, 1), fp32, "maxes"), Extra((16, 1000), fp32, "exp")))


def _layer_norm_backward(rows: int, width: int, outputs: tuple[bool, bool, bool]) -> tuple[Any, ...]:
    x, statistics = numbers(rows, width), numbers(rows, 1, dtype=fp32)
    return x, x, [width], statistics, statistics, numbers(width), numbers(width), list(outputs)


def test_layer_norm_backward_splits_many_short_rows() -> None:
    func = aten.native_layer_norm_backward.default
    wanted = (True, True, True)
    assert program(A100, func, *_layer_norm_backward(4096, 4096, wanted)) is None
    assert program(A100, func, *_layer_norm_backward(65536, 128, wanted)) is None
    blocks = min(32768 // (128 // 32), 131072 // 32)
    expected = [("dgamma_blocks", blocks * 128 * 2), ("dbeta_blocks", blocks * 128 * 2)]
    assert after(A100, func, *_layer_norm_backward(131072, 128, wanted)) == expected
    assert program(A100, func, *_layer_norm_backward(131072, 128, (True, False, False))) is None
    wide = _layer_norm_backward(131072, 1792, wanted)
    assert program(A100, func, *wide) is None
    assert len(after(H100, func, *wide)) == 2


def test_norms_copy_strided_inputs_first() -> None:
    patches = numbers(2, 64, 49).transpose(1, 2)
    copied = Extra((2, 49, 64), bf16, "X")
    assert program(A100, aten.native_layer_norm.default, patches, [64], None, None, 1e-5) == Program((copied,))
    for func in (torch.ops.oomph_cuda.layer_norm.default, torch.ops.oomph_cuda.rms_norm.default):
        assert program(A100, func, patches, 1) == Program((copied,))
        assert program(A100, func, patches.contiguous(), 1) is None
    dense, statistics = numbers(2, 49, 64), numbers(2, 49, 1, dtype=fp32)
    rest = ([64], statistics, statistics, numbers(64), None, [True, True, False])
    assert program(A100, aten.native_layer_norm_backward.default, dense, patches, *rest) == Program((copied,))
    expected = Program(after=(copied._replace(name="dY"),))
    assert program(A100, aten.native_layer_norm_backward.default, patches, dense, *rest) == expected


def test_rms_norm_backward_splits_many_short_rows() -> None:
    func, heads = torch.ops.oomph_cuda.rms_norm_backward.default, numbers(4, 1024, 32, 128)
    blocks = min(32768 // (128 // 32), 131072 // 32)
    assert after(A100, func, heads, heads, numbers(128), 1, [True, True]) == [("dgamma_blocks", blocks * 128 * 2)]
    assert program(A100, func, heads, heads, numbers(128), 1, [True, False]) is None
    assert program(A100, func, heads, heads, None, 1, [True, False]) is None
    assert program(A100, func, numbers(4096, 4096), numbers(4096, 4096), numbers(4096), 1, [True, True]) is None


def test_foreach_norm_holds_one_number_per_chunk() -> None:
    gradients = [numbers(1000), numbers(3 * 65536 + 1), numbers(65536)]
    found = program(A100, aten._foreach_norm.Scalar, gradients, 2)
    assert found == Program((Extra((3 * 4,), fp32, "output_per_tensor"),))
    assert program(A100, aten._foreach_norm.Scalar, [numbers(8, dtype=torch.float64)], 2) == Program(
        (Extra((1,), torch.float64, "output_per_tensor"),)
    )


# --- reductions --------------------------------------------------------------------------------------------------------


def test_bias_gradients_are_split_over_blocks() -> None:
    """4096 tokens, 4096 features: 32 columns of 128 outputs, 4 outputs a thread; the rows fill the card's blocks."""
    gradient = numbers(4096, 4096)
    found = after(A100, aten.sum.dim_IntList, gradient, [0], True)
    assert found == [("buffer", 4 * 4096 * 54 * 32 * 4), ("semaphores", 32 * 4)]
    found = after(T4, aten.sum.dim_IntList, gradient.to(half), [0], True)
    assert found == [("buffer", 4 * 4096 * 10 * 32 * 4), ("semaphores", 32 * 4)]
    found = after(H100, aten.sum.dim_IntList, gradient, [0], True)
    assert found == [("buffer", 4 * 4096 * 64 * 32 * 4), ("semaphores", 32 * 4)]


def test_whole_sums_and_rows() -> None:
    """One output: 512 threads a block, as many blocks as the card holds, or 256 values a thread."""
    assert program(A100, aten.mean.dim, numbers(4096, 4096, dtype=fp32), [-1], True) is None
    assert program(A100, aten.sum.default, numbers(100)) is None
    assert program(A100, aten.sum.default, torch.empty(())) is None
    many = numbers(1 << 24, dtype=fp32)
    assert after(A100, aten.sum.default, many) == [("buffer", 108 * 4 * 4), ("semaphores", 4)]
    assert after(T4, aten.sum.default, many) == [("buffer", (1 << 24) // 512 // 256 * 4), ("semaphores", 4)]
    assert program(A100, aten.sum.default, torch.empty(1 << 31, dtype=torch.int8).to(fp32)) is None


def test_sums_cast_other_types_first() -> None:
    kept = torch.empty(2, 100, dtype=torch.bool)
    assert after(A100, aten.sum.default, kept) == [("self", 200 * 8)]
    assert after(A100, aten.sum.dim_IntList, numbers(2, 100), [-1], dtype=torch.float64) == [("self", 200 * 8)]
    assert program(A100, aten.sum.dim_IntList, numbers(2, 100), [-1], dtype=fp32) is None


@pytest.mark.parametrize(
    ("func", "bytes_each"),
    [
        (aten.linalg_vector_norm.default, 4),
        (aten.amax.default, 2),
        (aten.max.default, 2),
        (aten.argmax.default, 16),
        (aten.any.default, 1),
        (aten.var.correction, 16),
    ],
)
def test_other_reductions_differ_in_the_partial_result(func: torch._ops.OpOverload, bytes_each: int) -> None:
    assert after(A100, func, numbers(1 << 24)) == [("buffer", 432 * bytes_each), ("semaphores", 4)]


# --- index kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "items", "bits", "expected"),
    [
        (T4, 1000, 64, 1),
        (T4, 16384, 64, 285183),
        (A100, 16384, 64, 284159),
        (H100, 16384, 64, 283135),
        (B200, 16384, 64, 283135),
        (T4, 16384, 20, 274943),
        (A100, 16384, 20, 273919),
        (H100, 16384, 20, 272895),
        (T4, 100000, 64, 1653759),
        (A100, 100000, 64, 1644543),
        (H100, 100000, 64, 1639423),
        (A100, 40000000, 64, 650683903),
        (H100, 40000000, 64, 648906239),
    ],
)
def test_radix_sort_storage_is_what_cub_asks_for(device: Device, items: int, bits: int, expected: int) -> None:
    assert kernel_sizes.radix_sort(device.sm, items, 8, bits) == expected


@pytest.mark.parametrize(
    ("items", "bytes_each", "expected"),
    [(1000, 8, 1279), (16384, 8, 1535), (100000, 8, 2815), (40000000, 8, 715519), (40000000, 4, 167679)],
)
def test_scan_storage_is_what_cub_asks_for(items: int, bytes_each: int, expected: int) -> None:
    assert kernel_sizes.scan(items, bytes_each) == expected


@pytest.mark.parametrize(
    ("device", "items", "expected"),
    [
        (T4, 1000, 1279),
        (T4, 16384, 2047),
        (A100, 16384, 1279),
        (T4, 100000, 6143),
        (A100, 100000, 2047),
        (H100, 100000, 1535),
        (B200, 100000, 1535),
        (A100, 40000000, 358399),
        (A40, 40000000, 2001151),
        (L40, 40000000, 2001151),
        (H100, 40000000, 144127),
        (B200, 40000000, 167935),
    ],
)
def test_unique_storage_is_what_cub_asks_for(device: Device, items: int, expected: int) -> None:
    assert kernel_sizes.unique_by_key(device.sm, items) == expected


def test_embedding_backward_sorts_many_indices() -> None:
    """8192 tokens that may all differ: 8192 runs, and one more for each ten tokens."""
    grad, tokens = numbers(4, 2048, 896), longs(4, 2048)
    found = program(A100, aten.embedding_dense_backward.default, grad, tokens, 151936, -1, False)
    assert found is not None
    assert named(found.before) == [("sorted_indices", 65536), ("orig_indices", 65536)]
    index, runs, one = 8192 * 8, 8192 + 819, 8
    sizes = [step.bytes if isinstance(step, Extra) else step for step in found.after]
    assert sizes == [index, one, index, 1279, 3, 2, index, index, 1279, 6, one, runs * 8, runs * 896 * 4]
    on_t4 = program(T4, aten.embedding_dense_backward.default, grad, tokens, 151936, -1, False)
    assert on_t4 is not None
    assert named(on_t4.after[3:4]) == [("unique_by_key", kernel_sizes.unique_by_key(T4.sm, 8192))]


def test_embedding_backward_of_few_rows_adds_atomically() -> None:
    """65536 positions on 16 rows: 16 segments in 6569 runs, 16 blocks."""
    grad, positions, runs = numbers(65536, 256), longs(65536), 6553 + 16
    found = program(H100, aten.embedding_dense_backward.default, grad, positions, 16, -1, False)
    assert found is not None
    assert named(found.after[-2:]) == [("partial_to_segment_idx", runs * 8), ("grad_weight_acc", 16 * 256 * 4)]
    found = program(H100, aten.embedding_dense_backward.default, grad.to(fp32), positions, 16, -1, False)
    assert found is not None
    assert named(found.after[-1:]) == [("partial_to_segment_idx", runs * 8)]


def test_embedding_backward_of_few_indices() -> None:
    grad, tokens = numbers(2, 1536, 64), longs(2, 1536)
    assert program(A100, aten.embedding_dense_backward.default, grad, tokens, 1000, -1, False) is None
    strided = numbers(1536, 2, 64).transpose(0, 1)
    found = program(A100, aten.embedding_dense_backward.default, strided, tokens, 1000, -1, False)
    assert found == Program((Extra((2, 1536, 64), bf16, "grad"),))


def test_index_put_sorts_to_accumulate() -> None:
    target, rows, values = numbers(1000, 64), longs(10000), numbers(10000, 64)
    linear = 10000 * 8
    names = ["linearIndex", "sorted_indices", "orig_indices", "range"]
    for device, storage in ((T4, 168959), (A100, 167935)):
        found = after(device, aten.index_put.default, target, [rows], values, True)
        assert found == [*((name, linear) for name in names), ("radix_sort", storage)]
    found = after(A100, aten.index_put.default, target, [rows], numbers(1, 64), True)
    assert found[1] == ("expandedValue", 10000 * 64 * 2)
    assert program(A100, aten.index_put_.default, target, [rows], values, False) is None


def test_index_with_a_mask_finds_coordinates() -> None:
    rules, taken = CudaRules(A100, "sdpa"), numbers(37, 16)
    mask = torch.empty(8, 32, dtype=torch.bool)
    found = rules.program(aten.index.Tensor, (numbers(8, 32, 16), [mask]), {}, taken)
    assert found == Program((Extra((2, 37), torch.int64, "nonzero"),))
    assert program(A100, aten.index.Tensor, numbers(8, 16), [longs(5)]) is None


def test_masked_scatter_counts_before() -> None:
    """The prefix sum of an expanded mask, whose copy stays; the scan's storage does not."""
    embeddings, source = numbers(2, 1024, 896), numbers(1, 512, 896)
    mask = torch.empty(2, 1024, 1, dtype=torch.bool).expand(2, 1024, 896)
    found = program(A100, aten.masked_scatter.default, embeddings, mask, source)
    count = 2 * 1024 * 896
    assert found is not None
    assert found.before == ()
    sizes = [step.bytes if isinstance(step, Extra) else step for step in found.after]
    assert sizes == [count * 8, count, 33791, 2]
    dense = program(T4, aten.masked_scatter.default, embeddings, mask.contiguous(), source)
    assert dense is not None
    assert dense.after == (found.after[0], found.after[2], 1)


def test_masked_scatter_backward_finds_coordinates() -> None:
    mask = torch.empty(2, 64, 16, dtype=torch.bool)
    arguments = (numbers(2, 64, 16), mask, [1, 24, 16])
    found = CudaRules(A100, "sdpa").program(aten.masked_scatter_backward.default, arguments, {}, numbers(1, 24, 16))
    assert found == Program((Extra((3, 24 * 16), torch.int64, "nonzero"),))


def test_nonzero_counts_first() -> None:
    rules, found = CudaRules(A100, "sdpa"), longs(7, 2)
    assert rules.program(aten.nonzero.default, (numbers(8, 8),), {}, found) == Program(
        (Extra((1,), torch.int32, "num_nonzeros"),)
    )
    strided = rules.program(aten.nonzero.default, (numbers(8, 4).t(),), {}, found)
    assert strided is not None
    assert named(strided.before)[0] == ("self", 64)


@pytest.mark.parametrize(("device", "storage"), [(A100, 1883135), (H100, 1861631)])
def test_sort_of_one_long_row(device: Device, storage: int) -> None:
    """A vocabulary of fp32 scores: four passes of 8 bits."""
    indices = 151936 * 8
    assert after(device, aten.sort.default, numbers(151936, dtype=fp32)) == [("indices", indices), ("radix_sort", storage)]
    column = numbers(151936, 2, dtype=fp32)[:, 0]
    assert after(device, aten.sort.stable, column, stable=True)[0] == ("self", 151936 * 4)


def test_sort_in_place() -> None:
    assert after(A100, aten.sort.default, numbers(64, 4096)) == [("range", 4096 * 8)]
    assert program(A100, aten.sort.default, torch.empty(())) is None
    assert program(A100, aten.sort.default, numbers(2, 5000)) is None


def test_topk_and_cumsum() -> None:
    assert program(A100, aten.topk.default, numbers(4096, 64), 8) is None
    assert after(A100, aten.topk.default, numbers(64, 4096).t(), 8) == [("input", 64 * 4096 * 2)]
    mask = longs(4, 2048)
    assert program(A100, aten.cumsum.default, mask, -1) is None
    assert after(A100, aten.cumsum.default, mask.to(torch.int32), -1) == [("self", 4 * 2048 * 8)]
    assert after(A100, aten.cumsum.default, longs(16384), 0) == [("inclusive_scan", 1535)]


# --- what has been looked at -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("func", "known"),
    [
        (aten.add_.Tensor, True),
        (aten.view.default, True),
        (aten.split.Tensor, True),
        (aten.mm.default, True),
        (aten.nll_loss_forward.default, True),
        (aten._foreach_addcdiv_.ScalarList, True),
        (aten._fused_adamw_.default, True),
        (aten._local_scalar_dense.default, True),
        (torch.ops.prim.device.default, True),
        (aten._scaled_dot_product_cudnn_attention.default, True),
        (aten._scaled_dot_product_cudnn_attention_backward.default, True),
        (aten.native_group_norm_backward.default, False),
        (aten._foreach_max.default, False),
        (aten.bincount.default, False),
    ],
)
def test_classified(func: torch._ops.OpOverload, known: bool) -> None:
    assert CudaRules(A100, "sdpa").classified(func) is known


def test_every_rule_counts_as_looked_at() -> None:
    rules = CudaRules(A100, "sdpa")
    for func in (aten.embedding_dense_backward.default, aten._grouped_mm.default, aten.masked_scatter_backward.default):
        assert rules.classified(func)
    assert rules.program(aten.mul.Tensor, (), {}, ()) is None
