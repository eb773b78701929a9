"""Attention on CUDA: which kernel is chosen, what it allocates; and the composites whose CUDA branch differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from oomph.core.kernel_sizes import flash_splits
from oomph.errors import UserError
from oomph.live.cuda_rules import CudaFunctions, CudaRules, Device, Extra, Program
from oomph.live.cuda_rules.attention import Backend, Call, select_backend
from oomph.live.cuda_rules.composites import math_attention
from oomph.records import Attention

aten = torch.ops.aten
half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32

V100, T4, A100, A40 = Device((7, 0)), Device((7, 5)), Device((8, 0)), Device((8, 6))
H100, B200, RTX_PRO = Device((9, 0)), Device((10, 0)), Device((12, 0))


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


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


class Calls(TorchDispatchMode):
    """The ops that ran, with the shapes of what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made.append((str(func), [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]))
        return out

    def named(self, name: str) -> list[list[tuple[int, ...]]]:
        return [shapes for op, shapes in self.made if op == f"aten.{name}.default"]


def heads(count: int, tokens: int, size: int, dtype: torch.dtype = bf16, batch: int = 2) -> torch.Tensor:
    return torch.empty(batch, tokens, count, size, dtype=dtype).transpose(1, 2).requires_grad_()


def on(device: Device, attention: Attention = "sdpa") -> CudaFunctions:
    return CudaFunctions(CudaRules(device, attention))


# --- selection ---------------------------------------------------------------------------------------------------------


def selected(device: Device, size: int = 64, dtype: torch.dtype = bf16, value: int | None = None, **more: Any) -> Backend:
    keys = more.pop("keys", 8)
    mask = torch.empty(2, 1, 100, 100, dtype=torch.bool) if more.pop("masked", False) else None
    query, key = heads(8, more.pop("queries", 100), size, dtype), heads(keys, 100, size, dtype)
    return select_backend(device, Call(query, key, heads(keys, 100, value or size, dtype), mask, **more))


@pytest.mark.parametrize(
    ("device", "call", "backend"),
    [
        (A100, {}, "flash"),
        (A100, {"causal": True}, "flash"),
        (A100, {"dtype": half}, "flash"),
        (A100, {"dtype": fp32}, "efficient"),
        (A100, {"masked": True}, "efficient"),
        (A100, {"masked": True, "keys": 2, "grouped": True}, "math"),
        (A100, {"keys": 2, "grouped": True}, "flash"),
        (A100, {"keys": 2, "grouped": True, "dtype": fp32}, "math"),
        (A100, {"causal": True, "queries": 50}, "efficient"),
        (A100, {"size": 192, "value": 128}, "efficient"),
        (A100, {"size": 256}, "flash"),
        (A100, {"size": 264}, "efficient"),
        (A100, {"size": 60}, "flash"),
        (A100, {"size": 60, "masked": True}, "math"),
        (A100, {"size": 60, "dtype": fp32}, "efficient"),
        (A40, {"size": 192}, "flash"),
        (A40, {"size": 224}, "efficient"),
        (A40, {"size": 256}, "flash"),
        (A40, {"size": 256, "dropout": 0.1}, "efficient"),
        (RTX_PRO, {}, "flash"),
        (RTX_PRO, {"size": 224}, "efficient"),
        (T4, {"dtype": half}, "efficient"),
        (T4, {"dtype": half, "masked": True}, "efficient"),
        (T4, {"dtype": half, "size": 60}, "math"),
        (T4, {"dtype": half, "keys": 2, "grouped": True}, "math"),
        (T4, {"dtype": fp32, "size": 60}, "efficient"),
        (T4, {"dtype": bf16}, "math"),
        (V100, {"dtype": half}, "efficient"),
        (H100, {}, "cudnn"),
        (H100, {"masked": True, "keys": 2, "grouped": True}, "cudnn"),
        (H100, {"size": 256}, "cudnn"),
        (H100, {"dtype": fp32}, "efficient"),
        (H100, {"size": 60}, "flash"),
        (B200, {"size": 192, "value": 128}, "cudnn"),
        (B200, {"size": 192}, "flash"),
        (Device((9, 0), cudnn=91000), {}, "flash"),
        (Device((9, 0), cudnn=0), {"masked": True}, "efficient"),
        (Device((6, 1)), {"dtype": half}, "efficient"),
    ],
)
def test_selection(device: Device, call: dict[str, Any], backend: Backend) -> None:
    assert selected(device, **call) == backend


def test_selection_of_other_shapes() -> None:
    flat = torch.empty(8, 100, 64, dtype=bf16)
    assert select_backend(A100, Call(flat, flat, flat)) == "math"
    one, many = heads(8, 100, 64, batch=1), heads(8, 100, 64)
    assert select_backend(A100, Call(one, many, many)) == "math"
    strided = torch.empty(2, 8, 64, 100, dtype=bf16).transpose(2, 3)
    assert select_backend(A100, Call(strided, strided, strided)) == "math"
    learned = torch.empty(1, 8, 100, 100, dtype=bf16, requires_grad=True)
    assert select_backend(H100, Call(many, many, many, learned)) == "efficient"
    with torch.no_grad():
        large = heads(8, 100, 224)
        assert select_backend(A40, Call(large, large, large)) == "flash"


# --- what the kernels allocate -----------------------------------------------------------------------------------------


def backward_program(device: Device, name: str, attention: Attention = "sdpa", **call: Any) -> Program:
    """The program of the backward kernel that follows one call of the attention."""
    found: list[Program | None] = []
    functions = on(device, attention)

    class Programs(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if str(func) == f"aten._scaled_dot_product_{name}_attention_backward.default":
                found.append(plain(CudaRules(device, attention).program(func, args, kwargs or {}, out)))
            return out

    query, key = heads(call["heads"], call["tokens"], call["size"], call["dtype"], call["batch"]), None
    key = heads(call.get("keys", call["heads"]), call["tokens"], call["size"], call["dtype"], call["batch"])
    with functions, Programs():
        out = F.scaled_dot_product_attention(query, key, key, dropout_p=call.get("dropout", 0.0), enable_gqa="keys" in call)
        out.transpose(1, 2).backward(torch.empty_like(out.transpose(1, 2)))
    assert len(found) == 1
    assert found[0] is not None
    return found[0]


def efficient(device: Device, **call: Any) -> Program:
    return backward_program(device, "efficient", "efficient", **call)


@pytest.mark.parametrize(
    ("device", "dtype", "size", "floats"),
    [
        (T4, half, 64, 16 * 1 * (4 + 64 * 64)),
        (A100, bf16, 64, 16 * 1 * (4 + 64 * 64)),
        (A40, bf16, 96, 8 * 2 * (4 + 128 * 64)),
        (A100, bf16, 128, 8 * 1 * (4 + 128 * 128)),
        (H100, half, 128, 8 * 1 * (4 + 128 * 128)),
        (T4, half, 128, 8 * 2 * (4 + 128 * 64)),
        (A40, bf16, 128, 16 * 2 * (4 + 64 * 64) + 12 * 64 * (128 + 128)),
        (RTX_PRO, bf16, 128, 16 * 2 * (4 + 64 * 64) + 12 * 64 * (128 + 128)),
        (A100, bf16, 256, 8 * 4 * (4 + 128 * 64) + 12 * 64 * (256 + 256)),
    ],
)
def test_efficient_backward_in_half_precision(device: Device, dtype: torch.dtype, size: int, floats: int) -> None:
    """1024 queries and keys of 16 heads: blocks of queries times blocks of the head, each with a lock of 16 bytes."""
    found = efficient(device, heads=16, tokens=1024, size=size, dtype=dtype, batch=1)
    assert found == Program(
        after=(Extra((1, 16, 1024), fp32, "delta"), Extra((16 * floats * 4,), torch.uint8, "workspace")),
    )


def test_efficient_backward_with_dropout_needs_more_shared_memory() -> None:
    call = {"heads": 16, "tokens": 1024, "size": 96, "dtype": bf16, "batch": 1}
    dropped = efficient(A40, dropout=0.1, **call).after[-1]
    assert isinstance(dropped, Extra)
    assert dropped.bytes == 16 * 4 * (16 * 2 * (4 + 64 * 64) + 12 * 64 * (128 + 128))


def test_efficient_backward_in_full_precision_sums_outside() -> None:
    found = efficient(A100, heads=8, tokens=100, size=64, dtype=fp32, batch=2)
    rows = 2 * 100 * 8
    sizes = [step.bytes if isinstance(step, Extra) else step for step in found.after]
    assert found.before == ()
    assert sizes == [rows * 64 * 4, rows * 4, rows * 4, 1, 0, 2 * 8 * 2 * (4 + 64 * 64) * 4]
    one_head = efficient(T4, heads=1, tokens=100, size=64, dtype=fp32, batch=2)
    sizes = [step.bytes if isinstance(step, Extra) else step for step in one_head.after]
    assert sizes == [200 * 64 * 4, 200 * 4, 0, 2 * 2 * (4 + 64 * 64) * 4]


def test_efficient_backward_on_volta_casts_wide_heads() -> None:
    found = efficient(V100, heads=8, tokens=100, size=256, dtype=half, batch=2)
    assert [step.name for step in found.after[:5] if isinstance(step, Extra)] == [
        "grad_out",
        "out",
        "grad_out * out",
        "sum",
        "delta",
    ]
    assert len(efficient(V100, heads=8, tokens=100, size=128, dtype=half, batch=2).after) == 2


def test_efficient_forward_accumulates_wide_heads() -> None:
    def forward(size: int, dtype: torch.dtype) -> Program | None:
        query = heads(8, 100, size, dtype)
        func = aten._scaled_dot_product_efficient_attention.default
        args = (query, query, query, None, True)
        return plain(CudaRules(A100, "sdpa").program(func, args, {}, func(*args)))

    assert forward(128, half) is None
    assert forward(256, fp32) is None
    assert forward(256, half) == Program(after=(Extra((2, 100, 8, 256), fp32, "output_accum"),))


@pytest.mark.parametrize(("size", "rounded"), [(64, 64), (72, 96), (128, 128), (136, 192), (256, 256)])
def test_flash_backward(size: int, rounded: int) -> None:
    found = backward_program(A100, "flash", heads=8, tokens=100, size=size, dtype=bf16, batch=2)
    assert found == Program(
        after=(Extra((2, 8, 128), fp32, "softmax_d"), Extra((2, 128, 8, rounded), fp32, "dq_accum")),
    )


def test_flash_backward_expands_grouped_heads() -> None:
    found = backward_program(A100, "flash", heads=8, keys=2, tokens=100, size=64, dtype=bf16, batch=2)
    expanded = Extra((2, 100, 8, 64), bf16, "")
    assert [step._replace(name="") for step in found.after[2:] if isinstance(step, Extra)] == [expanded, expanded]


@pytest.mark.parametrize(("device", "splits"), [(A100, 3), (H100, 4), (Device((8, 0), multiprocessors=16), 1)])
def test_flash_forward_splits_keys_to_fill_the_card(device: Device, splits: int) -> None:
    """Two heads of 2048 tokens are 64 blocks; the card holds two for each multiprocessor."""
    query = heads(2, 2048, 64, batch=1)
    func = aten._scaled_dot_product_flash_attention.default
    found = plain(CudaRules(device, "sdpa").program(func, (query, query, query), {}, func(query, query, query)))
    rows = splits * 2 * 2048
    sizes = {"softmax_lse_accum": rows * 4, "out_accum": rows * 64 * 4}
    extras = Program(after=tuple(Extra((nbytes,), torch.uint8, name) for name, nbytes in sizes.items()))
    assert found == (extras if splits > 1 else None)
    assert flash_splits(device.multiprocessor_count, 64, 8) == splits
    dropped = CudaRules(device, "sdpa").program(func, (query, query, query, 0.1), {}, func(query, query, query, 0.1))
    assert dropped == Program(after=(Extra((2,), torch.uint64, "rng_state"),))


def test_seeds_of_efficient_attention_lie_on_the_host() -> None:
    rules = CudaRules(T4, "sdpa")
    efficient_op, flash_op = (getattr(aten, f"_scaled_dot_product_{name}_attention").default for name in ("efficient", "flash"))
    assert [rules.on_host(efficient_op, position) for position in range(4)] == [False, False, True, True]
    assert not any(rules.on_host(flash_op, position) for position in range(9))


# --- the composite of attention ----------------------------------------------------------------------------------------


def attend(functions: CudaFunctions, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Calls]:
    calls = Calls()
    with functions, calls:
        out = F.scaled_dot_product_attention(*args, **kwargs)
        out.sum().backward()
    return out, calls


def test_flash_saves_its_log_sums_and_seeds() -> None:
    query, key = heads(8, 100, 64), heads(2, 100, 64)
    _, calls = attend(on(A100), query, key, key, is_causal=True, enable_gqa=True)
    (forward,) = calls.named("_scaled_dot_product_flash_attention")
    assert forward[:2] == [(2, 8, 100, 64), (2, 8, 100)]
    assert (2,) in forward
    (backward,) = calls.named("_scaled_dot_product_flash_attention_backward")
    assert backward == [(2, 8, 100, 64), (2, 2, 100, 64), (2, 2, 100, 64)]
    assert query.grad is not None
    assert key.grad is not None


def test_flash_pads_heads_to_eight() -> None:
    query = heads(8, 100, 60)
    out, calls = attend(on(A100), query, query, query)
    assert out.shape == (2, 8, 100, 60)
    assert calls.named("constant_pad_nd")[:3] == [[(2, 8, 100, 64)]] * 3
    assert calls.named("_scaled_dot_product_flash_attention")[0][0] == (2, 8, 100, 64)


@pytest.mark.parametrize(("trained", "rows"), [(True, 128), (False, 0)])
def test_efficient_saves_padded_log_sums_where_needed(trained: bool, rows: int) -> None:
    query = heads(8, 100, 64, half).detach().requires_grad_(trained)
    calls = Calls()
    with on(T4), calls:
        F.scaled_dot_product_attention(query, query, query)
    assert calls.named("_scaled_dot_product_efficient_attention")[0][:2] == [(2, 8, 100, 64), (2, 8, rows)]


def test_efficient_expands_and_aligns_masks() -> None:
    query = heads(8, 100, 64, half)
    _, calls = attend(on(T4), query, query, query, torch.empty(2, 1, 100, 100, dtype=torch.bool))
    made = [name for name, _ in calls.made]
    assert made.index("aten.scalar_tensor.default") < made.index("aten.where.self") < made.index("aten.constant_pad_nd.default")
    assert calls.named("constant_pad_nd") == [[(2, 1, 100, 104)]]
    _, calls = attend(on(T4), query, query, query, torch.empty(100, 104, dtype=half)[:, :100])
    assert calls.named("constant_pad_nd") == []
    assert [(2, 8, 100, 100)] in calls.named("expand")


def test_cudnn_saves_one_sum_per_row() -> None:
    query, key = heads(8, 100, 64), heads(2, 100, 64)
    mask = torch.empty(2, 1, 100, 100, dtype=torch.bool)
    _, calls = attend(on(H100), query, key, key, mask, enable_gqa=True)
    (forward,) = calls.named("_scaled_dot_product_cudnn_attention")
    assert forward[:2] == [(2, 8, 100, 64), (2, 8, 100, 1)]
    assert calls.named("_scaled_dot_product_cudnn_attention_backward") == [[(2, 8, 100, 64), (2, 2, 100, 64), (2, 2, 100, 64)]]


def test_pinned_backends() -> None:
    query = heads(8, 100, 64, half)
    mask = torch.empty(2, 1, 100, 100, dtype=torch.bool)
    for device, attention, name in ((H100, "flash", "flash"), (H100, "efficient", "efficient"), (A100, "eager", "flash")):
        _, calls = attend(on(device, attention), query, query, query)
        assert len(calls.named(f"_scaled_dot_product_{name}_attention")) == 1
    key = heads(2, 100, 64, half)
    _, calls = attend(on(A100, "efficient"), query, key, key, mask, enable_gqa=True)
    assert len(calls.named("_scaled_dot_product_efficient_attention")) == 1
    for device, attention, size in ((T4, "flash", 64), (A100, "efficient", 60)):
        with pytest.raises(UserError, match=f"2x8x100x{size}"), on(device, attention):
            F.scaled_dot_product_attention(*[heads(8, 100, size, half)] * 3)


def real_ops(run: Callable[[], Any]) -> list[tuple[str, list[tuple[int, ...]]]]:
    calls = Calls()
    with calls:
        run()
    views = ("device", "transpose", "expand", "view", "unsqueeze", "alias", "detach", "_unsafe_view")
    return [made for made in calls.made if made[0].split(".")[1] not in views]


@pytest.mark.parametrize("dtype", [bf16, fp32])
@pytest.mark.parametrize("case", ["plain", "causal", "bool", "float", "grouped"])
def test_math_runs_the_ops_of_the_composite(dtype: torch.dtype, case: str) -> None:
    """The same ops as torch's own composite, but for the mask: it is added in place unless a dispatch mode watches."""
    query, key = heads(4, 10, 12, dtype).detach(), heads(2 if case == "grouped" else 4, 10, 12, dtype).detach()
    masks = {"bool": torch.empty(2, 1, 10, 10, dtype=torch.bool), "float": torch.empty(2, 1, 10, 10, dtype=dtype)}
    call = Call(query, key, key, masks.get(case), 0.0, case == "causal", case == "grouped")
    with sdpa_kernel(SDPBackend.MATH):
        own = real_ops(
            lambda: F.scaled_dot_product_attention(query, key, key, call.mask, 0.0, call.causal, enable_gqa=call.grouped)
        )
    ours = real_ops(lambda: math_attention(call, None))
    assert [(name.replace("aten.add.Tensor", "aten.add_.Tensor"), shapes) for name, shapes in own] == ours


def test_math_drops_out_with_the_fused_kernel() -> None:
    query = heads(4, 10, 12, bf16)
    _, calls = attend(on(T4), query, query, query, dropout_p=0.5)
    assert calls.named("native_dropout") == [[(2, 4, 10, 10)] * 2]
    assert len(calls.named("_safe_softmax")) == 1
    assert len(calls.named("_softmax_backward_data")) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_takes_the_same_kernel(reentrant: bool) -> None:
    def block(query: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, query, query)

    for differentiate in (torch.Tensor.backward, torch.autograd.backward):
        query, calls = heads(8, 100, 64), Calls()
        with on(A100), calls:
            differentiate(checkpoint(block, query, use_reentrant=reentrant).sum())
        assert len(calls.named("_scaled_dot_product_flash_attention")) == 2
        assert len(calls.named("_scaled_dot_product_flash_attention_backward")) == 1


# --- the other composites ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "softmax", [F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax]
)
def test_softmax_from_half_to_single_is_one_kernel(softmax: Callable[..., torch.Tensor]) -> None:
    for dtype, casts in ((half, 0), (bf16, 1)):
        calls = Calls()
        with on(A100), calls:
            assert softmax(torch.empty(4, 8, dtype=dtype), dim=-1, dtype=fp32).dtype == fp32
        assert len(calls.named("_to_copy")) == casts
    with on(A100):
        assert softmax(torch.empty(4, 8, dtype=half), dim=-1).dtype == half


def test_dropout_keeps_a_mask_of_bools() -> None:
    x = torch.empty(4, 8, dtype=bf16, requires_grad=True)
    for drop in (lambda: F.dropout(x, 0.1), lambda: nn.Dropout(0.1)(x), lambda: torch.dropout(x, 0.1, True)):
        with on(A100):
            assert type(drop().grad_fn).__name__ == "NativeDropoutBackward0"
    with on(A100):
        assert F.dropout(x, 0.0) is x or F.dropout(x, 0.0).grad_fn is not None
        assert type(F.dropout(x, 0.1, training=False).grad_fn).__name__ != "NativeDropoutBackward0"


def test_one_hot_does_not_read_its_indices() -> None:
    calls = Calls()
    with on(A100), calls:
        assert F.one_hot(torch.empty(4, 8, dtype=torch.int64), 10).shape == (4, 8, 10)
    assert [name for name, _ in calls.made if "item" in name or "scalar" in name] == []


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_rms_norm_is_fused() -> None:
    x = torch.empty(4, 100, 64, dtype=bf16, requires_grad=True)
    weight = torch.empty(64, dtype=bf16, requires_grad=True)
    saved: list[tuple[int, ...]] = []
    with on(A100), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        out = F.rms_norm(x, [64], weight)
        F.rms_norm(x, [64]).sum().backward()
    assert saved[:3] == [(4, 100, 64), (64,), (4, 100, 1)]
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert weight.grad.dtype == bf16
    calls = Calls()
    with on(A100), calls:
        nn.RMSNorm(64, dtype=fp32)(x)
    assert len(calls.named("rsqrt")) == 1


def test_multi_head_attention_reaches_the_kernel() -> None:
    layer, calls = nn.MultiheadAttention(128, 2, dropout=0.1, batch_first=True, dtype=bf16), Calls()
    x = torch.empty(2, 100, 128, dtype=bf16)
    with on(A100), calls:
        layer(x, x, x, need_weights=False)[0].sum().backward()
        layer(x, x, x)[0].sum().backward()
    assert len(calls.named("_scaled_dot_product_flash_attention")) == 1
    assert len(calls.named("native_dropout")) == 1


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_replacements_work_without_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    replacements = on(A100).replacements
    for name in ("scaled_dot_product_attention", "multi_head_attention_forward", "dropout", "one_hot", "rms_norm", "softmax"):
        monkeypatch.setattr(F, name, replacements[getattr(F, name)])
    monkeypatch.setattr(torch, "rms_norm", replacements[torch.rms_norm])
    x = torch.empty(2, 100, 128, dtype=bf16)
    calls = Calls()
    with calls:
        nn.MultiheadAttention(128, 2, dropout=0.1, batch_first=True, dtype=bf16)(x, x, x, need_weights=False)
        nn.RMSNorm(128, dtype=fp32)(x)
    assert len(calls.named("_scaled_dot_product_flash_attention")) == 1
