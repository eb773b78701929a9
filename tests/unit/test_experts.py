"""Dispatch: padding goes to no expert, choices do not depend on neighbours, and transformers' own blocks compute the same."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from oomph.live import experts as module
from oomph.live.experts import MixtureOfExperts, Router

HIDDEN, INNER, COUNT = 16, 32, 4


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj, self.act = nn.Linear(INNER, HIDDEN, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


def mixture_of(dense: Callable[[], nn.Module], top_k: int = 2) -> MixtureOfExperts:
    torch.manual_seed(0)
    mixture = MixtureOfExperts(dense(), COUNT, top_k)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return mixture


def watched(mixture: MixtureOfExperts, padded: Tensor) -> MixtureOfExperts:
    """The mixture, told which tokens are padding."""

    class Teller(SimpleNamespace):
        def __call__(self, *given: Any) -> Tensor:
            weights: Tensor = given[3]
            return weights

    mixture.router.watch = Teller(padded=padded)
    return mixture


class Undefined(torch.autograd.Function):
    """A grouped product that leaves rows behind the last group undefined, as the CUDA kernel does: they are not numbers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        out = torch.full((len(rows), weight.shape[2]), torch.nan, dtype=rows.dtype)
        for start, end, matrix in zip([0, *ends.tolist()], ends.tolist(), weight, strict=False):
            out[start:end] = rows[start:end] @ matrix
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, ends = ctx.saved_tensors
        of_rows, of_weight = torch.full_like(rows, torch.nan), torch.zeros_like(weight)
        for number, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
            of_rows[start:end] = gradient[start:end] @ weight[number].T
            of_weight[number] = rows[start:end].T @ gradient[start:end]
        return of_rows, of_weight, None


@pytest.mark.parametrize("dense", [Gated, Plain])
def test_padding_goes_to_no_expert_whatever_a_kernel_leaves_there(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_grouped_mm", Undefined.apply)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [True] * 5])
    hidden = torch.randn(3, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    given, alone = hidden.clone().requires_grad_(), hidden[~padded].clone().requires_grad_()
    ours, expected = watched(mixture_of(dense), padded.flatten()), mixture_of(dense)
    out, wanted = ours(given), expected(alone)
    assert (out[padded] == 0).all()
    torch.testing.assert_close(out[~padded], wanted)
    out.square().sum().backward()
    wanted.square().sum().backward()
    assert given.grad is not None
    assert (given.grad[padded] == 0).all()
    torch.testing.assert_close(given.grad[~padded], alone.grad)
    for (name, one), other in zip(ours.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_micro_batch_of_padding_alone_gives_zeros(dtype: torch.dtype) -> None:
    mixture = watched(mixture_of(Plain).to(dtype), torch.ones(6, dtype=torch.bool))
    out = mixture(torch.randn(2, 3, HIDDEN, dtype=dtype))
    out.float().square().sum().backward()
    assert not out.any()
    for parameter in mixture.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_one_expert_for_each_token_has_the_weight_one() -> None:
    mixture = mixture_of(Gated, top_k=1)
    hidden = torch.randn(7, HIDDEN)
    weights, chosen = mixture.router(hidden)
    assert torch.equal(weights, torch.ones(7, 1))
    assert torch.equal(chosen[:, 0], (hidden @ mixture.router.weight.T).argmax(dim=1))
    mixture(hidden).square().sum().backward()
    assert mixture.router.weight.grad is not None
    assert mixture.router.weight.grad.abs().max() < 1e-5


def test_a_token_chooses_the_same_among_equals_wherever_it_stands() -> None:
    router = Router(HIDDEN, 64, 6)
    with torch.no_grad():
        router.weight.zero_()
    alone = router(torch.ones(1, HIDDEN))[1]
    for tokens in (2, 300):
        assert torch.equal(router(torch.ones(tokens, HIDDEN))[1], alone.expand(tokens, -1))


def test_a_bias_changes_the_choice_and_not_the_weights() -> None:
    router = mixture_of(Gated).router
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2))
    logits = hidden @ router.weight.T
    router.choice_bias = torch.tensor([9.0, 0.0, 0.0, -9.0])
    weights, chosen = router(hidden)
    assert (chosen[:, 0] == 0).all()
    assert (chosen != 3).all()
    torch.testing.assert_close(weights, logits.gather(1, chosen).softmax(dim=-1))


def blocks() -> dict[str, tuple[nn.Module, int]]:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": 2, "hidden_act": "silu"}
    mixtral = MixtralConfig(intermediate_size=INNER, num_local_experts=COUNT, router_jitter_noise=0.0, **sizes)
    qwen = Qwen3MoeConfig(moe_intermediate_size=INNER, num_experts=COUNT, norm_topk_prob=True, **sizes)
    for config in (mixtral, qwen):
        config._experts_implementation = "grouped_mm"
    return {"Mixtral": (MixtralSparseMoeBlock(mixtral), 2), "Qwen3-MoE": (Qwen3MoeSparseMoeBlock(qwen), 2)}


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_outputs_and_gradients_are_those_of_transformers_own_blocks(name: str) -> None:
    theirs, top_k = blocks()[name]
    torch.manual_seed(3)
    block: Any = theirs
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    ours = mixture_of(Gated, top_k)
    with torch.no_grad():
        ours.router.weight.copy_(block.gate.weight)
        for part, matrix in zip(("gate_proj", "up_proj"), block.experts.gate_up_proj.chunk(2, dim=1), strict=True):
            ours.experts.get_parameter(part).copy_(matrix)
        ours.experts.get_parameter("down_proj").copy_(block.experts.down_proj)
    hidden, direction = torch.randn(2, 9, HIDDEN), torch.randn(2, 9, HIDDEN)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    outs = [ours(inputs[0]), block(inputs[1])]
    torch.testing.assert_close(*outs)
    for out in outs:
        (out * direction).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.router.weight.grad, block.gate.weight.grad)
    gate, up = block.experts.gate_up_proj.grad.chunk(2, dim=1)
    for part, gradient in (("gate_proj", gate), ("up_proj", up), ("down_proj", block.experts.down_proj.grad)):
        torch.testing.assert_close(ours.experts.get_parameter(part).grad, gradient)
