"""Autocast in a trace is CUDA's: its lists, its casts in their order, its cache, and who asks about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from oomph.live.cuda_rules import CudaFunctions, CudaRules, Device, autocast, cuda_autocast
from oomph.live.cuda_rules.autocast import POLICIES, Policy
from oomph.live.offload import host_memory

aten = torch.ops.aten
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

# Registered beside the header's lists (ATen/autocast_mode.cpp).
BESIDE: dict[str, Policy] = {
    "cudnn_convolution": "lower_precision_fp",
    "cudnn_convolution_transpose": "lower_precision_fp",
    "binary_cross_entropy": "banned",
}


def header() -> dict[str, Policy]:
    """Policies by operator, from the macros of the header that comes with torch."""
    text = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text(encoding="utf-8").replace("\\\n", "")
    found: dict[str, Policy] = {}
    names: dict[str, Policy] = {
        "LOWER_PRECISION_FP": "lower_precision_fp",
        "FP32": "fp32",
        "FP32_SET_OPT_DTYPE": "fp32_set_opt_dtype",
        "PROMOTE": "promote",
    }
    for macro, policy in names.items():
        (body,) = re.findall(rf"#define AT_FORALL_{macro}\(_\)(.*)", text)
        for name, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", body):
            found[f"{name}.{overload}" if overload else name] = policy
    (body,) = re.findall(r"#define AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE\(_\)(.*)", text)
    return found | dict.fromkeys(re.findall(r'"([\w.]+)"', body), "fp32_append_dtype")


LISTS = header()


def test_the_lists_are_those_of_the_header() -> None:
    assert len(LISTS) > 100
    assert LISTS | BESIDE == POLICIES


def test_the_lists_are_what_torch_registers_for_cuda() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    registered = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")]
    assert {name.removeprefix("aten::") for name in registered} == set(POLICIES)


class Calls(TorchDispatchMode):
    """The operators that ran, with the shapes and dtypes of the tensors that they were given and of the first they made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [(tuple(a.shape), a.dtype) for a in args if isinstance(a, Tensor)]
        first = out[0] if isinstance(out, tuple | list) else out
        if func is not torch.ops.prim.device.default:
            self.made.append((str(func), given, first.dtype if isinstance(first, Tensor) else None))
        return out

    def casts(self) -> list[tuple[int, ...]]:
        """The shapes of what was cast, in order."""
        return [given[0][0] for op, given, _ in self.made if op == "aten._to_copy.default"]


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.fixture
def _cuda() -> Iterator[None]:
    with cuda_autocast():
        yield


def new(*shape: int, dtype: torch.dtype = fp32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def leaf(*shape: int) -> Tensor:
    return torch.empty(shape).requires_grad_()


def under(call: Callable[[], Any], dtype: torch.dtype = bf16) -> Calls:
    with Calls() as calls, torch.autocast("cpu", dtype):
        call()
    return calls


# The CPU's autocast has the same policy for these as CUDA's: its compiled kernels show what is cast, and in which order.
ALIKE: dict[str, Callable[[], Any]] = {
    "linear": lambda: aten.linear(new(2, 3, 8), leaf(4, 8), leaf(4)),
    "matmul": lambda: aten.matmul(new(2, 3, 8), new(8, 4, dtype=bf16)),
    "mm": lambda: aten.mm(new(3, 8), leaf(8, 4)),
    "bmm": lambda: aten.bmm(new(2, 3, 8), new(2, 8, 4)),
    "addmm": lambda: aten.addmm(new(4), new(3, 8), new(8, 4)),
    "baddbmm": lambda: aten.baddbmm(new(2, 3, 4), new(2, 3, 8), new(2, 8, 4), beta=0.5),
    "conv2d": lambda: aten.conv2d(new(1, 3, 8, 8), leaf(4, 3, 2, 2), leaf(4), [2, 2]),
    "conv1d": lambda: aten.conv1d(new(1, 3, 8), leaf(4, 3, 2)),
    "scaled_dot_product_attention": lambda: aten.scaled_dot_product_attention(
        new(1, 2, 4, 8), new(1, 2, 5, 8), new(1, 2, 5, 16), attn_mask=new(4, 5)
    ),
    "nll_loss": lambda: aten.nll_loss(new(3, 8, dtype=bf16), torch.empty(3, dtype=torch.long), new(8, dtype=bf16)),
    "mse_loss": lambda: aten.mse_loss(new(3, dtype=bf16), new(3, dtype=bf16)),
    "binary_cross_entropy_with_logits": lambda: aten.binary_cross_entropy_with_logits(new(3, dtype=bf16), new(3, dtype=bf16)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_casts_are_those_of_the_compiled_kernels(name: str) -> None:
    compiled = under(ALIKE[name])
    with cuda_autocast():
        assert under(ALIKE[name]).made == compiled.made
    assert compiled.casts()


long, half = torch.long, {"dtype": bf16}
EACH: dict[str, Callable[[], Tensor]] = {
    "einsum": lambda: aten.einsum("ij,jk->ik", [new(3, 8), new(8, 4)]),
    "mv": lambda: aten.mv(new(3, 8), new(8)),
    "linalg_multi_dot": lambda: aten.linalg_multi_dot([new(3, 8), new(8, 4), new(4, 2)]),
    "prelu": lambda: aten.prelu(new(2, 3), new(3)),
    "exp": lambda: aten.exp(new(3, **half)),
    "log": lambda: aten.log(new(3, **half)),
    "rsqrt": lambda: aten.rsqrt(new(3, **half)),
    "pow.Tensor_Scalar": lambda: aten.pow.Tensor_Scalar(new(3, **half), 2),
    "softplus": lambda: aten.softplus(new(3, **half)),
    "layer_norm": lambda: aten.layer_norm(new(2, 8, **half), [8], new(8, **half), new(8, **half)),
    "rms_norm": lambda: aten.rms_norm(new(2, 8, **half), [8], new(8)),
    "group_norm": lambda: aten.group_norm(new(2, 8, 4, **half), 2),
    "nll_loss": lambda: aten.nll_loss(new(3, 8, **half), torch.empty(3, dtype=long)),
    "logsumexp": lambda: aten.logsumexp(new(3, 8, **half), [-1]),
    "upsample_bilinear2d": lambda: aten.upsample_bilinear2d(new(1, 3, 4, 4, **half), [8, 8], False),
    "softmax.int": lambda: aten.softmax.int(new(3, 8, **half), -1),
    "log_softmax.int": lambda: aten.log_softmax.int(new(3, 8, **half), -1),
    "cumsum": lambda: aten.cumsum(new(3, 8, **half), 0),
    "sum": lambda: aten.sum(new(3, 8, **half)),
    "sum.dim_IntList": lambda: aten.sum.dim_IntList(new(3, 8, **half), [0]),
    "linalg_vector_norm": lambda: aten.linalg_vector_norm(new(3, 8, **half)),
    "norm.Scalar": lambda: aten.norm.Scalar(new(3, 8, **half)),
    "norm.ScalarOpt_dim": lambda: aten.norm.ScalarOpt_dim(new(3, 8, **half), 2, [0]),
    "addcmul": lambda: aten.addcmul(new(3, **half), new(3), new(3, **half)),
    "index_put": lambda: aten.index_put(new(3, **half), [torch.empty(2, dtype=long)], new(2)),
    "scatter_add": lambda: aten.scatter_add(new(3, **half), 0, torch.empty(2, dtype=long), new(2)),
}


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("name", EACH)
def test_results_have_the_dtype_that_the_header_says(name: str) -> None:
    with torch.autocast("cpu", bf16):
        assert EACH[name]().dtype == (bf16 if LISTS[name] == "lower_precision_fp" else fp32)


@pytest.mark.usefixtures("_cuda")
def test_what_the_caller_says_about_the_dtype_stands() -> None:
    with torch.autocast("cpu", bf16):
        assert torch.softmax(new(3, 8), -1, dtype=bf16).dtype == bf16
        assert new(3, 8).sum(dtype=bf16).dtype == bf16
        assert torch.empty(3, dtype=torch.long).sum().dtype == torch.long
        assert torch.mm(new(3, 8).double(), new(8, 4).double()).dtype == torch.float64
        assert aten.addcmul(*(new(3, dtype=bf16) for _ in range(3))).dtype == bf16


@pytest.mark.usefixtures("_cuda")
def test_cuda_refuses_what_the_cpu_casts() -> None:
    with torch.autocast("cpu", bf16), pytest.raises(RuntimeError, match="binary_cross_entropy"):
        F.binary_cross_entropy(new(3), new(3))
    with torch.autocast("cpu", bf16), pytest.raises(RuntimeError, match="promotes"):
        aten.addcmul(*(new(3, dtype=fp16) for _ in range(3)))


@pytest.mark.usefixtures("_cuda")
def test_operators_of_the_cpus_lists_alone_pass_through() -> None:
    calls = under(lambda: torch.cat([new(2, dtype=bf16), new(3)]))
    assert [op for op, _, _ in calls.made if op != "aten.empty.memory_format"] == ["aten.cat.default"]
    calls = under(lambda: F.cross_entropy(new(3, 8, dtype=bf16), torch.empty(3, dtype=torch.long)))
    dtypes = {op: out for op, _, out in calls.made}
    assert dtypes["aten._log_softmax.default"] == bf16
    assert dtypes["aten.nll_loss_forward.default"] == fp32


# The cache.


@pytest.mark.usefixtures("_cuda")
def test_leaves_that_train_are_cast_once_others_at_each_use() -> None:
    trained, frozen, view, rows = leaf(4, 8), new(5, 8), leaf(6, 8)[:], new(3, 8, dtype=bf16)

    def run() -> None:
        for _ in range(2):
            for weight in (trained, frozen, view):
                F.linear(rows, weight)
            with torch.autocast("cpu", enabled=False):
                F.linear(rows.float(), frozen)

    assert under(run).casts() == [(4, 8), (5, 8), (6, 8), (3, 8), (5, 8), (6, 8), (3, 8)]
    assert under(run).casts() == under(run).casts()


@pytest.mark.usefixtures("_cuda")
def test_the_cache_outlives_its_leaves_as_in_torch() -> None:
    """``cached_casts`` holds a cast until the outermost autocast ends, whatever becomes of what was cast."""
    with torch.autocast("cpu", bf16):
        held = F.linear(new(3, 8, dtype=bf16), leaf(4, 8)).grad_fn
        assert held is not None
        assert autocast._casts is not None
        assert [cast.dtype for cast in autocast._casts.values()] == [bf16]
    assert not autocast._casts


@pytest.mark.usefixtures("_cuda")
def test_a_recomputed_block_casts_again_in_an_autocast_of_its_own() -> None:
    first, second, rows = leaf(8, 8), leaf(8, 8), leaf(3, 8)

    def block(hidden: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(hidden, first), second), first)

    with Calls() as forward, torch.autocast("cpu", bf16):
        out = checkpoint(block, rows, use_reentrant=False)
    with Calls() as backward:
        out.sum().backward()
    assert forward.casts() == [(8, 8), (3, 8), (8, 8)]
    casts = [given[0] for op, given, _ in backward.made if op == "aten._to_copy.default"]
    assert [shape for shape, dtype in casts if dtype == fp32] == [(8, 8), (3, 8), (8, 8)]
    assert first.grad is not None
    assert first.grad.dtype == fp32


@pytest.mark.usefixtures("_cuda")
def test_host_memory_is_not_cast() -> None:
    def on_the_host() -> None:
        with host_memory():
            torch.mm(new(3, 8), new(8, 4))

    assert under(on_the_host).casts() == []


# Who asks.


def test_autocast_for_cuda_is_what_is_on() -> None:
    plain = torch.autocast.__init__
    with cuda_autocast(), torch.autocast("cuda", fp16):
        assert torch.is_autocast_enabled()
        assert torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_gpu_dtype() == torch.get_autocast_dtype("cuda") == fp16
        assert torch.mm(new(3, 8), new(8, 4)).dtype == fp16
        with torch.autocast("cuda", enabled=False):
            assert not torch.is_autocast_enabled()
            assert torch.mm(new(3, 8), new(8, 4)).dtype == fp32
    assert not torch.is_autocast_enabled()
    assert torch.autocast.__init__ is plain


@pytest.mark.usefixtures("_cuda")
def test_custom_functions_are_told_what_cuda_would_tell_them() -> None:
    seen: dict[str, Any] = {}

    class Doubled(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=fp32)
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            seen["forward"] = tensor.dtype, torch.is_autocast_enabled()
            return tensor * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            seen["backward"] = torch.is_autocast_enabled()
            return gradient * 2

    with torch.autocast("cuda", bf16):
        out = Doubled.apply(new(3, dtype=bf16).requires_grad_())  # type: ignore[no-untyped-call]
    out.sum().backward()
    assert seen == {"forward": (fp32, False), "backward": False}


def test_autocast_of_the_cpu_is_the_cpus_again_afterwards() -> None:
    with cuda_autocast():
        pass
    with torch.autocast("cpu", bf16):
        assert torch.exp(new(3, dtype=bf16)).dtype == bf16
        assert torch.cat([new(3, dtype=bf16), new(3)]).dtype == fp32
        assert F.binary_cross_entropy(new(3, dtype=bf16), new(3)).dtype == fp32


# Composite functions, written out.


def written_out(call: Callable[[], Any], dtype: torch.dtype = bf16, device: Device | None = None) -> Calls:
    with cuda_autocast(), CudaFunctions(CudaRules(device or Device((8, 0)), "sdpa")), Calls() as calls:
        with torch.autocast("cpu", dtype):
            call()
    return calls


def test_attention_runs_in_16_bits() -> None:
    heads = [new(1, 4, 128, 64) for _ in range(3)]
    calls = written_out(lambda: F.scaled_dot_product_attention(*heads, is_causal=True))
    assert calls.casts() == [(1, 4, 128, 64)] * 3
    assert calls.made[-1][0] == "aten._scaled_dot_product_flash_attention.default"
    assert calls.made[-1][2] == bf16
    masked = written_out(lambda: F.scaled_dot_product_attention(*heads, attn_mask=new(128, 128)))
    assert masked.casts() == [(128, 128), *[(1, 4, 128, 64)] * 3]
    assert written_out(lambda: F.scaled_dot_product_attention(*heads), fp16, Device((7, 5))).made[-1][2] == fp16


def test_linear_norms_and_softmax_written_out_follow_the_lists() -> None:
    strided = new(2, 8, 3).transpose(1, 2)
    calls = written_out(lambda: F.linear(strided, leaf(4, 8), leaf(4)))
    assert calls.casts() == [(4,), (4, 8), (2, 3, 8)]
    assert calls.made[-1][::2] == ("aten.add_.Tensor", bf16)
    calls = written_out(lambda: F.rms_norm(new(2, 8, dtype=bf16), [8], leaf(8)))
    assert calls.casts() == [(2, 8)]
    assert calls.made[-1][::2] == ("oomph_cuda.rms_norm.default", fp32)
    calls = written_out(lambda: F.layer_norm(new(2, 8, dtype=bf16), [8], new(8, dtype=bf16), leaf(8)))
    assert calls.casts() == [(8,), (2, 8)]
    assert calls.made[-1][::2] == ("aten.native_layer_norm.default", fp32)


def test_softmax_of_float16_is_one_kernel_into_float32() -> None:
    for call in (
        lambda: F.softmax(new(3, 8, dtype=fp16), -1),
        lambda: new(3, 8, dtype=fp16).softmax(-1),
        lambda: torch.log_softmax(new(3, 8, dtype=fp16), -1),
    ):
        calls = written_out(call, fp16)
        assert not calls.casts()
        assert calls.made[-1][2] == fp32
    assert written_out(lambda: F.softmax(new(3, 8, dtype=bf16), -1)).casts() == [(3, 8)]


def test_multi_head_attention_runs_in_16_bits() -> None:
    with torch.device("cpu"):
        attention = nn.MultiheadAttention(32, 4, batch_first=True)
    rows = new(2, 16, 32)
    calls = written_out(lambda: attention(rows, rows, rows, need_weights=False))
    products = [out for op, _, out in calls.made if op in ("aten.mm.default", "aten.addmm.default") or "attention" in op]
    assert len(products) >= 3
    assert set(products) == {bf16}
