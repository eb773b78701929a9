"""Times what is put around a step of two ranks, over gloo on this machine's CPU: the plan, what is remembered, and the votes.

The step through the engine and the same step without it take turns, one by one and in turning order, on one thread for each
rank, and a ratio is that of two steps of one round on rank 0. Times are the processor's, so what a rank waits for the other is
not in them. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from run import Row, machine, table
from samples import SAMPLES, TOKENS, Cost, Sample, collate
from transformers import LlamaConfig, LlamaForCausalLM

from oomph.core.admission import Admission
from oomph.live.engine import Engine
from oomph.live.optimizers import optimizer_over
from oomph.live.ranks.apply import share
from oomph.live.ranks.group import Ranks
from oomph.live.step import LOSSES, accumulate, update
from oomph.records import Choice

RANKS = 2
SHARDINGS = ("ddp", "fsdp2")


class Trained:
    """A model that two ranks share, with its optimizer: a step has two micro-batches on each rank."""

    def __init__(self, ranks: Ranks, sharding: Any) -> None:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_attention_heads=4, **sizes)).train()
        choice = replace(Choice(SAMPLES // 4, 2, SAMPLES, gpus=RANKS), precision="float32", sharding=sharding)
        self.parallel = share(self.model, choice, ranks)
        self.optimizer = optimizer_over(self.model.parameters(), "adamw-foreach", lr=1e-4)
        self.samples = [Sample(str(n), torch.randint(2048, (TOKENS,)), Cost()) for n in range(SAMPLES)]
        self._own = self.samples[ranks.rank :: RANKS]
        self._engine: Engine[Sample] = Engine(
            self.model, self.optimizer, choice, self._admission, collate, parallel=self.parallel
        )

    def bare(self) -> None:
        """Forwards, backwards, the sum over ranks, the clipping and the update."""
        halves = self._own[: SAMPLES // 4], self._own[SAMPLES // 4 :]
        batches: list[Callable[[], dict[str, Any]]] = [lambda half=half: collate(half) for half in halves]
        float(accumulate(self.model, batches, self.parallel.loss(LOSSES["full"]), SAMPLES * (TOKENS - 1)))
        self.parallel.ready(self.optimizer, 1.0)
        self.parallel.clip(self.optimizer, 1.0, None)
        update(self.optimizer)

    def guarded(self) -> None:
        """The step through the engine."""
        self._engine.step(0, self.samples)

    def voted(self) -> None:
        """The votes of a step and what else its ranks tell each other, by themselves."""
        for _ in range(6):
            self.parallel.ranks.most([0])
        self.parallel.ranks.sums([0.5])

    def _admission(self, _: Choice) -> Admission:
        return Admission(lambda shape: shape.samples, lambda shape: 1.0, SAMPLES // 4)


def rows(trained: Trained, rounds: int) -> Iterator[Row]:
    """Each beside the step without the engine in the same round."""
    bare = "the step alone"
    ways = {bare: trained.bare, "the step through the engine": trained.guarded, "its votes": trained.voted}
    aims = {"the step through the engine": "1.02"}
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


def one_rank(rank: int, port: int, rounds: int) -> None:
    """Everything on one rank; the first prints."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = Ranks.join("cpu")
    for sharding in SHARDINGS:
        found = table(list(rows(Trained(ranks, sharding), rounds)))
        if rank == 0:
            step = f"{SAMPLES} samples of {TOKENS} tokens, two micro-batches on each of {RANKS} ranks"
            print(f"\n{sharding}, 8 layers of 256: {step}")
            print("\n".join(found), flush=True)
    ranks.leave()


def main() -> None:
    """Runs everything and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="rounds; the median of them is printed (default 31)")
    rounds = parser.parse_args().rounds
    for line in machine():
        print(line)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(one_rank, (port, rounds), RANKS)


if __name__ == "__main__":
    main()
