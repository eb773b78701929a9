"""Mixtures of experts that are made of dense feed-forward networks: a router, and the experts it chooses from.

The router weights of a token sum to 1, so experts that are equal compute what the dense network did, whatever the router.
No token is dropped and memory grows with tokens times top-k. Padding is given to no expert: its rows come out as zeros.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import transformers.integrations.moe  # noqa: F401  registers torch.ops.transformers.grouped_mm_fallback
from torch import Tensor, nn

from oomph.live.ffn import known_form


class Watch(Protocol):
    """Is told what routers choose while a step trains; `balance.Routers` is one."""

    @property
    def padded(self) -> Tensor | None:
        """Which tokens of the micro-batch that runs are padding, [tokens]; None where that is not known."""
        ...

    def __call__(self, router: nn.Module, logits: Tensor, probabilities: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weights again, with what else the gradient of the router is made of.

        Args:
            router: who chose.
            logits: [tokens, count].
            probabilities: their softmax in float32.
            weights: of the chosen experts, [tokens, top_k].
            chosen: their numbers, [tokens, top_k], the most probable first.
        """
        ...


class Router(nn.Module):
    """Chooses the experts of each token: a linear map without bias, softmax, top-k, weights that sum to 1.

    Its weight is [count, hidden], initialised as ``nn.Linear`` initialises its own. Softmax and weights are float32.
    While all experts are equal, the weights do not change the output and the loss gives the router no gradient.

    Attributes:
        choice_bias: [count], float32; added to the logits for the choice alone and not for the weights. A buffer, saved with
            the model, which `balance.apply_balance` makes where experts are balanced by it; else None.
        watch: is told what is chosen; None where nobody wants to know.
    """

    choice_bias: Tensor | None

    def __init__(
        self, hidden: int, count: int, top_k: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.watch: Watch | None = None
        self.weight = nn.Parameter(torch.empty(count, hidden, device=device, dtype=dtype))
        self.register_buffer("choice_bias", None)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] to the weights (float32) and the numbers (int64) of the chosen experts, both [tokens, top_k].

        A token's choice depends on its own logits alone, also where several are equal.
        """
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight)
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        if self.choice_bias is None:
            weights, chosen = probabilities.topk(self.top_k, dim=-1)
        else:
            chosen = (logits.detach() + self.choice_bias).topk(self.top_k, dim=-1).indices
            weights = probabilities.gather(-1, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.watch is not None:
            weights = self.watch(self, logits, probabilities, weights, chosen)
        return weights, chosen


class Experts(nn.Module):
    """`count` copies of a dense FFN, stacked: weights [count, out, in], biases [count, out].

    The parameters are ``up_proj``, ``down_proj`` and for a gated FFN ``gate_proj``, each with ``_bias`` where the dense one
    had a bias, on the device and in the dtype of the dense ones.
    """

    def __init__(self, dense: nn.Module, count: int) -> None:
        """Copies `dense`, and shares its activation module.

        Raises:
            UserError: `dense` is not a plain or gated FFN.
        """
        super().__init__()
        form = known_form(dense)
        self.count = count
        self.gated = "gate_proj" in form.parts
        self.activation = form.activation
        for part, name in form.parts.items():
            linear = dense.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self.register_parameter(part, _stack(linear.weight, count))
            self.register_parameter(f"{part}_bias", None if linear.bias is None else _stack(linear.bias, count))

    def forward(self, hidden: Tensor, weights: Tensor, chosen: Tensor, padded: Tensor | None = None) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        The (token, choice) pairs are sorted by expert, so each expert's rows are one group of a grouped matrix product.
        Padding has the number behind the last expert's, and its rows are in no group: the product leaves them undefined,
        forward and backward (transformers 5.23, integrations/moe.py, says so of the kernel), and they are made zeros.
        Under autocast the experts compute in autocast's dtype, as Linear modules do.

        Args:
            hidden: [tokens, hidden].
            weights: [tokens, top_k].
            chosen: expert numbers, [tokens, top_k].
            padded: which tokens are padding, [tokens]; None for none.

        Returns:
            [tokens, hidden].
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self._held("up_proj").dtype
        top_k = chosen.shape[-1]
        if padded is not None:
            chosen = chosen.masked_fill(padded[:, None], self.count)
        expert, order = chosen.flatten().sort(stable=True)
        left_out = None if padded is None else (expert == self.count)[:, None]
        numbers = torch.arange(self.count, device=hidden.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        one_hot = (expert[:, None] == numbers).to(dtype)
        rows = _zeroed(hidden.to(dtype)[order // top_k], left_out)
        inner = self._linear("gate_proj" if self.gated else "up_proj", rows, ends, one_hot, left_out)
        inner = self.activation(inner)
        if self.gated:
            inner = inner * self._linear("up_proj", rows, ends, one_hot, left_out)
        out = self._linear("down_proj", inner, ends, one_hot, left_out)
        by_token = torch.empty_like(out).index_copy_(0, order, out).view(-1, top_k, out.shape[1])
        return (by_token * weights[..., None].to(dtype)).sum(dim=1)

    def _held(self, part: str) -> Tensor:
        """The weights of a part; with PEFT's adapters around them, their sum."""
        weight: Tensor = getattr(self, part)
        return weight

    def _linear(self, part: str, rows: Tensor, ends: Tensor, one_hot: Tensor, left_out: Tensor | None) -> Tensor:
        """Each expert's linear map on its own rows: [rows, in] to [rows, out], with zeros where rows are left out.

        The bias is added as a product with the one-hot expert numbers, [rows, count]: its gradient is then a matrix
        product too, where indexing would add thousands of rows to few addresses one by one.
        """
        weight = self._held(part)
        bias: Tensor | None = getattr(self, f"{part}_bias")
        out = _grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), ends)
        return _zeroed(out if bias is None else out.addmm_(one_hot, bias.to(rows.dtype)), left_out)


class MixtureOfExperts(nn.Module):
    """Takes the place of a dense FFN: a `Router` and the `Experts` it chooses from."""

    def __init__(self, dense: nn.Module, count: int, top_k: int) -> None:
        super().__init__()
        self.experts = Experts(dense, count)
        like = self.experts.get_parameter("up_proj")
        self.router = Router(like.shape[2], count, top_k, like.device, like.dtype)
        self.train(dense.training)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to the same shape."""
        tokens = hidden.flatten(0, -2)
        weights, chosen = self.router(tokens)
        watch: Watch | None = self.router.watch
        out: Tensor = self.experts(tokens, weights, chosen, None if watch is None else watch.padded)
        return out.view(hidden.shape)


def _zeroed(rows: Tensor, which: Tensor | None) -> Tensor:
    """Rows of which some, [rows, 1], become zeros, in place; so do those of their gradient."""
    return rows if which is None else rows.masked_fill_(which, 0)


def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[rows, in] times each group's [in, out]; group `e` are the rows from ``ends[e - 1]`` to ``ends[e]`` (int32).

    torch has the grouped kernel, and the shapes that fake tensors need, for bfloat16 alone (torch 2.13,
    torch/_meta_registrations.py, _meta_grouped_mm_common). Other dtypes take the loop over groups of transformers
    (transformers 5.23, integrations/moe.py).
    """
    if rows.dtype == torch.bfloat16:
        return nn.functional.grouped_mm(rows, weight, offs=ends)
    out: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)
    return out


def _stack(parameter: Tensor, count: int) -> nn.Parameter:
    copies = parameter.detach().expand(count, *parameter.shape).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copies, requires_grad=parameter.requires_grad)
