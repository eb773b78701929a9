"""The processes of a run, one for each device, and what they tell each other: a few numbers, over gloo, never over the device.

Numbers go through the host, so asking for them does not wait for the work that a device has queued.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others before it gives them up."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run. By default it is the only one, and everything below costs nothing.

    All methods but `leave` are collective: every rank calls them in the same order.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on this machine.
        device: what it computes on.
        backend: what moves tensors, ``nccl`` or ``gloo``; empty where there is only one.
        control: the gloo group that numbers go through; none where there is only one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009  a device is a value
    backend: str = ""
    control: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, device_type: str, timeout: timedelta = TIMEOUT) -> Ranks:
        """Meets the other processes, as ``torchrun`` describes them: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``MASTER_*``.

        A process group that is there already is used. Without ``WORLD_SIZE``, or with 1, there is nobody to meet.

        Args:
            device_type: ``cuda``, over NCCL, or ``cpu``, over gloo.
            timeout: how long a collective waits for a rank.

        Raises:
            RuntimeError: they did not all come within the timeout (``DistNetworkError``), or a port is in use.
        """
        size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if device_type == "cuda" else torch.device(device_type)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if size == 1:
            return cls(device=device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
        control = dist.new_group(backend="gloo", timeout=timeout)
        return cls(dist.get_rank(), dist.get_world_size(), local, device, dist.get_backend(), control)

    def leave(self) -> None:
        """Ends the groups. Nothing that holds one may be used afterwards."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over ranks, in float64: whole numbers are exact up to 2^53."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.control)
        return [float(value) for value in tensor.tolist()]

    def most(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over ranks."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return [int(value) for value in tensor.tolist()]

    def exchange(self, value: T) -> list[T]:
        """What each rank gave, by rank. Values are pickled, and come from nobody but these processes."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def broadcast(self, value: T, source: int = 0) -> T:
        """What one rank has, on all of them."""
        if self.size == 1:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found, src=source, group=self.control)
        received: T = found[0]
        return received
