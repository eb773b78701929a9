"""Keeps the load of experts even, and counts it. It is done around routers, so the model's own code stays as it is.

With f_e the share of a group's choices that expert e got and P_e its mean probability over the group's tokens, the loss of a
layer is E · sum over e of f_e · P_e, which is 1 for an even load (Fedus et al., arXiv 2101.03961, equation 4). Its gradient
goes through P alone. What a group is does not depend on how a step is cut: a sample, or some samples that follow each other in
the step; only `micro-batch`, as published code has it, takes what happens to run together. The gradient is added where a router
hands its weights on, so it is there whatever the loss function and whatever is recomputed in the backward.

Biases are moved once for each step, by its total load (Wang et al., arXiv 2408.15664): they change choices and no weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from oomph.errors import UserError
from oomph.live.experts import Router
from oomph.live.model import without_adapters
from oomph.recipe.schema import Balance
from oomph.run_records import ExpertLoad

_ROUTERS = "oomph_routers"
_CHOICES, _LOSSES = "oomph_choices", "oomph_losses"
"""Buffers of a router that are not saved: [2, count], how often each expert was chosen in the step and how often of these by an
image token; and the step's balance loss and z-loss, without their coefficients."""
LENGTHS, GROUPS = "lengths", "groups"
"""What a micro-batch may hold beside the model's inputs, both [samples]: the tokens of each sample, whose padding follows them,
and the number of its group, from 0 within the micro-batch."""


class Shares(NamedTuple):
    """What a step's terms are divided by: numbers of the whole step, over all micro-batches and ranks.

    Attributes:
        samples: of the step.
        groups: that its samples are in.
        micro_batches: that it is cut into.
        tokens: without padding.
    """

    samples: int = 1
    groups: int = 1
    micro_batches: int = 1
    tokens: int = 1

    def units(self, kind: str) -> int:
        """How many losses of one kind are averaged."""
        return {"group": self.groups, "micro-batch": self.micro_batches}.get(kind, self.samples)


class Routed(NamedTuple):
    """What became of a step's routing.

    Attributes:
        balance_loss: without its coefficient, as a mean over layers; None where the step has none.
        z_loss: likewise.
        experts: the load of each layer.
    """

    balance_loss: float | None = None
    z_loss: float | None = None
    experts: tuple[ExpertLoad, ...] = ()


@dataclass
class _MicroBatch:
    """The one that runs: samples, the tokens of each as [samples, 1], which tokens are padding and which of images."""

    samples: int
    tokens: Tensor
    padded: Tensor
    images: Tensor | None
    groups: Tensor | None
    recomputes: bool = False


class Routers:
    """The routers of a model, in a step: what they are told of the micro-batch, what they add to the gradient, what they count.

    Args:
        present: whether the model has some.
        balance: how their experts are balanced, if they are.
        image_token: the number of an image's tokens; None for a text model.
    """

    def __init__(self, present: bool, balance: Balance | None = None, image_token: int | None = None) -> None:
        self._present, self._image_token = present, image_token
        self.balance = balance
        self._scaler: torch.amp.GradScaler | None = None
        self._now: _MicroBatch | None = None
        self._shares = Shares()

    def __bool__(self) -> bool:
        return self._present

    @property
    def padded(self) -> Tensor | None:
        """Which tokens of the micro-batch that runs are padding, [tokens]; None where none runs."""
        return None if self._now is None else self._now.padded

    @property
    def group(self) -> int:
        """Samples that have to be in one micro-batch."""
        return self.balance.group if self.balance is not None and self.balance.kind == "group" else 1

    def begin(self, model: nn.Module, shares: Shares) -> None:
        """A step of the model begins: nothing was chosen yet."""
        self._shares = shares
        for router in _counting(model).values() if self else ():
            for name in (_CHOICES, _LOSSES):
                if name in router._buffers:
                    router.get_buffer(name).zero_()

    @contextmanager
    def micro_batch(self, scaler: torch.amp.GradScaler | None = None) -> Iterator[None]:
        """A micro-batch runs in the block, its forward and then its backward.

        Args:
            scaler: of the loss; scales what the balance adds to the gradient too.
        """
        self._scaler = scaler
        try:
            yield
        finally:
            self._now = None

    def look(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Learns of a micro-batch what the model's code does not read, and gives back what it does."""
        inputs = {name: value for name, value in batch.items() if name not in (LENGTHS, GROUPS)}
        if not self:
            return inputs
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        with torch.no_grad():
            if mask is not None and LENGTHS not in batch:
                padded, lengths = mask == 0, mask.sum(dim=1)
            else:
                lengths = batch.get(LENGTHS)
                if lengths is None:
                    lengths = torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
                padded = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
            images = None if self._image_token is None else (ids == self._image_token).flatten()
            tokens = lengths.clamp(min=1).float()[:, None]
            self._now = _MicroBatch(ids.shape[0], tokens, padded.flatten(), images, self._groups(batch, ids))
        return inputs

    def _groups(self, batch: dict[str, Any], ids: Tensor) -> Tensor | None:
        if self.group == 1:
            return None
        groups: Tensor | None = batch.get(GROUPS)
        return torch.arange(ids.shape[0], device=ids.device) // self.group if groups is None else groups

    def turn(self) -> None:
        """The forward is through. What runs from now on is run again, and was counted."""
        if self._now is not None:
            self._now.recomputes = True

    def __call__(self, router: nn.Module, logits: Tensor, probabilities: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weights, behind which the balance's gradient waits; counts what was chosen. As `experts.Watch` has it."""
        now, balance = self._now, self.balance
        if now is None:
            return weights
        with torch.no_grad():
            taken = _taken(chosen, probabilities, now)
            if not now.recomputes:
                _count(router.get_buffer(_CHOICES), taken, now)
        if balance is None or _LOSSES not in router._buffers:
            return weights
        terms = []
        if balance.kind != "bias":
            if balance.kind == "micro-batch":
                taken = _taken(chosen[:, :1], probabilities, now)
            each = 1 if balance.kind == "micro-batch" else chosen.shape[1]
            loss = self._uneven(probabilities, taken, each, now) / self._shares.units(balance.kind)
            terms.append((0, loss, balance.coefficient))
        if balance.z_loss:
            squares = logits.float().logsumexp(dim=-1).square().masked_fill(now.padded, 0)
            terms.append((1, squares.sum() / self._shares.tokens, balance.z_loss))
        if not now.recomputes:
            for place, loss, _ in terms:
                router.get_buffer(_LOSSES)[place].add_(loss.detach())
        total = functools.reduce(torch.add, [coefficient * loss for _, loss, coefficient in terms])
        added: Tensor = _Added.apply(weights, total, self._scaler)  # type: ignore[no-untyped-call]
        return added

    def _uneven(self, probabilities: Tensor, taken: Tensor, each: int, now: _MicroBatch) -> Tensor:
        """The sum of the losses of the micro-batch's groups. `each` is how many experts a token chose of those in `taken`."""
        assert self.balance is not None
        count = probabilities.shape[1]
        masses = probabilities.masked_fill(now.padded[:, None], 0).view(now.samples, -1, count).sum(dim=1)
        with torch.no_grad():
            choices, tokens = taken.view(now.samples, -1, count).sum(dim=1).float(), now.tokens
            if self.balance.kind == "micro-batch":
                choices, tokens = choices.sum(dim=0, keepdim=True), tokens.sum()
            elif now.groups is not None:
                choices, tokens = (
                    torch.zeros_like(of_sample).index_add_(0, now.groups, of_sample)[now.groups]
                    for of_sample in (choices, tokens)
                )
            factors = choices / (tokens.square() * (each / count))
        return (masses * factors).sum()

    def totals(self, model: nn.Module) -> list[float]:
        """What this rank's routers did in the step, as plain numbers: those of several ranks are added up."""
        routers = list(_counting(model).values())
        found = [router.get_buffer(_CHOICES).flatten().double() for router in routers]
        found += [router.get_buffer(_LOSSES).double() for router in routers if _LOSSES in router._buffers]
        numbers: list[float] = torch.cat(found).tolist() if found else []
        return numbers

    def conclude(self, model: nn.Module, totals: Sequence[float]) -> Routed:
        """What became of a step that was committed. Biases that balance experts move by it.

        Args:
            model: whose step it was.
            totals: of all ranks.
        """
        numbers = iter(totals)
        loads = []
        for path, router in _counting(model).items():
            buffer = router.get_buffer(_CHOICES)
            both, images = ([int(next(numbers)) for _ in range(buffer.shape[1])] for _ in range(2))
            text = tuple(total - image for total, image in zip(both, images, strict=True))
            loads.append(ExpertLoad(_layer(path), text, tuple(images)))
            self._move(router, both)
        losses = list(numbers)
        if self.balance is None or not losses:
            return Routed(experts=tuple(loads))
        balance, z = (sum(losses[place::2]) / len(loads) for place in (0, 1))
        return Routed(None if self.balance.kind == "bias" else balance, z if self.balance.z_loss else None, tuple(loads))

    def _move(self, router: nn.Module, choices: Sequence[int]) -> None:
        """Moves the bias of each expert of a layer against its load."""
        if self.balance is not None and self.balance.kind == "bias" and any(choices):
            bias, load = router.get_buffer("choice_bias"), torch.tensor(choices, dtype=torch.float64)
            bias.add_(self.balance.bias_rate * (load.mean() - load).sign().to(bias))


_NONE = Routers(present=False)


def routers_of(model: nn.Module) -> Routers:
    """The routers that `apply_balance` found in a model; none in one that it did not see."""
    found: Routers = getattr(model, _ROUTERS, _NONE)
    return found


def apply_balance(model: PreTrainedModel, balance: Balance | None) -> None:
    """Lets a model's routers count what they choose and, where they are to, keep it even, in place.

    Routers that `moe.upcycle` made count in any case, and leave padding out. Those of transformers' own models do so where
    there is a balance: they have to give logits, weights and numbers of experts, and choose by the softmax of the logits.

    Args:
        model: on any device; as it is before adapters are added.
        balance: the recipe's section.

    Raises:
        UserError: there is nothing to balance, or it cannot be balanced like this.
    """
    own = {path: module for path, module in model.named_modules() if isinstance(module, Router)}
    others = _other_routers(model) if balance is not None else {}
    if balance is not None:
        _check(model, balance, own, others)
    if not own and not others:
        return
    routers = Routers(True, balance, _image_token(model.config))
    for router in (*own.values(), *others.values()):
        weight = router.get_parameter("weight")
        device = "cpu" if weight.is_meta else weight.device
        router.register_buffer(_CHOICES, torch.zeros((2, len(weight)), dtype=torch.int64, device=device), persistent=False)
        if balance is not None and (balance.kind != "bias" or balance.z_loss):
            router.register_buffer(_LOSSES, torch.zeros(2, device=device), persistent=False)
        if isinstance(router, Router):
            router.watch = routers
            if balance is not None and balance.kind == "bias" and router.choice_bias is None:
                router.choice_bias = torch.zeros(len(weight), device=device)
        else:
            router.register_forward_hook(functools.partial(_behind, routers))
    setattr(model, _ROUTERS, routers)


def _counting(model: nn.Module) -> dict[str, nn.Module]:
    """The routers that count, by their paths."""
    return {path: module for path, module in model.named_modules() if _CHOICES in module._buffers}


def _image_token(config: Any) -> int | None:
    numbers = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((number for number in numbers if number is not None), None)


def _behind(routers: Routers, router: nn.Module, _: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> Any:
    """A hook behind a router of transformers, which gives logits, weights and numbers."""
    logits, weights, chosen = outputs
    if routers.padded is None:
        return outputs
    return logits, routers(router, logits, logits.softmax(dim=-1, dtype=torch.float32), weights, chosen), chosen


class _Added(torch.autograd.Function):
    """Adds a loss to whatever the step's loss is: passes weights on, and gives the loss the gradient 1 in the backward."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
        ctx.like, ctx.scaler = (loss.dtype, loss.device), scaler
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        one = torch.ones((), dtype=dtype, device=device)
        return gradient, one if ctx.scaler is None else ctx.scaler.scale(one), None


def _taken(chosen: Tensor, probabilities: Tensor, now: _MicroBatch) -> Tensor:
    """Which experts each token chose, [tokens, count]; padding chose none."""
    taken = torch.zeros_like(probabilities, dtype=torch.bool, requires_grad=False).scatter_(1, chosen, True)
    return taken.masked_fill_(now.padded[:, None], False)


def _count(choices: Tensor, taken: Tensor, now: _MicroBatch) -> None:
    choices[0].add_(taken.sum(dim=0))
    if now.images is not None:
        choices[1].add_((taken & now.images[:, None]).sum(dim=0))


def _layer(path: str) -> int:
    """The number of the layer that a module is in: the last one in its path."""
    return int(re.findall(r"\.(\d+)(?=\.)", path)[-1])


def _check(model: PreTrainedModel, balance: Balance, own: dict[str, Router], others: dict[str, nn.Module]) -> None:
    """Whether there are experts, and whether they can be balanced like this.

    Raises:
        UserError: no.
    """
    kind = type(model).__name__
    if not own and not _expert_blocks(model):
        raise UserError(
            f"the stage balances experts, and {kind} has none", "add an experts section to make some, or leave balance out"
        )
    if len(others) < len(_expert_blocks(model)):
        raise UserError(
            f"balance cannot be added to the experts of {kind}: their routers do not give the softmax that they choose by",
            "leave balance out; what the model itself adds for its experts stays as it is",
        )
    if others and balance.kind == "bias":
        raise UserError(
            f"balance.kind bias moves a bias of the routers, which those of {kind} have no place for", "use kind: sequence"
        )


def _expert_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of transformers that hold experts, by their paths."""
    blocks = {path: module for path, module in model.named_modules() if hasattr(module, "_is_expert_parallel")}
    return {without_adapters(f"{path}.").removesuffix("."): module for path, module in blocks.items()}


def _other_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers beside transformers' experts that give what a balance needs, by their paths."""
    found: dict[str, nn.Module] = {}
    kinds: dict[type[nn.Module], bool] = {}
    for path in _expert_blocks(model):
        parent = path.rpartition(".")[0]
        for name, module in model.get_submodule(parent).named_children():
            if name in ("gate", "router"):
                if type(module) not in kinds:
                    kinds[type(module)] = _chooses_by_softmax(module)
                if kinds[type(module)]:
                    found[f"{parent}.{name}"] = module
    return found


def _chooses_by_softmax(router: nn.Module) -> bool:
    """Whether a router gives logits, weights and the numbers of the largest logits, tried with random weights."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return False
    with unset_fake_temporarily(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.randn(tensor.shape, generator=generator, device="cpu")
            for name, tensor in (*router.named_parameters(), *router.named_buffers())
        }
        hidden = torch.randn((5, weight.shape[1]), generator=generator, device="cpu")
        try:
            logits, weights, chosen = torch.func.functional_call(router, tensors, (hidden,))
        except (RuntimeError, TypeError, ValueError):
            return False
        if logits.shape != (5, len(weight)) or weights.shape != chosen.shape or chosen.is_floating_point():
            return False
        shares = logits.softmax(dim=-1).gather(-1, chosen)
        largest = logits.topk(chosen.shape[1], dim=-1).indices
        return torch.equal(chosen, largest) and torch.allclose(weights / weights.sum(-1, True), shares / shares.sum(-1, True))
