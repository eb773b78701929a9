"""Hidden allocations of CUDA kernels as functions of whole numbers: worked out by hand, and none where there is none."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph.core import kernel_sizes as sizes
from oomph.core.kernel_sizes import FEW_INDICES, SIZES, SMALL_SORT, Dim, ceil_div, round_up
from oomph.units import MIB

A100, H100 = 108, 132
THREADS = 2048


def test_names_are_those_of_the_functions() -> None:
    assert list(SIZES) == [function.__name__ for function in SIZES.values()]
    assert all(getattr(sizes, name) is function for name, function in SIZES.items())


def test_names_are_stable() -> None:
    """Cached forms hold them, and so does every trace."""
    assert set(SIZES) == {
        *("radix_sort", "scan", "unique_by_key", "index_sort", "sort_range", "long_sort_indices", "long_sort_scratch"),
        *("embedding_column", "embedding_number", "embedding_segments", "embedding_runs", "embedding_unique", "embedding_scan"),
        *("embedding_atomic_runs", "embedding_atomic_sum", "embedding_run_sums", "layer_norm_partials"),
        *("flash_accumulator", "efficient_workspace", "reduction_buffer", "reduction_semaphores"),
        *("dequantized_weight", "dequantized_scales"),
        *("cudnn_attention_forward", "cudnn_attention_backward", "convolution_copies"),
    }


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4))
def test_rounding(value: int, multiple: int) -> None:
    assert ceil_div(value, multiple) == -((-value) // multiple)
    up = round_up(value, multiple)
    assert up % multiple == 0
    assert value <= up < value + multiple


# Parts of 256 bytes and 255 more. A sort by 16 bits of 20,984 keys: two passes of 256 digits, 8 bytes each; six tiles of
# 3840; two buffers of 20,984 times 8; two counters.
SORT = 2 * 256 * 8 + 6 * 256 * 4 + 2 * 656 * 256 + 256 + 255


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("radix_sort", (80, 20_984, 8, 16), SORT),
        ("index_sort", (80, 20_984, 51_200), SORT),
        ("index_sort", (80, 20_984, 65_536), SORT),
        # 65,537 rows take a 17th bit, and so a third pass.
        ("index_sort", (80, 20_984, 65_537), SORT + 256 * 8),
        # One pass needs no second buffer.
        ("radix_sort", (90, 10_000, 4, 8), 256 * 8 + 2 * 256 * 4 + 256 + 255),
        ("radix_sort", (90, 2304, 8, 64), 1),
        # Two tiles and a warp, 16 bytes each.
        ("scan", (1000, 8), 768 + 256 + 255),
        ("scan", (1920, 4), 512 + 256 + 255),
        ("scan", (1921, 4), 512 + 256 + 255),
        ("unique_by_key", (90, 10_000), 768 + 256 + 255),
        ("unique_by_key", (86, 10_000), 1024 + 256 + 255),
        ("sort_range", (SMALL_SORT,), SMALL_SORT * 8),
        ("long_sort_indices", (SMALL_SORT + 1,), (SMALL_SORT + 1) * 8),
        ("embedding_column", (20_984, 8), 20_984 * 8),
        ("embedding_number", (20_984,), 8),
        ("embedding_segments", (20_984, 51_200, 8), 20_984 * 8),
        ("embedding_segments", (20_984, 1000, 8), 8000),
        # A run for every tenth index and one for each distinct one.
        ("embedding_runs", (20_984, 51_200, 8), (2098 + 20_984) * 8),
        ("embedding_runs", (20_984, 1000, 8), (2098 + 1000) * 8),
        # Few rows, many indices: their 4 blocks are fewer than 432, and the 200,004 runs more than 16.
        ("embedding_atomic_runs", (A100, 2_000_000, 4, 1024, 8), (200_000 + 4) * 8),
        ("embedding_atomic_sum", (A100, 2_000_000, 4, 1024, 4), 4 * 1024 * 4),
        ("embedding_run_sums", (A100, 20_984, 51_200, 2560, 4), (2098 + 20_984) * 2560 * 4),
        # A row of partial gradients for 32 rows each, 8192 at the most.
        ("layer_norm_partials", (A100, 65_600, 128, 2), 2050 * 128 * 2),
        ("layer_norm_partials", (A100, 10_000_000, 128, 2), 8192 * 128 * 2),
        # One head, 64 queries: one block on 216 slots. 16 blocks of keys: a split for each.
        ("flash_accumulator", (A100, 1, 1, 64, 2048, 128, 64), 16 * 64 * 64 * 4),
        # Two tiles of queries, and no buffer for those of the keys.
        ("efficient_workspace", (2, 4, 100, 100, 64, 64, 64, 64, 1), 8 * 2 * 1 * (4 + 64 * 64) * 4),
    ],
)
def test_worked_out_by_hand(name: str, arguments: tuple[int, ...], expected: int) -> None:
    assert SIZES[name](*arguments) == expected


def columns(rows: int, width: int) -> tuple[int, ...]:
    """The numbers of a sum over the rows of a matrix, as the gradient of a bias is one."""
    return (A100, THREADS, 4, 8, 1, *Dim(rows, 0, width), *Dim(width, 1, 1))


def test_a_sum_over_rows_is_split_over_blocks() -> None:
    """20,984 rows of 2560, on 108 multiprocessors of 2048 threads.

    Four columns a thread, 32 threads wide and 4 high: 20 blocks of outputs. The card holds 108 · 16 blocks, so each is
    split into ceil(1728 / 20) = 87. Each split keeps a partial result for every thread of a row and its four columns.
    """
    assert sizes.reduction_buffer(*columns(20_984, 2560)) == 4 * 2560 * 87 * 32 * 4
    assert sizes.reduction_semaphores(*columns(20_984, 2560)) == 20 * 4


def test_a_sum_of_everything_is_split_over_blocks() -> None:
    """One output: 2^24 numbers, eight of each loaded at once, 512 threads a block, 256 values a thread at the most."""
    numbers = (A100, THREADS, 4, 8, 1, *Dim(2**24, 0, 1))
    blocks = min(108 * (2048 // 512), ceil_div(2**24 // 512, 16))
    assert sizes.reduction_buffer(*numbers) == 4 * blocks
    assert sizes.reduction_semaphores(*numbers) == 4


ZERO: list[tuple[str, tuple[int, ...]]] = [
    ("sort_range", (SMALL_SORT + 1,)),
    ("long_sort_indices", (SMALL_SORT,)),
    ("long_sort_scratch", (80, SMALL_SORT, 8)),
    ("embedding_column", (FEW_INDICES, 8)),
    ("embedding_number", (FEW_INDICES,)),
    ("embedding_segments", (FEW_INDICES, 51_200, 8)),
    ("embedding_runs", (FEW_INDICES, 51_200, 8)),
    ("embedding_unique", (80, FEW_INDICES)),
    ("embedding_scan", (FEW_INDICES, 51_200, 8)),
    ("embedding_atomic_runs", (A100, FEW_INDICES, 51_200, 2560, 8)),
    ("embedding_atomic_sum", (A100, FEW_INDICES, 51_200, 2560, 4)),
    ("embedding_run_sums", (A100, FEW_INDICES, 51_200, 2560, 4)),
    ("embedding_atomic_sum", (A100, 20_984, 51_200, 2560, 4)),
    ("embedding_atomic_runs", (A100, 20_984, 51_200, 2560, 8)),
    ("embedding_run_sums", (A100, 2_000_000, 4, 1024, 4)),
    ("layer_norm_partials", (A100, 65_536, 128, 2)),
    ("layer_norm_partials", (A100, 1_000_000, 2560, 2)),
    ("flash_accumulator", (A100, 8, 32, 2623, 2623, 128, 80)),
    ("reduction_buffer", columns(63, 2560)),
    ("reduction_semaphores", columns(63, 2560)),
    ("reduction_buffer", columns(0, 2560)),
    ("reduction_buffer", columns(2**21, 2560)),
]


@pytest.mark.parametrize(("name", "arguments"), ZERO)
def test_where_a_kernel_does_without_there_is_nothing(name: str, arguments: tuple[int, ...]) -> None:
    assert SIZES[name](*arguments) == 0


@pytest.mark.parametrize(
    ("function", "threshold"),
    [
        (sizes.sort_range, SMALL_SORT),
        (lambda count: sizes.long_sort_scratch(80, count, 8), SMALL_SORT),
        (lambda count: sizes.embedding_column(count, 8), FEW_INDICES),
        (lambda count: sizes.embedding_run_sums(A100, count, 51_200, 2560, 4), FEW_INDICES),
        (lambda rows: sizes.layer_norm_partials(A100, rows, 128, 2), 65_536),
    ],
    ids=["short sort", "long sort", "embedding", "sums of runs", "layer norm"],
)
def test_kernels_change_above_their_thresholds(function: Callable[[int], int], threshold: int) -> None:
    assert (function(threshold) == 0) != (function(threshold + 1) == 0)


SM = st.sampled_from([70, 75, 80, 86, 89, 90, 100, 120])
CARD = st.integers(1, 160)
COUNT = st.integers(1, 1 << 24)
BYTES = st.sampled_from([4, 8])
WIDTH = st.integers(1, 1 << 14)
DIMENSION = st.integers(1, 256)
TILE = st.sampled_from([32, 64, 128])
ANY: dict[str, tuple[st.SearchStrategy[int], ...]] = {
    "cudnn_attention_forward": (SM,),
    "cudnn_attention_backward": (SM, *[DIMENSION] * 7),
    "convolution_copies": (*[DIMENSION] * 6, BYTES),
    "dequantized_weight": (SM, CARD, st.integers(0, 2), DIMENSION, COUNT, WIDTH, TILE),
    "dequantized_scales": (SM, CARD, st.integers(0, 2), DIMENSION, COUNT, WIDTH, TILE),
    "radix_sort": (SM, COUNT, BYTES, st.integers(1, 64)),
    "scan": (COUNT, BYTES),
    "unique_by_key": (SM, COUNT),
    "index_sort": (SM, COUNT, COUNT),
    "sort_range": (COUNT,),
    "long_sort_indices": (COUNT,),
    "long_sort_scratch": (SM, COUNT, BYTES),
    "embedding_column": (COUNT, BYTES),
    "embedding_number": (COUNT,),
    "embedding_segments": (COUNT, COUNT, BYTES),
    "embedding_runs": (COUNT, COUNT, BYTES),
    "embedding_unique": (SM, COUNT),
    "embedding_scan": (COUNT, COUNT, BYTES),
    "embedding_atomic_runs": (CARD, COUNT, COUNT, WIDTH, BYTES),
    "embedding_atomic_sum": (CARD, COUNT, COUNT, WIDTH, BYTES),
    "embedding_run_sums": (CARD, COUNT, COUNT, WIDTH, BYTES),
    "layer_norm_partials": (CARD, COUNT, WIDTH, BYTES),
    "flash_accumulator": (CARD, DIMENSION, DIMENSION, WIDTH, WIDTH, TILE, DIMENSION),
    "efficient_workspace": (DIMENSION, DIMENSION, WIDTH, WIDTH, DIMENSION, DIMENSION, TILE, TILE, st.integers(0, 1)),
}


@pytest.mark.parametrize("name", ANY)
def test_any_numbers_give_whole_bytes(name: str) -> None:
    @given(st.tuples(*ANY[name]))
    def check(arguments: tuple[int, ...]) -> None:
        found = SIZES[name](*arguments)
        assert type(found) is int
        assert found >= 0

    check()


def test_all_but_reductions_take_as_many_numbers_as_they_name() -> None:
    taken = {name: len(inspect.signature(function).parameters) for name, function in SIZES.items()}
    assert {name: taken[name] for name in ANY} == {name: len(strategies) for name, strategies in ANY.items()}
    assert set(SIZES) - set(ANY) == {"reduction_buffer", "reduction_semaphores"}


@given(st.integers(1, 4), st.lists(st.tuples(*[st.integers(1, 4096)] * 3), min_size=1, max_size=4), CARD)
def test_any_reduction_gives_whole_bytes(reduced: int, dims: list[tuple[int, int, int]], card: int) -> None:
    numbers = (card, THREADS, 4, 4, min(reduced, len(dims)), *(number for dim in dims for number in dim))
    buffer, semaphores = sizes.reduction_buffer(*numbers), sizes.reduction_semaphores(*numbers)
    assert buffer >= 0
    assert (buffer == 0) == (semaphores == 0)
    assert buffer % 4 == semaphores % 4 == 0


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_indices_are_summed_in_one_way_or_the_other(count: int, rows: int) -> None:
    width, card = 512, H100
    atomic = sizes.embedding_atomic_sum(card, count, rows, width, 4)
    apart = sizes.embedding_run_sums(card, count, rows, width, 4)
    assert (atomic > 0) + (apart > 0) == (count > FEW_INDICES)
    assert (atomic > 0) == (sizes.embedding_atomic_runs(card, count, rows, width, 8) > 0)


@pytest.mark.parametrize("function", [sizes.index_sort, sizes.embedding_unique])
def test_scratch_grows_with_the_indices(function: Callable[..., int]) -> None:
    more = (51_200,) if function is sizes.index_sort else ()
    found = [function(80, count, *more) for count in range(FEW_INDICES + 1, 200_000, 4999)]
    assert found == sorted(found)
    assert found[0] < found[-1] < 20 * MIB
