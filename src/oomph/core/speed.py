"""How long a step takes, by a roofline: an estimate that is good for comparing choices, not for promising times.

Every operator takes the longest of its floating-point operations at the dense peak of its dtype, its memory traffic at the
memory's peak rate, and what eager PyTorch needs to launch it. Collectives take what a ring needs; of them counts what
does not fit behind the computation that they overlap with. docs/speed.md has the formulas, sources and assumptions.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from oomph.core.choices import micro_batch_sizes
from oomph.core.closed_form import ClosedForm
from oomph.core.devices import Gpu
from oomph.core.layout import Shape
from oomph.core.ranks import DdpSettings, hidden_size
from oomph.core.trace import ITEM_BYTES, Parameter
from oomph.core.work import Array
from oomph.records import Choice, Speed

LAUNCH_SECONDS: Final = 7e-6
"""The least that an operator takes in eager PyTorch.

meta-pytorch/autoparallel#146 fits 7 µs for each operator to measurements on H100. Other readings: 9.4 µs beside each kernel
on a DGX H100 (NVIDIA/Fuser#3507, torch-eager); 5 µs for an operator without autograd and 7 µs with it, on a CPU
(pytorch/pytorch#41383).
"""
HOST_BANDWIDTH: Final = 204.8e9
"""Bytes per second of a machine's memory, which all its GPUs share: eight channels of DDR4-3200, 25.6 GB/s each."""
ADAMW_PASSES: Final = 7
"""Passes of a fused AdamW over a tensor: weight, gradient and two moments are read; all but the gradient are written."""
CLIPPING_PASSES: Final = 3
"""Passes of clipping over the gradients: read for their norm, read and written for the factor."""
_FP32: Final = ITEM_BYTES["float32"]
_ATTENTION_BACKWARD: Final = "aten._scaled_dot_product_"
_FOUR_OF_FIVE: Final = 0.8
"""A fused attention's backward makes five products, one of which repeats the forward's scores (torch.utils.flop_counter)."""

_EFFICIENT: Final = "_scaled_dot_product_efficient_attention"
EFFICIENT_SLOWNESS: Final = 2.0
"""How much longer the memory-efficient attention kernel takes than FlashAttention-2 for the same products.

Dao, "FlashAttention-2", arXiv:2307.08691, section 4.1, A100: 1.7 to 3.0 times faster than FlashAttention, and figures 4 to 6
show xFormers' CUTLASS kernel, from which PyTorch's comes, close to FlashAttention. Without it the two kernels would tie.
"""


class Pass(NamedTuple):
    """Seconds of one micro-batch."""

    forward: float
    recompute: float
    backward: float


@dataclass(frozen=True)
class Cost:
    """What the operators of a step take on one card, without communication.

    Attributes:
        first: the first micro-batch of a step, which makes the gradients.
        next: a later one, which adds to them.
        optimizer: seconds of clipping the gradients and of the optimizer's step.
        flops: floating-point operations of one micro-batch's forward and backward, nothing counted twice.
    """

    first: Pass
    next: Pass
    optimizer: float
    flops: float


def cost(form: ClosedForm, shape: Shape, gpu: Gpu, optimizer_share: float = 1.0) -> Cost:
    """The roofline of a form's operators for a micro-batch of a shape.

    Args:
        form: of the shape's family.
        shape: (samples, tokens, images).
        gpu: the card.
        optimizer_share: the optimizer's memory traffic on this rank, as a part of the traced one's.
    """
    return Facts(form).cost(shape, gpu, optimizer_share)


class Facts:
    """What is asked of a form again and again."""

    def __init__(self, form: ClosedForm) -> None:
        self.form, self.work = form, form.work
        rows = form.work.rows
        self._times: Array = np.array([row.times for row in rows], dtype=np.float64)
        self._launches: Array = np.array([row.launches for row in rows], dtype=np.float64)
        self._dtypes = sorted({row.dtype for row in rows})
        self._dtype = np.array([self._dtypes.index(row.dtype) for row in rows], dtype=np.int64)
        again = [row.name.startswith(_ATTENTION_BACKWARD) and row.name.endswith("_backward.default") for row in rows]
        self._model_share: Array = np.where(np.array(again, dtype=bool), _FOUR_OF_FIVE, 1.0) * self._times
        slow = np.array([_EFFICIENT in row.name for row in rows], dtype=bool)
        self._slowness: Array = np.where(slow, EFFICIENT_SLOWNESS, 1.0)
        self._optimizer = self._rows("step/optimizer", "optimizer")
        trained = [parameter for parameter in form.parameters if parameter.trainable]
        self.weight_bytes = sum(parameter.nbytes for parameter in form.parameters)
        self.layer_bytes = sum(parameter.nbytes for parameter in form.parameters if _layer(parameter))
        self.trained_bytes = sum(parameter.nbytes for parameter in trained)
        self.trained_layer_bytes = sum(parameter.nbytes for parameter in trained if _layer(parameter))
        self.trained_elements = sum(parameter.numel for parameter in trained)
        self.widening = self.trained_elements * _FP32 / max(1, self.trained_bytes)
        self.casting_bytes = 2 * (self.trained_elements * _FP32 + self.trained_bytes) if self.widening > 1 else 0

    def cost(self, shape: Shape, gpu: Gpu, optimizer_share: float) -> Cost:
        """What `speed.cost` gives, of this form."""
        flops, traffic = self.work.evaluate(shape)
        traffic[self._optimizer] *= optimizer_share
        peaks = np.array([_peak(gpu, dtype) for dtype in self._dtypes])
        seconds = np.maximum(flops * self._slowness / peaks[self._dtype], traffic / gpu.bandwidth)
        seconds = np.maximum(seconds, self._launches * LAUNCH_SECONDS) * self._times
        first, following = (
            Pass(*(float(seconds[self._rows(piece, phase)].sum()) for phase in Pass._fields)) for piece in ("first", "next")
        )
        model = [(flops * self._model_share)[self._rows("next", phase)].sum() for phase in ("forward", "backward")]
        return Cost(first, following, float(seconds[self._optimizer].sum()), float(sum(model)))

    @functools.cached_property
    def _places(self) -> dict[tuple[str, str], npt.NDArray[np.int64]]:
        found: dict[tuple[str, str], list[int]] = {}
        for number, row in enumerate(self.work.rows):
            found.setdefault((row.piece, row.phase), []).append(number)
        return {key: np.array(numbers, dtype=np.int64) for key, numbers in found.items()}

    def _rows(self, piece: str, phase: str) -> npt.NDArray[np.int64]:
        return self._places.get((piece, phase), np.zeros(0, dtype=np.int64))

    @functools.cached_property
    def block_inputs_per_token(self) -> int:
        """Bytes of the hidden states that enter the language model's blocks, for each token."""
        blocks = {_layer(p) for p in self.form.parameters if p.part not in ("vision", "projector")} - {""}
        itemsize = next((p.itemsize for p in self.form.parameters if _layer(p) in blocks), 0)
        return len(blocks) * hidden_size(self.form.parameters) * itemsize


@functools.cache
def _layer_of(name: str) -> str:
    """The path of the layer that a parameter lies in: up to the first number in its name; empty outside of layers."""
    steps = name.split(".")
    number = next((at for at, step in enumerate(steps) if step.isdigit()), None)
    return "" if number is None else ".".join(steps[: number + 1])


def _layer(parameter: Parameter) -> str:
    return _layer_of(parameter.name)


def _peak(gpu: Gpu, dtype: str) -> float:
    """FLOP/s of a dtype; float32's where the card has no rate for it. Torch multiplies float32 without TF32 by default."""
    return gpu.peak_flops.get(dtype, gpu.peak_flops["float32"])


# --- Communication -----------------------------------------------------------------------------------------------------


def ring_all_reduce(nbytes: float, ranks: int, rate: float) -> float:
    """Seconds in which a ring sums `nbytes` of each of the ranks, at `rate` bytes per second out of each.

    Each byte passes 2 (ranks - 1) / ranks times over a rank's link (NVIDIA/nccl-tests 03a204a, doc/PERFORMANCE.md).
    """
    return 2 * ring_all_gather(nbytes, ranks, rate)


def ring_all_gather(nbytes: float, ranks: int, rate: float) -> float:
    """Seconds in which a ring gathers `nbytes`, counted over all ranks; a reduce-scatter takes as long (ibid.)."""
    return nbytes * (ranks - 1) / (ranks * rate)


def link_rate(gpu: Gpu, gpus_of_a_node: int) -> float:
    """Bytes per second that one GPU sends to another in its node: one direction of its links, or of PCIe without any.

    A bridge joins pairs, so that a ring of more than two GPUs leaves it.
    """
    bridged = "pairs" in gpu.interconnect and gpus_of_a_node > 2
    both = gpu.pcie_bandwidth if gpu.interconnect_bandwidth is None or bridged else gpu.interconnect_bandwidth
    return both / 2


def host_rate(gpu: Gpu, gpus_of_a_node: int) -> float:
    """Bytes per second between a GPU and the host, one way, while all GPUs of the node copy."""
    return min(gpu.pcie_bandwidth / 2, HOST_BANDWIDTH / gpus_of_a_node)


class _Collectives(NamedTuple):
    """Seconds of communication on one rank, by what they can hide behind.

    Attributes:
        forward: of each micro-batch, beside its forward.
        backward: of each micro-batch, beside its recomputation and backward.
        each: of each micro-batch, beside nothing.
        last: once in a step, beside the last micro-batch's recomputation and backward.
        tail: the part of `last` that begins when the backward has ended.
        step: once in a step, beside nothing.
    """

    forward: float = 0.0
    backward: float = 0.0
    each: float = 0.0
    last: float = 0.0
    tail: float = 0.0
    step: float = 0.0


def _collectives(facts: Facts, choice: Choice, gpu: Gpu, network_bytes_per_second: float) -> _Collectives:
    """What the choice's sharding communicates, as torch 2.13 and DeepSpeed 0.9.5 do it."""
    world, local = choice.gpus, choice.gpus // choice.nodes
    link = link_rate(gpu, local)
    rate = link if choice.nodes == 1 else min(link, network_bytes_per_second) if local > 1 else network_bytes_per_second
    trained, kind = facts.trained_bytes, choice.sharding
    if kind == "ddp":
        bucket = min(trained, DdpSettings().bucket_bytes)
        return _Collectives(last=ring_all_reduce(trained, world, rate), tail=ring_all_reduce(bucket, world, rate))
    if kind == "zero1":
        return _Collectives(last=trained / rate, step=ring_all_gather(trained, world, rate))
    if kind == "zero2":
        return _Collectives(backward=trained / rate, step=ring_all_gather(trained, world, rate))
    if kind == "fsdp2-hybrid":
        return _of_shards(facts, choice, local, link, network_bytes_per_second)
    return _of_shards(facts, choice, world, rate, network_bytes_per_second) if kind != "none" else _Collectives()


def _of_shards(facts: Facts, choice: Choice, ranks: int, rate: float, network: float) -> _Collectives:
    """Weights that are gathered layer by layer, and gradients that are scattered so.

    What lies outside of the layers is gathered before the forward begins, and its gradients are reduced when the backward
    has ended. Copies of the model, with hybrid sharding, add up their gradients between nodes.
    """
    width = facts.widening if choice.master_weights and choice.sharding != "zero3" else 1.0
    copies = choice.gpus // ranks

    def reduced(gradients: float) -> float:
        scattered = ring_all_gather(gradients * width, ranks, rate)
        return scattered + ring_all_reduce(gradients * width / ranks, copies, network)

    layers = ring_all_gather(facts.layer_bytes, ranks, rate)
    outside = ring_all_gather(facts.weight_bytes - facts.layer_bytes, ranks, rate)
    return _Collectives(
        forward=layers,
        backward=(0.0 if choice.sharding == "fsdp2-no-reshard" else layers) + reduced(facts.trained_layer_bytes),
        each=outside + reduced(facts.trained_bytes - facts.trained_layer_bytes),
    )


# --- The step ----------------------------------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """The micro-batches of the GPU that has most samples: samples of the first; (samples, number) of the others in order."""

    first: int
    others: tuple[tuple[int, int], ...]

    @property
    def total(self) -> int:
        return self.first + sum(samples * count for samples, count in self.others)


@functools.lru_cache(maxsize=4096)
def _sizes(effective_batch: int, gpus: int, micro_batch: int, accumulation: int) -> _Sizes:
    sizes = micro_batch_sizes(Choice(micro_batch, accumulation, effective_batch, gpus))[0]
    return _Sizes(sizes[0], tuple(Counter(sizes[1:]).items()))


def estimate(
    form: ClosedForm,
    choice: Choice,
    gpu: Gpu,
    tokens: int,
    images_per_sample: int,
    *,
    network_bytes_per_second: float,
    samples_in_stage: float | None,
    costs: dict[Any, Any] | None = None,
) -> Speed:
    """How fast a choice is: the GPU with most samples sets the pace.

    Args:
        form: of the micro-batch's family. Smaller micro-batches at the end of a step are timed with it too.
        choice: the knobs.
        gpu: the card.
        tokens: of a sample.
        images_per_sample: of a sample.
        network_bytes_per_second: what one GPU sends to another node, in one direction.
        samples_in_stage: samples that the stage trains on, epochs included; None where that is not known.
        costs: where costs are kept from call to call, with the forms and cards that they are of.
    """
    known: dict[Any, Any] = {} if costs is None else costs
    facts = known.get(id(form)) or known.setdefault(id(form), Facts(form))
    sizes = _sizes(choice.effective_batch, choice.gpus, choice.micro_batch, choice.accumulation)
    share = _optimizer_share(choice, facts)
    moved = _remembered_collectives(known, facts, choice, gpu, network_bytes_per_second)
    sums = _Sums()
    for samples, count, first in ((sizes.first, 1, True), *((samples, count, False) for samples, count in sizes.others)):
        # A form of one shape stands for it alone; fewer samples take their part of its time.
        timed, part = (choice.micro_batch, samples / choice.micro_batch) if form.work.constant else (samples, 1.0)
        shape = Shape(timed, tokens, timed * images_per_sample)
        sums.add(_remembered_cost(known, facts, shape, gpu, share), first, count, part, moved)
    behind = sums.last.recompute + sums.last.backward
    communication = sums.communication + max(moved.tail, moved.last - behind) + moved.step
    optimizer, offload = _optimizer(choice, gpu, facts, sums.optimizer)
    if choice.checkpointing == "blocks-offload":
        offload += 2 * sizes.total * tokens * facts.block_inputs_per_token / host_rate(gpu, choice.gpus // choice.nodes)
    seconds = {
        "compute": sums.compute,
        "recompute": sums.recompute,
        "optimizer": optimizer,
        "communication": communication,
        "offload": offload,
    }
    step = max(sum(seconds.values()), LAUNCH_SECONDS)
    rate = choice.effective_batch / step
    flops = sums.flops * choice.effective_batch / sizes.total
    return Speed(
        step_seconds=step,
        samples_per_second=rate,
        tokens_per_second=rate * tokens,
        flop_utilisation=flops / (step * choice.gpus * _peak(gpu, choice.precision.removesuffix("-mixed"))),
        gpu_hours=None if samples_in_stage is None else samples_in_stage / rate * choice.gpus / 3600,
        seconds=seconds,
    )


class _Sums:
    """What the micro-batches of a step add up to, in seconds and floating-point operations."""

    def __init__(self) -> None:
        self.compute = self.recompute = self.communication = self.optimizer = self.flops = 0.0
        self.last = Pass(0.0, 0.0, 0.0)

    def add(self, cost: Cost, first: bool, count: int, part: float, moved: _Collectives) -> None:
        """Adds `count` micro-batches, each of which takes a `part` of the cost."""
        forward, recompute, backward = cost.first if first else cost.next
        self.last = Pass(forward * part, recompute * part, backward * part)
        self.compute += count * (self.last.forward + self.last.backward)
        self.recompute += count * self.last.recompute
        exposed = max(0.0, moved.forward - self.last.forward)
        exposed += max(0.0, moved.backward - self.last.recompute - self.last.backward) + moved.each
        self.communication += count * exposed
        self.optimizer = cost.optimizer
        self.flops += count * part * cost.flops


def _remembered_cost(known: dict[Any, Any], facts: Facts, shape: Shape, gpu: Gpu, share: float) -> Cost:
    key = (id(facts), id(gpu), shape, share)
    found: Cost | None = known.get(key)
    if found is None:
        found = known[key] = facts.cost(shape, gpu, share)
        known[id(gpu)] = gpu
    return found


def _remembered_collectives(known: dict[Any, Any], facts: Facts, choice: Choice, gpu: Gpu, network: float) -> _Collectives:
    key = (id(facts), id(gpu), choice.sharding, choice.gpus, choice.nodes, choice.master_weights, network)
    found: _Collectives | None = known.get(key)
    if found is None:
        found = known[key] = _collectives(facts, choice, gpu, network)
        known[id(gpu)] = gpu
    return found


def _ranks_of_states(choice: Choice) -> int:
    """Ranks that share the optimizer's states."""
    if choice.sharding in ("none", "ddp"):
        return 1
    return choice.gpus // choice.nodes if choice.sharding == "fsdp2-hybrid" else choice.gpus


def _optimizer_share(choice: Choice, facts: Facts) -> float:
    """A rank's part of the traced optimizer's traffic, which is wider where it works on float32 copies.

    Beside that, gradients become float32 and weights are rounded: `Facts.casting_bytes`.
    """
    return (facts.widening if choice.master_weights else 1.0) / _ranks_of_states(choice)


def _optimizer(choice: Choice, gpu: Gpu, facts: Facts, on_gpu: float) -> tuple[float, float]:
    """Seconds of the optimizer, and of copies to the host and back where it runs there.

    Then the gradients are clipped on the GPU and copied down; when the host has stepped, the weights are copied up. Nothing
    of that overlaps. The GPUs of a node share its memory's bandwidth.

    Args:
        choice: the knobs.
        gpu: the card.
        facts: of the form.
        on_gpu: seconds of the rank's share of the traced optimizer.
    """
    ranks, local = _ranks_of_states(choice), choice.gpus // choice.nodes
    if not choice.optimizer_offload:
        return on_gpu + choice.master_weights * facts.casting_bytes / (ranks * gpu.bandwidth), 0.0
    clipping = CLIPPING_PASSES * facts.trained_bytes / (ranks * gpu.bandwidth)
    states = facts.trained_bytes * (facts.widening if choice.master_weights else 1.0)
    stepping = ADAMW_PASSES * states * local / (ranks * HOST_BANDWIDTH)
    copies = 2 * facts.trained_bytes / (ranks * host_rate(gpu, local))
    return clipping + stepping, copies
