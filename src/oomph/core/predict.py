"""From events to a prediction: the replay on the card's memory, and where the memory is at the worst moment."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Literal

from oomph.core.allocator import Allocator, AllocatorSettings, Replay, replay
from oomph.core.devices import Gpu, outside
from oomph.core.events import Events, Kind
from oomph.core.quantized_sizes import INT8_PRODUCT, NO_OUTLIERS
from oomph.records import Choice, FailingRequest, PhasePeak, Prediction

Lack = Literal["bytes", "pieces"]
"""What a card lacks: bytes, or bytes in one piece, which other settings of the allocator may find."""
LARGEST = 8
UNMEASURED = 0.01
"""The error bound, as a share of the peak, for what has not been compared with a measurement of the same stack."""
CONVOLUTION = "aten.convolution.default"
_CONVOLUTIONS = {
    CONVOLUTION: "what cuDNN's workspace for a convolution takes beyond copies of its tensors",
    "aten.convolution_backward.default": "partial sums that cuDNN may keep for the gradient of a convolution's weight",
}


def predict(
    events: Events, choice: Choice, gpu: Gpu, unclassified: Collection[str], result: Replay | None = None
) -> Prediction:
    """What one rank needs of a card, and whether it fits.

    Args:
        events: the rank's events, as `layout.lay_out` gives them.
        choice: for the allocator's settings and the number of GPUs.
        gpu: the card.
        unclassified: operators whose CUDA kernels nobody has looked at.
        result: what `serve` gave of the same events, where it is known.
    """
    beside, usable = outside(gpu, choice.gpus), usable_bytes(choice, gpu)
    result = result or serve(events, choice, gpu)
    whole = result if result.failure is None else _replay(events, choice, None)
    phases, evaluated = _split(whole.phases)
    return Prediction(
        fits=result.failure is None,
        allocated_peak_bytes=whole.peak_allocated,
        reserved_peak_bytes=whole.peak_reserved,
        outside_bytes=beside.bytes,
        usable_bytes=usable,
        phases=phases,
        by_role=_sums(result.block_sizes, lambda storage: events.kinds[storage].role),
        by_module=_sums(result.block_sizes, lambda storage: owner(events.kinds[storage])),
        failing_request=_failing(events, result),
        largest_requests=tuple(events.request(storage) for storage in _largest(events, result.block_sizes)),
        error_bound=_bound(events, unclassified, whole.peak_allocated),
        leaves_out=(*_outliers(events), *leaves_out(choice, unclassified)),
        outside={line.label: line.bytes for line in beside.lines},
        evaluation=evaluated,
    )


def usable_bytes(choice: Choice, gpu: Gpu) -> int:
    """What the allocator may reserve on the card: all but what lies outside of it."""
    return gpu.memory_bytes - outside(gpu, choice.gpus).bytes


def serve(events: Events, choice: Choice, gpu: Gpu) -> Replay:
    """The replay on the card's memory, which ends where a request cannot be served."""
    return _replay(events, choice, usable_bytes(choice, gpu))


def surely(prediction: Prediction) -> bool:
    """Whether what is reserved leaves room for the error bound, so that the allocator need not give segments back."""
    return prediction.fits and prediction.reserved_peak_bytes + prediction.bound_bytes <= prediction.usable_bytes


def lack(events: Events, result: Replay, usable: int) -> Lack | None:
    """What the card lacked in a replay; None where it lacked nothing."""
    if result.failure is None:
        return None
    return "bytes" if result.failure.allocated + events.sizes[result.failure.storage] > usable else "pieces"


def _replay(events: Events, choice: Choice, capacity_bytes: int | None) -> Replay:
    settings = AllocatorSettings(expandable_segments=choice.expandable_segments)
    allocator = Allocator(capacity_bytes=capacity_bytes, settings=settings)
    return replay(events.sizes, events.segments, allocator, streams=events.streams)


def owner(kind: Kind) -> str:
    """Whose a storage is: its module's path shortened to what a table can show, or the sharding's or a library's name.

    ``model.language_model.layers.*.self_attn`` for example. Experts and routers are apart from the block that holds them.
    """
    if not kind.module:
        return _LIBRARIES.get(kind.op.partition(".")[0], "outside the model's modules")
    before, layers, after = kind.module.partition("{}")
    if layers:
        steps = after.split(".")[1:]
        shown = next((depth for depth, step in enumerate(steps, 1) if step in _ROUTED), 1)
        return ".".join([f"{before}*", *steps[:shown]])
    return ".".join(kind.module.split(".")[:3])


_ROUTED = {"experts", "router", "gate"}
_LIBRARIES = {"zero": "DeepSpeed's ZeRO", "ddp": "DistributedDataParallel", "fsdp2": "fully_shard"}


def _split(phases: tuple[PhasePeak, ...]) -> tuple[tuple[PhasePeak, ...], PhasePeak | None]:
    step = tuple(phase for phase in phases if phase.phase != "evaluate")
    return step, next((phase for phase in phases if phase.phase == "evaluate"), None)


def _sums(blocks: dict[int, int], name: Callable[[int], str]) -> dict[str, int]:
    sums: dict[str, int] = defaultdict(int)
    for storage, nbytes in blocks.items():
        sums[name(storage)] += nbytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _largest(events: Events, alive: Iterable[int]) -> list[int]:
    return heapq.nlargest(LARGEST, alive, key=lambda storage: events.sizes[storage])


def _failing(events: Events, result: Replay) -> FailingRequest | None:
    if result.failure is None:
        return None
    request = events.request(result.failure.storage)
    return FailingRequest(**vars(request), in_use_bytes=result.failure.allocated, reserved_bytes=result.failure.reserved)


def _bound(events: Events, unclassified: Collection[str], peak: int) -> float:
    """A fraction of the peak below which the truth may lie above the prediction.

    One per cent for what has not been compared with a measurement of the same stack, and once the largest output of an
    operator whose CUDA kernel nobody has looked at, since it may need a temporary as large.
    """
    unknown = (size for size, kind in zip(events.sizes, events.kinds, strict=True) if kind.op in unclassified)
    return UNMEASURED + (max(unknown, default=0) / peak if peak else 0.0)


def _outliers(events: Events) -> tuple[str, ...]:
    return (NO_OUTLIERS,) if any(kind.op.startswith(INT8_PRODUCT) for kind in events.kinds) else ()


def leaves_out(choice: Choice, unclassified: Collection[str]) -> tuple[str, ...]:
    """What a prediction does not count, in words."""
    items = ["other processes on the card"]
    if choice.optimizer == "adamw-8bit-paged":
        items.insert(0, "optimizer states in managed memory, which gives way on the GPU and then lies in host memory")
    items[:0] = [words for name, words in _CONVOLUTIONS.items() if name in unclassified]
    if choice.gpus > 1:
        items.append("communicators beyond the first")
    others = sorted(set(unclassified) - _CONVOLUTIONS.keys())
    if others:
        names = ", ".join(others[:4]) + (" ..." if len(others) > 4 else "")
        items.append(f"temporaries of operators whose CUDA kernels nobody has looked at: {names}")
    return tuple(items)
