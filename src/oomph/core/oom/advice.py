"""What helps against a candidate and against a cause, in general: how much of the tensor each change removes, no more.

What a change does to the whole step needs a recipe, and is predicted with one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from oomph.core.oom.guesses import FLOAT32
from oomph.diagnosis_records import Candidate, Cause, Cure, OomMessage
from oomph.units import size

MOST = 6
"""Changes that are named."""

_EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def cures(message: OomMessage, candidates: Sequence[Candidate], causes: Sequence[Cause]) -> tuple[Cure, ...]:
    """Changes that help, the best first.

    Args:
        message: what was reported.
        candidates: for the request; the first is gone by, unless it is unlikely itself.
        causes: of the failure, the most plausible first.
    """
    found: list[Cure] = []
    strong = [cause for cause in causes if cause.certainty in ("certain", "likely")] or list(causes[:1])
    first = candidates[0] if candidates and candidates[0].certainty != "unlikely" else None
    own = list(_of_candidate(first)) if first is not None else list(_of_any(message))
    for cause in strong:
        if cause.name in ("real need", "huge request"):
            found += own
        else:
            found += _of_cause(cause, message)
    if message.kind not in ("cpu allocator", "linux oom killer"):
        found += own
    first_of = {cure.change: cure for cure in reversed(found)}
    return tuple(first_of[change] for change in dict.fromkeys(cure.change for cure in found))[:MOST]


def _of_candidate(candidate: Candidate) -> Iterator[Cure]:
    what, shape = candidate.what, candidate.shape
    if "scores" in what:
        yield Cure(
            'use attention that never writes out the scores: attn_implementation="sdpa", or "flash_attention_2"',
            f"removes this tensor and the others of its size; eager attention holds two to four of {_named(candidate)} at once",
            exact=True,
            saves_bytes=candidate.bytes,
        )
    elif what.startswith("logits"):
        yield Cure(
            "compute the loss in chunks of tokens (a fused or chunked cross-entropy)",
            "the logits of all tokens are then never there at once, nor their float32 copies and their gradient",
            exact=True,
            saves_bytes=candidate.bytes * 15 // 16,
        )
    elif what == "expert dispatch":
        yield Cure(
            "dispatch tokens by sorting or grouped matrix products instead of DeepSpeed's dense masks",
            "memory then grows with the tokens and not with their square",
            exact=None,
            saves_bytes=candidate.bytes,
        )
    elif what == "attention mask":
        yield Cure(
            "leave the mask to the kernel (causal attention without a mask, or flash attention)",
            "no mask of tokens × tokens is made",
            exact=True,
            saves_bytes=candidate.bytes,
        )
    yield from _by_batch(candidate)
    yield from _by_length(candidate)
    if "activation" in what or "hidden" in what:
        yield Cure("turn on gradient checkpointing", "blocks keep their input alone and are computed a second time", exact=True)
    if len(shape) == 1 or "weight" in what or "embedding" in what:
        yield from _of_parameters(candidate)
    if "vision" in what:
        yield Cure("give images fewer pixels (`max_pixels`, or a smaller tile count)", "patches count squared", exact=False)


def _named(candidate: Candidate) -> str:
    return f"{size(candidate.bytes)}"


def _by_batch(candidate: Candidate) -> Iterator[Cure]:
    """Half the micro-batch at the same effective batch, valued by what it leaves of the tensor."""
    if candidate.what == "expert dispatch":
        yield Cure(
            "halve the micro-batch and double the accumulation",
            "removes three quarters of this tensor, as it grows with the square of the tokens",
            exact=False,
            saves_bytes=candidate.bytes * 3 // 4,
        )
    elif candidate.symbols[0] in ("samples", "images"):
        samples, noun = candidate.shape[0], candidate.symbols[0]
        if samples == 1:
            yield Cure(
                "there is no smaller micro-batch than 1: shorten the samples or shard the step",
                f"the tensor is of one {noun.removesuffix('s')}",
                exact=False,
            )
            return
        left = samples // 2
        saved = candidate.bytes - candidate.bytes // samples * left
        yield Cure(
            f"halve the micro-batch and double the accumulation: {samples} to {left} {noun}",
            f"removes {100 * saved // candidate.bytes} % of this tensor, {size(saved)}, and as much of all activations",
            exact=True,
            saves_bytes=saved,
        )


def _by_length(candidate: Candidate) -> Iterator[Cure]:
    """Shorter samples, valued at the next power of two below, or at half."""
    places = [place for place, symbol in enumerate(candidate.symbols) if symbol.startswith("tokens")]
    if not places or candidate.what == "expert dispatch":
        return
    tokens = candidate.shape[places[0]]
    shorter = 1 << (tokens - 1).bit_length() - 1
    if tokens <= 256 or shorter < 128:
        return
    left = candidate.bytes
    for place in places:
        left = left * shorter // candidate.shape[place]
    yield Cure(
        f"cut samples at {shorter:,} tokens, counted after images have taken their places",
        f"removes {100 * (candidate.bytes - left) // candidate.bytes} % of this tensor; it changes what is trained on",
        exact=False,
        saves_bytes=candidate.bytes - left,
    )


def _of_parameters(candidate: Candidate) -> Iterator[Cure]:
    bytes_each = 4 if candidate.dtype == FLOAT32 else 2
    elements = math.prod(candidate.shape)
    if candidate.symbols == ("elements",):
        setting = "sub_group_size" if "sub-group" in candidate.what else "reduce_bucket_size and allgather_bucket_size"
        yield Cure(
            f"make {setting} smaller in DeepSpeed's JSON, for example a tenth: {elements // 10:,}",
            "the buffer is as large as this setting says, whatever the model",
            exact=True,
            saves_bytes=candidate.bytes * 9 // 10,
        )
        return
    yield Cure(
        "know that a smaller micro-batch removes nothing of it",
        "it has the size of parameters, not of samples",
        exact=None,
        saves_bytes=0,
    )
    yield Cure(
        "shard what is kept for every parameter over the GPUs (ZeRO-3, FSDP), or put the optimizer in host memory",
        f"weights, gradients and Adam's two states take {bytes_each} bytes or more each for every parameter",
        exact=True,
    )
    yield Cure(
        "train adapters (LoRA) in place of the weights, or use an 8-bit optimizer",
        "gradients and optimizer states are then those of the adapters, or a quarter as large",
        exact=False,
    )


def _of_any(message: OomMessage) -> Iterator[Cure]:
    """Changes where the tensor is not known."""
    if message.phase in ("load", "checkpoint saving"):
        yield Cure("load and save in pieces: low_cpu_mem_usage, safetensors, sharded checkpoints", "no second copy is made")
        return
    yield Cure("halve the micro-batch and double the accumulation", "removes half of all activations", exact=True)
    yield Cure("turn on gradient checkpointing", "blocks keep their input alone and are computed a second time", exact=True)


def _of_cause(cause: Cause, message: OomMessage) -> list[Cure]:
    if cause.name == "fragmentation":
        old = any(word in message.torch for word in ("to 2.0", "to 1.1", "up to"))
        if old:
            change = "set PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:256; from PyTorch 2.1 on expandable_segments:True is better"
        else:
            change = f"set {_EXPANDABLE} before the process starts"
        why = "pieces can then be used for a request that is larger than each of them"
        return [Cure(change, why, exact=True, saves_bytes=None)]
    if cause.name == "other process":
        pids = ", ".join(str(process.pid) for process in message.others if process.pid is not None)
        who = (
            f"end the other processes on the card (pid {pids})"
            if pids
            else "see who else is on the card, and end it (`nvidia-smi`)"
        )
        return [Cure(who, "it holds memory that this one needs", exact=True, saves_bytes=cause.numbers.get("others"))]
    if cause.name == "limit":
        if message.kind == "mps":
            return [
                Cure(
                    "give PyTorch more with PYTORCH_MPS_HIGH_WATERMARK_RATIO, if the machine has it",
                    "it is a limit",
                    exact=True,
                )
            ]
        return [
            Cure("raise or drop torch.cuda.set_per_process_memory_fraction", "the card has more than was allowed", exact=True)
        ]
    if cause.name == "outside the allocator":
        return [
            Cure(
                "leave the card some room: a smaller micro-batch", "libraries allocate next to PyTorch's allocator", exact=True
            ),
            Cure(
                "see whether the card is empty before the run (`nvidia-smi`)",
                "a process that hangs keeps its memory",
                exact=True,
            ),
        ]
    if cause.name == "host memory":
        return _of_host(message)
    if cause.name == "allocator gave up":
        return [Cure("run it once more, alone on the card", "it shows whether something else took the memory", exact=True)]
    return []


def _of_host(message: OomMessage) -> list[Cure]:
    shared = "shared memory" in message.text
    found = [
        Cure("use fewer data loader workers, or fewer batches ahead (prefetch_factor)", "each has its own batches", exact=True),
        Cure("load weights on one rank at a time, from safetensors", "every rank otherwise holds a whole copy", exact=True),
        Cure(
            "take the optimizer's or the parameters' offload back to the card", "offload keeps them in host memory", exact=True
        ),
    ]
    if shared:
        found.insert(
            0, Cure("give the container more shared memory (docker run --shm-size)", "/dev/shm is 64 MB by default", exact=True)
        )
    return found
