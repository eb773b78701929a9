"""The order in which transformers brings a model onto the GPU and quantizes it meanwhile, and PEFT prepares it for training.

From transformers 5.0.0, ``core_model_loading.py``, ``convert_and_load_state_dict_in_model``, which ``from_pretrained`` with a
``device_map`` runs: worker threads take the checkpoint's tensors by their keys, in natural order. Each allocates the tensor
on the GPU and then fills it. The main thread waits for the tensors in the same order, quantizes each that has to be, and lets
the 16-bit one go. Nothing stops the workers from running ahead, so what lies on the GPU beside the packed weights depends on
how fast each thread is. Later versions (5.17 and 5.23 were read) quantize without workers: `Workers(0)`.

Before, ``caching_allocator_warmup`` (``modeling_utils.py``) allocates and frees one block of the bytes that the quantized
model takes. Afterwards come buffers, then the casts of PEFT's ``prepare_model_for_kbit_training`` (``utils/other.py``), one
after the other in the model's order, and then adapters. PEFT 0.20 empties the cache after the casts, PEFT 0.19 does not.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from oomph.core.events import Events, Kind, Segment
from oomph.core.ranks import copied

_SOURCE = "load:source"


@dataclass(frozen=True)
class Workers:
    """How fast the threads are. Time is counted in bytes: those that a worker brings meanwhile.

    Attributes:
        count: worker threads; transformers has ``min(4, os.cpu_count())``. 0: the main thread brings each tensor itself.
        delay: what the main thread takes to quantize a weight and put it into the model.
        spread: each time is multiplied by a random factor between 1 - `spread` and 1 + `spread`.
        seed: of the random factors.
    """

    count: int = 4
    delay: float = 0.0
    spread: float = 0.0
    seed: int = 0


def interleavings() -> tuple[Workers, ...]:
    """Loads to take an interval from: main threads from much faster to much slower than the workers.

    A worker reads, converts and copies on the order of 1 GB/s, so that the delays are up to 10 ms for a weight: from no time at
    all to a main thread that hardly gets to run beside four workers. Times vary by half.
    """
    delays = (0.0, 3e4, 1e5, 3e5, 1e6, 2e6, 3e6, 5e6, 1e7)
    return tuple(Workers(delay=delay, spread=0.5, seed=seed) for seed, delay in enumerate(delays))


@dataclass
class _Weight:
    """A tensor of the checkpoint: its 16-bit storage, what quantizing it leaves, and what it becomes later."""

    key: tuple[object, ...]
    source: int
    held: list[int] = field(default_factory=list)
    lifted: int = -1


def from_pretrained(events: Events, workers: Workers) -> Events:
    """The events of a run whose model comes from ``from_pretrained`` with a ``quantization_config`` and a ``device_map``.

    The cache is not emptied in between, as PEFT 0.20 does it.

    Args:
        events: whose first segment is ``load``, of a model with nf4 weights and adapters in float32. Weights that are float32
            there are 16-bit ones in the checkpoint.
        workers: how fast the loader's threads are.
    """
    result = copied(events)
    load, *others = events.segments
    weights, rest = _weights(result, load.timeline)
    adapters = [s for s in rest if ".lora_" in result.kinds[s].module]
    inputs = [s for s in rest if result.kinds[s].role == "input"]
    buffers = [s for s in rest if s not in adapters and s not in inputs]
    sizes = result.sizes
    packed = sum(max(sizes[s] for s in weight.held) if weight.held else sizes[weight.source] for weight in weights)
    warmup = result.add(packed // 2 * 2, (packed // 2,), _temporary(result, weights[0].source, "load:warmup"))
    timeline = [warmup, ~warmup, *_interleaved(sorted(weights, key=lambda weight: weight.key), sizes, workers), *buffers]
    for weight in sorted((w for w in weights if w.lifted >= 0), key=lambda w: result.parameters[w.lifted]):
        timeline += [weight.lifted, ~weight.source]
    result.segments = [Segment(load.name, [*timeline, *adapters, *inputs], load.marks, load.repeat), *others]
    return result


def _temporary(events: Events, storage: int, op: str) -> Kind:
    return events.kinds[storage]._replace(op=op, role="temporary")


def _weights(events: Events, timeline: Sequence[int]) -> tuple[list[_Weight], list[int]]:
    """The checkpoint's tensors, and all else that the load allocates, in order."""
    weights, rest = list[_Weight](), list[int]()
    quantizing: _Weight | None = None
    for entry in timeline:
        if entry < 0:
            quantizing = None
        elif events.kinds[entry].op == _SOURCE:
            quantizing = _Weight(_key(events, entry), entry)
            weights.append(quantizing)
        elif quantizing is not None:
            quantizing.held.append(entry)
        elif events.parameters[entry] < 0 or ".lora_" in events.kinds[entry].module:
            rest.append(entry)
        elif events.kinds[entry].dtype == "float32":
            kind = _temporary(events, entry, _SOURCE)._replace(dtype="float16")
            source = events.add(events.sizes[entry] // 2, events.shapes[entry], kind, events.layers[entry])
            weights.append(_Weight(_key(events, entry), source, lifted=entry))
        else:
            weights.append(_Weight(_key(events, entry), entry))
    return weights, rest


def _key(events: Events, storage: int) -> tuple[object, ...]:
    """Orders keys as ``dot_natural_key`` does: numbers by value, before words; a bias, of one dimension, before its weight."""
    steps = events.module(storage).replace(".base_layer", "").split(".")
    return tuple((0, int(step), "") if step.isdigit() else (1, 0, step) for step in steps), len(events.shapes[storage])


def _interleaved(weights: Sequence[_Weight], sizes: Sequence[int], workers: Workers) -> Iterator[int]:
    """What the threads allocate and free, by the time at which each comes to it.

    A worker takes the next tensor when it is done with one, and needs time in proportion to its bytes.
    """
    chance = random.Random(workers.seed)

    def jitter() -> float:
        return chance.uniform(1 - workers.spread, 1 + workers.spread)

    free = [0.0] * workers.count
    moments: list[tuple[float, int, int, list[int]]] = []
    ready = [0.0] * len(weights)
    for number, weight in enumerate(weights if workers.count else ()):
        start = heapq.heappop(free)
        ready[number] = start + sizes[weight.source] * jitter()
        heapq.heappush(free, ready[number])
        moments.append((start, 0, number, [weight.source]))
    clock = 0.0
    for number, weight in enumerate(weights):
        if not workers.count:
            moments.append((clock, 1, number, [weight.source]))
        if weight.held:
            start = max(clock, ready[number])
            clock = start + workers.delay * jitter()
            moments += [(start, 1, number, weight.held), (clock, 1, number, [~weight.source])]
        else:
            clock = max(clock, ready[number])
    return (entry for *_, entries in sorted(moments, key=lambda moment: moment[:3]) for entry in entries)
