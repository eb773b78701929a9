"""One optimizer step: the function that the trainer runs and the tracer records.

    for each micro-batch of the step's samples:
        forward; the loss is summed over tokens and divided by the tokens of the whole step
        backward; gradients add up
    clip the gradients; step the optimizer; drop the gradients

The gradient does not depend on how the samples are cut into micro-batches, in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

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
    """
    total: Tensor | None = None
    for index, collate in enumerate(batches):
        on("forward", index)
        value = loss(model, collate(), num_tokens)
        on("backward", index)
        value.backward()
        value = value.detach()
        total = value if total is None else total.add_(value)
        del value
    on("optimizer", len(batches))
    commit(optimizer, max_grad_norm)
    assert total is not None
    return total


def commit(optimizer: torch.optim.Optimizer, max_grad_norm: float | None = 1.0) -> None:
    """Clips the gradients, steps the optimizer and drops the gradients: what must never run twice for one step."""
    if max_grad_norm is not None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, max_grad_norm, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
