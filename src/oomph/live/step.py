"""One optimizer step: the function that the trainer runs and the tracer records.

    for each micro-batch of the step's samples:
        forward, under autocast in mixed precision; the loss is summed over tokens and divided by those of the whole step
        backward of the loss, scaled in float16-mixed; gradients add up
    unscale and clip the gradients; step the optimizer; drop the gradients

`accumulate` is the loop, which may run again; `commit` is the last line. The gradient does not depend on how the samples are
cut into micro-batches, in exact arithmetic. What keeps the load of experts even is added at their routers (`balance`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from oomph.live.balance import Shares, routers_of

Batch = dict[str, Any]
Loss = Callable[[PreTrainedModel, Batch, int], Tensor]
"""A model, a micro-batch and the label tokens of the whole step to the micro-batch's share of the loss."""

IGNORED = -100
LOSS_CHUNKS = 16


def full_loss(model: PreTrainedModel, batch: Batch, num_tokens: int) -> Tensor:
    """Cross-entropy over full logits as transformers computes it: summed over tokens in fp32, divided by `num_tokens`."""
    loss: Tensor = model(**batch, num_items_in_batch=num_tokens).loss
    return loss


def full_shifted_loss(model: PreTrainedModel, batch: Batch, num_tokens: int) -> Tensor:
    """As transformers before 4.46: the fp32 logits are shifted by a copy before the cross-entropy."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits.float()
    shifted, labels = logits[:, :-1, :].contiguous(), batch["labels"][:, 1:].contiguous()
    return _summed(shifted.view(-1, shifted.shape[-1]), labels.view(-1)) / num_tokens


def chunked_loss(model: PreTrainedModel, batch: Batch, num_tokens: int) -> Tensor:
    """The same sum without the logits of the whole batch: head and cross-entropy run on one chunk of tokens at a time.

    There are `LOSS_CHUNKS` chunks whatever the batch, and each chunk's logits are computed again in the backward, so that
    only one chunk's logits exist at any time.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hidden = model.base_model(**inputs).last_hidden_state
    head = model.get_output_embeddings()
    labels = nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].reshape(-1)
    size = -(-labels.numel() // LOSS_CHUNKS)
    losses = [
        checkpoint(_chunk_loss, head, piece, target, use_reentrant=False, preserve_rng_state=False)
        for piece, target in zip(hidden.view(-1, hidden.shape[-1]).split(size), labels.split(size), strict=True)
    ]
    return torch.stack(losses).sum() / num_tokens


def _chunk_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return _summed(head(hidden).float(), labels)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


LOSSES: dict[str, Loss] = {
    "full": full_loss,
    "full-shifted": full_shifted_loss,
    "chunked": chunked_loss,
}


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Callable[[], Batch]],
    loss: Loss,
    num_tokens: int,
    max_grad_norm: float | None = 1.0,
    on: Callable[[str, int], None] = lambda phase, index: None,
    around_forward: Callable[[], AbstractContextManager[object]] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    shares: Shares | None = None,
) -> Tensor:
    """Runs one step and returns the mean loss over the step's tokens, a tensor without dimensions.

    Args:
        model: in training mode.
        optimizer: over the model's trainable parameters.
        batches: one function for each micro-batch, which collates it (with ``labels``) when its turn comes.
        loss: one of `LOSSES`.
        num_tokens: label tokens of the whole step, over all micro-batches and ranks.
        max_grad_norm: the largest norm of the gradient; none to leave it as it is.
        on: told "forward" and "backward" with the micro-batch's number, and "optimizer", as each begins.
        around_forward: makes what each forward and its loss run in, autocast for instance.
        scaler: scales the loss before the backward; none to leave it as it is.
        shares: of the whole step, for a model whose experts are balanced; none for `num_tokens` samples of one token.
    """
    routers_of(model).begin(model, Shares(num_tokens, num_tokens, len(batches), num_tokens) if shares is None else shares)
    total = accumulate(model, batches, loss, num_tokens, on, around_forward, scaler)
    on("optimizer", len(batches))
    commit(optimizer, max_grad_norm, scaler)
    return total


def accumulate(
    model: PreTrainedModel,
    batches: Sequence[Callable[[], Batch]],
    loss: Loss,
    num_tokens: int,
    on: Callable[[str, int], None] = lambda phase, index: None,
    around_forward: Callable[[], AbstractContextManager[object]] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Forward and backward of every micro-batch: the part of a step that may run again once the gradients are dropped.

    Gradients add up in the dtype of their parameters, as torch has it: in float32 where what trains is float32, as in mixed
    precision; in 16 bits otherwise, where each sum is rounded and so depends on the cut.

    Args:
        model: in training mode, without gradients.
        batches: one function for each micro-batch, at least one. Each gives the same batch whenever it is called. It may hold
            what `balance` names `LENGTHS` and `GROUPS` beside what the model reads.
        loss: one of `LOSSES`.
        num_tokens: label tokens of the whole step.
        on: told "forward" and "backward" with the micro-batch's number.
        around_forward: makes what each forward and its loss run in.
        scaler: scales the loss before the backward.

    Returns:
        The mean loss over the step's tokens, a tensor without dimensions.
    """
    total: Tensor | None = None
    routers = routers_of(model)
    for index, collate in enumerate(batches):
        on("forward", index)
        with routers.micro_batch(scaler):
            with around_forward():
                value = loss(model, routers.look(collate()), num_tokens)
            routers.turn()
            on("backward", index)
            (value if scaler is None else scaler.scale(value)).backward()
        value = value.detach()
        total = value if total is None else total.add_(value)
        del value
    assert total is not None
    return total


def commit(
    optimizer: torch.optim.Optimizer, max_grad_norm: float | None = 1.0, scaler: torch.amp.GradScaler | None = None
) -> None:
    """What is left of a step when its gradients are there: `clip` and `update`."""
    clip(optimizer, max_grad_norm, scaler)
    update(optimizer, scaler)


def clip(
    optimizer: torch.optim.Optimizer, max_grad_norm: float | None = 1.0, scaler: torch.amp.GradScaler | None = None
) -> Tensor | None:
    """Unscales the gradients and clips them. It changes nothing else, so a step may still begin anew after it.

    Returns:
        The norm of the gradient before it was clipped, a tensor without dimensions; none where there is no largest norm.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    if max_grad_norm is None:
        return None
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(trained, max_grad_norm, foreach=True)


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
    """Steps the optimizer and drops the gradients: what must never run twice for one step.

    With a scaler the optimizer does not step where a gradient is not finite, and the scale becomes smaller.
    """
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
