"""Every rule has a name, and without it something changes: an allocation, a workspace, a place, an operator."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.masking_utils as masking
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from oomph.core.layout import Shape
from oomph.live.cuda_rules import RULES, CudaFunctions, CudaRules, Device, as_unwatched
from oomph.live.cuda_rules.rules import TABLE
from oomph.live.fake import answering
from oomph.live.simulate import Setup, Simulator

aten = torch.ops.aten
half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
V100, A100, H100 = Device((7, 0)), Device((8, 0)), Device((9, 0))
T4 = Device((7, 5), unified_workspaces=False)

Step = Callable[[], Any]


class Seen(TorchDispatchMode):
    """What each operator returns, allocates besides, and needs of libraries."""

    def __init__(self, rules: CudaRules) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self._rules = rules

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        func, args = as_unwatched(func, args, kwargs, self._rules.without)
        out = func(*args, **kwargs)
        made = [(leaf.dtype, self._rules.on_host(func, n)) for n, leaf in enumerate(tree_leaves(out)) if torch.is_tensor(leaf)]
        program = self._rules.program(func, args, kwargs, out)
        self.calls.append((str(func), made, program and program.peak_bytes, self._rules.workspaces(func, args, kwargs)))
        return out


def seen(device: Device, step: Step, without: Collection[str]) -> list[Any]:
    """The operators of a step, forward and backward, and whether it can run at all."""
    rules = CudaRules(device, "sdpa", without)
    with FakeTensorMode(), CudaFunctions(rules), Seen(rules) as watching:
        try:
            out = step()
            if torch.is_tensor(out) and out.requires_grad:
                out.float().sum().backward()
        except RuntimeError as error:
            watching.calls.append(type(error))
    return watching.calls


def leaf(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype).requires_grad_()


def longs(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.long)


def attend(dtype: torch.dtype, size: int = 64) -> Step:
    return lambda: F.scaled_dot_product_attention(*[leaf(2, 4, 64, size, dtype=dtype)] * 3)


def grouped() -> torch.Tensor:
    return torch._grouped_mm(torch.empty(64, 32, dtype=bf16), torch.empty(8, 32, 48, dtype=bf16), longs(8).int())


def masked() -> torch.Tensor:
    return torch.empty(4, 8).masked_scatter(torch.ones(4, 8, dtype=torch.bool), torch.empty(32))


STEPS: dict[str, tuple[Device, Step]] = {
    "attention-backend": (T4, attend(half)),
    "bias-in-place": (A100, lambda: F.linear(leaf(2, 3, 4).transpose(0, 1), leaf(5, 4), leaf(5))),
    "convolution-workspace": (A100, lambda: F.conv2d(leaf(2, 3, 28, 28), leaf(8, 3, 14, 14), stride=14)),
    "cublas-workspace": (T4, lambda: torch.empty(2, 4) @ torch.empty(4, 8)),
    "cublaslt-workspace": (T4, lambda: torch.addmm(torch.empty(8), torch.empty(2, 4), torch.empty(4, 8))),
    "cudnn-attention": (H100, attend(bf16)),
    "efficient-attention": (T4, attend(half)),
    "embedding-backward": (A100, lambda: F.embedding(longs(4000), leaf(100, 8))),
    "flash-attention": (A100, attend(bf16)),
    "foreach-norm": (A100, lambda: torch._foreach_norm([torch.empty(8)], 2)),
    "grouped-products": (H100, grouped),
    "half-to-float-softmax": (T4, lambda: F.softmax(leaf(2, 8, dtype=half), -1, dtype=fp32)),
    "host-seeds": (T4, attend(half)),
    "index-backward": (A100, lambda: leaf(8, 4)[longs(5)]),
    "mask-coordinates": (A100, masked),
    "native-dropout": (A100, lambda: F.dropout(leaf(2, 8), 0.1)),
    "norm-kernels": (A100, lambda: F.layer_norm(leaf(2, 8), [8])),
    "norm-temporaries": (A100, lambda: F.layer_norm(leaf(2, 8, 4, dtype=fp32).transpose(1, 2), [8])),
    "one-hot": (A100, lambda: F.one_hot(longs(4), 8)),
    "reductions": (A100, lambda: torch.ones(2, 8, dtype=torch.bool).sum()),
    "softmax-backward-temporary": (T4, lambda: F.softmax(leaf(2, 8), -1)),
    "softmax-temporaries": (V100, attend(bf16)),
    "sorts-and-scans": (A100, lambda: torch.empty(2, 8).sort()),
    "strided-copies": (A100, lambda: torch.empty(8, 8)[:, ::2] @ torch.empty(4, 8)),
    "unwatched-in-place": (A100, lambda: (lambda h: h * 2 + h * 3)(leaf(4) * 1.0)),
}


def packed(without: Collection[str]) -> Any:
    with answering(without), FakeTensorMode():
        return masking.find_packed_sequence_indices(torch.arange(8)[None]) is None


def bitsandbytes(without: Collection[str]) -> Any:
    pytest.importorskip("bitsandbytes")
    func = torch.ops.bitsandbytes.int8_vectorwise_quant.default
    return CudaRules(T4, "sdpa", without).program(func, (torch.empty(4, 8, dtype=half), 6.0), {}, [torch.empty(4, 8)])


def autocast(without: Collection[str]) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="eager").train()
    setup = Setup("eager", "full", "adamw-foreach", "none", "none", (8, 0), False, "bfloat16-mixed", frozenset(without))
    trace = Simulator(model, setup, 2, None).trace(Shape(2, 8, 0))
    return [(storage.kind.op, storage.kind.dtype) for storage in trace.storages]


OTHERS = {"packed-mask-dropped": packed, "bitsandbytes": bitsandbytes, "autocast": autocast}


@pytest.mark.parametrize("name", sorted(RULES))
def test_without_a_rule_something_changes(name: str) -> None:
    if name in OTHERS:
        assert OTHERS[name](()) != OTHERS[name]((name,))
        return
    device, step = STEPS[name]
    assert seen(device, step, ()) != seen(device, step, (name,))


@pytest.mark.parametrize("name", sorted(STEPS))
def test_other_names_change_nothing(name: str) -> None:
    """A step whose operators another rule does not cover is the same without that rule."""
    device, step = STEPS["softmax-backward-temporary"]
    touched = {"softmax-backward-temporary", "reductions", "half-to-float-softmax", "strided-copies"}
    if name not in touched:
        assert seen(device, step, ()) == seen(device, step, (name,))


def test_every_rule_has_a_name() -> None:
    functions = CudaFunctions(CudaRules(A100, "sdpa"))
    named = {*TABLE, *functions._branches(), *OTHERS}
    others = {"cublas-workspace", "cublaslt-workspace", "host-seeds", "unwatched-in-place"}
    assert named | others == RULES.keys()
    covered = [func for rules in TABLE.values() for func in rules]
    assert len(covered) == len(set(covered)), "no operator stands under two names"


def test_without_all_of_them_nothing_is_replaced() -> None:
    functions = CudaFunctions(CudaRules(T4, "sdpa", RULES))
    assert list(functions.replacements) == [F.multi_head_attention_forward]
    with FakeTensorMode():
        layer, x = torch.nn.MultiheadAttention(16, 2, dropout=0.1), torch.empty(4, 2, 16)
        with functions:
            out = layer(x, x, x)[0]
        assert out.shape == x.shape


def test_a_name_of_no_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="no CUDA rule is called nonsense"):
        CudaRules(A100, "sdpa", ("reductions", "nonsense"))
