"""DeepSpeed's experts with a capacity, for planning: what its dispatch over dense tensors allocates, and when it lets go.

DeepSpeed v0.9.5 (moe/sharded_moe.py: ``top2gating``, ``TopKGate``, ``MOELayer``; moe/experts.py) sends each token to two
experts through float32 tensors of tokens by experts by capacity, as GShard does (Lepikhin et al., arXiv 2006.16668). With S
tokens, E experts and a factor f, an expert takes C = ceil(2 f S / E) of them, so each such tensor has about 2 f S² elements.
Padding counts as tokens, and what is over the capacity is dropped. The operations and their order are those of the original,
and every tensor lives as long. As in training there, the second expert is chosen under Gumbel noise.

Two things are otherwise: the evaluation has the factor of the training, and the weight of the router stays in the model's
precision and is cast for the product.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from oomph.core.dimensions import Load, capacity
from oomph.live.ffn import known_form
from oomph.recipe import Experts
from oomph.recipe.schema import Balance

CHOICES = 2
"""Experts that DeepSpeed's gating over two choices gives a token."""


class CapacityRouter(nn.Module):
    """A linear map without bias to the logits of experts, in float32."""

    def __init__(self, hidden: int, count: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, hidden, device=like.device, dtype=like.dtype))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] to [tokens, count]."""
        return nn.functional.linear(hidden.float(), self.weight.float())


class CapacityExperts(nn.Module):
    """Copies of a dense FFN, which run one after the other on their own tokens."""

    def __init__(self, dense: nn.Module, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(dense) for _ in range(count))

    def forward(self, dispatched: Tensor) -> Tensor:
        """[count, capacity, hidden] to the same shape."""
        outputs = []
        for tokens, expert in zip(dispatched.chunk(len(self.copies)), self.copies, strict=True):
            outputs.append(expert(tokens))
        return torch.cat(outputs)


class CapacityMixture(nn.Module):
    """Takes the place of a dense FFN: a router, the experts, and the dense dispatch between them.

    Attributes:
        coefficient: of the balance loss, which is added to the step's; 0 where there is none.
    """

    def __init__(self, dense: nn.Module, count: int, factor: float) -> None:
        """Copies `dense`.

        Raises:
            UserError: `dense` is not a plain or gated FFN.
        """
        super().__init__()
        form = known_form(dense)
        up = dense.get_submodule(form.parts["up_proj"]).get_parameter("weight")
        self.experts = CapacityExperts(dense, count)
        self.router = CapacityRouter(up.shape[1], count, up)
        self.count, self.factor, self.coefficient = count, factor, 0.0
        self.train(dense.training)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to the same shape."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        logits = self.router(tokens)
        combine, taken = self.gate(logits, _gumbel(logits))
        dispatched = torch.einsum("sec,sm->ecm", taken.type_as(hidden), tokens)
        dispatched = _exchanged(dispatched)
        outputs = self.experts(dispatched)
        outputs = _exchanged(outputs)
        return torch.einsum("sec,ecm->sm", combine.type_as(hidden), outputs).reshape(hidden.shape)

    def gate(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Which place of which expert each token gets, and with which weight.

        Args:
            logits: float32, [tokens, count].
            noise: on the logits that the second expert is chosen by.

        Returns:
            The weights, float32, and where they are not zero, both [tokens, count, capacity].
        """
        probabilities = logits.softmax(dim=1)
        room = capacity(logits.shape[0], Load(self.count, CHOICES * self.factor))
        first = _one_hot(probabilities.argmax(dim=1), self.count)
        rest = (logits + noise).masked_fill(first.bool(), float("-inf"))
        second = _one_hot(rest.argmax(dim=1), self.count)
        places = [first.cumsum(dim=0) - 1, second.cumsum(dim=0) - 1]
        places[1] += first.sum(dim=0, keepdim=True)
        loss = (probabilities.mean(dim=0) * first.float().mean(dim=0)).mean() * self.count**2
        if self.coefficient:
            probabilities = _with_loss(probabilities, self.coefficient * loss)
        masks = [first, second]
        for mask, place in zip(masks, places, strict=True):
            mask *= place < room
        slots = [(place * mask).sum(dim=1) for place, mask in zip(places, masks, strict=True)]
        kept = [mask.float() for mask in masks]
        weights = [torch.einsum("se,se->s", probabilities, mask) for mask in kept]
        total = (weights[0] + weights[1]).clamp(min=torch.finfo(torch.float32).eps)
        for weight in weights:
            weight /= total
        shares = [torch.einsum("s,se->se", weight, mask) for weight, mask in zip(weights, kept, strict=True)]
        hot = [_one_hot(slot, room).float() for slot in slots]
        parts = [torch.einsum("se,sc->sec", share, slot) for share, slot in zip(shares, hot, strict=True)]
        combine = parts[0] + parts[1]
        return combine, combine.bool()


def balance_capacity(model: nn.Module, balance: Balance) -> None:
    """Adds the balance loss of each micro-batch, in place: DeepSpeed's, over the first choices and padding too."""
    for module in model.modules():
        if isinstance(module, CapacityMixture):
            module.coefficient = balance.coefficient


def load_of(experts: Experts | None) -> Load | None:
    """The load of experts with a capacity, where all layers have the same; None where there are none, or they differ."""
    if experts is None or experts.dispatch != "capacity":
        return None
    counts = {experts.count} if isinstance(experts.count, int) else set(experts.count)
    return Load(counts.pop(), CHOICES * experts.capacity_factor) if len(counts) == 1 else None


def _one_hot(numbers: Tensor, count: int) -> Tensor:
    """int64, as CUDA makes it: zeros, and ones scattered into them (ATen/native/Onehot.cpp)."""
    zeros = torch.zeros((*numbers.shape, count), dtype=torch.int64, device=numbers.device)
    return zeros.scatter_(-1, numbers.unsqueeze(-1), 1)


def _gumbel(logits: Tensor) -> Tensor:
    return -(-torch.rand_like(logits).clamp_(min=torch.finfo(torch.float32).tiny).log()).log()


class _Exchanged(torch.autograd.Function):
    """What ``all_to_all_single`` does in a group of one GPU: a copy, forward and backward."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        return torch.empty_like(tokens).copy_(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _exchanged(gradient.contiguous())


class _WithLoss(torch.autograd.Function):
    """Passes a tensor on and gives a loss the gradient 1: the loss is part of the step's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return gradient, torch.ones((), dtype=dtype, device=device)


def _exchanged(tokens: Tensor) -> Tensor:
    copied: Tensor = _Exchanged.apply(tokens)  # type: ignore[no-untyped-call]
    return copied


def _with_loss(tensor: Tensor, loss: Tensor) -> Tensor:
    passed: Tensor = _WithLoss.apply(tensor, loss)  # type: ignore[no-untyped-call]
    return passed
