"""Data parallelism with the whole model on every rank: nothing is communicated before the gradients of the step are there.

PyTorch's ``DistributedDataParallel`` reduces buckets while the last backward runs. A rank that runs out of memory in it leaves
the others waiting, and the reducer refuses every later forward. So nothing of it is used: the gradients of all micro-batches
add up on each rank, and are summed over ranks once all have said that theirs are there. That hides no communication behind
the last backward: it costs the time of one all-reduce of the gradients a step, whatever the number of micro-batches. In return
a failure anywhere in a micro-batch needs nothing but a vote, and there are no buckets of the size of the gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oomph.live.ranks.group import Ranks
from oomph.live.ranks.parallel import Silent, clipped

BUCKET_BYTES = 25 << 20
"""Small gradients are summed over ranks together, through a buffer of at most so many bytes."""


class Replicas(Silent):
    """The same model on every rank.

    Args:
        model: whose parameters and buffers are those of rank 0 from now on.
        ranks: the processes.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)
        self._buckets = {dtype: self._bucket(dtype) for dtype in {parameter.dtype for parameter in self._parameters}}

    def reset(self) -> None:
        """Drops gradients; a step leaves nothing else."""
        for parameter in self._parameters:
            parameter.grad = None

    def ready(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """Makes the gradients that this rank has not and another has; what no rank has stays without."""
        has = self.ranks.most([int(parameter.grad is not None) for parameter in self._parameters])
        for parameter, somewhere in zip(self._parameters, has, strict=True):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clip(
        self, optimizer: torch.optim.Optimizer, max_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> float | None:
        """Sums the gradients over ranks, in place and without taking memory, and clips them on each rank alike."""
        for dtype, bucket in self._buckets.items():
            waiting: list[Tensor] = []
            for gradient in (p.grad for p in self._parameters if p.grad is not None and p.grad.dtype == dtype):
                if gradient.numel() * 2 > bucket.numel() and gradient.is_contiguous():
                    dist.all_reduce(gradient)
                    continue
                if sum(map(Tensor.numel, waiting)) + gradient.numel() > bucket.numel():
                    _sum_over_ranks(waiting, bucket)
                    waiting = []
                waiting.append(gradient)
            if waiting:
                _sum_over_ranks(waiting, bucket)
        return clipped(optimizer, max_norm, scaler)

    def _bucket(self, dtype: torch.dtype) -> Tensor:
        parameters = [parameter for parameter in self._parameters if parameter.dtype == dtype]
        scattered = max((parameter.numel() for parameter in parameters if not parameter.is_contiguous()), default=0)
        most = min(sum(map(Tensor.numel, parameters)), BUCKET_BYTES // dtype.itemsize)
        return torch.empty(max(most, scattered), dtype=dtype, device=self.ranks.device)


def _sum_over_ranks(gradients: list[Tensor], bucket: Tensor) -> None:
    sizes = [gradient.numel() for gradient in gradients]
    views = [view.view_as(g) for view, g in zip(bucket[: sum(sizes)].split(sizes), gradients, strict=True)]
    torch._foreach_copy_(views, gradients)
    dist.all_reduce(bucket[: sum(sizes)])
    torch._foreach_copy_(gradients, views)
