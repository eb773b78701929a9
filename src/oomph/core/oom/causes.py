"""Why a request could not be served: each cause that the numbers of the message speak for, with its arithmetic in words.

PyTorch gives back all memory that no tensor uses before it raises, but for segments of which a part is in use
(`release_cached_blocks` in c10/cuda/CUDACachingAllocator.cpp). What it still holds unallocated is therefore in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator

from oomph.diagnosis_records import Cause, CauseName, Certainty, OomMessage
from oomph.units import GIB, MIB, size

_CERTAINTIES: tuple[Certainty, ...] = ("certain", "likely", "possible", "unlikely")
_ABSURD = 64 * 1024 * GIB
_MORE_THAN_ANY_CARD = 300 * GIB
_NO_LIMIT = 2**59
_ORDINARY_OUTSIDE = 2 * GIB
_ROUNDING = 24 * MIB
_DEVICE = ("cuda allocator", "hip allocator", "xpu allocator")
_RUNTIMES = {
    "cuda runtime": "the CUDA runtime",
    "hip runtime": "the HIP runtime",
    "cublas": "cuBLAS, which allocates its workspace and handle",
    "cudnn": "cuDNN",
    "nccl": "NCCL, which allocates its buffers",
    "xpu allocator": "Intel's runtime",
}


def causes(message: OomMessage) -> tuple[Cause, ...]:
    """The causes of a message, the most plausible first.

    Args:
        message: what was reported.
    """
    if message.kind in _DEVICE and (message.requested_bytes is not None or message.allocated_bytes is not None):
        found = list(_of_device(message))
    elif message.kind == "mps":
        found = list(_of_mps(message))
    elif message.kind in ("cpu allocator", "linux oom killer"):
        found = [_host(message)]
    elif message.kind in _DEVICE and message.kind != "xpu allocator":
        found = [_cause("real need", "the step needs more than there is", "possible", ["the message gives no sizes"])]
    else:
        found = list(_of_runtime(message))
    ordered = sorted(found, key=lambda cause: _CERTAINTIES.index(cause.certainty))
    return tuple(
        Cause(cause.name, cause.title, cause.numbers, cause.why, cause.certainty, rank) for rank, cause in enumerate(ordered, 1)
    )


def _cause(name: CauseName, title: str, certainty: Certainty, why: list[str], **numbers: int | None) -> Cause:
    return Cause(name, title, {key: value for key, value in numbers.items() if value is not None}, tuple(why), certainty, 0)


def _of_device(message: OomMessage) -> Iterator[Cause]:
    for cause in (_huge(message), _limit(message), _fragmentation(message), _others(message), _gave_up(message)):
        if cause is not None:
            yield cause
    outside = _outside(message)
    if outside is not None:
        yield outside
    need = _need(message)
    if need is not None:
        yield need


def _huge(message: OomMessage) -> Cause | None:
    asked, capacity = message.requested_bytes, message.capacity_bytes
    if asked is None:
        return None
    why = [f"{size(asked)} was asked for in one piece"]
    if asked > _ABSURD:
        why.append(
            "no card has so much: the size is most likely the product of a length or an index that is garbage or negative"
        )
        return _cause("huge request", "a size that makes no sense", "certain", why, requested=asked)
    if capacity is not None and asked > capacity - _ROUNDING:
        why.append(f"the card has {size(capacity)} in all, so even an empty one has no room for this tensor")
        return _cause("huge request", "one tensor larger than the card", "certain", why, requested=asked, capacity=capacity)
    if capacity is None and asked > _MORE_THAN_ANY_CARD:
        why.append("no card has so much")
        return _cause("huge request", "one tensor larger than any card", "certain", why, requested=asked)
    if capacity is not None and asked > capacity // 2:
        why.append(f"that is {_share(asked, capacity)} of the card, {size(capacity)}")
        return _cause("huge request", "one very large tensor", "likely", why, requested=asked, capacity=capacity)
    return None


def _limit(message: OomMessage) -> Cause | None:
    limit, asked, held = message.limit_bytes, message.requested_bytes, message.reserved_bytes or message.allocated_bytes
    if limit is None or limit >= _NO_LIMIT or asked is None:
        return None
    why = [f"this process was allowed {size(limit)} of the card's memory (`set_per_process_memory_fraction`)"]
    if held is not None and held + asked > limit - _ROUNDING:
        why.append(f"the {size(held)} that it holds and the {size(asked)} that it asked for are {size(held + asked)}")
        free = message.free_bytes
        sure: Certainty = "certain" if free is not None and free >= asked else "likely"
        if free is not None and free >= asked:
            why.append(f"the card itself had {size(free)} free")
        return _cause("limit", "the limit that was set for this process", sure, why, limit=limit, held=held, requested=asked)
    why.append("it was not reached")
    return _cause("limit", "the limit that was set for this process", "unlikely", why, limit=limit, requested=asked)


def _fragmentation(message: OomMessage) -> Cause | None:
    asked, cached = message.requested_bytes, message.unallocated_bytes
    if asked is None or cached is None:
        return None
    free = message.free_bytes or 0
    pools = message.private_pool_bytes
    tail = [f"{size(pools)} of what is allocated is in the pools of CUDA graphs"] if pools else []
    if cached >= asked:
        why = [
            f"the allocator held {size(cached)} that no tensor used, more than the {size(asked)} that was asked for",
            "it could not give this back, as it lies between tensors that are in use: no single piece was large enough",
            *tail,
        ]
        sure: Certainty = "likely" if asked > 20 * MIB else "possible"
        return _cause("fragmentation", "free memory in pieces", sure, why, unallocated=cached, requested=asked, free=free)
    if cached + free >= asked and cached > 0 and free < asked:
        why = [
            f"{size(cached)} unused in the allocator and {size(free)} free on the card are {size(cached + free)}, "
            f"more than the {size(asked)} that was asked for, but in pieces",
            *tail,
        ]
        return _cause("fragmentation", "free memory in pieces", "likely", why, unallocated=cached, requested=asked, free=free)
    if message.reserved_bytes and cached > message.reserved_bytes // 5:
        why = [
            f"{size(cached)}, {_share(cached, message.reserved_bytes)} of what the allocator holds, was used by no tensor; "
            f"all of it together would not have been enough for {size(asked)}, but nearly so much need not be lost",
            *tail,
        ]
        return _cause("fragmentation", "free memory in pieces", "possible", why, unallocated=cached, requested=asked, free=free)
    return None


def _others(message: OomMessage) -> Cause | None:
    asked, free = message.requested_bytes, message.free_bytes
    named = sum(process.bytes for process in message.others)
    own = message.process_bytes
    hidden = _unseen(message)
    total = max(named, hidden or 0)
    if not total:
        return None
    why = []
    for process in message.others[:4]:
        why.append(f"process {process.pid} held {size(process.bytes)} of the card")
    if named and own is None:
        why.append("the message does not say which process is its own: one of these may be (as in a container)")
    if hidden is not None and hidden > named + _ROUNDING:
        held = f"the {size(own)} of this process" if own is not None else "what this process holds"
        why.append(
            f"of the card's {size(message.capacity_bytes or 0)}, {size(free or 0)} was free and {held} "
            f"leaves {size(hidden)} to others, that the message does not name, as those of other containers"
        )
    helps = asked is not None and free is not None and free + total >= asked
    large = total > (message.capacity_bytes or 0) // 20 + 256 * MIB
    if named and own is None:
        sure: Certainty = "possible" if large and len(message.others) > 1 else "unlikely"
    else:
        sure = "likely" if helps and large else "possible" if large else "unlikely"
    if helps and sure != "unlikely" and asked is not None:
        why.append(f"without them there would have been room for the {size(asked)}")
    return _cause("other process", "other processes on the card", sure, why, others=total, free=free, requested=asked)


def _unseen(message: OomMessage) -> int | None:
    """What of the card is neither free nor this process's; None where the message does not tell."""
    if message.capacity_bytes is None or message.free_bytes is None or message.process_bytes is None:
        return None
    if message.process_bytes == 0 or (message.reserved_bytes or 0) > message.process_bytes + _ROUNDING:
        return None
    left = message.capacity_bytes - message.free_bytes - message.process_bytes
    return left if left > 512 * MIB else None


def _gave_up(message: OomMessage) -> Cause | None:
    asked, free = message.requested_bytes, message.free_bytes
    if asked is None or free is None or free < asked + _ROUNDING:
        return None
    limit = message.limit_bytes
    if limit is not None and limit < _NO_LIMIT and (message.reserved_bytes or 0) + asked > limit - _ROUNDING:
        return None
    why = [
        f"the card had {size(free)} free, more than the {size(asked)} that was asked for, when the message was made",
        "either another process or thread took memory at that moment and has given it back, or the driver could not map it: "
        "a limit of the system's (a MIG slice, a container, Windows), or host memory that ran out",
    ]
    return _cause("allocator gave up", "memory that was free a moment later", "likely", why, free=free, requested=asked)


def _outside(message: OomMessage) -> Cause | None:
    held, own = message.reserved_bytes, message.process_bytes
    if held is None:
        return None
    if own is not None and own > held:
        outside = own - held
        why = [
            f"the process held {size(own)}, of which {size(outside)} is not PyTorch's allocator's: CUDA's context and kernels, "
            "NCCL's buffers, other libraries"
        ]
        ordinary = outside <= _ORDINARY_OUTSIDE
        why.append("that is an ordinary share" if ordinary else "a context takes about 0.5 GiB, NCCL up to 2 GiB")
        sure: Certainty = "unlikely" if ordinary else "possible"
        return _cause("outside the allocator", "memory outside PyTorch's allocator", sure, why, outside=outside, process=own)
    if own is None and not message.others and message.capacity_bytes is not None and message.free_bytes is not None:
        outside = message.capacity_bytes - message.free_bytes - held
        if outside > _ROUNDING:
            what = (
                "CUDA's context, NCCL and other processes"
                if outside > _ORDINARY_OUTSIDE
                else "CUDA's context for the most part"
            )
            total = size(message.capacity_bytes)
            why = [f"of the card's {total}, {size(outside)} is neither free nor the allocator's: {what}"]
            large = outside > max(_ORDINARY_OUTSIDE, message.capacity_bytes // 10)
            name: CauseName = "other process" if large else "outside the allocator"
            title = "other processes on the card, or libraries" if large else "memory outside PyTorch's allocator"
            return _cause(
                name, title, "possible" if large else "unlikely", why, outside=outside, capacity=message.capacity_bytes
            )
    return None


def _need(message: OomMessage) -> Cause | None:
    asked, free, used = message.requested_bytes, message.free_bytes, message.allocated_bytes
    if asked is None:
        return None
    cached = message.unallocated_bytes
    why = []
    numbers = {"requested": asked, "free": free, "unallocated": cached, "allocated": used, "capacity": message.capacity_bytes}
    missing = None
    if free is not None:
        had = f"{size(free)} was free on the card"
        had += f" and {size(cached)} unused in the allocator" if cached is not None else ""
        missing = asked - free - (cached or 0)
        if missing > 0:
            why.append(
                f"{size(asked)} was asked for, {had}: {size(missing)} was missing{'' if cached is not None else ' at most'}"
            )
        else:
            why.append(f"{size(asked)} was asked for, and {had}")
        numbers["missing"] = max(0, missing)
    if used is not None:
        share = f", {_share(used, message.capacity_bytes)} of the card" if message.capacity_bytes else ""
        why.append(f"tensors held {size(used)}{share}")
    if not why:
        why.append(f"{size(asked)} was asked for; the message says nothing of what was free")
    return _cause("real need", "the step needs more than there is", _need_certainty(message, missing), why, **numbers)


def _need_certainty(message: OomMessage, missing: int | None) -> Certainty:
    used, capacity = message.allocated_bytes, message.capacity_bytes
    if missing is not None and missing <= 0:
        return "unlikely"
    if used is None or capacity is None:
        return "likely" if missing is None or missing > 0 else "possible"
    if used + (message.requested_bytes or 0) > capacity:
        return "certain"
    return "likely" if used > capacity // 2 else "possible"


def _of_mps(message: OomMessage) -> Iterator[Cause]:
    asked, limit = message.requested_bytes, message.limit_bytes
    held = (message.allocated_bytes or 0) + (message.other_bytes or 0)
    if limit is not None and asked is not None:
        why = [
            f"Metal had {size(held)} allocated, {size(message.allocated_bytes or 0)} of it PyTorch's",
            f"with the {size(asked)} that was asked for that is {size(held + asked)}",
            f"PyTorch allows itself {size(limit)} (the high watermark)",
        ]
        over = held + asked > limit
        yield _cause(
            "limit", "the high watermark", "certain" if over else "possible", why, limit=limit, held=held, requested=asked
        )
    if asked is not None and limit is None:
        why = [f"{size(asked)} was asked for in one piece, more than Metal can give"]
        yield _cause("huge request", "one very large tensor", "likely", why, requested=asked)
    elif asked is None:
        yield _cause("real need", "the step needs more than there is", "possible", ["the message gives no sizes"])


def _of_runtime(message: OomMessage) -> Iterator[Cause]:
    who = _RUNTIMES.get(message.kind, "the caching allocator")
    yield _cause(
        "outside the allocator",
        "no room left outside PyTorch's allocator",
        "likely",
        [
            f"it is {who} that found no memory, not PyTorch's allocator, so the message has no sizes",
            "what PyTorch keeps for later is no use to it: a card that PyTorch has filled has no room for a library",
        ],
    )
    yield _cause(
        "other process",
        "other processes on the card",
        "possible",
        ["where it fails before the first step, the card was full before this process began: `nvidia-smi` shows who holds it"],
    )


def _host(message: OomMessage) -> Cause:
    asked, held = message.requested_bytes, message.process_bytes
    if message.kind == "cpu allocator":
        what = f"{size(asked)} of host memory was asked for" if asked is not None else "the host's memory ran out"
        if asked is not None and asked > _ABSURD:
            why = [what, "no machine has so much: the size is most likely garbage or negative"]
            return _cause("huge request", "a size that makes no sense", "certain", why, requested=asked)
        shared = "shared memory" in message.text
        why = [what, "it is the machine's own memory that ran out, not the card's"]
        if shared:
            why.append("data loader workers hand over batches in shared memory, whose size is that of /dev/shm")
        return _cause("host memory", "the machine's own memory", "certain", why, requested=asked)
    if not message.process and held is None and "oom" not in message.text.lower() and "memory" not in message.text.lower():
        why = [
            "the process was ended by signal 9, as the kernel does when the host's memory ran out",
            "nothing else says so here",
        ]
        return _cause("host memory", "the machine's own memory", "possible", why)
    where = (
        "its cgroup's (a container's or a job's) limit was reached" if "cgroup" in message.text else "the host's memory ran out"
    )
    name = f"the kernel ended {message.process}" if message.process else "the kernel ended a process"
    why = [f"{name}, as {where}"] + ([f"it had {size(held)} resident"] if held is not None else [])
    return _cause("host memory", "the machine's own memory", "certain", why, process=held)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"
