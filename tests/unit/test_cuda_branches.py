"""Branches that torch takes on real tensors only: in-place sums, fp32 statistics. The oracle is torch without any mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oomph.live.cuda_rules import CudaFunctions, CudaRules, Device, as_unwatched

bf16, fp32 = torch.bfloat16, torch.float32
ROWS, COLUMNS = 8, 6
A100 = CudaRules(Device((8, 0)), "sdpa")

Step = Callable[[Tensor], Tensor]


class Tracer(TorchDispatchMode):
    """The ops that run with the rewriting of `as_unwatched`; it watches every storage, as a tracer does."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.made: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, args = as_unwatched(func, args, kwargs or {})
        self.ops.append(func._schema.name.removeprefix("aten::"))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                weakref.finalize(storage, self.ops.__len__)
                self.made.append((tuple(tensor.shape), tensor.dtype))
        return out


def only(ops: list[str], wanted: tuple[str, ...]) -> list[str]:
    return [op for op in ops if op in wanted]


@pytest.fixture(scope="module")
def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(COLUMNS, COLUMNS), nn.Linear(COLUMNS, COLUMNS), nn.LayerNorm(COLUMNS)])


def compare(step: Step, wanted: tuple[str, ...], layers: nn.ModuleList) -> list[str]:
    """The `wanted` ops of a step's backward: in a profile of real tensors, and traced; both must be the same."""
    layers.zero_grad()
    out = step(torch.randn(ROWS, COLUMNS, requires_grad=True))
    gradient = torch.ones_like(out)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        out.backward(gradient)
    real = only([event.name.removeprefix("aten::") for event in profiled.events()], wanted)
    layers.zero_grad()
    with FakeTensorMode(allow_non_fake_inputs=True), Tracer() as tracer:
        out = step(torch.randn(ROWS, COLUMNS).requires_grad_())
        gradient = torch.ones_like(out)
        tracer.ops.clear()
        out.backward(gradient)
    assert only(tracer.ops, wanted) == real
    return real


def once(use: Step) -> Step:
    """A step on an activation instead of a parameter."""
    return lambda x: use(x * 1.0)


@pytest.mark.parametrize(
    ("use", "in_place"),
    [
        (lambda h: h * 2 + h * 3 + h * 4, [True, True]),
        (lambda h: h + h, [False]),
        (lambda h: h * h, [True]),
        (lambda h: h * h.exp(), [True]),
        (lambda h: (h.sum() + h.mean()).view(1), [True]),
        (lambda h: h.view(-1).view(ROWS, COLUMNS) + h * 2, [True]),
        (lambda h: h.t() @ h, [True]),
        (lambda h: h[:, :3] * h[:, 3:], [True]),
        (lambda h: h[None].expand(3, ROWS, COLUMNS) * 1 + h, [False]),
        (lambda h: torch.cat([h, h]), [False]),
        (lambda h: torch.stack([h, h * 2]), [False]),
        (lambda h: (h.view(ROWS, 2, 3).transpose(0, 1) * 1).transpose(0, 1).reshape(ROWS, COLUMNS) + h, [False]),
    ],
)
def test_gradients_of_one_tensor_are_added_as_torch_adds_them(use: Step, in_place: list[bool], layers: nn.ModuleList) -> None:
    assert compare(once(use), ("add", "add_"), layers) == ["add_" if sole else "add" for sole in in_place]


def test_residual_stream(layers: nn.ModuleList) -> None:
    first, second, norm = layers

    def step(x: Tensor) -> Tensor:
        h = x * 1.0
        h = h + first(norm(h))
        return h + second(norm(h))

    sums = compare(step, ("add", "add_"), layers)
    assert sums.count("add_") == 3, "the caller holds the outermost gradient, nobody the inner one"


def test_tied_weight(layers: nn.ModuleList) -> None:
    tied = layers[0].weight

    def step(x: Tensor) -> Tensor:
        return F.linear(x + F.embedding(torch.zeros(ROWS, dtype=torch.long), tied), tied)

    assert compare(step, ("add", "add_"), layers) == ["add"], "the first gradient is a transposed view, whose base stays"


def test_sums_in_autograd_functions_are_left_alone(layers: nn.ModuleList) -> None:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Tensor:
            double, triple = grads[0] * 2, grads[0] * 3
            return double + triple

    def step(x: Tensor) -> Tensor:
        out: Tensor = Sum.apply(x)
        return out

    assert compare(once(step), ("add", "add_"), layers) == ["add"]


_ROWS = torch.tensor([0, 3, 3, 1, 7])


@pytest.mark.parametrize(
    ("use", "op"),
    [
        (lambda h: h[_ROWS], "_index_put_impl_"),
        (lambda h: h.gather(1, _ROWS[:, None] % COLUMNS), "scatter_add_"),
        (lambda h: h.take_along_dim(_ROWS[:1, None] % ROWS, 0), "scatter_add_"),
        (lambda h: h.topk(2)[0], "scatter_"),
        (lambda h: h.sort()[0], "scatter_"),
        (lambda h: h.max(-1)[0], "scatter_"),
        (lambda h: h.median(-1)[0], "scatter_"),
    ],
)
def test_gradients_of_selections_are_scattered_in_place(use: Step, op: str, layers: nn.ModuleList) -> None:
    ops = ("index_put", "_index_put_impl_", "scatter", "scatter_", "scatter_add", "scatter_add_")
    assert compare(once(use), ops, layers) == [op]


def test_gradient_of_index_select(layers: nn.ModuleList) -> None:
    """The real kernel may go on through scatter_add_; what counts is that nothing is copied."""
    with FakeTensorMode(allow_non_fake_inputs=True), Tracer() as tracer:
        (torch.randn(ROWS, COLUMNS).requires_grad_() * 1.0).index_select(0, _ROWS).sum().backward()
    assert "index_add_" in tracer.ops
    assert "index_add" not in tracer.ops


SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    "config",
    [hf.LlamaConfig(**SMALL), hf.Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)],
    ids=["dense", "experts"],
)
def test_whole_models_write_in_place_where_torch_does(config: hf.PretrainedConfig) -> None:
    """Every sum and every scatter of a model's backward, in order."""
    base = ("add", "index_put", "_index_put_impl", "scatter", "scatter_add", "index_add")
    wanted = (*base, *(f"{name}_" for name in base))

    def loss() -> Tensor:
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=bf16)
        tokens = torch.ones(2, 16, dtype=torch.long)
        out: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return out

    real_loss = loss()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        real_loss.backward()
    real = only([event.name.removeprefix("aten::") for event in profiled.events()], wanted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_loss = loss()
        with Tracer() as tracer:
            fake_loss.backward()
    assert only(tracer.ops, wanted) == real
    assert real.count("add_") > 15


def test_forward_is_left_alone() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Tracer() as tracer:
        x = torch.randn(ROWS, COLUMNS)
        x.index_add(0, _ROWS, torch.randn(5, COLUMNS)) + x.scatter_add(0, _ROWS[None], x)
    assert only(tracer.ops, ("index_add", "index_add_", "scatter_add", "scatter_add_", "add", "add_")) == [
        "index_add",
        "scatter_add",
        "add",
    ]


# --- composites --------------------------------------------------------------------------------------------------------


def traced(step: Callable[[], Any]) -> Tracer:
    with FakeTensorMode(), CudaFunctions(A100), Tracer() as tracer:
        step()
    return tracer


@pytest.mark.parametrize("functional", [F.layer_norm, torch.layer_norm])
def test_layer_norm_saves_statistics_in_fp32(functional: Callable[..., Tensor]) -> None:
    def step() -> None:
        x, weight = (torch.empty(*shape, dtype=bf16, requires_grad=True) for shape in ((4, 10, 64), (64,)))
        out = functional(x, [64], weight, weight)
        out.sum().backward()
        assert out.dtype == x.grad.dtype == weight.grad.dtype == bf16
        assert weight.grad.shape == (64,)

    tracer = traced(step)
    assert tracer.made.count(((4, 10, 1), fp32)) == 2
    assert ((4, 10, 1), bf16) not in tracer.made
    assert tracer.ops.count("native_layer_norm_backward") == 1


def test_layer_norm_of_other_tensors_is_torchs_own() -> None:
    x = torch.randn(4, 8, dtype=bf16)
    with CudaFunctions(A100):
        assert torch.equal(F.layer_norm(x, [8]), nn.LayerNorm(8, elementwise_affine=False)(x))
    tracer = traced(lambda: nn.LayerNorm(8)(torch.empty(4, 8)))
    assert "native_layer_norm" in tracer.ops


def test_linear_adds_its_bias_in_place() -> None:
    def step(dims: str) -> Tracer:
        layer = nn.Linear(COLUMNS, 4)
        shapes = {"strided": (2, 3, COLUMNS), "dense": (2, 3, COLUMNS), "matrix": (5, COLUMNS)}
        x = torch.empty(shapes[dims])
        return layer(x.transpose(0, 1) if dims == "strided" else x)

    wanted = ("add", "add_", "addmm")
    assert only(traced(lambda: step("strided")).ops, wanted) == ["add_"]
    assert only(traced(lambda: step("dense")).ops, wanted) == ["addmm"]
    assert only(traced(lambda: step("matrix")).ops, wanted) == ["addmm"]
    x, layer = torch.randn(2, 3, COLUMNS).transpose(0, 1), nn.Linear(COLUMNS, 4)
    expected = layer(x)
    with CudaFunctions(A100):
        assert torch.allclose(layer(x), expected)
