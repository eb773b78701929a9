"""Sends more and more tokens to experts, once by sorting them and once through DeepSpeed's dense tensors, in one run.

Prints memory and time of a forward and a backward of one layer: bytes above what is there before, and the processor's time. The
two layers are made of the same block and take turns, on one thread. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from run import Row, machine, table
from torch import Tensor, nn

from oomph.live.budget import memory_limit
from oomph.live.capacity import CapacityMixture
from oomph.live.experts import MixtureOfExperts
from oomph.units import MIB

HIDDEN, INNER, COUNT, FACTOR = 128, 512, 4, 1.5
TOKENS = (256, 512, 1024, 2048, 4096)


class Block(nn.Module):
    """The FFN of Phi."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] to the same shape."""
        out: Tensor = self.fc2(self.act(self.fc1(hidden)))
        return out


class Taken(NamedTuple):
    """What a forward and a backward took: bytes at the most, milliseconds."""

    peak_bytes: int
    milliseconds: float


def step(layer: nn.Module, hidden: Tensor) -> Taken:
    """Runs a layer once for its memory and once for its time. Gradients of its weights are there before."""
    given = hidden.clone().requires_grad_()

    def run() -> None:
        out: Tensor = layer(given)
        out.square().sum().backward()

    run()
    held = [given, *layer.parameters(), *(p.grad for p in (given, *layer.parameters()) if p.grad is not None)]
    with memory_limit(None, torch.device("cpu"), held) as memory:
        before = memory.allocated_bytes
        memory.reset_peak()
        run()
        peak = memory.peak_bytes - before
    begun = time.process_time()
    run()
    return Taken(peak, 1000 * (time.process_time() - begun))


def rows(rounds: int) -> Iterator[Row]:
    """Each way at each number of tokens; a ratio is that to half of the tokens in the same round."""
    torch.manual_seed(0)
    block = Block()
    ways: dict[str, Callable[[], nn.Module]] = {
        "sorted": partial(MixtureOfExperts, block, COUNT, 2),
        "dense": partial(CapacityMixture, block, COUNT, FACTOR),
    }
    layers = {name: make() for name, make in ways.items()}
    taken: dict[tuple[str, int], list[Taken]] = {}
    for _ in range(rounds):
        for tokens in TOKENS:
            hidden = torch.randn(tokens, HIDDEN)
            for name, layer in layers.items():
                taken.setdefault((name, tokens), []).append(step(layer, hidden))
    for unit, value in (("MiB", lambda one: one.peak_bytes / MIB), ("ms", lambda one: one.milliseconds)):
        for name in layers:
            before: list[float] = []
            for tokens in TOKENS:
                found = [value(one) for one in taken[name, tokens]]
                against = "half of the tokens" if before else ""
                yield Row(f"{name}, {tokens:,} tokens", found, unit, before, against)
                before = found


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median of them is printed (default 3)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for line in machine():
        print(line)
    print(f"\none layer {HIDDEN} wide, {COUNT} experts of {INNER}, two for each token; capacity factor {FACTOR:g}, float32")
    for line in table(list(rows(rounds))):
        print(line)


if __name__ == "__main__":
    main()
