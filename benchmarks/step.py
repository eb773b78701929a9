"""Times what is put around a step: the guard that lets it be redone, and the counting of memory on the CPU.

Prints one table for each of two models, in the form of run.py. The steps that are compared take turns, one by one, on one
thread and in turning order, and a ratio is that of two steps of one round. Times are the processor's, which other programs
change little. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from run import Row, machine, table
from samples import SAMPLES, TOKENS, Cost, Sample, collate
from transformers import LlamaConfig, LlamaForCausalLM

from oomph.core.admission import Admission
from oomph.live.budget import memory_limit, resident
from oomph.live.engine import Engine
from oomph.live.optimizers import optimizer_over
from oomph.live.recover import Snapshot
from oomph.live.step import LOSSES, train_step
from oomph.records import Choice

CPU = torch.device("cpu")
MODELS = {"256 wide, 8 layers": (256, 8), "64 wide, 2 layers": (64, 2)}


class Trained:
    """A model with its optimizer, which take a step of two micro-batches in one of several ways."""

    def __init__(self, width: int, layers: int) -> None:
        sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_attention_heads=4, **sizes)).train()
        self.optimizer = optimizer_over(self.model.parameters(), "adamw-foreach", lr=1e-4)
        self.samples = [Sample(str(n), torch.randint(2048, (TOKENS,)), Cost()) for n in range(SAMPLES)]
        choice = replace(Choice(SAMPLES // 2, 2, SAMPLES), precision="float32")
        self._engine: Engine[Sample] = Engine(self.model, self.optimizer, choice, self._admission, collate)

    def bare(self) -> None:
        """The step alone."""
        halves = self.samples[: SAMPLES // 2], self.samples[SAMPLES // 2 :]
        batches: list[Callable[[], dict[str, Any]]] = [lambda half=half: collate(half) for half in halves]
        float(train_step(self.model, self.optimizer, batches, LOSSES["full"], SAMPLES * (TOKENS - 1)))

    def guarded(self) -> None:
        """The step through the engine."""
        self._engine.step(0, self.samples)

    def counted(self) -> None:
        """The step alone, while memory is counted."""
        with memory_limit(None, CPU, resident(self.model, self.optimizer)):
            self.bare()

    def remembered(self) -> None:
        """What the engine does before it plans a step."""
        if not hasattr(self, "_snapshot"):
            self._snapshot = Snapshot(self.model, CPU)
        self._snapshot.take()

    def _admission(self, _: Choice) -> Admission:
        return Admission(lambda shape: shape.samples, lambda shape: 1.0, SAMPLES // 2)


def rows(trained: Trained, rounds: int) -> Iterator[Row]:
    """Each way of a step beside the step alone in the same round."""
    bare = "the step alone"
    ways = {bare: trained.bare, "the step through the engine": trained.guarded, "the step, memory counted": trained.counted}
    ways["what the engine remembers"] = trained.remembered
    aims = {"the step through the engine": "1.01", "what the engine remembers": "0.01"}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in list(ways.items())[:: -1 if number % 2 else 1]:
            begun = time.process_time()
            run()
            if number:
                taken[name].append(1000 * (time.process_time() - begun))
    alone = taken.pop(bare)
    yield Row(bare, alone, "ms")
    for name, milliseconds in taken.items():
        yield Row(name, milliseconds, "ms", alone, bare, aims.get(name, ""))


def main() -> None:
    """Runs everything and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="rounds; the median of them is printed (default 41)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for line in machine():
        print(line)
    for name, sizes in MODELS.items():
        print(f"\n{name}, {SAMPLES} samples of {TOKENS} tokens in two micro-batches")
        for line in table(list(rows(Trained(*sizes), rounds))):
            print(line)


if __name__ == "__main__":
    main()
